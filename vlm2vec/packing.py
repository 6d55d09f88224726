"""One chunk is one packed sequence: no padding, `cu_seqlens`, explicit positions, per-sample slices of the vision inputs."""

from dataclasses import dataclass, field, replace

import torch

from vlm2vec.attention import Segments


@dataclass
class Features:
    """One sample after preprocessing: CPU tensors, picklable.

    Attributes:
        input_ids: (L,) int64, image tokens included.
        vision: what the family's vision tower needs, each tensor's first dimension running over this sample's visuals.
        visual_index: (V,) int64, the places in `input_ids` that take vision features, in the order of the features.
        position_ids: (L,) or (3, L) int64, or None for 0..L-1.
        vision_patches: cost of the vision tower in patches.
        pending: the frames (paths or bytes) of each visual that is measured and not decoded; `Processing.decode` turns them
            into the rest of `vision`.
        cut: the text was longer than the model's limit, and its end was left out.
    """

    input_ids: torch.Tensor
    vision: dict = field(default_factory=dict)
    visual_index: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    vision_patches: int = 0
    pending: list[list] = field(default_factory=list)
    cut: bool = False

    @property
    def length(self) -> int:
        """Tokens of the sample in the language model, image tokens included."""
        return self.input_ids.shape[-1]


@dataclass
class PackedBatch:
    """B samples as one sequence of T tokens.

    Attributes:
        input_ids: (T,) int64.
        position_ids: (T,) or (3, T) int64, starting again at 0 with every sample.
        segments: the samples' boundaries, with what each attention provider needs.
        vision: tensors and Python lists for the family's vision tower.
        visual_index: (V,) int64 into T: where the vision features go; empty without visuals.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    segments: Segments
    vision: dict = field(default_factory=dict)
    visual_index: torch.Tensor | None = None

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """(B+1,) int32."""
        return self.segments.cu_seqlens

    @property
    def seqlens(self) -> list[int]:
        return self.segments.lengths

    @property
    def max_seqlen(self) -> int:
        return self.segments.max_length

    def __len__(self) -> int:
        return len(self.segments.lengths)

    @property
    def last_index(self) -> torch.Tensor:
        """(B,) int64: the last token of each sample."""
        return self.segments.cu_seqlens[1:].long() - 1

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "PackedBatch":
        """Move everything; floating-point vision inputs take `dtype` when it is given."""

        def move(v):
            if isinstance(v, torch.Tensor):
                return v.to(device, dtype if dtype is not None and v.is_floating_point() else None, non_blocking=True)
            if isinstance(v, (list, tuple)):
                return type(v)(move(e) for e in v)
            if isinstance(v, dict):
                return {k: move(e) for k, e in v.items()}
            return v.to(device) if isinstance(v, Segments) else v

        return replace(
            self,
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            segments=self.segments.to(device),
            vision=move(self.vision),
            visual_index=None if self.visual_index is None else move(self.visual_index),
        )


def concat_vision(parts: list[dict]) -> dict:
    """Join the vision inputs of several samples or visuals along their first dimension.

    Tensors whose other dimensions differ between parts stay a list, in order.
    """
    joined: dict = {}
    for part in parts:
        for key, value in part.items():
            joined.setdefault(key, []).append(value)
    for key, values in joined.items():
        if all(isinstance(v, torch.Tensor) for v in values) and len({v.shape[1:] for v in values}) == 1:
            joined[key] = torch.cat(values) if len(values) > 1 else values[0]
        elif any(isinstance(v, list) for v in values):
            joined[key] = [e for v in values for e in (v if isinstance(v, list) else [v])]
    return joined


def pack(features: list[Features]) -> PackedBatch:
    """Lay samples one behind the other, in the order given. Families finish `vision` in `Backbone.prepare`.

    Raises:
        ValueError: no samples, or a sample without tokens.
    """
    if not features:
        raise ValueError("expected at least one sample to pack, got none")
    if any(f.pending for f in features):
        raise ValueError("a sample has images that are not decoded yet; add what Processing.decode gives to its vision inputs")
    lengths = [f.length for f in features]
    if min(lengths) == 0:
        raise ValueError(f"sample {lengths.index(0)} of the batch has no tokens; an empty text has no embedding")
    input_ids = torch.cat([f.input_ids for f in features])
    if any(f.position_ids is not None and f.position_ids.dim() == 2 for f in features):
        rows = [torch.arange(f.length).expand(3, -1) if f.position_ids is None else f.position_ids for f in features]
        position_ids = torch.cat([r.expand(3, -1) for r in rows], dim=-1)
    else:
        position_ids = torch.cat([torch.arange(f.length) if f.position_ids is None else f.position_ids for f in features])
    starts, total = [], 0
    for length in lengths:
        starts.append(total)
        total += length
    index = [f.visual_index + s for f, s in zip(features, starts) if f.visual_index is not None and len(f.visual_index)]
    visual_index = torch.cat(index) if index else torch.empty(0, dtype=torch.long)
    vision = concat_vision([f.vision for f in features if f.vision])
    return PackedBatch(input_ids, position_ids, Segments.from_lengths(lengths, causal=True), vision, visual_index)
