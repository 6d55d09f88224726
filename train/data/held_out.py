"""Held-out rows, encoded every so many steps: whether a run learns more than its batches.

The last rows of every source never enter a batch. They are encoded chunk by chunk, without gradients and with dropout off, and each
query is ranked among the targets of its source.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from contrastive_kernels.gradcache.chunking import row_chunks, token_budget_chunks
from contrastive_kernels.gradcache.generator_state import GeneratorState
from vlm2vec.encoding import evaluating
from vlm2vec.evaluation.score.ties import WARN_ABOVE, held_out_ties

from ..recipe.schema import Recipe
from ..step import ContrastiveStep
from .media_stream import BatchSide
from .rows import PairDataset, collate

logger = logging.getLogger(__name__)


def evaluate(step: ContrastiveStep, dataset: PairDataset, recipe: Recipe, rank: int = 0, world_size: int = 1) -> dict[str, float]:
    """Loss and accuracy (the share of queries whose own target comes first) of the held-out rows, by source and on average.

    Collective over the ranks, which share the chunks. Draws from no generator and leaves gradients alone.

    Returns:
        `eval_loss`, `eval_accuracy` and `eval_tied`, means over the sources, and `eval_SOURCE_accuracy` of each; empty where no source
        is large enough to hold rows back. A query whose own target ties with another is not right; `eval_tied` is the share of those
        that tie, by the rule of `vlm2vec.evaluation.score.ties`.
    """
    generators = GeneratorState.capture()
    figures: dict[str, tuple[float, float, float]] = {}
    try:
        with evaluating(step.unwrapped):
            for source, rows in enumerate(dataset.held_out_rows()):
                if len(rows):
                    name = recipe.data.sources[source].name
                    figures[name] = _score(step, collate([dataset[source, row] for row in rows]), recipe, rank, world_size)
    finally:
        generators.restore()
    if not figures:
        return {}
    losses, accuracies, tied = zip(*figures.values())
    mean = {"eval_loss": float(np.mean(losses)), "eval_accuracy": float(np.mean(accuracies)), "eval_tied": float(np.mean(tied))}
    if max(tied) > WARN_ABOVE and rank == 0:
        worst = max(figures, key=lambda name: figures[name][2])
        logger.warning("held-out rows of %s: %.1f %% of the queries tie with another target and count as wrong", worst, 100 * max(tied))
    return mean | {f"eval_{name}_accuracy": accuracy for name, (_, accuracy, _) in figures.items()}


def _score(step: ContrastiveStep, batch: dict[str, Any], recipe: Recipe, rank: int, world_size: int) -> tuple[float, float, float]:
    """(loss, accuracy, share of tied queries) of one source's rows."""

    def unreadable(row: int, message: str) -> None:
        batch["kept"][row] = False

    count = len(batch["rows"])
    owners = [range(count)] * 2 + [np.repeat(np.arange(count), np.diff(batch["hard_offsets"])).tolist()]
    has_hard = recipe.objective.needs_negatives and bool(batch["negatives"])
    names = ("query", "target", "negatives") if has_hard else ("query", "target")
    sides = [step.media.side(batch[name], owner, unreadable) for name, owner in zip(names, owners)]
    try:
        query, target, *hard = (_encoded(step, side, recipe, rank, world_size) for side in sides)
    finally:
        for side in sides:
            side.close()
    readable = torch.from_numpy(batch["kept"]).to(query.device)
    if world_size > 1:  # a rank knows of the images that it decoded
        everywhere = readable.to(torch.uint8)
        dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
        readable = everywhere.bool()
    with torch.no_grad():
        # every row is a query of its own: equal ones are told apart by their targets alone
        known = step.loss_batch(batch, has_hard, query_ids=torch.arange(count, device=query.device))
        tied = held_out_ties(query, target, known.target_ids, readable).sum() / readable.sum().clamp(min=1)
        return *recipe.objective.held_out(step.loss, query, target, known, readable, *hard), float(tied)


@torch.no_grad()
def _encoded(step: ContrastiveStep, side: BatchSide, recipe: Recipe, rank: int, world_size: int) -> torch.Tensor:
    """(rows, D) float32 embeddings of a side, the same on every rank."""
    lengths = side.lengths
    chunks = row_chunks(lengths, recipe.chunk_rows) if recipe.chunk_rows else token_budget_chunks(lengths, step.gradcache.chunk_tokens)
    # Every rank runs as many: a sharded model's forward is collective. The last turn may do a chunk twice.
    turns = [range(first, first + world_size) for first in range(0, len(chunks), world_size)]
    all_hidden = None
    for turn in turns:
        index = turn[rank]
        rows = chunks[min(index, len(chunks) - 1)]
        hidden = step.embed(side, rows).float()
        if all_hidden is None:
            all_hidden = hidden.new_zeros(len(lengths), hidden.shape[1])
        if index < len(chunks):
            all_hidden[torch.tensor(rows, device=hidden.device)] = hidden
    if world_size > 1:
        dist.all_reduce(all_hidden)
    return all_hidden
