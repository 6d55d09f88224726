"""`encode`: preprocessing in the caller's order, chunks by length, results in the caller's order."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from contrastive_kernels.gradcache.chunking import token_budget_chunks
from vlm2vec.checkpoint.prompts import prepend
from vlm2vec.inputs import as_item, is_image
from vlm2vec.packing import Features

if TYPE_CHECKING:
    import numpy as np


# Images of one window are in memory at once; sorting by length needs a window well above a chunk.
WINDOW_CHUNKS = 16
MAX_THREADS = 8
MAX_CHUNK_TOKENS = {"cpu": 4096, "cuda": 32768}  # a CPU is as fast with fewer, and holds less at a time


def preprocess(processing: Callable[[Any], Features], inputs: list, first: int = 0, pool: Executor | None = None) -> list[Features]:
    """Features of each input, made by the threads of `pool` where there is one; an error is prefixed with the input's position."""

    def one(numbered) -> Features:
        i, x = numbered
        try:
            return processing(x)
        except ValueError as e:
            raise ValueError(f"input {first + i}: {e}") from e

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
) -> np.ndarray | torch.Tensor:
    """See `VLM2Vec.encode`."""
    single = is_single(inputs)
    inputs = [inputs] if single else list(inputs)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if truncate_dim is not None and not 1 <= truncate_dim <= model.embedding_dim:
        raise ValueError(f"truncate_dim={truncate_dim}: expected 1 to {model.embedding_dim}")
    dim = truncate_dim or model.embedding_dim
    out = torch.empty(len(inputs), dim, dtype=torch.float32, device=model.device)
    was_training = model.training
    model.eval()
    try:
        threads = min(MAX_THREADS, os.cpu_count() or 1)  # decoding and resizing leave Python's lock
        with _progress(len(inputs), show_progress_bar) as bar, ThreadPoolExecutor(1) as worker, ThreadPoolExecutor(threads) as pool:
            starts = range(0, len(inputs), batch_size * WINDOW_CHUNKS)

            def prepare(start: int) -> list[Features]:
                window = with_prompt(model, inputs[start : start + batch_size * WINDOW_CHUNKS], prompt)
                return preprocess(model.processing, window, start, pool)

            # The next window is preprocessed while the model runs on this one.
            coming = worker.submit(prepare, 0) if inputs else None
            for start in starts:
                features = coming.result()
                if start + starts.step < len(inputs):
                    coming = worker.submit(prepare, start + starts.step)
                for rows in chunks([f.length for f in features], batch_size, model.device.type):
                    packed = model.pack([features[r] for r in rows]).to(model.device)
                    hidden = model(packed)[:, :dim].float()
                    out[torch.tensor(rows, device=out.device) + start] = F.normalize(hidden, dim=-1) if normalize_embeddings else hidden
                    bar.update(len(rows))
    finally:
        model.train(was_training)
    out = out[0] if single else out
    return out if convert_to_tensor else out.cpu().numpy()


def chunks(lengths: list[int], batch_size: int, device_type: str) -> list[list[int]]:
    """Chunks of similar length, of at most `batch_size` inputs and the device's token budget."""
    budget = MAX_CHUNK_TOKENS.get(device_type, MAX_CHUNK_TOKENS["cuda"])
    return token_budget_chunks(lengths, budget, max_rows=batch_size)


def _progress(total: int, show: bool | None):
    from tqdm.auto import tqdm

    show = total > 512 and sys.stderr.isatty() if show is None else show
    return tqdm(total=total, desc="encode", unit="input", disable=not show)
