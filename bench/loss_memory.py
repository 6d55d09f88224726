"""Peak resident memory of the loss and of top-k search, each measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

from bench.loss import HEADLINE, MIB, ROOT, TEMPERATURE, at_most, unit

WORKSPACE_MIB = 256
WIDE, WIDE_D, WIDE_GIB = 131_072, 64, 1.1
TOPK_MIB, TOPK_RATIO, K = 512, 1.4, 10


def in_child(what: str, *arguments) -> dict:
    command = [sys.executable, "-m", "bench.loss", "--child", what, json.dumps(arguments)]
    # without the threshold freed blocks stay with malloc, and the peak says more about it than about the loss
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
    if done.returncode:
        raise RuntimeError(f"{what} {arguments} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def child_loss(arm: str, n: int, d: int) -> dict:
    """Peak of one arm: of the process, and beyond what inputs and gradients take."""
    import torch

    from bench.loss_arms import ALL
    from bench.step import resident, restart_resident_peak

    ALL[arm](unit(64, d, torch.float32, 2), unit(64, d, torch.float32, 3), TEMPERATURE)()  # loads what is loaded lazily
    query, target = unit(n, d, torch.float32, 0), unit(n, d, torch.float32, 1)
    run = ALL[arm](query, target, TEMPERATURE)
    before = restart_resident_peak()
    loss, d_query, d_target = run()
    peak = resident("VmHWM")
    return {"loss": float(loss), "extra_mib": peak - before - (d_query.nbytes + d_target.nbytes) / MIB, "process_mib": peak}


def child_topk(n: int, m: int, d: int, measure: str) -> dict:
    """Peak beyond inputs and outputs; or times of the search and of its bare product, and a check on samples."""
    import torch

    from bench.step import resident, restart_resident_peak
    from contrastive_kernels import topk_similarity

    query, target = unit(n, d, torch.float32, 0), torch.empty(m, d)
    for start in range(0, m, 65_536):  # a whole random matrix and its normalised copy would take twice the room
        target[start : start + 65_536] = unit(min(65_536, m - start), d, torch.float32, start + 1)
    if measure == "memory":
        topk_similarity(query[:64], target[:4096], K)
        before = restart_resident_peak()
        scores, indices = topk_similarity(query, target, K)
        return {"extra_mib": resident("VmHWM") - before - (scores.nbytes + indices.nbytes) / MIB}
    out = torch.empty(1024, 65_536)

    def bare():
        for a in range(0, n, len(out)):
            for c in range(0, m, out.shape[1]):
                rows, columns = query[a : a + len(out)], target[c : c + out.shape[1]]
                torch.mm(rows, columns.T, out=out[: len(rows), : len(columns)])

    def clock(function):
        wall, cpu = time.perf_counter(), time.process_time()
        result = function()
        return result, [(time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3]

    (scores, indices), search = clock(lambda: topk_similarity(query, target, K))
    _, product = clock(bare)
    wrong = 0
    for row in range(0, n, max(1, n // 50)):
        dense = (query[row : row + 1].double() @ target.T.double())[0] if m <= 100_000 else target @ query[row]
        best = dense.sort(descending=True, stable=True)
        near = (dense[indices[row]].double() - best.values[:K].double()).abs().max() > 1e-6
        wrong += int(near or len(set(indices[row].tolist())) != K or (scores[row] - dense[indices[row]]).abs().max() > 1e-6)
    return {"search": search, "product": product, "wrong": wrong}


CHILDREN = {"loss": child_loss, "topk": child_topk}


def verdict(name: str, value: float, aim: float, unit_name: str, **row) -> dict:
    good = value <= aim
    print(f"{'PASS' if good else 'MISS'}  {name}: {value:.1f} {unit_name}, aim <= {aim:.1f}", flush=True)
    return {"table": "verdicts", "name": name, "aim": f"<= {aim:.1f} {unit_name}", "verdict": "PASS" if good else "MISS", **row}


def table_memory(args) -> list[dict]:
    n, d = HEADLINE
    rows, losses = [], {}
    print(f"\nmost that is resident beyond inputs and gradients, N = M = {n}, D = {d}, float32")
    for arm in (name for name in ("ours", "naive", "F.linear_cross_entropy") if name in args.arms):
        got = in_child("loss", arm, n, d)
        losses[arm] = got["loss"]
        rows.append({"table": "memory", "name": arm, "n": n, "m": n, "d": d, "dtype": "float32", "extra_mib": got["extra_mib"], "process_mib": got["process_mib"]})
        print(f"{arm:<34} {got['extra_mib']:>8.0f} MiB extra, {got['process_mib']:>8.0f} MiB in all, loss {got['loss']:.6f}", flush=True)
    if "ours" in losses:
        extra = rows[0]["extra_mib"]
        rows.append(verdict("extra memory of ours", extra, WORKSPACE_MIB + 64, "MiB", n=n, m=n, d=d, extra_mib=extra))
        got = in_child("loss", "ours", WIDE, WIDE_D)
        rows.append(verdict(f"whole process at N = M = {WIDE}, D = {WIDE_D}", got["process_mib"], WIDE_GIB * 1024, "MiB", n=WIDE, m=WIDE, d=WIDE_D, process_mib=got["process_mib"]))
    return rows


def table_topk(args) -> list[dict]:
    n, m, d = args.topk_shape
    shape = {"n": n, "m": m, "d": d}
    print(f"\n{n} queries against {m} candidates, D = {d}, k = {K}, float32")
    extra = in_child("topk", n, m, d, "memory")["extra_mib"]
    rows = [verdict("top-k, memory beyond inputs and results", extra, TOPK_MIB, "MiB", extra_mib=extra, **shape)]
    got = in_child("topk", n, m, d, "time")
    rows.append(at_most("top-k against its bare product (torch.mm)", got["search"], got["product"], TOPK_RATIO, n, d) | shape)
    rows[-1] |= {"ms": got["search"][0], "cpu_ms": got["search"][1]}
    rows.append(verdict("top-k, sampled rows that differ from the dense answer", got["wrong"], 0, "rows", **shape))
    return rows
