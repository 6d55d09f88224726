"""The same rows in every form that a source of own data takes: captions, pictures, negatives, scores, grades and groups."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = [(56, 84), (112, 84), (61, 140), (84, 56)]
TEXTS = ['a red shoe, "left"', "eine Tüte\nim Regen", "007", "NA", "2021-01-01", "  spaced", "12;5", "true"]
SIDES = {
    "query": {"text": "Find: {caption}"},
    "target": {"text": "<|image_1|>\nShow it.\n", "image": "file"},
    "negatives": [{"image": "other"}, {"image": "third"}],
    "scores": ["s0", "s1", "s2"],
    "grade": "grade",
    "group": "product",
}


def write_pictures(folder: Path, count: int = 24) -> Path:
    """JPEGs 000.jpg, ... of four sizes; every fifth one is to be turned by its EXIF orientation. Number 3 is damaged, 4 absent, and
    14 a copy of 10 under another name."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        exif = Image.Exif()
        exif[0x0112] = 6 if number % 5 == 0 else 1
        image.save(folder / f"{number:03}.jpg", quality=80, exif=exif)
    (folder / "003.jpg").write_bytes(b"no picture at all")
    (folder / "004.jpg").unlink()
    (folder / "014.jpg").write_bytes((folder / "010.jpg").read_bytes())
    return folder


def rows(count: int = 24) -> list[dict]:
    """Row i shows picture i; row 5 has no caption; the others' numbers are texts, as a CSV holds them."""
    return [
        {
            "caption": "" if i == 5 else f"{TEXTS[i % len(TEXTS)]} {i}" if i % 3 else TEXTS[i % len(TEXTS)],
            "file": f"{i:03}.jpg",
            "other": f"{(i + 7) % count:03}.jpg" if (i + 7) % count not in (3, 4) else "000.jpg",
            "third": f"{(i + 11) % count:03}.jpg" if (i + 11) % count not in (3, 4) else "001.jpg",
            "s0": str(3.5 + i),
            "s1": "0.25",
            "s2": "-1",
            "grade": str(i / 10),
            "product": f"p{i // 2}",
        }
        for i in range(count)
    ]


def _csv(path: Path, content: list[dict], *, delimiter: str = ",", encoding: str = "utf-8") -> Path:
    with open(path, "w", encoding=encoding, newline="") as file:
        writer = csv.DictWriter(file, list(content[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(content)
    return path


def _bytes(pictures: Path, name: str) -> bytes | None:
    path = pictures / name
    return path.read_bytes() if path.exists() else None


def write_csv(root, pictures, content):
    return {"path": str(_csv(root / "captions.csv", content)), "images": str(pictures)}


def write_semicolons(root, pictures, content):
    return {"path": str(_csv(root / "semicolons.csv", content, delimiter=";", encoding="utf-8-sig")), "images": str(pictures)}


def write_utf16(root, pictures, content):
    return {"path": str(_csv(root / "tabs.tsv", content, delimiter="\t", encoding="utf-16")), "images": str(pictures)}


def write_jsonl(root, pictures, content):
    (root / "captions.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in content), encoding="utf-8")
    return {"path": str(root / "captions.jsonl"), "images": str(pictures)}


def write_json(root, pictures, content):
    (root / "captions.json").write_text(json.dumps({"version": 1, "rows": content}, indent=1), encoding="utf-8")
    return {"path": str(root / "captions.json"), "images": str(pictures)}


def write_parquet(root, pictures, content):
    import datasets

    (root / "parts").mkdir()
    for part in range(2):
        half = content[part * len(content) // 2 : (part + 1) * len(content) // 2]
        datasets.Dataset.from_list(half).to_parquet(root / "parts" / f"part-{part}.parquet")
    return {"path": str(root / "parts" / "part-*.parquet"), "images": str(pictures)}


def _with_images(pictures, content):
    """A `datasets.Dataset` whose pictures are the bytes of their files."""
    import datasets

    names = ("file", "other", "third")
    read = [{name: _bytes(pictures, row[name]) for name in names} for row in content]
    filled = [row | {name: body and {"bytes": body, "path": None} for name, body in one.items()} for row, one in zip(content, read)]
    kinds = {name: datasets.Image() if name in names else datasets.Value("string") for name in content[0]}
    return datasets.Dataset.from_list(filled, features=datasets.Features(kinds))


def write_saved(root, pictures, content):
    import datasets

    datasets.DatasetDict({"train": _with_images(pictures, content)}).save_to_disk(root / "saved")
    return {"path": str(root / "saved")}


def write_hub(root, pictures, content):
    """A folder laid out as the hub's: data/train-00000-of-00001.parquet, image columns as bytes."""
    (root / "hub" / "data").mkdir(parents=True)
    (root / "hub" / "README.md").write_text("---\nconfigs:\n- config_name: shop\n  data_files: data/train-*.parquet\n---\n")
    _with_images(pictures, content).to_parquet(root / "hub" / "data" / "train-00000-of-00001.parquet")
    return {"path": str(root / "hub"), "config": "shop"}


def write_image_folder(root, pictures, content):
    """Pictures with metadata.csv beside them: `file_name` is the column `image`."""
    folder = root / "folder"
    folder.mkdir()
    for file in pictures.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    _csv(folder / "metadata.csv", [{"file_name": row["file"], **{k: v for k, v in row.items() if k != "file"}} for row in content])
    return {"path": str(folder), "target": SIDES["target"] | {"image": "image"}}


def write_shards(root, pictures, content):
    """Two WebDataset shards; texts and numbers in .json, pictures as .jpg, .other.jpg, .third.jpg."""
    for part in range(2):
        with tarfile.open(root / f"shard-{part:03}.tar", "w") as tar:
            for i in range(part * len(content) // 2, (part + 1) * len(content) // 2):
                row = content[i]
                inner = {k: v for k, v in row.items() if k not in ("file", "other", "third")}
                files = {"json": json.dumps(inner).encode(), "jpg": _bytes(pictures, row["file"])}
                files |= {"other.jpg": _bytes(pictures, row["other"]), "third.jpg": _bytes(pictures, row["third"])}
                for ending, body in files.items():
                    if body is not None:
                        info = tarfile.TarInfo(f"./{i:06}.{ending}")
                        info.size = len(body)
                        tar.addfile(info, io.BytesIO(body))
    sides = {"query": {"text": "Find: {json.caption}"}, "target": SIDES["target"] | {"image": "jpg"}}
    sides |= {"negatives": [{"image": "other.jpg"}, {"image": "third.jpg"}], "scores": ["json.s0", "json.s1", "json.s2"]}
    return {"path": str(root / "shard-{000..001}.tar"), **sides, "grade": "json.grade", "group": "json.product"}


FORMS = {
    "CSV": write_csv,
    "CSV with semicolons and a mark": write_semicolons,
    "TSV in UTF-16": write_utf16,
    "JSONL": write_jsonl,
    "JSON": write_json,
    "parquet": write_parquet,
    "save_to_disk": write_saved,
    "hub": write_hub,
    "ImageFolder": write_image_folder,
    "WebDataset": write_shards,
}


def source(form: str, root: Path, pictures: Path, content: list[dict] | None = None) -> dict:
    """A recipe's source of these rows in one form, written below `root`."""
    root.mkdir(parents=True, exist_ok=True)
    return {"name": "shop"} | SIDES | FORMS[form](root, pictures, rows() if content is None else content)
