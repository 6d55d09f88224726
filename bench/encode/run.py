"""Embedding a realistic mix of inputs: packed, next to the reference's way, length-sorted padding and sentence-transformers.

    python -m bench encode [--size tiny 100m] [--repeat 3] [--csv FILE]

Arms, each in a process of its own, so that peak memory is its own:
    packed          this project: chunks by token budget, one packed sequence each, last tokens only, no head
    reference       arrival order, padded batches, all hidden states, language-model head (what the reference implementation does)
    sorted-padded   length-sorted padded batches, last hidden state, no head
    st              sentence-transformers' own encode of the same folder (M-RoPE positions: its vectors differ by design)

Times are of the model alone, on inputs that are preprocessed beforehand, except "end to end", which is `encode` itself and the
only number that sentence-transformers can be asked for. All arms but `st` must agree before anything is timed. "cpu ms" is the
processor time of all threads: with one thread (OMP_NUM_THREADS=1) it is the number to compare on a machine that others use too,
and the aims are then judged by it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

from bench import tables
from bench.encode import models as encode_models

ARMS = ("packed", "reference", "sorted-padded", "st")
BATCH = 16
GATES = {"tiny": (("reference", 1.3), ("sorted-padded", 1.0)), "100m": (("reference", 2.0), ("sorted-padded", 1.0))}


def resident_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def percentiles(seconds: list[float]) -> dict:
    ordered = sorted(seconds)
    return {f"p{p}_ms": round(1000 * ordered[min(len(ordered) - 1, p * len(ordered) // 100)], 2) for p in (20, 50, 80)}


def timed(run, repeat: int) -> tuple[object, dict]:
    out, seconds, processor = run(), [], []  # the first run warms up
    for _ in range(repeat):
        start, cpu = time.perf_counter(), time.process_time()
        out = run()
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - cpu)
    return out, {**percentiles(seconds), "cpu_ms": percentiles(processor)["p50_ms"]}


def padded_batch(torch, features: list):
    """Left-padded tensors of one batch, as the reference's collator makes them; positions 0..n-1 over the real tokens."""
    length = max(f.length for f in features)
    ids = torch.zeros(len(features), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, f in enumerate(features):
        ids[row, length - f.length :], mask[row, length - f.length :] = f.input_ids, 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
    seen = [f for f in features if f.vision]
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    if seen:
        batch["pixel_values"] = torch.cat([f.vision["pixel_values"] for f in seen])
        batch["image_grid_thw"] = torch.cat([f.vision["grid_thw"] for f in seen])
    return batch


def measure(arm: str, size: str, folder: str, repeat: int) -> dict:
    """One arm, in this process. Returns the row and, for the gate, the path of its vectors."""
    import torch

    from vlm2vec import VLM2Vec

    data = encode_models.inputs(size)
    row = {"size": size, "arm": arm, "samples": len(data), "threads": torch.get_num_threads()}
    if arm == "st":
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(folder, device="cpu")
        before = resident_mib()
        vectors, times = timed(lambda: model.encode(data, batch_size=BATCH, show_progress_bar=False), repeat)
        return {
            **row,
            "end_to_end_p50_ms": times["p50_ms"],
            "end_to_end_cpu_ms": times["cpu_ms"],
            "peak_mib": round(resident_mib()),
            "before_mib": round(before),
        }
    model = VLM2Vec.from_pretrained(folder, dtype="float32", device="cpu")
    features = model.preprocess(data)
    row["tokens"] = sum(f.length for f in features)
    if arm == "packed":
        from vlm2vec.encoding import chunks

        def run():
            out = torch.empty(len(features), model.embedding_dim)
            for rows in chunks([f.length for f in features], 32, "cpu"):
                out[rows] = model(model.pack([features[r] for r in rows]))
            return out

        with torch.no_grad():
            before = resident_mib()
            out, times = timed(run, repeat)
            peak = resident_mib()
            _, whole = timed(lambda: model.encode(data, convert_to_tensor=True), repeat)
        row["end_to_end_p50_ms"], row["end_to_end_cpu_ms"] = whole["p50_ms"], whole["cpu_ms"]
    else:
        from transformers import AutoModel, Qwen2VLForConditionalGeneration

        del model
        reference = arm == "reference"
        cls = Qwen2VLForConditionalGeneration if reference else AutoModel
        module = cls.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
        order = list(range(len(features)))
        if not reference:
            order.sort(key=lambda i: -features[i].length)
        batches = [order[i : i + BATCH] for i in range(0, len(order), BATCH)]

        def run():
            out = torch.empty(len(features), module.config.get_text_config().hidden_size)
            for rows in batches:
                batch = padded_batch(torch, [features[r] for r in rows])
                made = module(**batch, use_cache=False, output_hidden_states=reference)
                out[rows] = (made.hidden_states[-1] if reference else made.last_hidden_state)[:, -1]
            return out

        with torch.no_grad():
            before = resident_mib()
            out, times = timed(run, repeat)
            peak = resident_mib()
    vectors = os.path.join(folder, f"{arm}.pt")
    torch.save(torch.nn.functional.normalize(out, dim=-1), vectors)
    return {**row, **times, "peak_mib": round(peak), "before_mib": round(before), "vectors": vectors}


def in_child(arm: str, size: str, folder: str, repeat: int) -> dict:
    """The arm in a process of its own."""
    command = [sys.executable, "-m", "bench.encode.run", "--child", arm, size, folder, str(repeat)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{arm} on {size} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(size: str, repeat: int) -> list[dict]:
    """Rows of all arms; raises when arms that should agree do not."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        encode_models.write(size, folder)
        rows = []
        for arm in ARMS:
            try:
                rows.append(in_child(arm, size, folder, repeat))
            except RuntimeError as e:
                if arm != "st" or "No module named" not in str(e):
                    raise
                print("st: sentence-transformers is not installed, left out")
        vectors = {r["arm"]: torch.load(r.pop("vectors"), weights_only=True) for r in rows if "vectors" in r}
    for arm, value in vectors.items():
        apart = (value - vectors["packed"]).abs().max().item()
        if apart > 1e-4:
            raise RuntimeError(f"{arm} and packed disagree by {apart}: nothing to compare")
    return rows


def judged_by(row: dict) -> tuple[str, str]:
    """Columns that comparisons use: (of the model alone, end to end)."""
    return ("cpu_ms", "end_to_end_cpu_ms") if row["threads"] == 1 else ("p50_ms", "end_to_end_p50_ms")


def show(size: str, rows: list[dict]) -> None:
    packed = rows[0]
    alone, whole = judged_by(packed)
    print(f"\n{size}: {packed['samples']} inputs, {packed['tokens']} tokens, threads: {packed['threads']}, packed compared by {alone}")
    heads = ("arm", "p20 ms", "p50 ms", "p80 ms", "cpu ms", "packed is", "end to end ms", "cpu ms", "peak MiB", "loaded MiB")
    print(" ".join(f"{h:>13}" for h in heads))
    for r in rows:
        key = alone if alone in r else whole
        cells = [r["arm"], *(f"{r[k]:.0f}" if k in r else "" for k in ("p20_ms", "p50_ms", "p80_ms", "cpu_ms"))]
        cells.append("" if r is packed else f"{r[key] / packed[key]:.2f}x")
        cells += [f"{r[k]:.0f}" if k in r else "" for k in ("end_to_end_p50_ms", "end_to_end_cpu_ms", "peak_mib", "before_mib")]
        print(" ".join(f"{c:>13}" for c in cells))


def verdicts(size: str, rows: list[dict]) -> list[str]:
    """Which of the aims are missed."""
    by_arm = {r["arm"]: r for r in rows}
    key, _ = judged_by(by_arm["packed"])
    missed = []
    for arm, wanted in GATES[size]:
        had = by_arm[arm][key] / by_arm["packed"][key]
        if had < wanted:
            missed.append(f"{size}: packed is {had:.2f}x as fast as {arm}, aim {wanted}x")
    return missed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", nargs="+", choices=list(encode_models.SIZES), default=list(encode_models.SIZES))
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
    return run(tables.parsed("encode", __doc__, add_arguments, argv))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        tables.quiet()
        print(json.dumps(measure(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]))))
    else:
        sys.exit(main())
