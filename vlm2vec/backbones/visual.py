"""One image or video between preprocessing and the packed batch."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Visual:
    """One image or video after preprocessing.

    Attributes:
        tokens: how many tokens it takes in the language model.
        tensors: inputs of the vision tower; first dimensions are joined over the visuals of a chunk.
        patches: cost in the vision tower.
        token_id: id that its tokens bear in `input_ids`.
        grid: (t, h, w) in merged patches, where the family positions tokens by it.
        pieces: how its tokens stand in the text when they are not one run: token ids (int) and runs of visual tokens
            ((count, grid)), in order. None is one run of `tokens`.
    """

    tokens: int
    tensors: dict = field(default_factory=dict)
    patches: int = 0
    token_id: int | None = None
    grid: tuple[int, int, int] | None = None
    pieces: list | None = None

    @property
    def length(self) -> int:
        """Tokens that it takes in the text, those between its runs included."""
        return self.tokens + sum(1 for p in self.pieces or () if isinstance(p, int))
