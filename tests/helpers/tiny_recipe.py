"""A tiny model, a Qwen2-VL unless another family is asked for, rows in MMEB's layout with JPEGs of several sizes, and recipes over them."""

from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from tests.helpers import tiny_models
from vlm2vec.data.mmeb import write_train

SIZES = [(56, 56), (84, 56), (112, 84), (61, 140), (20, 90)]  # the last two are resized, the last one squared


def write_data(root: Path, rows: int = 24) -> dict:
    """Two sources: pictures against captions, and texts against texts. Returns a recipe's `data` section."""
    generator = np.random.default_rng(0)
    images = root / "images"
    images.mkdir(parents=True)
    pictured, texts = [], []
    for row in range(rows):
        width, height = SIZES[row % len(SIZES)]
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{row}.jpg", quality=80)
        pictured.append(
            {
                "qry": "<|image_1|>\nWhat is shown?\n" + "word " * (row % 7),
                "qry_image_path": f"{row}.jpg",
                "pos_text": f"picture {row}",
                "pos_image_path": "",
                "neg_text": f"other {row}",
                "neg_image_path": "",
            }
        )
        texts.append({"qry": f"question {row} " * (row % 5 + 1), "qry_image_path": "", "pos_text": f"answer {row}", "pos_image_path": ""})
    write_train(root / "train", "Pictures", pictured)
    write_train(root / "train", "Texts", texts)
    return {"root": str(root / "train"), "images": str(images), "sources": [{"name": "Pictures", "weight": 2.0}, {"name": "Texts"}]}


def write_recipe(root: Path, family: str = "qwen2_vl", **changes) -> Path:
    """Model and data below `root` (made once) and a recipe that trains four steps on them."""
    if not (root / "model").is_dir():
        (root / "model").mkdir(parents=True)
        tiny_models.BUILDERS[family](root / "model")
        (root / "data.yaml").write_text(yaml.safe_dump(write_data(root)))
    recipe = {
        "model": str(root / "model"),
        "output": str(root / "output"),
        "data": yaml.safe_load((root / "data.yaml").read_text()),
        "steps": 4,
        "global_batch": 8,
        "interleave_batch_size": 4,
        "chunk_tokens": 200,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "cpu": True,
    } | changes
    path = Path(recipe["output"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    return path


def first_batch(recipe, model, step: int = 0, processing=None):
    """The whole global batch of a step, collated."""
    from train.data.rows import PairDataset, collate
    from train.data.sampler import BlockSampler

    dataset = PairDataset(recipe.data, processing or model.processing)
    sampler = BlockSampler(
        dataset.sizes,
        [s.weight for s in recipe.data.sources],
        global_batch=recipe.global_batch,
        block=recipe.interleave_batch_size,
        steps=recipe.steps,
        seed=recipe.seed,
    )
    return collate([dataset[key] for key in sampler.batch(step)])


def gradients(model) -> dict:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
