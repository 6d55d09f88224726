"""Where one call's time goes: its kernels by name, how many and how long, and what a Triton product reaches of the library's."""

from __future__ import annotations

import torch

from bench.gpu import timing
from bench.gpu.check import Check, NotHere
from bench.gpu.clock import median
from bench.gpu.parts.env import model
from bench.peers import on_gpu
from contrastive_kernels.triton import configs

CALLS = {"plain": {}, "normalize": {"normalize": True}, "symmetric, normalize": {"symmetric": True, "normalize": True}}
PANELS = ("plain", "warp_specialised")
SHARE = "Triton share of the library's rate"
TOP = 12  # kernels told by name


def checks(machine):
    for name, options in list(CALLS.items())[: 1 if machine.dry else None]:
        yield Check(f"kernels: {name}", lambda name=name, options=options: kernels(machine, name, options))
    for panel in PANELS:
        yield Check(f"{panel} panel by width", lambda panel=panel: triton_share(machine, panel))


def kernels(machine, name: str, options: dict) -> list[dict]:
    """Kernels of one call by device time; on a CPU operators by their own time."""
    from contrastive_kernels.triton import launch_log

    n, d = (16_384, 1536) if not machine.dry else (24, 16)
    run = on_gpu.ours(backend="triton", **options)(*timing.operands(machine.device, n, n, d), timing.TEMPERATURE)
    run()
    with launch_log.record() as noted:
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


def special(machine) -> None:
    """Raises NotHere where the warp-specialised panel cannot be had."""
    from contrastive_kernels.triton.kernels import warp_specialised

    arch = configs.architecture(torch.device(machine.device))
    if reason := warp_specialised.obstacle(arch, torch.bfloat16, plain=True, columns=16_384):
        raise NotHere(f"the warp-specialised panel: {reason}")


def triton_share(machine, panel: str) -> list[dict]:
    """An exponential panel and the library's product at two widths: what more width costs is the main loop, the rest is the epilogue,
    whatever a model thinks of either. panel: as `exp_panel` takes it."""
    from contrastive_kernels.triton.kernels.exp_panel import exp_panel

    if panel == "warp_specialised":
        special(machine)
    n, widths = (16_384, (768, 3072)) if not machine.dry else (64, (16, 64))
    shift, out = torch.zeros(n, device=machine.device), torch.empty(1, n, n, dtype=torch.bfloat16, device=machine.device)
    taken: dict[str, list[float]] = {"library": [], panel: []}
    for d in widths:
        query, target = timing.operands(machine.device, n, n, d)
        calls = {
            "library": lambda q=query, t=target: torch.mm(q, t.T, out=out[0]),
            panel: lambda q=query, t=target: exp_panel(q, t, scale=1 / timing.TEMPERATURE, shift=shift, out=out, panel=panel),
        }
        for who, call in calls.items():
            taken[who].append(median(machine.clock, call, 10))
    shape, added = {"n": n, "m": n, "dtype": "bfloat16"}, widths[1] - widths[0]
    title = f"{panel} panel"
    rows = [
        {"name": f"{title}: {who}, D = {d}", "value": ms, "unit": "ms", **shape, "d": d}
        for who in taken
        for d, ms in zip(widths, taken[who], strict=True)
    ]
    grown = {who: ms[1] - ms[0] for who, ms in taken.items()}
    if min(grown.values()) <= 0:
        return rows + [{"name": f"{title}: {SHARE}", "value": "", "note": "wider took no longer: no rate to be had", **shape}]
    gpu = model(machine)
    for who, assumed in (("library", gpu.achieved), (panel, gpu.achieved * gpu.triton_share)):
        rate = 2 * n * n * added / grown[who] / 1e9
        rows.append({"name": f"{title}: main loop, {who}", "value": rate, "unit": "TFLOP/s", "predicted": assumed / 1e12, **shape})
    epilogue = taken[panel][0] - grown[panel] * widths[0] / added
    return rows + [
        {"name": f"{title}: {SHARE}", "value": grown["library"] / grown[panel], "predicted": gpu.triton_share, **shape},
        {"name": f"{title}: epilogue", "value": epilogue, "unit": "ms", **shape},
    ]
