"""The loss for plain tensors, called as Python calls: around torch's dispatcher, which takes longer than a small loss itself.

`torch.library`'s operators pass a schema, fake rules and several layers of Python on their way in and out, 0.2 to 0.6 ms a step on
one core. Tracers need them; a training loop does not. `possible` says which calls may go around them.
"""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ...checks import check_values
from ...options import InfoNCEOptions
from ..compute import Computed, compute
from .scaled import refuse_second_derivative, scaled

PLAIN = (torch.Tensor, torch.nn.Parameter)


def possible(query: torch.Tensor, target: torch.Tensor, options: InfoNCEOptions) -> bool:
    """Whether nobody watches: no tracer, no dispatch mode, no transform, no subclass; and gradients can be formed with the value."""
    if options.reduction == "none" or torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return False
    given = (query, target, *(x for x in vars(options).values() if isinstance(x, torch.Tensor)))
    return all(type(x) in PLAIN and not torch._C._functorch.is_functorch_wrapped_tensor(x) for x in given)


def value_and_grad(query, target, options: InfoNCEOptions, wanted: frozenset[str]) -> Computed:
    """`compute.compute` of checked tensors that belong to no graph."""
    check_values(query, target, options)
    return compute(query, target, options, wanted)


class _InfoNCE(torch.autograd.Function):
    """(loss, sums of the statistics or an empty tensor); inputs that gradients are wanted of come first, in the order of `names`."""

    @staticmethod
    def forward(ctx, names, query, target, options, *inputs):
        computed = value_and_grad(query.detach(), target.detach(), options, frozenset(names))
        ctx.set_materialize_grads(False)
        ctx.dtypes = [x.dtype for x in inputs]
        ctx.save_for_backward(*(getattr(computed, f"d_{name}") for name in names))
        sums = computed.loss.new_empty(0) if computed.stat_sums is None else computed.stat_sums
        ctx.mark_non_differentiable(sums)
        return computed.loss, sums

    @staticmethod
    def backward(ctx, cotangent, _):
        if cotangent is None:
            return (None,) * (4 + len(ctx.dtypes))
        refuse_second_derivative("info_nce")
        return (None,) * 4 + tuple(scaled(ctx.saved_tensors, cotangent, ctx.dtypes))


def info_nce(query, target, options: InfoNCEOptions, wanted: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, sums of the statistics). wanted: the tensors that gradients are wanted of, by name."""
    changes = {name: x.detach() for name, x in wanted.items() if name in ("hard_negatives", "temperature")}
    detached = options.replace(**changes) if changes else options
    return _InfoNCE.apply(tuple(wanted), query.detach(), target.detach(), detached, *wanted.values())
