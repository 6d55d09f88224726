"""Arguments and file walking that several commands share."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from typing import TYPE_CHECKING, Any

from vlm2vec.data.bulk.inputs import rooted
from vlm2vec.data.index import identity
from vlm2vec.data.json_lines import read_json_lines
from vlm2vec.files import replacing
from vlm2vec.files.documents import shown
from vlm2vec.files.walk import files_below
from vlm2vec.inputs import VISUAL_KEYS
from vlm2vec.media.endings import PICTURES

if TYPE_CHECKING:
    import torch

    from vlm2vec.model import VLM2Vec


_FINITE_BLOCK = 65_536  # rows that are looked at together
MOST_NAMED = 20  # inputs left out that are named one by one


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", help="base model of a PEFT adapter, when its config names another")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: the model's)")
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, ... (default: a GPU when there is one)")
    parser.add_argument("--attn", default=None, help="auto, sdpa, flash_attn_4, flash_attn or varlen")
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the family, e.g. --option positions=mrope --option num_crops=16; may be repeated",
    )


def parse_options(pairs: list[str]) -> dict:
    """NAME=VALUE pairs; values are JSON where they can be, else text."""
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--option {pair!r}: expected NAME=VALUE")
        try:
            options[name] = json.loads(value)
        except (ValueError, RecursionError):
            options[name] = value
    return options


def load_model(name: str, args: argparse.Namespace) -> VLM2Vec:
    from vlm2vec import VLM2Vec

    model = VLM2Vec.from_pretrained(
        name, base=args.base, dtype=args.dtype, device=args.device, attn=args.attn, **parse_options(args.option)
    )
    return model.merge_adapter()


def encode_named(
    model: VLM2Vec, inputs: list, keys: list[str], *, skip_bad: bool = False, what: str = "input", **options: Any
) -> tuple[torch.Tensor, list[str]]:
    """(embeddings (N, D), keys) of inputs that have names, which errors hold. What cannot be read is left out where it is asked for.

    Args:
        skip_bad: leave out inputs that cannot be read, and tell on stderr how many and which.

    Raises:
        ValueError: an input that cannot be read, by its key; with `skip_bad`, none can be.
    """
    from vlm2vec import encoding

    bad: dict[int, str] | None = {} if skip_bad else None
    options = {"prompt": None, "batch_size": 32, "truncate_dim": None, "urls": False, **options}
    try:
        rows = encoding.encode(
            model, inputs, show_progress_bar=None, convert_to_tensor=True, normalize_embeddings=True, unreadable=bad, **options
        )
    except ValueError as e:
        raise ValueError(_named(str(e), keys)) from e
    if not bad:
        return rows, keys
    worst = min(bad)
    if len(bad) == len(inputs):
        raise ValueError(f"none of the {len(inputs)} {what}s can be read, {keys[worst]} because of: {bad[worst]}")
    tell_left_out({keys[place]: bad[place] for place in sorted(bad)}, len(inputs), what)
    good = [place for place in range(len(inputs)) if place not in bad]
    return rows[good], [keys[place] for place in good]


def tell_left_out(bad: dict[str, str], total: int, what: str) -> None:
    """On stderr: how many of `total` were left out, and the first of them with why, {key: why}."""
    print(f"left out {len(bad)} of {total} {what}s that cannot be read:", file=sys.stderr)
    for key, reason in list(bad.items())[:MOST_NAMED]:
        print(f"  {reason if f'{key}:' in reason else f'{key}: {reason}'}"[:500], file=sys.stderr)
    if len(bad) > MOST_NAMED:
        print(f"  and {len(bad) - MOST_NAMED} more", file=sys.stderr)


def _named(message: str, keys: list[str]) -> str:
    """ "input 3: ..." with the key of input 3 beside it."""
    head, colon, rest = message.partition(":")
    number = head.removeprefix("input ")
    return f"{head} ({keys[int(number)]}):{rest}" if colon and number.isdigit() and int(number) < len(keys) else message


def images_below(folder: str) -> list[str]:
    """Image files in a folder and below it, in order of their paths."""
    if not os.path.isdir(folder):
        raise ValueError(f"{folder}: no such folder of images")
    pictures = sorted(found.path for found in files_below(folder, PICTURES))
    if not pictures:
        raise ValueError(f"{folder}: no images in it ({', '.join(PICTURES)})")
    return pictures


def read_jsonl(path: str, root: str | None = None) -> tuple[list[str], list[dict]]:
    """Keys and inputs of a JSONL: objects with text, image, video, instruction; "key" (or "id") names the row, else its number.

    Relative media paths are taken from `root`, by default the file's own folder.
    """
    root = os.path.dirname(os.path.abspath(path)) if root is None else root
    keys, inputs = [], []
    for number, row in read_json_lines(path):
        if isinstance(row, str):
            row = {"text": row}
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: expected an object with text, image, video or instruction")
        row = dict(row)
        key = row.pop("key", row.pop("id", None))
        for kind in VISUAL_KEYS:
            if row.get(kind):
                try:
                    row[kind] = rooted(root, row[kind])
                except TypeError:
                    raise ValueError(f"{path}, line {number}: {kind} should be a path or a list of paths, got {shown(row[kind])}") from None
        keys.append(str(number - 1) if key is None else str(key))
        inputs.append(row)
    if not inputs:
        raise ValueError(f"{path}: no rows")
    return keys, inputs


def require_own_output(path: str, model: str) -> None:
    """ValueError where an embeddings file would replace something else: a model's weights, or any file that embed did not write."""
    folder, name = os.path.split(os.path.abspath(path))
    if os.path.isdir(path):
        raise ValueError(f"--output {path} is a folder; name a file in it, such as {os.path.join(path, 'embeddings.safetensors')}")
    if os.path.isfile(path) and not _is_embeddings(path):
        raise ValueError(f"--output {path} is there and is no file of embeddings (a model's weights?); choose another name, or remove it")
    weights = re.fullmatch(r"(model|adapter_model|pytorch_model|consolidated).*", name)
    if weights and (os.path.isfile(os.path.join(folder, "config.json")) or os.path.realpath(folder) == os.path.realpath(model)):
        raise ValueError(f"--output {path} has the name of a model's weights in a model's folder; choose another name")


