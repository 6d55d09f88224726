"""The two passes of one attempt at a GradCache step: every chunk forward, then every chunk backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .chunks import SIDES, Chunk, dummy_chunk, graph_mode
from .embedding_gradients import scaled
from .generator_state import GeneratorState
from .gradient_sync import GradientSync
from .observer import CHUNK_BACKWARD, CHUNK_FORWARD, FROZEN_FEATURES, Observer, Phase
from .out_of_memory import OutOfMemory
from .retention import FeatureStore, GraphSize, counting_saved, fitting_chunks, retained_chunks


@dataclass(frozen=True)
class Callbacks:
    """What the caller of GradCache does with rows, as its constructor describes it: functions of query, target and hard negatives."""

    encode: Sequence[Callable]
    freeze: Sequence[Callable] | None = None
    prefetch: Sequence[Callable] | None = None
    release: Sequence[Callable] | None = None


class Passes:
    """One attempt at a step.

    Args:
        sides: inputs of query, target and, where there are any, hard negatives. lengths: tokens of their rows.
        chunks: of the step, in the order of the first pass; their graphs and generator states are kept on them.
        features: what frozen parts gave in the first pass, within its bound.
        graph_sizes: by side (0 query, 1 target and hard negatives) what a graph takes; kept from step to step.
    """

    def __init__(
        self,
        callbacks: Callbacks,
        sides: list[Any],
        lengths: Sequence[Sequence[int]],
        chunks: list[Chunk],
        features: FeatureStore,
        *,
        sync: GradientSync,
        memory: OutOfMemory,
        scaler: torch.amp.GradScaler | None,
        observe: Observer,
        graph_sizes: dict[int, GraphSize],
    ):
        self.callbacks, self.sides, self.lengths, self.chunks, self.features = callbacks, sides, lengths, chunks, features
        self.sync, self.memory, self.scaler, self.observe = sync, memory, scaler, observe
        self.graph_sizes = graph_sizes
        self._shortest = [dummy_chunk(side, side_lengths) if len(side_lengths) else None for side, side_lengths in enumerate(lengths)]

    def first(self, retain: int | str, retain_mib: float | None) -> list[torch.Tensor]:
        """Embeddings of each side, (rows, D), without a graph; the last chunks keep theirs as `retain` says."""
        embeddings: list[torch.Tensor | None] = [None] * len(self.sides)
        is_measured = retain == "auto"
        retained = self._measured_retained(retain_mib) if is_measured else retained_chunks(retain, len(self.chunks))
        for index, chunk in enumerate(self.chunks):
            self._announce(self.chunks[index + 1 : index + 2])
            keep_graph = index in retained if chunk.retains_graph is None else chunk.retains_graph
            keep_graph = keep_graph and not self.memory.has_failed_here
            with self.observe(self._phase(CHUNK_FORWARD, index, keep_graph)):
                encoded = self.memory.run(
                    partial(self._forward_chunk, index, chunk, keep_graph, keep_graph and is_measured), partial(self._stand_in, chunk)
                )
            if self.memory.must_stop:
                break
            if encoded is None:
                for failed in self.chunks:
                    failed.graph = None  # the step is done again
            if encoded is None or chunk.is_dummy:
                continue
            if keep_graph or self.features.get(index) is not None:
                self._release(chunk)
            if embeddings[chunk.side] is None:
                embeddings[chunk.side] = encoded.new_empty(len(self.lengths[chunk.side]), encoded.shape[1])
            embeddings[chunk.side][chunk.index(encoded.device)] = encoded.detach()
        return embeddings

    def second(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Sends `gradients` of the embeddings, (rows, D) a side or None, through the chunks' graphs."""
        # Graphs that were kept go first: each frees its memory before a chunk is encoded again.
        order = [i for i, c in enumerate(self.chunks) if c.graph is not None]
        order += [i for i, c in enumerate(self.chunks) if c.graph is None]
        last_of_part = {self.sync.part(self.chunks[index].side): index for index in order}
        for position, index in enumerate(order):
            chunk = self.chunks[index]
            coming = order[position + 1 : position + 2]
            self._announce([self.chunks[i] for i in coming if self.chunks[i].graph is None and self.features.get(i) is None])
            has_graph = chunk.graph is not None
            with self.sync.last_backward() if index in last_of_part.values() else self.sync.deferred():
                with self.observe(self._phase(CHUNK_BACKWARD, index, has_graph)):
                    self.memory.run(
                        partial(self._backward_chunk, index, chunk, gradients[chunk.side]),
                        partial(self._stand_in, chunk, has_graph=has_graph, backward=True),
                    )
            if self.memory.must_stop:
                break
            self.features.drop(index)
            chunk.graph = None

    def _phase(self, name: str, index: int, retains_graph: bool) -> Phase:
        chunk = self.chunks[index]
        return Phase(name, index, SIDES[chunk.side], tuple(chunk.rows), chunk.tokens, retains_graph, chunk.is_dummy)

    # One chunk

    def _forward_chunk(self, index: int, chunk: Chunk, keep_graph: bool, is_counted: bool) -> torch.Tensor:
        """Embeddings of a chunk in the first pass."""
        frozen = self._frozen(chunk, index, keep_graph)
        chunk.encode_state = GeneratorState.capture()
        with self.sync.deferred(), graph_mode(keep_graph), counting_saved() if is_counted else contextlib.nullcontext() as saved:
            encoded = self._encode(chunk, frozen)
        if encoded.dim() != 2 or encoded.shape[0] != len(chunk.rows):
            raise ValueError(
                f"encode: expected ({len(chunk.rows)}, D) for {len(chunk.rows)} rows, got {tuple(encoded.shape)}; return one row a sample"
            )
        if keep_graph:
            chunk.graph = encoded
        if is_counted:
            self.graph_sizes[min(chunk.side, 1)].observe(chunk.tokens, saved.bytes)
        return encoded

    def _backward_chunk(self, index: int, chunk: Chunk, gradient: torch.Tensor | None) -> None:
        """Sends a chunk's rows of the embeddings' gradient through its graph, which is made again where it was not kept."""
        encoded = chunk.graph
        if encoded is None:
            frozen = self._frozen(chunk, index, False)
            chunk.encode_state.restore()
            with graph_mode(True):
                encoded = self._encode(chunk, frozen)
            self._release(chunk)
        if chunk.is_dummy or gradient is None:
            rows = torch.zeros_like(encoded)
        else:
            rows = gradient[chunk.index(gradient.device)]
        if encoded.requires_grad:
            encoded.backward(scaled(self.scaler, rows).to(encoded.dtype))

    def _stand_in(self, chunk: Chunk, *, has_graph: bool = False, backward: bool = False) -> None:
        """Passes over the shortest row, for the collectives of a chunk that failed. `has_graph`: only its backward was due."""
        other = self._shortest[chunk.side]
        frozen = self._freeze(other)
        with self.memory.recovery.alone() if has_graph else contextlib.nullcontext(), graph_mode(backward):
            encoded = self._encode(other, frozen)
        if backward and encoded.requires_grad:
            encoded.backward(torch.zeros_like(encoded))

    def _encode(self, chunk: Chunk, frozen: Any) -> torch.Tensor:
        encode, inputs = self.callbacks.encode[chunk.side], self.sides[chunk.side]
        return encode(inputs, chunk.rows) if frozen is None else encode(inputs, chunk.rows, features=frozen)

    def _freeze(self, chunk: Chunk) -> Any:
        if self.callbacks.freeze is None:
            return None
        with torch.no_grad():
            return self.callbacks.freeze[chunk.side](self.sides[chunk.side], chunk.rows)

    def _frozen(self, chunk: Chunk, index: int, retains_graph: bool) -> Any:
        """What the frozen part gives for a chunk: from the first pass, where it was kept, else computed (again, by the same draws)."""
        if self.callbacks.freeze is None:
            return None
        stored = self.features.get(index)
        if stored is not None:
            return stored.value
        state = chunk.freeze_state
        if state is not None:
            resume = GeneratorState.capture()
            state.restore()
        chunk.freeze_state = GeneratorState.capture()
        with self.observe(self._phase(FROZEN_FEATURES, index, retains_graph)):
            value = self._freeze(chunk)
        if state is None:
            self.features.offer(index, value, chunk.keeps_features)
        else:
            resume.restore()
        return value

    # retain="auto"

    def _measured_retained(self, retain_mib: float | None) -> frozenset[int]:
        """The last chunks whose graphs fit, judged by those of the first and last chunk of query and target."""
        if not self.graph_sizes:
            before = GeneratorState.capture()
            for side in range(2):
                real = [chunk for chunk in self.chunks if chunk.side == side and not chunk.is_dummy]
                # A sharded module's forward is collective, and another rank may have more chunks: two always.
                ends = [real[0], real[-1]] if len(real) > 1 or self.sync.is_fsdp else real
                self.graph_sizes[side] = GraphSize.fit([(chunk.tokens, self._graph_bytes(chunk)) for chunk in ends])
            before.restore()
            self.memory.between_passes()  # a stand-in leaves no weights to go on with
        return fitting_chunks([self.graph_sizes[min(c.side, 1)].of(c.tokens) for c in self.chunks], retain_mib, self.sync)

    def _graph_bytes(self, chunk: Chunk) -> float:
        def measure() -> int:
            frozen = self._freeze(chunk)
            with graph_mode(True), counting_saved() as saved:
                graph = self._encode(chunk, frozen)  # noqa: F841  keeps it alive
            return saved.bytes

        with self.sync.deferred():
            measured = self.memory.run(measure, partial(self._stand_in, chunk), is_trial=True)
        # No room for a graph: whether the passes fit without one is seen when they run.
        return float("inf") if measured is None else measured

    # What the caller reads ahead and lets go

    def _announce(self, coming: list[Chunk]) -> None:
        if self.callbacks.prefetch is not None:
            for chunk in coming:
                self.callbacks.prefetch[chunk.side](self.sides[chunk.side], chunk.rows)

    def _release(self, chunk: Chunk) -> None:
        # A dummy's row stands in a real chunk too, which releases it.
        if self.callbacks.release is not None and not chunk.is_dummy:
            self.callbacks.release[chunk.side](self.sides[chunk.side], chunk.rows)
