"""LoRA and DoRA adapters: loaded with every tensor counted, saved under PEFT's names, merged exactly.

A plain PEFT load of the public adapters matches nothing on current transformers, whose text stack moved under
`model.language_model`, and only warns. Here names go through the family's `adapter_renames`, targets are taken from the tensors
themselves, and a tensor without a place, or a place without a tensor, is an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlm2vec.checkpoint.loading import file_of, renamed
from vlm2vec.files import write_json

if TYPE_CHECKING:
    from peft import LoraConfig

    from vlm2vec.backbones.base import Backbone


ADAPTER = "default"
PREFIX = "base_model.model."
# What the reference trains: attention and down projections under the names of all its backbones.
REFERENCE_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "gate_up_proj", "down_proj")
# What an adapter may hold beside LoRA's matrices, all of it whole numbers of the base: trained modules, biases, rows of the token table.
_TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
WHOLE = ("modules_to_save", "trainable_token_indices")
# Kinds of LoRA whose tensors mean something else than B A beside a layer.
_UNSUPPORTED = ("target_parameters", "layer_replication", "alora_invocation_tokens", "lora_bias", "use_qalora", "arrow_config")
_PARTS = re.compile(r"^(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(?P<tail>\.weight)?$")


def base_of(source: str, adapter: dict, base: str | None) -> str:
    """The base model of an adapter folder: `base`, else what its config names."""
    named = base or adapter.get("base_model_name_or_path")
    if not named:
        raise ValueError(f"{source}: adapter_config.json names no base model; pass base=NAME_OR_DIR")
    named = os.fspath(named)
    beside = os.path.join(source, named)
    if not os.path.isabs(named) and os.path.isdir(source) and os.path.isdir(beside):
        return beside
    if (os.path.isabs(named) or named.startswith(".")) and not os.path.isdir(named):
        raise ValueError(f"{source}: its base model {named} is not there; pass base=NAME_OR_DIR")
    return named


def read_tensors(source: str, **hub: Any) -> dict[str, torch.Tensor]:
    """An adapter's tensors from safetensors, or from a .bin file read without unpickling anything but tensors."""
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        path = file_of(source, name, **hub)
        if path is None:
            continue
        try:
            if name.endswith(".safetensors"):
                from safetensors.torch import load_file

                return load_file(path)
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as e:
            raise ValueError(f"{path} cannot be read safely ({type(e).__name__}); download it again or convert it to safetensors") from None
    raise ValueError(f"{source} has adapter_config.json but neither adapter_model.safetensors nor adapter_model.bin")


def own_names(backbone: Backbone, tensors: dict) -> dict[str, torch.Tensor]:
    """Adapter tensors under the module's names: PEFT's prefix off, the family's first matching rename applied."""
    return renamed({key.removeprefix(PREFIX): value for key, value in tensors.items()}, backbone.adapter_renames)


def lora_config(settings: dict, **overrides: Any) -> LoraConfig:
    """A LoraConfig from adapter_config.json; keys of other PEFT versions are left out."""
    from peft import LoraConfig

    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise ValueError(f"adapter of type {kind}: only LORA (DoRA included) can be loaded")
    if odd := [name for name in _UNSUPPORTED if settings.get(name)]:
        raise ValueError(
            f"adapter_config.json sets {', '.join(odd)}, which is not supported here; fold the adapter into its base with PEFT "
            "(merge_and_unload) and load the folder that this gives"
        )
    known = {f.name for f in fields(LoraConfig)}
    settings_of_peft = {k: v for k, v in settings.items() if k in known and k not in ("peft_type", "auto_mapping", "task_type")}
    return LoraConfig(**{**settings_of_peft, **overrides})


