"""Backward of the losses whose gradients were formed with the value: they have only to be scaled.

A product would hold every gradient twice. Where the graph is freed after this backward the saved tensors are scaled where they
lie; with retain_graph=True they are needed again, and under a tracer they are no memory: there a product is formed.
"""

from __future__ import annotations

import torch

# told by torch to its own compiled functions, which reuse saved memory by the same rule; where it is missing nothing is reused
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def scaled(gradients, cotangent: torch.Tensor) -> list[torch.Tensor]:
    """Each of `gradients`, saved by this backward's node, times the 0-d `cotangent`. Memory of their own only where they must."""
    if _keeps_graph() or any(type(x) is not torch.Tensor for x in (*gradients, cotangent)):
        return [gradient * cotangent for gradient in gradients]
    if cotangent.device.type == "cpu" and float(cotangent) == 1.0:  # loss.backward(): nothing to do at all
        return list(gradients)
    return [gradient.mul_(cotangent) for gradient in gradients]


def refuse_second_derivative(name: str) -> None:
    """Raises RuntimeError in a backward that is itself recorded."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no second derivative: call backward without create_graph=True")
