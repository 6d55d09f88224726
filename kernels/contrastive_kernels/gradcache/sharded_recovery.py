"""A rank of a sharded model that ran out of memory inside a chunk goes through the rest of the chunk's collectives.

`fully_shard` gathers weights in every forward and backward pass, and a rank that simply stopped would leave the others
waiting. It cannot go on where it stopped either. So it runs a stand-in, its shortest row, through the whole pass, and
leaves out as many collectives of each sharded group as it had issued before it failed. A pass issues the same collectives
in the same order whatever its rows are (FSDP2 asks for that anyway), so those that the stand-in does issue are those that
the other ranks wait for. Skipped gathers give zeros for weights; nothing of the attempt is used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class _Counted:
    """A collective of one sharded group in place of the one that FSDP2 calls: counts its calls, and can leave some out."""

    def __init__(self, original):
        self.original = original
        self.issued = 0
        self.skip: float = 0

    def allocate(self, *args, **kwargs):
        return self.original.allocate(*args, **kwargs)

    def __call__(self, output_tensor, input_tensor, **kwargs):
        if self.skip > 0:
            self.skip -= 1
            output_tensor.zero_()
            return None
        work = self.original(output_tensor=output_tensor, input_tensor=input_tensor, **kwargs)
        self.issued += 1
        return work


class ShardedRecovery:
    """Counts the collectives of sharded modules, chunk by chunk.

    Args:
        modules: roots that `fully_shard` was applied to.

    Attributes:
        possible: whether this torch and these modules allow it: a one-dimensional mesh, and `reset_iter_state`.
    """

    def __init__(self, modules: list[torch.nn.Module]):
        self.modules = modules
        self._groups: list = []
        self._gathers: list[_Counted] = []
        self._reductions: list[_Counted] = []
        self._unsharded: list[bool] = []
        self.possible = all(hasattr(module, "reset_iter_state") for module in modules) and self._find_groups()

    def _find_groups(self) -> bool:
        """Finds (module, group) of everything sharded below the roots; False where a group reduces in more ways than one."""
        seen = set()
        for root in self.modules:
            for module in root.modules():
                if not hasattr(module, "set_custom_all_gather"):
                    continue
                groups = module._get_fsdp_state()._fsdp_param_groups
                if len(groups) > 1:
                    return False
                for group in groups:
                    if group.mesh_info.replicate_mesh_dim is not None:
                        return False
                    if id(group) not in seen:
                        seen.add(id(group))
                        self._groups.append((module, group))
        return True

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Within it, the modules' collectives are counted."""
        before = [(module, group._all_gather_comm, group._reduce_scatter_comm) for module, group in self._groups]
        self._gathers = [_Counted(gather) for _, gather, _ in before]
        self._reductions = [_Counted(reduction) for _, _, reduction in before]
        for (module, _, _), gather, reduction in zip(before, self._gathers, self._reductions, strict=True):
            module.set_custom_all_gather(gather)
            module.set_custom_reduce_scatter(reduction)
        try:
            yield
        finally:
            for module, gather, reduction in before:
                module.set_custom_all_gather(gather)
                module.set_custom_reduce_scatter(reduction)

    def reset(self) -> None:
        """Gives up what is under way and reshards everything: the same state on every rank that calls it."""
        for module in self.modules:
            if module._get_fsdp_state()._is_root:  # set by the first forward
                module.reset_iter_state()

    def begin_chunk(self) -> None:
        self._unsharded = [group.is_unsharded for _, group in self._groups]
        for collective in (*self._gathers, *self._reductions):
            collective.issued = collective.skip = 0

    def begin_stand_in(self) -> None:
        """From here on, what the failed pass has issued is left out; so is the gather of what it found gathered."""
        self.reset()
        for gather, was_unsharded in zip(self._gathers, self._unsharded, strict=True):
            gather.skip = gather.issued + was_unsharded
        for reduction in self._reductions:
            reduction.skip = reduction.issued

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """A forward pass that the other ranks do not make: nothing is issued. What it leaves is reset."""
        skips = [gather.skip for gather in self._gathers]
        for gather in self._gathers:
            gather.skip = float("inf")
        try:
            yield
        finally:
            self.reset()
            for gather, skip in zip(self._gathers, skips, strict=True):
                gather.skip = skip