def load(model: nn.Module, source: str, settings: dict, **hub: Any) -> int:
    """Put an adapter folder's tensors into the model. Returns how many were used: all but those of a head that no embedding needs.

    Modules saved whole, biases and rows of the token table take the place of the base's, and are saved with the adapter again.

    Raises:
        ValueError: lists tensors without a place (the adapter does not fit the base) and places without a tensor.
    """
    unused = [re.compile(pattern) for pattern in model.backbone.unused_keys]
    tensors = own_names(model.backbone, read_tensors(source, **hub))
    tensors = {name: value for name, value in tensors.items() if not any(pattern.search(name) for pattern in unused)}
    parts, strange, whole = {}, [], []
    modules, originals = dict(model.model.named_modules()), dict(model.model.named_parameters())
    for name in tensors:
        match = _PARTS.match(name)
        if match is not None and match["module"] in modules:
            parts.setdefault(match["module"], {})[match["part"]] = name
        elif of_base(name) in originals:
            whole.append(name)
        else:
            strange.append(name)
    if strange or not parts:
        raise ValueError(
            f"adapter {source} does not fit {model.base_source} ({type(model.model).__name__}): {len(strange)} of {len(tensors)} "
            f"tensors have no place, among them {', '.join(sorted(strange)[:10]) or 'none'}; pass the base it was trained on with base="
        )
    patterns = {field: own_names(model.backbone, settings.get(field) or {}) for field in ("rank_pattern", "alpha_pattern")}
    dora = any("lora_magnitude_vector" in p for p in parts.values())
    config = lora_config(
        settings,
        target_modules=sorted(parts),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        use_dora=dora,
        init_lora_weights=True,
        inference_mode=False,
        bias="none",
        **dict.fromkeys(WHOLE),
        **patterns,
    )
    inject(model, config)
    parameters = dict(model.model.named_parameters())
    for name in whole:
        set_whole(model, source, name, tensors.pop(name), settings)
    expected = {n for n in parameters if ".lora_" in n}
    used = set()
    with torch.no_grad():
        for name, value in tensors.items():
            match = _PARTS.match(name)
            kind = match["part"]
            place = f"{match['module']}.{kind}.{ADAPTER}" + ("" if kind.startswith("lora_embedding") else ".weight")
            if place not in parameters or parameters[place].shape != value.shape:
                had = tuple(parameters[place].shape) if place in parameters else "no such parameter"
                raise ValueError(
                    f"adapter {source}: {name} has shape {tuple(value.shape)}, the model {had}; is {model.base_source} its base?"
                )
            parameters[place].copy_(value)
            used.add(place)
    if left := sorted(expected - used):
        raise ValueError(f"adapter {source} lacks {len(left)} tensors that the model expects: {', '.join(left[:10])}")
    kept = {name: settings[name] for name in ("target_modules", "bias", *WHOLE) if settings.get(name)}
    if "modules_to_save" in kept:  # without a head
        there = {part for name in whole for part in of_base(name).split(".")}
        kept["modules_to_save"] = [module for module in kept["modules_to_save"] if module.split(".")[-1] in there] or None
    model.adapter_settings = {**config.to_dict(), "target_modules": sorted(parts), **kept}
    model.adapter_whole = whole
    return len(used) + len(whole)


def of_base(name: str) -> str:
    """The base's parameter that an adapter's whole tensor is, or is rows of."""
    if name.endswith(_TOKEN_ROWS):
        return name.removesuffix(_TOKEN_ROWS) + ".weight"
    return name.replace(".base_layer.", ".")


def place_of(name: str, state: dict) -> str:
    """Where the parameter lies in a model with an adapter: under its own name, or inside the layer that LoRA wraps."""
    own = of_base(name)
    module, _, leaf = own.rpartition(".")
    return own if own in state else f"{module}.base_layer.{leaf}"


def token_rows(name: str, settings: dict) -> list[int] | None:
    """Rows of the token table that a tensor holds, None for one that holds a whole parameter."""
    if not name.endswith(_TOKEN_ROWS):
        return None
    indices = settings.get("trainable_token_indices") or []
    if isinstance(indices, dict):
        table = name.removesuffix(_TOKEN_ROWS)
        indices = next((rows for module, rows in indices.items() if table == module or table.endswith("." + module)), [])
    return list(indices)


def set_whole(model: nn.Module, source: str, name: str, value: torch.Tensor, settings: dict) -> None:
    """Put a whole tensor, or rows of the token table, in the place of the base's."""
    parameters = dict(model.model.named_parameters())
    target, rows = parameters[place_of(name, parameters)], token_rows(name, settings)
    expected = tuple(target.shape) if rows is None else (len(rows), target.shape[1])
    if tuple(value.shape) != expected:
        raise ValueError(
            f"adapter {source}: {name} has shape {tuple(value.shape)}, the model's is {expected}; a base with other tokens, or one "
            "in four bits, cannot take it: fold the adapter into its base with PEFT (merge_and_unload) and load that folder"
        )
    with torch.no_grad():
        if rows is None:
            target.copy_(value)
        else:
            target[torch.tensor(rows, device=target.device)] = value.to(target.device, target.dtype)


