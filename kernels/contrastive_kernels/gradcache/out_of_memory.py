"""Out of memory in a chunk: noticed by all ranks, undone, and done again once with smaller chunks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

import torch

from .generator_state import GeneratorState
from .gradient_sync import GradientSync
from .sharded_recovery import ShardedRecovery

T = TypeVar("T")
_MEND = "lower chunk_tokens (or chunk_size); `python -m train plan RECIPE --gpu NAME` tells what fits"


class OutOfMemory:
    """Watches over the chunks of a step.

    Args:
        sync: of the modules whose gradients a failed step has to undo. Without modules nothing can be undone.

    Attributes:
        halved: whether a step was done again already; another time it raises.
    """

    def __init__(self, sync: GradientSync):
        self.sync = sync
        self.recovery = ShardedRecovery(sync.sharded) if sync.is_fsdp else None
        self.halved = False
        self._message: str | None = None
        self._can_undo = False

    def watching(self) -> contextlib.AbstractContextManager[None]:
        """Context of a whole step."""
        return self.recovery.installed() if self.recovery is not None and self.recovery.possible else contextlib.nullcontext()

    def begin(self) -> None:
        """Before an attempt at a step."""
        self.between_passes()
        self._message = None
        # Gradients of earlier steps could not be told from this step's.
        fresh = all(p.grad is None for p in self.sync.parameters())
        self._can_undo = not self.halved and bool(self.sync.modules) and fresh
        self._generators = GeneratorState.capture()

    def between_passes(self) -> None:
        """Brings a sharded module into the same state on every rank, from which a pass issues the same collectives."""
        if self.recovery is not None and self.recovery.possible:
            self.recovery.reset()

    @property
    def has_failed_here(self) -> bool:
        return self._message is not None

    @property
    def must_stop(self) -> bool:
        """Whether the rest of the pass is of no use to anyone: where a module is sharded, other ranks need this one."""
        return self.has_failed_here and not self.sync.is_fsdp

    def run(self, chunk: Callable[[], T], stand_in: Callable[[], object], *, is_trial: bool = False) -> T | None:
        """What `chunk()` gives; None where it ran out of memory.

        Args:
            stand_in: makes the chunk's passes over another row, where other ranks of a sharded module wait for them.
            is_trial: the step can do without it.

        Raises:
            torch.OutOfMemoryError: where there is neither a way to undo the step nor another rank that has to hear of it.
        """
        can_recover = self.recovery is None or self.recovery.possible
        if self.recovery is not None and can_recover:
            self.recovery.begin_chunk()
        try:
            return chunk()
        except torch.OutOfMemoryError as error:
            if not can_recover:
                raise torch.OutOfMemoryError(
                    f"{error}\nOther ranks are inside the same collective pass, and this one cannot take part in it any more "
                    f"(that needs a torch with FSDPModule.reset_iter_state, and a one-dimensional mesh); {_MEND}"
                ) from error
            if not is_trial:
                if self.sync.group is None and not self._can_undo:
                    raise
                self._message = str(error)
        # The error is gone, and with it the frames that held what the chunk had allocated.
        if self.recovery is not None:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.recovery.begin_stand_in()
            stand_in()
        return None

    def failed(self) -> bool:
        """Whether a chunk ran out of memory on any rank. Collective.

        Raises:
            torch.OutOfMemoryError: on all ranks, where one did and some rank cannot undo the step.
        """
        failed, stuck = self.sync.largest([int(self.has_failed_here), int(not self._can_undo)])
        if failed and stuck:
            why = "chunks were halved already" if self.halved else "gradients of earlier steps would be lost with this one's"
            raise torch.OutOfMemoryError(f"{self._message or 'another rank ran out of memory in a chunk'}; {why}: {_MEND}")
        return bool(failed)

    def undo(self) -> None:
        """Takes back what the failed step did."""
        self.between_passes()
        for parameter in self.sync.parameters():
            parameter.grad = None
        self._generators.restore()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.halved = True
