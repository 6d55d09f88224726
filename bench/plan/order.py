"""The order of settings by predicted time, next to their order by the time that steps take: on this CPU, one thread.

The CPU is a card like any other to the plan: its rates of products and copies, and its time from one operator to the next, are
measured first. A step's time is processor time, the least of several in turns, so that a busy machine changes no order.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench import measure
from bench.plan.recipe import write

# Shares of the chunks that keep their graph, and whether each layer is made again. Between the first two `plan --best` has to decide:
# neither makes every forward pass that the other one makes.
SETTINGS = {
    "half of the graphs kept": (0.5, False),
    "every graph kept, checkpointing": (1.0, True),
    "half of the graphs kept, checkpointing": (0.5, True),
}
LORA = {"lora": {"r": 16, "alpha": 64, "dropout": 0.1, "dora": False}}


@dataclass(frozen=True)
class Rates:
    """FLOP/s of a float32 product, bytes/s of a copy, seconds of an operator that does next to nothing."""

    flops: float
    bytes: float
    dispatch: float


def _seconds(run: Callable[[], object], times: int) -> float:
    """Least processor time of one call."""
    best = float("inf")
    for _ in range(times):
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return best


def rates() -> Rates:
    """Of this CPU, in the sizes of the 100M model's layers."""
    import torch

    left, right = torch.randn(512, 768), torch.randn(768, 2304)
    source, small = torch.randn(2**23), torch.randn(16)
    copied = torch.empty_like(source)
    product = _seconds(lambda: left @ right, 20)
    copy = _seconds(lambda: copied.copy_(source), 10)
    thousand = _seconds(lambda: [small.neg() for _ in range(1000)], 10)
    return Rates(2 * left.shape[0] * right.numel() / product, 2 * source.nbytes / copy, thousand / 1000)


def order(size: str, repeat: int) -> dict[str, list]:
    """{setting: [predicted seconds, measured seconds]}, in this process."""
    import torch

    from train.build import build_model
    from train.plan.batch import first_batch
    from train.plan.simulate import simulate
    from train.recipe.from_yaml import build
    from train.recipe.schema import Recipe
    from train.step import ContrastiveStep

    torch.set_num_threads(1)
    found: dict[str, list] = {}
    steps: dict[str, Callable] = {}
    cpu = rates()
    with tempfile.TemporaryDirectory() as folder:
        values = write(Path(folder), size)

        def planned(recipe: Recipe):
            rates = {"flop_rate": cpu.flops, "byte_rate": cpu.bytes, "dispatch": cpu.dispatch}
            return simulate(recipe, None, make_batch=lambda p: first_batch(recipe, p, 1), flash=False, most_chunks=64, **rates)

        chunks = planned(build(Recipe, {**values, **LORA}, where="")).chunks
        for name, (share, checkpoints) in SETTINGS.items():
            changes = {"retain": round(share * chunks), "gradient_checkpointing": checkpoints}
            recipe = build(Recipe, {**values, **LORA, **changes}, where="")
            plan = planned(recipe)
            found[name] = [plan.cost.seconds, 0.0]
            model = build_model(recipe).train()
            step = ContrastiveStep(recipe, model, model, device=torch.device("cpu"))
            batch = first_batch(recipe, model.processing, 1)
            steps[name] = lambda step=step, batch=batch: step(batch)
        for name, (_, cpu_ms) in measure.interleaved(steps, repeat).items():
            found[name][1] = cpu_ms / 1e3
    return found


CHILDREN = {"order": order}


def rows(size: str, repeat: int) -> tuple[list[dict], list[str]]:
    """Rows of the table, and what was missed."""
    found = measure.in_child("bench.plan.order", "order", size, repeat, OMP_NUM_THREADS="1")
    orders = [sorted(found, key=lambda name: found[name][which]) for which in (0, 1)]
    rows = [
        {"name": name, "size": size, "predicted_ms": round(1e3 * predicted, 1), "cpu_ms": round(1e3 * seconds, 1), "repeat": repeat}
        | {"ratio": round(predicted / seconds, 3), "ratio_to": "measured"}
        for name, (predicted, seconds) in found.items()
    ]
    missed = [] if orders[0] == orders[1] else [f"MISSED {size}: predicted order {orders[0]}, measured {orders[1]}"]
    return rows, missed
