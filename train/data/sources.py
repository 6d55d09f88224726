"""The sources of a mixture: rows of every format as (query, target, negatives), from local folders or the hub.

Formats, with the strings of VLM2Vec-V2's training data:
    mmeb              MMEB's own columns
    page_question     picture of a page and a question about it -> its answer (columns image, query, answer)
    visrag            a question -> the page that answers it, with an instruction for each `source` (query, image, source)
    video_to_caption, caption_to_video, video_question
                      conversations of one human and one model turn about a folder of frames (id, video, conversations)

Tables stay on disk: hub data sets and large local ones are Arrow files that `datasets` maps into memory.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vlm2vec.data.mmeb import TRAIN_COLUMNS, read_train, to_item
from vlm2vec.media.videos import IMAGE_SUFFIXES

from ..recipe.files import MIXTURES
from ..recipe.schema import Data, Source

Row = tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]  # what the model's processing takes: query, target, negatives

_IN_MEMORY_BYTES = 64 << 20  # a local table up to this size is read whole, and every row of it checked at the start
_COLUMNS = {
    "mmeb": TRAIN_COLUMNS[:4],
    "page_question": ("image", "query", "answer"),
    "visrag": ("query", "image", "source"),
    **dict.fromkeys(("video_to_caption", "caption_to_video", "video_question"), ("video", "conversations")),
}


def open_source(data: Data, source: Source) -> SourceTable:
    """A source of a recipe, cut to its number of rows.

    Raises:
        ValueError: no such data set, or one without the columns of its format.
    """
    table = _table(data, source)
    absent = [c for c in _COLUMNS[source.format] if c not in table.column_names]
    if absent:
        raise ValueError(
            f"source {source.name}: format {source.format} needs column {absent[0]!r}, the data has {', '.join(table.column_names)}"
        )
    rows = source.rows if source.rows is not None else data.rows
    if rows is not None:
        table = table.select(range(min(rows, len(table))))
    return SourceTable(table, source.format, source.images or data.images)


class SourceTable:
    """Rows of one source; `table[i]` reads row i and opens nothing."""

    def __init__(self, table: Any, format: str, images: str):
        self.table, self.images = table, images
        self._convert: Callable[[dict, str, int], Row] = _CONVERSIONS[format]

    def __len__(self) -> int:
        return len(self.table)

    def row(self, index: int, frames: int) -> Row:
        """Row `index`; a video gives so many of its frames.

        Raises:
            ValueError: the row has not what its format says.
        """
        return self._convert(self.table[index], self.images, frames)


def _table(data: Data, source: Source) -> Any:
    root, split = source.root or data.root, source.split or data.split
    if source.format == "mmeb" and os.path.isdir(root) and source.file is None:
        files = sorted(Path(root, source.name).glob(f"{split}-*.parquet"))
        if sum(file.stat().st_size for file in files) <= _IN_MEMORY_BYTES:
            return read_train(root, source.name, split=split)
        return _load("parquet", data_files=[os.fspath(file) for file in files], split="train")
    if source.file is not None:
        local = os.path.join(root, source.file)
        return _load("json", data_files=local if os.path.isdir(root) else f"hf://datasets/{root}/{source.file}", split="train")
    if os.path.isdir(root):
        files = sorted(os.fspath(f) for f in Path(root).rglob(f"{split}-*.parquet"))
        if not files:
            raise ValueError(
                f"source {source.name}: no {split}-*.parquet below {root}; download the data set again, or mend `root` or `split`"
            )
        return _load("parquet", data_files=files, split="train")
    if os.path.isabs(root) or root.startswith("."):
        raise ValueError(f"source {source.name}: no such folder as {root}; mend `root`, or name a data set of the hub")
    return _load(root, *([source.name] if source.format == "mmeb" else []), split=split)


def _load(*names: str, **options: Any) -> Any:
    import datasets

    try:
        table = datasets.load_dataset(*names, **options)
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise ValueError(
            f"data set {' '.join(names)} cannot be loaded ({str(error).splitlines()[0]}); is it there, and is the network?"
        ) from error
    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))  # the encoded file; decoded where it is needed
    return table


# From a row of each format


def _mmeb(values: dict, images: str, frames: int) -> Row:
    query = to_item(values["qry"], values["qry_image_path"], images)
    target = to_item(values["pos_text"], values["pos_image_path"], images)
    return query, target, [to_item(text, image, images) for text, image in _negatives(values)]


def _negatives(values: dict[str, Any]) -> list[tuple[str, str]]:
    texts, images = values.get("neg_text") or "", values.get("neg_image_path") or ""
    texts = texts if isinstance(texts, list) else [texts]
    images = images if isinstance(images, list) else [images]
    count = max(len(texts), len(images))
    texts, images = texts + [""] * (count - len(texts)), images + [""] * (count - len(images))
    return [pair for pair in zip(texts, images, strict=True) if any(pair)]


def _page_question(values: dict, images: str, frames: int) -> Row:
    query = {"text": f"<|image_1|> {values['query']}", "image": _encoded(values["image"])}
    return query, {"text": str(values["answer"]), "image": None}, []


def _visrag(values: dict, images: str, frames: int) -> Row:
    about_query, about_page = _visrag_prompts().get(values["source"], ("", ""))
    # The published strings: blanks stand around the query and before the marker, one more behind an instruction.
    query = f"{about_query} {values['query']} " if about_query else f"{values['query']} "
    target = f"{about_page}  <|image_1|>" if about_page else " <|image_1|>"
    return {"text": query, "image": None}, {"text": target, "image": _encoded(values["image"])}, []


@functools.cache
def _visrag_prompts() -> dict[str, tuple[str, str]]:
    prompts = yaml.safe_load((MIXTURES / "visrag-prompts.yaml").read_text(encoding="utf-8"))
    return {name: tuple(pair) for name, pair in prompts.items()}


def _video_to_caption(values: dict, images: str, frames: int) -> Row:
    human, answer = _turns(values)
    return {"text": human.replace("<video>", "<|video_1|>"), "video": _frames(values, images, frames)}, {"text": answer, "image": None}, []


def _caption_to_video(values: dict, images: str, frames: int) -> Row:
    _, caption = _turns(values)
    query = {"text": f"Find a video that contains the following visual content: {caption}", "image": None}
    target = {"text": "Understand the content of the provided video: <|video_1|>", "video": _frames(values, images, frames)}
    return query, target, []


def _video_question(values: dict, images: str, frames: int) -> Row:
    human, answer = _turns(values)
    text = "Answer a question based on the content of a video. " + human.replace("<video>", "<|video_1|>")
    return {"text": text, "video": _frames(values, images, frames)}, {"text": answer, "image": None}, []


_CONVERSIONS = {
    "mmeb": _mmeb,
    "page_question": _page_question,
    "visrag": _visrag,
    "video_to_caption": _video_to_caption,
    "caption_to_video": _caption_to_video,
    "video_question": _video_question,
}


def _turns(values: dict) -> tuple[str, str]:
    """The human's and the model's turn, the video's marker in the former."""
    said = {turn["from"]: turn["value"] for turn in reversed(values["conversations"])}
    if not {"human", "gpt"} <= said.keys():
        raise ValueError(f"a conversation of {sorted(said)} turns; expected one of human and gpt")
    human = said["human"]
    return human if "<video>" in human else f"<video>\n{human}", said["gpt"]


def _frames(values: dict, images: str, count: int) -> list[str]:
    """Paths of `count` frames of a row's video, spread by whole numbers as the reference picks them."""
    folder = os.path.join(images, values["video"])
    names = sorted(n for n in os.listdir(folder) if n.lower().endswith(IMAGE_SUFFIXES)) if os.path.isdir(folder) else []
    if not names:
        raise ValueError(f"no frames in {folder}; unpack the frames of the video below `images`")
    picked = range(len(names)) if len(names) <= count else np.linspace(0, len(names) - 1, count).astype(int)
    return [os.path.join(folder, names[i]) for i in picked]


def _encoded(image: Any) -> Any:
    """A picture's file as bytes, or its path; None stands for no picture, which is an error where a marker asks for one."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if image is None:
        raise ValueError("the row's picture is missing")
    return image if isinstance(image, bytes) else Path(image)
