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
LEAST_TEMPERATURE = torch.finfo(torch.float32).tiny
SWITCHES = ("normalize", "query_negatives", "target_negatives", "symmetric", "return_stats", "validate")


@dataclasses.dataclass(frozen=True, eq=False)
class InfoNCEOptions:
    """Options of `info_nce`, for query (N, D) and target (M, D); cos is q . t, s is cos / temperature.

    Args:
        temperature: float or 0-d tensor above 0; divides the cosines. A tensor that requires grad gets its gradient.
        normalize: L2-normalise both sides first; gradients are those of the tensors as passed.
        positives: (N,) int64, the index of each query's target; default `i * (M // N)`. `ignore_index` leaves a row
            out of the loss while its query and targets stay candidates.
        target_ids, query_ids, hard_ids: (M,), (N,), and (N, K) or (H,) int64. A negative that bears the positive's id
            (among queries: the query's id, which needs `query_negatives` or `symmetric`) is dropped; -1 matches nothing.
            With `symmetric`, a pair dropped in one direction because of its targets' ids is dropped in the other as well.
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
        weight: (N,) per-query weights, constant. reduction: "mean" (weighted), "sum" or "none".
        group, exchange: a process group over which the batch is sharded, and how its targets travel ("ring" needs a group).
        workspace_mib: bound on scratch memory in MiB; default 256, on CUDA a tenth of the card's memory if that is more.
        backend: "auto", "torch" or "triton".
        return_stats: also return an `InfoNCEStats`.
        validate: run the checks that would wait for a GPU (ranges of indices, NaN, temperature held in a tensor, equal shards).
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
    def make(cls, options: dict, held: bool = False) -> InfoNCEOptions:
        """Build from keyword arguments. Raises TypeError for an unknown name, ValueError for a bad value.

        held: the options are those of a module, whose batches bring more: options that need another are left for then.
        """
        known = cls.__dataclass_fields__
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; the options are {', '.join(known)}"
                raise TypeError(f"info_nce got an unexpected option {name!r}{hint}")
        made = cls(**options)
        made._check()
        if not held:
            made._check_needs()
        return made

    def _check(self) -> None:
        for name, allowed in (("hardness_scope", SCOPES), ("reduction", REDUCTIONS), ("exchange", EXCHANGES), ("backend", BACKENDS)):
            one_of(name, getattr(self, name), allowed)
        check_switches(**{name: getattr(self, name) for name in SWITCHES})
        check_ignore_index(self.ignore_index)
        check_temperature(self.temperature)
        for name, mend in (
            ("mask_margin", "None turns it off"),
            ("mask_relative", "None turns it off"),
            ("hardness", "0 turns it off"),
            ("label_smoothing", "0 turns it off"),
        ):
            value = getattr(self, name)
            if not is_finite(value) and not (value is None and mend.startswith("None")):
                raise ValueError(f"{name}: expected a finite number, got {value!r}; {mend}")
        if self.hardness < 0:
            raise ValueError(f"hardness: expected 0 or more, got {self.hardness}; 0 turns it off")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: expected a number in [0, 1), got {self.label_smoothing}; 0.1 is usual, 0 turns it off")
        check_workspace(self.workspace_mib)
        self._check_matryoshka()
        check_group(self.group, self.reduction)

    def _check_matryoshka(self) -> None:
        dims, weights = self.matryoshka_dims, self.matryoshka_weights
        if dims is None:
            if weights is not None:
                raise ValueError(f"matryoshka_weights: expected matryoshka_dims beside them, got {weights!r} alone; pass the widths too")
            return
        if not isinstance(dims, (tuple, list)) or not all(isinstance(dim, int) and not isinstance(dim, bool) for dim in dims):
            raise ValueError(f"matryoshka_dims: expected a tuple of ints, got {dims!r}; call int() on each width")
        if not dims:
            raise ValueError("matryoshka_dims: expected at least one width, got none; pass None to turn it off")
        if weights is None:
            return
        if not isinstance(weights, (tuple, list)) or not all(is_finite(weight) for weight in weights):
            raise ValueError(f"matryoshka_weights: expected a tuple of finite numbers, got {weights!r}; 1 leaves a level as it is")
        if len(weights) != len(dims):
            raise ValueError(
                f"matryoshka_weights: expected {len(dims)} numbers, one a width, got {len(weights)}; pass 1 for levels as they are"
            )

    def _check_needs(self) -> None:
        """Options that mean nothing without another."""
        hard = "pass the (N, K, D) or packed (H, D) negatives too"
        for name, needed, mend in (
            ("hard_offsets", "hard_negatives", hard),
            ("hard_ids", "hard_negatives", hard),
            ("hard_ids", "target_ids", "ids of hard negatives are compared with the positive's id: pass target_ids too"),
        ):
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise ValueError(f"{name}: expected {needed} beside it, got it alone; {mend}")
        if self.query_ids is not None and not (self.query_negatives or self.symmetric):
            raise ValueError(
                "query_ids: expected query_negatives or symmetric beside them, got neither, and no query is a candidate; "
                "turn one of them on or leave query_ids out"
            )
        check_exchange(self.exchange, self.group)

    def replace(self, **changes) -> InfoNCEOptions:
        return dataclasses.replace(self, **changes)


def one_of(name: str, value, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        mend = f"did you mean {near[0]!r}?" if near else f"{allowed[0]!r} is the default"
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}; {mend}")


def check_switches(**values) -> None:
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}: expected True or False, got {value!r}; call bool()")


def check_ignore_index(value) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"ignore_index: expected an int, got {value!r}; -100 is the default")


def is_finite(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_temperature(temperature) -> None:
    """A number above 0, or a 0-d floating-point tensor, whose value is looked at later."""
    if not isinstance(temperature, torch.Tensor):
        if not (is_finite(temperature) and temperature > 0):
            raise ValueError(f"temperature: expected a number above 0, got {temperature!r}; 0.02 is usual")
        if temperature < LEAST_TEMPERATURE:
            raise ValueError(f"temperature: expected one whose inverse float32 can hold, got {temperature!r}; 0.02 is usual")
    elif temperature.dim() != 0:
        raise ValueError(f"temperature: expected a 0-d tensor, got shape {tuple(temperature.shape)}; call .squeeze()")
    elif not temperature.dtype.is_floating_point:
        raise ValueError(f"temperature: expected a floating-point tensor, got {temperature.dtype}; call .float()")


def check_workspace(workspace_mib) -> None:
    if workspace_mib is not None and not (is_finite(workspace_mib) and workspace_mib > 0):
        raise ValueError(f"workspace_mib: expected MiB above 0, got {workspace_mib!r}; None takes the default")


def check_group(group, reduction: str) -> None:
    """A process group, with a reduction that all ranks can share; or None."""
    if group is None:
        return
    if not isinstance(getattr(group, "group_name", None), str):
        raise ValueError(
            f"group: expected a torch.distributed process group that this rank belongs to, got {group!r}; "
            "pass torch.distributed.group.WORLD, or what new_group gave"
        )
    if reduction != "mean":
        raise ValueError(
            f"group cannot be had with reduction: expected 'mean', the only one that is the same on all ranks, got {reduction!r}; "
            "use reduction='mean'"
        )


def check_exchange(exchange: str, group) -> None:
    if exchange != "gather" and group is None:
        raise ValueError(f"exchange: expected a group beside {exchange!r}, got group=None; pass the process group or leave exchange out")
