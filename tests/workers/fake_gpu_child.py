"""Stands in for bench/gpu/child.py in tests of the runner: speaks its protocol, imports nothing, and does as the part's name says."""

import json
import os
import sys
import time

PLANS = {
    "env": ["a", "die", "b", "lost", "c"],
    "smoke": ["a", "hang", "b"],
    "loss": ["die 1", "die 2", "die 3", "die 4", "die 5", "never"],
    "gate": [f"check {number}" for number in range(7)],
    "peers": ["die", "wrong", "b"],
    "attention": ["slow"],
}


def say(**message):
    print(json.dumps(message), flush=True)


def main():
    part, share, shares = sys.argv[1], *map(int, sys.argv[sys.argv.index("--share") + 1].split("/"))
    order = json.loads(sys.stdin.readline())
    if part == "train":
        sys.exit("cannot start")
    for number, name in enumerate(PLANS[part]):
        if number % shares != share or name in order["tried"]:
            continue
        ours = part != "peers"
        say(kind="start", name=name, seconds=1.0 if name == "hang" else 30.0, ours=ours)
        if name.startswith("die"):
            os._exit(7)
        if name in ("hang", "slow"):
            time.sleep(600)
        if name == "lost":
            say(kind="failed", name=name, text="CUDA error: illegal memory access", trace="")
            sys.exit(3)
        row = {"name": name, "value": 1.0, "unit": ""} | ({"wrong": "numbers"} if name == "wrong" else {})
        say(kind="done", name=name, rows=[row], text="", ours=ours)


main()
