"""Errors of loss and gradients against float64: ours, eager PyTorch's and others' formulas, on the same inputs.

    python -m bench accuracy [--rows 1024] [--width 768] [--dtypes float32 bfloat16] [--temperatures 0.01 0.02 0.05 0.1 1] [--seeds 4]
                             [--csv FILE]

Isotropic embeddings, and crowded ones (mean cosine 0.75). Truth takes 1 - p of the positive as Z_neg / Z: in float64 too,
softmax - 1 cancels. Errors are relative, in norm, and the root of their mean square over seeds: a single loss may be right by
luck. "eager" is cross_entropy(q @ t.T / temperature) with autograd in the inputs' type, logits in float32 for bfloat16 only under
"eager fp32 logits". Aims: in float32 our loss and gradients are within 1.25 times eager's error plus one ulp in every row and below
it in the geometric mean; from bfloat16 inputs with grad_dtype=torch.float32 our gradients have at most a tenth of eager bfloat16's
error; extreme inputs give finite numbers.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys

import torch
import torch.nn.functional as F

from bench import tables
from bench.peers import emulated
from bench.peers.autograd import step
from bench.peers.on_cpu import sentence_transformers, torch_linear_cross_entropy

PARTS = ("loss", "d_query", "d_target")


def embeddings(kind: str, n: int, d: int, dtype, seed: int = 0):
    """Query and target (n, d), paired; "crowded" has a mean cosine of 0.75."""
    generator = torch.Generator().manual_seed(seed)

    def noise():
        return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)

    centre = F.normalize(torch.randn(1, d, generator=generator, dtype=torch.float64), dim=1)
    share = {"isotropic": 0.0, "crowded": 0.75}[kind]
    query, target = noise(), noise()
    target = F.normalize(target + 0.3 * query, dim=1)  # pairs that are near, not so near that eager losses are 0
    out = [F.normalize(math.sqrt(share) * centre + math.sqrt(1 - share) * x, dim=1) for x in (query, target)]
    return [x.to(dtype) for x in out]


def truth(query, target, temperature):
    """float64 loss and gradients, with the positive kept out of the sums."""
    q, t = query.double(), target.double()
    logits = q @ t.T / temperature
    positive = logits.diagonal().clone()
    logits.fill_diagonal_(float("-inf"))
    rest = logits.logsumexp(1)
    share = torch.sigmoid(rest - positive)  # Z_neg / Z
    p = (logits - torch.logaddexp(rest, positive)[:, None]).exp_()
    scale = 1 / (len(q) * temperature)
    d_query = (p @ t - share[:, None] * t) * scale
    d_target = (p.T @ q - share[:, None] * q) * scale
    return F.softplus(rest - positive, threshold=700).mean(), d_query, d_target


def _through(loss_of, query, target):
    """(loss, d_query, d_target) through autograd."""
    return step(loss_of, query, target)()


def formulas(query, target, temperature) -> dict:
    """Everyone's formula, as its project writes it. Those that need a GPU are emulated and marked so."""
    from contrastive_kernels import info_nce_value_and_grad

    labels = torch.arange(len(query))

    def ours():
        out = info_nce_value_and_grad(query, target, temperature=temperature, grad_dtype=torch.promote_types(query.dtype, torch.float32))
        return out.loss, out.d_query, out.d_target

    def fixed_maximum(q, t):
        """memeff: logits minus 1 / temperature, whatever the row's own maximum."""
        shifted = (q @ t.T).float() / temperature - 1 / temperature
        return (shifted.exp().sum(1).log() - shifted.diagonal()).mean()

    def linear_cross_entropy():
        loss = torch_linear_cross_entropy()
        return _through(lambda q, t: loss(q / temperature, t, labels), query, target)

    def st():
        return sentence_transformers(query, target, temperature)()

    out = {
        "ours": ours,
        "eager": lambda: _through(lambda q, t: F.cross_entropy(q @ t.T / temperature, labels), query, target),
        "eager fp32 logits": lambda: _through(lambda q, t: F.cross_entropy((q @ t.T).float() / temperature, labels), query, target),
        "F.linear_cross_entropy": linear_cross_entropy,
        "memeff (emulated)": lambda: _through(fixed_maximum, query, target),
        "Inf-CL (emulated)": lambda: emulated.inf_cl(query, target, temperature),
        "cce_exact (emulated)": lambda: emulated.cce_exact(query, target, temperature),
        "Liger (emulated)": lambda: emulated.liger(query, target, temperature),
        "sentence-transformers": st,
    }
    if query.dtype == torch.float32:
        del out["eager fp32 logits"], out["cce_exact (emulated)"]
    return out


def relative(got, expected) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def errors_of(query, target, temperature) -> dict[str, tuple | str]:
    """Each formula's relative errors, one a part; or why it could not run."""
    expected, out = truth(query, target, temperature), {}
    for formula, run in formulas(query, target, temperature).items():
        compared = expected
        if formula == "sentence-transformers":  # its gradients go through the cosine's normalisation
            q, t = query.double(), target.double()
            compared = (expected[0], *(g - (g * x).sum(1, keepdim=True) * x for g, x in zip(expected[1:], (q, t))))
        try:
            out[formula] = tuple(relative(a, b) for a, b in zip(run(), compared))
        except ImportError as error:
            out[formula] = str(error).splitlines()[0]
    return out


