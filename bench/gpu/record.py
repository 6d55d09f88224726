"""Turns the results of a run into files to commit: bench/results/CARD/, the cost model's rates, and docs/performance.md.

python -m bench gpu --record [DIR]
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from bench import tables
from bench.measure import ROOT

BEGIN, END = "<!-- python -m bench gpu --record: begin -->", "<!-- end -->"
NOTHING = "not measured yet"
# name of a row -> (field of roofline.Gpu, its unit in that field)
RATES = {
    ("env", "library product, bfloat16"): ("achieved", 1e12),
    ("env", "library product, float32"): ("achieved_fp32", 1e12),
    ("env", "memory, read and written"): ("bandwidth", 1e12),
    ("profile", "plain panel: Triton share of the library's rate"): ("triton_share", 1.0),
    ("env", "launch, in a CUDA graph"): ("launch", 1e-6),
}
# what docs/performance.md compares: row of the table of times -> options of `dispatch.plan`
COMPARED = {
    "ours": {"plain": True},
    "ours, normalize": {"normalize": True},
    "ours, symmetric, normalize": {"normalize": True, "symmetric": True},
}
SHAPES = ((4096, 1536), (16_384, 768), (16_384, 1536), (16_384, 3584), (65_536, 1536))


def card(device: str) -> str:
    """Folder of a device: nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def rates(rows: list[dict]) -> dict[str, float]:
    """Fields of `roofline.Gpu` that were measured; what was not, or is no positive number, is left out."""
    found = {}
    for row in rows:
        field = RATES.get((row["part"], row["name"]))
        if field and isinstance(row.get("value"), (int, float)) and row["value"] > 0:
            found[field[0]] = float(f"{row['value'] * field[1]:.4g}")
    return found


def write_rates(path: Path, name: str, measured: dict[str, float], source: str) -> None:
    """Put a GPU's rates into measured.py, beside those of others."""
    text = path.read_text(encoding="utf-8")
    scope: dict = {}
    exec(compile(text, str(path), "exec"), scope)
    head, comments = text[: text.index("RATES:")], dict(re.findall(r"^    # (\w+): (.*)$", text, re.M))
    table, comments[name] = {**scope["RATES"], name: measured}, source
    lines = [f"    # {gpu}: {comments.get(gpu, '')}\n    {gpu!r}: {rates!r},".replace("'", '"') for gpu, rates in sorted(table.items())]
    tables.write_whole(path, head + "RATES: dict[str, dict[str, float]] = {\n" + "\n".join(lines) + "\n}\n")


def keep(folder: Path, root: Path) -> Path:
    """Copy a run's results to bench/results/CARD and its rates to the cost model. Raises ValueError for what is no measurement."""
    path = folder / "results.json"
    if not path.is_file():
        raise ValueError(f"expected {path}, which python -m bench gpu --output {folder} writes; there is none")
    results = json.loads(path.read_text(encoding="utf-8"))
    about = results["about"]
    if about.get("dry"):
        raise ValueError(f"{path} is of a dry run, nothing in it is a measurement; run python -m bench gpu on a machine with CUDA")
    target = root / "bench/results" / card(about["device"])
    target.mkdir(parents=True, exist_ok=True)
    before = target / "results.json"
    if before.is_file():  # parts that ran again take the place of what they gave before, the others stand
        results = merged(json.loads(before.read_text(encoding="utf-8")), results)
    tables.write_whole(before, json.dumps(results, indent=1) + "\n")
    tables.write_csv(target / "results.csv", results["rows"], about)
    name = model_name(about["device"])
    found = rates(results["rows"])
    if name and found:
        source = f"{about['device']}, torch {about['torch']}, triton {about['triton']}, commit {about['commit']}"
        write_rates(root / "kernels/contrastive_kernels/roofline/measured.py", name, found, source)
    return target


def merged(before: dict, now: dict) -> dict:
    """Results of two runs: of every part what the later one found, where it ran it."""
    ran = {row["part"] for key in ("rows", "complaints", "notes") for row in now[key] if not row.get("text", "").startswith("skipped")}
    kept = {key: [row for row in before[key] if row["part"] not in ran] + now[key] for key in ("rows", "complaints", "notes")}
    for row in kept["rows"]:
        if row["part"] not in ran:
            row.setdefault("commit", before["about"]["commit"])
    return {"about": now["about"], **kept}


def model_name(device: str) -> str | None:
    """The GPU of `roofline.GPUS` that a device is, None where it is none of them."""
    from contrastive_kernels import roofline

    return next((name for name in roofline.GPUS if name in device.lower()), None)


