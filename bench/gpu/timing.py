"""Rows of the tables of times: the parts loss, sizes and peers."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from bench.gpu.check import Check, Machine
from bench.gpu.clock import percentiles
from bench.gpu.report import LIMIT
from bench.peers import on_gpu
from contrastive_kernels import dispatch, roofline
from contrastive_kernels.triton import configs

TEMPERATURE = 0.02
PLAIN = {"plain": True}  # to `dispatch.plan`: no option, so that small losses may go to torch's own operations
# Inputs, factors and exponentials are each rounded to bfloat16 once, 2^-9 at most, where the truth starts from rounded inputs; the
# loss sees none of that: float32 logits of 1 / temperature = 50, 2^-23 of them, over a loss of about 10.
MOST_LOSS_ERROR, MOST_GRADIENT_ERROR = 2**-19, 2**-8


@dataclass(frozen=True)
class Peer:
    """One row. kind: of its truth (`on_gpu.truth`), "" where there is nothing to compare. predict: arguments of `dispatch.plan`."""

    name: str
    make: object
    kind: str = ""
    ours: bool = True
    predict: dict | None = None
    largest: int = 1 << 62  # N above which it is left out
    holds_memory: bool = False  # what it needs is taken when it is made, so that a call takes none


def dispatch_plan(n: int, m: int, d: int, gpu: roofline.Gpu, **options) -> dispatch.Plan:
    """What the cost model says of a call with all the scratch it wants."""
    return dispatch.plan(n, m, d, torch.bfloat16, workspace=8 << 30, gpu=gpu, **options)


@functools.lru_cache(maxsize=1)
def operands(device: str, n: int, m: int, d: int):
    """(query, target): unit rows in bfloat16, the same on every device."""
    generator = torch.Generator().manual_seed(0)
    if n * d > 1 << 24:  # drawing on the CPU takes seconds
        generator = torch.Generator(device).manual_seed(0)
    return tuple(
        torch.nn.functional.normalize(torch.randn(rows, d, generator=generator, device=generator.device), dim=-1).bfloat16().to(device)
        for rows in (n, m)
    )


@functools.lru_cache(maxsize=1)
def expected(device: str, n: int, m: int, d: int, kind: str):
    return on_gpu.truth(*operands(device, n, m, d), TEMPERATURE, kind)


def checks(machine: Machine, peers: list[Peer], n: int, m: int, d: int, repeats: int, needs: float = 5.0):
    """A check for each contestant at one shape."""
    for one in peers:
        if n <= one.largest:
            run = functools.partial(measured, machine, one, n, m, d, repeats)
            yield Check(f"{n} x {m} x {d} {one.name}", run, ours=one.ours, seconds=90, needs=needs)


def measured(machine: Machine, one: Peer, n: int, m: int, d: int, repeats: int) -> dict:
    """One row: milliseconds, memory, errors against float64 where there is room for it."""
    clock, shape = machine.clock, (machine.device, n, m, d)
    query, target = operands(*shape)
    row = {"name": one.name, "dtype": "bfloat16", "n": n, "m": m, "d": d, "temperature": TEMPERATURE}
    truth = expected(*shape, one.kind) if one.kind not in ("", "search") and clock.room_for_truth(n, m) else None
    clock.forget()
    run = one.make(query, target, TEMPERATURE)
    if machine.dry:  # one interpreted call is long enough
        result, times = clock.timed(run)
    else:
        run()  # compiles
        result, peak = clock.peak_mib(run)
        row["peak_mib"] = "" if one.holds_memory else peak
        times = percentiles(clock, run, repeats)
    wrong = []
    if truth is not None:
        bounds = (MOST_LOSS_ERROR, MOST_GRADIENT_ERROR, MOST_GRADIENT_ERROR)
        for field, got, right, most in zip(("loss_error", "d_query_error", "d_target_error"), result, truth, bounds, strict=True):
            error = on_gpu.relative(got, right)
            row[field] = f"{error:.2e}"
            if one.ours and not error <= most:
                wrong.append(f"{field} {error:.2e}, at most {most:.2e} is expected")
    row |= times
    row["tflops"] = float(f"{(2 if one.kind == 'search' else 6) * n * m * d / row['ms_p50'] / 1e9:.4g}")
    gpu = configs.gpu(query.device)
    row["share_of_limit"] = float(f"{row['tflops'] * 1e12 / gpu.peak:.3g}")
    if one.predict is not None:
        row["predicted_ms"] = round(dispatch_plan(n, m, d, gpu, **one.predict).chosen.seconds * 1e3, 3)
    return row | ({"wrong": wrong} if wrong else {})


def ours(machine: Machine) -> list[Peer]:
    """What parts loss and sizes time: the limit, ours in its forms, and what needs no package."""
    plain, both = on_gpu.ours(backend="triton"), {"symmetric": True, "normalize": True}
    table = [
        Peer(LIMIT, on_gpu.three_gemms),
        Peer("three products, float32 out", on_gpu.three_gemms_float32),
        Peer("ours", plain, "one", predict=PLAIN),
        Peer("ours, CUDA graph", on_gpu.graphed(plain), "one", largest=16_384, holds_memory=True),
        Peer("ours, through autograd", on_gpu.ours_autograd, "one", predict=PLAIN),
        Peer("ours, normalize", on_gpu.ours(backend="triton", normalize=True), predict={"normalize": True}),
        Peer("ours, symmetric", on_gpu.ours(backend="triton", symmetric=True), "both"),
        Peer("ours, symmetric, normalize", on_gpu.ours(backend="triton", **both), predict=both),
        Peer("eager", on_gpu.eager, "one", ours=False, largest=32_768),
        Peer("torch.compile", on_gpu.compiled, "one", ours=False, largest=32_768),
    ]
    if machine.device != "cuda":  # no graphs, and inductor would need a C++ compiler for a minute
        table = [one for one in table if one.name not in ("ours, CUDA graph", "torch.compile")]
    return table
