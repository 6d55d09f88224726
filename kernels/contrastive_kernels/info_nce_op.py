"""`contrastive_kernels::info_nce`, the operator that torch.compile and fake tensors see.

One call makes the loss and the gradients that are wanted; backward only scales them. reduction="none" has a gradient for every
cotangent, so its backward computes once more. Options travel as the operator's arguments, in the order of FIELDS. Plain tensors
outside of any tracer go around the dispatcher (core/autograd/direct.py).
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from .checks import check_values
from .core.autograd.namespace import NAMESPACE
from .core.autograd.scaled import refuse_second_derivative, scaled
from .core.compute import compute
from .core.operands import compute_dtype
from .options import TABLE, InfoNCEOptions
from .stats import STAT_SUMS

GRADIENTS = ("query", "target", "hard_negatives", "temperature")
_SCHEMAS = {field.name: field.metadata["schema"] for field in TABLE if field.metadata["schema"] is not None}
TENSORS = tuple(name for name, schema in _SCHEMAS.items() if schema == "Tensor?")
SCALARS = {name: schema for name, schema in _SCHEMAS.items() if schema != "Tensor?"}
FIELDS = ("query", "target", "temperature", "temperature_value", *TENSORS, *SCALARS, "group", "wanted")
SCHEMA = (
    "(Tensor query, Tensor target, Tensor? temperature, float temperature_value, "
    + ", ".join(f"Tensor? {name}" for name in TENSORS)
    + ", "
    + ", ".join(f"{kind} {name}" for name, kind in SCALARS.items())
    + ", str? group, str wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def pack(query, target, options: InfoNCEOptions, wanted: frozenset[str]) -> list:
    """The operator's arguments."""
    temperature, value = options.temperature, 0.0
    if not isinstance(temperature, torch.Tensor):
        temperature, value = None, float(temperature)
    tensors = [getattr(options, name) for name in TENSORS]
    scalars = [_plain(getattr(options, name), kind) for name, kind in SCALARS.items()]
    group = None if options.group is None else options.group.group_name
    flags = "".join(str(i) for i, name in enumerate(GRADIENTS) if name in wanted)
    return [query, target, temperature, value, *tensors, *scalars, group, flags]


def _plain(value, kind: str):
    """What the schema takes: an int where a float is meant, or a tuple for a list, are both common."""
    if value is None:
        return None
    if kind.startswith("float["):
        return [float(x) for x in value]
    if kind.startswith("int["):
        return [int(x) for x in value]
    return float(value) if kind.startswith("float") else value


def _unpack(values) -> tuple[torch.Tensor, torch.Tensor, InfoNCEOptions, frozenset[str]]:
    given = dict(zip(FIELDS, values))
    query, target, flags, group = (given.pop(name) for name in ("query", "target", "wanted", "group"))
    value = given.pop("temperature_value")
    given["temperature"] = value if given["temperature"] is None else given["temperature"]
    for name, schema in SCALARS.items():
        if "[]" in schema and given[name] is not None:
            given[name] = tuple(given[name])
    given["group"] = None if group is None else dist.distributed_c10d._resolve_process_group(group)
    return query, target, InfoNCEOptions(**given), frozenset(GRADIENTS[int(i)] for i in flags)


def _info_nce(*values):
    query, target, options, wanted = _unpack(values)
    check_values(query, target, options)
    out = compute(query.detach(), target.detach(), detached(options), frozenset() if options.reduction == "none" else wanted)
    results = (out.loss, out.stat_sums, out.d_query, out.d_target, out.d_hard_negatives, out.d_temperature)
    return tuple(out.loss.new_empty(0) if x is None else x for x in results)


def detached(options: InfoNCEOptions) -> InfoNCEOptions:
    """The options, tensors that may carry a gradient taken out of their graphs."""
    changes = {
        name: getattr(options, name).detach()
        for name in ("hard_negatives", "temperature")
        if isinstance(getattr(options, name), torch.Tensor)
    }
    return options.replace(**changes)


info_nce_op = torch.library.custom_op(f"{NAMESPACE}::info_nce", _info_nce, mutates_args=(), schema=SCHEMA)


@info_nce_op.register_fake
def _(*values):
    query, target, options, wanted = _unpack(values)
    none = options.reduction == "none"
    dtype = compute_dtype(query, target)
    likes = (query, target, options.hard_negatives, options.temperature)
    gradients = [query.new_empty(0 if none or name not in wanted else like.shape, dtype=dtype) for name, like in zip(GRADIENTS, likes)]
    loss = query.new_empty(query.shape[0] if none else (), dtype=dtype)
    return loss, query.new_empty(STAT_SUMS if options.return_stats else 0, dtype=dtype), *gradients


def _cotangent(*values):
    """Gradients of sum(cotangent * loss) for reduction "none", whose weights already hold the cotangent."""
    query, target, options, wanted = _unpack(values)
    out = compute(query.detach(), target.detach(), detached(options), wanted)
    results = (out.d_query, out.d_target, out.d_hard_negatives, out.d_temperature)
    return tuple(out.loss.new_empty(0) if x is None else x for x in results)


_cotangent_op = torch.library.custom_op(
    f"{NAMESPACE}::info_nce_cotangent", _cotangent, mutates_args=(), schema=SCHEMA.replace("Tensor, Tensor, Tensor)", "Tensor)")
)


@_cotangent_op.register_fake
def _(*values):
    query, target, options, wanted = _unpack(values)
    likes = (query, target, options.hard_negatives, options.temperature)
    dtype = compute_dtype(query, target)
    return tuple(query.new_empty(like.shape if name in wanted else 0, dtype=dtype) for name, like in zip(GRADIENTS, likes))


def _save(ctx, inputs, output):
    given = dict(zip(FIELDS, inputs))
    ctx.none = given["reduction"] == "none"
    ctx.dtypes = [None if given[name] is None else given[name].dtype for name in GRADIENTS]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    if ctx.none:
        ctx.others = [None if isinstance(value, torch.Tensor) else value for value in inputs]
        ctx.places = [i for i, value in enumerate(inputs) if isinstance(value, torch.Tensor)]
        ctx.save_for_backward(*(inputs[i] for i in ctx.places))
    else:
        ctx.wanted = given["wanted"]
        ctx.save_for_backward(*output[2:])


def _differentiate(ctx, grad, *_):
    out = [None] * len(FIELDS)
    if grad is None:
        return tuple(out)
    refuse_second_derivative("info_nce")
    if ctx.none:
        values = list(ctx.others)
        for place, tensor in zip(ctx.places, ctx.saved_tensors):
            values[place] = tensor
        given = dict(zip(FIELDS, values))
        weight = grad if given["weight"] is None else grad * given["weight"]
        given.update(reduction="sum", weight=weight, return_stats=False)
        results, wanted = _cotangent_op(*given.values()), given["wanted"]
    else:
        results, wanted = scaled(ctx.saved_tensors, grad, ctx.dtypes), ctx.wanted
    for i in map(int, wanted):
        out[FIELDS.index(GRADIENTS[i])] = results[i].to(ctx.dtypes[i])
    return tuple(out)


info_nce_op.register_autograd(_differentiate, setup_context=_save)
