"""Runs the parts, each in processes of its own, until they are done or time is out. See `python -m bench gpu --help`."""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

from bench import gpu, tables
from bench.gpu import record
from bench.gpu.check import NEEDS, PARTS, PROCESSES
from bench.gpu.child import POISONED, TOLD
from bench.gpu.report import Report
from bench.measure import ROOT, child_environment

CHILD = [sys.executable, "-m", "bench.gpu.child"]
RESTARTS = 4  # of a part's process, after checks that ended it
START_SECONDS = 120.0  # a process that has not begun its first check by then hangs


def part_environment(dry: bool) -> dict[str, str]:
    """A part's process finds this checkout, asks no network, and interprets kernels exactly when it runs dry."""
    variables = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if dry:
        variables |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = child_environment(without=("TRITON_INTERPRET",), **variables)
    if dry:
        environment.setdefault("OMP_NUM_THREADS", "1")
    return environment


def processes_of(part: str, dry: bool) -> int:
    return 1 if dry else PROCESSES.get(part, 1)


class Child:
    """A part's process: started early, so that its imports overlap with the part before, and told to go later."""

    def __init__(self, command: list[str], part: str, share: str, args):
        self.log = args.output / f"{part}.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, part, "--device", "cpu" if args.dry else "cuda", "--share", share, *(["--dry"] if args.dry else [])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=part_environment(args.dry),
            )
        self._lines: queue.Queue = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._lines.put(json.loads(line))
        self._lines.put(None)

    def go(self, seconds: float, tried: list[str]) -> None:
        try:
            self.process.stdin.write(json.dumps({"seconds": seconds, "tried": tried}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it ended: its exit code tells

    def next(self, seconds: float) -> dict | None:
        """The next message, None at its end. Raises queue.Empty when none comes in time."""
        return self._lines.get(timeout=max(0.01, seconds))

    def end(self) -> int:
        """Kill it where it still runs; its exit code."""
        self.process.kill()
        return self.process.wait()

    def last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else ""


class PartRun:
    """One share of a part, over as many processes as it takes."""

    def __init__(self, part: str, share: str, args, command, report: Report, ends: float):
        self.part, self.share, self.args, self.command, self.report, self.ends = part, share, args, command, report, ends
        self.tried: list[str] = []
        self.current: dict | None = None

    def start(self) -> Child:
        return Child(self.command, self.part, self.share, self.args)

    def run(self, child: Child | None = None) -> None:
        for _ in range(1 + RESTARTS):
            child = child or self.start()
            try:
                child.go(self.ends - time.monotonic(), self.tried)
                if self._attend(child):
                    return
            finally:
                child.end()
            child = None
            if self.ends - time.monotonic() < NEEDS:
                self.report.note(self.part, "the rest of the part", "skipped: no time left")
                return
        self.report.complain(self.part, "the rest of the part", f"given up after {1 + RESTARTS} processes")

    def _attend(self, child: Child) -> bool:
        """Take the child's messages. True when the part is done with, False when a new process should go on."""
        self.current, limit = None, START_SECONDS
        while True:
            try:
                message = child.next(min(limit, self.ends - time.monotonic() + NEEDS))
            except queue.Empty:
                if self.ends - time.monotonic() <= 0:
                    self.report.note(self.part, self.current["name"] if self.current else "start", "stopped: no time left")
                    return True
                self._fault(f"hangs: nothing came back within {limit:.0f} s, its process was ended")
                return self.current is None  # one that does not even start would not start again
            if message is None:
                return self._ended(child)
            limit = message["seconds"] if message["kind"] == "start" else START_SECONDS
            self._take(message)

    def _take(self, message: dict) -> None:
        kind, name, text = message["kind"], message["name"], message.get("text", "")
        if kind == "start":
            self.current = message
            self.tried.append(name)
            return
        self.current = None
        if kind == "failed":
            self.report.complain(self.part, name, text, message.get("trace", ""))
        elif kind == "note":
            self.report.note(self.part, name, text, message.get("trace", ""))
        elif message["rows"]:
            self.report.add(self.part, message["rows"], message["ours"])
        else:
            self.report.add(self.part, [{"name": name, "note": text or "ok"}])

    def _ended(self, child: Child) -> bool:
        code = child.process.wait()
        if code in (0, TOLD):
            return True
        if code != POISONED:  # the check that lost the device was told
            self._fault(f"its process ended with {code}: {child.last_words()}")
        return self.current is None and code != POISONED

    def _fault(self, text: str) -> None:
        """Of the check at hand, or of the start where there is none: a complaint, unless the check is a peer's."""
        current = self.current or {"name": "start", "ours": True}
        (self.report.complain if current["ours"] else self.report.note)(self.part, current["name"], text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--minutes", type=float, default=8.0, help="what does not fit is left out, and told")
    parser.add_argument("--output", type=Path, default=tables.SCRATCH / "gpu", help="folder of results.json and results.csv")
    parser.add_argument("--dry", action="store_true", help="tiny, on a CPU, kernels interpreted: a test of this program")
    parser.add_argument("--record", nargs="?", const=True, metavar="DIR", help="turn the results in DIR into files to commit; runs nothing")


def run(args, command: list[str] = CHILD) -> int:
    """Run the parts that `args` asks for. command: starts a child."""
    ends = time.monotonic() + 60 * args.minutes
    if not args.dry:
        import torch

        if not torch.cuda.is_available():
            print("python -m bench gpu: no CUDA device here; --dry runs everything tiny without one, `bench aot` compiles", file=sys.stderr)
            return 2
    args.output = args.output.resolve()
    args.output.mkdir(parents=True, exist_ok=True)
    for log in args.output.glob("*.log"):
        if log.stem in PARTS:
            log.unlink()
    device = "CPU, interpreted (nothing here is a measurement)" if args.dry else torch.cuda.get_device_name()
    report = Report(args.output, tables.versions(device) | {"dry": args.dry})
    ready: Child | None = None
    names = [name for name in PARTS if name in args.parts]
    try:
        for number, name in enumerate(names):
            if ends - time.monotonic() < NEEDS:
                report.note(name, "the whole part", "skipped: no time left")
                continue
            processes = processes_of(name, args.dry)
            runs = [PartRun(name, f"{i}/{processes}", args, command, report, ends) for i in range(processes)]
            first, ready = ready or runs[0].start(), None
            threads = [threading.Thread(target=one.run, daemon=True) for one in runs[1:]]
            for thread in threads:
                thread.start()
            if number + 1 < len(names):
                following = names[number + 1]
                ready = Child(command, following, f"0/{processes_of(following, args.dry)}", args)
            runs[0].run(first)
            for thread in threads:
                thread.join()
    finally:
        if ready is not None:
            ready.end()
    report.write()
    print(report.ending())
    return int(bool(report.complaints))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu", description=gpu.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.record:
        return record.main(None if args.record is True else Path(args.record))
    return run(args)
