"""Every kernel in every configuration that the launchers can choose, as launches on tensors of realistic strides.

A tile is chosen by architecture, element size and richness of the epilogue; flags that only add comparisons are compiled alone
once and all together once, since together is where registers run out. float16 has bfloat16's code but for its gains.
"""

from __future__ import annotations

import itertools
import types
from unittest import mock

import torch

from bench.aot.launch_capture import CapturedLaunch, captured_launches
from contrastive_kernels.triton import launch_log

R, C, D = 512, 1024, 1536  # multiples of every block; ODD is none
ODD_R, ODD_C, ODD_D = 500, 1003, 1544


def matrix(rows, width, dtype):
    return torch.zeros(rows, width, dtype=dtype)


def _exp_panel(dtype):
    from contrastive_kernels.triton.kernels.exp_panel import exp_panel

    def run(rows=R, columns=C, width=D, **options):
        exp_panel(matrix(rows, width, dtype), matrix(columns, width, dtype), scale=50.0, shift=torch.zeros(rows), **options)

    positive, ids = torch.zeros(R, dtype=torch.int64), (torch.zeros(R, dtype=torch.int64), torch.zeros(C, dtype=torch.int64))
    threshold, keep = torch.zeros(R), torch.ones(C, dtype=torch.bool)
    scales = dict(row_scale=torch.ones(R), col_scale=torch.ones(C))
    if dtype != torch.bfloat16:
        return  # dispatch.py takes float32 logits for the other types
    yield "plain", lambda: run(positive=positive)
    yield "stats", lambda: run(positive=positive, row_max=True)
    yield "sums alone", lambda: run(positive=positive, row_max=True, store=False)
    again = dict(positive=positive, redo=torch.ones(64, dtype=torch.int32))
    yield "redo", lambda: run(**again)
    yield "redo, normalize", lambda: run(**again, **scales)
    yield "redo, all", lambda: run(**again, ids=(ids, ids), threshold=threshold, keep=keep, **scales)
    yield "redo, all, sums alone", lambda: run(**again, ids=(ids, ids), threshold=threshold, keep=keep, store=False, **scales)
    yield "odd", lambda: run(ODD_R, ODD_C, ODD_D, positive=positive, row_max=True)
    yield "symmetric", lambda: run(positive=positive, row_max=True, col_sum=True)
    yield "joint", lambda: run(positive=positive, col_sum=True)
    yield "joint, sums alone", lambda: run(positive=positive, ids=(ids,), row_max=True, col_sum=True, store=False, **scales)
    yield "joint, all", lambda: run(positive=positive, ids=(ids,), row_max=True, col_sum=True, **scales)
    yield "normalize", lambda: run(positive=positive, row_max=True, **scales)
    for name, masks in (("ids", dict(ids=(ids,))), ("threshold", dict(threshold=threshold)), ("keep", dict(keep=keep))):
        yield name, lambda masks=masks: run(positive=positive, row_max=True, **masks)
    everything = dict(positive=positive, ids=(ids, ids), threshold=threshold, keep=keep, row_max=True, col_sum=True)
    yield "all", lambda: run(**everything, **scales)
    yield "all, odd", lambda: run(ODD_R, ODD_C, ODD_D, **everything, **scales)
    prefixes = dict(
        positive=positive,
        levels=torch.tensor([256, 512, D], dtype=torch.int32),
        row_max=True,
        **{k: v.repeat(3, 1) for k, v in scales.items()},
    )
    masks = dict(ids=(ids, ids), threshold=threshold.repeat(3, 1), keep=keep)
    yield "prefixes", lambda: run(**prefixes)
    yield "prefixes, sums alone", lambda: run(**prefixes, store=False)
    yield "prefixes, ids", lambda: run(**prefixes, ids=(ids,))
    yield "prefixes, all", lambda: run(**prefixes, **masks)
    yield "prefixes, all, sums alone", lambda: run(**prefixes, **masks, store=False)
    yield (
        "prefixes, all, odd",
        lambda: run(
            ODD_R,
            ODD_C,
            D,
            **prefixes | dict(positive=positive[:ODD_R], row_scale=torch.ones(3, ODD_R), col_scale=torch.ones(3, ODD_C)),
            **masks,
        ),
    )


