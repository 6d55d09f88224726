"""What lies beside a model's weights and goes with them: configuration, tokenizer, processor, settings."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from vlm2vec.checkpoint import loading

# What a run or a hub repository holds beside a model: not the merged one's.
_NOT_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".index.json", ".md", ".lock", ".gitattributes")
_OF_A_RUN = ("trainer_state.json", "train_result.json", "recipe.yaml", "inputs.json", "adapter_config.json")


def copy_beside(source: str, folder: Path) -> None:
    """Everything of a model's folder but weights and what a run left: configuration, tokenizer, processor, settings."""
    held = Path(source if os.path.isdir(source) else os.path.dirname(loading.file_of(source, "config.json")))
    for path in sorted(held.rglob("*")):
        within = path.relative_to(held)
        hidden_or_run = any(part.startswith((".", "checkpoint-")) for part in within.parts)
        if path.is_file() and not hidden_or_run and not path.name.endswith(_NOT_COPIED) and path.name not in _OF_A_RUN:
            (folder / within).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / within)
