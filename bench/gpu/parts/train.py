"""Real training steps from random weights, next to their plans: peak of memory and seconds, measured over predicted.

The recipe's own model, batch, step and optimizer, as `python -m train RECIPE` has them; `plan.rows` of the recipe says what the batch
looks like, and pixels are random bytes, so no file, hub or `datasets` package is needed. Seconds therefore hold no decoding.
"""

from __future__ import annotations

import contextlib
import functools
import math
import tempfile
import time
from pathlib import Path

import torch
import yaml

from bench.gpu import plans
from bench.gpu.check import Check
from bench.measure import ROOT
from train.build import trained_parameters
from train.data.media_stream import Media
from train.optimizers import planned_optimizer
from train.plan import batch as plan_batch
from train.plan.fake import model as plan_model
from train.recipe.schema import load_recipe
from train.step import ContrastiveStep

STEPS = 3
MOST_OVER_PLAN = 1.1  # a peak above this times the predicted one breaks the promise that what is planned fits


class RandomMedia(Media):
    """Gives random pixels of the sizes that decoding would give."""

    def decode(self, features):
        tensors = {"pixel_values": torch.randint(0, 256, self.processing.decoded_shape(features), dtype=torch.uint8)}
        with self._lock:
            self.decoded += 1
            self._held += tensors["pixel_values"].numel()
        return tensors


class CountedStep(ContrastiveStep):
    """Knows its chunks, each of which is encoded in both passes, and who computed their attention."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen: set[tuple] = set()
        self.providers: set[str] = set()

    def _chunk(self, side, rows, **kwargs):
        packed = super()._chunk(side, rows, **kwargs)
        self.seen.add((id(side), *rows))
        self.providers.add(packed.segments.provider)
        return packed


def checks(machine):
    if machine.dry:
        yield Check("tiny", functools.partial(dry, machine))
        return
    for name, planned in plans.PLANNED.items():
        run = functools.partial(compared, machine, name, planned.loaded, plans.read(name))
        yield Check(name, run, seconds=150, needs=20 if name == "100m" else 45)


def compared(machine, name: str, recipe_of, plan: dict) -> list[dict]:
    """Two rows, memory and time, and what is wrong."""
    recipe = recipe_of()
    steps, facts = real_steps(recipe, machine.device)
    last, wrong = steps[-1], []
    for key in ("tokens", "chunks", "trained", "weights"):
        if facts[key] != plan[key]:
            wrong.append(f"{key}: the step has {facts[key]}, its plan {plan[key]}")
    if not all(math.isfinite(step["loss"]) and math.isfinite(step["norm"]) and step["norm"] > 0 for step in steps):
        wrong.append(f"losses {[step['loss'] for step in steps]}, norms of the gradients {[step['norm'] for step in steps]}")
    peak = max(step["peak"] for step in steps)
    if peak > MOST_OVER_PLAN * plan["peak"]:
        wrong.append(f"peak {peak / 2**30:.2f} GiB, {peak / plan['peak']:.3f} of its plan")
    note = f"{facts['tokens']} tokens, {facts['chunks']} chunks, attention by {facts['provider']}, loss {last['loss']:.4f}"
    rows = [{"name": f"{name}, seconds of a step", "value": last["seconds"], "unit": "s", "predicted": plan["seconds"][gpu_of(machine)]}]
    rows[0] |= {"note": note} | ({"wrong": wrong} if wrong else {})
    if machine.device == "cuda":
        rows.append({"name": f"{name}, peak of memory", "value": peak / 2**30, "unit": "GiB", "predicted": plan["peak"] / 2**30})
        rows[-1]["note"] = f"reserved {max(step['reserved'] for step in steps) / 2**30:.2f} GiB"
    for row in rows:
        row["measured_over_predicted"] = round(row["value"] / row["predicted"], 3)
    return rows


def gpu_of(machine) -> str:
    return "h200-141" if machine.device == "cuda" and "H200" in torch.cuda.get_device_name() else "h100-80"


def real_steps(recipe, device: str) -> tuple[list[dict], dict]:
    """Steps one after another, the first of which compiles; and what the last of them was made of."""
    device = torch.device(device)
    model = plan_model.model_of_config(recipe, device).to(device).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = planned_optimizer(recipe, parameters, device.type == "cuda")
    step = CountedStep(recipe, model, model, device=device)
    step.media.close()
    step.media = RandomMedia(model.processing, bound_mib=recipe.media_mib, threads=recipe.decode_threads)
    steps = []
    try:
        for _ in range(STEPS if device.type == "cuda" else 1):
            step.seen.clear()
            batch = plan_batch.assumed_batch(recipe, model.processing, 1)
            steps.append(_timed(step, batch, optimizer, parameters, recipe, device))
    finally:
        step.media.close()
    trained, weights = trained_parameters(model)
    facts = {"tokens": steps[-1]["tokens"], "chunks": len(step.seen), "trained": trained, "weights": weights}
    return steps, facts | {"provider": "/".join(sorted(step.providers))}


def _timed(step, batch, optimizer, parameters, recipe, device) -> dict:
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    result, lengths = step(batch)
    norm = torch.nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm or math.inf)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    loss, norm = float(result.loss), float(norm)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    peak, reserved = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if cuda else (0, 0)
    return {"seconds": seconds, "loss": loss, "norm": norm, "peak": peak, "reserved": reserved, "tokens": sum(map(sum, lengths))}


@contextlib.contextmanager
def tiny_recipe():
    """A recipe of seconds on a CPU: a model of two layers, five pairs, several chunks."""
    from bench import models

    with tempfile.TemporaryDirectory() as folder:
        models.write("tiny", folder)
        written = yaml.safe_load((ROOT / "train/recipes/bench-100m-lora.yaml").read_text())
        written |= {"model": folder, "output": folder + "/out", "global_batch": 5, "chunk_tokens": 96}
        written["plan"]["rows"] = [{"share": 1.0, "query": {"text": 12, "image": [56, 56]}, "target": {"text": 9}}]
        path = Path(folder, "recipe.yaml")
        path.write_text(yaml.safe_dump(written))
        yield load_recipe(str(path), [], ranks=1)


def dry(machine) -> list[dict]:
    """A tiny recipe, planned here and then run."""
    with tiny_recipe() as recipe:
        return compared(machine, "tiny", lambda: recipe, plans.numbers(recipe, "tiny", plans.GPUS[:1]))
