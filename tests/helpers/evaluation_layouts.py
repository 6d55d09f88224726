"""Small data folders in every layout, and a model whose vectors are a pure function of the input's content."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image


class StubModel:
    """Deterministic vectors from text and file bytes; counts what it encodes. Every input that shares a `tag` in its text
    ("tag:x") points in the same direction, so that tasks have right answers."""

    def __init__(self, dim=24, seed=0, noise=1.4, fail_after=None):
        self.dim, self.seed, self.noise, self.fail_after = dim, seed, noise, fail_after
        self.encoded = []

    def identity(self):
        return {"stub": self.seed, "dim": self.dim}

    def preprocess(self, inputs):
        from vlm2vec.media.images import open_picture

        for item in inputs:
            for name in ("image", "video"):
                visuals = item.get(name) or []
                for visual in visuals if isinstance(visuals, list) else [visuals]:
                    open_picture(visual)

    def _vector(self, *parts):
        digest = hashlib.blake2b(repr((self.seed, *parts)).encode(), digest_size=8).digest()
        return torch.randn(self.dim, generator=torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1))

    def encode(self, inputs, *, batch_size=32, convert_to_tensor=True, show_progress_bar=None, prompt=None):
        self.preprocess(inputs)
        out = []
        for item in inputs:
            visuals = item.get("image") or item.get("video") or []
            content = [Path(v).read_bytes() for v in (visuals if isinstance(visuals, list) else [visuals])]
            tags = [word for word in (item.get("text") or "").split() if word.startswith("tag:")]
            vector = self.noise * self._vector(prompt, item.get("text"), content)
            for tag in tags:
                vector = vector + self._vector(tag)
            out.append(vector)
            self.encoded.append((item.get("text"), str(visuals)))
            if self.fail_after is not None and len(self.encoded) > self.fail_after:
                raise KeyboardInterrupt
        return torch.nn.functional.normalize(torch.stack(out), dim=-1)


def picture(path, seed, size=(32, 24)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def mmeb(root, name="ImageNet-1K", rows=20, candidates=12, pictures=True, offset=0):
    """An MMEB folder: ROOT/eval/{name}, ROOT/images; row i's answer is label i % candidates, put first."""
    texts = []
    for i in range(rows):
        order = [(i + j) % candidates for j in range(candidates)]
        texts.append([f"label tag:{c + offset}" for c in order])
        if pictures:
            picture(root / "images" / name / f"{i}.png", i + 1000 * offset)
    parquet(
        root / "eval" / name / "test-00000.parquet",
        qry_text=[f"<|image_1|>\nWhat is it? tag:{i % candidates + offset}\n" for i in range(rows)],
        qry_img_path=[f"{name}/{i}.png" if pictures else "" for i in range(rows)],
        tgt_text=texts,
        tgt_img_path=[[""] * candidates for _ in range(rows)],
    )
    return root / "eval", root / "images"


def documents(root, name="ViDoRe_arxivqa", pages=30, queries=12):
    """A BEIR folder with graded labels; page images inside the table."""
    rng = np.random.default_rng(3)
    folder = root / "eval" / name
    raw = []
    for p in range(pages):
        picture(root / "tmp.png", 5000 + p)
        raw.append({"bytes": (root / "tmp.png").read_bytes(), "path": None})
    parquet(folder / "corpus" / "test-00000.parquet", **{"corpus-id": [f"p{p}" for p in range(pages)], "image": raw})
    parquet(
        folder / "queries" / "test-00000.parquet",
        **{"query-id": list(range(queries)), "query": [f"what about tag:{q}" for q in range(queries)]},
    )
    rows = [(q, f"p{p}", int(rng.integers(0, 4))) for q in range(queries) for p in rng.choice(pages, 4, replace=False)]
    rows += [(0, rows[0][1], 3), (1, "gone", 2)]
    q, c, s = zip(*rows)
    parquet(folder / "qrels" / "test-00000.parquet", **{"query-id": list(q), "corpus-id": list(c), "score": list(s)})
    return rows


def frames(folder, count, seed):
    for i in range(count):
        picture(folder / f"frame_{i + 1}.jpg", seed + i, (16, 16))


def files(folder):
    """All score and prediction files, by name."""
    return {
        str(p.relative_to(folder)): p.read_text().replace(str(folder), "OUT")
        for p in sorted(folder.rglob("*"))
        if p.is_file()
        and p.suffix in (".json", ".jsonl", ".txt")
        and "embeddings" not in p.parts
        and "tasks" not in p.parts
        and p.name != "summary.json"
    }


def shards(folder):
    """The shards of an output's store: when each was written, to the nanosecond, and as which file."""
    found = ((p.name, p.stat()) for p in (folder / "embeddings").rglob("shard-*.safetensors"))
    return {name: (stat.st_mtime_ns, stat.st_ino) for name, stat in found}
