"""From a name or folder to a module with every weight accounted for."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlm2vec.backbones import EXAMPLE
from vlm2vec.checkpoint.folder_checks import check_weights
from vlm2vec.files.documents import read_object, require_regular

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from vlm2vec.backbones.base import Backbone


SETTINGS = "vlm2vec.json"


def file_of(source: str, name: str, **hub: Any) -> str | None:
    """Where a file of a local folder or of a hub repository lies on this machine; None when the source has no such file.

    Raises:
        ValueError: no such repository, or the hub cannot be reached and the file is not in its cache; a folder or pipe of that name.
    """
    if os.path.isdir(source):
        path = os.path.join(source, name)
        if not os.path.exists(path):
            return None
        require_regular(path)
        return path
    from transformers.utils import cached_file

    try:
        return cached_file(source, name, _raise_exceptions_for_missing_entries=False, **hub)
    except OSError as e:
        raise ValueError(f"{unknown(source)} ({str(e).strip().splitlines()[0]})") from e


def unknown(source: str) -> str:
    """What to say of a source that has no config.json."""
    if os.path.isdir(source):
        return f"{source} has no config.json; give a model folder or a hub name such as {EXAMPLE}"
    return f"{source}: no such folder here, and the hub has no such model or cannot be reached"


def read_json(source: str, name: str, **hub: Any) -> dict | None:
    """A JSON file of a local folder or of a hub repository; None when it is not there."""
    path = file_of(source, name, **hub)
    return None if path is None else read_object(path)


def check_source(source: str) -> None:
    """Fail early, with one line, on a path that is not a model folder."""
    # a hub name is NAME or OWNER/NAME
    looks_local = source.startswith((".", "/", "~")) or source.rstrip("/").count("/") > 1 or "\\" in source or os.path.exists(source)
    if os.path.isdir(source):
        if not any(os.path.isfile(os.path.join(source, n)) for n in ("config.json", "adapter_config.json")):
            raise ValueError(f"{source} is not a model folder: it has neither config.json nor adapter_config.json")
    elif looks_local or os.path.isdir(source.partition("/")[0]):  # OWNER/NAME, where a folder OWNER is: mistyped, and no name on the hub
        raise ValueError(f"{source}: no such folder{_near(source)}; give a model folder or a hub name such as {EXAMPLE}")


def _near(source: str) -> str:
    """ ", did you mean ..." where a folder of nearly that name is beside it."""
    parent, name = os.path.split(source.rstrip("/"))
    beside = [entry.name for entry in os.scandir(parent or ".") if entry.is_dir()] if os.path.isdir(parent or ".") else []
    close = difflib.get_close_matches(name, beside, n=1)
    return f", did you mean {os.path.join(parent, close[0])}" if close else ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers' load report and progress bar are silenced: the keys are accounted for below, with an error where needed."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def has_processor(source: str, **hub: Any) -> bool:
    """Whether a folder or hub repository holds tokenizer and image processor files."""
    tokenizer = any(file_of(source, n, **hub) for n in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    return tokenizer and any(file_of(source, n, **hub) for n in ("preprocessor_config.json", "processor_config.json"))


# What Llama-style, GPT-style and Qwen's tokenizers cut differently, and what normalizers change.
PROBE = "A red fox,  two hens\nand 1234 pears don't <end>"
NORMALIZED_PROBE = "cafe\u0301s \ufb01ne na\u00efve \u4f60\u597d \U0001f98a"


def check_tokenizer(source: str, tokenizer: Any, **hub: Any) -> None:
    """Compares what transformers' tokenizer makes of probe texts with what the folder's tokenizer.json says.

    Some releases of transformers (5.3.0, 5.6.0) build a tokenizer anew from its class and not from the file: the same folder, other
    ids. A normalizer that a class adds or drops changes letters with marks alone, and is told by a warning.

    Raises:
        ValueError: other tokens for plain text.
    """
    path = file_of(source, "tokenizer.json", **hub)
    if path is None:
        return
    from tokenizers import Tokenizer
    from transformers import __version__

    written = Tokenizer.from_file(path)
    for text, mend in ((PROBE, "install another release of transformers"), (NORMALIZED_PROBE, None)):
        wanted = written.encode(text, add_special_tokens=False).ids
        made = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if made == wanted:
            continue
        at = next((i for i, pair in enumerate(zip(made, wanted)) if pair[0] != pair[1]), min(len(made), len(wanted)))
        said = f"{path}: transformers {__version__} makes other tokens of a probe text than this file says (token {at} of {len(wanted)}: "
        said += f"{made[at : at + 3]}, not {wanted[at : at + 3]})"
        if mend is not None:
            raise ValueError(f"{said}; embeddings would be others: {mend}")
        warnings.warn(f"{said}: its letters with marks are normalised otherwise, as this release does for the class", stacklevel=2)


def renamed(values: dict, table: list[tuple[str, str]]) -> dict:
    """`values` under other names: the first (pattern, replacement) of the table that matches a name changes it, once."""
    out = {}
    for name, value in values.items():
        for pattern, replacement in table:
            changed, hits = re.subn(pattern, replacement, name, count=1)
            if hits:
                name = changed
                break
        out[name] = value
    return out


def some(names: list, most: int = 120) -> str:
    """The first of many names, in at most about so many characters, and dots."""
    shown, length = [], 0
    for name in map(str, names):
        if shown and length + len(name) > most:
            break
        shown.append(name[:most])
        length += len(name) + 2
    return ", ".join(shown) + (" ..." if len(shown) < len(names) else "")


def load_module(
    backbone: Backbone,
    source: str,
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Any = None,
    **hub: Any,
) -> nn.Module:
    """Load the bare module; every key of the checkpoint is used or listed in the family's `unused_keys`.

    Raises:
        ValueError: lists unexpected, missing and misshapen weights.
    """
    kwargs = {"ignore_mismatched_sizes": True, **hub}  # listed below, by name
    if quantization is not None:
        kwargs["quantization_config"] = quantization
        kwargs["device_map"] = {"": device}
    from safetensors import SafetensorError

    cls = backbone.model_class(config)
    check_weights(source, config)
    try:
        with quiet():
            model, info = cls.from_pretrained(
                source, config=config, dtype=dtype, output_loading_info=True, **{"use_safetensors": True, **kwargs}
            )
    except (RuntimeError, OSError, SafetensorError) as e:
        raise ValueError(f"{source}: the weights cannot be loaded ({' '.join(str(e).split())[:250]})") from e
    except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError) as e:  # sizes that do not go together
        reason = f"{type(e).__name__}: {' '.join(str(e).split())[:250]}"
        raise ValueError(f"{source}: no model can be made of its config.json ({reason}); copy the file again") from e
    unused = [re.compile(p) for p in backbone.unused_keys]
    unexpected = sorted(k for k in info["unexpected_keys"] if not any(p.search(k) for p in unused))
    missing = sorted(info["missing_keys"])
    problems = [
        f"{len(keys)} {what}: {some(keys)}"
        for what, keys in (
            ("weights that the model has no place for", unexpected),
            ("weights that the checkpoint lacks", missing),
            ("weights of another shape", sorted(str(k) for k in info["mismatched_keys"])),
        )
        if keys
    ]
    if problems:
        raise ValueError(f"{source} does not fit {type(model).__name__}: " + "; ".join(problems))
    return model if quantization is not None else model.to(device)


def resolve_device(device: torch.device | str | int | None) -> torch.device:
    """A device that is there; None is a GPU where there is one, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
    except RuntimeError as e:
        raise ValueError(f"device={device!r}: expected 'cpu', 'cuda', 'cuda:1' or another that torch knows") from e
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={str(device)!r}: torch sees {torch.cuda.device_count()} CUDA devices here; use 'cpu' or leave it out")
    return device


def resolve_dtype(dtype: torch.dtype | str | None, config: PretrainedConfig) -> torch.dtype:
    """A torch dtype from a dtype, its name, or "auto" (the checkpoint's own; float32 when it names none)."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype in (None, "auto"):
        named = getattr(config, "dtype", None)
        return getattr(torch, named, torch.float32) if isinstance(named, str) else named or torch.float32
    resolved = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, getattr(torch, str(dtype), None))
    if not isinstance(resolved, torch.dtype):
        raise ValueError(f"dtype={dtype!r}: expected 'auto', a torch.dtype or its name, such as 'bfloat16'")
    return resolved
