"""`python -m bench gpu --dry`: every part, tiny, on a CPU; and the same with a fault planted in each part."""

import csv
import json
import os
import subprocess
import sys

import pytest
import torch

from tests.helpers.repository import ROOT

pytest.importorskip("triton")
pytest.importorskip("transformers")

from bench.gpu import run as runner
from bench.gpu.check import PARTS

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the program itself")
FAULTS = [sys.executable, str(ROOT / "tests/workers/gpu_bench_faults.py")]


def arguments(output, *more):
    import argparse

    parser = argparse.ArgumentParser()
    runner.add_arguments(parser)
    return parser.parse_args([*more, "--output", str(output), "--minutes", "30"])


def results(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_dry_run_shows_every_part(tmp_path):
    """From a bare checkout: nothing of it on the path, and no word about the interpreter, which the program sees to itself."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    command = [sys.executable, "-m", "bench", "gpu", "--dry", "--minutes", "30", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    found = results(tmp_path)
    assert done.returncode == 0, (found["complaints"], done.stderr[-2000:])
    assert found["complaints"] == [] and found["about"]["dry"] and "nothing here is a measurement" in found["about"]["device"]
    parts = {part: [row for row in found["rows"] if row["part"] == part] for part in PARTS}
    assert all(parts.values()), {part: len(rows) for part, rows in parts.items()}
    missing = () if hasattr(torch.nn.functional, "linear_cross_entropy") else ("F.linear_cross_entropy",)  # of torch before 2.13
    notes = [note["name"] for note in found["notes"] if not note["name"].endswith(missing)]
    assert notes == ["the loss never waits for the device", "CUDA graph of a whole call"]
    named = {part: {row["name"] for row in rows} for part, rows in parts.items()}
    assert {"info_nce, exp", "info_nce, levels", "info_nce, joint", "torch.compile of info_nce"} <= named["smoke"]
    assert {"packed attention, attn='auto'", "tiny Qwen2-VL, one GradCache step", "one rank, NCCL and a ring"} <= named["smoke"]
    assert {"ours", "ours, through autograd", "ours, symmetric, normalize", "eager", "three products, float32 out"} <= named["loss"]
    assert {"option: matryoshka 2 4 8 16", "option: ring of one rank", "option: pooled, 4 tokens"} <= named["sizes"]
    assert {"search: top-10, triton", "search: product, then topk", "sigmoid_loss"} <= named["sizes"]
    assert {f"plain, bfloat16, {path}" for path in ("exp", "chunk", "fused")} | {"pairs, symmetric, bfloat16, joint"} <= named["gate"]
    assert {"matryoshka, bfloat16, levels", "plain, float16, chunk", "plain, float32, chunk", "beyond 2^31 elements"} <= named["gate"]
    ours, eager = (next(row for row in parts["loss"] if row["name"] == name) for name in ("ours", "eager"))
    assert float(ours["d_query_error"]) < float(eager["d_query_error"]) / 4 and ours["times_three_gemms"] > 0 and ours["predicted_ms"] > 0
    assert parts["train"][0]["measured_over_predicted"] > 0 and "chunks" in parts["train"][0]["note"]
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(found["rows"]) and list(rows[0])[:2] == ["part", "name"] and rows[0]["torch"] == torch.__version__
    last = done.stdout[done.stdout.index("== ") :]
    assert "0 complaints" in last and "ours, through autograd" in last


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_fault_in_each_part_is_told_and_the_rest_still_runs(tmp_path, capsys):
    assert runner.run(arguments(tmp_path, "--dry"), FAULTS) == 1
    found = results(tmp_path)
    told: dict[tuple[str, str], str] = {}
    for bad in found["complaints"]:
        told[bad["part"], bad["name"]] = told.get((bad["part"], bad["name"]), "") + bad["text"] + "\n"
    expected = {
        ("env", "memory, read and written"): "planted in env",
        ("smoke", "sigmoid_loss"): "ended with -9",
        ("smoke", "pooled_info_nce"): "hangs",
        ("smoke", "packed attention, attn='auto'"): "TypeError: planted: varlen_attn() got an unexpected keyword argument",
        ("loss", "ours, through autograd"): "d_query_error 2.0",  # and the loss, and d_target
        ("profile", "plain panel by width"): "planted in profile",
        ("gate", "plain, bfloat16, exp"): "d_query: error",
        ("gate", "plain, bfloat16, chunk"): "d_query: error",
        ("gate", "plain, bfloat16, fused"): "d_query: error",
        ("gate", "plain, bfloat16, dense"): "d_query: error",
        ("train", "tiny, seconds of a step"): "norms of the gradients [nan]",
        ("sizes", "20 x 20 x 16 option: ring of one rank"): "this process lost the device by it",
        ("peers", "ours"): "loss_error 1.00e-02",
        ("attention", "varlen 2/1x8 causal"): "Error",
    }
    assert {at: text in told.get(at, "") for at, text in expected.items()} == dict.fromkeys(expected, True), told
    assert set(told) == set(expected), told
    ran = {(row["part"], row["name"]) for row in found["rows"]}
    after = {
        ("env", "launch, torch operation"),
        ("smoke", "topk_similarity"),
        ("smoke", "torch.compile of info_nce"),
        ("smoke", "one rank, NCCL and a ring"),
        ("loss", "eager"),
        ("profile", "kernels: plain"),
        ("profile", "warp_specialised panel: library, D = 16"),
        ("gate", "beyond 2^31 elements"),
        ("sizes", "option: pooled, 4 tokens"),
        ("sizes", "search: top-10, triton"),
        ("peers", "eager, both directions"),
        ("attention", "sdpa 2/1x8 causal"),
    }
    assert after <= ran, after - ran
    notes = {(note["part"], note["name"]): note["text"] for note in found["notes"]}
    assert "planted in a peer" in notes["peers", "24 x 24 x 16 sentence-transformers, cached"]
    trace = next(bad["trace"] for bad in found["complaints"] if bad["part"] == "env")
    assert "RuntimeError: planted in env" in trace and len(trace) <= 1500
    printed = capsys.readouterr().out
    assert all(f"WRONG {part}: {name}" in printed[printed.index("== ") :] for part, name in expected)
