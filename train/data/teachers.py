"""`python -m train teach`: a teacher's embeddings of the training rows, which the loss `distillation` reads.

    FOLDER/query.safetensors, FOLDER/target.safetensors        as `vlm2vec embed` writes: "embeddings" (rows, D) float32 and "keys"

A row's key is SOURCE/ROW, the row counted from 0 (`train.losses.teacher`).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from ..command import COMMAND

SIDES = ("query", "target")


def main(argv: list[str]) -> int:
    """Embeds both sides of a recipe's rows with a teacher."""
    from vlm2vec.commands import common

    from ..recipe.checks import require_own_names
    from ..recipe.schema import load_recipe

    parser = argparse.ArgumentParser(
        prog=f"{COMMAND} teach",
        description="A teacher's embeddings of the training rows of a recipe, for `loss: {name: distillation, teacher: ...}`.",
        allow_abbrev=False,
        epilog="Any other --key value overrides a key of the recipe, as in a run. RECIPE goes first.",
    )
    parser.add_argument("recipe")
    parser.add_argument("--teacher", required=True, help="checkpoint folder or hub name of the teacher")
    parser.add_argument("--folder", "-o", required=True, help="where query.safetensors and target.safetensors go")
    parser.add_argument("--batch-size", type=int, default=32)
    common.add_model_arguments(parser)
    known, overrides = parser.parse_known_args(argv)
    recipe = load_recipe(known.recipe, overrides)
    require_own_names(recipe.data.sources, f"{COMMAND} teach")
    for side in SIDES:
        common.require_own_output(os.path.join(known.folder, f"{side}.safetensors"), known.teacher)
    teach(recipe, common.load_model(known.teacher, known), known.teacher, Path(known.folder), batch_size=known.batch_size)
    return 0


def teach(recipe, teacher, name: str, folder: Path, *, batch_size: int = 32) -> None:
    """Writes the vectors of every row that can be read, held-out ones too; equal contents are encoded once."""
    from vlm2vec.commands import common

    from .contents import content_id
    from .sources import open_source

    options = teacher.processing.options
    frames = options["frames"] if options["fps"] is None else options["max_frames"]
    keys: list[list[str]] = [[], []]
    ids: list[list[int]] = [[], []]
    contents: list[dict[int, dict]] = [{}, {}]
    for source in recipe.data.sources:
        table = open_source(recipe.data, source)
        for row in range(len(table)):
            try:
                sides = table.row(row, frames)[:2]
                numbered = [(content_id(item), item) for item in sides]
            except Exception as error:  # as in training, a row of a wrong shape raises whatever comes
                print(f"left out {source.name}, row {row}: {error}")
                continue
            for side, (number, item) in enumerate(numbered):
                keys[side].append(f"{source.name}/{row}")
                ids[side].append(number)
                contents[side].setdefault(number, item)
    folder.mkdir(parents=True, exist_ok=True)
    for side, about in enumerate(SIDES):
        numbers = list(contents[side])
        vectors, left = common.encode_named(
            teacher,
            list(contents[side].values()),
            list(map(str, numbers)),
            skip_bad=True,
            what="content",
            batch_size=batch_size,
            keep_on="cpu",  # rows of a whole mixture are more than a GPU holds beside a teacher
        )
        place = {int(number): at for at, number in enumerate(left)}
        rows = [(key, place[number]) for key, number in zip(keys[side], ids[side]) if number in place]
        path = folder / f"{about}.safetensors"
        told = {"model": name, "prompt": "", "as": "", "normalized": True}
        vectors = vectors[torch.tensor([at for _, at in rows])]
        common.write_embeddings(os.fspath(path), vectors, [key for key, _ in rows], told, common.model_told(teacher))
        print(f"{path}: {len(rows)} rows, {len(left)} contents, {vectors.shape[1]} dimensions")
