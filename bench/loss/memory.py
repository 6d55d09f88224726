"""Peak resident memory of the loss and of top-k search, each measured in a process of its own."""

from __future__ import annotations

from bench import measure
from bench.loss.verdicts import TEMPERATURE, at_most, bounded
from bench.measure import MIB, interleaved, resident, restart_resident_peak, unit_rows
from bench.peers import on_cpu
from bench.peers.autograd import step

WORKSPACE_MIB = 256
WIDE, WIDE_D, WIDE_GIB = 131_072, 64, 1.1
TOPK_MIB, TOPK_RATIO, TOPK_RUNS, K = 512, 1.4, 3, 10
# how the process gives memory back: as it is, and so that every freed block is, without which a peak may say more about malloc
MALLOC = {"malloc as it is": {}, "blocks given back": measure.BLOCKS_GIVEN_BACK}


def in_child(what: str, *arguments, malloc: str = "malloc as it is") -> dict:
    """`CHILDREN[what]` in a process of its own, with `MALLOC[malloc]`."""
    return measure.in_child("bench.loss.memory", what, *arguments, without=("MALLOC_",), **MALLOC[malloc])


def child_loss(peer: str, n: int, d: int) -> dict:
    """Peak of one peer: of the process, and beyond what inputs and gradients take."""
    import torch

    make = makers()[peer]
    make(unit_rows(64, d, torch.float32, 2), unit_rows(64, d, torch.float32, 3), TEMPERATURE)()  # loads what is loaded lazily
    query, target = unit_rows(n, d, torch.float32, 0), unit_rows(n, d, torch.float32, 1)
    run = make(query, target, TEMPERATURE)
    before = restart_resident_peak()
    loss, d_query, d_target = run()
    peak = resident("VmHWM")
    return {"loss": float(loss), "peak_mib": peak - before - (d_query.nbytes + d_target.nbytes) / MIB, "process_mib": peak}


def makers() -> dict:
    """Those of the timings, and ours through autograd: loss.backward(), with a cotangent of 1 and with another."""
    from contrastive_kernels import info_nce

    def backward(query, target, temperature):
        return step(lambda q, t: info_nce(q, t, temperature=temperature), query, target)

    def scaled(query, target, temperature):
        return step(lambda q, t: info_nce(q, t, temperature=temperature) * 1024.0, query, target)

    return {**on_cpu.ALL, "ours, backward": backward, "ours, scaled backward": scaled}


