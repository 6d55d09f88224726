"""The pairs of `python -m bench step` and the ways of the others to make one training step of them.

Every peer is a function that returns (step, module): `step()` makes the gradients of one batch of pairs on `module`'s weights
and returns the loss. Weights, inputs, temperature and float32 are the same in all.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from bench import models
from bench.models import padded_batch

TEMPERATURE = 0.02
ROWS = 16  # rows of a fixed mini-batch where a peer's name says nothing else; the reference publishes 8
Step = Callable[[], float]


def pairs(count: int) -> tuple[list, list]:
    """(queries, targets): the encode benchmark's mix on either side."""
    data = models.inputs("tiny", 2 * count)
    return data[:count], data[count:]


def load(folder: str, positions: str | None):
    """The folder's model; positions: None leaves them to the family."""
    from vlm2vec import VLM2Vec

    options = {} if positions is None else {"positions": positions}
    return VLM2Vec.from_pretrained(folder, dtype="float32", device="cpu", **options).train()


def freeze(module: torch.nn.Module, frozen: bool) -> torch.nn.Module:
    """Takes the vision tower, whatever holds it, out of training."""
    if frozen:
        for name, parameter in module.named_parameters():
            if "visual." in name:
                parameter.requires_grad_(False)
    return module


def canonical(name: str) -> str:
    """A weight's name without what the peers' wrappers put before it."""
    return name[min(at for at in (name.find("visual."), name.find("language_model.")) if at >= 0) :]


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By canonical name; the head, which no embedding depends on, has none."""
    return {canonical(n): p.grad for n, p in module.named_parameters() if p.grad is not None and "lm_head" not in n}


def grid_count(batch: dict) -> torch.Tensor:
    return batch["image_grid_thw"].prod(dim=1)


class PaddedSide:
    """Rows padded to the longest of them, cut into runs of rows with their own pictures."""

    def __init__(self, features: list, side: str = "left"):
        self.batch = padded_batch(features, side)
        self.has_picture = torch.tensor([bool(f.vision) for f in features])

    def rows(self, first: int, last: int) -> dict:
        batch = self.batch
        part = {
            "input_ids": batch["input_ids"][first:last],
            "attention_mask": batch["attention_mask"][first:last],
            "position_ids": batch["position_ids"][:, first:last],
        }
        pictures = slice(int(self.has_picture[:first].sum()), int(self.has_picture[:last].sum()))
        if pictures.start < pictures.stop:
            ends = grid_count(batch).cumsum(0)
            start = int(ends[pictures.start - 1]) if pictures.start else 0
            part["pixel_values"] = batch["pixel_values"][start : int(ends[pictures.stop - 1])]
            part["image_grid_thw"] = batch["image_grid_thw"][pictures]
        return part

    def chunks(self, size: int) -> list[dict]:
        count = len(self.has_picture)
        return [self.rows(i, min(i + size, count)) for i in range(0, count, size)]


def reference(folder: str, count: int, frozen: bool, rows: int = ROWS) -> tuple[Step, torch.nn.Module]:
    """The reference's way: the side padded whole, then sliced; head and all hidden states computed; everything twice."""
    from transformers import Qwen2VLForConditionalGeneration

    sides = [PaddedSide(load(folder, "sequential").preprocess(side)) for side in pairs(count)]
    module = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").train()
    freeze(module, frozen)

    def encode(part: dict) -> torch.Tensor:
        out = module(**part, use_cache=False, output_hidden_states=True)
        return torch.nn.functional.normalize(out.hidden_states[-1][:, -1], dim=-1)

    def step() -> float:
        chunks = [side.chunks(rows) for side in sides]
        with torch.no_grad():
            cached = [torch.cat([encode(part) for part in parts]).requires_grad_() for parts in chunks]
        loss = cross_entropy(*cached)
        loss.backward()
        for parts, leaf in zip(chunks, cached):
            for part, gradient in zip(parts, leaf.grad.split(rows)):
                torch.dot(encode(part).flatten(), gradient.flatten()).backward()
        return loss.item()

    return step, module