def rows_of(args) -> list[dict]:
    rows = []
    for name, kind, temperature in itertools.product(args.dtypes, ("isotropic", "crowded"), args.temperatures):
        batches = [embeddings(kind, args.rows, args.width, getattr(torch, name), seed) for seed in range(args.seeds)]
        each = [errors_of(query, target, temperature) for query, target in batches]
        for formula in each[0]:
            row = {"name": formula, "inputs": kind, "dtype": name, "n": args.rows, "d": args.width, "temperature": temperature}
            of_seeds = [errors[formula] for errors in each]
            if isinstance(of_seeds[0], str):
                rows.append(row | {"note": of_seeds[0]})
                continue
            rows.append(
                row | {f"{part}_error": math.sqrt(sum(x * x for x in of_part) / len(each)) for part, of_part in zip(PARTS, zip(*of_seeds))}
            )
            show(rows[-1])
    return rows


def show(row: dict) -> None:
    errors = " ".join(f"{row[f'{part}_error']:>10.2e}" for part in PARTS)
    print(f"{row['dtype']:<9} {row['inputs']:<10} T={row['temperature']:<6} {row['name']:<24} {errors}", flush=True)


def verdicts(rows: list[dict]) -> list[tuple[bool, str]]:
    """Whether each aim is met, and the sentence that says so."""
    by = {(r["name"], r["dtype"], r["inputs"], r["temperature"]): r for r in rows}
    out = []
    pairs = [(r, by[("eager", *key[1:])]) for key, r in by.items() if key[0] == "ours"]
    exact = [(a, b) for a, b in pairs if a["dtype"] == "float32"]
    ulp = torch.finfo(torch.float32).eps
    for part in PARTS if exact else ():
        field = f"{part}_error"
        worst = max((a[field] - ulp) / b[field] for a, b in exact)
        mean = math.exp(sum(math.log(max(a[field], 1e-12) / max(b[field], 1e-12)) for a, b in exact) / len(exact))
        out.append((worst <= 1.25, f"float32 {part}: at most {worst:.2f} of eager's error beyond one ulp, aim 1.25"))
        out.append((mean < 1, f"float32 {part}: {mean:.2f} of eager's error in the geometric mean, aim below 1"))
    low = [(a, b) for a, b in pairs if a["dtype"] == "bfloat16"]
    for part in PARTS[1:] if low else ():
        worst = max(a[f"{part}_error"] / b[f"{part}_error"] for a, b in low)
        out.append((worst <= 0.1, f"bfloat16 inputs, {part} in float32: at most {worst:.4f} of eager's error, aim 0.1"))
    return out


def extremes() -> list[tuple[bool, str]]:
    """Inputs that break others, in one direction and in both: every number that comes out is finite."""
    from contrastive_kernels import info_nce_value_and_grad

    query, target = embeddings("crowded", 64, 32, torch.float32)
    zero, twice = query.clone(), query.clone()
    zero[3], twice[5:9] = 0, twice[4].clone()
    none = {"target_ids": torch.zeros(64, dtype=torch.int64)}
    cases = {
        "temperature 0.001": (query, target, {"temperature": 0.001}),
        "temperature 10": (query, target, {"temperature": 10.0}),
        "a zero vector": (zero, target, {}),
        "a zero vector, normalised": (zero, target, {"normalize": True}),
        "duplicate rows": (twice, twice.clone(), {"temperature": 0.01}),
        "cosine 1 everywhere": (query[:1].expand(64, -1), query[:1].expand(64, -1), {"temperature": 0.001}),
        "all negatives masked": (query, target, none),
        "all negatives masked, smoothed": (query, target, {**none, "label_smoothing": 0.1}),
    }
    out = []
    for name, (a, b, options) in cases.items():
        for dtype, symmetric in itertools.product((torch.float32, torch.bfloat16), (False, True)):
            result = info_nce_value_and_grad(a.to(dtype), b.to(dtype), symmetric=symmetric, return_stats=True, **options)
            good = all(bool(x.isfinite().all()) for x in (result.loss, result.d_query, result.d_target, *vars(result.stats).values()))
            ways = "both directions" if symmetric else "one direction"
            out.append((good, f"finite: {name}, {str(dtype).removeprefix('torch.')}, {ways}"))
    return out


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=1024, help="N = M")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.01, 0.02, 0.05, 0.1, 1.0])
    parser.add_argument("--seeds", type=int, default=4, help="batches that errors are averaged over")


def run(args) -> int:
    """Print errors and verdicts; exit code 1 when an aim is missed."""
    print(f"relative errors of {', '.join(PARTS)}; N = M = {args.rows}, D = {args.width}, {args.seeds} seeds")
    rows = rows_of(args)
    judged = verdicts(rows) + extremes()
    print()
    for good, sentence in judged:
        print(("PASS  " if good else "MISS  ") + sentence)
    tables.write_csv(args.csv, [{"part": "accuracy", **row} for row in rows])
    print(f"\nwritten to {args.csv}")
    return 0 if all(good for good, _ in judged) else 1


def main(argv=None) -> int:
    parser = tables.parser("accuracy", __doc__, tables.SCRATCH / "accuracy.csv")
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