def child_topk(n: int, m: int, d: int, measure: str) -> dict:
    """Peak beyond inputs and outputs; or times of the search and of its bare product, and a check on samples."""
    import torch

    from contrastive_kernels import topk_similarity
    from contrastive_kernels.eager.gemm import product_into
    from contrastive_kernels.topk import PANEL_ROWS, PRODUCT_COLUMNS

    query, target = unit_rows(n, d, torch.float32, 0), torch.empty(m, d)
    for start in range(0, m, 65_536):  # a whole random matrix and its normalised copy would take twice the room
        target[start : start + 65_536] = unit_rows(min(65_536, m - start), d, torch.float32, start + 1)
    if measure == "memory":
        topk_similarity(query[:64], target[:4096], K)
        before = restart_resident_peak()
        scores, indices = topk_similarity(query, target, K)
        return {"peak_mib": resident("VmHWM") - before - (scores.nbytes + indices.nbytes) / MIB}
    # the bare product: every score once, by the library and in the panels that the search takes, and by torch.mm in large ones
    out, large = torch.empty(PANEL_ROWS, PRODUCT_COLUMNS), torch.empty(PANEL_ROWS, 65_536)

    def bare(out, multiply):
        for a in range(0, n, len(out)):
            for c in range(0, m, out.shape[1]):
                rows, columns = query[a : a + len(out)], target[c : c + out.shape[1]]
                multiply(rows, columns, out[: len(rows), : len(columns)])

    answers = []
    times = interleaved(
        {
            "search": lambda: answers.append(topk_similarity(query, target, K)),
            "product": lambda: bare(out, lambda a, b, c: product_into(c, a, b)),
            "torch.mm": lambda: bare(large, lambda a, b, c: torch.mm(a, b.T, out=c)),
        },
        TOPK_RUNS,
    )
    scores, indices = answers[-1]
    wrong = 0
    for row in range(0, n, max(1, n // 50)):
        dense = (query[row : row + 1].double() @ target.T.double())[0] if m <= 100_000 else target @ query[row]
        best = dense.sort(descending=True, stable=True)
        near = (dense[indices[row]].double() - best.values[:K].double()).abs().max() > 1e-6
        wrong += int(near or len(set(indices[row].tolist())) != K or (scores[row] - dense[indices[row]]).abs().max() > 1e-6)
    return {**times, "wrong": wrong}


CHILDREN = {"loss": child_loss, "topk": child_topk}


def table_memory(args) -> list[dict]:
    n, d = args.memory_shape
    rows, results, shown = [], {}, ("ours", "ours, backward", "ours, scaled backward", "naive", "F.linear_cross_entropy")
    print(f"\nmost that is resident beyond inputs and gradients, N = M = {n}, D = {d}, float32")
    for peer in (name for name in shown if name.split(",")[0] in args.peers):
        for malloc in MALLOC:
            got = in_child("loss", peer, n, d, malloc=malloc)
            results[peer, malloc] = got
            shape = {"n": n, "m": n, "d": d, "dtype": "float32"}
            rows.append(
                {"part": "memory", "name": peer, "options": malloc, **shape, "peak_mib": got["peak_mib"], "process_mib": got["process_mib"]}
            )
            sizes = f"{got['peak_mib']:>8.0f} MiB extra, {got['process_mib']:>8.0f} MiB in all"
            print(f"{peer:<26} {malloc:<18} {sizes}, loss {got['loss']:.6f}", flush=True)
    for (peer, malloc), got in results.items():
        if peer.startswith("ours"):
            extra = got["peak_mib"]
            rows.append(
                bounded(
                    f"extra memory of {peer}, {malloc}", extra, WORKSPACE_MIB + 64, "MiB", n=n, m=n, d=d, options=malloc, peak_mib=extra
                )
            )
    if "ours" in args.peers:
        for malloc in MALLOC:
            peak = in_child("loss", "ours", WIDE, WIDE_D, malloc=malloc)["process_mib"]
            name = f"whole process at N = M = {WIDE}, D = {WIDE_D}, {malloc}"
            shape = {"n": WIDE, "m": WIDE, "d": WIDE_D}
            rows.append(bounded(name, peak, WIDE_GIB * 1024, "MiB", options=malloc, process_mib=peak, **shape))
    return rows


def table_topk(args) -> list[dict]:
    n, m, d = args.topk_shape
    shape = {"n": n, "m": m, "d": d}
    print(f"\n{n} queries against {m} candidates, D = {d}, k = {K}, float32")
    rows = []
    for malloc in MALLOC:
        extra = in_child("topk", n, m, d, "memory", malloc=malloc)["peak_mib"]
        rows.append(
            bounded(f"top-k, memory beyond inputs and results, {malloc}", extra, TOPK_MIB, "MiB", options=malloc, peak_mib=extra, **shape)
        )
    got = in_child("topk", n, m, d, "time")
    took = {"ms_min": got["search"][0], "cpu_ms": got["search"][1], "repeat": TOPK_RUNS}
    rows.append(
        at_most("top-k against its bare product, by the same library", got["search"], got["product"], TOPK_RATIO, n, d) | shape | took
    )
    against = got["search"][0] / got["torch.mm"][0], got["search"][1] / got["torch.mm"][1]
    print(f"      top-k against torch.mm in large tiles: {against[0]:.3f} ({against[1]:.3f} by cpu)", flush=True)
    rows.append({"part": "topk", "name": "against torch.mm in large tiles", "ratio": against[0], "cpu_ratio": against[1], **shape, **took})
    rows.append(bounded("top-k, sampled rows that differ from the dense answer", got["wrong"], 0, "rows", **shape))
    return rows
