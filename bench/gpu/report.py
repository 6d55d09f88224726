"""What was found so far: rows, complaints and notes, written as one JSON and one CSV after every check; a short table at the end."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

from bench import tables

LIMIT = "three products, bfloat16 out (limit)"
_WIDE = 200  # characters of a line on the screen


class Report:
    """Of one run. Safe to use from several threads.

    Args:
        folder: gets results.json and results.csv. about: what made the rows, columns of the CSV.
    """

    def __init__(self, folder: Path, about: dict):
        self.folder, self.about = folder, about
        self.rows: list[dict] = []
        self.complaints: list[dict] = []
        self.notes: list[dict] = []
        self._began, self._lock = time.monotonic(), threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, part: str, rows: list[dict], ours: bool = True) -> None:
        """Rows of a check; what one of them calls `wrong` is a complaint where the check is ours, else a note."""
        for row in rows:
            wrong = row.pop("wrong", None) or []
            row = {"part": part, **row}
            with self._lock:
                self.rows.append(row)
                _ratios(self.rows, row)
            self.say(part, row["name"], shown(row))
            for text in [wrong] if isinstance(wrong, str) else wrong:
                (self.complain if ours else self.note)(part, row["name"], text)
        self.write()

    def complain(self, part: str, name: str, text: str, trace: str = "") -> None:
        with self._lock:
            self.complaints.append({"part": part, "name": name, "text": text} | ({"trace": trace} if trace else {}))
        self.say(part, name, f"WRONG: {text}")
        self.write()

    def note(self, part: str, name: str, text: str, trace: str = "") -> None:
        with self._lock:
            self.notes.append({"part": part, "name": name, "text": text} | ({"trace": trace} if trace else {}))
        self.say(part, name, text)
        self.write()

    def say(self, part: str, name: str, text: str) -> None:
        print(f"[{time.monotonic() - self._began:6.1f} s] {part:<9} {name:<52} {text}"[:_WIDE], flush=True)

    def write(self) -> None:
        with self._lock:
            whole = {"about": self.about, "complaints": self.complaints, "notes": self.notes, "rows": self.rows}
            tables.write_whole(self.folder / "results.json", json.dumps(whole, indent=1, default=str) + "\n")
            tables.write_csv(self.folder / "results.csv", self.rows, self.about)

    def ending(self) -> str:
        """The notes that say what was left out, complaints, and a table of times."""
        lines = ["", f"== {len(self.rows)} rows, {len(self.notes)} notes, {len(self.complaints)} complaints; in {self.folder}"]
        lines += [f"   {note['part']}: {note['name']}: {note['text']}"[:_WIDE] for note in self.notes]
        lines += [f"WRONG {bad['part']}: {bad['name']}: {bad['text']}"[:_WIDE] for bad in self.complaints]
        timed = [row for row in self.rows if row.get("tflops")]
        if timed:
            lines += ["", f"{'N':>6} {'M':>8} {'D':>5} {'':<46} {'p50 ms':>9} {'x limit':>8} {'MiB':>9} {'predicted':>9}"]
        for row in timed:
            ratio, peak, predicted = (row.get(key, "") for key in ("times_three_gemms", "peak_mib", "predicted_ms"))
            shape = f"{row['n']:>6} {row['m']:>8} {row['d']:>5}"
            lines.append(f"{shape} {row['name']:<46} {row['ms_p50']:>9.3f} {ratio:>8} {peak:>9} {predicted:>9}")
        return "\n".join(lines)


def _ratios(rows: list[dict], row: dict) -> None:
    """Milliseconds of a row over those of the three products of its part and shape."""
    if not row.get("ms_p50"):
        return
    for other in rows:
        if other["name"] == LIMIT and all(other.get(key) == row.get(key) for key in ("part", "n", "m", "d")):
            row["times_three_gemms"] = round(row["ms_p50"] / other["ms_p50"], 3)


def shown(row: dict) -> str:
    """A row in a few words."""
    words = []
    if "ms_p50" in row:
        words.append(f"{row['ms_p50']:.3f} ms" + (f", {row['times_three_gemms']} x limit" if row.get("times_three_gemms") else ""))
    if row.get("peak_mib") not in (None, ""):
        words.append(f"{row['peak_mib']} MiB")
    if "value" in row:
        value = row["value"]
        words.append(f"{f'{value:.5g}' if isinstance(value, float) else value} {row.get('unit', '')}".strip())
    if row.get("predicted") not in (None, ""):
        words.append(f"predicted {row['predicted']:.5g}" if isinstance(row["predicted"], float) else f"predicted {row['predicted']}")
    words += [f"{key} {value}" for key, value in row.items() if key.endswith("_error") and value not in (None, "")]
    return ", ".join(words + ([row["note"]] if row.get("note") else []))