def inject(model: nn.Module, config: LoraConfig) -> None:
    """Wrap the target layers in place; everything but the adapter is frozen, the adapter is float32 at least."""
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import cast_adapter_dtype

    for parameter in model.model.parameters():
        parameter.requires_grad_(False)
    try:
        inject_adapter_in_model(config, model.model, adapter_name=ADAPTER)
    except ValueError as e:
        raise ValueError(f"the adapter's targets are not in {type(model.model).__name__}: {e}") from e
    cast_adapter_dtype(model.model, ADAPTER)
    model.adapter_settings = config.to_dict()


def add(
    model: nn.Module,
    *,
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    dora: bool = False,
    targets: str | Iterable[str] = REFERENCE_TARGETS,
    vision: bool | None = None,
    whole: Iterable[str] = (),
) -> None:
    """Give the model a fresh adapter to train.

    Args:
        targets: layer names (their last part), a regular expression over full names, or "all-linear". Names that the family
            does not have are ignored, as long as one matches.
        vision: False adapts nothing in the vision tower, True all its linear layers, None those that `targets` names.
        whole: parameters that are trained themselves (`train_whole`): their layers are not adapted.
    """
    from peft import LoraConfig

    if has_adapter(model):
        raise ValueError("the model has an adapter already; merge it first (model.merge_adapter())")
    targets = targets if isinstance(targets, str) else list(targets)
    if targets == "all-linear":
        linear = {n for n, m in model.model.named_modules() if isinstance(m, torch.nn.Linear) or type(m).__name__ == "Linear4bit"}
        targets = sorted({n.rpartition(".")[2] for n in linear if not n.startswith("visual") and "vision" not in n})
    tower, excluded = tower_layers(model), None
    if vision and not tower:
        raise ValueError(f"vision=True: {model.base_source} has no vision tower of its own with linear layers; leave it out")
    if vision:
        targets = "|".join([f"(?:{targets})", *map(re.escape, tower)]) if isinstance(targets, str) else [*targets, *tower]
    out = [*(tower if vision is False else ()), *(name.rpartition(".")[0] for name in whole if name.endswith(".weight"))]
    if out:
        excluded = "|".join(rf"(?:.*\.)?{re.escape(name)}" for name in dict.fromkeys(out))
    # The reference's adapters start from a Gaussian A and a zero B.
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_dora=dora,
        target_modules=targets,
        exclude_modules=excluded,
        init_lora_weights="gaussian",
    )
    inject(model, config)


def train_whole(model: nn.Module, names: Iterable[str], modules: Iterable[str]) -> None:
    """Trains parameters themselves beside the adapter, and keeps them in its files, as PEFT's `modules_to_save` (the modules' names)."""
    parameters = dict(model.model.named_parameters())
    for name in names:
        parameters[name].requires_grad_(True)
    model.adapter_whole = list(dict.fromkeys([*model.adapter_whole, *(of_base(name) for name in names)]))
    kept = model.adapter_settings.get("modules_to_save") or []
    model.adapter_settings["modules_to_save"] = list(dict.fromkeys([*kept, *modules])) or None


def tower_layers(model: nn.Module) -> list[str]:
    """Names of the linear layers of the vision tower."""
    tower = model.backbone.vision_tower(model.model)
    inside = set() if tower is None else {id(module) for module in tower.modules()}
    return [name for name, m in model.model.named_modules() if id(m) in inside and isinstance(m, torch.nn.Linear)]


def has_adapter(model: nn.Module) -> bool:
    return getattr(model, "adapter_settings", None) is not None


def adapter_tensors(model: nn.Module, state: dict | None = None) -> dict[str, torch.Tensor]:
    """The adapter under the names that PEFT gives it on transformers' generation class."""
    state = model.model.state_dict() if state is None else state
    cut = f".{ADAPTER}"
    tensors = {n.replace(cut + ".weight", ".weight").replace(cut, ""): v for n, v in state.items() if ".lora_" in n}
    for name in getattr(model, "adapter_whole", []):
        value, rows = state[place_of(name, state)], token_rows(name, model.adapter_settings)
        tensors[name] = value if rows is None else value[torch.tensor(rows, device=value.device)]
    return {PREFIX + "model." + name: value for name, value in tensors.items()}


