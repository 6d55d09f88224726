"""What a family of backbones must say, and everything that families share.

A family is one file, or a package, with two classes and one line in `vlm2vec/backbones/__init__.py`:

* a `Processing`: input -> `Features`, on the CPU, without weights, picklable for DataLoader workers;
* a `Backbone`: how the transformers module is loaded and how a packed batch runs through it. It holds no tensors, the module is
  handed to it, so that state dicts and FSDP see only the module.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlm2vec import attention
from vlm2vec.backbones.last_rows import ending_at_rows
from vlm2vec.backbones.processing import Processing, Visual
from vlm2vec.packing import Features, PackedBatch, pack

if TYPE_CHECKING:
    from transformers import PretrainedConfig


__all__ = ["Backbone", "Processing", "Visual", "override", "patches_as_linear"]


class Backbone:
    """A family's rules for its transformers module. Override what differs.

    Class attributes:
        name: registry key, written to vlm2vec.json.      processing_class: its `Processing`.
        packs: False for families that see images in both directions, or whose layers carry state from token to token (recurrent,
            linear attention) and do not begin anew with every sample: those would leak, so they are padded inside `last_hidden`.
        adapter_renames: (pattern, replacement) pairs that bring older weight names to the module's own, tried in order.
        hub_names: (pattern, replacement) pairs from the module's names to those of the hub's checkpoints, first match only.
        unquantized: parts whose names contain one of these stay in full precision when the base is quantised.
        unused_keys: patterns of checkpoint names that the embedding model does not have, with the reason in a comment.
    """

    name: str = ""
    processing_class: type[Processing] = Processing
    packs = True
    adapter_renames: list[tuple[str, str]] = []
    hub_names: list[tuple[str, str]] = [(r"^", "model.")]
    unquantized: tuple[str, ...] = (
        "visual",
        "vision_tower",
        "vision_model",
        "vision_embed_tokens",
        "multi_modal_projector",
        "connector",
        "lm_head",
    )
    unused_keys: list[str] = [r"^lm_head\."]  # the embedding model has no language-model head
    # Parts of parameters' names that are the way from vision features to the decoder, wherever the family keeps it.
    projector_names: tuple[str, ...] = (
        "merger",
        "deepstack_merger_list",
        "multi_modal_projector",
        "image_newline",
        "img_projection",
        "glb_GN",
        "sub_GN",
        "connector",
        "mm_projector",
        "embed_vision",
    )
    architecture: str | None = None  # the class that config.json should name
    sections: tuple[str, ...] = ("text_config", "vision_config")  # of config.json, without which a library would take a default's sizes
    published: list[tuple[str, dict]] = []  # (pattern of a lower-case name or folder, options it wants and does not name itself)

    # -- loading --------------------------------------------------------------------------------------------------------

    def config(self, source: str, raw: dict, **hub: Any) -> PretrainedConfig:
        """The configuration object for a folder or hub name; `raw` is its config.json."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(source, **hub)
        except (ValueError, KeyError) as e:
            if "model_type" not in str(e) and "model type" not in str(e) and str(e) != repr(raw.get("model_type")):
                raise  # the family is known, its configuration is damaged
            raise ValueError(f"{source}: model_type {raw.get('model_type')!r} is unknown to this transformers ({str(e)[:200]})") from e

    def options_for(self, source: str, raw: dict) -> dict:
        """Options that a checkpoint wants without saying so in vlm2vec.json (a public one, known by its name or config)."""
        name = source.rstrip("/").lower()
        return next((dict(options) for pattern, options in self.published if re.search(pattern, name)), {})

    def model_class(self, config: PretrainedConfig) -> type:
        """Class of the bare module (no lm_head)."""
        from transformers import AutoModel

        return AutoModel

    def finish(self, model: nn.Module) -> None:
        """After loading: switch the module to packed attention."""
        attention.register()
        for module in self.text_model(model).modules():
            if hasattr(module, "config") and hasattr(module.config, "_attn_implementation_internal"):
                module.config._attn_implementation_internal = attention.TEXT_ATTENTION
        tower = self.vision_tower(model)
        for module in [] if tower is None else tower.modules():
            if hasattr(module, "config") and hasattr(module.config, "_attn_implementation_internal"):
                module.config._attn_implementation_internal = attention.VISION_ATTENTION

    def text_model(self, model: nn.Module) -> nn.Module:
        """The decoder: takes inputs_embeds and position_ids, ends with `.norm`."""
        return model.language_model

    def vision_tower(self, model: nn.Module) -> nn.Module | None:
        """The vision tower, None when the family has none."""
        return getattr(model, "visual", None)

    def parts(self, model: nn.Module) -> dict[str, list[str]]:
        """{"language" | "vision" | "projector": names of the module's parameters}; an adapter's own are in none."""
        tower = self.vision_tower(model)
        inside = set() if tower is None else {id(parameter) for parameter in tower.parameters()}
        found: dict[str, list[str]] = {"language": [], "vision": [], "projector": []}
        for name, parameter in model.named_parameters():
            if ".lora_" not in name:
                is_projector = any(part in self.projector_names for part in name.split("."))
                found["projector" if is_projector else "vision" if id(parameter) in inside else "language"].append(name)
        return found

    def embedding_dim(self, config: PretrainedConfig) -> int:
        return config.get_text_config().hidden_size

    # -- planning: what a family is without its files (`train.plan`) ---------------------------------------------------------

    def marker_ids(self, config: PretrainedConfig) -> dict[str, int]:
        """Token ids of the markers of visuals, as the configuration has them."""
        cls, text = self.processing_class, ("image_token_id", "image_token_index")
        ids = {cls.video_marker: getattr(config, "video_token_id", None)}
        ids[cls.image_marker] = next((i for i in (getattr(config, name, None) for name in text) if i is not None), None)
        return {marker: id_ for marker, id_ in ids.items() if marker is not None and id_ is not None}

    def default_image_processor(self, raw: dict) -> Any:
        """What `processing_class` asks of an image processor, with the defaults of the family's checkpoints; `raw` is config.json."""
        return SimpleNamespace(rescale_factor=1 / 255, image_mean=[0.5] * 3, image_std=[0.5] * 3)

    def vision_width(self, config: PretrainedConfig) -> int:
        """Numbers that `vision` gives for an image token."""
        return self.embedding_dim(config)

    # -- running --------------------------------------------------------------------------------------------------------

    def pack(self, features: list[Features], provider: str = "sdpa") -> PackedBatch:
        """Lay samples one behind the other and prepare what the layers need, on the CPU."""
        packed = pack(features)
        packed.segments.provider = provider
        if packed.vision:
            packed.vision = self.prepare_vision(packed.vision, provider)
        return packed

    def prepare_vision(self, vision: dict, provider: str) -> dict:
        """From the joined `Visual.tensors` to what `vision` wants: grids as Python lists, segments, positions."""
        return vision

    def vision(self, model: nn.Module, packed: PackedBatch) -> torch.Tensor | None:
        """Vision features (V, D) in the order of `packed.visual_index`; None without visuals."""
        return None

    def embed(self, model: nn.Module, packed: PackedBatch, features: torch.Tensor | None) -> torch.Tensor:
        """Token embeddings with the vision features in their places, (T, D)."""
        embeds = self.text_model(model).get_input_embeddings()(packed.input_ids)
        if features is None:
            return embeds
        return embeds.index_copy(0, packed.visual_index, features.to(embeds.dtype))

    def text_kwargs(self, model: nn.Module, packed: PackedBatch, features: torch.Tensor | None) -> dict:
        """More keyword arguments for the decoder (Qwen3-VL's deepstack features)."""
        return {}

    def last_hidden(self, model: nn.Module, packed: PackedBatch, features: torch.Tensor | None) -> torch.Tensor:
        """Hidden state of each sample's last token after the final norm, (B, D)."""
        text, further = self.text_model(model), self.text_kwargs(model, packed, features)
        embeds = self.embed(model, packed, features)
        out = ending_at_rows(text, packed.last_index, plain_last_layer=self.plain_last_layer(text, further))(
            inputs_embeds=embeds[None],
            position_ids=self.position_argument(packed),
            attention_mask=self.no_mask(text),
            use_cache=False,
            segments=packed.segments,
            **further,
        )
        hidden = out.last_hidden_state[0]
        # A decoder whose forward is bound to itself (compiled in place, wrapped by accelerate) ran its own norm, on all tokens.
        return hidden if len(hidden) == len(packed) else hidden.index_select(0, packed.last_index)

    def shares_prefixes(self, model: nn.Module) -> bool:
        """Whether samples that begin alike may be computed together (`vlm2vec.evaluation.encode.prefixes`): a packed token's output follows
        from its position and from the keys and values of all tokens before it in its sample, and from nothing else."""
        return False

    def plain_last_layer(self, text: nn.Module, further: dict) -> bool:
        """Whether the decoder ends as `last_rows.ending_at_rows` says, given the keyword arguments of `text_kwargs`."""
        return False

    def position_argument(self, packed: PackedBatch) -> torch.Tensor:
        """Position ids as the decoder takes them: (1, T), or (3, 1, T)."""
        return packed.position_ids[..., None, :]

    def no_mask(self, text: nn.Module) -> dict[str, None] | None:
        """Packed attention needs no mask; a dictionary tells transformers that masks are already made."""
        return {kind: None for kind in ("full_attention", "sliding_attention")}


