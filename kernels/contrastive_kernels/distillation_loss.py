"""`distillation_loss`: its operator, and the public function. The computation stands in core/distillation.py."""

from __future__ import annotations

import torch
import torch.distributed as dist

from .checks import (
    check_finite_weight,
    check_matrices,
    check_temperature_rows,
    check_temperature_values,
    check_vector,
    check_weight,
    may_look,
)
from .core import distillation
from .core.autograd.namespace import NAMESPACE
from .core.autograd.scaled import refuse_second_derivative, scaled
from .core.backends import choose
from .core.operands import compute_dtype, product_dtype
from .core.option_checks import check_group, check_switches, check_temperature, check_workspace, one_of
from .options import BACKENDS, REDUCTIONS, one_number

GRADIENTS = ("query", "target", "temperature")
INPUTS = ("query", "target", "teacher_query", "teacher_target", "temperature", "weight", "query_mask", "target_mask")
SETTINGS = {
    "temperature_value": "float",
    "teacher_temperature": "float",
    "symmetric": "bool",
    "normalize": "bool",
    "reduction": "str",
    "group": "str?",
    "workspace_mib": "float?",
    "backend": "str",
    "wanted": "str",
}
FIELDS = (*INPUTS, *SETTINGS)
SCHEMA = (
    "(Tensor query, Tensor target, Tensor teacher_query, Tensor teacher_target, Tensor? temperature, Tensor? weight, "
    + "Tensor? query_mask, Tensor? target_mask, "
    + ", ".join(f"{kind} {name}" for name, kind in SETTINGS.items())
    + ") -> (Tensor, Tensor, Tensor, Tensor)"
)


def _check_values(values) -> None:
    """What only the numbers tell."""
    given = dict(zip(FIELDS, values))
    if may_look(given["query"], False):
        check_finite_weight(given["weight"])
        if given["temperature"] is not None:
            check_temperature_values(given["temperature"])


def _compute(values, wanted: frozenset[str]) -> tuple[torch.Tensor, ...]:
    given = dict(zip(FIELDS, values))
    tensors = [None if given[name] is None else given[name].detach() for name in INPUTS]
    query, target, teacher_query, teacher_target, temperature, weight, query_mask, target_mask = tensors
    group = None if given["group"] is None else dist.distributed_c10d._resolve_process_group(given["group"])
    backend = choose(given["backend"], product_dtype(*tensors[:4]), query.device)
    out = distillation.compute(
        query,
        target,
        teacher_query,
        teacher_target,
        given["temperature_value"] if temperature is None else temperature,
        given["teacher_temperature"],
        weight,
        query_mask,
        target_mask,
        symmetric=given["symmetric"],
        normalize=given["normalize"],
        reduction=given["reduction"],
        group=group,
        workspace_mib=given["workspace_mib"],
        backend=backend,
        wanted=wanted,
    )
    shapes = [None if x is None else x.shape for x in (query, target, temperature)]
    found = (out.d_query, out.d_target, out.d_temperature)
    return out.loss, *(out.loss.new_empty(0) if x is None else x.reshape(shape) for x, shape in zip(found, shapes))


def _wanted(values) -> frozenset[str]:
    return frozenset(GRADIENTS[int(i)] for i in values[-1])


def _fake_gradients(values, wanted: frozenset[str]) -> list[torch.Tensor]:
    given = dict(zip(FIELDS, values))
    dtype = compute_dtype(*values[:4])
    return [values[0].new_empty(given[name].shape if name in wanted else 0, dtype=dtype) for name in GRADIENTS]


def _forward(*values):
    _check_values(values)
    none = values[FIELDS.index("reduction")] == "none"
    return _compute(values, frozenset() if none else _wanted(values))


_op = torch.library.custom_op(f"{NAMESPACE}::distillation_loss", _forward, mutates_args=(), schema=SCHEMA)


