"""Figures of GPUs that one can buy: the one home of peaks, bandwidths and memory; every other table derives from it.

Two kinds of numbers, never to be mixed:

* of the data sheet: `peak`, dense bf16 with float32 accumulation and without sparsity, and `bandwidth`;
* achieved: what large products of the library and long copies reach. Those of A100, H100, H200 and B200 are of docs/design.md, all
  assumed until `python -m bench gpu --record` writes measured ones (`measured.py`). Where nothing is known of a card, it is
  `ACHIEVED` and `ACHIEVED_BANDWIDTH` of the data sheet: the least of those four, rounded.

Sources: NVIDIA's data sheets of A100 (SXM), H100 (SXM5), H200 (SXM), B200 (SXM), L40S, L4, and its white papers of Ada and Ampere
(RTX 4090: 165 TFLOP/s, RTX 3090: 71). Memory that programs see is what `torch.cuda.get_device_properties` says, less than the name.
"""

from __future__ import annotations

from dataclasses import dataclass

ACHIEVED, ACHIEVED_BANDWIDTH = 0.67, 0.88
PCIE = 25e9  # bytes/s: PCIe 4 x16, less its overhead


@dataclass(frozen=True)
class Card:
    """One GPU.

    Attributes:
        name: as `python -m train plan --gpu` takes it.
        kind: of `roofline.GPUS`, whose cost model holds for it; empty where there is none.
        size: GiB by its name; gib: GiB that programs see.
        peak: dense bf16 FLOP/s of the data sheet. achieved: what large products reach, FLOP/s.
        bandwidth: bytes/s of memory by the data sheet. achieved_bandwidth: what long copies reach.
        link: bytes/s to other GPUs, one way.
    """

    name: str
    kind: str
    size: float
    gib: float
    peak: float
    bandwidth: float
    link: float = PCIE
    achieved: float = 0.0
    achieved_bandwidth: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "achieved", self.achieved or ACHIEVED * self.peak)
        object.__setattr__(self, "achieved_bandwidth", self.achieved_bandwidth or ACHIEVED_BANDWIDTH * self.bandwidth)


CARDS = {
    card.name: card
    for card in (
        Card("h100-80", "h100", 80, 79.6, 989e12, 3.35e12, 450e9, 700e12, 3.0e12),
        Card("h200-141", "h200", 141, 140.4, 989e12, 4.8e12, 450e9, 700e12, 4.3e12),
        Card("b200-180", "b200", 180, 178.4, 2250e12, 8.0e12, 900e9, 1500e12, 7.0e12),
        Card("a100-80", "a100", 80, 79.2, 312e12, 2.04e12, 300e9, 250e12, 1.8e12),
        Card("a100-40", "", 40, 39.4, 312e12, 1.55e12, 300e9, 250e12),
        Card("l40s-48", "", 48, 44.5, 362e12, 0.86e12),
        Card("rtx4090-24", "", 24, 23.6, 165e12, 1.01e12),
        Card("rtx3090-24", "", 24, 23.6, 71e12, 0.94e12),
        Card("l4-24", "", 24, 22.5, 121e12, 0.30e12),
    )
}
