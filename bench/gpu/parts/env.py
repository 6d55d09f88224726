"""What is here, and the rates of the device that the cost model is made of: library products, memory, launches."""

from __future__ import annotations

import importlib.util

import torch

from bench.gpu.check import Check
from bench.gpu.clock import median
from contrastive_kernels import roofline
from contrastive_kernels.triton import configs
from vlm2vec.attention import _has_flash_attn, _has_flash_attn_4

PACKAGES = (
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "flash_attn",
    "flash_attn_4",
    "fla",
    "causal_conv1d",
    "bitsandbytes",
    "liger_kernel",
    "sentence_transformers",
    "cut_cross_entropy",
    "inf_cl",
    "memeff",
    "siglip_kernel",
)
LAUNCHES = 200


def checks(machine):
    yield Check("device", lambda: device(machine))
    yield Check("packages", packages)
    for dtype in (torch.bfloat16, torch.float32):
        yield Check(f"library product, {str(dtype)[6:]}", lambda dtype=dtype: product(machine, dtype))
    yield Check("memory, read and written", lambda: copy(machine))
    yield Check("launches", lambda: launches(machine))


def device(machine) -> str:
    if machine.device != "cuda":
        return machine.clock.title()
    p, (free, _) = torch.cuda.get_device_properties(0), torch.cuda.mem_get_info()
    return f"{p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} SMs, {p.total_memory / 2**30:.1f} GiB, free {free / 2**30:.1f} GiB"


def packages() -> str:
    # two packages share the folder flash_attn
    attention = {"flash_attn": _has_flash_attn, "flash_attn_4": _has_flash_attn_4}
    missing = [name for name in PACKAGES if not (attention[name]() if name in attention else importlib.util.find_spec(name))]
    return f"not here: {', '.join(missing)}" if missing else "all here"


def model(machine) -> roofline.Gpu:
    return configs.gpu(torch.device(machine.device))


def product(machine, dtype) -> dict:
    """FLOP/s of a large square product."""
    n = (8192 if dtype == torch.bfloat16 else 4096) if not machine.dry else 64
    a, b = (torch.randn(n, n, device=machine.device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    ms = median(machine.clock, lambda: torch.mm(a, b, out=out), 10)
    assumed = model(machine).achieved if dtype == torch.bfloat16 else model(machine).achieved_fp32
    return {"value": 2 * n**3 / ms / 1e9, "unit": "TFLOP/s", "predicted": assumed / 1e12, "dtype": str(dtype)[6:], "n": n, "m": n, "d": n}


def copy(machine) -> dict:
    """Bytes a second of a copy, both directions counted."""
    source = torch.empty((2 << 30) if not machine.dry else 1 << 16, dtype=torch.uint8, device=machine.device)
    to = torch.empty_like(source)
    ms = median(machine.clock, lambda: to.copy_(source), 10)
    return {"value": 2 * source.numel() / ms / 1e9, "unit": "TB/s", "predicted": model(machine).bandwidth / 1e12}


def launches(machine) -> list[dict]:
    """Microseconds from one small kernel to the next: of torch and of ours, as the host launches them; in a graph, as the device does."""
    from contrastive_kernels.triton.symmetric import combine

    count = LAUNCHES if not machine.dry else 2
    x = torch.zeros(128, 128, dtype=torch.bfloat16, device=machine.device)
    f = torch.zeros(128, device=machine.device)

    def repeated(one):
        def run():
            for _ in range(count):
                one()

        return run

    def row(name, run, **more):
        return {"name": name, "value": median(machine.clock, run, 5) / count * 1e3, "unit": "us", **more}

    torch_op = repeated(lambda: f.add_(1.0))
    rows = [row("launch, torch operation", torch_op, predicted=roofline.HOST_OPERATION * 1e6)]
    rows.append(row("launch, Triton kernel", repeated(lambda: combine(x, f, f)), predicted=roofline.HOST_KERNEL * 1e6))
    if machine.device == "cuda":
        from bench.peers.on_gpu import captured

        rows.append(row("launch, in a CUDA graph", captured(torch_op)[0].replay, predicted=model(machine).launch * 1e6))
    return rows