@_op.register_fake
def _(*values):
    none = values[FIELDS.index("reduction")] == "none"
    gradients = _fake_gradients(values, frozenset() if none else _wanted(values))
    return values[0].new_empty(values[0].shape[0] if none else (), dtype=compute_dtype(*values[:4])), *gradients


def _cotangent(*values):
    """Gradients of the sum of weight * loss, for reduction "none", whose weights already hold the cotangent."""
    return _compute(values, _wanted(values))[1:]


_cotangent_op = torch.library.custom_op(
    f"{NAMESPACE}::distillation_loss_cotangent",
    _cotangent,
    mutates_args=(),
    schema=SCHEMA.replace("Tensor, Tensor, Tensor)", "Tensor, Tensor)"),
)


@_cotangent_op.register_fake
def _(*values):
    return tuple(_fake_gradients(values, _wanted(values)))


def _save(ctx, inputs, output):
    given = dict(zip(FIELDS, inputs))
    ctx.none = given["reduction"] == "none"
    ctx.dtypes = [None if given[name] is None else given[name].dtype for name in GRADIENTS]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.others = [None if isinstance(value, torch.Tensor) else value for value in inputs]
    ctx.places = [i for i, value in enumerate(inputs) if isinstance(value, torch.Tensor)]
    ctx.save_for_backward(*([inputs[i] for i in ctx.places] if ctx.none else output[1:]))


def _differentiate(ctx, grad, *_):
    out = [None] * len(FIELDS)
    if grad is None:
        return tuple(out)
    refuse_second_derivative("distillation_loss")
    if ctx.none:
        values = list(ctx.others)
        for place, tensor in zip(ctx.places, ctx.saved_tensors):
            values[place] = tensor
        given = dict(zip(FIELDS, values))
        given.update(reduction="sum", weight=grad if given["weight"] is None else grad * given["weight"])
        gradients = _cotangent_op(*given.values())
    else:
        gradients = scaled(ctx.saved_tensors, grad, ctx.dtypes)
    for i in map(int, ctx.others[-1]):
        out[FIELDS.index(GRADIENTS[i])] = gradients[i].to(ctx.dtypes[i])
    return tuple(out)


_op.register_autograd(_differentiate, setup_context=_save)


