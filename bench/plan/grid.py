"""`plan --best` next to the best of a full grid, every point of which is simulated as it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

ATMOST = 1.03  # predicted seconds of `--best` over the grid's best
PROCESSOR_SECONDS = 120.0
QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)
RECIPES = (
    "bench-100m-lora:rtx4090-24",
    "qwen2-vl-2b-lora-24gb:rtx4090-24",
    "qwen2-vl-7b-qlora-24gb:rtx4090-24",
    "qwen2-vl-7b-lora-80gb:h100-80",
    "qwen2-vl-7b-lora-8x80gb-1k:h100-80:8",
)


def grid(planner, shapes, budgets: list[int], limit: float, quarters=QUARTERS) -> Iterator:
    """(recipe, plan) of every point of at most `limit` bytes: budgets, shares of chunks that keep their graph, checkpointing, sharding.

    More kept graphs take more memory: beyond a point that does not fit, those with more are not simulated.
    """
    from contrastive_kernels.gradcache.chunking import token_budget_chunks
    from train.plan.best.setting import ways

    for way in ways(planner.recipe, planner.ranks, planner.recipe.keep_mib):
        for budget in budgets:
            count = sum(len(token_budget_chunks([tokens for tokens, *_ in side], budget)) for side in shapes)
            for retain in sorted({round(quarter * count) for quarter in quarters}):
                recipe = replace(way.of(planner.recipe), chunk_tokens=budget, chunk_rows=None, retain=retain)
                plan = planner.plan(recipe, planner.run(recipe))
                if plan.simulation.peak > limit:
                    break
                yield recipe, plan


def powers_of_two(shapes, longest: int) -> list[int]:
    """Chunk budgets: from the longest sample to a whole side of the batch."""
    whole = max(sum(tokens for tokens, *_ in side) for side in shapes)
    return sorted({longest, whole, *(2**n for n in range(8, 24) if longest < 2**n < whole)})


def compared(planner, budgets: list[int] | None = None, limit: float | None = None, quarters=QUARTERS) -> dict:
    """A row of the table. `limit`: bytes that are there, by default the card's."""
    from train.plan.best.search import find_best
    from train.plan.search import usable

    limit = usable(planner.gpu) if limit is None else limit
    start = time.process_time()
    found = find_best(planner, limit)
    seconds = time.process_time() - start
    shapes = found.own.simulation.shapes
    points = list(grid(planner, shapes, budgets or powers_of_two(shapes, planner.least_budget), limit, quarters))
    recipe, best = min(points, key=lambda point: point[1].step_seconds, default=(None, None))
    row = {"cpu_ms": round(1e3 * seconds), "n": len(points), "ratio_to": "the grid's best"}
    if best is None or found.best is None:
        return row | {"note": f"fits: grid {best is not None}, --best {found.best is not None}"}
    where = (
        f"grid: {recipe.chunk_tokens} tokens, retain {recipe.retain}, checkpointing {recipe.gradient_checkpointing}, {recipe.distributed}"
    )
    return row | {
        "predicted_ms": round(1e3 * found.best.step_seconds, 1),
        "ratio": round(found.best.step_seconds / best.step_seconds, 4),
        "note": where,
    }


def rows(words: list[str]) -> Iterator[tuple[dict, list[str]]]:
    """(row, what was missed) of each NAME:GPU[:RANKS]."""
    from train.plan.gpus import parse_gpu
    from train.plan.search import Planner
    from train.recipe.schema import load_recipe

    for word in words:
        name, gpu, *ranks = word.split(":")
        count = int(ranks[0]) if ranks else 1
        row = {"name": name, "options": f"{count} x {gpu}"}
        row |= compared(Planner(load_recipe(name, ranks=count), parse_gpu(gpu), count, name=name))
        missed = [f"MISSED {name}: {row['note']}"] if "ratio" not in row else []
        if row.get("ratio", 0) > ATMOST:
            missed.append(f"MISSED {name}: --best takes {row['ratio']} times the grid's best, aim {ATMOST}")
        if row["cpu_ms"] > 1e3 * PROCESSOR_SECONDS:
            missed.append(f"MISSED {name}: the search took {row['cpu_ms'] / 1e3:.0f} s of processor time, aim {PROCESSOR_SECONDS:.0f}")
        yield row, missed