def save(model: nn.Module, folder: str, state: dict | None = None) -> None:
    """Write adapter_model.safetensors and adapter_config.json."""
    from safetensors.torch import save_file

    tensors = {k: v.detach().to("cpu").contiguous() for k, v in adapter_tensors(model, state).items()}
    save_file(tensors, os.path.join(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
    settings = {k: sorted(v) if isinstance(v, set) else v for k, v in model.adapter_settings.items()}
    settings = {k: getattr(v, "value", v) for k, v in settings.items() if k != "runtime_config"}
    settings.update(base_model_name_or_path=model.base_source, inference_mode=True, auto_mapping=auto_mapping(model))
    write_json(os.path.join(folder, "adapter_config.json"), settings, sort_keys=True, default=str)


def auto_mapping(model: nn.Module) -> dict[str, str]:
    """The class whose names the tensors bear, by which AutoPeftModel opens the folder."""
    import transformers

    name = model.backbone.architecture or type(model.model).__name__
    library = "transformers" if hasattr(transformers, name) else type(model.model).__module__
    return {"base_model_class": name, "parent_library": library}


def merged_weight(layer: nn.Module) -> torch.Tensor:
    """W + scaling * B A, its rows brought to the DoRA magnitudes where there are any; computed in float32 (float64 if it is)."""
    stored, added = _stored_and_added(layer)
    weight = stored.to(added.dtype) + added
    if ADAPTER in layer.lora_magnitude_vector:
        weight = _at_magnitudes(layer, weight)
    return weight.to(stored.dtype)


def change(layer: nn.Module) -> torch.Tensor:
    """What the adapter adds to the layer's weight, in float32 (float64 if it is): not rounded to the weight's own dtype."""
    stored, added = _stored_and_added(layer)
    if ADAPTER not in layer.lora_magnitude_vector:
        return added
    return _at_magnitudes(layer, stored.to(added.dtype) + added) - stored.to(added.dtype)


def _at_magnitudes(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    magnitude = layer.lora_magnitude_vector[ADAPTER].weight.detach().to(weight.dtype)
    return weight * (magnitude / torch.linalg.vector_norm(weight, dim=1))[:, None]


def _stored_and_added(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """(W as it is held, scaling * B A)."""
    from peft.utils.integrations import dequantize_module_weight

    stored = dequantize_module_weight(layer.get_base_layer()).detach()
    wide = torch.float64 if stored.dtype == torch.float64 else torch.float32
    if ADAPTER in getattr(layer, "lora_embedding_A", {}):
        a, b = layer.lora_embedding_A[ADAPTER], layer.lora_embedding_B[ADAPTER]
        return stored, layer.scaling[ADAPTER] * (b.detach().to(wide) @ a.detach().to(wide)).T
    a, b = (getattr(layer, f"lora_{k}")[ADAPTER].weight.detach().to(wide) for k in "AB")
    return stored, layer.scaling[ADAPTER] * (b @ a)


def lora_layers(model: nn.Module) -> dict:
    from peft.tuners.lora import LoraLayer

    return {n: m for n, m in model.model.named_modules() if isinstance(m, LoraLayer)}


def merged_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The module's state dict with the adapter folded in and nothing in four bits; the model itself is left as it is."""
    from peft.utils.integrations import dequantize_module_weight

    layers = lora_layers(model)
    four_bit = {f"{n}.weight": m for n, m in model.model.named_modules() if type(m).__name__ == "Linear4bit"}
    state = {}
    for name, value in model.model.state_dict().items():
        if ".lora_" in name or any(name.startswith(f"{weight}.") for weight in four_bit):
            continue
        owner, base, rest = name.partition(".base_layer.")
        if base and owner in layers:
            state[f"{owner}.{rest}"] = merged_weight(layers[owner]) if rest == "weight" else value
        else:
            state[name] = dequantize_module_weight(four_bit[name]).detach() if name in four_bit else value
    return state


def merge(model: nn.Module) -> None:
    """Fold the adapter into the layers for good: they become ordinary ones, as fast as the base model's."""
    for layer in lora_layers(model).values():
        base = layer.get_base_layer()
        if type(base).__name__ == "Linear4bit":
            raise ValueError("an adapter cannot be merged into 4-bit layers; save_pretrained(folder, merge=True) writes a merged model")
        weight = merged_weight(layer)
        with torch.no_grad():
            base.weight.copy_(weight)
    drop(model)


def drop(model: nn.Module) -> None:
    """Take the adapter off: the layers become ordinary ones, with the weights that their base has."""
    for name, layer in lora_layers(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.model.get_submodule(parent), child, layer.get_base_layer())
    model.model.__dict__.pop("peft_config", None)
    model.adapter_settings, model.adapter_whole = None, []
