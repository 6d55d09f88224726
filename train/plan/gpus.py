"""The GPU of a plan: a card of `contrastive_kernels.roofline`, or the figures of another one."""

from __future__ import annotations

from dataclasses import dataclass

from contrastive_kernels import roofline
from contrastive_kernels.roofline.cards import ACHIEVED, ACHIEVED_BANDWIDTH, CARDS, PCIE, Card


@dataclass(frozen=True)
class Gpu:
    """What a plan needs to know.

    Attributes:
        gib: memory that programs see. tflops, tb_s: dense bf16 and memory bandwidth by the data sheet.
        link_gb_s: to other GPUs, one way.
        reached, reached_bandwidth: shares of `tflops` and `tb_s` that large products and long copies reach.
    """

    name: str
    gib: float
    tflops: float
    tb_s: float
    link_gb_s: float = PCIE / 1e9
    reached: float = ACHIEVED
    reached_bandwidth: float = ACHIEVED_BANDWIDTH


def _of_card(card: Card) -> Gpu:
    """With rates that were measured in place of assumed ones."""
    kind = roofline.GPUS.get(card.kind)
    achieved, bandwidth = (card.achieved, card.achieved_bandwidth) if kind is None else (kind.achieved, kind.bandwidth)
    rates = achieved / card.peak, bandwidth / card.bandwidth
    return Gpu(card.name, card.gib, card.peak / 1e12, card.bandwidth / 1e12, card.link / 1e9, *rates)


GPUS = {name: _of_card(card) for name, card in CARDS.items()}


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
