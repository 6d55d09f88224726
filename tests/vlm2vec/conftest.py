"""What the examples in docstrings find where they run."""

import numpy as np
import pytest


@pytest.fixture(scope="session")
def example_folder(tmp_path_factory):
    """A folder as a reader has it: quickstart/model, small and untrained, and a picture."""
    from PIL import Image

    from tests.helpers.tiny_models import qwen2_vl

    folder = tmp_path_factory.mktemp("examples")
    (folder / "quickstart" / "model").mkdir(parents=True)
    qwen2_vl(folder / "quickstart" / "model")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)).save(folder / "fox.png")
    return folder


@pytest.fixture
def example_names(example_folder, monkeypatch):
    """Names that the examples use: `model`, freshly loaded, and what a reader would have imported."""
    from pathlib import Path

    import torch

    from vlm2vec import VLM2Vec

    monkeypatch.chdir(example_folder)
    return {"VLM2Vec": VLM2Vec, "Path": Path, "torch": torch, "model": VLM2Vec.from_pretrained("quickstart/model", device="cpu")}
