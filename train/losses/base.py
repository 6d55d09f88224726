"""What a loss says of itself: the options of a recipe's `loss:` section, and what a step hands it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist

from contrastive_kernels import info_nce
from vlm2vec.inputs import MODALITIES

KINDS = MODALITIES  # of one side of a pair: what it shows, if anything


@dataclass(frozen=True)
class LossBatch:
    """What a loss may know of a batch besides its embeddings.

    Attributes:
        query_ids, target_ids: (N,) int64, equal where contents are; hard_ids: (H,), None without hard negatives.
        hard_offsets: (N+1,) int64, the stretch of each row in the packed hard negatives; None without.
        group: the ranks over which the batch is sharded; None on one rank.
        rows: (N,) bool, the rows whose loss this is; the others are candidates alone. None: all of them.
        sources: (N,) int64, each row's place among the recipe's sources. pairs: (N,) int64, 3 * kind of the query + kind of the
            target, kinds as in `KINDS`. None where a caller does not know them.
        places: (source, row of the source) of each row.
        grades: (N,) float32, how well each pair fits; NaN where its source has none. None: no source of the batch has any.
        scores: (N, 1 + K) float32, a teacher's scores of the positive and the row's own hard negatives, -inf behind the last; NaN
            in rows whose source has none. None: no source of the batch has any.
        counted: (N,) bool on the host: rows that can be read, as far as is known before they are decoded, and are of `rows`. None: all.
        planned: the step is a plan's, and files that hold more of its rows are not at hand.
    """

    query_ids: torch.Tensor
    target_ids: torch.Tensor
    hard_offsets: torch.Tensor | None = None
    hard_ids: torch.Tensor | None = None
    group: dist.ProcessGroup | None = None
    rows: torch.Tensor | None = None
    sources: torch.Tensor | None = None
    pairs: torch.Tensor | None = None
    places: Sequence[tuple[int, int]] = ()
    grades: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    counted: np.ndarray | None = None
    planned: bool = False


@dataclass
class Loss:
    """The `loss:` section of a recipe; a loss is a dataclass that derives from it, whose fields are its options.

    Attributes:
        name: of the registry.
        weight: its share in a sum of sections.
        mask_duplicates: a target equal to a query's positive, or the positive of an equal query, is no negative of it.
        source_names: of the recipe, whose rows the loss may tell apart; not an option. strict: `data.strict` of the recipe; no option.
    """

    takes_hard_negatives: ClassVar[bool] = False
    needs_negatives: ClassVar[bool] = False  # held-out rows are scored with their hard negatives
    needs_column: ClassVar[str | None] = None  # of its sources: "scores" or "grade"
    source_names: ClassVar[tuple[str, ...]] = ()
    strict: ClassVar[bool] = False

    name: str = ""
    weight: float = 1.0
    mask_duplicates: bool = True

    def check(self) -> None:
        """Raises ValueError for an option out of its range: what was expected, what came, and the mend. Names begin with `loss.`"""

    def check_width(self, width: int, model: str) -> None:
        """Raises ValueError for options that embeddings of `width` dimensions do not have."""

    def check_rows(self, places: Sequence[tuple[int, int]]) -> None:
        """Raises ValueError where the loss needs more of these rows, (source, row), than their data holds."""

    @property
    def tells_sources(self) -> bool:
        """Whether it goes by the names of sources, of which no two may then be equal."""
        return False

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
        self,
        function: Callable,
        query: torch.Tensor,
        target: torch.Tensor,
        batch: LossBatch,
        readable: torch.Tensor,
        hard_negatives: torch.Tensor | None = None,
    ) -> tuple[float, float]:
        """(loss, accuracy) of held-out rows, on one rank.

        Args:
            query, target: (N, D). batch: of these rows. readable: (N,) bool; the others are left out.
            hard_negatives: (H, D), where the loss asks for them (`needs_negatives`).
        """
        masks = {"query_mask": readable, "target_mask": readable}
        more = {} if hard_negatives is None else {"hard_negatives": hard_negatives}
        loss = function(query, target, **masks, **more, **self.options(batch))
        return float(loss[0] if isinstance(loss, tuple) else loss), accuracy(query, target, batch if self.mask_duplicates else None, masks)


def accuracy(query: torch.Tensor, target: torch.Tensor, batch: LossBatch | None, masks: dict[str, torch.Tensor]) -> float:
    """The share of rows whose own target comes first; equal targets (by `batch`) are no rivals."""
    ids = {} if batch is None else {"target_ids": batch.target_ids}
    _, stats = info_nce(query, target, normalize=True, return_stats=True, **masks, **ids)
    return float(stats.accuracy)


def group_mean(values: torch.Tensor, counts: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Mean over the rows that count of all ranks, by the convention of `info_nce`'s `group`.

    Args:
        values: (N,) of this rank's rows, 0 where a row does not count. counts: (N,) bool.

    Returns:
        0-d, equal on all ranks; its gradient is world_size times that of the global mean, so that a mean over ranks leaves the latter.
    """
    count = counts.sum().to(values.dtype)
    if group is None:
        return values.sum() / count.clamp(min=1)
    dist.all_reduce(count, group=group)
    share = values.sum() / count.clamp(min=1)
    return across(share, group)


def across(share: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The sum of the ranks' shares of a loss, with world_size times the gradient of this rank's."""
    if group is None:
        return share
    total = share.detach().clone()
    dist.all_reduce(total, group=group)
    scaled = share * dist.get_world_size(group)
    return total + (scaled - scaled.detach())
