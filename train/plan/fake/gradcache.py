"""GradCache as a plan runs it: some chunks of a step, and account of all.

Kept graphs and features of chunks that are not run are tensors of their bytes, which go when the chunk's turn has come; what
its backward pass takes on top raises the peak. All by GradCache's public hooks: `select` picks the chunks, `observer` tells the
phases, and `PlannedSync` plays the other ranks.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from contrastive_kernels import InfoNCEResult, info_nce_value_and_grad
from contrastive_kernels.gradcache import Phase
from contrastive_kernels.gradcache.chunks import Chunk
from contrastive_kernels.gradcache.gradient_sync import GradientSync
from contrastive_kernels.gradcache.observer import CHUNK_BACKWARD, CHUNK_FORWARD, FROZEN_FEATURES, LOSS, SECOND_PASS, SYNCHRONISATION
from contrastive_kernels.gradcache.retention import retained_chunks

from .. import chunks as plan_chunks
from ..chunks import Outline, nearest, picked
from ..meter import Cost, Meter, Span
from ..pieces import Frame, Piece, sampled

_MIB = 2**20
_LOSS_WORKSPACE = 256 * _MIB  # `workspace_mib` of the loss


@dataclass(frozen=True)
class Settings:
    """What of a recipe and its machine a step's account goes by.

    Attributes:
        retain: chunks whose graph is kept, a number or "all". keep_mib: bound on features of a frozen tower, MiB.
        feature_width: bytes of a frozen tower's output per image token; 0 where no tower is frozen.
        ranks: of the run. is_sharded: whether FSDP2 holds the weights.
        most_chunks: chunks that are all run; of more than that, those that say what the others take.
        is_sample: chunks of several sizes are run instead of the step's, every other one with its graph kept: `pieces` is what is wanted.
    """

    retain: int | str
    keep_mib: float
    feature_width: int = 0
    ranks: int = 1
    is_sharded: bool = False
    most_chunks: int = 8
    is_sample: bool = False


class StepAccount:
    """Picks the chunks of a step that are run and keeps account of all: `select` and `observe` are GradCache's.

    Args:
        after_chunk: called when a chunk's gradients are there.

    Attributes:
        shapes: (tokens, image tokens, patches) of each sample by side, set before each step.
        count, kept: chunks of the whole step, and those of them whose graph is kept.
        graphs: bytes of the kept graphs, in order.
        largest: (bytes, tokens) of the chunk whose second pass takes most beyond what stood before it; not of the first one, which
            makes the gradients, where there are others.
    """

    def __init__(self, meter: Meter, settings: Settings, after_chunk: Callable[[], None] = lambda: None):
        self.meter, self.settings, self.after_chunk = meter, settings, after_chunk
        self.shapes: list[list[tuple[int, int, int]]] = []
        self.count = self.kept = 0
        self.graphs: list[int] = []
        self.largest = (0, 0)

    def select(self, chunks: list[Chunk]) -> list[Chunk]:
        """The chunks of a step that are run, with what each is to keep."""
        if self.settings.is_sample:
            lengths = [[tokens for tokens, *_ in side] for side in self.shapes]
            chunks = sampled(chunks, lengths, max(map(max, filter(None, lengths))))
        self.count = len(chunks)
        retained = retained_chunks(self.settings.retain, self.count)
        if self.settings.is_sample:
            retained = frozenset(range(0, self.count, 2))
        self.kept = len(retained)
        turns = [*sorted(retained), *(i for i in range(self.count) if i not in retained)]
        turn = {index: position for position, index in enumerate(turns)}
        self.outlines, room = [], self.settings.keep_mib * _MIB
        for index, chunk in enumerate(chunks):
            tokens, image_tokens, patches = (sum(self.shapes[chunk.side][row][i] for row in chunk.rows) for i in range(3))
            features = image_tokens * self.settings.feature_width
            features, recomputes = (features, False) if features <= room else (0, True)  # as `FeatureStore` takes them
            room -= features
            kind = index in retained, recomputes
            self.outlines.append(Outline(kind, turn[index], tokens, image_tokens, patches, len(chunk.rows), features))
        # The first of the second pass makes the gradients, the first with images those of the vision tower; the last one
        # reduces them where weights are sharded.
        pictured = [i for i in turns if self.outlines[i].image_tokens]
        self._apart = {turns[0], *pictured[:1], *(turns[-1:] if self.settings.is_sharded else ())}
        most = self.count if self.settings.is_sample else self.settings.most_chunks
        self._run_ones = picked(self.outlines, most, self._apart)
        for side in {chunk.side for chunk in chunks} - {chunks[i].side for i in self._run_ones}:  # the loss wants each side's embeddings
            largest = max((i for i in range(self.count) if chunks[i].side == side), key=lambda i: self.outlines[i].tokens)
            self._run_ones = sorted([*self._run_ones, largest])
        self._others = [i for i in range(self.count) if i not in set(self._run_ones)]
        self._forward: dict[int, Span] = {}
        self._ends: list[Span] = []
        self._left: dict[int, list[torch.Tensor]] = {}
        for index in self._run_ones:
            chunks[index].retains_graph, recomputes = self.outlines[index].kind
            chunks[index].keeps_features = not recomputes
        return [chunks[i] for i in self._run_ones]

    @contextlib.contextmanager
    def observe(self, phase: Phase) -> Iterator[None]:
        """GradCache's observer."""
        with self._phases[phase.name](self, phase) if phase.name in self._phases else contextlib.nullcontext():
            yield

    # The first pass

    @contextlib.contextmanager
    def _chunk_forward(self, phase: Phase) -> Iterator[None]:
        index = self._run_ones[phase.chunk]
        with self.meter.booking(index), self.meter.counting_as("kept graphs" if phase.retains_graph else "activations"):
            span = self.meter.begin()
            yield
            self.meter.end(span)
        self._forward[index] = span

    def _frozen_features(self, phase: Phase) -> contextlib.AbstractContextManager[None]:
        return self.meter.counting_as("frozen features")

    def _leave_behind(self) -> None:
        """What chunks that are not run keep between the passes, and how high the first pass goes with all of it there."""
        meter = self.meter
        graphs = self._every(plan_chunks.kept, {i: span.left.get("kept graphs", 0) for i, span in self._forward.items()})
        self.graphs = [graphs[i] for i in range(self.count) if self.outlines[i].kind[0]]
        self._left = {}
        for index in self._others:
            outline = self.outlines[index]
            graph = graphs[index] if outline.kind[0] else 0
            # Rows: the step remembers of each whether it was finite, in either pass.
            sizes = {"kept graphs": graph, "frozen features": outline.features, "activations": 2 * outline.rows}
            self._left[index] = [meter.hold(part, size) for part, size in sizes.items()]
        if self._others:
            self._raise_by_first_pass(graphs)

    def _raise_by_first_pass(self, graphs: dict[int, int]) -> None:
        """Each chunk's forward pass on top of what those before it left, backwards from the last one."""
        rises = self._every(plan_chunks.bounds, {i: span.high - sum(span.left.values()) for i, span in self._forward.items()})
        parts = dict(self.meter.by_part)
        for index in reversed(range(self.count)):
            self.meter.reach(parts | {"activations": parts.get("activations", 0) + rises[index]})
            outline = self.outlines[index]
            parts["kept graphs"] = parts.get("kept graphs", 0) - (graphs[index] if outline.kind[0] else 0)
            parts["frozen features"] = parts.get("frozen features", 0) - outline.features

    def _every(self, how: Callable, known: dict[int, float], *, whole: bool = True) -> dict[int, float]:
        """What each chunk takes, from what those that were run took; one of `plan_chunks` says how. `whole`: in whole bytes."""
        sizes = dict(known)
        for kind in {self.outlines[i].kind for i in self._others}:
            wanted = [i for i in self._others if self.outlines[i].kind == kind]
            like = {i: size for i, size in known.items() if self.outlines[i].kind == kind and i not in self._apart}
            taken = how(like, self.outlines, wanted)
            sizes.update(zip(wanted, map(math.ceil, taken) if whole else taken, strict=True))
        return sizes

    # The loss

    @contextlib.contextmanager
    def _loss(self, phase: Phase) -> Iterator[None]:
        self.meter.relabel(phase.tensors, "embeddings")
        self._leave_behind()
        with self.meter.counting_as("loss scratch"):
            # One operator, whose scratch no meter sees: exponentials of all pairs within the bound, as `dispatch.py` lays them.
            rows, columns = len(phase.tensors[0]), self.settings.ranks * len(phase.tensors[1])
            self._loss_span = self.meter.begin()
            scratch = torch.empty(min(rows * columns * 4, _LOSS_WORKSPACE), dtype=torch.uint8)  # noqa: F841  held until the loss is there
            yield
            self.meter.end(self._loss_span)
        self._embeddings = sum(x.nbytes for x in phase.tensors)

    # The second pass

    @contextlib.contextmanager
    def _second_pass(self, phase: Phase) -> Iterator[None]:
        self.meter.relabel(phase.tensors, "embeddings")
        self._backward, self._before, self._passed = {}, {}, []
        yield
        self._go_on_to(self.count)
        takes = self._every(plan_chunks.bounds, {i: span.high for i, span in self._backward.items()})
        for index, parts in self._before.items():
            like = self._backward[nearest(self.outlines, index, [*self._backward])]
            more = {"activations": takes[index] - like.high}
            self.meter.reach({part: sum(d.get(part, 0) for d in (parts, like.at_high, more)) for part in {**parts, **like.at_high, **more}})
        usual = [i for i in takes if i not in self._apart] or [*takes]
        self.largest = max((takes[i], self.outlines[i].tokens) for i in usual)

    @contextlib.contextmanager
    def _chunk_backward(self, phase: Phase) -> Iterator[None]:
        index = self._run_ones[phase.chunk]
        self._go_on_to(self.outlines[index].turn)
        with self.meter.booking(index):
            span = self.meter.begin()
            yield
            self.meter.end(span)
        self._backward[index] = span
        self.after_chunk()

    @contextlib.contextmanager
    def _synchronisation(self, phase: Phase) -> Iterator[None]:
        with self.meter.counting_as("all-reduce buckets"), self.ending():
            yield

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """What comes after the passes happens within it."""
        span = self.meter.begin()
        yield
        self.meter.end(span)
        self._ends.append(span)

    def _go_on_to(self, turn: int) -> None:
        """Lets the turns of chunks that are not run pass: each finds what is there, and what it left behind goes."""
        for index in sorted(self._left, key=lambda i: self.outlines[i].turn):
            if self.outlines[index].turn < turn:
                self._before[index] = dict(self.meter.by_part)
                del self._left[index][:2]  # what it remembers of its rows stays
                self._passed.append(self._left.pop(index))

    def total(self) -> Cost:
        """Cost of the whole step."""
        known = {index: Cost() for index in self._run_ones}
        for index, cost in known.items():
            cost.add(self.meter.costs[index])
        step = Cost()
        for cost in (self.meter.costs[None], *known.values()):
            step.add(cost)
        for what in ("flops", "moved", "seconds"):
            every = self._every(plan_chunks.fitted, {i: getattr(cost, what) for i, cost in known.items()}, whole=False)
            setattr(step, what, getattr(step, what) + sum(every[i] for i in self._others))
        return step

    def pieces(self) -> list[Piece]:
        """What each chunk that was run took."""
        made = []
        for index, after in self._backward.items():
            before = self._forward[index]
            rise = before.high - sum(before.left.values())
            graph = sum(before.left.values()) - before.left.get("frozen features", 0) if self.outlines[index].kind[0] else 0
            made.append(Piece(self.outlines[index], before.cost, after.cost, graph, rise, after.high, index in self._apart))
        return made

    def frame(self, resident: int) -> Frame | None:
        """What a sampled step takes around its chunks, of which all are run; None for another one. `resident`: bytes before it."""
        if not self.settings.is_sample:
            return None

        def without_chunks(span: Span, turn: int) -> int:
            """Bytes at its start, less what chunks from this turn of the second pass on have kept from the first."""
            return span.start - sum(sum(s.left.values()) for i, s in self._forward.items() if self.outlines[i].turn >= turn)

        usual = [i for i in self._backward if i not in self._apart] or [*self._backward]
        return Frame(
            first=resident + self._embeddings,
            loss=without_chunks(self._loss_span, 0) + self._loss_span.high,
            second=max(without_chunks(self._backward[i], self.outlines[i].turn) for i in usual),
            after=max(span.start + span.high for span in self._ends),
            cost=self.meter.costs[None],
        )

    _phases: dict[str, Callable[..., contextlib.AbstractContextManager[None]]] = {
        CHUNK_FORWARD: _chunk_forward,
        FROZEN_FEATURES: _frozen_features,
        LOSS: _loss,
        SECOND_PASS: _second_pass,
        CHUNK_BACKWARD: _chunk_backward,
        SYNCHRONISATION: _synchronisation,
    }


