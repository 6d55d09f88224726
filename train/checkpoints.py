"""Checkpoints that are whole or not there: written beside, moved into place by one rename, the oldest removed last."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import safe_open

from vlm2vec.files import give_umask_mode, sync_to_disk, sync_tree_to_disk, write_json
from vlm2vec.files import write_text as write_text
from vlm2vec.files.documents import read_yaml

STAGING = ".saving"
RECIPE = "recipe.yaml"
RESULT = "train_result.json"
INPUTS = "train_inputs.json"
CHECKSUMS = "checksums.json"
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
    """Moves a written folder into place, on disk and with the checksums of its files before it has its name."""
    give_umask_mode(staged)
    write_json(staged / CHECKSUMS, checksums(staged), durable=False)
    sync_tree_to_disk(staged)
    doomed = final.with_name(f"{STAGING}-old-{final.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    if final.exists():  # left from a run that was resumed from an earlier checkpoint
        os.replace(final, doomed)
    os.replace(staged, final)
    sync_to_disk(final.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def checksums(folder: Path) -> dict[str, str]:
    """{path below the folder: BLAKE2b of its content in hexadecimal}, some gigabytes a second: as many files at once as there are cores."""

    def digest(file: Path) -> str:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "blake2b").hexdigest()

    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != CHECKSUMS)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip((file.relative_to(folder).as_posix() for file in files), pool.map(digest, files)))


def require_whole(checkpoint: Path) -> None:
    """Looks at the ends of a checkpoint's files, where a cut shows, and compares their content with the checksums of when it was written
    (an older checkpoint has none).

    Raises:
        ValueError: a file is cut off, changed, or no such file at all; which one, and what to do.
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
    if not (checkpoint / CHECKSUMS).is_file():
        return
    now = checksums(checkpoint)
    for name, digest in read_mapping(checkpoint / CHECKSUMS).items():
        if now.get(name) != digest:
            what = (
                "not there"
                if name not in now
                else f"damaged (its content is not what the run wrote; was the change yours, remove {CHECKSUMS} beside it)"
            )
            raise ValueError(f"{checkpoint / name} is {what}; {mend}")


@contextlib.contextmanager
def reading(checkpoint: str | Path, name: str) -> Iterator[None]:
    """Around what unpickles tensors of a checkpoint's file: what is no such file, or asks for code to be run, is refused by name."""
    try:
        yield
    except Exception as error:  # torch's advice in it is to run the code
        mend = f"remove the folder {checkpoint} to go on from the one before it, or from the start"
        raise ValueError(
            f"{Path(checkpoint, name)} holds what no checkpoint of ours does ({type(error).__name__}), unread; {mend}"
        ) from None


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
        fields = read_yaml(path)  # JSON is YAML
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it, or pass --fresh") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is damaged (no mapping in it); remove it, or pass --fresh")
    return fields
