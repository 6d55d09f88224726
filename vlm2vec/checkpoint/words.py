"""The words around a query and around a document: one place for `embed`, `search`, `index`, the model card and the README.

A model that has prompts of its own (`model.prompts`) is fed by those. Others were trained on MMEB's words, and find nothing by bare
ones: what is being asked stands in front of a query, and beside a picture that is to be found. Texts that are to be found are bare.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from torch import nn

from vlm2vec.checkpoint.prompts import layout
from vlm2vec.inputs import Item, as_item

ROLES = ("query", "document")
# MMEB's words for a search among pictures (MSCOCO_t2i, NIGHTS, MSCOCO_t2i), MMEB-V2's for films (MSR-VTT)
FIND_BY_TEXT = "Find me an everyday image that matches the given caption:"
FIND_BY_IMAGE = "Find a day-to-day image that looks similar to the provided image."
IMAGE = "Represent the given image."
VIDEO = "Understand the content of the provided video."


def said_as(model: nn.Module, inputs: list, role: str) -> tuple[list, str | None]:
    """(inputs, prompt) as they are encoded for a role: with the model's own prompt for it, else in MMEB's words.

    An input that has words of its own beside its picture, or an instruction, is left as it is.

    Args:
        role: "query" or "document".
    """
    if model.prompts.get(role):
        return inputs, model.prompts[role]
    return [in_mmebs_words(x, role, model.processing.markers) for x in inputs], None


def in_mmebs_words(x: Any, role: str, native: dict[str, str] | None = None) -> Any:
    """An input in MMEB's words; ValueErrors of an input that cannot be read are left to who encodes it."""
    try:
        item = as_item(x, native or {})
    except ValueError:
        return x
    if item.instruction is not None or (item.visuals and not item.markers_added):
        return x
    words = _words(item, role)
    if words is None:
        return x
    if "\n" in item.text and item.visuals:  # a text follows the marker, or there are several
        return x
    return replace(item, text=layout(words, item.text, "space" if item.videos else "image"), markers_added=False)


def _words(item: Item, role: str) -> str | None:
    if item.videos:
        return VIDEO
    if item.images:
        return FIND_BY_IMAGE if role == "query" else IMAGE
    return FIND_BY_TEXT if role == "query" and item.text.strip() else None


def example(source: str, prompts: dict[str, str]) -> list[str]:
    """Lines of Python that compare a caption with a picture, as `search` does: for a model card.

    Args:
        prompts: the model's own.
    """
    if any(prompts.get(role) for role in ROLES):
        made = ['queries = model.encode_query(["a caption"])', 'documents = model.encode_document([{"image": "picture.jpg"}])']
    else:
        query, document = in_mmebs_words("a caption", "query"), in_mmebs_words({"image": "picture.jpg"}, "document")
        made = [
            f"queries = model.encode([{json.dumps(query.text)}])",
            f'documents = model.encode([{{"text": {json.dumps(document.text)}, "image": "picture.jpg"}}])',
        ]
    head = ["from vlm2vec import VLM2Vec", "", f"model = VLM2Vec.from_pretrained({json.dumps(source)})"]
    return [*head, *made, "print(model.similarity(queries, documents))"]
