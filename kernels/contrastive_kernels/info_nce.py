"""InfoNCE over matrices of embeddings: `info_nce`, `info_nce_value_and_grad`, `InfoNCELoss`.

    loss_i = log(sum over candidates c of exp(logit_ic)) - s_i,p(i)        s = q . t / temperature, in nats

The similarity matrix is never built whole: saved state is O(N + M) numbers and the gradients, scratch is bounded by
`workspace_mib`. All options are fields of `InfoNCEOptions`.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from .checks import check_inputs
from .core.autograd import direct
from .core.option_checks import check_switches
from .info_nce_op import GRADIENTS, detached, info_nce_op, pack
from .options import TEMPERATURE_RANGE, InfoNCEOptions, shows_options
from .stats import InfoNCEStats


@dataclasses.dataclass(frozen=True)
class InfoNCEResult:
    """Loss and gradients of `info_nce_value_and_grad`; gradients that were not asked for are None.

    Example:
        >>> import torch
        >>> result = info_nce_value_and_grad(torch.eye(4), torch.eye(4), wrt=["query"])
        >>> result.d_query.shape, result.d_target
        (torch.Size([4, 4]), None)
    """

    loss: torch.Tensor
    d_query: torch.Tensor | None
    d_target: torch.Tensor | None
    d_hard_negatives: torch.Tensor | None
    d_temperature: torch.Tensor | None
    stats: InfoNCEStats | None


@shows_options
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

    Example:
        >>> import torch
        >>> query, target = torch.eye(4, requires_grad=True), torch.eye(4)  # four pairs, every other pair orthogonal
        >>> loss = info_nce(query, target, temperature=1.0)
        >>> loss.backward()
        >>> round(loss.item(), 4), query.grad.shape
        (0.7437, torch.Size([4, 4]))
        >>> ids = torch.tensor([7, 7, 8, 9])  # targets 0 and 1 show the same thing: no negatives of each other
        >>> round(info_nce(query, target, temperature=1.0, target_ids=ids).item(), 4)
        0.6476
    """
    parsed = InfoNCEOptions.make(options)
    check_inputs(query, target, parsed)
    tensors = {"query": query, "target": target, "hard_negatives": parsed.hard_negatives, "temperature": parsed.temperature}
    wanted = (
        frozenset(name for name, x in tensors.items() if isinstance(x, torch.Tensor) and x.requires_grad)
        if torch.is_grad_enabled()
        else frozenset()
    )
    if direct.possible(query, target, parsed):
        loss, sums = direct.info_nce(query, target, parsed, {name: tensors[name] for name in GRADIENTS if name in wanted})
    else:
        loss, sums, *_ = info_nce_op(*pack(query, target, parsed, wanted))
    return (loss, InfoNCEStats.unpack(sums)) if parsed.return_stats else loss


@shows_options
def info_nce_value_and_grad(query, target, *, grad_dtype: torch.dtype | None = None, wrt=None, **options) -> InfoNCEResult:
    """Loss and gradients in one sweep, without autograd.

    Args:
        query, target, **options: as for `info_nce`; reduction "none" has no single gradient and raises.
        grad_dtype: dtype of the gradients; default that of each tensor. float32 keeps what bfloat16 would round away.
        wrt: names of the gradients wanted, of "query", "target", "hard_negatives", "temperature"; default all that
            exist (temperature: when it is a tensor).

    Returns:
        `InfoNCEResult`; gradients are of the loss with respect to the tensors as passed, before `normalize`.

    Raises:
        ValueError: as `info_nce`, and for reduction "none" or a name in `wrt` that has no tensor.

    Example:
        >>> import torch
        >>> result = info_nce_value_and_grad(torch.eye(4).bfloat16(), torch.eye(4).bfloat16(), grad_dtype=torch.float32)
        >>> result.d_query.dtype, result.d_hard_negatives
        (torch.float32, None)
    """
    parsed = InfoNCEOptions.make(options)
    if parsed.reduction == "none":
        raise ValueError("reduction: expected 'mean' or 'sum' for value_and_grad, got 'none'; use info_nce and autograd")
    if grad_dtype is not None and not (isinstance(grad_dtype, torch.dtype) and grad_dtype.is_floating_point):
        raise ValueError(f"grad_dtype: expected a floating-point torch.dtype, got {grad_dtype!r}; torch.float32 keeps the most")
    check_inputs(query, target, parsed)
    existing = ["query", "target"]
    existing += ["hard_negatives"] if parsed.hard_negatives is not None else []
    existing += ["temperature"] if isinstance(parsed.temperature, torch.Tensor) else []
    for name in wrt or ():
        if name not in existing:
            raise ValueError(f"wrt: expected names of {existing}, got {name!r}; leave wrt out for all of them")
    wanted = frozenset(existing if wrt is None else wrt)
    with torch.no_grad():
        if direct.possible(query, target, parsed):
            out = direct.value_and_grad(query.detach(), target.detach(), detached(parsed), wanted)
            loss, sums, gradients = out.loss, out.stat_sums, [getattr(out, f"d_{name}") for name in GRADIENTS]
        else:
            loss, sums, *gradients = info_nce_op(*pack(query.detach(), target.detach(), parsed, wanted))
    likes = {"query": query, "target": target, "hard_negatives": parsed.hard_negatives, "temperature": parsed.temperature}
    cast = {f"d_{name}": g.to(grad_dtype or likes[name].dtype) if name in wanted else None for name, g in zip(GRADIENTS, gradients)}
    if "temperature" in wanted:
        cast["d_temperature"] = cast["d_temperature"].reshape(options["temperature"].shape)
    return InfoNCEResult(loss=loss, stats=InfoNCEStats.unpack(sums) if parsed.return_stats else None, **cast)