def _is_embeddings(path: str) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as f:
            return "keys" in (f.metadata() or {}) and list(f.keys()) == ["embeddings"]
    except (SafetensorError, OSError):
        return False


def model_told(model: VLM2Vec) -> dict:
    """What tells whether two sets of embeddings can be compared, JSON-able: weights, precision and tokenizer, not limits of images or
    prompts, which one side may have otherwise."""
    return identity.compared(identity.whole(model))


def write_embeddings(path: str, embeddings: torch.Tensor, keys: list[str], about: dict, told: dict | None = None) -> None:
    """A safetensors file: tensor "embeddings" (N, D) float32, metadata "keys" (a JSON list) and what else is told.

    Args:
        told: of the model (`model_told`), for `require_same_model`.
    """
    from safetensors.torch import save_file

    embeddings = embeddings.float().cpu().contiguous()
    metadata = {"keys": json.dumps(keys), **{k: str(v) for k, v in about.items()}, "checksum": _checksum(embeddings)}
    if told is not None:
        metadata["model_identity"] = json.dumps(told, sort_keys=True)
    with replacing(path) as part:
        save_file({"embeddings": embeddings}, part, metadata=metadata)


def read_embeddings(path: str) -> tuple[torch.Tensor, list[str], dict[str, str]]:
    """(embeddings (N, D), keys, metadata) of a file that `vlm2vec embed` wrote.

    Raises:
        ValueError: no such file, rows without a key or keys without a row, numbers that are not finite or not as written.
    """
    import torch
    from safetensors import safe_open

    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; make it with vlm2vec embed")
    try:
        with safe_open(path, "pt") as f:
            about = f.metadata() or {}
            embeddings, keys = f.get_tensor("embeddings"), json.loads(about["keys"])
    except Exception as e:
        raise ValueError(f"{path} is not a file of embeddings that vlm2vec embed wrote ({e})") from e
    rows = embeddings.shape[0] if embeddings.dim() == 2 else None
    if rows is None or not isinstance(keys, list) or len(keys) != rows:
        shape, count = tuple(embeddings.shape), len(keys) if isinstance(keys, list) else "no list of"
        raise ValueError(f"{path}: {count} keys for embeddings of shape {shape}, expected one a row; embed again")
    if "checksum" in about and about["checksum"] != _checksum(embeddings):
        raise ValueError(f"{path} is damaged (its numbers are not those that were written); embed again")
    finite = torch.cat([block.isfinite().all(dim=1) for block in embeddings.split(_FINITE_BLOCK)])  # the whole at once is a copy of it
    broken = (~finite).nonzero()[:, 0].tolist()
    if broken:
        raise ValueError(f"{path}: row {broken[0]} ({keys[broken[0]]}) of {rows} is not finite; embed again, with --dtype float32")
    return embeddings, [str(key) for key in keys], about


def require_same_model(path: str, about: dict[str, str], model: VLM2Vec, name: str) -> None:
    """ValueError where a file of embeddings was made by another model than `name`; a file that does not say by which is told on stderr."""
    if "model_identity" not in about:
        print(f"{path} does not say which model made it; it should be {name}, or scores mean nothing", file=sys.stderr)
        return
    wrong = identity.mismatch(json.loads(about["model_identity"]), model_told(model), path, about.get("model"), name, "embed again")
    if wrong:
        raise ValueError(wrong)


def _checksum(embeddings: torch.Tensor) -> str:
    return hashlib.blake2b(embeddings.contiguous().numpy(), digest_size=16).hexdigest()
