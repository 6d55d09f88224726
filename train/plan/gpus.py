"""The GPU of a plan: a card of `contrastive_kernels.roofline`, or the figures of another one."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

from contrastive_kernels import roofline
from contrastive_kernels.roofline.cards import ACHIEVED, ACHIEVED_BANDWIDTH, CARDS, PCIE, Card

DISPATCH = 5e-6  # assumed: torch, autograd and Python on the host, for one operator


@dataclass(frozen=True)
class Gpu:
    """What a plan needs to know.

    Attributes:
        gib: memory that programs see. tflops, tb_s: dense bf16 and memory bandwidth by the data sheet.
        link_gb_s: to other GPUs, one way.
        reached, reached_bandwidth: shares of `tflops` and `tb_s` that large products and long copies reach.
        dispatch: seconds from one operator to the next, however little it does: a step is run eagerly.
    """

    name: str
    gib: float
    tflops: float
    tb_s: float
    link_gb_s: float = PCIE / 1e9
    reached: float = ACHIEVED
    reached_bandwidth: float = ACHIEVED_BANDWIDTH
    dispatch: float = DISPATCH


_BOARDS = {"pcie", "nvl", "mig", "laptop", "max", "ti", "super", "d"}


def _of_card(card: Card) -> Gpu:
    """With rates that were measured in place of assumed ones."""
    kind = roofline.GPUS.get(card.kind)
    achieved, bandwidth = (card.achieved, card.achieved_bandwidth) if kind is None else (kind.achieved, kind.bandwidth)
    rates = achieved / card.peak, bandwidth / card.bandwidth
    return Gpu(card.name, card.gib, card.peak / 1e12, card.bandwidth / 1e12, card.link / 1e9, *rates)


GPUS = {name: _of_card(card) for name, card in CARDS.items()}


def parse_gpu(word: str) -> Gpu:
    """A name of `GPUS`, a short one, or `SIZE_GiB:TFLOPS:TBs`, with `:LINK_GBs` behind it where it is known.

    A short name is what is left without the size or the maker's letters: `h100` (the SXM card), `4090`, `pro6000`, `h100-pcie`. Where
    cards differ in their size alone it is the larger one: `a100` has 80 GB.

    Raises:
        ValueError: neither.

    Example:
        >>> parse_gpu("4090").name, parse_gpu("RTX 4090").name, parse_gpu("a100").name, parse_gpu("a100-40").name
        ('rtx4090-24', 'rtx4090-24', 'a100-80', 'a100-40')
    """
    if word in GPUS:
        return GPUS[word]
    known = _short_names()
    if _plain(word) in known:
        return GPUS[known[_plain(word)]]
    try:
        numbers = [float(part) for part in word.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) not in (3, 4) or not all(0 < number < float("inf") for number in numbers):
        near = difflib.get_close_matches(_plain(word)[:80], known, n=1, cutoff=0.6)
        hint = f"; did you mean {known[near[0]]}?" if near else ""
        raise ValueError(f"--gpu {word[:80]}: expected one of {', '.join(GPUS)}, or SIZE_GiB:TFLOPS:TBs such as 48:362:0.86{hint}")
    return Gpu(word, *numbers)


def gpu_at_hand() -> Gpu:
    """The card of this machine, with the memory that it says it has.

    Raises:
        ValueError: there is none, or one that `GPUS` does not know.
    """
    import torch

    if not torch.cuda.is_available():
        raise ValueError(f"--gpu: expected a card to plan for, got none, and there is no GPU here; say one of {', '.join(GPUS)}")
    properties = torch.cuda.get_device_properties(0)
    name = named(properties.name, properties.total_memory / 2**30)
    if name is None:
        raise ValueError(f"--gpu: {properties.name} is none of {', '.join(GPUS)}; say SIZE_GiB:TFLOPS:TBs by its data sheet")
    return replace(GPUS[name], gib=properties.total_memory / 2**30)


def named(device: str, gib: float) -> str | None:
    """The name in `GPUS` of what a driver calls a device; of two sizes the one that is nearest to `gib` GiB. None: not known.

    Example:
        >>> named("NVIDIA A100-SXM4-40GB", 39.4), named("NVIDIA RTX 6000 Ada Generation", 47.5), named("NVIDIA L40", 44.5)
        ('a100-40', 'rtx6000ada-48', None)
    """
    words = set(re.findall(r"[a-z0-9]+", device.lower()))
    # Slices of a card, and boards of its name that are slower or reach others in another way.
    others = words & (_BOARDS | {word for word in words if re.fullmatch(r"\d+g", word)})
    fitting = {name: len(asked) for name in GPUS if (asked := _words(name)) <= words and not others - asked}
    most = max(fitting.values(), default=0)
    return min((name for name, count in fitting.items() if count == most), key=lambda name: abs(GPUS[name].gib - gib), default=None)


def _words(name: str) -> set[str]:
    """The words that a device's own name has where it is the card of this name."""
    stem = _without_size(name).removeprefix("rtx")
    marks = {mark for mark in ("pcie", "nvl", "ada", "pro") if stem.startswith(mark) or stem.endswith(mark)}
    for mark in marks:
        stem = stem.replace(mark, "")
    return {stem, *marks}


def _plain(word: str) -> str:
    """Small letters and digits alone, sizes without their unit."""
    return re.sub(r"[^a-z0-9:.]", "", re.sub(r"(?<=\d)\s*gi?b\b", "", word.lower()))


def _without_size(name: str) -> str:
    return name.rpartition("-")[0]


def _short_names() -> dict[str, str]:
    """Name of a card by every shorter word for it; the larger of two sizes comes last and stays."""
    names: dict[str, str] = {}
    for name in sorted(GPUS, key=lambda name: GPUS[name].gib):
        stem = _without_size(name)
        for short in {_plain(name), stem, stem.removeprefix("rtx"), *([f"{stem}sxm"] if GPUS[name].link_gb_s > 100 else [])}:
            names[short] = name
    return names
