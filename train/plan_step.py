"""The recipe's own step over fake tensors: `ContrastiveStep` and `GradCache` as they are, their chunks watched by a meter.

Chunks of the same shapes cost the same, so one of them is run and the others are accounted for by it: their work by number,
and what they would leave behind between the passes (kept graphs, features of a frozen tower) as tensors that hold its bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from contrastive_kernels import GradCache
from contrastive_kernels.retention import FeatureStore, retained_chunks
from train.media import Media, Side
from train.plan_meter import Meter, Work
from train.recipe import Recipe
from train.step import ContrastiveStep
from vlm2vec import attention
from vlm2vec.model import VLM2Vec
from vlm2vec.packing import PackedBatch

FLASH = "planned"
_MIB = 2**20
_LOSS_WORKSPACE = 256 * _MIB  # `workspace_mib` of the loss


class PlannedGradCache(GradCache):
    """Runs some chunks of a step and keeps account of all.

    Attributes:
        meter: set before the first step.
        count: chunks of the whole step.
        weights: for each chunk that was run, how many it stands for (a fraction where chunks differ in size).
        largest: (bytes, tokens) of the chunk whose second pass takes most beyond what stood before it.
        after_chunk: called when a chunk's gradients are there.
    """

    meter: Meter
    count = 0
    feature_width = 0  # bytes of a frozen tower's output per image token
    ranks = 1
    most_chunks = 8  # chunks that are run one by one; beyond it some stand for their neighbours

    def after_chunk(self) -> None:
        pass

    def _plan(self, lengths):
        chunks = super()._plan(lengths)
        self.count, self.largest = len(chunks), (0, 0)
        kept = retained_chunks(self.retain, len(chunks))
        keys = [(c.side, i in kept, tuple(self.shapes[c.side][row] for row in c.rows)) for i, c in enumerate(chunks)]
        chosen = _representatives(chunks, keys, self.most_chunks)
        self.weights = [sum(chunks[i].tokens for i in group) / chunks[first].tokens for first, group in chosen]
        self.others = [len(group) - 1 for _, group in chosen]
        self.retain = sum(1 for first, _ in chosen if first in kept)  # they are the last ones here too
        features = sum(visual for side in self.shapes for _, visual, _ in side) * self.feature_width
        self.features_fit = features <= self.keep_mib * _MIB
        self.features_left_out = min(features, self.keep_mib * _MIB) - sum(
            self.shapes[chunks[first].side][row][1] * self.feature_width for first, _ in chosen for row in chunks[first].rows
        )
        return [chunks[first] for first, _ in chosen]

    def _first_pass(self, sides, lengths, chunks, retained, features):
        if self.freeze is not None and not self.features_fit:
            features._bound = 0.0  # what is left of it stands for the chunks that are not run
        self._left_out = {"kept graphs": [], "frozen features": []}  # of chunks that are not run
        embeddings = super()._first_pass(sides, lengths, chunks, retained, features)
        self.meter.relabel(embeddings, "embeddings")
        if self.freeze is not None:
            if self.features_left_out > 0:
                self._leave_out(self.features_left_out, "frozen features")
        return embeddings

    def _forward_chunk(self, sides, index, chunk, features, keep_graph):
        part = "kept graphs" if keep_graph else "activations"
        before = self.meter.current
        with self.meter.booking(index), self.meter.counting_as(part):
            encoded = super()._forward_chunk(sides, index, chunk, features, keep_graph)
        if keep_graph and self.others[index]:
            held = (self.meter.current - before) * (self.weights[index] - 1)
            self._leave_out(held, "kept graphs")
        return encoded

    def _frozen(self, sides, chunk, index, store: FeatureStore):
        with self.meter.counting_as("frozen features"):
            return super()._frozen(sides, chunk, index, store)

    def _leave_out(self, count: float, part: str) -> None:
        with self.meter.counting_as(part):
            self._left_out[part].append(torch.empty(int(count), dtype=torch.uint8))

    def _loss(self, embeddings, options):
        with self.meter.counting_as("loss scratch"):
            # One operator, whose scratch no meter sees: exponentials of all pairs within the bound, as `dispatch.py` lays them.
            rows, columns = len(embeddings[0]), self.ranks * len(embeddings[1])
            scratch = torch.empty(min(rows * columns * 4, _LOSS_WORKSPACE), dtype=torch.uint8)  # noqa: F841
            if self.ranks > 1:
                result = self._loss_over_ranks(embeddings, options)
            else:
                result = super()._loss(embeddings, options)
        self.meter.relabel([result.d_query, result.d_target, result.d_hard_negatives], "embeddings")
        return result

    def _loss_over_ranks(self, embeddings, options):
        """This rank's rows against everyone's columns, and the gathered columns' gradient: what one rank does and holds."""
        def whole(x):
            return None if x is None else torch.cat([x] * self.ranks)

        query, target, *hard = embeddings
        symmetric = options.get("symmetric") or options.get("query_negatives")
        gathered = whole(target)
        queries = whole(query) if symmetric else query
        changed = {**options, "positives": torch.arange(len(query))}
        for name, gather in (("target_ids", True), ("query_ids", symmetric)):
            if name in options:
                changed[name] = whole(options[name]) if gather else options[name]
        if symmetric:  # one direction after the other, each with this rank's rows
            changed.update(symmetric=False, query_negatives=False)
            changed.pop("query_ids", None)
            super()._loss([queries[: len(query)], gathered, *hard], changed)
        result = super()._loss([query, gathered, *hard], changed)
        return replace(result, d_target=result.d_target[: len(target)].clone())

    def _backward_chunk(self, sides, index, chunk, gradient, features):
        if chunk.graph is None and self.retain:
            self._left_out["kept graphs"].clear()  # they go first
        before = self.meter.high = self.meter.current
        with self.meter.booking(index):
            super()._backward_chunk(sides, index, chunk, gradient, features)
        self.largest = max(self.largest, (self.meter.high - before, chunk.tokens))
        self.after_chunk()

    def total(self) -> Work:
        """Work of the whole step."""
        whole = Work()
        for key, work in self.meter.work.items():
            whole.add(work, 1.0 if key is None else self.weights[key])
        return whole


