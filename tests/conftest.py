"""Shared test set-up: the Triton interpreter where there is no GPU, quiet libraries, no network."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

if not torch.cuda.is_available():
    # Read once, when triton is first imported; ahead-of-time compilation tests run in a child process without it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def golden():
    """Folder of outputs of the reference implementation; the tests that need it are skipped where it is absent."""
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip("the reference implementation's outputs (../shared/golden) are not on this machine")
    return folder


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
