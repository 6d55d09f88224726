"""GradCache as a plan runs it: some chunks of a step, and account of all.

Kept graphs and features of chunks that are not run are tensors of their bytes, which go when the chunk's turn has come; what
its backward pass takes on top raises the peak.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from contrastive_kernels import GradCache
from contrastive_kernels.gradcache.retention import FeatureStore, retained_chunks

from . import chunks as plan_chunks
from .chunks import Outline, nearest, picked
from .meter import Meter, Span, Work

_MIB = 2**20
_LOSS_WORKSPACE = 256 * _MIB  # `workspace_mib` of the loss


class PlannedGradCache(GradCache):
    """Runs some chunks of a step and keeps account of all.

    Attributes:
        meter: set before the first step.
        shapes: (tokens, image tokens, patches) of each sample by side, set before each step.
        count, kept: chunks of the whole step, and those of them whose graph is kept.
        graphs: bytes of the kept graphs, in order.
        largest: (bytes, tokens) of the chunk whose second pass takes most beyond what stood before it; not of the first one, which
            makes the gradients, where there are others.
        after_chunk: called when a chunk's gradients are there.
    """

    meter: Meter
    shapes: list
    count = kept = 0
    feature_width = 0  # bytes of a frozen tower's output per image token
    ranks = 1
    most_chunks = 8  # chunks that are all run; of more than that, those that say what the others take
    is_sharded = False

    def after_chunk(self) -> None:
        pass

    def _plan(self, lengths):
        chunks = super()._plan(lengths)
        self.count = len(chunks)
        kept = retained_chunks(self.retain, self.count)
        self.kept = len(kept)
        turns = [*sorted(kept), *(i for i in range(self.count) if i not in kept)]
        turn = {index: position for position, index in enumerate(turns)}
        self.outlines, room = [], self.keep_mib * _MIB
        for index, chunk in enumerate(chunks):
            tokens, image_tokens, patches = (sum(self.shapes[chunk.side][row][i] for row in chunk.rows) for i in range(3))
            features = image_tokens * self.feature_width
            features, recomputes = (features, False) if features <= room else (0, True)  # as `FeatureStore` takes them
            room -= features
            kind = index in kept, recomputes
            self.outlines.append(Outline(kind, turn[index], tokens, image_tokens, patches, len(chunk.rows), features))
        # The first of the second pass makes the gradients, the first with images those of the vision tower; the last one
        # reduces them where weights are sharded.
        pictured = [i for i in turns if self.outlines[i].image_tokens]
        self._apart = {turns[0], *pictured[:1], *(turns[-1:] if self.is_sharded else ())}
        self._run_ones = picked(self.outlines, self.most_chunks, self._apart)
        self._others = [i for i in range(self.count) if i not in set(self._run_ones)]
        self._forward: dict[int, Span] = {}
        self._left: dict[int, list[torch.Tensor]] = {}
        self.retain = sum(i in kept for i in self._run_ones)  # they are the last ones here too
        return [chunks[i] for i in self._run_ones]

    # The first pass

    def _first_pass(self, sides, lengths, chunks, retained, features):
        embeddings = super()._first_pass(sides, lengths, chunks, retained, features)
        self.meter.relabel(embeddings, "embeddings")
        self._leave_behind()
        return embeddings

    def _forward_chunk(self, sides, index, chunk, features, keep_graph):
        which = self._run_ones[index]
        with self.meter.booking(which), self.meter.counting_as("kept graphs" if keep_graph else "activations"):
            span = self.meter.begin()
            encoded = super()._forward_chunk(sides, index, chunk, features, keep_graph)
            self.meter.end(span)
        self._forward[which] = span
        return encoded

    def _frozen(self, sides, chunk, index, store: FeatureStore):
        store._bound = 0.0 if self.outlines[self._run_ones[index]].kind[1] else float("inf")
        with self.meter.counting_as("frozen features"):
            return super()._frozen(sides, chunk, index, store)

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

    def _every(self, how: Callable, known: dict[int, int]) -> dict[int, int]:
        """What each chunk takes, from what those that were run took; one of `plan_chunks` says how."""
        found = dict(known)
        for kind in {self.outlines[i].kind for i in self._others}:
            wanted = [i for i in self._others if self.outlines[i].kind == kind]
            like = {i: size for i, size in known.items() if self.outlines[i].kind == kind and i not in self._apart}
            found.update(zip(wanted, map(math.ceil, how(like, self.outlines, wanted)), strict=True))
        return found

    # The loss

    def _loss(self, embeddings, options):
        with self.meter.counting_as("loss scratch"):
            # One operator, whose scratch no meter sees: exponentials of all pairs within the bound, as `dispatch.py` lays them.
            rows, columns = len(embeddings[0]), self.ranks * len(embeddings[1])
            scratch = torch.empty(min(rows * columns * 4, _LOSS_WORKSPACE), dtype=torch.uint8)  # noqa: F841  held until the loss is there
            if self.ranks > 1:
                result = self._loss_over_ranks(embeddings, options)
            else:
                result = super()._loss(embeddings, options)
        self.meter.relabel([result.d_query, result.d_target, result.d_hard_negatives], "embeddings")
        return result

    def _loss_over_ranks(self, embeddings, options):
        """This rank's rows against everyone's columns, and the gathered columns' gradient: what one rank does and holds."""

        def whole(x):
            return None if x is None else torch.cat([x] * self.ranks)

        query, target, *hard = embeddings
        symmetric = options.get("symmetric") or options.get("query_negatives")
        gathered = whole(target)
        queries = whole(query) if symmetric else query
        changed = {**options, "positives": torch.arange(len(query))}
        for name, gather in (("target_ids", True), ("query_ids", symmetric)):
            if name in options:
                changed[name] = whole(options[name]) if gather else options[name]
        if symmetric:  # one direction after the other, each with this rank's rows
            changed.update(symmetric=False, query_negatives=False)
            changed.pop("query_ids", None)
            super()._loss([queries[: len(query)], gathered, *hard], changed)
        result = super()._loss([query, gathered, *hard], changed)
        return replace(result, d_target=result.d_target[: len(target)].clone())

    # The second pass

    def _second_pass(self, sides, chunks, result, features):
        self._backward, self._before, self._passed = {}, {}, []
        super()._second_pass(sides, chunks, result, features)
        self._go_on_to(self.count)
        takes = self._every(plan_chunks.bounds, {i: span.high for i, span in self._backward.items()})
        for index, parts in self._before.items():
            like = self._backward[nearest(self.outlines, index, [*self._backward])]
            more = {"activations": takes[index] - like.high}
            self.meter.reach({part: sum(d.get(part, 0) for d in (parts, like.at_high, more)) for part in {**parts, **like.at_high, **more}})
        usual = [i for i in takes if i not in self._apart] or [*takes]
        self.largest = max((takes[i], self.outlines[i].tokens) for i in usual)

    def _backward_chunk(self, sides, index, chunk, gradient, features):
        which = self._run_ones[index]
        self._go_on_to(self.outlines[which].turn)
        with self.meter.booking(which):
            span = self.meter.begin()
            super()._backward_chunk(sides, index, chunk, gradient, features)
            self.meter.end(span)
        self._backward[which] = span
        self.after_chunk()

    def _go_on_to(self, turn: int) -> None:
        """Lets the turns of chunks that are not run pass: each finds what is there, and what it left behind goes."""
        for index in sorted(self._left, key=lambda i: self.outlines[i].turn):
            if self.outlines[index].turn < turn:
                self._before[index] = dict(self.meter.by_part)
                del self._left[index][:2]  # what it remembers of its rows stays
                self._passed.append(self._left.pop(index))

    def total(self) -> Work:
        """Work of the whole step."""
        weights: dict = dict.fromkeys(self._run_ones, 1.0) | {None: 1.0}
        for index in self._others:
            like = nearest(self.outlines, index, self._run_ones)
            weights[like] += self.outlines[index].tokens / self.outlines[like].tokens
        whole = Work()
        for key, work in self.meter.work.items():
            whole.add(work, weights[key])
        return whole
