"""`python -m train plan` against runs: predicted peak of live tensors next to the measured one, and next to resident memory.

    python -m bench plan [--size tiny 100m] [--kind full lora qlora] [--retain 0 all] [--csv FILE]
    python -m bench plan --order [--size 100m] [--repeat 3]     settings by predicted and by measured time (`bench/plan/order.py`)
    python -m bench plan --grid [RECIPE:GPU[:RANKS] ...]        `plan --best` next to a full grid (`bench/plan/grid.py`); an hour

The measured peak is of the second step of the real run (`train.step`, the recipe's optimizer with its state there already)
under `train.plan.live_bytes`, which sees what bitsandbytes dequantises for a product as it sees any tensor. Resident is how much
the process then holds beyond what it held before the model was loaded, with MALLOC_MMAP_THRESHOLD_=65536. Not part of it is
what no step needs: the libraries' own pages, which a run of the tiny model has brought in before, and pages of the weights'
file that were read once, for quantising (`_settle`).
Aims: predicted over live between 1 and 1.02; at 100m, predicted over resident 0.9 to 1.1.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import tempfile
from pathlib import Path

from bench import measure, tables
from bench.measure import resident, restart_resident_peak
from bench.plan.recipe import PAIRS, write

_MADV_DONTNEED = 4
KINDS = {
    "full": {},
    "lora": {"lora": {"r": 16, "alpha": 64, "dropout": 0.1, "dora": False}},
    "qlora": {"lora": {"r": 16, "alpha": 64, "dropout": 0.1, "dora": False}, "quantization": "nf4", "optimizer": "paged_adamw_8bit"},
}


def _settle(model) -> None:
    """Brings into memory what the model's weights are, and nothing else of the file that they were loaded from.

    The file is mapped: pages that were read for quantising stay, though no tensor is there any more; pages that nothing has read
    yet are not there, though a tensor is. Both are the kernel's to decide, and neither is what the run needs.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/self/maps", encoding="utf-8") as f:
        mappings = [line.split() for line in f if line.rstrip().endswith(".safetensors")]
    for first, last in (mapping[0].split("-") for mapping in mappings):
        start, end = int(first, 16), int(last, 16)
        if libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), "madvise: the pages of the weights' file stay, and would count")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.flatten()[:: 1024 // tensor.element_size()].clone()


def measured(values: dict) -> dict:
    """Two steps of the real run in this process: bytes of live tensors and resident MiB in the second."""
    import torch
    import transformers

    from train.build import build_model
    from train.plan.batch import first_batch
    from train.plan.live_bytes import LiveBytes
    from train.recipe.from_yaml import build
    from train.recipe.schema import Recipe
    from train.step import ContrastiveStep
    from train.trainer import training_arguments

    recipe = build(Recipe, values, where="")
    before = restart_resident_peak()
    model = build_model(recipe).train()
    _settle(model)
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
    from train.plan.batch import first_batch
    from train.plan.simulate import simulate
    from train.recipe.from_yaml import build
    from train.recipe.schema import Recipe

    recipe = build(Recipe, values, where="")
    plan = simulate(recipe, None, make_batch=lambda processing: first_batch(recipe, processing, 1), flash=False, most_chunks=64)
    return {"peak": plan.peak, "parts": plan.parts}


def last_of(what: str, *values: dict) -> dict:
    """`measured` or `planned` of the last of `values`; those before it are run for what they leave behind in the process."""
    work = {"measured": measured, "planned": planned}[what]
    for earlier in values[:-1]:
        work(earlier)
    return work(values[-1])


CHILDREN = {"last of": last_of}


def in_child(what: str, *values: dict) -> dict:
    """`last_of` in a process of its own, whose resident peak tells of tensors."""
    return measure.in_child("bench.plan.run", "last of", what, *values, **measure.BLOCKS_GIVEN_BACK)


def compared(size: str, values: dict, warm: dict, kind: str, retain: str) -> dict:
    """A row of the table: the prediction and a run of one way to train."""
    how = {**KINDS[kind], "retain": retain if retain == "all" else int(retain)}
    plan = in_child("planned", {**values, **how})
    run = in_child("measured", {**warm, **how}, {**values, **how})
    return {
        "size": size,
        "kind": kind,
        "retain": retain,
        "predicted_mib": round(plan["peak"] / 2**20, 3),
        "live_mib": round(run["live"] / 2**20, 3),
        "predicted_over_live": round(plan["peak"] / run["live"], 6),
        "resident_mib": round(run["resident"] / 2**20, 1),
        "predicted_over_resident": round(plan["peak"] / run["resident"], 3),
    }


def misses(row: dict) -> list[str]:
    """The aims that a row misses, in words."""
    which = f"{row['size']} {row['kind']} retain {row['retain']}: predicted over"
    missed = []
    if not 1 <= row["predicted_over_live"] <= 1.02:
        missed.append(f"MISSED {which} live bytes {row['predicted_over_live']}, aim 1 to 1.02")
    if row["size"] != "tiny" and not 0.9 <= row["predicted_over_resident"] <= 1.1:
        missed.append(f"MISSED {which} resident memory {row['predicted_over_resident']}, aim 0.9 to 1.1")
    return missed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", nargs="+", choices=list(PAIRS), default=list(PAIRS))
    parser.add_argument("--kind", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--retain", nargs="+", choices=("0", "all"), default=["0", "all"])
    parser.add_argument("--order", action="store_true", help="order of settings by predicted and by measured time")
    parser.add_argument("--grid", nargs="*", metavar="RECIPE:GPU[:RANKS]", help="plan --best next to a full grid; default five recipes")
    parser.add_argument("--repeat", type=int, default=3, help="measured steps of --order")


def of_times(args: argparse.Namespace) -> int:
    """The tables of predicted times."""
    from bench.plan import grid, order

    made, missed = [], []
    if args.order:
        sizes = [size for size in args.size if size != "tiny" or args.size == ["tiny"]]
        tables_of = [order.rows(size, args.repeat) for size in sizes]
    else:
        tables_of = (([row], lacks) for row, lacks in grid.rows(args.grid or [*grid.RECIPES]))
    for rows, lacks in tables_of:
        made += [{"part": "plan", **row} for row in rows]
        missed += lacks
        for row in rows:
            print("  ".join(f"{name} {cell}" for name, cell in row.items()), flush=True)
    return tables.conclude(made, missed, args.csv)


def main(argv=None) -> int:
    parser = tables.parser("plan", __doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.order or args.grid is not None:
        return of_times(args)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        warm = write(Path(folder, "warm"), "tiny")
        for size in args.size:
            values = write(Path(folder, size), size)
            for kind in args.kind:
                for retain in args.retain:
                    rows.append(compared(size, values, warm, kind, retain))
                    if len(rows) == 1:
                        print(" ".join(f"{name:>23}" for name in rows[0]))
                    print(" ".join(f"{cell:>23}" for cell in rows[-1].values()), flush=True)
    return tables.conclude([{"part": "plan", **row} for row in rows], [line for row in rows for line in misses(row)], args.csv)


if __name__ == "__main__":
    sys.exit(main())
