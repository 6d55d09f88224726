"""`VLM2Vec.from_pretrained`: which family, which files, which options; and all of it without the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm2vec.backbones import backbone_for, processing_for
from vlm2vec.checkpoint import folder_checks, loading
from vlm2vec.checkpoint.feeding import feeding_of, saved_options
from vlm2vec.files.documents import kind

if TYPE_CHECKING:
    import torch


@dataclass
class Description:
    """A model without its weights.

    Attributes:
        weights: folder or hub name of the weights: an adapter's base, else the source itself.
        adapter: adapter_config.json of the source, None where it is no adapter.
        settings: vlm2vec.json; for an adapter over its base's.
        hub, weights_hub: hub options (a revision) of the source and of `weights`.
    """

    backbone: Any
    config: Any
    processing: Any
    weights: str
    adapter: dict | None
    settings: dict
    hub: dict
    weights_hub: dict


def describe(source: str, base: str | None = None, *, revision: str | None = None, options: dict | None = None) -> Description:
    """Everything of a model but its weights: family, config and processing. See `VLM2Vec.from_pretrained`."""
    loading.check_source(source)
    hub = {"revision": revision} if revision else {}
    settings = _settings(source, **hub)
    family = settings.get("family")
    adapter = loading.read_json(source, "adapter_config.json", **hub)
    weights, weights_hub = source, hub
    if adapter is not None:
        folder_checks.check_adapter_config(f"{source}: adapter_config.json", adapter)
        from vlm2vec.checkpoint import adapters

        weights = adapters.base_of(source, adapter, base)
        loading.check_source(weights)
        # PEFT notes the revision of the base that it names
        weights_hub = {"revision": adapter["revision"]} if base is None and adapter.get("revision") else {}
        inherited = _settings(weights, **weights_hub)
        settings = {k: {**inherited.get(k, {}), **settings.get(k, {})} for k in ("options", "prompts")}
    elif base is not None:
        raise ValueError(f"base={base!r} was given, but {source} is not an adapter (it has no adapter_config.json); leave base out")
    raw = loading.read_json(weights, "config.json", **weights_hub)
    if raw is None:
        raise ValueError(loading.unknown(weights) if adapter is None else f"{source}: its base: {loading.unknown(weights)}; pass base=")
    options = dict(options or {})
    feeding = feeding_of(_family(weights, raw), {source: hub, weights: weights_hub}, settings, options)
    backbone = backbone_for(raw.get("model_type"))
    if family not in (None, backbone.name):
        raise ValueError(
            f"{source} was made with family {family}, {weights} (model_type {raw['model_type']}) is of family {backbone.name}: "
            "tensors have no place in it; pass its own base with base="
        )
    folder_checks.check_config(weights, raw, backbone.sections)
    with folder_checks.naming(weights, "config.json"):
        config = backbone.config(weights, raw, **weights_hub)
    known = {**backbone.options_for(weights, raw), **backbone.options_for(source, raw)}
    options = {**known, **saved_options(settings, feeding), **options, "feeding": feeding}
    processing_class, processing = processing_for(backbone, feeding), None
    for folder, of in {source: hub, weights: weights_hub}.items():  # an adapter may come with tokenizer and processor, or without
        if loading.has_processor(folder, **of):
            folder_checks.check_processor_files(folder)
            with folder_checks.naming(folder, "its tokenizer (tokenizer.json, tokenizer_config.json) or processor"):
                processing = processing_class.from_folder(folder, config, options, **of)
            loading.check_tokenizer(folder, processing.tokenizer, **of)
            break
    if processing is None:
        raise ValueError(f"{source} has no tokenizer or processor files, nor has {weights}; copy them from the base model")
    return Description(backbone, config, processing, weights, adapter, settings, hub, weights_hub)


def _settings(source: str, **hub: Any) -> dict:
    """vlm2vec.json, checked; {} where there is none."""
    settings = loading.read_json(source, loading.SETTINGS, **hub)
    if settings is None:
        return {}
    folder_checks.check_settings(f"{source}: {loading.SETTINGS}", settings)
    return settings


def _family(source: str, raw: dict) -> str | None:
    """The family that config.json names."""
    name = raw.get("model_type")
    if name is not None and (not isinstance(name, str) or len(name) > 100):
        raise ValueError(f"{source}: config.json's model_type should be the name of a family, got {kind(name)}")
    return name


def load(
    cls,
    source: str,
    base: str | None,
    *,
    dtype: torch.dtype | str | None,
    device: torch.device | str | None,
    attn: str | None,
    revision: str | None,
    quantize: str | None,
    liger: bool,
    options: dict,
) -> Any:
    """See `VLM2Vec.from_pretrained`."""
    description = describe(source, base, revision=revision, options=options)
    device = loading.resolve_device(device)
    dtype = loading.resolve_dtype(dtype, description.config)
    quantization = None
    if quantize is not None:
        from vlm2vec.checkpoint.quantization import keep_layout, nf4_config

        quantization = nf4_config(quantize, dtype, description.backbone)
    module = loading.load_module(
        description.backbone,
        description.weights,
        description.config,
        dtype=dtype,
        device=device,
        quantization=quantization,
        **description.weights_hub,
    )
    if quantization is not None:
        keep_layout(module)
    model = cls(module, description.backbone, description.processing, attn=attn, source=source, prompts=description.settings.get("prompts"))
    model.base_source, model.revision = description.weights, revision
    if description.adapter is not None:
        from vlm2vec.checkpoint import adapters

        adapters.load(model, source, description.adapter, **description.hub)
    if liger:
        from vlm2vec.checkpoint.quantization import apply_liger

        apply_liger(model)
    return model.eval()
