"""One training step of 256 mixed pairs, next to other ways to make the same gradients.

    python -m bench step [--pairs 256] [--repeat 3] [--trained all vision-frozen] [--peers ...] [--csv FILE]

Peers, on the encode benchmark's tiny model and mix of texts and images, each in a process of its own:
    ours            GradCache over packed chunks by token budget (1,536), which takes less memory than reference-8
    ours-3072       the same with twice the budget: as fast, and more memory than reference-8
    ours-8, ours-16 the same with chunks of as many rows
    ours-retained   the same with `retain="all"`: every graph kept, no second forward
    reference-8     the reference implementation's way: whole batch padded, head on, all hidden states kept, everything twice; chunks of
                    the 8 rows that its recipes have
    reference-16    the same with chunks of 16
    gradcache       PyPI's gradcache around the model without head, padded rows
    one-batch       no GradCache: everything in one packed forward and backward
    hybrid          ours on the hybrid model, a Qwen3.5 of which three of four layers carry a state from token to token
    hybrid-retained the same with every graph kept
    hybrid-padded   transformers' own hybrid without head, in length-sorted batches of 8 rows padded on the right
    ours-mrope, st-tokens, st-fixed
                    M-RoPE positions, which are all that sentence-transformers can be asked for: ours, then
                    CachedMultipleNegativesRankingLoss with `mini_batch_num_tokens` and with fixed mini-batches

All gradients must agree within a group of positions before a figure is shown. "step ms" and "cpu ms" are of whole steps on
inputs preprocessed beforehand; "cpu ms" is the processor time of all threads and judges the aims where there is one thread.
"live MiB" is the peak of live tensors above all that was alive before the step, inputs and weights first of all, from a step of its own
that is not timed (views of the inputs that are made within it hold nothing new, whole storages though they have); "rss MiB"
is how much the process grew over what it held when the first step began. "flops" are executed over the fewest that each sample alone,
unpadded, without head, needs for one forward and one backward: attention counts as full squares, as `FlopCounterMode` counts it.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import sys
import tempfile

from bench import measure, models, tables
from bench.measure import resident, restart_resident_peak, timed
from bench.step.flops import counter, fewest
from bench.step.models import gradients

BUDGET = 1536  # tokens of a chunk, where a peer takes a budget: resident growth below that of the reference's chunks of 8 rows
TRAINED = ("all", "vision-frozen")
POSITIONS = {
    "sequential": ("ours", "ours-3072", "ours-8", "ours-16", "ours-retained", "reference-8", "reference-16", "gradcache", "one-batch"),
    "mrope": ("ours-mrope", "st-tokens", "st-fixed"),
    "hybrid": ("hybrid", "hybrid-retained", "hybrid-padded"),
}
# (trained, ours, other, aim): how many times the other's samples per second; no more memory either, except at equal rows: sorted by length,
# a chunk of ours holds the 8 or 16 longest of the batch.
EQUAL_ROWS = ("ours-8", "ours-16")
AIMS = (
    *(
        ("all", peer, other, 1.8)
        for peer, other in (("ours", "reference-8"), ("ours", "reference-16"), ("ours-8", "reference-8"), ("ours-16", "reference-16"))
    ),
    *(("vision-frozen", peer, other, 2.8) for peer, other in (("ours", "reference-8"), ("ours", "reference-16"))),
    ("all", "ours-mrope", "st-tokens", 1.2),
    *((trained, "hybrid", "hybrid-padded", 1.3) for trained in TRAINED),
)
MOST_FLOPS = 1.05
RETAINED = {"ours-retained": "ours", "hybrid-retained": "hybrid"}  # without a second forward: what the count of FLOPs is judged by
AGREE = 2e-3  # of a gradient's norm, in float32 at temperature 0.02


def makers() -> dict:
    from bench.step import models as m

    ours = functools.partial(m.ours, budget=BUDGET)
    return {
        "ours": ours,
        "ours-retained": functools.partial(ours, retain="all"),
        "ours-3072": functools.partial(m.ours, budget=2 * BUDGET),
        "ours-8": functools.partial(m.ours, rows=8),
        "ours-16": functools.partial(m.ours, rows=16),
        "reference-8": functools.partial(m.reference, rows=8),
        "reference-16": functools.partial(m.reference, rows=16),
        "gradcache": m.gradcache_package,
        "one-batch": m.one_batch,
        "ours-mrope": functools.partial(ours, positions="mrope"),
        "hybrid": functools.partial(ours, positions=None),
        "hybrid-retained": functools.partial(ours, positions=None, retain="all"),
        "hybrid-padded": functools.partial(m.sorted_padded, rows=8),
        "st-tokens": functools.partial(m.sentence_transformers, budget=BUDGET),
        "st-fixed": functools.partial(m.sentence_transformers, budget=None),
    }


def group_of(peer: str) -> str:
    return next(name for name, peers in POSITIONS.items() if peer in peers)


def measure_time(peer: str, folder: str, count: int, frozen: bool, repeat: int) -> dict:
    """Times and resident growth of a peer in this process; its gradients go into a file."""
    import torch

    make = makers()[peer]
    make(folder, 4, frozen)[0]()  # loads what is loaded lazily
    step, module = make(folder, count, frozen)
    before = restart_resident_peak()

    def run() -> float:
        module.zero_grad(set_to_none=True)
        return step()

    loss, times = timed(run, repeat)
    path = os.path.join(folder, f"{peer}-{'frozen' if frozen else 'all'}.pt")
    torch.save(gradients(module), path)
    return {"loss": loss, **times, "rss_mib": round(resident("VmHWM") - before), "gradients": path, "threads": torch.get_num_threads()}


def measure_work(peer: str, folder: str, count: int, frozen: bool) -> dict:
    """FLOPs and peak of live tensors of one step."""
    from train.plan.live_bytes import LiveBytes

    step, module = makers()[peer](folder, count, frozen)
    with counter() as flops, LiveBytes(alive()) as live:
        before = live.current
        step()
    gradients = sum(p.grad.nbytes for p in module.parameters() if p.grad is not None)
    return {
        "flops": flops.get_total_flops(),
        "live_mib": round((live.peak - before) / 2**20, 1),
        "gradients_mib": round(gradients / 2**20, 1),
    }


def alive() -> list:
    """Every tensor that Python holds now: what a peer has prepared counts for no peer, wherever it keeps it."""
    import torch

    return [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]


CHILDREN = {"time": measure_time, "work": measure_work, "fewest": fewest}


def in_child(what: str, *arguments) -> dict:
    """`CHILDREN[what]` in a process of its own, whose resident peak tells of tensors."""
    return measure.in_child("bench.step.run", what, *arguments, **measure.BLOCKS_GIVEN_BACK)


def compare(names: list[str], count: int, trained: str, repeat: int) -> list[dict]:
    """Rows of the peers; raises when peers that should agree do not."""
    import torch

    frozen = trained == "vision-frozen"
    with tempfile.TemporaryDirectory() as place:
        folders = {group: os.path.join(place, "hybrid" if group == "hybrid" else "tiny") for group in POSITIONS}
        for group in {group_of(peer) for peer in names}:
            if not os.path.isdir(folders[group]):
                models.write("hybrid-tiny" if group == "hybrid" else "tiny", folders[group])
        rows, grads = [], {}
        for peer in names:
            folder = folders[group_of(peer)]
            try:
                row = {"trained": trained, "name": peer, "pairs": count, **in_child("time", peer, folder, count, frozen, repeat)}
            except RuntimeError as e:
                if "No module named" not in str(e):
                    raise
                print(f"{peer}: {str(e).strip().splitlines()[-1]}; left out")
                continue
            grads[peer] = torch.load(row.pop("gradients"), weights_only=True)
            row.update(in_child("work", peer, folder, count, frozen))
            rows.append(row)
        for row in rows:
            row["apart"] = disagreement(grads, row["name"])
        positions = {folders[g]: None if g == "hybrid" else "sequential" for g in map(group_of, names)}
        least = {folder: in_child("fewest", folder, count, frozen, way)["flops"] for folder, way in positions.items()}
    for row in rows:
        if row["apart"] > AGREE:
            raise RuntimeError(f"{trained}: the gradients of {row['name']} are {row['apart']:.1e} of their norm away: nothing to compare")
        row["fewest_flops"] = least[folders[group_of(row["name"])]]
    return rows


def disagreement(grads: dict, peer: str) -> float:
    """Largest distance of a weight's gradient from that of the first peer of the group, over that gradient's norm."""
    first = next(name for name in POSITIONS[group_of(peer)] if name in grads)
    truth, had = grads[first], grads[peer]
    if truth.keys() != had.keys():
        raise RuntimeError(
            f"{peer} has gradients for {len(had)} weights, {first} for {len(truth)}: {sorted(truth.keys() ^ had.keys())[:5]}"
        )
    whole = sum(g.norm() ** 2 for g in truth.values()) ** 0.5
    # A weight without influence (a key's bias) has a gradient of rounding errors alone: the whole gradient measures those.
    return max(((had[n] - g).norm() / max(g.norm(), 1e-4 * whole)).item() for n, g in truth.items())


def key_of(rows: list[dict]) -> str:
    return "cpu_ms" if rows[0]["threads"] == 1 else "ms_p50"


def show(trained: str, rows: list[dict]) -> None:
    key, by = key_of(rows), {r["name"]: r for r in rows}
    print(f"\ntrained: {trained}; {rows[0]['pairs']} pairs, threads: {rows[0]['threads']}, compared by {key}")
    heads = ("peer", "p20 ms", "p50 ms", "p80 ms", "cpu ms", "pairs/s", "ours is", "live MiB", "rss MiB", "flops", "grads apart")
    print(" ".join(f"{h:>13}" for h in heads))
    for r in rows:
        ours = by.get(POSITIONS[group_of(r["name"])][0])
        times = [f"{r[k]:.0f}" for k in ("ms_p20", "ms_p50", "ms_p80", "cpu_ms")]
        cells = [r["name"], *times, f"{1000 * r['pairs'] / r[key]:.2f}", "" if ours is None or ours is r else f"{r[key] / ours[key]:.2f}x"]
        cells += [f"{r['live_mib']:.0f}", f"{r['rss_mib']}", f"{r['flops'] / r['fewest_flops']:.3f}x", f"{r['apart']:.0e}"]
        print(" ".join(f"{c:>13}" for c in cells))
    fewest_of = {group_of(r["name"]): r["fewest_flops"] for r in rows}
    print(f"gradients hold {rows[0]['gradients_mib']} MiB of it; fewest FLOPs: {', '.join(f'{g} {n:.3e}' for g, n in fewest_of.items())}")
    for retained, ours in RETAINED.items():
        if {retained, ours} <= by.keys():
            without, whole, least = (by[retained]["flops"], by[ours]["flops"], by[ours]["fewest_flops"])
            print(f"second forward of {ours}: {whole - without:.3e} FLOPs; without it {ours} executes {without / least:.3f}x the fewest")


def verdicts(trained: str, rows: list[dict]) -> list[str]:
    """Which of the aims are missed."""
    by, key, missed = {r["name"]: r for r in rows}, key_of(rows), []
    for which, peer, other, aim in AIMS:
        if which == trained and {peer, other} <= by.keys():
            had = by[other][key] / by[peer][key]
            if had < aim:
                missed.append(f"{trained}: {peer} is {had:.2f}x as fast as {other}, aim {aim}x")
            for memory in () if peer in EQUAL_ROWS else ("live_mib", "rss_mib"):
                if by[peer][memory] > by[other][memory]:
                    missed.append(f"{trained}: {peer} peaks at {by[peer][memory]} ({memory}), {other} at {by[other][memory]}")
    for retained, ours in RETAINED.items():
        share = by[retained]["flops"] / by[retained]["fewest_flops"] if retained in by else 0
        if share > MOST_FLOPS:
            missed.append(f"{trained}: {ours} without a second forward executes {share:.3f}x the fewest FLOPs, aim {MOST_FLOPS}x")
    return missed


def unmeasured(trained: str, names: set[str]) -> list[str]:
    """Aims for which a peer was left out."""
    needed = [(peer, other) for which, peer, other, _ in AIMS if which == trained] + [(peer,) for peer in RETAINED]
    return [f"{trained}: {' against '.join(peers)} was not measured" for peers in needed if not names.issuperset(peers)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    every = [name for group in POSITIONS.values() for name in group]
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--trained", nargs="+", choices=TRAINED, default=list(TRAINED))
    parser.add_argument("--peers", "--peers", nargs="+", choices=every, default=every)


def run(args) -> int:
    """Print the tables; exit code 1 when an aim is missed."""
    every, missed, left = [], [], []
    for trained in args.trained:
        rows = compare(args.peers, args.pairs, trained, args.repeat)
        show(trained, rows)
        every += [{"part": "step", **row} for row in rows]
        missed += verdicts(trained, rows)
        left += unmeasured(trained, {r["name"] for r in rows})
    if args.csv:
        tables.write_csv(args.csv, every)
    print("\n" + "\n".join(missed + left or ["every aim is met"]))
    return 1 if missed else 0


def main(argv=None) -> int:
    parser = tables.parser("step", __doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
