"""What a score was made with: all settings, the model's and the data's fingerprints, and versions. It stands under "run" in score files.

It holds no time and no host, so that two runs of one thing write the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from vlm2vec.checkpoint.release import __version__
from vlm2vec.evaluation.tasks.task_data import whole
from vlm2vec.files import AnyPath
from vlm2vec.media.sampling import FrameRule

if TYPE_CHECKING:
    pass

FORMAT = 1
LIBRARIES = ("torch", "torchvision", "transformers", "tokenizers", "peft", "Pillow", "numpy", "av")
EXAMPLE = 160  # characters of a first input


@lru_cache(maxsize=1)
def versions() -> dict[str, str | None]:
    """{library: version} of what a vector may depend on; None for what is not installed."""
    found: dict[str, str | None] = {"vlm2vec": __version__}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def digest(parts: Iterable[Any]) -> str:
    """Hex digest of JSON-able parts, or of bytes, in their order."""
    whole = hashlib.blake2b(digest_size=12)
    for part in parts:
        content = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, default=str).encode()
        whole.update(len(content).to_bytes(8, "little"))
        whole.update(content)
    return whole.hexdigest()


def model_record(model: Any, identity: dict[str, Any]) -> dict[str, Any]:
    """A model in short: fingerprints of its parts, and the family options in force whole, since limits and frames are among them.

    Args:
        identity: `evaluation.encode.keys.model_identity` of it.
    """
    whole = ("family", "class", "dtype", "options", "prompts", "weights", "tokenizer")
    told = {name: identity[name] for name in whole if identity.get(name) is not None}
    parts = {name: digest([identity[name]]) for name in ("config", "adapter", "image_processor", "processor") if identity.get(name)}
    rest = {name: value for name, value in identity.items() if name not in {*whole, *parts, "vlm2vec"} and value is not None}
    return {
        "name": str(getattr(model, "source", "") or ""),
        "revision": getattr(model, "revision", None),
        **told,
        **parts,
        **({"other": digest([rest])} if rest else {}),
    }


def data_record(prepared: Any) -> dict[str, Any]:
    """A task's data in short: how much there is, and fingerprints of texts, media and answers apart, to say what differs."""
    data = prepared.data
    return {
        "queries": len(data.queries),
        "candidates": len(data.candidates),
        **prepared.contents,
        "answers": digest([data.label_names, data.grades, *([] if data.local is None else data.local)]),
        "first_query": _example(data.queries),
        "first_candidate": _example(data.candidates),
        "affected_rows": data.problems.summary().get("affected_rows", 0),
    }


def _example(items: list[dict[str, Any]]) -> str:
    return (whole(items[0]).get("text") or "")[:EXAMPLE] if items else ""


def _place(folder: AnyPath | None) -> str | None:
    return None if folder is None else os.fspath(folder)


def run_record(
    model: Any, identity: dict[str, Any], prepared: Any, options: Any, folders: tuple[AnyPath | None, AnyPath]
) -> dict[str, Any]:
    """All of a task's run, JSON-able.

    Args:
        identity: of the model as it reads this task's media. prepared, options: a `runner.Prepared` and `runner.Options`.
        folders: of annotations and of media, as they were given.
    """
    task = prepared.data.task
    rule = task.options.get("frame_rule") or FrameRule()
    settings = {
        "protocol": options.protocol,
        "feeding": options.feeding,
        "frames": str(rule),
        "frames_everywhere": rule.whole_too,
        "prompt": options.prompt,
        "pictures": dict(options.pictures),
        "strict": options.strict,
        "batch_size": options.batch_size,
        "top": options.top,
        "device": str(options.device or getattr(model, "device", "cpu")).split(":")[0],
    }
    told = {
        "name": task.name,
        "modality": task.modality,
        "loader": task.loader,
        "metric": task.metric,
        "candidates": task.candidates,
        "query_prompt": task.query_prompt,
        "target_prompt": task.target_prompt,
        "options": {name: value for name, value in task.options.items() if name != "frame_rule"},
    }
    record = {
        "format": FORMAT,
        "settings": settings,
        "model": model_record(model, identity),
        "task": told,
        "data": {"folder": _place(folders[0]), "media_folder": _place(folders[1]), **data_record(prepared)},
        "versions": versions(),
    }
    return json.loads(json.dumps(record, sort_keys=True, default=str))
