"""What a loss says of itself: the options of a recipe's `loss:` section, and what a step hands it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from contrastive_kernels import info_nce


@dataclass(frozen=True)
class LossBatch:
    """What a loss may know of a batch besides its embeddings.

    Attributes:
        query_ids, target_ids: (N,) int64, equal where contents are; hard_ids: (H,), None without hard negatives.
        hard_offsets: (N+1,) int64, the stretch of each row in the packed hard negatives; None without.
        group: the ranks over which the batch is sharded; None on one rank.
    """

    query_ids: torch.Tensor
    target_ids: torch.Tensor
    hard_offsets: torch.Tensor | None = None
    hard_ids: torch.Tensor | None = None
    group: dist.ProcessGroup | None = None


@dataclass
class Loss:
    """The `loss:` section of a recipe; a loss is a dataclass that derives from it, whose fields are its options.

    Attributes:
        name: of the registry.
        mask_duplicates: a target equal to a query's positive, or the positive of an equal query, is no negative of it.
    """

    takes_hard_negatives: ClassVar[bool] = False

    name: str = ""
    mask_duplicates: bool = True

    def check(self) -> None:
        """Raises ValueError for an option out of its range: what was expected, what came, and the mend."""

    def check_width(self, width: int, model: str) -> None:
        """Raises ValueError for options that embeddings of `width` dimensions do not have."""

    @property
    def learns(self) -> bool:
        """Whether `function` has parameters of its own, which are trained with the model and kept beside its weights."""
        return False

    def function(self) -> Callable:
        """What GradCache is handed: `function(query, target, **options) -> loss`, or a module of it where it learns something.

        Query and target are (N, D) and not normalised. With `query_mask=` and `target_mask=` (N,) bool, False rows are left out.
        """
        raise NotImplementedError

    def options(self, batch: LossBatch) -> dict[str, Any]:
        """Options of one step."""
        return {}

    def figures(self, function: Callable) -> dict[str, float]:
        """What is logged of the loss itself, as it stands."""
        return {}

    def words(self) -> str:
        """Name and main setting, for the model card."""
        return self.name

    def held_out(
        self, function: Callable, query: torch.Tensor, target: torch.Tensor, target_ids: torch.Tensor, readable: torch.Tensor
    ) -> tuple[float, float]:
        """(loss, accuracy) of held-out rows, on one rank.

        Args:
            query, target: (N, D). target_ids: (N,). readable: (N,) bool; the others are left out.
        """
        masks = {"query_mask": readable, "target_mask": readable}
        batch = LossBatch(query_ids=torch.arange(len(query), device=query.device), target_ids=target_ids)
        loss = function(query, target, **masks, **self.options(batch))
        return float(loss[0] if isinstance(loss, tuple) else loss), self._accuracy(query, target, target_ids, masks)

    def _accuracy(self, query: torch.Tensor, target: torch.Tensor, target_ids: torch.Tensor, masks: dict[str, torch.Tensor]) -> float:
        ids = {"target_ids": target_ids} if self.mask_duplicates else {}
        _, stats = info_nce(query, target, normalize=True, return_stats=True, **masks, **ids)
        return float(stats.accuracy)
