"""`encode`: preprocessing in the caller's order, chunks by length, results in the caller's order."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from contrastive_kernels.gradcache.chunking import token_budget_chunks
from vlm2vec.checkpoint.prompts import prepend
from vlm2vec.inputs import Item, as_item, is_image, names_a_file
from vlm2vec.media.endings import FILMS, PICTURES
from vlm2vec.media.sources import fetch, image_name, is_source_dict, is_url
from vlm2vec.packing import Features

if TYPE_CHECKING:
    import numpy as np


# Images of one window are in memory at once; sorting by length needs a window well above a chunk.
WINDOW_CHUNKS = 16
MAX_THREADS = 8
MAX_CHUNK_TOKENS = {"cpu": 1024, "cuda": 32768}  # on a CPU what a chunk makes stays in its caches: fewer is faster, and holds less


def preprocess(
    processing: Callable[[Any], Features],
    inputs: list,
    first: int = 0,
    pool: Executor | None = None,
    unreadable: dict[int, str] | None = None,
) -> list[Features | None]:
    """Features of each input, made by the threads of `pool` where there is one; an error is prefixed with the input's position.

    Args:
        unreadable: takes {position: why} of inputs that cannot be read, whose features are None; without it they raise.
    """

    def one(numbered) -> Features | None:
        i, x = numbered
        try:
            return processing(x)
        except ValueError as e:
            if unreadable is None:
                raise ValueError(f"input {first + i}: {e}") from e
            unreadable[first + i] = str(e)
            return None

    return list((map if pool is None else pool.map)(one, enumerate(inputs)))


def is_single(inputs: Any) -> bool:
    """Whether this is one input and not a list of inputs."""
    if isinstance(inputs, (str, dict)) or is_image(inputs):
        return True
    return isinstance(inputs, (list, tuple)) and len(inputs) > 0 and all(isinstance(m, dict) and "role" in m for m in inputs)


def with_prompt(model: nn.Module, inputs: list, prompt: str | None) -> list:
    """Items with the prompt set in; a family that has an instruction slot takes it there."""
    if not prompt:
        return inputs
    prompt = model.prompts.get(prompt, prompt)
    items = []
    for x in inputs:
        item = as_item(x, model.processing.markers)
        if model.processing.prompt_is_instruction:
            items.append(replace(item, instruction=item.instruction or prompt))
        else:
            items.append(replace(item, text=prepend(prompt, item.text)))
    return items


def hint_at_paths(inputs: list) -> None:
    """A warning where strings, which are fed as text, are the names of pictures or films that exist."""
    named = [x for x in inputs if names_a_file(x, PICTURES + FILMS)]
    if named:
        warnings.warn(
            f"{len(named)} of {len(inputs)} inputs are strings, fed as text, though such files exist (e.g. {image_name(named[0])}); "
            'to embed the picture give pathlib.Path(name) or {"image": name}, of a film {"video": name}',
            stacklevel=4,
        )


def with_fetched(x: Any, model: nn.Module) -> Item:
    """The input with the pictures behind its http(s) URLs read."""
    item = as_item(x, model.processing.markers)
    addresses = [image.get("url") if is_source_dict(image) else image for image in item.images]
    return replace(item, images=[fetch(url) if is_url(url) else image for url, image in zip(addresses, item.images)])


class EvalMode:
    """Evaluation mode for the time of a call, shared by the threads that use a model.

    `model.eval()` before and `model.train()` after would be wrong twice: the first of two threads to end switches dropout on under
    the other, and one flag for all modules forgets which of them (a frozen tower) were in evaluation mode all along. One belongs to
    each `VLM2Vec`; a copy of the model gets a new one.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._evaluating: Counter[int] = Counter()  # thread -> calls
        self._training: Counter[int] = Counter()  # thread -> forward passes in training mode
        self._switched: list[nn.Module] = []  # what the first call found in training mode

    def __reduce__(self):
        return EvalMode, ()  # a lock is neither copied nor pickled

    @contextlib.contextmanager
    def evaluating(self, model: nn.Module) -> Iterator[None]:
        """Every module is in evaluation mode within the block; when the last of overlapping blocks ends, each has its own mode back.

        Raises:
            ValueError: another thread is in a forward pass in training mode.
        """
        me = threading.get_ident()
        with self._lock:
            switched = [module for module in model.modules() if module.training]
            if switched and any(passes and thread != me for thread, passes in self._training.items()):
                raise ValueError("the model is busy: another thread trains it; encode when its step is done, or encode with a copy")
            for module in switched:
                module.training = False
            self._switched += switched
            self._evaluating[me] += 1
        try:
            yield
        finally:
            with self._lock:
                self._evaluating[me] -= 1
                if not self._evaluating[me]:
                    del self._evaluating[me]
                if not self._evaluating:
                    for module in self._switched:
                        module.training = True
                    self._switched = []

    @contextlib.contextmanager
    def forward(self, training: bool) -> Iterator[None]:
        """Around a forward pass, in training mode or not. ValueError when another thread holds the model out of training mode."""
        me = threading.get_ident()
        with self._lock:
            if self._switched and me not in self._evaluating:
                raise ValueError("the model is busy: another thread encodes with it; train when that is done, or train a copy")
            self._training[me] += training
        try:
            yield
        finally:
            with self._lock:
                self._training[me] -= training
                if not self._training[me]:
                    del self._training[me]

    def ask(self, mode: bool) -> None:
        """Before `model.train(mode)`: ValueError where that would switch dropout on under an evaluation."""
        with self._lock:
            if self._evaluating and mode:
                raise ValueError("the model is busy: it is encoding; call train() when that is done, or train a copy")
            self._switched = []  # eval() within an evaluation is meant to last


