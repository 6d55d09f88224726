"""`vlm2vec info MODEL`: family, parameters by part, dtype, embedding size, prompts, options, adapter, memory."""

from __future__ import annotations

import argparse
import json

from torch import nn

from vlm2vec.commands import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="checkpoint folder or hub name")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    common.add_model_arguments(parser)


def describe(model: nn.Module) -> dict:
    """The facts, as plain values."""
    backbone, module = model.backbone, model.model
    text, tower = backbone.text_model(module), backbone.vision_tower(module)
    counted = {id(p): (p, n) for n, p in module.named_parameters()}

    def count(part) -> int:
        return 0 if part is None else sum(size(counted.pop(id(p))[0]) for p in part.parameters() if id(p) in counted)

    adapter = sum(size(p) for p, n in counted.values() if ".lora_" in n)
    counted = {i: (p, n) for i, (p, n) in counted.items() if ".lora_" not in n}
    vision = count(tower)
    embedding = count(text.get_input_embeddings())
    layers = count(text)
    other = sum(size(p) for p, _ in counted.values())
    stored = sum(p.numel() * p.element_size() for p in module.parameters())
    settings = model.adapter_settings or {}
    return {
        "model": model.source,
        "base": model.base_source,
        "family": model.family,
        "class": type(module).__name__,
        "embedding dimensions": model.embedding_dim,
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": {
            "vision tower": vision,
            "token embedding": embedding,
            "decoder": layers,
            "other": other,
            "adapter": adapter,
            "total": vision + embedding + layers + other + adapter,
        },
        "weights in memory (MiB)": round(stored / 2**20, 1),
        "packed batches": backbone.packs,
        "options": model.options,
        "prompts": model.prompts,
        "adapter": {
            "kind": "DoRA" if settings.get("use_dora") else "LoRA",
            "r": settings.get("r"),
            "alpha": settings.get("lora_alpha"),
            "targets": sorted(settings.get("target_modules") or [])
            if not isinstance(settings.get("target_modules"), str)
            else settings["target_modules"],
        }
        if settings
        else None,
    }


def size(parameter: nn.Parameter) -> int:
    """Elements of a parameter; a 4-bit one packs two into a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def run(args: argparse.Namespace) -> int:
    from vlm2vec import VLM2Vec

    model = VLM2Vec.from_pretrained(
        args.model, base=args.base, dtype=args.dtype, device=args.device or "cpu", attn=args.attn, **common.parse_options(args.option)
    )
    facts = describe(model)
    if args.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return 0
    for key, value in facts.items():
        if isinstance(value, dict) and value:
            print(f"{key}")
            for name, inner in value.items():
                print(f"  {name:<22} {_show(inner)}")
        elif value in (None, {}):
            print(f"{key:<24} none")
        else:
            print(f"{key:<24} {_show(value)}")
    return 0


def _show(value) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
