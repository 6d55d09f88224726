"""Steps over streamed images, and what goes wrong with an image, for the tests of every family."""

import copy

import numpy as np
import pytest
import torch

from tests.helpers.tiny_recipe import first_batch, gradients
from train.step import ContrastiveStep


class Whole:
    """A processing that decodes at once, as families do that cannot measure images by their headers."""

    def __init__(self, processing):
        self.measure, self.options = processing, processing.options


def run_step(recipe, model, batch):
    model.zero_grad(set_to_none=True)
    step = ContrastiveStep(recipe, model, model, device=torch.device("cpu"))
    result, _ = step(batch)
    return step, result.loss.item(), gradients(model)


def assert_same(got, expected):
    assert got.keys() == expected.keys() and got
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


def equals_images_decoded_at_once(recipe, model, streamed):
    """Loss and gradients of a streamed batch, next to the same rows decoded before the step, in one chunk a side."""
    _, loss, got = run_step(recipe, model, streamed)
    plain = copy.copy(recipe)
    plain.chunk_rows, plain.retain, plain.chunk_tokens = None, "all", 10**6  # one chunk a side, every graph kept
    model.gradient_checkpointing_disable()
    whole = first_batch(recipe, model, processing=Whole(model.processing))
    assert not any(sample["pending"] for sample in whole["query"])
    _, expected_loss, expected = run_step(plain, model, whole)
    assert loss == pytest.approx(expected_loss, abs=1e-12)
    assert_same(got, expected)


def largest_chunk(step, batch, sizes):
    """Bytes of the queries' chunk that holds most, of 24 pairs whose targets are texts."""
    chunks = step.gradcache.chunks(([len(s["input_ids"]) for s in batch["query"]], [1] * 24))
    return max(sum(sizes[row] for row in chunk.rows) for chunk in chunks if chunk.side == 0)


def keeps_host_memory_within_its_bound(recipe, model, batch, sizes):
    """24 pairs with a picture of `sizes` bytes in each query: all kept, a third kept, none."""
    recipe.media_mib = 64.0
    step, _, _ = run_step(recipe, model, batch)
    assert (step.media.decoded, step.media.peak_bytes) == (24, sum(sizes))
    assert (step.media.kept_bytes, step.media._held) == (0, 0), "nothing is left after the step"
    bound = sum(sizes) // 3
    recipe.media_mib = bound / 2**20
    step, _, _ = run_step(recipe, model, batch)
    assert 24 < step.media.decoded < 48
    largest = largest_chunk(step, batch, sizes)
    assert step.media.peak_bytes <= bound + 2 * largest < sum(sizes)
    recipe.media_mib = 0.0
    step, _, _ = run_step(recipe, model, batch)
    assert step.media.decoded == 48 and step.media.peak_bytes <= 2 * largest


def damage(root, row):
    """Cuts a JPEG behind its header: its size can be read, its pixels cannot."""
    path = root / "images" / f"{row}.jpg"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 3])
    return path, whole


class Failing:
    """A model's processing whose `decode` of one file fails from the given time on; other members are the model's own."""

    def __init__(self, processing, name, error, from_time=1):
        self._processing, self._name, self._error, self._from_time, self._times = processing, name, error, from_time, 0

    def __getattr__(self, name):
        return getattr(self._processing, name)

    def decode(self, features):
        if self._name in str(features.pending):
            self._times += 1
            if self._times >= self._from_time:
                raise self._error
        return self._processing.decode(features)


def failing_step(recipe, model, error, from_time):
    """A step in which one query's image cannot be decoded from the given time on. Returns (batch, its row, step, call)."""
    batch = first_batch(recipe, model)
    spoiled = next(i for i, sample in enumerate(batch["query"]) if sample["pending"])
    model.zero_grad(set_to_none=True)
    step = ContrastiveStep(recipe, model, model, device=torch.device("cpu"))
    step.media.processing = Failing(model.processing, f"{batch['rows'][spoiled][1]}.jpg", error, from_time)
    return batch, spoiled, step, lambda: step(batch)


def without_row(batch, spoiled):
    """A batch without hard negatives as if one of its rows had never been drawn."""
    others = [i for i in range(len(batch["query"])) if i != spoiled]
    without = {name: [value[i] for i in others] for name, value in batch.items() if name in ("query", "target", "rows")}
    without |= {name: batch[name][others] for name in ("query_ids", "target_ids", "kept")}
    offsets = np.zeros(len(batch["query"]), dtype=np.int64)
    return without | {"negatives": [], "hard_offsets": offsets, "hard_ids": np.zeros(0, dtype=np.int64), "errors": []}
