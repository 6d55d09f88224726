"""Counts what a call would start on a GPU: Triton kernels, and torch operations that are no views, allocations or questions."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

from contrastive_kernels.core.autograd import direct as info_nce_direct

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty"}


def starts_something(function, args, kwargs, result) -> bool:
    """Not what only allocates, asks, or looks at memory in another way: a result in the memory of an argument that is not written."""
    if function.overloadpacket.__name__ in ALLOCATIONS:
        return False
    if function._schema.is_mutable:
        return True
    given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
    made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
    return any(x.untyped_storage().data_ptr() not in given for x in made) or function.overloadpacket.__name__ == "_local_scalar_dense"


@contextlib.contextmanager
def counted(monkeypatch):
    """A list that collects the names of launches made inside the block, in order."""
    names, inside = [], [False]
    launch = GridExecutor.__call__

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if not inside[0] and function.namespace == "aten" and starts_something(function, args, kwargs, result):
                names.append(function.overloadpacket.__name__)
            return result

    def called(self, *args, **kwargs):
        names.append(self.fn.__name__)
        inside[0] = True  # what the interpreter itself does
        try:
            return launch(self, *args, **kwargs)
        finally:
            inside[0] = False

    with monkeypatch.context() as patch, Operations():
        patch.setattr(GridExecutor, "__call__", called)
        # a mode that watches sends calls through the dispatcher, and is not asked about what an operator of our own does inside
        patch.setattr(info_nce_direct, "_get_current_dispatch_mode", lambda: None)
        patch.setattr(info_nce_direct, "check_values", lambda *args: None)  # a GPU's numbers are not looked at
        yield names
