"""Embedding a realistic mix of inputs: packed, next to the reference's way, length-sorted padding and sentence-transformers.

    python -m bench encode [--size tiny 100m hybrid-tiny hybrid-100m] [--repeat 3] [--csv FILE]

Peers, each in a process of its own, so that peak memory is its own:
    packed          this project: chunks by token budget, one packed sequence each, last tokens only, no head
    reference       arrival order, padded batches, all hidden states, language-model head (what the reference implementation does)
    sorted-padded   length-sorted padded batches, last hidden state, no head; on the right for the hybrids
    st              sentence-transformers' own encode of the same folder (M-RoPE positions: its vectors differ by design)

The hybrids are Qwen3.5: of four layers three carry a state from token to token. Their padded batches are transformers' own forward, on
the right, where no state has to pass padding; there the aims are 1.3 times as fast at no more memory.

Times are of the model alone, on inputs that are preprocessed beforehand, except "end to end", which is `encode` itself and the
only number that sentence-transformers can be asked for. All peers but `st` must agree before anything is timed. "cpu ms" is the
processor time of all threads: with one thread (OMP_NUM_THREADS=1) it is the number to compare on a machine that others use too,
and the aims are then judged by it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile

from bench import measure, models, tables
from bench.measure import process_peak_mib, timed
from bench.models import BATCH, padded_batch

PEERS = ("packed", "reference", "sorted-padded", "st")
HYBRID_PEERS = ("packed", "sorted-padded")
HYBRID_GATE = (("sorted-padded", 1.3),)
GATES = {"tiny": (("reference", 1.3), ("sorted-padded", 1.0)), "100m": (("reference", 2.0), ("sorted-padded", 1.0))}
GATES |= dict.fromkeys(models.HYBRIDS, HYBRID_GATE)


def measured(peer: str, size: str, folder: str, repeat: int) -> dict:
    """One peer, in this process. Returns the row and, for the gate, the path of its vectors."""
    import torch

    from vlm2vec import VLM2Vec

    data = models.inputs(size)
    row = {"part": "encode", "size": size, "name": peer, "samples": len(data), "threads": torch.get_num_threads()}
    if peer == "st":
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(folder, device="cpu")
        before = process_peak_mib()
        _, times = timed(lambda: model.encode(data, batch_size=BATCH, show_progress_bar=False), repeat)
        return {
            **row,
            "end_to_end_ms_p50": times["ms_p50"],
            "end_to_end_cpu_ms": times["cpu_ms"],
            "process_mib": round(process_peak_mib()),
            "before_mib": round(before),
        }
    model = VLM2Vec.from_pretrained(folder, dtype="float32", device="cpu")
    features = model.preprocess(data)
    row["tokens"] = sum(f.length for f in features)
    if peer == "packed":
        from vlm2vec.encoding import chunks

        def run():
            out = torch.empty(len(features), model.embedding_dim)
            for rows in chunks([f.length for f in features], 32, "cpu"):
                out[rows] = model(model.pack([features[r] for r in rows]))
            return out

        with torch.no_grad():
            before = process_peak_mib()
            out, times = timed(run, repeat)
            peak = process_peak_mib()
            _, whole = timed(lambda: model.encode(data, convert_to_tensor=True), repeat)
        row["end_to_end_ms_p50"], row["end_to_end_cpu_ms"] = whole["ms_p50"], whole["cpu_ms"]
    else:
        from transformers import AutoModel, Qwen2VLForConditionalGeneration

        del model
        reference = peer == "reference"
        cls = Qwen2VLForConditionalGeneration if reference else AutoModel
        module = cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
        order = list(range(len(features)))
        if not reference:
            order.sort(key=lambda i: -features[i].length)
        batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]
        side = "right" if size in models.HYBRIDS else "left"

        def run():
            out = torch.empty(len(features), module.config.get_text_config().hidden_size)
            for rows in batches:
                batch = padded_batch([features[r] for r in rows], side)
                output = module(**batch, use_cache=False, output_hidden_states=reference)
                hidden = output.hidden_states[-1] if reference else output.last_hidden_state
                last = torch.full((len(rows),), -1) if side == "left" else batch["attention_mask"].sum(1) - 1
                out[rows] = hidden[torch.arange(len(rows)), last]
            return out

        with torch.no_grad():
            before = process_peak_mib()
            out, times = timed(run, repeat)
            peak = process_peak_mib()
    vectors = os.path.join(folder, f"{peer}.pt")
    torch.save(torch.nn.functional.normalize(out, dim=-1), vectors)
    return {**row, **times, "process_mib": round(peak), "before_mib": round(before), "vectors": vectors}


def compare(size: str, repeat: int) -> list[dict]:
    """Rows of all peers; raises when peers that should agree do not."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        models.write(size, folder)
        rows = []
        for peer in HYBRID_PEERS if size in models.HYBRIDS else PEERS:
            try:
                rows.append(measure.in_child("bench.encode", "measured", peer, size, folder, repeat))
            except RuntimeError as e:
                if peer != "st" or "No module named" not in str(e):
                    raise
                print("st: sentence-transformers is not installed, left out")
        vectors = {r["name"]: torch.load(r.pop("vectors"), weights_only=True) for r in rows if "vectors" in r}
    for peer, value in vectors.items():
        apart = (value - vectors["packed"]).abs().max().item()
        if apart > 1e-4:
            raise RuntimeError(f"{peer} and packed disagree by {apart}: nothing to compare")
    return rows