def distillation_loss(
    query,
    target,
    teacher_query,
    teacher_target,
    *,
    temperature=0.02,
    teacher_temperature: float = 0.02,
    symmetric: bool = False,
    normalize: bool = False,
    weight=None,
    query_mask=None,
    target_mask=None,
    reduction: str = "mean",
    group=None,
    workspace_mib: float | None = None,
    backend: str = "auto",
):
    """Divergence of the student's in-batch softmax from a frozen teacher's: KL(teacher || student) of every query over all targets.

    With S = query target^T / temperature and S' = teacher_query teacher_target^T / teacher_temperature,

        loss_i = sum_j P_ij (log P_ij - log Q_ij),   P_i = softmax(S'_i),  Q_i = softmax(S_i)

    of which neither matrix is ever held whole.

    Args:
        query: (N, D). target: (M, D). The student's, which get gradients.
        teacher_query: (N, D'). teacher_target: (M, D'). The teacher's vectors of the same inputs, of any width; constants.
        temperature: divides the student's cosines: a number, or a tensor above 0, 0-d, (1,) or (N,), which gets its gradient; in
            `symmetric` target i's is query i's.
        teacher_temperature: divides the teacher's; a number above 0.
        symmetric: mean with the same loss of every target over all queries.
        normalize: L2-normalise all four first; gradients are those of the tensors as passed.
        weight: (N,) of queries, constant; with `symmetric`, where it needs M = N, also of their targets.
        query_mask, target_mask: (N,), (M,) bool; False rows are neither rows nor columns, of either model, and may hold anything, NaN
            included. With M = N, or a multiple of it, a query whose own target is masked is left out too.
        reduction: "mean" (weighted), "sum" or "none" ((N,); with `symmetric` M = N, mean of query i's and target i's).
        group: a process group over which the batch is sharded, equal shards; the loss is global, and gradients are world_size times
            the global loss's, so that DDP's mean leaves those of the whole batch.
        workspace_mib: bound on scratch memory in MiB; default 256, on CUDA a tenth of the card's memory if that is more.
        backend: "auto" (the kernels on CUDA, torch elsewhere), "torch" or "triton".

    Returns:
        0-d loss, or (N,) with reduction="none", in float32 (float64 for float64 input).

    Raises:
        ValueError: shapes, dtypes or options that do not fit.

    Numerics: logits in float32 (float64), four products of N M, eight with `symmetric`. A second derivative raises.
    Source: WeMM-Embedding's second stage (Zhou et al. 2026) distils so in both directions; the computation is this repository's.

    Example:
        >>> import torch
        >>> student, teacher = torch.eye(4, requires_grad=True), torch.eye(4)
        >>> loss = distillation_loss(student, torch.eye(4), teacher, teacher, temperature=1.0, teacher_temperature=0.5)
        >>> loss.backward()
        >>> round(loss.item(), 4)
        0.1142
    """
    check_matrices(query, target)
    _check_teacher(query, target, teacher_query, teacher_target)
    check_weight(weight, query.shape[0], query.device)
    check_vector("query_mask", query_mask, query.shape[0], torch.bool, query.device)
    check_vector("target_mask", target_mask, target.shape[0], torch.bool, query.device)
    for name, value, allowed in (("reduction", reduction, REDUCTIONS), ("backend", backend, BACKENDS)):
        one_of(name, value, allowed)
    check_switches(symmetric=symmetric, normalize=normalize)
    check_workspace(workspace_mib)
    check_group(group, reduction)
    check_temperature(temperature)
    temperature = one_number(temperature)
    check_temperature_rows(temperature, query.shape[0], query.device)
    _check_teacher_temperature(teacher_temperature)
    by_row = isinstance(temperature, torch.Tensor) and temperature.dim() == 1
    if symmetric and query.shape[0] != target.shape[0] and (weight is not None or by_row or reduction == "none"):
        raise ValueError(
            "symmetric: expected as many targets as queries where weight, a temperature a query or reduction='none' pairs them, got "
            f"{target.shape[0]} targets and {query.shape[0]} queries; leave weight out and take one temperature and 'mean' or 'sum'"
        )
    held = temperature if isinstance(temperature, torch.Tensor) else None
    wanted = ""
    if torch.is_grad_enabled():
        wanted = "".join(str(i) for i, x in enumerate((query, target, held)) if x is not None and x.requires_grad)
    return _op(
        query,
        target,
        teacher_query.detach(),
        teacher_target.detach(),
        held,
        weight,
        query_mask,
        target_mask,
        0.0 if held is not None else float(temperature),
        float(teacher_temperature),
        symmetric,
        normalize,
        reduction,
        None if group is None else group.group_name,
        None if workspace_mib is None else float(workspace_mib),
        backend,
        wanted,
    )[0]


def _check_teacher(query, target, teacher_query, teacher_target) -> None:
    check_matrices(teacher_query, teacher_target, names=("teacher_query", "teacher_target"))
    for name, own, its in (("query", query, teacher_query), ("target", target, teacher_target)):
        if own.shape[0] != its.shape[0]:
            raise ValueError(
                f"teacher_{name}: expected {own.shape[0]} rows, one for each row of {name}, got {its.shape[0]}; encode the same inputs"
            )
        if own.device != its.device:
            raise ValueError(f"teacher_{name}: expected it on {own.device}, where {name} is, got {its.device}; move it there")


def _check_teacher_temperature(value) -> None:
    if isinstance(value, torch.Tensor):
        raise ValueError(
            f"teacher_temperature: expected a number, got a tensor of shape {tuple(value.shape)}; the teacher is constant: call float()"
        )
    check_temperature(value, "teacher_temperature")