def recorded(root: Path) -> list[dict]:
    """Every card's results."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((root / "bench/results").glob("*/results.json"))]


def _line(*cells) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def _table(head: list[str], rows: list[list]) -> list[str]:
    return [_line(*head), "|" + "---|" * len(head), *(_line(*row) for row in rows), ""]


def page(results: list[dict]) -> str:
    """What stands between the markers of docs/performance.md: predicted next to measured, one column for every card."""
    cards = [one["about"]["device"] for one in results]
    measured = [f"measured, {device}" for device in cards] or ["measured"]
    lines = ["## Value and gradients of the loss, bfloat16", "", "Milliseconds, and times the three bare products of that size.", ""]
    rows = []
    for n, d in SHAPES:
        for name, options in COMPARED.items():
            rows.append([f"{n:,}", f"{d:,}", name, _predicted(n, d, options), *([_time(one, n, d, name) for one in results] or [NOTHING])])
        others = ["ours, CUDA graph", "eager"] if n <= 16_384 else []  # as bench/gpu/timing.py takes them
        for name in others + (["torch.compile"] if (n, d) == (16_384, 1536) else []):
            rows.append([f"{n:,}", f"{d:,}", name, "", *([_time(one, n, d, name) for one in results] or [NOTHING])])
    lines += _table(["N = M", "D", "", "PREDICTED, H100", *measured], rows)
    lines += ["## Rates that the predictions are made of", ""]
    rows = [[title, text, *([_rate(one, at) for one in results] or [NOTHING])] for title, text, at in _assumed()]
    lines += _table(["", "assumed, H100", *measured], rows)
    lines += ["## A training step, next to its plan", "", "From random weights and random pixels: bench/gpu/parts/train.py.", ""]
    rows = [[title, text, *([_step(one, title) for one in results] or [NOTHING])] for title, text in _planned()]
    lines += _table(["", "PREDICTED, H100", *measured], rows)
    for one in results:
        about, wrong = one["about"], one["complaints"]
        made_by = f"torch {about['torch']}, triton {about['triton']}, commit {about['commit']}"
        lines += [f"{about['device']}: {made_by}; {len(wrong)} complaints.", ""]
        lines += [f"* {bad['part']}: {bad['name']}: {bad['text']}" for bad in wrong] + ([""] if wrong else [])
    return "\n".join(lines).rstrip() + "\n"


def _predicted(n: int, d: int, options: dict) -> str:
    from bench.gpu.timing import dispatch_plan
    from contrastive_kernels import roofline

    gpu = roofline.ASSUMED["h100"]  # not what was measured since: a prediction fitted to its outcome says nothing
    plan = dispatch_plan(n, n, d, gpu, **options)
    limit = roofline.three_gemms(gpu, n, n, d, itemsize=2)
    return f"{plan.chosen.seconds * 1e3:.2f} ({plan.chosen.seconds / limit:.2f}x)"


def _time(results: dict, n: int, d: int, name: str) -> str:
    for row in results["rows"]:
        if row["part"] in ("loss", "sizes") and (row.get("n"), row.get("d"), row["name"]) == (n, d, name) and row.get("ms_p50"):
            return f"{row['ms_p50']:.2f} ({row['times_three_gemms']:.2f}x)" if row.get("times_three_gemms") else f"{row['ms_p50']:.2f}"
    return NOTHING


def _assumed() -> list[tuple[str, str, tuple[str, str]]]:
    """(title, assumed value, row) of every rate: roofline's own numbers, whatever was measured since."""
    from contrastive_kernels import roofline

    gpu = roofline.ASSUMED["h100"]
    units = {"achieved": "TFLOP/s", "achieved_fp32": "TFLOP/s", "bandwidth": "TB/s", "triton_share": "", "launch": "us"}
    return [(at[1], f"{getattr(gpu, field) / unit:.4g} {units[field]}".strip(), at) for at, (field, unit) in RATES.items()]


def _rate(results: dict, at: tuple[str, str]) -> str:
    for row in results["rows"]:
        if (row["part"], row["name"]) == at and isinstance(row.get("value"), (int, float)):
            return f"{row['value']:.4g} {row.get('unit', '')}".strip()
    return NOTHING


def _planned() -> list[tuple[str, str]]:
    from bench.gpu import plans

    out = []
    for name in plans.PLANNED:
        plan = plans.read(name)
        out.append((f"{name}, peak of memory", f"{plan['peak'] / 2**30:.2f} GiB"))
        out.append((f"{name}, seconds of a step", f"{plan['seconds'][plans.GPUS[0]]:.2f} s"))
    return out


def _step(results: dict, title: str) -> str:
    for row in results["rows"]:
        if (row["part"], row["name"]) == ("train", title):
            return f"{row['value']:.2f} {row['unit']} ({row['measured_over_predicted']:.2f} of its plan)"
    return NOTHING


def write_page(root: Path) -> Path:
    """docs/performance.md with what is recorded between its markers."""
    path = root / "docs/performance.md"
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{path}: expected the lines {BEGIN} and {END}, between which the tables go")
    before, after = text.split(BEGIN)[0], text.split(END, 1)[1]
    tables.write_whole(path, f"{before}{BEGIN}\n\n{page(recorded(root))}\n{END}{after}")
    return path


def main(folder: Path | None, root: Path = ROOT) -> int:
    try:
        if folder is not None:
            print(f"recorded in {keep(folder, root)}")
        print(f"written: {write_page(root)}")
    except ValueError as error:
        print(f"python -m bench gpu --record: {error}", file=sys.stderr)
        return 1
    return 0
