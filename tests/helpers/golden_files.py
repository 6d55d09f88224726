"""The folders of tests/golden: small models with what the reference implementation makes of their inputs.

Others lie beside the repository, in shared/golden: they hold files of their authors' that are not this project's to give away.
"""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file


def read(golden, name: str):
    """(folder, cases.json, expected tensors) of one of them."""
    folder = golden / name
    return folder, json.loads((folder / "cases.json").read_text(encoding="utf-8")), load_file(folder / "expected.safetensors")


def beside(name: str) -> Path:
    """A folder of shared/golden beside the repository, or beside a folder that holds it; the test is skipped where there is none."""
    place = Path("shared", "golden", name)
    found = next((parent / place for parent in Path(__file__).resolve().parents if (parent / place).is_dir()), None)
    if found is None:
        pytest.skip(f"{place} is not beside the repository: the authors' own vectors cannot be compared with")
    return found


def as_input(folder, item) -> dict:
    """An item of cases.json as the model takes it."""
    return {"text": item["raw_text"], **({} if item["image"] is None else {"image": folder / item["image"]})}