def evaluating(model: Any) -> contextlib.AbstractContextManager[None]:
    """`EvalMode.evaluating` for a model of any kind: a `VLM2Vec`'s own, a new one for another module, nothing for what has no modes."""
    if not isinstance(model, nn.Module):
        return contextlib.nullcontext()
    mode = getattr(model, "eval_mode", None)
    return (mode if isinstance(mode, EvalMode) else EvalMode()).evaluating(model)


@torch.no_grad()
def encode(
    model: nn.Module,
    inputs: Any,
    *,
    prompt: str | None,
    batch_size: int,
    show_progress_bar: bool | None,
    convert_to_tensor: bool,
    normalize_embeddings: bool,
    truncate_dim: int | None,
    urls: bool = False,
    unreadable: dict[int, str] | None = None,
    keep_on: str | torch.device | None = None,
) -> np.ndarray | torch.Tensor:
    """See `VLM2Vec.encode`.

    Args:
        keep_on: device on which all rows gather; None: the model's.
        unreadable: takes {position: why} of inputs that cannot be read, whose rows are zero; without it they raise.
    """
    single = is_single(inputs)
    inputs = [inputs] if single else list(inputs)
    hint_at_paths(inputs)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    require_width(model, truncate_dim)
    dim = truncate_dim or model.embedding_dim
    out = torch.empty(len(inputs), dim, dtype=torch.float32, device=keep_on or model.device)
    with evaluating(model):
        threads = min(MAX_THREADS, os.cpu_count() or 1)  # decoding and resizing leave Python's lock
        with _progress(len(inputs), show_progress_bar) as bar, ThreadPoolExecutor(1) as worker, ThreadPoolExecutor(threads) as pool:
            starts = range(0, len(inputs), batch_size * WINDOW_CHUNKS)

            def prepare(start: int) -> list[Features]:
                return preprocess(one, inputs[start : start + batch_size * WINDOW_CHUNKS], start, pool, unreadable)

            def one(x: Any) -> Features:
                x = with_prompt(model, [x], prompt)[0]
                return model.processing(with_fetched(x, model) if urls else x)

            # The next window is preprocessed while the model runs on this one.
            coming = worker.submit(prepare, 0) if inputs else None
            for start in starts:
                features = coming.result()
                if start + starts.step < len(inputs):
                    coming = worker.submit(prepare, start + starts.step)
                window = out[start : start + len(features)]
                for rows in _embed(model, features, window, batch_size, normalize_embeddings):
                    bar.update(rows)
                require_finite(window, start)
    out = out[0] if single else out
    return out if convert_to_tensor else out.cpu().numpy()


def _embed(
    model: nn.Module, features: list[Features | None], out: torch.Tensor, batch_size: int, normalize_embeddings: bool = True
) -> Iterator[int]:
    """Fill (n, D) `out` with the vectors of n features, on its own device as they are made; rows without features are zero.

    Yields how many rows each pass of the model has made.
    """
    out.zero_()
    good = [row for row, made in enumerate(features) if made is not None]
    for places in chunks([features[row].length for row in good], batch_size, model.device.type):
        rows = [good[place] for place in places]
        packed = model.pack([features[row] for row in rows]).to(model.device)
        hidden = model(packed)[:, : out.shape[1]].float()
        hidden = F.normalize(hidden, dim=-1) if normalize_embeddings else hidden
        out[torch.tensor(rows, device=out.device)] = hidden.to(out.device)
        yield len(rows)


