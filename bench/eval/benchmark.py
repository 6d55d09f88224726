"""The data that `python -m bench eval` evaluates: six data sets in MMEB's layout, drawn from a seed."""

from __future__ import annotations

from pathlib import Path

from bench import models

WORDS = "red blue green small large old bright wooden round near under beside holding cat dog cup tree car boat lamp book chair".split()


def write_benchmark(folder: Path, rows: int, apart: bool = False) -> None:
    """Six data sets of `rows` queries over one set of pictures, shared labels and shared picture candidates.

    With `apart` each data set has pictures, labels and captions of its own, so that no input of one occurs in another.
    """
    import random

    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    rng = random.Random(0)
    (folder / "images").mkdir(parents=True)
    for i in range(2 * rows):
        pixels = np.random.default_rng(i).integers(0, 256, (*models.IMAGES[i % len(models.IMAGES)][::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")

    def say(most: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(2, most)))

    def ask(pool: list[str], i: int) -> list[str]:
        return [pool[(i * 7 + j) % len(pool)] for j in range(len(pool))]

    labels, captions = [f"{w} {v}" for w in WORDS[:8] for v in WORDS[8:]], [say(14) for _ in range(3 * rows)]
    mark = "<|image_1|>\n"
    pictures = [f"{i}.png" for i in range(rows)]
    target = mark + "Represent the given image.\n"
    sets = {
        "ImageNet-1K": [
            (mark + "Represent the given image for classification\n", f"{i + rows}.png", ask(labels, i), None) for i in range(rows)
        ],
        "ImageNet-A": [(mark + "Represent the given image for classification\n", f"{i}.png", ask(labels, i), None) for i in range(rows)],
        "OK-VQA": [
            (f"{mark}Represent the given image with the following question: {say(12)}?\n", f"{i}.png", ask(captions, i), None)
            for i in range(rows)
        ],
        "MSCOCO_t2i": [
            (f"Find me an everyday image that matches the given caption: {say(30)}\n", "", None, ask(pictures, i)) for i in range(rows)
        ],
        "MSCOCO_i2t": [
            (mark + "Find an image caption describing the given everyday image.\n", f"{i}.png", ask(captions, i), None) for i in range(rows)
        ],
        "CIRR": [
            (
                f"{mark}Given an image, find a similar everyday image with the described changes: {say(12)}\n",
                f"{i + rows}.png",
                None,
                ask(pictures, i),
            )
            for i in range(rows)
        ],
    }
    for place, (name, queries) in enumerate(sets.items()):
        if apart:
            queries = [_of_its_own(row, name, place, folder / "images") for row in queries]
        table = {
            "qry_text": [r[0] for r in queries],
            "qry_img_path": [r[1] for r in queries],
            "tgt_text": [r[2] or [target] * len(r[3]) for r in queries],
            "tgt_img_path": [r[3] or [""] * len(r[2]) for r in queries],
        }
        (folder / "eval" / name).mkdir(parents=True)
        pq.write_table(pa.table(table), folder / "eval" / name / "test-00000.parquet")


def _of_its_own(row, name: str, place: int, images: Path):
    """The row with pictures of its own: one pixel and the name changed; texts with the data set's name in front."""
    from PIL import Image

    def picture(file):
        copy = f"{place}-{file}"
        if file and not (images / copy).exists():
            image = Image.open(images / file)
            image.putpixel((0, 0), (place, place, place))
            image.save(images / copy)
        return copy if file else ""

    text, file, texts, files = row
    return text, picture(file), texts and [f"{name} {t}" for t in texts], files and [picture(f) for f in files]