def sorted_padded(folder: str, count: int, frozen: bool, rows: int = ROWS) -> tuple[Step, torch.nn.Module]:
    """GradCache over transformers' own model without head: batches of rows of like lengths, padded on the right to the longest of each."""
    from transformers import AutoModel

    made = [load(folder, None).preprocess(side) for side in pairs(count)]
    module = freeze(AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").train(), frozen)

    def encode(part: dict) -> torch.Tensor:
        hidden = module(**part, use_cache=False).last_hidden_state
        last = part["attention_mask"].sum(1) - 1
        return torch.nn.functional.normalize(hidden[torch.arange(len(last)), last], dim=-1)

    def step() -> float:
        batches = []
        for at, side in enumerate(made):
            order = sorted(range(count), key=lambda row: -side[row].length)
            for places in (order[i : i + rows] for i in range(0, count, rows)):
                batches.append((at, places, PaddedSide([side[row] for row in places], "right").rows(0, len(places))))
        cached = [torch.empty(count, module.config.get_text_config().hidden_size) for _ in made]
        with torch.no_grad():
            for at, places, part in batches:
                cached[at][places] = encode(part)
        loss = cross_entropy(*(leaf.requires_grad_() for leaf in cached))
        loss.backward()
        for at, places, part in batches:
            torch.dot(encode(part).flatten(), cached[at].grad[places].flatten()).backward()
        return loss.item()

    return step, module


def gradcache_package(folder: str, count: int, frozen: bool) -> tuple[Step, torch.nn.Module]:
    """PyPI's gradcache around the model without head, rows padded as the reference pads them."""
    import gradcache

    # Its modules import one another under a name that the distribution does not install.
    sys.modules.setdefault("grad_cache", gradcache)
    from gradcache.grad_cache import GradCache
    from transformers import AutoModel

    sides = [PaddedSide(load(folder, "sequential").preprocess(side)) for side in pairs(count)]
    module = freeze(AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").train(), frozen)
    cache = GradCache(
        models=[module, module],
        chunk_sizes=ROWS,
        loss_fn=cross_entropy,
        split_input_fn=lambda side, size: side.chunks(size),
        get_rep_fn=lambda out: torch.nn.functional.normalize(out.last_hidden_state[:, -1], dim=-1),
    )
    return lambda: cache(*sides).item(), module


def sentence_transformers(folder: str, count: int, frozen: bool, budget: int | None) -> tuple[Step, torch.nn.Module]:
    """`CachedMultipleNegativesRankingLoss`, with `mini_batch_num_tokens` or fixed mini-batches. M-RoPE positions."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import Pooling

    model = SentenceTransformer(folder, device="cpu").train()
    model[1] = Pooling(model[0].get_embedding_dimension(), pooling_mode="lasttoken")  # it would take the mean of a bare folder
    freeze(model, frozen)
    sides = [model.preprocess(side) for side in pairs(count)]
    loss = CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, mini_batch_size=ROWS, mini_batch_num_tokens=budget)

    def step() -> float:
        value = loss([dict(side) for side in sides], None)
        value.backward()
        return value.item()

    return step, model


def cross_entropy(query: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy over all targets, unit vectors in."""
    return torch.nn.functional.cross_entropy(query @ target.T / TEMPERATURE, torch.arange(len(query)))


def ours(
    folder: str,
    count: int,
    frozen: bool,
    *,
    budget: int | None = None,
    rows: int | None = None,
    positions: str | None = "sequential",
    retain=0,
) -> tuple[Step, torch.nn.Module]:
    """`contrastive_kernels.GradCache` over packed chunks of `budget` tokens or of `rows` rows."""
    from contrastive_kernels import GradCache

    model = freeze(load(folder, positions), frozen)
    given = pairs(count)
    if positions == "mrope":  # sentence-transformers' template puts a newline behind every picture
        given = [[x if isinstance(x, str) or "text" in x else {"text": "<|image_1|>\n", **x} for x in side] for side in given]
    sides = [model.preprocess(side) for side in given]

    def encode(side, rows, features=None):
        if features is None:
            return model(model.pack([side[r] for r in rows]))
        return model(model.pack([without_pixels(side[r]) for r in rows]), vision_features=features)

    cache = GradCache(
        encode,
        chunk_tokens=budget,
        chunk_size=rows,
        retain=retain,
        freeze=(lambda side, rows: model.vision(model.pack([side[r] for r in rows]))) if frozen else None,
        module=model,
    )
    lengths = tuple([f.length for f in side] for side in sides)
    return lambda: cache.step(*sides, lengths=lengths, temperature=TEMPERATURE, normalize=True).loss.item(), model


def without_pixels(features):
    from dataclasses import replace

    return replace(features, vision={})


def one_batch(folder: str, count: int, frozen: bool, positions: str = "sequential") -> tuple[Step, torch.nn.Module]:
    """No GradCache: both sides packed whole, one forward and one backward."""
    from contrastive_kernels import info_nce

    model = freeze(load(folder, positions), frozen)
    packed = [model.pack(model.preprocess(side)) for side in pairs(count)]

    def step() -> float:
        loss = info_nce(*(model(side) for side in packed), temperature=TEMPERATURE, normalize=True)
        loss.backward()
        return loss.item()

    return step, model
