"""The process in which a part runs: python -m bench.gpu.child PART --device cuda [--dry] [--share I/K]

It imports what it needs, waits for one line on stdin, {"seconds": left, "tried": [names]}, then tries each check that was not
tried yet, and answers on stdout in lines of JSON. What libraries print goes to stderr.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import traceback

from bench.gpu.check import Check, Machine, NotHere
from bench.gpu.faults import described, poisoned

POISONED, TOLD = 3, 4  # exit codes: the device is lost; the part ends early, and it was said why
TRACE = 1500  # characters of a traceback, from its end


def attempt(check: Check, machine: Machine, say) -> bool:
    """Run one check and tell what came of it. False when the device is lost."""
    patience = 5 if machine.dry else 1  # a dry run shares its processor with whatever else tests do
    say(kind="start", name=check.name, seconds=patience * check.seconds, ours=check.ours)
    began = time.monotonic()
    try:
        import torch

        torch.manual_seed(0)
        got = check.run()
        machine.clock.forget()  # waits for the device: what it failed at asynchronously is this check's
    except NotHere as reason:
        say(kind="note", name=check.name, text=str(reason))
    except Exception as error:
        text = described(error)
        if not check.ours and isinstance(error, ImportError):
            text = f"not installed: {error}"
        lost = poisoned(error)
        if lost:
            text += " (this process lost the device by it)"
        say(kind="failed" if check.ours else "note", name=check.name, text=text, trace=traceback.format_exc()[-TRACE:])
        return not lost
    else:
        rows = [got] if isinstance(got, dict) else got if isinstance(got, list) else []
        rows = [{"name": check.name, **row} for row in rows]
        for row in rows:
            row.setdefault("took", round(time.monotonic() - began, 2))
        say(kind="done", name=check.name, rows=rows, text=got if isinstance(got, str) else "", ours=check.ours)
    return True


def parsed(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.child")
    parser.add_argument("part")
    parser.add_argument("--device", required=True)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--share", default="0/1", help="I/K: every K-th check, from the I-th on")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parsed(argv)
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)

    def say(**message) -> None:
        answers.write(json.dumps(message, default=str) + "\n")
        answers.flush()

    try:
        module = importlib.import_module(f"bench.gpu.parts.{args.part}")
    except Exception as error:
        say(kind="failed", name="import", text=described(error), trace=traceback.format_exc()[-TRACE:])
        return TOLD
    order = sys.stdin.readline()
    if not order:
        return 0  # the parent ended, or this part has no time
    order, (share, shares) = json.loads(order), map(int, args.share.split("/"))
    machine = Machine(args.device, args.dry, time.monotonic() + order["seconds"])
    tried = set(order["tried"])
    try:
        for number, check in enumerate(module.checks(machine)):
            if number % shares != share or check.name in tried:
                continue
            if machine.left() < check.needs:
                say(kind="note", name=check.name, text="skipped: no time left")
            elif not attempt(check, machine, say):
                return POISONED
    except Exception as error:
        say(kind="failed", name="list of checks", text=described(error), trace=traceback.format_exc()[-TRACE:])
        return TOLD
    return 0


if __name__ == "__main__":
    sys.exit(main())