def override(module: torch.nn.Module, **methods: Callable) -> None:
    """Give one module other methods; its weights, their names and its siblings stay as they are.

    Args:
        methods: functions of a file's top level. A pickle names them and the module's own class: the class made here it would not find.
    """
    module.__class__ = overridden(type(module), tuple(sorted(methods.items())))


@cache
def overridden(cls: type, methods: tuple[tuple[str, Callable], ...]) -> type:
    """The class with other methods. Its instances pickle and copy."""

    def reduce(self, protocol: int) -> tuple:
        return unpickled, (cls, methods), self.__getstate__()

    return type(cls.__name__, (cls,), {**dict(methods), "__reduce_ex__": reduce})


def unpickled(cls: type, methods: tuple[tuple[str, Callable], ...]) -> torch.nn.Module:
    """An empty module of an overridden class, which pickle then fills."""
    made = overridden(cls, methods)
    return made.__new__(made)


def patches_as_linear(self, patches: torch.Tensor) -> torch.Tensor:
    """`forward` of a patch embedding, a convolution whose stride is its kernel, as the matrix product that it is.

    On a CPU the convolution's backward is several times slower than the product. Patches may come without their time steps,
    (P, C * patch**2): a picture is shown through all of them, and the steps' weights add up. 16-bit weights would lose digits by it.
    """
    weight = self.proj.weight
    if patches.dim() == 2 and patches.shape[1] * weight.shape[2] == weight[0].numel() and weight.shape[2] > 1:
        if weight.dtype in (torch.float32, torch.float64):
            weight = weight.sum(2)
        else:
            patches = patches.unflatten(1, (weight.shape[1], 1, -1)).expand(-1, -1, weight.shape[2], -1).flatten(1)
    weight = weight.flatten(1)
    return torch.nn.functional.linear(patches.view(-1, weight.shape[1]).to(weight.dtype), weight, self.proj.bias)