def _representatives(chunks: list, keys: list[tuple], most: int) -> list[tuple[int, list[int]]]:
    """(chunk, chunks that it stands for), in order; chunks of one key are alike, others stand for the near ones of their side."""
    groups: dict[tuple, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    chosen = sorted(groups.values(), key=lambda group: group[0])
    if len(chosen) <= most:
        return [(group[0], group) for group in chosen]
    kinds: dict[tuple, list[int]] = {}
    for index, key in enumerate(keys):
        kinds.setdefault(key[:2], []).append(index)
    picked = []
    for members in kinds.values():
        runs = max(2, round(most * len(members) / len(keys)))
        size = -(-len(members) // runs)
        for start in range(0, len(members), size):
            group = members[start : start + size]
            picked.append((max(group, key=lambda i: chunks[i].tokens), group))
    return sorted(picked)


class PlannedMedia(Media):
    """Gives fake pixels of the sizes that decoding would give."""

    def __init__(self, *args, mode: FakeTensorMode, **kwargs):
        super().__init__(*args, **kwargs)
        self.mode = mode
        self._pool.shutdown()
        self._pool = _AtOnce()

    def _decode(self, features):
        shape = self.processing.decoded_shape(features)
        with _disable_current_modes(), self.mode:  # host memory: no meter counts it
            tensors = {"pixel_values": torch.empty(shape, dtype=torch.uint8)}
        self.decoded += 1
        return tensors

    def release(self, tensors) -> None:
        pass

    def normalised(self, pixels: torch.Tensor, vision: dict) -> torch.Tensor:
        return torch.empty(self.processing.normalised_shape(pixels.shape, vision))


class _AtOnce:
    """An executor that runs what it is given there and then: fake tensors belong to one thread."""

    def submit(self, function: Callable, *args):
        return _Done(function(*args))

    def shutdown(self, **kwargs) -> None:
        pass


class _Done:
    def __init__(self, value):
        self._value = value

    def result(self):
        return self._value

    def exception(self):
        return None

    def cancel(self) -> bool:
        return False


class PlannedStep(ContrastiveStep):
    """`ContrastiveStep` whose chunks are fake. Runs inside `mode` and its meter.

    Args:
        flash: attention as the GPU's kernels do it, which never hold the scores; False: the CPU's own.
    """

    gradcache_class = PlannedGradCache

    def __init__(self, recipe: Recipe, model: VLM2Vec, mode: FakeTensorMode, meter: Meter, *, ranks: int, flash: bool):
        dtype = getattr(torch, recipe.autocast) if recipe.autocast else None

        def autocast():
            return torch.autocast("cpu", dtype) if dtype is not None else contextlib.nullcontext()

        super().__init__(recipe, model, model, device=torch.device("cpu"), autocast=autocast)
        self.media.close()
        self.media = PlannedMedia(model.processing, bound_mib=recipe.media_mib, threads=1, mode=mode)
        self.model = _like_accelerate(model, autocast, dtype is not None)
        self.mode, self.meter, self.flash = mode, meter, flash
        if model.always_vision:
            with unset_fake_temporarily():
                placeholder = model._placeholder()
            model._placeholder = lambda: placeholder
        self.gradcache.meter = meter
        self.gradcache.prefetch = None
        self.gradcache.sync.largest = lambda values: values  # ranks are alike
        self.gradcache.ranks = ranks
        if self.gradcache.freeze is not None:
            config = model.config
            deep = getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None) or ()
            self.gradcache.feature_width = model.embedding_dim * (1 + len(deep)) * model.dtype.itemsize
        if flash:
            attention._PROVIDER_FUNCTIONS[FLASH] = _Flash(meter)

    def __call__(self, batch: dict[str, Any]):
        names = ("query", "target", "negatives")
        self.gradcache.shapes = [[_shape(sample) for sample in batch[name]] for name in names]
        return super().__call__(batch)

    def _chunk(self, side: Side, rows: list[int], *, seen: bool = False) -> PackedBatch:
        model = self.unwrapped
        with unset_fake_temporarily():
            features = [replace(f, vision={}, pending=[]) for f in side.measured(rows)] if seen else side.features(rows)
            features = [replace(f, vision=self._fake_pixels(f.vision)) for f in features]
            packed = model.backbone.pack(features, FLASH) if self.flash else model.pack(features)
        packed = _map(packed, self._fake)
        pixels = packed.vision.get("pixel_values") if packed.vision else None
        parts = pixels if isinstance(pixels, list) else [pixels]  # images and videos differ in the width of a patch
        if parts[0] is not None and parts[0].dtype == torch.uint8:
            for part in parts:
                self.meter.track(part)
            values = [self.media.normalised(part, packed.vision).to(model.dtype) for part in parts]
            packed = replace(packed, vision={**packed.vision, "pixel_values": torch.cat(values) if len(values) > 1 else values[0]})
        return packed.to(self.device, model.dtype)

    def _fake(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        fake = self.mode.from_tensor(tensor, static_shapes=True)
        self.meter.track(fake)
        return fake

    def _fake_pixels(self, vision: dict) -> dict:
        """Pixels of samples that were processed whole, before they are joined: nothing is copied."""
        return {name: self._fake(v) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for name, v in vision.items()}

    def _masks(self, batch):
        return {}


def _shape(sample: dict) -> tuple[int, int, int]:
    """(tokens, image tokens, patches) of a sample."""
    visual = sample["visual_index"]
    return len(sample["input_ids"]), 0 if visual is None else len(visual), int(sample["vision_patches"])


def _map(value: Any, convert: Callable) -> Any:
    """The same nesting with each tensor converted; a tensor that stands in two places is converted once."""
    known: dict[int, Any] = {}

    def walk(v):
        if isinstance(v, torch.Tensor):
            if id(v) not in known:
                known[id(v)] = convert(v)
            return known[id(v)]
        if isinstance(v, dict):
            return {k: walk(e) for k, e in v.items()}
        if isinstance(v, (list, tuple)):
            return type(v)(walk(e) for e in v)
        if isinstance(v, (PackedBatch, attention.Segments, attention.Group)):
            return replace(v, **{f.name: walk(getattr(v, f.name)) for f in fields(v)})
        return v

    mapped = walk(value)
    known.clear()  # a function that names itself lives until the next collection, and would keep the tensors
    return mapped


def _like_accelerate(model: VLM2Vec, autocast: Callable, lowered: bool) -> Callable:
    """accelerate runs forward under autocast and hands its output back in float32."""
    def forward(*args, **kwargs):
        with autocast():
            out = model(*args, **kwargs)
        return out.float() if lowered else out

    return forward


class _Flash:
    """Packed attention that holds what flash attention holds: output and log-sum-exp, never the scores."""

    def __init__(self, meter: Meter):
        self.meter = meter

    def __call__(self, q, k, v, segments, *, scale=None, dropout=0.0, window=None):
        return _FlashFunction.apply(q, k, v, segments.lengths, self.meter)


class _FlashFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lengths, meter):
        q, k, v = (x.contiguous() for x in (q, k, v))
        out, lse = torch.empty_like(q), torch.empty(q.shape[1], q.shape[0])
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.lengths, ctx.meter = lengths, meter
        meter.count_flops(sum(sdpa_flop_count(*_shapes(q, k, v, n)) for n in lengths))
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, _, _ = ctx.saved_tensors
        ctx.meter.count_flops(sum(sdpa_backward_flop_count(_shapes(q, k, v, n)[0], *_shapes(q, k, v, n)) for n in ctx.lengths))
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None, None


def _shapes(q, k, v, length: int) -> list[tuple[int, ...]]:
    return [(1, x.shape[1], length, x.shape[2]) for x in (q, k, v)]


