"""Figures of GPUs that one can buy: the one home of peaks, bandwidths and memory; every other table derives from it.

Two kinds of numbers, never to be mixed:

* of the data sheet: `peak`, dense bf16 with float32 accumulation and without sparsity, and `bandwidth`;
* achieved: what large products of the library and long copies reach. Those of A100, H100, H200 and B200 are of docs/design.md, all
  assumed until `python -m bench gpu --record` writes measured ones (`measured.py`). Where nothing is known of a card, it is
  `ACHIEVED` and `ACHIEVED_BANDWIDTH` of the data sheet: the least of those four, rounded.

Sources stand behind each card. Where a sheet gives tensor figures with sparsity, `peak` is their half; for GeForce cards it is the
figure with float32 accumulation, which halves that of float16's. Memory that programs see is what
`torch.cuda.get_device_properties` says, less than the name; where no card was at hand (all but A100-80, H100-80, H200, L40S, RTX
3090 and 4090, L4) it is what the driver reports less half a GiB. Cards without NVSwitch reach each other through PCIe here, also where
a bridge joins two of them.
"""

from __future__ import annotations

from dataclasses import dataclass

ACHIEVED, ACHIEVED_BANDWIDTH = 0.67, 0.88
PCIE = 25e9  # bytes/s: PCIe 4 x16, less its overhead
PCIE5 = 50e9


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
        Card("h100-80", "h100", 80, 79.6, 989e12, 3.35e12, 450e9, 700e12, 3.0e12),  # SXM5; NVIDIA H100 data sheet
        Card("h100pcie-80", "", 80, 79.1, 756e12, 2.0e12, PCIE5),  # the same sheet
        Card("h100nvl-94", "", 94, 93.1, 835e12, 3.9e12, PCIE5),  # the same sheet
        Card("h200-141", "h200", 141, 140.4, 989e12, 4.8e12, 450e9, 700e12, 4.3e12),  # SXM; NVIDIA H200 data sheet
        Card("b200-180", "b200", 180, 178.4, 2250e12, 8.0e12, 900e9, 1500e12, 7.0e12),  # SXM; NVIDIA HGX B200 data sheet
        Card("a100-80", "a100", 80, 79.2, 312e12, 2.04e12, 300e9, 250e12, 1.8e12),  # SXM; NVIDIA A100 data sheet
        Card("a100-40", "", 40, 39.4, 312e12, 1.55e12, 300e9, 250e12),  # the same sheet
        Card("a10-24", "", 24, 22.0, 125e12, 0.60e12),  # NVIDIA A10 data sheet
        Card("a40-48", "", 48, 44.5, 149.7e12, 0.696e12),  # NVIDIA A40 data sheet
        Card("l4-24", "", 24, 22.5, 121e12, 0.30e12),  # NVIDIA L4 data sheet
        Card("l40s-48", "", 48, 44.5, 362e12, 0.864e12),  # NVIDIA L40S data sheet
        Card("rtx3090-24", "", 24, 23.6, 71e12, 0.936e12),  # NVIDIA white paper of Ampere GA102
        Card("rtx4090-24", "", 24, 23.6, 165.2e12, 1.008e12),  # NVIDIA white paper of Ada
        Card("rtx5090-32", "", 32, 31.3, 209.5e12, 1.792e12, PCIE5),  # NVIDIA white paper of RTX Blackwell
        Card("rtx6000ada-48", "", 48, 47.5, 364.2e12, 0.96e12),  # NVIDIA RTX 6000 Ada data sheet
        Card("rtxpro6000-96", "", 96, 95.0, 503.8e12, 1.792e12, PCIE5),  # NVIDIA white paper of RTX PRO Blackwell
        Card("mi300x-192", "", 192, 191.5, 1307.4e12, 5.3e12, 448e9),  # AMD Instinct MI300X data sheet: seven links of 64 GB/s one way
    )
}
