"""Losses, gradients and statistics of two checkouts, bit by bit: every option, every pair of options and a sample of larger sets.

    python tests/kernels/compare_checkouts.py OTHER [--backend torch triton] [--sets 100]

On a CPU; Triton is interpreted, and takes each way that a problem can take in turn. Prints what differs; exit code 1 where anything does.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def calls(backend: str, sets: int):
    """(name, Case, options) of every call."""
    from tests.kernels.helpers.sampling import Case, random_sets, singles_and_pairs

    dtypes = (torch.float64, torch.float32) if backend == "torch" else (torch.float64,)
    for seed, names in enumerate(singles_and_pairs() + random_sets(sets, seed=7)):
        for dtype in dtypes:
            case = Case(seed, dtype=dtype)
            yield f"{'+'.join(names) or 'plain'} {str(dtype)[6:]}", case, case.options(names)


def take_ways_in_turn() -> list[int]:
    """Every plan takes its ways in turn; the number in the list says which turn it is."""
    from contrastive_kernels import dispatch

    turn = [0]

    def in_turn(function):
        def planned(*args, **kwargs):
            plan = function(*args, **kwargs)
            possible = [way for way in plan.ways if not way.reason]
            return dataclasses.replace(plan, chosen=possible[turn[0] % len(possible)])

        return planned

    for name, function in list(vars(dispatch).items()):
        if callable(function) and getattr(function, "__annotations__", {}).get("return") in ("Plan", dispatch.Plan):
            setattr(dispatch, name, in_turn(function))
    return turn


def run(backend: str, sets: int) -> dict[str, dict[str, torch.Tensor | str]]:
    """What every call gives: loss, the gradient of every tensor that has one, statistics."""
    from contrastive_kernels import info_nce

    turn = take_ways_in_turn() if backend == "triton" else [0]
    results = {}
    for number, (name, case, options) in enumerate(calls(backend, sets)):
        turn[0] = number
        leaves = {"query": case.query, "target": case.target}
        leaves |= {key: options[key] for key in ("hard_negatives", "temperature") if isinstance(options.get(key), torch.Tensor)}
        leaves = {key: tensor.clone().requires_grad_() for key, tensor in leaves.items()}
        options = options | {key: leaf for key, leaf in leaves.items() if key in options}
        try:
            loss, stats = info_nce(leaves["query"], leaves["target"], **options, backend=backend, return_stats=True)
            cotangent = torch.rand(loss.shape, generator=torch.Generator().manual_seed(number), dtype=loss.dtype)
            gradients = torch.autograd.grad(loss, list(leaves.values()), cotangent)
        except Exception as error:
            results[name] = {"error": f"{type(error).__name__}: {error}"}
            continue
        results[name] = {"loss": loss.detach()} | {f"d {key}": grad for key, grad in zip(leaves, gradients)}
        results[name] |= {f"stats.{field}": value for field, value in vars(stats).items()}
    return results


def in_child(checkout: Path, backend: str, sets: int) -> dict:
    """`run` with the kernels of a checkout, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(checkout / "kernels"), str(ROOT))), "OMP_NUM_THREADS": "1"}
    environment["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.pt"
        command = [sys.executable, __file__, str(checkout), "--backend", backend, "--sets", str(sets), "--write", str(file)]
        subprocess.run(command, check=True, env=environment, cwd=folder)
        return torch.load(file, weights_only=True)


def same(a, b) -> bool:
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return type(a) is type(b) and a == b
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="the other checkout of this repository")
    parser.add_argument("--backend", nargs="+", default=["torch", "triton"])
    parser.add_argument("--sets", type=int, default=100, help="larger sets of options")
    parser.add_argument("--write", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        torch.save(run(args.backend[0], args.sets), args.write)
        return 0
    worst = 0
    for backend in args.backend:
        here, there = (in_child(checkout.resolve(), backend, args.sets) for checkout in (ROOT, args.other))
        if here.keys() != there.keys():
            raise SystemExit("the two checkouts ran different calls")
        values = different = errors = 0
        for name, results in here.items():
            errors += "error" in results
            for key in sorted(results.keys() | there[name].keys()):
                values += 1
                if not same(results.get(key), there[name].get(key)):
                    different += 1
                    print(f"{backend}: {name}: {key}: {results.get(key)} here, {there[name].get(key)} there")
        print(f"{backend}: {len(here)} calls ({errors} refused in both), {values} values, {different} different")
        worst |= different > 0
    return worst


if __name__ == "__main__":
    sys.exit(main())