@torch.no_grad()
def encode_stream(
    model: nn.Module,
    inputs: Iterable[Any],
    *,
    prompt: str | None = None,
    batch_size: int = 32,
    truncate_dim: int | None = None,
    urls: bool = False,
    skip_bad: bool = False,
) -> Iterator[tuple[torch.Tensor, dict[int, str]]]:
    """Embed inputs without end: as `encode` does, and of equal vectors, but two windows of inputs in memory at most.

    Args:
        inputs: read by another thread, a window ahead.
        skip_bad: inputs that cannot be read are told and not raised.

    Yields:
        ((n, D) float32 vectors of length 1 on the CPU, {row of these: why it cannot be read}) of the next n inputs, in their order.

    Raises:
        ValueError: names an input by its number.

    Example:
        >>> from vlm2vec.encoding import encode_stream
        >>> sum(len(vectors) for vectors, bad in encode_stream(model, ("a fox" for _ in range(3))))
        3
    """
    require_width(model, truncate_dim)
    coming, first = iter(inputs), 0
    threads = min(MAX_THREADS, os.cpu_count() or 1)

    def one(x: Any) -> Features:
        x = with_prompt(model, [x], prompt)[0]
        return model.processing(with_fetched(x, model) if urls else x)

    def prepare(start: int) -> tuple[list[Features | None], dict[int, str]]:
        bad: dict[int, str] = {}
        window = list(islice(coming, batch_size * WINDOW_CHUNKS))
        return preprocess(one, window, start, pool, bad if skip_bad else None), bad

    with evaluating(model), ThreadPoolExecutor(1) as worker, ThreadPoolExecutor(threads) as pool:
        ahead = worker.submit(prepare, 0)
        while True:
            features, bad = ahead.result()
            if not features:
                return
            ahead = worker.submit(prepare, first + len(features))
            vectors = torch.empty(len(features), truncate_dim or model.embedding_dim)
            for _ in _embed(model, features, vectors, batch_size):
                pass
            require_finite(vectors, first)
            yield vectors, {row - first: why for row, why in bad.items()}
            first += len(features)


def require_width(model: nn.Module, truncate_dim: int | None) -> None:
    """ValueError for a number of dimensions that the model's vectors cannot be cut to; None is all of them."""
    if truncate_dim is not None and not 1 <= truncate_dim <= model.embedding_dim:
        raise ValueError(f"truncate_dim={truncate_dim}: expected 1 to {model.embedding_dim}")
    widths = getattr(getattr(model, "config", None), "matryoshka_dimensions", None)
    if truncate_dim is not None and widths and truncate_dim not in widths:
        raise ValueError(
            f"truncate_dim={truncate_dim}: expected one of {', '.join(map(str, widths))}, which config.json says it was trained for"
        )


NOT_FINITE = "the model's vector for it is not finite; load it with dtype bfloat16 or float32 (float16 overflows), and look at its weights"


def require_finite(embeddings: torch.Tensor, first: int = 0) -> None:
    """ValueError naming the first row of (N, D) that holds NaN or infinity, counted from `first`, and how many there are."""
    broken = (~torch.isfinite(embeddings).all(dim=1)).nonzero()[:, 0].tolist()
    if broken:
        more = f" ({len(broken)} such inputs of {len(embeddings)})" if len(broken) > 1 else ""
        raise ValueError(f"input {first + broken[0]}: {NOT_FINITE}{more}")


def chunks(lengths: list[int], batch_size: int, device_type: str) -> list[list[int]]:
    """Chunks of similar length, of at most `batch_size` inputs and the device's token budget."""
    budget = MAX_CHUNK_TOKENS.get(device_type, MAX_CHUNK_TOKENS["cuda"])
    return token_budget_chunks(lengths, budget, max_rows=batch_size)


def _progress(total: int, show: bool | None):
    from tqdm.auto import tqdm

    show = total > 512 and sys.stderr.isatty() if show is None else show
    return tqdm(total=total, desc="encode", unit="input", disable=not show)
