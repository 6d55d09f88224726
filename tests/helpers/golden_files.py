"""The folders of tests/golden: small models with what the reference implementation makes of their inputs."""

import json

from safetensors.torch import load_file


def read(golden, name: str):
    """(folder, cases.json, expected tensors) of one of them."""
    folder = golden / name
    return folder, json.loads((folder / "cases.json").read_text(encoding="utf-8")), load_file(folder / "expected.safetensors")


def as_input(folder, item) -> dict:
    """An item of cases.json as the model takes it."""
    return {"text": item["raw_text"], **({} if item["image"] is None else {"image": folder / item["image"]})}
