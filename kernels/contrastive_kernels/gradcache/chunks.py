"""The chunks of a GradCache step: which rows, in which order, and as many on every rank as its collectives need."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from .chunking import row_chunks, token_budget_chunks
from .generator_state import GeneratorState
from .gradient_sync import GradientSync

SIDES = ("query", "target", "hard_negatives")


@dataclass
class Chunk:
    """Rows of one side that are encoded together.

    Attributes:
        side: index into `SIDES`. rows: of that side. tokens: their sum.
        is_dummy: run for its collectives alone: a rank with fewer chunks than another.
        retains_graph, keeps_features: whether its graph, and what `freeze` gave for it, stay from the first pass to the second;
            None as the step's bounds have it.
        encode_state, freeze_state: generators before its first forward, which the second repeats. graph: embeddings with their graph.
    """

    side: int
    rows: list[int]
    tokens: int
    is_dummy: bool = False
    retains_graph: bool | None = None
    keeps_features: bool | None = None
    encode_state: GeneratorState | None = None
    freeze_state: GeneratorState | None = None
    graph: torch.Tensor | None = field(default=None, repr=False)

    def index(self, device: torch.device) -> torch.Tensor:
        """(rows,) int64 on the device, which the host does not wait for: it would stand still until all that came before has run."""
        index = torch.tensor(self.rows)
        return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index.to(device)


def dummy_chunk(side: int, lengths: Sequence[int]) -> Chunk:
    """A chunk of the shortest row, for its collectives alone."""
    shortest = min(range(len(lengths)), key=lambda row: lengths[row])
    return Chunk(side, [shortest], lengths[shortest], is_dummy=True)


def make_chunks(lengths: tuple[Sequence[int], ...], chunk_tokens: int | None, chunk_size: int | None, sync: GradientSync) -> list[Chunk]:
    """Chunks of all sides, query first. Collective where the module is sharded: all ranks make as many.

    Dummies stand before the real chunks of their part of the step (`GradientSync.part`). A reduction may fall on a dummy
    all the same, where the graphs of all real chunks were kept; FSDP2 then reduces what they have accumulated.
    """
    by_part: list[list[Chunk]] = [[] for _ in range(sync.parts)]
    for side, side_lengths in enumerate(lengths):
        if len(side_lengths) == 0 and side < 2:
            raise ValueError(f"{SIDES[side]}: expected at least one row, got none; leave out steps that have an empty side")
        if chunk_tokens is not None:
            rows_of_chunks = token_budget_chunks(side_lengths, chunk_tokens)
        else:
            rows_of_chunks = row_chunks(side_lengths, chunk_size)
        by_part[sync.part(side)] += [Chunk(side, rows, sum(side_lengths[r] for r in rows)) for rows in rows_of_chunks]
    counts = sync.common_counts([len(chunks) for chunks in by_part])
    for part, (chunks, count) in enumerate(zip(by_part, counts, strict=True)):
        chunks[:0] = [dummy_chunk(part, lengths[part]) for _ in range(count - len(chunks))]
    return [chunk for chunks in by_part for chunk in chunks]


def graph_mode(kept: bool) -> contextlib.AbstractContextManager:
    """Gradient mode of one encode call.

    Inside a caller's autocast region the low-precision copies of the weights are cached; copies made without a graph
    would be reused by the pass with one and cut the weights off from their gradient, so the cache is emptied first.
    """
    torch.clear_autocast_cache()
    return torch.enable_grad() if kept else torch.no_grad()


def by_side(functions: Callable | tuple[Callable, Callable]) -> tuple[Callable, Callable, Callable]:
    """Functions of (query, target, hard negatives): one for all, or a pair of which the second serves the last two."""
    if callable(functions):
        return functions, functions, functions
    query, target = functions
    return query, target, target
