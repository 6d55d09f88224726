"""The bound on scratch: a pure function of the call and the card, whatever the process did before, as long as the card has it."""

import logging

import pytest
import torch

from contrastive_kernels.core import workspace
from contrastive_kernels.options import InfoNCEOptions

MIB = 1 << 20


class OnCard:
    """What is asked of a tensor on a GPU, for a machine without one."""

    device = torch.device("cuda", 0)

    def __init__(self, rows, width=1536):
        self.shape = (rows, width)

    def __len__(self):
        return self.shape[0]


@pytest.fixture
def card(monkeypatch):
    """A card of 80 GiB whose driver and allocator answer what the test says, and count how often they are asked."""
    answers = dict(free=70 << 30, reserved=0, allocated=0, asked=0, capturing=False)

    def free(device):
        answers["asked"] += 1
        return answers["free"], 80 << 30

    monkeypatch.setattr(workspace, "card_bytes", lambda device: 80 << 30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: answers["reserved"])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: answers["allocated"])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: answers["capturing"])
    workspace._tell_once.cache_clear()
    return answers


def bound(rows, columns=None, **options) -> int:
    return workspace.workspace_bytes(InfoNCEOptions.make(options), OnCard(rows), OnCard(columns or rows))


def test_as_asked_and_on_a_cpu():
    assert bound(100, workspace_mib=3.5) == int(3.5 * MIB)
    cpu = torch.zeros(4, 8)
    assert workspace.workspace_bytes(InfoNCEOptions(), cpu, cpu) == 256 * MIB


def test_history_does_not_change_it(card):
    """In training the card looks full, since torch's allocator holds it: unused, it is there for the loss."""
    before = bound(65_536)
    card.update(free=1 << 30, reserved=75 << 30, allocated=40 << 30)
    assert bound(65_536) == before == (80 << 30) // 10


def test_only_a_card_without_room_bounds_it_lower(card, caplog):
    card.update(free=3 << 30)
    with caplog.at_level(logging.WARNING):
        assert bound(65_536) == (80 << 30) // 40 == bound(65_536)  # 8 GiB halved twice
        card.update(free=1 << 20)
        assert bound(65_536) == 256 * MIB
    assert [("2048 MiB instead of 8192" in r.message, "workspace_mib" in r.message) for r in caplog.records] == [
        (True, True),
        (False, True),
    ]


def test_a_call_that_fits_is_bounded_as_ever(card, caplog):
    """5 GiB are free, a tenth of the card is 8: the whole panel takes 0.7."""
    card.update(free=5 << 30)
    with caplog.at_level(logging.WARNING):
        assert bound(8192) == (80 << 30) // 10
    assert not caplog.records


def test_small_calls_and_captured_ones_do_not_ask_the_driver(card):
    card.update(free=0)
    assert bound(4096) == (80 << 30) // 10 and card["asked"] == 0
    card.update(capturing=True)
    assert bound(65_536) == (80 << 30) // 10 and card["asked"] == 0


def test_every_candidate_counts():
    def whole(**options):
        return workspace.whole_panel_bytes(InfoNCEOptions.make(options), OnCard(1000), OnCard(3000))

    plain = whole()
    assert plain >= 1000 * 3000 * 6 and whole(query_negatives=True) >= plain + 1000 * 1000 * 6
    assert whole(target_negatives=True) >= 2 * 1000 * 3000 * 6 and whole(matryoshka_dims=(64, 128, 256)) >= 3 * 1000 * 3000 * 6
