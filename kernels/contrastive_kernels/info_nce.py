"""InfoNCE over matrices of embeddings: `info_nce`, `info_nce_value_and_grad`, `InfoNCELoss`.

    loss_i = log(sum over candidates c of exp(logit_ic)) - s_i,p(i)        s = q . t / temperature, in nats

The similarity matrix is never built whole: saved state is O(N + M) numbers and the gradients, scratch is bounded by
`workspace_mib`. All options are fields of `InfoNCEOptions`.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from contrastive_kernels.checks import check_inputs
from contrastive_kernels.compute import compute
from contrastive_kernels.options import TEMPERATURE_RANGE, InfoNCEOptions
from contrastive_kernels.stats import InfoNCEStats


@dataclasses.dataclass(frozen=True)
class InfoNCEResult:
    """Loss and gradients of `info_nce_value_and_grad`; gradients that were not asked for are None."""

    loss: torch.Tensor
    d_query: torch.Tensor | None
    d_target: torch.Tensor | None
    d_hard_negatives: torch.Tensor | None
    d_temperature: torch.Tensor | None
    stats: InfoNCEStats | None


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, target, hard, temperature, options):
        options = options.replace(hard_negatives=hard, temperature=options.temperature if temperature is None else temperature)
        names = ("query", "target", "hard_negatives", "temperature")
        wanted = frozenset(n for n, need in zip(names, ctx.needs_input_grad) if need)
        ctx.options, ctx.wanted = options, wanted
        none = options.reduction == "none"
        out = compute(query, target, options, frozenset() if none else wanted)
        if none:
            ctx.save_for_backward(query, target)
        else:
            ctx.save_for_backward(out.d_query, out.d_target, out.d_hard_negatives, out.d_temperature)
        ctx.dtypes = [None if x is None else x.dtype for x in (query, target, hard, temperature)]
        ctx.mark_non_differentiable(*(() if out.stat_sums is None else (out.stat_sums,)))
        return out.loss, out.stat_sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        if ctx.options.reduction == "none":
            weight = grad if ctx.options.weight is None else grad * ctx.options.weight
            options = ctx.options.replace(reduction="sum", weight=weight, return_stats=False)
            out = compute(*ctx.saved_tensors, options, ctx.wanted)
            grads = [out.d_query, out.d_target, out.d_hard_negatives, out.d_temperature]
        else:
            grads = [None if g is None else g * grad for g in ctx.saved_tensors]
        return *(None if g is None else g.to(d) for g, d in zip(grads, ctx.dtypes)), None


def info_nce(query: torch.Tensor, target: torch.Tensor, **options):
    """InfoNCE of query (N, D) against target (M, D), differentiable.

    Args:
        query, target: embeddings, same dtype and device, L2-normalised by the caller or by `normalize=True`.
        **options: the fields of `InfoNCEOptions`.

    Returns:
        The loss, float32 (float64 for float64 input): 0-d, or (N,) with reduction="none". With return_stats=True,
        the pair (loss, InfoNCEStats).

    Raises:
        ValueError: shapes, dtypes or options that do not fit. TypeError: an option that does not exist.

    Numerics: logits and sums in float32 (float64 for float64); gradients are formed with the value in one sweep,
    backward only scales them; reduction="none" recomputes them in backward. A second derivative raises.
    """
    made = InfoNCEOptions.make(options)
    check_inputs(query, target, made)
    temperature = made.temperature if isinstance(made.temperature, torch.Tensor) else None
    loss, sums = _InfoNCE.apply(query, target, made.hard_negatives, temperature, made)
    return (loss, InfoNCEStats.unpack(sums)) if made.return_stats else loss


def info_nce_value_and_grad(query, target, *, grad_dtype: torch.dtype | None = None, wrt=None, **options) -> InfoNCEResult:
    """Loss and gradients in one sweep, without autograd.

    Args:
        query, target, **options: as for `info_nce`; reduction "none" has no single gradient and raises.
        grad_dtype: dtype of the gradients; default that of each tensor. float32 keeps what bfloat16 would round away.
        wrt: names of the gradients wanted, of "query", "target", "hard_negatives", "temperature"; default all that
            exist (temperature: when it is a tensor).

    Returns:
        `InfoNCEResult`; gradients are of the loss with respect to the tensors as passed, before `normalize`.
    """
    made = InfoNCEOptions.make(options)
    if made.reduction == "none":
        raise ValueError("reduction: value_and_grad expects 'mean' or 'sum', got 'none'; use info_nce and autograd")
    check_inputs(query, target, made)
    existing = ["query", "target"]
    existing += ["hard_negatives"] if made.hard_negatives is not None else []
    existing += ["temperature"] if isinstance(made.temperature, torch.Tensor) else []
    for name in wrt or ():
        if name not in existing:
            raise ValueError(f"wrt: expected names of {existing}, got {name!r}")
    out = compute(query.detach(), target.detach(), made, frozenset(existing if wrt is None else wrt))

    def cast(gradient, like):
        return None if gradient is None else gradient.to(grad_dtype or like.dtype)

    return InfoNCEResult(
        loss=out.loss,
        d_query=cast(out.d_query, query),
        d_target=cast(out.d_target, target),
        d_hard_negatives=cast(out.d_hard_negatives, made.hard_negatives),
        d_temperature=cast(out.d_temperature, made.temperature),
        stats=InfoNCEStats.unpack(out.stat_sums) if made.return_stats else None,
    )


class InfoNCELoss(torch.nn.Module):
    """`info_nce` with its options held.

    Args:
        temperature: start value, or the constant.
        learnable_temperature: keep log(temperature) as a parameter, clamped to [0.001, 10] where it is used.
        **options: the fields of `InfoNCEOptions`; those that are tensors of a batch go to `forward` instead.
    """

    def __init__(self, *, temperature: float = 0.02, learnable_temperature: bool = False, **options):
        super().__init__()
        InfoNCEOptions.make({"temperature": temperature, **options})
        self.options = options
        if learnable_temperature:
            self.log_temperature = torch.nn.Parameter(torch.tensor(math.log(temperature)))
        else:
            self.fixed_temperature = temperature

    @property
    def temperature(self):
        """The temperature in use: a float, or a 0-d tensor that carries the gradient when it is learnt."""
        if hasattr(self, "log_temperature"):
            return self.log_temperature.exp().clamp(*TEMPERATURE_RANGE)
        return self.fixed_temperature

    def forward(self, query, target, **batch):
        """Loss of one batch; `batch` holds further options, which win over those held."""
        return info_nce(query, target, **{"temperature": self.temperature, **self.options, **batch})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
