"""Published figures of GPUs, dense bf16 with fp32 accumulation, for predictions."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """`gib`: memory that programs see; `tflops`: dense bf16; `tb_s`: memory bandwidth; `link_gb_s`: to other GPUs, one way."""

    name: str
    gib: float
    tflops: float
    tb_s: float
    link_gb_s: float = 25.0  # PCIe 4 x16, less its overhead


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100-80", 79.6, 989, 3.35, 450),
        Gpu("h200-141", 140.4, 989, 4.8, 450),
        Gpu("a100-80", 79.2, 312, 2.04, 300),
        Gpu("a100-40", 39.4, 312, 1.55, 300),
        Gpu("l40s-48", 44.5, 362, 0.86),
        Gpu("rtx4090-24", 23.6, 165, 1.01),
        Gpu("rtx3090-24", 23.6, 71, 0.94),
        Gpu("l4-24", 22.5, 121, 0.30),
    )
}


def parse_gpu(word: str) -> Gpu:
    """A name of `GPUS`, or `SIZE_GiB:TFLOPS:TBs`, with `:LINK_GBs` behind it where it is known.

    Raises:
        ValueError: neither.
    """
    if word in GPUS:
        return GPUS[word]
    try:
        numbers = [float(part) for part in word.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) not in (3, 4) or not all(0 < number < float("inf") for number in numbers):
        raise ValueError(f"--gpu {word}: expected one of {', '.join(GPUS)}, or SIZE_GiB:TFLOPS:TBs such as 48:362:0.86")
    return Gpu(word, *numbers)
