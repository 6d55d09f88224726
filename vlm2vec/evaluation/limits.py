"""How many tokens of a text the published evaluations of MMEB-V3 feed."""

from __future__ import annotations

from typing import Any

from vlm2vec.evaluation.tasks import Task

OFFICIAL = 2048  # of VLM2Vec's evaluation, but for families that say otherwise (`Processing.text_tokens`)
WEMM, WEMM_OF = 8192, {"text": 262144, "gui": 262144}  # of WeMM's, and of single modalities there


def text_limit(model: Any, task: Task, protocol: str, feeding: str) -> int | None:
    """Most tokens of an input without media, the family option `text_max_length`; None where the protocol has none.

    A model that says its own keeps it.

    Example:
        >>> text_limit(model, load_tasks("v3")["text/LongEmbed/narrativeqa"], "v3", "wemm")
        262144
    """
    own = model.options.get("text_max_length")
    if own is not None or protocol != "v3":
        return own
    if feeding == "wemm":
        return WEMM_OF.get(task.modality, WEMM)
    return getattr(model.processing, "text_tokens", OFFICIAL) if hasattr(model, "processing") else OFFICIAL
