"""Plans of the recipes that the part `train` runs, made beforehand and committed as planned/NAME.json.

    python -m bench.gpu.plans          (on a CPU, about two minutes: python -m train plan, kept as numbers)

Each holds what `python -m train plan RECIPE --gpu GPU --KEY VALUE ...` predicts of a step, for each of GPUS.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from bench import tables
from bench.measure import ROOT

HERE = Path(__file__).parent / "planned"
GPUS = ("h100-80", "h200-141")


@dataclass(frozen=True)
class Planned:
    """A recipe, and what of it is overridden."""

    recipe: str
    overrides: tuple[str, ...] = ()

    def loaded(self):
        from train.recipe.schema import load_recipe

        return load_recipe(str(ROOT / "train/recipes" / self.recipe), list(self.overrides), ranks=1)


PLANNED = {
    "100m": Planned("bench-100m-lora.yaml"),
    "7b": Planned("qwen2-vl-7b-lora-80gb.yaml", ("--global_batch", "64")),  # of 1,024: seconds, not minutes
}


def numbers(recipe, name: str, gpus=GPUS) -> dict:
    """What is predicted of a step: bytes, chunks, tokens, FLOPs, and seconds by GPU."""
    from train.plan.gpus import parse_gpu
    from train.plan.search import make_plan

    plans = {gpu: make_plan(recipe, parse_gpu(gpu), 1, name=name) for gpu in gpus}
    one = next(iter(plans.values()))
    step = one.simulation
    return {
        "peak": step.peak,
        "parts": step.parts,
        "chunks": step.chunks,
        "tokens": one.tokens,
        "trained": step.trained,
        "weights": step.weights,
        "flops": step.cost.flops,
        "seconds": {gpu: float(f"{plan.step_seconds:.4g}") for gpu, plan in plans.items()},
    }


def read(name: str) -> dict:
    return json.loads((HERE / f"{name}.json").read_text())


def main() -> int:
    for name, planned in PLANNED.items():
        command = f"python -m train plan train/recipes/{planned.recipe} --gpu {GPUS[0]} {' '.join(planned.overrides)}".strip()
        made = {"command": command} | numbers(planned.loaded(), planned.recipe)
        tables.write_whole(HERE / f"{name}.json", json.dumps(made, indent=1) + "\n")
        print(name, made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
