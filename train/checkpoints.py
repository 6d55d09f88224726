"""Checkpoints that are whole or not there: written beside, moved into place by one rename, the oldest removed last."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

STAGING = ".saving"
RECIPE = "recipe.yaml"
RESULT = "train_result.json"
INPUTS = "train_inputs.json"
_NAME = re.compile(r"^checkpoint-(\d+)$")
_STATE = {"trainer_state.json", "optimizer.pt", "scheduler.pt"}
_WEIGHTS = {"model.safetensors", "adapter_model.safetensors"}
_SHARDS = "model.safetensors.index.json"


def complete_checkpoints(output: str | Path) -> list[Path]:
    """Checkpoint folders of a run that have all their files, oldest first.

    The rename that names a folder is made when all of it is on disk; files can only be lacking where something else, a
    removal cut short or a copy, touched it.
    """
    return [folder for folder in _named(output) if _is_complete(folder)]


def _named(output: str | Path) -> list[Path]:
    complete = []
    for folder in Path(output).glob("checkpoint-*"):
        match = _NAME.match(folder.name)
        if match and folder.is_dir():
            complete.append((int(match.group(1)), folder))
    return [folder for _, folder in sorted(complete)]


def _is_complete(folder: Path) -> bool:
    present = {file.name for file in folder.iterdir()}
    if not _STATE <= present or not any(name.startswith("rng_state") for name in present):
        return False
    if _SHARDS in present:
        try:
            return set(json.loads((folder / _SHARDS).read_text(encoding="utf-8"))["weight_map"].values()) <= present
        except (ValueError, KeyError):
            return False
    return bool(present & _WEIGHTS)


def step_of(checkpoint: Path) -> int:
    """Steps made when a checkpoint was written, by its name."""
    return int(_NAME.match(checkpoint.name).group(1))


def publish(staged: Path, final: Path) -> None:
    """Moves a written folder into place, on disk before it has its name."""
    for file in staged.rglob("*"):
        if file.is_file():
            _sync_to_disk(file)
    doomed = final.with_name(f"{STAGING}-old-{final.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    if final.exists():  # left from a run that was resumed from an earlier checkpoint
        os.replace(final, doomed)
    os.replace(staged, final)
    _sync_to_disk(final.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def require_whole(checkpoint: Path) -> None:
    """Looks at the ends of a checkpoint's files, where a cut shows, without reading them.

    Raises:
        ValueError: a file is cut off or no such file at all; which one, and what to do.
    """
    mend = f"remove the folder {checkpoint} to go on from the one before it, or from the start"
    for file in sorted(checkpoint.iterdir()):
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt"):
                    pass
            except Exception as error:  # the library has its own type, and others for unreadable files
                raise ValueError(f"{file} is damaged ({error}); {mend}") from error
        elif file.suffix in (".pt", ".pth") and not zipfile.is_zipfile(file):
            raise ValueError(f"{file} is damaged (not a whole file of torch.save); {mend}")


def rotate(output: str | Path, keep: int) -> None:
    """Removes all but the `keep` newest checkpoints."""
    for folder in complete_checkpoints(output)[:-keep]:
        _remove(folder)


def discard(output: str | Path) -> None:
    """Removes every checkpoint, whole or not."""
    for folder in _named(output):
        _remove(folder)


def _remove(folder: Path) -> None:
    """The folder loses its name before its files: what a kill leaves of it is no checkpoint."""
    doomed = folder.with_name(f"{STAGING}-old-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def remove_unfinished(output: str | Path) -> None:
    """Removes what a killed run was writing or deleting."""
    for folder in Path(output).glob(f"{STAGING}*"):
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old one or the new one, never half."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    _sync_to_disk(temporary)
    os.replace(temporary, path)


def read_result(output: str | Path) -> dict[str, Any] | None:
    """What a finished run recorded about itself; None where no run has finished."""
    path = Path(output) / RESULT
    return read_mapping(path) if path.is_file() else None


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON or YAML file of this program.

    Raises:
        ValueError: it cannot be read as one; names the file.
    """
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({' '.join(str(error).split())}); remove it, or pass --fresh") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is damaged (no mapping in it); remove it, or pass --fresh")
    return fields


def _sync_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Some file systems refuse to sync a folder; the rename itself stays atomic there.
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