# what an epilogue of `exp_panel` may hold besides the positive, as options of the launch
def _epilogues(rows=R, columns=C) -> dict[str, dict]:
    ids = (torch.zeros(rows, dtype=torch.int64), torch.zeros(columns, dtype=torch.int64))
    return {
        "normalize": dict(row_scale=torch.ones(rows), col_scale=torch.ones(columns)),
        "ids": dict(ids=(ids,)),
        "threshold": dict(threshold=torch.zeros(rows)),
        "keep": dict(keep=torch.ones(columns, dtype=torch.bool)),
    }


def _combinations(dtype):
    """Every set of features that `configs.exp_panel_is_masked` tells apart, masks alone and all together."""
    from contrastive_kernels.triton.kernels.exp_panel import exp_panel

    if dtype != torch.bfloat16:
        return
    positive = torch.zeros(R, dtype=torch.int64)

    def run(columns=C, **options):
        exp_panel(matrix(R, D, dtype), matrix(columns, D, dtype), scale=50.0, shift=torch.zeros(R), positive=positive, **options)

    for odd in (False, True):
        columns = 1000 if odd else C  # rows of E 16 bytes apart, so that a whole number of columns is not what is looked at
        parts = _epilogues(R, columns)
        masks = parts["ids"] | parts["threshold"] | parts["keep"]
        sets = {"": {}, "ids": parts["ids"], "masks": masks | dict(ids=parts["ids"]["ids"] * 2)}
        for (name, mask), norms, row_max, col_sum in itertools.product(sets.items(), (False, True), (False, True), (False, True)):
            if odd and (name == "ids" or row_max):
                continue  # one tile for all of them; "all, odd" above has the maximum too
            words = [
                word for word, on in ((name, name), ("normalize", norms), ("maximum", row_max), ("columns", col_sum), ("odd", odd)) if on
            ]
            options = mask | (parts["normalize"] if norms else {}) | dict(row_max=row_max, col_sum=col_sum)
            yield ", ".join(words) or "nothing", lambda columns=columns, options=options: run(columns, **options)


def _warp_specialised(dtype):
    from contrastive_kernels.triton import configs
    from contrastive_kernels.triton.kernels import warp_specialised
    from contrastive_kernels.triton.kernels.exp_panel import exp_panel

    arch = configs.architecture(None)
    if dtype != torch.bfloat16 or warp_specialised.obstacle(arch, dtype, plain=True, columns=C):
        return
    positive, norms = torch.zeros(R, dtype=torch.int64), _epilogues()["normalize"]

    def run(columns=C, **options):
        exp_panel(
            matrix(R, D, dtype),
            matrix(columns, D, dtype),
            scale=50.0,
            shift=torch.zeros(R),
            positive=positive,
            panel="warp_specialised",
            **options,
        )

    yield "plain", lambda: run()
    yield "normalize", lambda: run(**norms)
    yield "sums alone", lambda: run(store=False)
    yield "normalize, sums alone", lambda: run(store=False, **norms)
    yield "odd", lambda: run(1000)
    yield "normalize, odd", lambda: run(1000, row_scale=norms["row_scale"], col_scale=torch.ones(1000))


def _pool(dtype):
    from contrastive_kernels.triton.kernels import pool

    hidden, index = matrix(R, D, dtype), torch.zeros(R, dtype=torch.int64)
    yield "forward", lambda: pool.pool_forward(hidden, index)
    yield "backward", lambda: pool.pool_backward(matrix(R, D, dtype), hidden, index, torch.ones(R))
    yield "forward, rows as they are", lambda: pool.pool_forward(hidden, index, normalize=False)
    yield "backward, rows as they are", lambda: pool.pool_backward(matrix(R, D, dtype), hidden, index, torch.ones(R), normalize=False)
    if dtype == torch.bfloat16:
        for kind in (torch.int64, torch.bool):
            yield f"last token, {str(kind)[6:]} mask", lambda kind=kind: pool.last_token_index(torch.ones(16, 4096, dtype=kind))


