"""Cards of a plan: their names, short ones, and those that drivers give them; hours and money."""

from types import SimpleNamespace

import pytest
import torch

from contrastive_kernels.roofline.cards import CARDS
from train.plan.best.money import Bill
from train.plan.best.table import Table
from train.plan.gpus import GPUS, gpu_at_hand, named, parse_gpu


@pytest.mark.parametrize(
    "word,name",
    [
        ("h100", "h100-80"),
        ("H100 SXM", "h100-80"),
        ("h100-pcie", "h100pcie-80"),
        ("H100 NVL", "h100nvl-94"),
        ("4090", "rtx4090-24"),
        ("RTX 5090", "rtx5090-32"),
        ("a100", "a100-80"),
        ("A100-40", "a100-40"),
        ("A100 40GB", "a100-40"),
        ("a100-80gb", "a100-80"),
        ("6000 Ada", "rtx6000ada-48"),
        ("pro6000", "rtxpro6000-96"),
        ("l4", "l4-24"),
        ("l40s", "l40s-48"),
        ("MI300X", "mi300x-192"),
    ],
)
def test_short_names(word, name):
    assert parse_gpu(word) is GPUS[name]


@pytest.mark.parametrize(
    "device,gib,name",
    [
        ("NVIDIA H100 80GB HBM3", 79.6, "h100-80"),
        ("NVIDIA H100 PCIe", 79.1, "h100pcie-80"),
        ("NVIDIA H100 NVL", 93.1, "h100nvl-94"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100-80"),
        ("NVIDIA RTX 6000 Ada Generation", 47.5, "rtx6000ada-48"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 95.0, "rtxpro6000-96"),
        ("NVIDIA GeForce RTX 3090", 23.6, "rtx3090-24"),
        ("AMD Instinct MI300X", 191.5, "mi300x-192"),
        ("NVIDIA L40", 44.5, None),  # not the L40S
        ("NVIDIA A10G", 22.0, None),  # not the A10
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.7, None),
        ("NVIDIA A100 80GB PCIe", 79.1, None),  # 1.935 TB/s and PCIe, where the SXM card has NVSwitch
        ("NVIDIA H200 NVL", 139.8, None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", 39.5, None),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 95.0, None),
        ("NVIDIA GeForce RTX 3090 Ti", 23.6, None),
        ("NVIDIA GeForce RTX 4090 D", 23.6, None),
        ("Tesla T4", 14.6, None),
    ],
)
def test_a_device_is_known_by_its_own_name(device, gib, name):
    assert named(device, gib) == name


def test_the_card_at_hand_is_the_default(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="there is no GPU here; say one of"):
        gpu_at_hand()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device = SimpleNamespace(name="NVIDIA A100-SXM4-40GB", total_memory=42 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    assert (gpu_at_hand().name, gpu_at_hand().gib) == ("a100-40", 42), "with the memory that it says it has"
    device.name = "Tesla T4"
    with pytest.raises(ValueError, match="Tesla T4 is none of .* data sheet"):
        gpu_at_hand()


def test_cards_are_plausible():
    """What a slip of a digit or of a unit would make."""
    for card in CARDS.values():
        assert 0.9 < card.gib / card.size < 1.0 and 20 < card.size < 300
        assert 40e12 < card.achieved < card.peak < 3000e12 and 0.2e12 < card.achieved_bandwidth < card.bandwidth < 10e12
        assert 20e9 < card.link < 1000e9


@pytest.mark.parametrize(
    "hours,words,weeks", [(0.5, "30.0 minutes", False), (3.25, "3.2 hours", False), (60, "2.5 days", False), (420, "2.5 weeks", True)]
)
def test_a_run_of_weeks_says_so(hours, words, weeks):
    bill = Bill(hours, ranks=8, price=2.5)
    assert bill.in_words() == words and bill.money == hours * 8 * 2.5
    assert bill.takes_weeks is weeks and ("2.5 weeks on 8 such cards" in bill.warning()) is weeks
    assert Bill(hours).money is None and Bill(hours).money_in_words() == ""


def test_columns_of_a_table_may_be_left_out():
    table = Table(("recipe", False, True), ("hours", True, True), ("money", True, False))
    assert [*table.head(), table.row("r", 2.5, 6)] == ["| recipe | hours |", "|---|---:|", "| r | 2.5 |"]
