"""Backward of the losses whose gradients were formed with the value: they have only to be scaled and cast.

A product would hold every gradient twice. Where the graph is freed after this backward the saved tensors are scaled where they
lie, or, where they are wanted in another type, into that in the same pass; with retain_graph=True they are needed again, and under
a tracer they are no memory: there a product is formed.
"""

from __future__ import annotations

import torch

# told by torch to its own compiled functions, which reuse saved memory by the same rule; where it is missing nothing is reused
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def scaled(gradients, cotangent: torch.Tensor, dtypes) -> list[torch.Tensor]:
    """Each of `gradients`, saved by this backward's node, times the 0-d `cotangent`, in its dtype of `dtypes` (None for its own).

    Memory of their own only where they must.
    """
    dtypes = [gradient.dtype if dtype is None else dtype for gradient, dtype in zip(gradients, dtypes)]
    if any(type(x) is not torch.Tensor for x in (*gradients, cotangent)):
        return [(gradient * cotangent).to(dtype) for gradient, dtype in zip(gradients, dtypes)]
    if cotangent.device.type == "cpu" and float(cotangent) == 1.0 and not _keeps_graph():  # loss.backward(): nothing to do but the cast
        return [gradient.to(dtype) for gradient, dtype in zip(gradients, dtypes)]
    return [_scaled(gradient, cotangent, dtype) for gradient, dtype in zip(gradients, dtypes)]


def _scaled(gradient: torch.Tensor, cotangent: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype == gradient.dtype and not _keeps_graph():
        return gradient.mul_(cotangent)
    # multiplied in the gradient's type and rounded in the same pass
    return torch.mul(gradient, cotangent, out=torch.empty_like(gradient, dtype=dtype))


def refuse_second_derivative(name: str) -> None:
    """Raises RuntimeError in a backward that is itself recorded."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no second derivative: call backward without create_graph=True")
