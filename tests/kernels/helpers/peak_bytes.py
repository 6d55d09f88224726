"""The most bytes of tensors alive at one time while code runs, storage by storage."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakBytes(TorchDispatchMode):
    """Within it, what every operator returns counts until its storage is freed, once however many views it has.

    Args:
        tensors: what is alive already and counts.

    Attributes:
        current, peak: bytes alive now, and the most so far.
    """

    def __init__(self, tensors=()):
        super().__init__()
        self.current = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}
        self._count(tensors)

    def _count(self, value) -> None:
        for tensor in tree_iter(value):
            if isinstance(tensor, torch.Tensor):
                # a tensor in oneDNN's own layout has no storage that Python can see
                holder = tensor if tensor.is_mkldnn else tensor.untyped_storage()
                size = holder.nbytes if tensor.is_mkldnn else holder.nbytes()
                key = id(holder) if tensor.is_mkldnn else holder._cdata
                if key not in self._alive or self._alive[key]() is None:
                    self._alive[key] = weakref.ref(holder, lambda gone, key=key, size=size: self._freed(key, gone, size))
                    self.current += size
                    self.peak = max(self.peak, self.current)

    def _freed(self, key: int, gone: weakref.ref, size: int) -> None:
        self.current -= size
        if self._alive.get(key) is gone:
            del self._alive[key]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self._count(out)
        return out


def distillation_scratch(matrices, backend, workspace: int) -> int:
    """Most bytes alive at one time beyond inputs and gradients of `distillation_loss`. matrices: the student's two, the teacher's two."""
    from contrastive_kernels.core import distillation

    options = {"temperature": 0.1, "teacher_temperature": 0.1, "weight": None, "symmetric": False, "normalize": False, "reduction": "mean"}
    options |= {"group": None, "workspace_mib": workspace / 2**20, "backend": backend, "wanted": frozenset(("query", "target"))}
    with PeakBytes(matrices) as live:
        out = distillation.compute(*matrices, **options)
    assert bool(out.d_query.isfinite().all())
    return live.peak - sum(x.nbytes for x in matrices) - out.d_query.nbytes - out.d_target.nbytes
