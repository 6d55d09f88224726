"""`VLM2Vec.from_pretrained`: which family, which files, which options."""

from vlm2vec import loading
from vlm2vec.backbones import backbone_for


def load(cls, source: str, base, *, dtype, device, attn, revision, quantize, liger, options: dict):
    """See `VLM2Vec.from_pretrained`."""
    loading.check_source(source)
    hub = {"revision": revision} if revision else {}
    settings = loading.read_json(source, loading.SETTINGS, **hub) or {}
    family = settings.get("family")
    adapter = loading.read_json(source, "adapter_config.json", **hub)
    weights = source
    if adapter is not None:
        from vlm2vec import adapters

        weights = adapters.base_of(source, adapter, base)
        loading.check_source(weights)
        inherited = loading.read_json(weights, loading.SETTINGS) or {}
        settings = {k: {**inherited.get(k, {}), **settings.get(k, {})} for k in ("options", "prompts")}
    elif base is not None:
        raise ValueError(f"base={base!r} was given, but {source} is not an adapter (it has no adapter_config.json); leave base out")
    raw = loading.read_json(weights, "config.json", **({} if adapter is not None else hub))
    if raw is None:
        raise ValueError(f"{weights} has no config.json; give a model folder or a hub name such as Qwen/Qwen2-VL-2B-Instruct")
    backbone = backbone_for(raw.get("model_type"))
    if family not in (None, backbone.name):
        raise ValueError(f"{source} was made with family {family}, {weights} is of family {backbone.name}: tensors have no place in it; pass its own base with base=")
    config = backbone.config(weights, raw)
    device = loading.resolve_device(device)
    dtype = loading.resolve_dtype(dtype, config)
    quantization = None
    if quantize is not None:
        from vlm2vec.quantization import keep_layout, nf4_config

        quantization = nf4_config(quantize, dtype, backbone)
    known = {**backbone.options_for(weights, raw), **backbone.options_for(source, raw)}
    options = {**known, **settings.get("options", {}), **options}
    processing = None
    for folder in dict.fromkeys([source, weights]):  # an adapter folder may hold its own tokenizer and processor, or none
        if loading.has_processor(folder):
            processing = backbone.processing_class.from_folder(folder, config, options)
            break
    if processing is None:
        raise ValueError(f"{source} has no tokenizer or processor files, nor has {weights}; copy them from the base model")
    module = loading.load_module(backbone, weights, config, dtype=dtype, device=device, quantization=quantization)
    if quantization is not None:
        keep_layout(module)
    model = cls(module, backbone, processing, attn=attn, source=source, prompts=settings.get("prompts"))
    model.base_source, model.revision = weights, revision
    if adapter is not None:
        adapters.load(model, source, adapter, **hub)
    if liger:
        from vlm2vec.quantization import apply_liger

        apply_liger(model)
    return model.eval()
