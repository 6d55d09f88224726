"""What a GradCache step does, phase by phase, told to whoever times, profiles or counts it.

An observer is a function of a `Phase` that gives a context manager; GradCache does the phase inside of it. It sees the order below
and changes nothing. Chunk phases lie inside the pass they belong to, frozen features inside the chunk that needs them:

    first pass            every chunk forward; with retain="auto" the measuring of its first step too
      chunk forward         one chunk
        frozen features       what `freeze` gives, where it is computed and not kept from the first pass
    loss                  loss and gradients of all embeddings
    second pass           every chunk backward; `fully_shard` reduces gradients in here
      chunk backward        one chunk: forward again, unless its graph was retained, and backward
        frozen features
    synchronisation       the one all-reduce of gradients that `fully_shard` has not reduced; empty on one rank

A step that runs out of memory is done again, and its phases are told again; contexts are left where a phase raises.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

FIRST_PASS = "first pass"
LOSS = "loss"
SECOND_PASS = "second pass"
SYNCHRONISATION = "synchronisation"
PHASES = (FIRST_PASS, LOSS, SECOND_PASS, SYNCHRONISATION)
CHUNK_FORWARD = "chunk forward"
CHUNK_BACKWARD = "chunk backward"
FROZEN_FEATURES = "frozen features"


@dataclass(frozen=True)
class Phase:
    """One phase of a step.

    Attributes:
        name: one of `PHASES`, or of a chunk: "chunk forward", "chunk backward", "frozen features".
        chunk: index among the step's chunks, in the order of the first pass; None for phases of the whole step.
        side: "query", "target" or "hard_negatives", of a chunk.
        rows: the chunk's rows of its side. tokens: their sum.
        retains_graph: whether the chunk's graph is kept from the first pass to the second.
        is_dummy: a chunk that another rank's collectives need; its rows stand in another chunk too.
        tensors: at the loss what the first pass gave, (rows of a side, D) each, without a graph; at the second pass their gradients,
            None for a side that has none. Elsewhere empty.
    """

    name: str
    chunk: int | None = None
    side: str | None = None
    rows: tuple[int, ...] = ()
    tokens: int = 0
    retains_graph: bool = False
    is_dummy: bool = False
    tensors: tuple[torch.Tensor | None, ...] = ()


Observer = Callable[[Phase], contextlib.AbstractContextManager]


def unobserved(phase: Phase) -> contextlib.AbstractContextManager:
    """The observer that does nothing."""
    return contextlib.nullcontext()


def joined(observers: Observer | Sequence[Observer] | None) -> Observer:
    """One observer of all: entered in their order, left in the reverse."""
    if observers is None:
        return unobserved
    if callable(observers):
        return observers
    if len(observers) < 2:
        return observers[0] if observers else unobserved

    @contextlib.contextmanager
    def together(phase: Phase):
        with contextlib.ExitStack() as stack:
            for observer in observers:
                stack.enter_context(observer(phase))
            yield

    return together
