"""The GPUs of the cost model: the figures of `cards.py`, with the limits of a multiprocessor and the rates that were measured."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from .cards import CARDS
from .measured import RATES

# Assumptions that compilation cannot tell; `python -m bench gpu` measures both on the device at hand.
TRITON_SHARE = 0.85  # main loop of a Triton product against the library's
LAUNCH = 2.2e-6  # one small kernel after another on the device


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Args:
        arch: compute capability times ten. sms, clock: multiprocessors, and Hz under load.
        peak: dense bf16/fp16 FLOP/s of the data sheet. achieved: what the library's large GEMMs reach.
        achieved_fp32: the same for float32 products (IEEE, no tensor cores). bandwidth: achieved bytes/s of memory.
        l2_bandwidth: bytes/s from L2 to all multiprocessors. memory: bytes.
        triton_share: main loop of a Triton product over the library's. launch: seconds from one kernel to the next.
        registers, shared, threads, blocks: limits of one multiprocessor. shared_block: shared memory one block may take.
    """

    name: str
    arch: int
    sms: int
    clock: float
    peak: float
    achieved: float
    achieved_fp32: float
    bandwidth: float
    l2_bandwidth: float
    memory: float
    shared: int
    shared_block: int
    triton_share: float = TRITON_SHARE
    launch: float = LAUNCH
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32

    @property
    def issue(self) -> float:
        """Instructions of single lanes a second: four schedulers, 32 lanes each."""
        return self.sms * self.clock * 128


def measured(gpu: Gpu) -> Gpu:
    """`gpu` with those of its rates that were measured."""
    return dataclasses.replace(gpu, **RATES.get(gpu.name, {}))


GIB = 1 << 30


def _of_card(name: str, arch: int, sms: int, clock: float, *, fp32: float, l2: float, shared: int, shared_block: int) -> Gpu:
    card = CARDS[name]
    rates = card.peak, card.achieved, fp32, card.achieved_bandwidth, l2
    return Gpu(card.kind, arch, sms, clock, *rates, card.size * GIB, shared, shared_block)


A100 = _of_card("a100-80", 80, 108, 1.30e9, fp32=16e12, l2=4.5e12, shared=167_936, shared_block=166_912)
H100 = _of_card("h100-80", 90, 132, 1.60e9, fp32=45e12, l2=7.0e12, shared=233_472, shared_block=232_448)
H200 = _of_card("h200-141", 90, 132, 1.60e9, fp32=45e12, l2=7.0e12, shared=233_472, shared_block=232_448)
B200 = _of_card("b200-180", 100, 148, 1.85e9, fp32=60e12, l2=12e12, shared=233_472, shared_block=232_448)
ASSUMED = {gpu.name: gpu for gpu in (A100, H100, H200, B200)}
A100, H100, H200, B200 = map(measured, ASSUMED.values())
GPUS = {gpu.name: gpu for gpu in (A100, H100, H200, B200)}


def for_arch(arch: int, name: str = "") -> Gpu:
    """The GPU that a device's name tells, else the one its compute capability (times ten) stands for; H100 where it is newer than sm_80."""
    named = next((gpu for gpu in GPUS.values() if gpu.name in name.lower()), None)
    if named is not None:
        return named
    return {80: A100, 90: H100, 100: B200}.get(arch, A100 if arch < 90 else H100)
