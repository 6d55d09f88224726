"""The table of options of the contrastive losses: everything that a loss takes besides its two matrices is one entry of it.

An entry says its name, type, default, meaning, check, and which shortcuts it breaks. What follows from the table: the operator's
schema (`info_nce_op.py`), the checks here and in `checks.py`, what keeps a call from a shortcut (`InfoNCEOptions.obstacle`), the
signatures and help texts of the public functions, and the trainer's loss section. Adding one is told in docs/adding-an-option.md.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch

from .core.option_checks import (
    check_exchange,
    check_group,
    check_hardness,
    check_ignore_index,
    check_number,
    check_smoothing,
    check_switches,
    check_temperature,
    check_workspace,
    is_finite,
    one_of,
)

SCOPES = ("all", "in_batch", "hard")
REDUCTIONS = ("mean", "sum", "none")
EXCHANGES = ("gather", "ring")
BACKENDS = ("auto", "torch", "triton")
TEMPERATURE_RANGE = (0.001, 10.0)

SHORTCUTS = {
    "shared_logits": "both directions of `symmetric` from the same logits",
    "shared_levels": "all Matryoshka levels from one sweep, in plain torch",
    "shared_level_panels": "all Matryoshka levels from one panel, with the kernels",
    "dense": "a small plain loss in eight launches, with the kernels",
    "projected_query": "the queries' gradient is projected while it is written, with the kernels",
}
PAIRS = "the two directions drop different pairs"
ONE_SIDED = "one direction has candidates that the other has not"
MANY_BLOCKS = "levels have more than one block of candidates"
NOT_DENSE = "the pass over a dense panel does not know it"
ADDED_LATER = "more is added to the queries' gradient afterwards"
OWN_SCALE = "one a row, rows have factors of their own"


def is_on(value) -> bool:
    """Whether an option that has no default worth the name does something: not None, False or 0."""
    return isinstance(value, torch.Tensor) or (value is not None and value is not False and value != 0)


def option(
    default: Any,
    schema: str | None,
    meaning: str,
    *,
    breaks: dict[str, str],
    check: Callable[[str, Any], None] | None = None,
    vector: tuple[str, torch.dtype] | None = None,
    on: Callable[[Any], bool] | None = None,
):
    """One entry of the table.

    Args:
        schema: its type in the operator's schema; None for what travels in another form (temperature, group).
        breaks: {shortcut: why} for every shortcut of SHORTCUTS that a call with this option cannot take; the others must stay exact.
        check: called with name and value, raises ValueError. What needs other options or tensors' shapes stands in `_check_needs`
            and `checks.py`.
        vector: ("N" or "M", dtype) of a tensor with one entry a query or a target.
        on: whether a value breaks them; by itself one that is not None, False or 0.
    """
    metadata = {"schema": schema, "meaning": meaning, "breaks": breaks, "check": check, "vector": vector, "on": on or is_on}
    return dataclasses.field(default=default, metadata=metadata)


def one_number(temperature):
    """A tensor (1,) as a 0-d one, in its graph; all else as it is."""
    held = isinstance(temperature, torch.Tensor) and temperature.dim() == 1 and temperature.shape[0] == 1
    return temperature.reshape(()) if held else temperature


def _choice(allowed: tuple[str, ...]) -> Callable[[str, Any], None]:
    return lambda name, value: one_of(name, value, allowed)


@dataclasses.dataclass(frozen=True, eq=False)
class InfoNCEOptions:
    temperature: float | torch.Tensor = option(
        0.02,
        None,
        "divides the cosines: a number above 0, or a tensor, 0-d, (1,) or (N,), each query's own, by which its positive's row of "
        "`symmetric` is divided too. A tensor that requires grad gets its gradient.",
        check=lambda name, value: check_temperature(value),
        on=lambda value: isinstance(value, torch.Tensor) and value.dim() == 1,
        breaks={shortcut: OWN_SCALE for shortcut in SHORTCUTS},
    )
    normalize: bool = option(
        False,
        "bool",
        "L2-normalise both sides first; gradients are those of the tensors as passed.",
        check=lambda name, value: check_switches(**{name: value}),
        breaks={"dense": NOT_DENSE},
    )
    positives: torch.Tensor | None = option(
        None,
        "Tensor?",
        "(N,) int64, the index of each query's target; default `i * (M / N)`, each positive followed by its own negatives. Where all "
        "positives stand first, as in `torch.cat([positive, negative])`, pass `torch.arange(N)`. `ignore_index` leaves a row out of the "
        "loss while its query and targets stay candidates.",
        vector=("N", torch.int64),
        breaks={"shared_logits": PAIRS, "dense": NOT_DENSE},
    )
    ignore_index: int = option(
        -100, "int", "the entry of `positives` that leaves a row out.", check=lambda name, value: check_ignore_index(value), breaks={}
    )
    target_ids: torch.Tensor | None = option(
        None,
        "Tensor?",
        "(M,) int64. A negative that bears the positive's id is dropped; -1 matches nothing. With `symmetric`, a pair dropped in one "
        "direction because of its targets' ids is dropped in the other as well.",
        vector=("M", torch.int64),
        breaks={"dense": NOT_DENSE},
    )
    query_ids: torch.Tensor | None = option(
        None,
        "Tensor?",
        "(N,) int64. Among queries (`query_negatives`, `symmetric`) a negative that bears the query's id is dropped, among targets one "
        "whose `target_query_ids` does; -1 matches nothing.",
        vector=("N", torch.int64),
        breaks={"shared_logits": PAIRS, "dense": NOT_DENSE},
    )
    target_query_ids: torch.Tensor | None = option(
        None,
        "Tensor?",
        "(M,) int64, the id of the query that each target belongs to; needs `query_ids`. A target of an equal query is no negative: "
        "of several rows with one query, as a picture with five captions, none pushes another's positive away. -1 belongs to none.",
        vector=("M", torch.int64),
        breaks={"shared_logits": PAIRS, "dense": NOT_DENSE},
    )
    hard_ids: torch.Tensor | None = option(
        None, "Tensor?", "(N, K) or (H,) int64: hard negatives that bear the positive's id are dropped; needs `target_ids`.", breaks={}
    )
    query_mask: torch.Tensor | None = option(
        None,
        "Tensor?",
        "(N,) bool; False rows are neither rows nor candidates and may hold anything, NaN included.",
        vector=("N", torch.bool),
        breaks={"shared_logits": PAIRS, "dense": NOT_DENSE},
    )
    target_mask: torch.Tensor | None = option(
        None,
        "Tensor?",
        "(M,) bool; False targets are no candidates and may hold anything, NaN included. A row whose positive is masked is left out.",
        vector=("M", torch.bool),
        breaks={"shared_logits": PAIRS, "dense": NOT_DENSE},
    )
    own_negatives_only: torch.Tensor | None = option(
        None,
        "Tensor?",
        "(N,) bool; these rows see only their positive and their own hard negatives.",
        vector=("N", torch.bool),
        breaks={"shared_logits": PAIRS, "dense": NOT_DENSE},
    )
    hard_negatives: torch.Tensor | None = option(
        None,
        "Tensor?",
        "(N, K, D), or packed (H, D) with `hard_offsets`; seen by their own query alone.",
        breaks={
            "shared_levels": "hard negatives have sums of their own at every level",
            "dense": NOT_DENSE,
            "projected_query": ADDED_LATER,
        },
    )
    hard_offsets: torch.Tensor | None = option(None, "Tensor?", "(N + 1,) int64: where each query's hard negatives start.", breaks={})
    query_negatives: bool = option(
        False,
        "bool",
        "add q_i . q_j (j != i) to the denominator.",
        check=lambda name, value: check_switches(**{name: value}),
        breaks={"shared_logits": ONE_SIDED, "shared_levels": MANY_BLOCKS, "dense": NOT_DENSE, "projected_query": ADDED_LATER},
    )
    target_negatives: bool = option(
        False,
        "bool",
        "add t_p(i) . t_j (j != p(i)) to the denominator.",
        check=lambda name, value: check_switches(**{name: value}),
        breaks={"shared_logits": ONE_SIDED, "shared_levels": MANY_BLOCKS, "dense": NOT_DENSE},
    )
    symmetric: bool = option(
        False,
        "bool",
        "mean of both directions.",
        check=lambda name, value: check_switches(**{name: value}),
        breaks={"shared_levels": "levels share a sweep of one direction", "dense": NOT_DENSE, "projected_query": ADDED_LATER},
    )
    mask_margin: float | None = option(
        None,
        "float?",
        "drop a negative with cos > positive's cos + margin.",
        check=lambda name, value: check_number(name, value, "None turns it off", none=True),
        breaks={"shared_logits": PAIRS, "dense": NOT_DENSE},
    )
    mask_relative: float | None = option(
        None,
        "float?",
        "drop a negative with cos > positive's cos + relative * |positive's cos|.",
        check=lambda name, value: check_number(name, value, "None turns it off", none=True),
        breaks={"shared_logits": PAIRS, "dense": NOT_DENSE},
    )
    hardness: float = option(
        0.0,
        "float",
        "0 or more; adds hardness * stop_grad(cos) to the logits of the negatives in `hardness_scope`.",
        check=lambda name, value: check_hardness(name, value),
        breaks={"dense": NOT_DENSE},
    )
    hardness_scope: str = option(
        "all", "str", "which negatives `hardness` is for: all, in_batch or hard.", check=_choice(SCOPES), breaks={}
    )
    label_smoothing: float = option(
        0.0,
        "float",
        "in [0, 1), as in `torch.nn.functional.cross_entropy`, over the row's candidates.",
        check=lambda name, value: check_smoothing(name, value),
        breaks={
            "shared_logits": "smoothing counts each row's own candidates",
            "shared_levels": "smoothing sums the logits themselves",
            "shared_level_panels": "smoothing sums the logits themselves",
            "dense": NOT_DENSE,
        },
    )
    matryoshka_dims: tuple[int, ...] | None = option(
        None, "int[]?", "sum over these widths of weight * loss of the re-normalised prefix.", breaks={"dense": NOT_DENSE}
    )
    matryoshka_weights: tuple[float, ...] | None = option(None, "float[]?", "the weights of these widths; default 1 each.", breaks={})
    weight: torch.Tensor | None = option(None, "Tensor?", "(N,) per-query weights, constant.", breaks={})
    reduction: str = option("mean", "str", "mean (weighted), sum or none.", check=_choice(REDUCTIONS), breaks={})
    group: Any = option(
        None,
        None,
        "a process group over which the batch is sharded; the loss is global.",
        breaks={
            "shared_logits": "a direction's columns come from other ranks",
            "shared_levels": "a group exchanges one level at a time",
            "shared_level_panels": "a group exchanges one level at a time",
            "dense": NOT_DENSE,
            "projected_query": ADDED_LATER,
        },
    )
    exchange: str = option("gather", "str", "how the group's targets travel: gather or ring.", check=_choice(EXCHANGES), breaks={})
    workspace_mib: float | None = option(
        None,
        "float?",
        "bound on scratch memory in MiB; default 256, on CUDA a tenth of the card's memory if that is more.",
        check=lambda name, value: check_workspace(value),
        breaks={},
    )
    backend: str = option(
        "auto", "str", "auto (the kernels on CUDA, torch elsewhere), torch or triton.", check=_choice(BACKENDS), breaks={}
    )
    return_stats: bool = option(
        False,
        "bool",
        "also return an `InfoNCEStats`.",
        check=lambda name, value: check_switches(**{name: value}),
        breaks={"dense": NOT_DENSE},
    )
    validate: bool = option(
        False,
        "bool",
        "run the checks that would wait for a GPU (ranges of indices, NaN, temperature held in a tensor, equal shards).",
        check=lambda name, value: check_switches(**{name: value}),
        breaks={},
    )

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
        checked = cls(**{**options, "temperature": one_number(options["temperature"])} if "temperature" in options else options)
        for name, check in _CHECKS:
            check(name, getattr(checked, name))
        checked._check_matryoshka()
        check_group(checked.group, checked.reduction)
        if not held:
            checked._check_needs()
        return checked

    def obstacle(self, shortcut: str) -> str:
        """Which option keeps a call from a shortcut of SHORTCUTS, and why; "" where none does."""
        for name, on, reason in _BREAKS[shortcut]:
            if on(getattr(self, name)):
                return f"with {name} {reason}"
        return ""

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
            ("target_query_ids", "query_ids", "a target is dropped where its query's id is the row's: pass query_ids too"),
            ("hard_ids", "target_ids", "ids of hard negatives are compared with the positive's id: pass target_ids too"),
        ):
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise ValueError(f"{name}: expected {needed} beside it, got it alone; {mend}")
        if self.query_ids is not None and self.target_query_ids is None and not (self.query_negatives or self.symmetric):
            raise ValueError(
                "query_ids: expected target_query_ids, query_negatives or symmetric beside them, got none, and nothing to compare them "
                "with; pass one of them or leave query_ids out"
            )
        if isinstance(self.temperature, torch.Tensor) and self.temperature.dim() == 1 and self.hardness:
            raise ValueError(f"hardness: expected one temperature for all rows beside it, got {self.hardness} and (N,); leave one out")
        check_exchange(self.exchange, self.group)

    def replace(self, **changes) -> InfoNCEOptions:
        return dataclasses.replace(self, **changes)


TABLE = dataclasses.fields(InfoNCEOptions)
_CHECKS = [(entry.name, entry.metadata["check"]) for entry in TABLE if entry.metadata["check"] is not None]
_BREAKS = {
    shortcut: [
        (entry.name, entry.metadata["on"], entry.metadata["breaks"][shortcut]) for entry in TABLE if shortcut in entry.metadata["breaks"]
    ]
    for shortcut in SHORTCUTS
}
VECTORS = [(entry.name, *entry.metadata["vector"]) for entry in TABLE if entry.metadata["vector"] is not None]


def meanings(indent: int) -> str:
    """The table as lines of a docstring, wrapped."""
    lines = []
    for field in TABLE:
        lines += textwrap.wrap(
            f"{field.name}: {field.metadata['meaning']}", 132, initial_indent=" " * indent, subsequent_indent=" " * (indent + 4)
        )
    return "\n".join(lines)


InfoNCEOptions.__doc__ = f"""Options of `info_nce`, for query (N, D) and target (M, D); cos is q . t, s is cos / temperature.

    Args:
{meanings(8)}

    Example:
        >>> InfoNCEOptions.make({{"temperature": 0.05, "normalize": True}}).temperature
        0.05
    """


def shows_options(function: Callable) -> Callable:
    """Puts the table into a function that takes **options: its signature, and the lines of its docstring where it names them."""
    signature = inspect.signature(function)
    kept = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    fields = [f for f in TABLE if f.name not in signature.parameters]
    entries = [inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type) for f in fields]
    function.__signature__ = signature.replace(parameters=kept + entries)
    before, mark, after = (function.__doc__ or "").partition("**options: the fields of `InfoNCEOptions`")
    if mark:
        rest, newline, tail = after.partition("\n")
        function.__doc__ = f"{before}**options: the fields of `InfoNCEOptions`{rest}\n{meanings(12)}{newline}{tail}"
    return function
