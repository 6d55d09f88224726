"""Published formats of training rows, one entry each in `FORMATS`: the columns a row must have and how it becomes inputs of the model.
Columns of one's own are `vlm2vec.data.sides`.

The strings around texts are those of VLM2Vec-V2's training data. A new format is one function and one entry here.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlm2vec.data.mmeb import TRAIN_COLUMNS, to_item
from vlm2vec.media.sampling import frame_files, sample

VISRAG_PROMPTS = Path(__file__).with_name("visrag_prompts.yaml")

Row = tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]  # what the model's processing takes: query, target, negatives


@dataclass(frozen=True)
class RowFormat:
    """What a row holds.

    Attributes:
        meaning: one line for people.
        columns: those that a table must have.
        convert: (values of a row, folder of images, frames of a film) -> `Row`; opens nothing. ValueError for a row that
            has not what the format says.
    """

    meaning: str
    columns: tuple[str, ...]
    convert: Callable[[dict[str, Any], str, int | None], Row]


def _mmeb(values: dict[str, Any], images: str, frames: int | None) -> Row:
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


def _page_question(values: dict[str, Any], images: str, frames: int | None) -> Row:
    query = {"text": f"<|image_1|> {values['query']}", "image": _encoded(values["image"])}
    return query, {"text": str(values["answer"]), "image": None}, []


def _visrag(values: dict[str, Any], images: str, frames: int | None) -> Row:
    about_query, about_page = _visrag_prompts().get(values["source"], ("", ""))
    # The published strings: blanks stand around the query and before the marker, one more behind an instruction.
    query = f"{about_query} {values['query']} " if about_query else f"{values['query']} "
    target = f"{about_page}  <|image_1|>" if about_page else " <|image_1|>"
    return {"text": query, "image": None}, {"text": target, "image": _encoded(values["image"])}, []


@functools.cache
def _visrag_prompts() -> dict[str, tuple[str, str]]:
    prompts = yaml.safe_load(VISRAG_PROMPTS.read_text(encoding="utf-8"))
    return {name: tuple(pair) for name, pair in prompts.items()}


def _video_to_caption(values: dict[str, Any], images: str, frames: int | None) -> Row:
    human, answer = _turns(values)
    return {"text": human.replace("<video>", "<|video_1|>"), "video": _frames(values, images, frames)}, {"text": answer, "image": None}, []


def _caption_to_video(values: dict[str, Any], images: str, frames: int | None) -> Row:
    _, caption = _turns(values)
    query = {"text": f"Find a video that contains the following visual content: {caption}", "image": None}
    target = {"text": "Understand the content of the provided video: <|video_1|>", "video": _frames(values, images, frames)}
    return query, target, []


def _video_question(values: dict[str, Any], images: str, frames: int | None) -> Row:
    human, answer = _turns(values)
    text = "Answer a question based on the content of a video. " + human.replace("<video>", "<|video_1|>")
    return {"text": text, "video": _frames(values, images, frames)}, {"text": answer, "image": None}, []


def _turns(values: dict[str, Any]) -> tuple[str, str]:
    """The human's and the model's turn, the video's marker in the former."""
    said = {turn["from"]: turn["value"] for turn in reversed(values["conversations"])}
    if not {"human", "gpt"} <= said.keys():
        raise ValueError(f"a conversation of {sorted(said)} turns; expected one of human and gpt")
    human = said["human"]
    return human if "<video>" in human else f"<video>\n{human}", said["gpt"]


def _frames(values: dict[str, Any], images: str, count: int | None) -> list[str]:
    """Paths of `count` frames of a row's video."""
    folder = os.path.join(images, values["video"])
    stored = frame_files(folder)
    if not stored:
        raise ValueError(f"no frames in {folder}; unpack the frames of the video below `images`")
    return sample(stored, count)


def _encoded(image: Any) -> Any:
    """A picture's file as bytes, or its path; None stands for no picture, which is an error where a marker asks for one."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if image is None:
        raise ValueError("the row's picture is missing")
    return image if isinstance(image, bytes) else Path(image)


_CONVERSATION = ("video", "conversations")
FORMATS: dict[str, RowFormat] = {
    "mmeb": RowFormat("MMEB's own columns", TRAIN_COLUMNS[:4], _mmeb),
    "page_question": RowFormat("picture of a page and a question about it -> its answer", ("image", "query", "answer"), _page_question),
    "visrag": RowFormat(
        "a question -> the page that answers it, with an instruction for each `source`", ("query", "image", "source"), _visrag
    ),
    "video_to_caption": RowFormat("frames of a film and a human's turn -> the model's turn", _CONVERSATION, _video_to_caption),
    "caption_to_video": RowFormat("the model's turn about a film -> its frames", _CONVERSATION, _caption_to_video),
    "video_question": RowFormat("frames of a film and a question about it -> the model's turn", _CONVERSATION, _video_question),
}