def judged_by(row: dict) -> tuple[str, str]:
    """Columns that comparisons use: (of the model alone, end to end)."""
    return ("cpu_ms", "end_to_end_cpu_ms") if row["threads"] == 1 else ("ms_p50", "end_to_end_ms_p50")


def show(size: str, rows: list[dict]) -> None:
    packed = rows[0]
    alone, whole = judged_by(packed)
    print(f"\n{size}: {packed['samples']} inputs, {packed['tokens']} tokens, threads: {packed['threads']}, packed compared by {alone}")
    heads = ("peer", "p20 ms", "p50 ms", "p80 ms", "cpu ms", "packed is", "end to end ms", "cpu ms", "peak MiB", "loaded MiB")
    print(" ".join(f"{h:>13}" for h in heads))
    for r in rows:
        key = alone if alone in r else whole
        cells = [r["name"], *(f"{r[k]:.0f}" if k in r else "" for k in ("ms_p20", "ms_p50", "ms_p80", "cpu_ms"))]
        cells.append("" if r is packed else f"{r[key] / packed[key]:.2f}x")
        cells += [f"{r[k]:.0f}" if k in r else "" for k in ("end_to_end_ms_p50", "end_to_end_cpu_ms", "process_mib", "before_mib")]
        print(" ".join(f"{c:>13}" for c in cells))


def verdicts(size: str, rows: list[dict]) -> list[str]:
    """Which of the aims are missed."""
    by_peer = {r["name"]: r for r in rows}
    key, _ = judged_by(by_peer["packed"])
    missed = []
    for peer, wanted in GATES[size]:
        had = by_peer[peer][key] / by_peer["packed"][key]
        if had < wanted:
            missed.append(f"{size}: packed is {had:.2f}x as fast as {peer}, aim {wanted}x")
        if size in models.HYBRIDS:
            ours, theirs = (by_peer[name]["process_mib"] - by_peer[name]["before_mib"] for name in ("packed", peer))
            if ours > theirs:
                missed.append(f"{size}: packed grows by {ours} MiB, {peer} by {theirs}")
    return missed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", nargs="+", choices=list(models.SAMPLES), default=list(models.SAMPLES))
    parser.add_argument("--repeat", type=int, default=3)


def run(args) -> int:
    """Print the tables; exit code 1 when an aim is missed."""
    every, missed = [], []
    for size in args.size:
        rows = compare(size, args.repeat)
        show(size, rows)
        every += rows
        missed += verdicts(size, rows)
    return tables.conclude(every, missed, args.csv)


def main(argv=None) -> int:
    parser = tables.parser("encode", __doc__)
    add_arguments(parser)
    return run(parser.parse_args(argv))


CHILDREN = {"measured": measured}

if __name__ == "__main__":
    sys.exit(main())
