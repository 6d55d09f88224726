"""Shared test set-up: the Triton interpreter where there is no GPU, quiet libraries, no network."""

import collections
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

if not torch.cuda.is_available():
    # Read once, when triton is first imported; ahead-of-time compilation tests run in a child process without it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

GOLDEN = Path(__file__).resolve().parent / "golden"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: two workers that take whole files then end together."""
    slow = collections.Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the reference implementation's outputs (tests/golden/README.md), part of the repository."""
    return GOLDEN


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