class _Clamp(torch.autograd.Function):
    """clamp(x, least, most); at a bound or beyond it only the gradient that leads back passes.

    torch's own clamp passes none there: an optimizer's step over a bound would end the learning of x for ever.
    """

    @staticmethod
    def forward(ctx, x, least: float, most: float):
        ctx.save_for_backward(x)
        ctx.least, ctx.most = least, most
        return x.clamp(least, most)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        outward = ((x <= ctx.least) & (grad > 0)) | ((x >= ctx.most) & (grad < 0))
        return torch.where(outward, 0, grad), None, None


class LearnedNumbers(torch.nn.Module):
    """A module whose own parameters are single numbers of a loss, each of shape (1,), since a 0-d parameter cannot be sharded.

    They stay in float32 where a model is cast to 16 bits, in which the steps of log(temperature) would be lost. A state dict that
    holds them 0-d loads. `no_weight_decay()` names them, as timm's models do: decay pulls log(temperature) to 0, temperature to 1.
    """

    @staticmethod
    def number(value: float, requires_grad: bool = True) -> torch.nn.Parameter:
        """A parameter (1,) of at least float32."""
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        return torch.nn.Parameter(torch.tensor([float(value)], dtype=dtype), requires_grad=requires_grad)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that an optimizer must not decay."""
        return {name for name, _ in self.named_parameters(recurse=False)}

    def _apply(self, fn, recurse: bool = True):
        before = {name: (p.detach(), p.grad) for name, p in self.named_parameters(recurse=False)}
        for parameter in self.parameters(recurse=False):
            parameter.grad = None  # torch refuses a gradient of another dtype for the moment between
        super()._apply(fn, recurse)
        for name, parameter in self.named_parameters(recurse=False):
            value, grad = before[name]
            if parameter.dtype.itemsize < 4 <= value.dtype.itemsize:
                parameter.data = value.to(parameter.device)
            parameter.grad = None if grad is None else grad.to(parameter.device, parameter.dtype)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name, parameter in self.named_parameters(recurse=False):
            saved = state_dict.get(prefix + name)
            if isinstance(saved, torch.Tensor) and saved.shape == ():
                state_dict[prefix + name] = saved.reshape(parameter.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


class InfoNCELoss(LearnedNumbers):
    """`info_nce` with its options held.

    Args:
        temperature: start value, or the constant.
        learnable_temperature: keep log(temperature) as a parameter (1,), clamped to [0.001, 10] where it is used; beyond a bound
            only a gradient that leads back reaches it. It stays float32 under `.bfloat16()`; keep weight decay from it, which would
            pull the temperature to 1: `no_weight_decay()` names it.
        **options: the fields of `InfoNCEOptions`; those that are tensors of a batch go to `forward` instead.

    Raises:
        ValueError: options that do not fit; a learnable temperature that starts outside [0.001, 10].

    Example:
        >>> import torch
        >>> loss = InfoNCELoss(temperature=0.05, learnable_temperature=True, symmetric=True, normalize=True)
        >>> loss(torch.randn(8, 16), torch.randn(8, 16)).backward()
        >>> [name for name, parameter in loss.named_parameters() if parameter.grad is not None]
        ['log_temperature']
    """

    def __init__(self, *, temperature: float = 0.02, learnable_temperature: bool = False, **options):
        super().__init__()
        check_switches(learnable_temperature=learnable_temperature)
        InfoNCEOptions.make({"temperature": temperature, **options}, held=True)
        self.options = options
        if learnable_temperature:
            least, most = TEMPERATURE_RANGE
            if not least <= float(temperature) <= most:
                raise ValueError(
                    f"temperature: expected a start within [{least}, {most:g}] for a learnable one, got {float(temperature):g}; "
                    "start at 0.02, or hold it constant"
                )
            self.log_temperature = self.number(math.log(temperature))
        else:
            self.fixed_temperature = temperature

    @property
    def temperature(self):
        """The temperature in use: a float, or a 0-d tensor that carries the gradient when it is learnt."""
        if hasattr(self, "log_temperature"):
            return _Clamp.apply(self.log_temperature, *map(math.log, TEMPERATURE_RANGE)).exp().reshape(())
        return self.fixed_temperature

    def forward(self, query, target, **batch):
        """Loss of one batch; `batch` holds further options, which win over those held."""
        return info_nce(query, target, **{"temperature": self.temperature, **self.options, **batch})

    def extra_repr(self) -> str:
        learnt = hasattr(self, "log_temperature")
        shown = {
            "temperature": float(torch.as_tensor(self.temperature).detach()),
            **({"learnable_temperature": True} if learnt else {}),
            **self.options,
        }
        return ", ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value!r}" for name, value in shown.items())
