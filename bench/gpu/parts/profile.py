"""Where one call's time goes: its kernels by name, how many and how long, and what a Triton product reaches of the library's."""

from __future__ import annotations

import torch

from bench.gpu import losses, timing
from bench.gpu.check import Check
from bench.gpu.clock import median
from bench.gpu.parts.env import model

CALLS = {"plain": {}, "normalize": {"normalize": True}, "symmetric, normalize": {"symmetric": True, "normalize": True}}
SHARE = "Triton share of the library's rate"
TOP = 12  # kernels told by name


def checks(machine):
    for name, options in list(CALLS.items())[: 1 if machine.dry else None]:
        yield Check(f"kernels: {name}", lambda name=name, options=options: kernels(machine, name, options))
    yield Check("logits product by width", lambda: triton_share(machine))


def kernels(machine, name: str, options: dict) -> list[dict]:
    """Kernels of one call by device time; on a CPU operators by their own time."""
    from contrastive_kernels.triton import work

    n, d = (16_384, 1536) if not machine.dry else (24, 16)
    run = losses.ours(backend="triton", **options)(*timing.operands(machine.device, n, n, d), timing.TEMPERATURE)
    run()
    with work.record() as noted:
        run()
    cuda = machine.device == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CUDA] if cuda else []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, *kinds]) as profile:
        run()
        if cuda:
            torch.cuda.synchronize()
    found = []
    for event in profile.key_averages():
        milliseconds = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e3
        if milliseconds > 0 and (not cuda or event.device_type != torch.autograd.DeviceType.CPU):
            found.append((milliseconds, event.count, event.key))
    if not found:
        raise RuntimeError("the profiler saw no kernel; has it access to the device's counters?")
    found.sort(reverse=True)
    shape = {"n": n, "m": n, "d": d, "dtype": "bfloat16"}
    launched, total = sum(count for _, count, _ in found), sum(ms for ms, _, _ in found)
    rows = [
        {"name": f"kernels: {name}", "value": launched, "unit": "launches", "ms_p50": round(total, 4), **shape},
        {"name": f"kernels: {name}, by the launch log", "value": len(noted), "unit": "launches", **shape},
    ]
    for ms, count, key in found[:TOP]:
        rows.append({"name": f"kernel: {name}: {key[:90]}", "value": count, "unit": "launches", "ms_p50": round(ms, 4), **shape})
    rest = found[TOP:]
    if rest:
        some, ms = sum(count for _, count, _ in rest), sum(ms for ms, _, _ in rest)
        rows.append({"name": f"kernel: {name}: the rest", "value": some, "unit": "launches", "ms_p50": round(ms, 4), **shape})
    return rows


def triton_share(machine) -> list[dict]:
    """The exponential panel and the library's product at two widths: what an added column of the width costs is the main loop, the
    rest is the epilogue, whatever a model thinks of either."""
    from contrastive_kernels.triton.exp_panel import exp_panel

    n, widths = (16_384, (768, 3072)) if not machine.dry else (64, (16, 64))
    shift, out = torch.zeros(n, device=machine.device), torch.empty(1, n, n, dtype=torch.bfloat16, device=machine.device)
    taken = {"library": [], "triton": []}
    for d in widths:
        query, target = timing.operands(machine.device, n, n, d)
        calls = {
            "library": lambda q=query, t=target: torch.mm(q, t.T, out=out[0]),
            "triton": lambda q=query, t=target: exp_panel(q, t, scale=1 / timing.TEMPERATURE, shift=shift, out=out),
        }
        for who, call in calls.items():
            taken[who].append(median(machine.clock, call, 10))
    flops = 2 * n * n * (widths[1] - widths[0])
    shape = {"n": n, "m": n, "dtype": "bfloat16"}
    slope = {who: (ms[1] - ms[0]) / (widths[1] - widths[0]) for who, ms in taken.items()}
    rows = [
        {"name": f"logits product, {who}, D = {d}", "value": ms, "unit": "ms", **shape, "d": d}
        for who in taken for d, ms in zip(widths, taken[who], strict=True)
    ]  # fmt: skip
    if min(slope.values()) <= 0:
        return rows + [{"name": SHARE, "value": "", "note": "wider took no longer: no rate to be had", **shape}]
    epilogue = taken["triton"][0] - slope["triton"] * widths[0]
    rows += [
        {"name": f"main loop, {who}", "value": flops / (taken[who][1] - taken[who][0]) / 1e9, "unit": "TFLOP/s", **shape} for who in taken
    ]
    rows[-2]["predicted"] = model(machine).achieved / 1e12
    rows += [
        {"name": SHARE, "value": slope["library"] / slope["triton"], "predicted": model(machine).triton_share, **shape},
        {"name": "epilogue of the exponential panel", "value": epilogue, "unit": "ms", **shape},
    ]
    return rows
