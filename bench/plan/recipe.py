"""A model of the benchmarks with rows of their mix, and the values of a recipe that trains it."""

from __future__ import annotations

from pathlib import Path

from bench import models

PAIRS = {"tiny": 32, "100m": 6}
BUDGET = {"tiny": 1024, "100m": 512}


def write(folder: Path, size: str) -> dict:
    """Model and rows of the encode benchmark's mix below `folder`; a recipe's values but for how it trains."""
    from vlm2vec.data.mmeb import write_train

    models.write(size, str(folder / "model"))
    (folder / "images").mkdir(parents=True, exist_ok=True)
    items = models.inputs(size, 2 * PAIRS[size])
    sides = []
    for number, item in enumerate(items):
        text = item if isinstance(item, str) else item.get("text", "") if isinstance(item, dict) else ""
        image = None if isinstance(item, str) else item["image"] if isinstance(item, dict) else item
        if image is not None:
            image.save(folder / "images" / f"{number}.png")
        sides.append((text if image is None else f"<|image_1|>\n{text}", "" if image is None else f"{number}.png"))
    rows = [
        {"qry": q[0], "qry_image_path": q[1], "pos_text": t[0], "pos_image_path": t[1]}
        for q, t in zip(sides[: PAIRS[size]], sides[PAIRS[size] :], strict=True)
    ]
    write_train(folder / "train", "Mix", rows)
    data = {"root": str(folder / "train"), "images": str(folder / "images"), "sources": [{"name": "Mix"}]}
    return {
        "model": str(folder / "model"),
        "output": str(folder / "output"),
        "data": data,
        "steps": 2,
        "global_batch": PAIRS[size],
        "chunk_tokens": BUDGET[size],
        "cpu": True,
    }
