"""`sigmoid_loss`: its operator, and the public function. The computation stands in core/sigmoid.py."""

from __future__ import annotations

import torch
import torch.distributed as dist

from .checks import (
    check_above_zero,
    check_default_positives,
    check_finite_weight,
    check_index,
    check_matrices,
    check_vector,
    check_weight,
    may_look,
)
from .core import sigmoid
from .core.autograd.namespace import NAMESPACE
from .core.autograd.scaled import refuse_second_derivative, scaled
from .core.distributed import check_equal_shards
from .core.operands import compute_dtype
from .core.option_checks import check_exchange, check_group, check_ignore_index, check_switches, is_finite, one_of
from .options import EXCHANGES, REDUCTIONS

TENSORS = ("query", "target", "scale", "bias", "positives", "query_ids", "target_ids", "query_mask", "target_mask", "weight")
SCHEMA = (
    "(Tensor query, Tensor target, Tensor scale, Tensor bias, "
    + ", ".join(f"Tensor? {name}" for name in TENSORS[4:])
    + ", bool normalize, int ignore_index, str reduction, str? group, str exchange, bool validate, str wanted)"
    + " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)


SCALE_MEND = "SigLIP starts at 10, the exponential of its parameter"


def _settings(normalize, ignore_index, reduction, group, exchange, validate):
    process_group = None if group is None else dist.distributed_c10d._resolve_process_group(group)
    return normalize, ignore_index, reduction, process_group, exchange


def _check_values(query, target, scale, bias, positives, weight, ignore_index: int) -> None:
    """What only the numbers tell."""
    check_index("positives", positives, len(target), ignore_index)
    check_above_zero("scale", scale, SCALE_MEND)
    if not bool(bias.isfinite()):
        raise ValueError(f"bias: expected a finite number, got {float(bias)}; SigLIP starts at -10")
    check_finite_weight(weight)


def _sigmoid(*values):
    tensors, (*settings, wanted) = values[: len(TENSORS)], values[len(TENSORS) :]
    gradients, validate, none = _settings(*settings), settings[-1], settings[2] == "none"
    if may_look(tensors[0], validate):
        _check_values(*tensors[:5], tensors[-1], settings[1])
    if gradients[3] is not None:
        check_equal_shards(*tensors[:2], validate, gradients[3])
    loss, gradients = sigmoid.compute(*tensors, gradients, () if none else tuple(map(int, wanted)))
    return loss, *(loss.new_empty(0) if g is None else g for g in gradients)


_op = torch.library.custom_op(f"{NAMESPACE}::sigmoid_loss", _sigmoid, mutates_args=(), schema=SCHEMA)


@_op.register_fake
def _(*values):
    tensors, (*settings, wanted) = values[: len(TENSORS)], values[len(TENSORS) :]
    none, dtype = settings[2] == "none", compute_dtype(*tensors[:2])
    shapes = [x.shape if str(i) in wanted and not none else 0 for i, x in enumerate(tensors[:4])]
    return tensors[0].new_empty(tensors[0].shape[0] if none else (), dtype=dtype), *(tensors[0].new_empty(s, dtype=dtype) for s in shapes)


def _cotangent(*values):
    """Gradients of the sum of weight * loss, for reduction "none", whose weights already hold the cotangent."""
    tensors, (*settings, wanted) = values[: len(TENSORS)], values[len(TENSORS) :]
    loss, gradients = sigmoid.compute(*tensors, _settings(*settings), tuple(map(int, wanted)))
    return tuple(loss.new_empty(0) if g is None else g for g in gradients)


_cotangent_op = torch.library.custom_op(
    f"{NAMESPACE}::sigmoid_loss_cotangent", _cotangent, mutates_args=(), schema=SCHEMA.replace("Tensor, Tensor, Tensor)", "Tensor, Tensor)")
)


@_cotangent_op.register_fake
def _(*values):
    tensors, wanted = values[: len(TENSORS)], values[-1]
    dtype = compute_dtype(*tensors[:2])
    return tuple(tensors[0].new_empty(x.shape if str(i) in wanted else 0, dtype=dtype) for i, x in enumerate(tensors[:4]))


def _save(ctx, inputs, output):
    ctx.none, ctx.rest = inputs[len(TENSORS) + 2] == "none", inputs[len(TENSORS) :]
    ctx.dtypes = [x.dtype for x in inputs[:4]]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.given = [x is not None for x in inputs[: len(TENSORS)]]
    ctx.save_for_backward(*([x for x in inputs[: len(TENSORS)] if x is not None] if ctx.none else output[1:]))


def _differentiate(ctx, grad, *_):
    out = [None] * (len(TENSORS) + len(ctx.rest))
    if grad is None:
        return tuple(out)
    refuse_second_derivative("sigmoid_loss")
    if ctx.none:
        saved = iter(ctx.saved_tensors)
        tensors = [next(saved) if there else None for there in ctx.given]
        tensors[-1] = grad if tensors[-1] is None else grad * tensors[-1]
        normalize, ignore_index, _, group, exchange, validate, wanted = ctx.rest
        gradients = _cotangent_op(*tensors, normalize, ignore_index, "sum", group, exchange, validate, wanted)
    else:
        gradients, wanted = scaled(ctx.saved_tensors, grad, ctx.dtypes), ctx.rest[-1]
    for i in map(int, wanted):
        out[i] = gradients[i].to(ctx.dtypes[i])
    return tuple(out)


_op.register_autograd(_differentiate, setup_context=_save)


def _number(name: str, value, like: torch.Tensor, mend: str) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: expected a number or a tensor of one element, got shape {tuple(value.shape)}; {mend}")
        if not value.dtype.is_floating_point:
            raise ValueError(f"{name}: expected a floating-point tensor, got {value.dtype}; call .float()")
        return value.reshape(())
    if not is_finite(value):
        raise ValueError(f"{name}: expected a finite number or a tensor of one element, got {value!r}; {mend}")
    return torch.tensor(float(value), dtype=compute_dtype(like), device="cpu" if like.device.type == "cpu" else like.device)


def sigmoid_loss(
    query,
    target,
    *,
    scale,
    bias,
    normalize: bool = False,
    positives=None,
    query_ids=None,
    target_ids=None,
    ignore_index: int = -100,
    query_mask=None,
    target_mask=None,
    weight=None,
    reduction: str = "mean",
    group=None,
    exchange: str = "gather",
    validate: bool = False,
):
    """Sum over targets, mean over queries, of -log sigmoid(z (scale q.t + bias)): SigLIP.

    Args:
        query: (N, D). target: (M, D), same dtype and device, L2-normalised by the caller or by `normalize=True`.
        scale, bias: numbers, or tensors of one element, which get their gradients (SigLIP starts at 10 and -10, scale as exp of
            its parameter).
        positives: (N,) int64 index of each query's target, default `i * (M / N)`; `ignore_index` leaves a row out.
        query_ids, target_ids: (N,), (M,) int64. With both, a pair belongs together where they are equal, and there may be any
            number of them a row; -1 belongs to nothing. With target_ids alone, every target that bears the positive's id does.
        query_mask, target_mask: (N,), (M,) bool; False rows are neither rows nor columns and may hold anything.
        weight: (N,) of rows. reduction: "mean" (weighted), "sum" or "none".
        group, exchange: a process group over which the batch is sharded, equal shards, `positives` indexing the rank's own
            targets; "gather" or "ring". The loss is global; gradients are world_size times the global loss's, so that DDP's mean
            leaves those of the whole batch.
        validate: run the checks that would wait for a GPU: ranges of positives, numbers held in tensors, equal shards.

    Returns:
        0-d loss, or (N,) with reduction="none", in float32 (float64 for float64 input).

    Raises:
        ValueError: shapes, dtypes or options that do not fit.

    Numerics: logits in float32 (float64); gradients are formed with the value in one sweep. A second derivative raises.

    Example:
        >>> import torch
        >>> query, target = torch.eye(4, requires_grad=True), torch.eye(4)
        >>> loss = sigmoid_loss(query, target, scale=10.0, bias=-5.0)
        >>> loss.backward()
        >>> round(loss.item(), 4)  # log(1 + exp(-5)) of the pair and of each of the three others
        0.0269
    """
    check_matrices(query, target)
    n, m = query.shape[0], target.shape[0]
    for name, value, rows in (("positives", positives, n), ("query_ids", query_ids, n), ("target_ids", target_ids, m)):
        check_vector(name, value, rows, torch.int64, query.device)
    for name, value, rows in (("query_mask", query_mask, n), ("target_mask", target_mask, m)):
        check_vector(name, value, rows, torch.bool, query.device)
    check_weight(weight, n, query.device)
    if query_ids is not None and target_ids is None:
        raise ValueError("query_ids: expected target_ids beside them, got none; a pair belongs together where both are equal: pass both")
    if query_ids is not None and positives is not None:
        raise ValueError("query_ids and positives: expected one of them, got both, and ids tell all pairs already; leave positives out")
    if query_ids is None and positives is None:
        check_default_positives(n, m)
    for name, value, allowed in (("reduction", reduction, REDUCTIONS), ("exchange", exchange, EXCHANGES)):
        one_of(name, value, allowed)
    check_switches(normalize=normalize, validate=validate)
    check_ignore_index(ignore_index)
    check_group(group, reduction)
    check_exchange(exchange, group)
    if not isinstance(scale, torch.Tensor) and is_finite(scale) and not scale > 0:
        raise ValueError(f"scale: expected a number above 0, got {scale!r}; {SCALE_MEND}")
    scale, bias = _number("scale", scale, query, SCALE_MEND), _number("bias", bias, query, "SigLIP starts at -10")
    wanted = ""
    if torch.is_grad_enabled():
        wanted = "".join(str(i) for i, x in enumerate((query, target, scale, bias)) if x.requires_grad)
    name = None if group is None else group.group_name
    tensors = query, target, scale, bias, positives, query_ids, target_ids, query_mask, target_mask, weight
    return _op(*tensors, normalize, ignore_index, reduction, name, exchange, validate, wanted)[0]
