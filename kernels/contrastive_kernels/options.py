"""The options of the contrastive losses: names, defaults, meaning, and the checks that need no data.

Everything that a loss takes besides its two matrices is a field of `InfoNCEOptions`. `InfoNCEOptions.make` turns the
keyword arguments of a public function into one, refuses names that do not exist, values out of range, and pairs of
options that cannot be had together. Checks that look at tensors live in `checks.py`.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from typing import Any

import torch

SCOPES = ("all", "in_batch", "hard")
REDUCTIONS = ("mean", "sum", "none")
EXCHANGES = ("gather", "ring")
BACKENDS = ("auto", "torch", "triton")
TEMPERATURE_RANGE = (0.001, 10.0)


@dataclasses.dataclass(frozen=True, eq=False)
class InfoNCEOptions:
    """Options of `info_nce`, for query (N, D) and target (M, D); cos is q . t, s is cos / temperature.

    Args:
        temperature: float or 0-d tensor above 0; divides the cosines. A tensor that requires grad gets its gradient.
        normalize: L2-normalise both sides first; gradients are those of the tensors as passed.
        positives: (N,) int64, the index of each query's target; default `i * (M // N)`. `ignore_index` leaves a row
            out of the loss while its query and targets stay candidates.
        target_ids, query_ids, hard_ids: (M,), (N,), and (N, K) or (H,) int64. A negative that bears the positive's id
            (among queries: the query's id) is dropped; -1 matches nothing. With `symmetric`, a pair dropped in one
            direction because of its targets' ids is dropped in the other as well.
        query_mask, target_mask: (N,), (M,) bool; False rows are neither rows nor candidates and may hold anything,
            NaN included. A row whose positive is masked is left out.
        own_negatives_only: (N,) bool; these rows see only their positive and their own hard negatives.
        hard_negatives: (N, K, D), or packed (H, D) with `hard_offsets` (N + 1,) int64; seen by their own query alone.
        query_negatives, target_negatives: add q_i . q_j (j != i), t_p(i) . t_j (j != p(i)) to the denominator.
        symmetric: mean of both directions.
        mask_margin, mask_relative: drop a negative with cos > positive's cos + margin, or + relative * |cos|.
        hardness, hardness_scope: adds hardness * stop_grad(cos) to the logits of the negatives in scope.
        label_smoothing: in [0, 1), as in `torch.nn.functional.cross_entropy`, over the row's candidates.
        matryoshka_dims, matryoshka_weights: sum over these widths of weight * loss of the re-normalised prefix.
        weight: (N,) per-query weights. reduction: "mean" (weighted), "sum" or "none".
        group, exchange: a process group over which the batch is sharded, and how its targets travel.
        workspace_mib: bound on scratch memory in MiB; default 256, on CUDA at least 10 % of the free memory.
        backend: "auto", "torch" or "triton".
        return_stats: also return an `InfoNCEStats`.
        validate: run the checks that would wait for a GPU (ranges of indices, NaN, temperature held in a tensor).
    """

    temperature: Any = 0.02
    normalize: bool = False
    positives: torch.Tensor | None = None
    ignore_index: int = -100
    target_ids: torch.Tensor | None = None
    query_ids: torch.Tensor | None = None
    hard_ids: torch.Tensor | None = None
    query_mask: torch.Tensor | None = None
    target_mask: torch.Tensor | None = None
    own_negatives_only: torch.Tensor | None = None
    hard_negatives: torch.Tensor | None = None
    hard_offsets: torch.Tensor | None = None
    query_negatives: bool = False
    target_negatives: bool = False
    symmetric: bool = False
    mask_margin: float | None = None
    mask_relative: float | None = None
    hardness: float = 0.0
    hardness_scope: str = "all"
    label_smoothing: float = 0.0
    matryoshka_dims: tuple[int, ...] | None = None
    matryoshka_weights: tuple[float, ...] | None = None
    weight: torch.Tensor | None = None
    reduction: str = "mean"
    group: Any = None
    exchange: str = "gather"
    workspace_mib: float | None = None
    backend: str = "auto"
    return_stats: bool = False
    validate: bool = False

    @classmethod
    def make(cls, options: dict) -> InfoNCEOptions:
        """Build from keyword arguments. Raises TypeError for an unknown name, ValueError for a bad value."""
        known = cls.__dataclass_fields__
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; the options are {', '.join(known)}"
                raise TypeError(f"info_nce got an unexpected option {name!r}{hint}")
        made = cls(**options)
        made._check()
        return made

    def _check(self) -> None:
        for name, allowed in (
            ("hardness_scope", SCOPES),
            ("reduction", REDUCTIONS),
            ("exchange", EXCHANGES),
            ("backend", BACKENDS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
        if not isinstance(self.temperature, torch.Tensor):
            if not (isinstance(self.temperature, (int, float)) and 0 < self.temperature < math.inf):
                raise ValueError(f"temperature: expected a number above 0, got {self.temperature!r}; 0.02 is usual")
        elif self.temperature.dim() != 0:
            raise ValueError(
                f"temperature: expected a 0-d tensor, got shape {tuple(self.temperature.shape)}; call .squeeze()"
            )
        for name in ("mask_margin", "mask_relative", "hardness", "label_smoothing"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
                raise ValueError(f"{name}: expected a finite number, got {value!r}")
        if self.hardness < 0:
            raise ValueError(f"hardness: expected 0 or more, got {self.hardness}; 0 turns it off")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: expected a number in [0, 1), got {self.label_smoothing}")
        if self.workspace_mib is not None and not self.workspace_mib > 0:
            raise ValueError(f"workspace_mib: expected MiB above 0, got {self.workspace_mib!r}; None takes the default")
        self._check_pairs()

    def _check_pairs(self) -> None:
        if self.hard_offsets is not None and self.hard_negatives is None:
            raise ValueError("hard_offsets needs hard_negatives: pass the packed (H, D) negatives too")
        if self.hard_ids is not None and self.hard_negatives is None:
            raise ValueError("hard_ids needs hard_negatives: pass the (N, K, D) or packed (H, D) negatives too")
        if self.hard_ids is not None and self.target_ids is None:
            raise ValueError("hard_ids needs target_ids: ids of hard negatives are compared with the positive's id")
        if self.matryoshka_weights is not None and self.matryoshka_dims is None:
            raise ValueError("matryoshka_weights needs matryoshka_dims")
        if self.matryoshka_dims is not None and not self.matryoshka_dims:
            raise ValueError("matryoshka_dims: expected at least one width, got none; pass None to turn it off")
        if self.matryoshka_weights is not None and len(self.matryoshka_weights) != len(self.matryoshka_dims):
            raise ValueError(
                f"matryoshka_weights: expected {len(self.matryoshka_dims)} numbers, one a width, got {len(self.matryoshka_weights)}"
            )
        if self.group is not None and self.reduction != "mean":
            raise ValueError(
                f"group cannot be had with reduction={self.reduction!r}: only the mean is the same on all ranks; "
                "use reduction='mean'"
            )

    def replace(self, **changes) -> InfoNCEOptions:
        return dataclasses.replace(self, **changes)
