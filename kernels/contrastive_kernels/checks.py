"""Checks of the tensors that a loss is given: ValueError with what was expected, what came, and the mend.

Shapes, dtypes and devices are looked at always, before anything is computed. Values (ranges of indices, NaN, a temperature in a
tensor) are looked at inside the operator, where torch.compile does not trace: on a CPU always, on CUDA with validate=True, since
looking waits for the device.
"""

from __future__ import annotations

import torch

from .core.option_checks import check_temperature
from .options import VECTORS, InfoNCEOptions

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def waits_for_device(tensor: torch.Tensor) -> bool:
    """Whether looking at a number of this tensor makes the host wait."""
    return tensor.is_cuda


def may_look(tensor: torch.Tensor, validate: bool) -> bool:
    """Whether numbers are looked at: wherever that is free, and where the caller pays for it."""
    return validate or not waits_for_device(tensor)


def check_tensor(name: str, value, shape: str, *sizes: int) -> None:
    """shape: words with a {} for each of `sizes`, put in for a message alone: a tracer would make a constant of every size in a string."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(
            f"{name}: expected a tensor of shape {shape.format(*sizes)}, got {type(value).__name__}; call torch.tensor or torch.stack"
        )


def check_matrices(query: torch.Tensor, target: torch.Tensor, empty: bool = False, names: tuple[str, str] = ("query", "target")) -> None:
    """Two (rows, D) of one width, dtype (but for autocast) and device; without rows only where `empty`."""
    for name, matrix in zip(names, (query, target)):
        check_tensor(name, matrix, "(rows, D)")
        if matrix.dim() != 2:
            raise ValueError(f"{name}: expected 2 dimensions (rows, D), got shape {tuple(matrix.shape)}; pool or flatten it first")
        if matrix.dtype not in FLOATS:
            raise ValueError(f"{name}: expected a floating-point tensor of 16 bits or more, got {matrix.dtype}; call .float()")
        if matrix.layout != torch.strided:
            raise ValueError(f"{name}: expected a dense tensor, got {matrix.layout}; call .to_dense()")
        if matrix.numel() == 0 and not empty:
            raise ValueError(f"{name}: expected at least one row and column, got shape {tuple(matrix.shape)}; skip empty batches")
    first, second = names
    if query.shape[1] != target.shape[1]:
        raise ValueError(
            f"expected the same width, got {first} D={query.shape[1]} and {second} D={target.shape[1]}; use one model for both"
        )
    if query.device != target.device:
        raise ValueError(f"expected one device, got {first} on {query.device} and {second} on {target.device}; move one of them")
    if query.dtype != target.dtype and not torch.is_autocast_enabled(query.device.type):
        raise ValueError(f"expected one dtype, got {first} {query.dtype} and {second} {target.dtype}; cast one of them")


def check_vector(name: str, value, rows: int, dtype: torch.dtype | None, device: torch.device) -> None:
    """(rows,) of `dtype` on `device`, or None; `dtype` None asks for numbers of any kind."""
    if value is None:
        return
    check_tensor(name, value, "({},)", rows)
    if value.dim() != 1 or value.shape[0] != rows:
        raise ValueError(f"{name}: expected shape ({rows},), got {tuple(value.shape)}; pass one entry a row")
    if dtype is not None and value.dtype != dtype:
        mend = ".bool()" if dtype == torch.bool else ".long()"
        nan = ", which can hold NaN" if value.dtype.is_floating_point else ""
        raise ValueError(f"{name}: expected {dtype}, got {value.dtype}{nan}; call {mend}")
    if dtype is None and (value.dtype == torch.bool or value.dtype.is_complex):
        raise ValueError(f"{name}: expected numbers, got {value.dtype}; call .float()")
    if value.device != device:
        raise ValueError(f"{name}: expected it on {device}, got {value.device}; move it there")


def check_weight(value, rows: int, device: torch.device) -> None:
    """(rows,) numbers, constant: no gradient is made for them."""
    check_vector("weight", value, rows, None, device)
    if value is not None and value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "weight: expected a tensor without gradient, got requires_grad=True; call .detach(), or weigh reduction='none' by it"
        )


def check_inputs(query, target, options: InfoNCEOptions) -> None:
    """Everything that shapes, dtypes and devices tell."""
    check_matrices(query, target)
    n, m, device, o = query.shape[0], target.shape[0], query.device, options
    for name, side, dtype in VECTORS:
        check_vector(name, getattr(o, name), {"N": n, "M": m}[side], dtype, device)
    check_weight(o.weight, n, device)
    check_temperature_rows(o.temperature, n, device)
    if o.positives is None:
        check_default_positives(n, m)
    if o.matryoshka_dims is not None:
        for dim in o.matryoshka_dims:
            if not 1 <= dim <= query.shape[1]:
                raise ValueError(f"matryoshka_dims: expected widths from 1 to D={query.shape[1]}, got {dim}; leave it out")
    if o.hard_negatives is not None:
        _check_hard(query, o)


def _check_hard(query: torch.Tensor, o: InfoNCEOptions) -> None:
    hard, (n, d) = o.hard_negatives, query.shape
    check_tensor("hard_negatives", hard, "({}, K, {}) or (H, {})", n, d, d)
    if o.hard_offsets is None:
        if hard.dim() != 3 or hard.shape[0] != n or hard.shape[2] != d:
            raise ValueError(
                f"hard_negatives: expected (N, K, D) = ({n}, K, {d}), got {tuple(hard.shape)}; packed (H, D) needs hard_offsets"
            )
        if hard.shape[1] == 0:
            raise ValueError(f"hard_negatives: expected K of at least 1, got shape {tuple(hard.shape)}; pass None where there are none")
    else:
        if hard.dim() != 2 or hard.shape[1] != d:
            raise ValueError(f"hard_negatives: expected packed (H, D) = (H, {d}) with hard_offsets, got {tuple(hard.shape)}; flatten them")
        check_vector("hard_offsets", o.hard_offsets, n + 1, torch.int64, query.device)
    if hard.dtype != query.dtype and not torch.is_autocast_enabled(query.device.type):
        raise ValueError(f"hard_negatives: expected the queries' dtype {query.dtype}, got {hard.dtype}; cast them")
    if hard.device != query.device:
        raise ValueError(f"hard_negatives: expected them on {query.device}, got {hard.device}; move them there")
    if o.hard_ids is not None:
        shape = hard.shape[:-1]
        check_tensor("hard_ids", o.hard_ids, f"({', '.join('{}' for _ in shape)})", *shape)
        if o.hard_ids.shape != shape:
            raise ValueError(
                f"hard_ids: expected shape {tuple(shape)}, got {tuple(o.hard_ids.shape)}; pass one id a hard negative, -1 for none"
            )
        check_vector("hard_ids", o.hard_ids.reshape(-1), o.hard_ids.numel(), torch.int64, query.device)


def check_values(query, target, options: InfoNCEOptions) -> None:
    """What only the numbers tell. On CUDA nothing, unless validate=True."""
    o = options
    if not may_look(query, o.validate):
        return
    check_index("positives", o.positives, len(target), o.ignore_index)
    if isinstance(o.temperature, torch.Tensor):
        check_temperature_values(o.temperature)
    check_finite_weight(o.weight)
    if o.hard_offsets is not None:
        steps, last = o.hard_offsets.diff(), int(o.hard_offsets[-1])
        if int(o.hard_offsets[0]) != 0 or last != len(o.hard_negatives) or bool((steps < 0).any()):
            raise ValueError(
                f"hard_offsets: expected offsets that rise from 0 to H={len(o.hard_negatives)}, got {int(o.hard_offsets[0])} to {last}"
                f"{' with steps below 0' if bool((steps < 0).any()) else ''}; pass cumulative counts, 0 first"
            )


def check_temperature_rows(temperature, rows: int, device: torch.device) -> None:
    """One for all rows, or (rows,) on their device."""
    if not isinstance(temperature, torch.Tensor) or temperature.dim() == 0:
        return
    if temperature.shape[0] != rows:
        raise ValueError(
            f"temperature: expected one number, or {rows} of them, one a query, got shape {tuple(temperature.shape)}; index it by row"
        )
    if temperature.device != device:
        raise ValueError(f"temperature: expected one a query on {device}, got {temperature.device}; move it there")


def check_temperature_values(temperature: torch.Tensor) -> None:
    """Every one above 0 and finite; waits for the device."""
    for value in torch.stack(temperature.detach().aminmax()).tolist():
        check_temperature(value)


def check_above_zero(name: str, value: torch.Tensor, mend: str) -> None:
    if not 0 < float(value) < float("inf"):
        raise ValueError(f"{name}: expected a number above 0, got {float(value)}; {mend}")


def check_finite_weight(weight) -> None:
    if weight is not None and weight.dtype.is_floating_point and not bool(weight.isfinite().all()):
        raise ValueError("weight: expected finite numbers, got NaN or infinity; mask such rows with ignore_index")


def check_default_positives(n: int, m: int) -> None:
    """Without `positives` row i belongs to target i * (M / N): a number of targets that is no multiple of N was laid out otherwise."""
    if n > m:
        raise ValueError(f"positives: expected at least as many targets as queries, got N={n} and M={m}; pass positives")
    if n and m % n:
        raise ValueError(
            f"positives: expected M targets to be a multiple of the N queries, each positive followed by its own negatives, got N={n} and "
            f"M={m}; pass positives=torch.arange({n}) where the first {n} targets are the positives"
        )


def check_index(name: str, value, rows: int, ignore_index: int) -> None:
    """Every entry of `value` is `ignore_index` or a row; waits for the device."""
    if value is None:
        return
    wrong = (value != ignore_index) & ((value < 0) | (value >= rows))
    if bool(wrong.any()):
        place = int(wrong.nonzero()[0])
        raise ValueError(
            f"{name}: expected indices from 0 to {rows - 1} or ignore_index={ignore_index}, got {int(value[place])} at {place}; "
            f"use {ignore_index} for rows without one"
        )