def _sigmoid(dtype):
    from contrastive_kernels.triton.kernels.sigmoid_panel import sigmoid_panel

    if dtype == torch.float32:
        return  # backends.py takes the library's products
    x, y, out, number = matrix(R, D, dtype), matrix(C, D, dtype), torch.zeros(R, C, dtype=dtype), torch.tensor(1.0)
    plain = dict(scale=number, bias=number, positive=torch.zeros(R, dtype=torch.int64))
    ids = torch.zeros(R, dtype=torch.int64), torch.zeros(C, dtype=torch.int64)
    gain = 2.0**15 if dtype == torch.float16 else 1.0
    yield "plain", lambda: sigmoid_panel(x, y, out=out, gain=gain, **plain)
    yield (
        "all",
        lambda: sigmoid_panel(
            x,
            y,
            out=out,
            gain=gain,
            ids=ids,
            keep=torch.ones(C, dtype=torch.bool),
            row_scale=torch.ones(R),
            col_scale=torch.ones(C),
            **plain,
        ),
    )
    yield "loss alone", lambda: sigmoid_panel(x, y, **plain)


def _joint(dtype):
    from contrastive_kernels.triton.symmetric import combine

    yield "combine", lambda: combine(torch.zeros(R, C, dtype=dtype), torch.zeros(R), torch.zeros(C))


def _rows(dtype):
    from contrastive_kernels.core.operands import Operand
    from contrastive_kernels.triton.kernels import norms, rows

    out, narrow, factor, index = torch.zeros(R, D), matrix(R, D, dtype), torch.zeros(R), torch.zeros(R, dtype=torch.int64)
    segments, regular = rows.Segments.make(index, R), rows.Segments(R, step=2)
    both = dict(x=out, a=factor, y=narrow, b=factor)
    operand = Operand(narrow, torch.float32, factor, torch.ones(R, dtype=torch.bool))
    yield "update, store", lambda: rows.update(out, index=index, add=False, **both)
    yield "update, normalize", lambda: rows.update(out, index=index, y_scale=factor, z=narrow, z_scale=factor, eps=1e-12, add=False, **both)
    yield "dots", lambda: norms.dots(narrow, narrow, index, torch.float32)
    yield "dots, normalize", lambda: norms.dots(narrow, narrow, index, torch.float32, factor, factor)
    yield "scatter, add", lambda: rows.scatter(out, segments, y=narrow, b=factor, add=True)
    yield "scatter, default positives", lambda: rows.scatter(out, regular, y=narrow, b=factor, y_scale=factor, add=False)
    yield "scaled", lambda: norms.scaled(narrow, factor)
    yield "scaled, normalize", lambda: norms.scaled(narrow, factor, factor)
    yield "inverse norms", lambda: norms.inverse_norms(narrow, torch.float32, 1e-12)
    yield "project out", lambda: norms.project_out(out, Operand(narrow, torch.float32, factor), 1e-12)
    if dtype == torch.bfloat16:
        yield "inverse norms, masked", lambda: norms.inverse_norms(narrow, torch.float32, 1e-12, operand.keep)
        yield "project out, masked", lambda: norms.project_out(out, operand, 1e-12)
        yield "update, add, dot", lambda: rows.update(out, index=index, z=narrow, dot=True, add=True, **both)
        yield "update, dot alone", lambda: rows.update(None, x=out, a=factor, z=narrow, dot=True, add=False)
        yield "update, positives alone", lambda: rows.update(out, y=narrow, b=factor, index=index, add=True)
        yield "update, no factor", lambda: rows.update(out, x=out, y=narrow, b=factor, index=index, add=False)
        yield "scatter, both, store", lambda: rows.scatter(out, segments, add=False, **both)
        yield "scatter, targets alone, add", lambda: rows.scatter(out, segments, x=out, a=factor, add=True)


