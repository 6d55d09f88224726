"""`python -m train plan` against runs: predicted peak of live tensors next to the measured one, and next to resident memory.

    python -m bench.plan [--size tiny 100m] [--kind full lora qlora] [--retain 0 all]

The measured peak is of the second step of the real run (`train.step`, optimizer state there already) under
`train.live_bytes`; resident is how much the process then holds beyond what it held before the model was loaded, with
MALLOC_MMAP_THRESHOLD_=65536. Aims: predicted over live between 1 and 1.02; at 100m, predicted over resident 0.9 to 1.1.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench import encode_models

PAIRS = {"tiny": 32, "100m": 6}
BUDGET = {"tiny": 1024, "100m": 512}
KINDS = {
    "full": {},
    "lora": {"lora": {"r": 16, "alpha": 64, "dropout": 0.1, "dora": False}},
    "qlora": {"lora": {"r": 16, "alpha": 64, "dropout": 0.1, "dora": False}, "quantization": "nf4", "optimizer": "paged_adamw_8bit"},
}


def write(folder: Path, size: str) -> dict:
    """Model and rows of the encode benchmark's mix below `folder`; a recipe's values but for how it trains."""
    from vlm2vec.data.mmeb import write_train

    encode_models.write(size, str(folder / "model"))
    (folder / "images").mkdir()
    items = encode_models.inputs(size, 2 * PAIRS[size])
    sides = []
    for number, item in enumerate(items):
        text = item if isinstance(item, str) else item.get("text", "") if isinstance(item, dict) else ""
        image = None if isinstance(item, str) else item["image"] if isinstance(item, dict) else item
        if image is not None:
            image.save(folder / "images" / f"{number}.png")
        sides.append((text if image is None else f"<|image_1|>\n{text}", "" if image is None else f"{number}.png"))
    rows = [
        {"qry": q[0], "qry_image_path": q[1], "pos_text": t[0], "pos_image_path": t[1]}
        for q, t in zip(sides[: PAIRS[size]], sides[PAIRS[size] :], strict=True)
    ]
    write_train(folder / "train", "Mix", rows)
    data = {"root": str(folder / "train"), "images": str(folder / "images"), "sources": [{"name": "Mix"}]}
    return {
        "model": str(folder / "model"), "output": str(folder / "output"), "data": data, "steps": 2, "global_batch": PAIRS[size],
        "chunk_tokens": BUDGET[size], "cpu": True,
    }  # fmt: skip


def restart_resident_peak() -> float:
    """Resident MiB now; the peak that `resident("VmHWM")` reads begins anew."""
    gc.collect()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    return resident("VmRSS")


def resident(field: str) -> float:
    """MiB that Linux states for this process: VmRSS, resident now, or VmHWM, the most so far."""
    with open("/proc/self/status", encoding="ascii") as f:
        line = next(line for line in f if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024


def measured(values: dict) -> dict:
    """Two steps of the real run in this process: bytes of live tensors and resident MiB in the second."""
    import torch
    import transformers

    from train.build import build_model
    from train.live_bytes import LiveBytes
    from train.plan_batch import first_batch
    from train.recipe import Recipe
    from train.recipe_values import build
    from train.step import ContrastiveStep
    from train.trainer import training_arguments

    recipe = build(Recipe, values, where="")
    torch.nn.Linear(4, 4)(torch.zeros(1, 4)).sum().backward()  # what autograd loads is no part of the model
    before = restart_resident_peak()
    model = build_model(recipe).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    kind, options = transformers.Trainer.get_optimizer_cls_and_kwargs(training_arguments(recipe), model)
    optimizer = kind(trained, **options)
    batches = [first_batch(recipe, model.processing, 1) for _ in range(2)]
    step = ContrastiveStep(recipe, model, model, device=torch.device("cpu"))

    def one(batch) -> None:
        step(batch)
        torch.nn.utils.clip_grad_norm_(trained, recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        one(batches[0])
        live.restart_peak()
        restart_resident_peak()
        one(batches[1])
    return {"live": live.peak, "resident": (resident("VmHWM") - before) * 2**20, "parts": live.at_peak}


def planned(values: dict) -> dict:
    """The prediction, in this process."""
    from train.plan_batch import first_batch
    from train.plan_simulate import simulate
    from train.recipe import Recipe
    from train.recipe_values import build

    recipe = build(Recipe, values, where="")
    made = simulate(recipe, None, make_batch=lambda processing: first_batch(recipe, processing, 1), flash=False, most_chunks=64)
    return {"peak": made.peak, "parts": made.parts}


def in_child(what: str, values: dict) -> dict:
    command = [sys.executable, "-m", "bench.plan", "--child", what, json.dumps(values)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
    if done.returncode:
        raise RuntimeError(f"{what} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plan", description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--kind", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--retain", nargs="+", choices=("0", "all"), default=["0", "all"])
    args = parser.parse_args(argv)
    missed = 0
    print(" ".join(f"{head:>14}" for head in ("size", "kind", "retain", "predicted MiB", "live MiB", "predicted is", "resident MiB", "predicted is")))
    for size in args.size:
        with tempfile.TemporaryDirectory() as folder:
            values = write(Path(folder), size)
            for kind in args.kind:
                for retain in args.retain:
                    changed = {**values, **KINDS[kind], "retain": retain if retain == "all" else int(retain)}
                    plan, run = in_child("planned", changed), in_child("measured", changed)
                    live, held = plan["peak"] / run["live"], plan["peak"] / run["resident"]
                    good = 1 <= live <= 1.02 and (size == "tiny" or 0.9 <= held <= 1.1)
                    missed += not good
                    mib = [f"{x / 2**20:.2f}" for x in (plan["peak"], run["live"], run["resident"])]
                    cells = (size, kind, retain, mib[0], mib[1], f"{live:.4f}", mib[2], f"{held:.3f}")
                    print(" ".join(f"{cell:>14}" for cell in cells), "" if good else "  MISSED", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        print(json.dumps({"measured": measured, "planned": planned}[sys.argv[2]](json.loads(sys.argv[3]))))
    else:
        sys.exit(main())
