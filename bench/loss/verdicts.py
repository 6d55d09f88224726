"""Rows that say whether an aim of `python -m bench loss` is met, and the lines that they print."""

from __future__ import annotations

TEMPERATURE = 0.02
LEAST_RUNS = 5


def few(runs: int) -> str:
    """What is said of a verdict from fewer runs than it should have."""
    return "" if runs >= LEAST_RUNS else f"{runs} runs, {LEAST_RUNS} are asked for"


def show(row: dict) -> None:
    """Print a row of the peers."""
    cells = [f"{row['name']:<34}"]
    if "ms_min" in row:
        cells.append(f"{row['ms_min']:>10.0f} ms {row['cpu_ms']:>10.0f} cpu ms")
    if "ratio" in row:
        cells.append(f"{row['ratio']:>7.3f} of {row['ratio_to']} ({row['cpu_ratio']:.3f} by cpu)")
    print(" ".join([*cells, row.get("verdict", ""), row.get("note", "")]).rstrip(), flush=True)


def verdict(name, ratio, cpu_ratio, good, aim, n, d, dtype="float32", note="") -> dict:
    """A row that says whether a ratio meets its aim, and prints it."""
    row = {
        "part": "verdicts",
        "name": name,
        "n": n,
        "m": n,
        "d": d,
        "dtype": dtype,
        "ratio": ratio,
        "cpu_ratio": cpu_ratio,
        "aim": aim,
        "verdict": "PASS" if good else "MISS",
        "note": note,
    }
    print(f"{row['verdict']}  {name}: {ratio:.3f} ({cpu_ratio:.3f} by cpu), aim {aim}{f' ({note})' if note else ''}", flush=True)
    return row


def faster(name, mine, theirs, aim, n, d, dtype="float32", note="") -> dict:
    """`mine` must take at least `aim` times less than `theirs`; each is (wall, processor) milliseconds."""
    wall, cpu = theirs[0] / mine[0], theirs[1] / mine[1]
    return verdict(name + ", times as fast", wall, cpu, wall >= aim, f">= {aim}", n, d, dtype, note)


def at_most(name, mine, theirs, aim, n, d, dtype="float32", note="") -> dict:
    """`mine` may take at most `aim` times what `theirs` takes; each is (wall, processor) milliseconds."""
    wall, cpu = mine[0] / theirs[0], mine[1] / theirs[1]
    return verdict(name, wall, cpu, wall <= aim, f"<= {aim:.2f}", n, d, dtype, note)


def bounded(name: str, value: float, aim: float, unit_name: str, **row) -> dict:
    """A row that says whether a quantity in `unit_name` is at most `aim`, and prints it."""
    good = value <= aim
    print(f"{'PASS' if good else 'MISS'}  {name}: {value:.1f} {unit_name}, aim <= {aim:.1f}", flush=True)
    return {"part": "verdicts", "name": name, "aim": f"<= {aim:.1f} {unit_name}", "verdict": "PASS" if good else "MISS", **row}