def _row_state(dtype):
    """The small kernels between the products; float32 whatever the inputs are."""
    if dtype != torch.bfloat16:
        return
    from contrastive_kernels.triton.kernels import row_state

    parts = torch.zeros(8, R)
    vector, number, marks = torch.zeros(R), torch.tensor(50.0), torch.zeros(R // 128, dtype=torch.int32)
    direction = types.SimpleNamespace(active=None, positive=vector, weight=vector)
    masked = types.SimpleNamespace(active=torch.ones(R, dtype=torch.bool), positive=vector, weight=vector)

    plain = row_state.Parts(parts, vector)

    def finish(direction, smoothing=0.0, temperature=number, parts=plain, **options):
        state = row_state.RowState.unfilled(R, torch.float32, None, smoothing)
        row_state.finish(state, slice(0, R), parts, direction, temperature, **{"prior": False, **options})

    smooth = row_state.Parts(parts[:1], vector, parts[:1], logits=vector, count=vector)
    again = row_state.Parts(parts, vector, parts, vector, marks, parts, block_r=128)
    yield "mark", lambda: row_state.mark(parts, vector, number, 128)
    yield "mark, by sums", lambda: row_state.mark_by_sums(parts, vector, 128)
    yield "mark, within", lambda: row_state.mark(parts, vector, number, 128, marks)
    yield "finish, bounded", lambda: finish(direction)
    yield "finish", lambda: finish(direction, parts=again)
    yield "finish, all", lambda: finish(masked, parts=again, prior=True)
    yield "finish, own shift", lambda: finish(direction, own_shift=True, gain=1024.0)
    yield "finish, smoothing", lambda: finish(masked, smoothing=0.1, parts=smooth, prior=True, own_shift=True)
    yield "finish, sums alone", lambda: finish(direction, temperature=None, prior=True)
    yield "finish, no panel", lambda: finish(direction, parts=None, prior=True, own_shift=True)


def _dense(dtype):
    from contrastive_kernels.triton.dense import slopes

    if dtype != torch.float16:
        cos = torch.zeros(R, C)
        yield "slopes", lambda: slopes(cos, torch.tensor(50.0), torch.zeros(R, dtype=torch.int64), torch.zeros(R), dtype)


def _chunk(dtype):
    from contrastive_kernels.triton.kernels.chunk_panel import chunk_reduce, chunk_write

    cos, out = torch.zeros(R, C), torch.zeros(R, C, dtype=dtype)
    ids = (torch.zeros(R, dtype=torch.int64), torch.zeros(C, dtype=torch.int64))
    plain = dict(scale=50.0, positive=torch.zeros(R, dtype=torch.int64))
    full = plain | dict(
        ids=(ids, ids), threshold=torch.zeros(R), keep=torch.ones(C, dtype=torch.bool), row_scale=torch.ones(R), col_scale=torch.ones(C)
    )
    yield "write", lambda: chunk_write(cos, shift=torch.zeros(R), out=out, **plain)
    if dtype == torch.bfloat16:
        yield "write, all", lambda: chunk_write(cos, shift=torch.zeros(R), out=out, gain=1024.0, smooth=torch.zeros(R), **full)
        yield "reduce", lambda: chunk_reduce(cos, **plain)
        yield "reduce, smoothing", lambda: chunk_reduce(cos, smoothing=True, **plain)
        yield "reduce, all", lambda: chunk_reduce(cos, smoothing=True, **full)


def _distil(dtype):
    from contrastive_kernels.triton.kernels.distil_panel import Cosines, distil_reduce, distil_write

    student, teacher, out, row = torch.zeros(R, C), torch.zeros(R, C), torch.zeros(R, C, dtype=dtype), torch.zeros(R)
    positive, norms = torch.zeros(R, dtype=torch.int64), (torch.ones(R), torch.ones(C))
    plain = dict(student=Cosines.of(student, 50.0), teacher=Cosines.of(teacher, 50.0), positive=positive)
    scaled = dict(student=Cosines.of(student, 50.0, *norms), teacher=Cosines.of(teacher, 50.0, *norms), positive=positive)
    masked = scaled | dict(keep=torch.ones(C, dtype=torch.bool))
    for name, models in (("", plain), (", norms", scaled), (", norms, masks", masked)):
        slopes = models | dict(best=(row, row), factors=(row, row), out=out, gain=2.0**15 if dtype == torch.float16 else 1.0)
        yield f"write{name}", lambda slopes=slopes: distil_write(student, teacher, **slopes)
        if dtype == torch.bfloat16:
            yield f"reduce{name}", lambda models=models: distil_reduce(student, teacher, **models)


def _topk(dtype):
    from contrastive_kernels.triton.kernels.topk import topk

    query, target, exclude = matrix(R, 256, dtype), matrix(C, 256, dtype), torch.zeros(R, 16, dtype=torch.int64)
    for kept in (2, 4, 8, 16, 32, 64, 128):
        if dtype == torch.float16 and kept not in (16, 128):
            continue  # bfloat16's code
        yield f"k {kept}", lambda kept=kept: topk(query, target, kept)
        if dtype != torch.float16 and kept in (2, 16, 32, 64, 128):
            yield f"k {kept}, exclude", lambda kept=kept: topk(query, target, kept, exclude=exclude)
    if dtype != torch.float32:  # whose queries never stay
        far, away = matrix(R, D, dtype), matrix(C, D, dtype)
        for kept in (16, 128) if dtype == torch.float16 else (16, 32, 128):
            yield f"k {kept}, wide", lambda kept=kept: topk(far, away, kept)
            if dtype == torch.bfloat16:
                yield f"k {kept}, wide, exclude", lambda kept=kept: topk(far, away, kept, exclude=exclude)


def _fused(dtype):
    from contrastive_kernels.triton.kernels.fused import fused_backward, fused_forward

    if dtype == torch.float32:
        return  # takes the library's product
    masks = dict(scale=50.0, positive=torch.zeros(R, dtype=torch.int64), splits=2)
    ids = (torch.zeros(R, dtype=torch.int64), torch.zeros(C, dtype=torch.int64))
    full = masks | dict(
        ids=(ids, ids), threshold=torch.zeros(R), keep=torch.ones(C, dtype=torch.bool), row_scale=torch.ones(R), col_scale=torch.ones(C)
    )
    if dtype == torch.float16:
        del full["row_scale"], full["col_scale"]  # which it refuses
    for width in (32, 64, 128):
        x, y, row = matrix(R, width, dtype), matrix(C, width, dtype), torch.zeros(R)
        for name, options in (("", masks), (", all", full)):
            if dtype == torch.float16 and width < 128:
                continue  # bfloat16's code
            yield f"forward D={width}{name}", lambda x=x, y=y, o=options: fused_forward(x, y, **o)
            yield f"backward D={width}{name}", lambda x=x, y=y, row=row, o=options: fused_backward(x, y, shift=row, factor=row, **o)
    yield "sums alone", lambda: fused_forward(x, y, weighted=False, **masks)
    if dtype == torch.float16:
        return
    yield "sums alone, all", lambda: fused_forward(x, y, weighted=False, **full)
    yield (
        "backward, odd",
        lambda: fused_backward(
            matrix(ODD_R, 128, dtype),
            matrix(ODD_C, 128, dtype),
            scale=50.0,
            positive=torch.zeros(ODD_R, dtype=torch.int64),
            splits=2,
            shift=torch.zeros(ODD_R),
            factor=torch.zeros(ODD_R),
        ),
    )
    yield (
        "forward, odd",
        lambda: fused_forward(
            matrix(ODD_R, 128, dtype), matrix(ODD_C, 128, dtype), scale=50.0, positive=torch.zeros(ODD_R, dtype=torch.int64), splits=2
        ),
    )


FAMILIES = {
    "exp panel": _exp_panel,
    "epilogue": _combinations,
    "warp-specialised": _warp_specialised,
    "sigmoid": _sigmoid,
    "symmetric": _joint,
    "pool": _pool,
    "rows": _rows,
    "row state": _row_state,
    "dense": _dense,
    "chunk": _chunk,
    "distil": _distil,
    "topk": _topk,
    "fused": _fused,
}


def _families():
    for name, cases in FAMILIES.items():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            yield name, dtype, cases(dtype)


def _hashable(argument):
    """An argument with its tensors replaced by their types, for comparing launches."""
    if isinstance(argument, tuple):
        return tuple(map(_hashable, argument))
    return str(argument.dtype) if isinstance(argument, torch.Tensor) else argument


def launches(arch: int) -> list[tuple[str, CapturedLaunch, bool]]:
    """(case, launch, whether it multiplies 2-byte elements) for one architecture, equal ones once."""
    out, seen = [], set()
    with mock.patch("contrastive_kernels.triton.configs.architecture", lambda device: arch):
        for family, dtype, cases in _families():
            for case, make in cases:
                with captured_launches() as captured, launch_log.record() as noted:
                    make()
                for launch, note in zip(captured, noted) if len(captured) == len(noted) else ():
                    launch.flops, launch.bytes, launch.tiles = note.flops, note.bytes, note.grid
                for launch in captured:
                    key = (launch.function.fn.__name__, *((name, _hashable(value)) for name, value in launch.arguments.items()))
                    if key in seen:
                        continue
                    seen.add(key)
                    has_dot = dtype.itemsize == 2 and "PRECISION" in launch.arguments
                    out.append((f"{family}, {case}, {str(dtype)[6:]}", launch, has_dot))
    return out