class PlannedSync(GradientSync):
    """Plays the ranks of a run: they are alike, so that each agrees with itself.

    Args:
        trained: the trained weights; stand-ins of repeated layers have none.
        group: the process group of ranks that hold whole weights; None where weights are sharded, or there is one rank.
    """

    def __init__(self, module: torch.nn.Module, trained: list[torch.nn.Parameter], group: torch.distributed.ProcessGroup | None):
        super().__init__(module)
        self._trained = trained
        if group is not None:
            self.group = group

    def largest(self, values: list[int]) -> list[int]:
        return values

    def parameters(self) -> list[torch.nn.Parameter]:
        return self._trained


class LossOfRanks:
    """`info_nce` of this rank's rows against everyone's columns, and the gathered columns' gradient: what one rank does and holds."""

    def __init__(self, ranks: int):
        self.ranks = ranks

    def value_and_grad(self, query: torch.Tensor, target: torch.Tensor, *, grad_dtype: torch.dtype, **options: Any) -> InfoNCEResult:
        """As `info_nce_value_and_grad`; every rank has the same rows."""

        def of_all_ranks(x):
            return None if x is None else torch.cat([x] * self.ranks)

        symmetric = options.get("symmetric") or options.get("query_negatives")
        targets = of_all_ranks(target)
        queries = of_all_ranks(query) if symmetric else query
        changed = {**options, "positives": torch.arange(len(query))}
        for name, is_gathered in (("target_ids", True), ("target_query_ids", True), ("query_ids", symmetric)):
            if name in options:
                changed[name] = of_all_ranks(options[name]) if is_gathered else options[name]
        if symmetric:  # one direction after the other, each with this rank's rows
            changed.update(symmetric=False, query_negatives=False)
            if "query_ids" in options:  # one direction's, of this rank's rows
                changed["query_ids"] = options["query_ids"]
            if "target_query_ids" not in options:
                changed.pop("query_ids", None)
            info_nce_value_and_grad(queries[: len(query)], targets, grad_dtype=grad_dtype, **changed)
        result = info_nce_value_and_grad(query, targets, grad_dtype=grad_dtype, **changed)
        return replace(result, d_target=result.d_target[: len(target)].clone())


def loss_of_ranks(loss: Callable, ranks: int) -> Callable:
    """Another loss of this rank's rows against everyone's columns; every rank has the same rows."""

    def of_one_rank(query: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
        if "parts" in options:  # of a sum each section has its own; the caller's stay as they are
            options["parts"] = [dict(said) for said in options["parts"]]
        for said in options.get("parts") or [options]:
            for name in ("target_ids", "target_query_ids", "teacher_target"):
                if name in said:
                    said[name] = torch.cat([said[name]] * ranks)
            said.setdefault("positives", torch.arange(len(query)))
        return loss(query, torch.cat([target] * ranks), **options)

    return of_one_rank
