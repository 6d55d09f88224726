"""`python -m bench.gpu` on a CPU: the same code with a CPU's clock, the kernels interpreted, its gate able to fail."""

import csv

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("triton")

from bench import gpu, gpu_attention, gpu_gate, gpu_options, gpu_peers  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the program itself")


def test_without_cuda_it_says_so(capsys):
    assert gpu.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Tiny shapes, no child pytest; returns how to run the program."""
    commands = []
    done = type("Done", (), {"returncode": 0, "stdout": "abc\n"})()
    monkeypatch.setattr(gpu.subprocess, "run", lambda command, **kwargs: commands.append(command) or done)
    monkeypatch.setattr(gpu_attention, "SHAPES", None)
    compare = gpu_attention.compare
    monkeypatch.setattr(gpu_attention, "compare", lambda repeat, device: compare(2, torch.float32, device, [(2, 1, 8, True, None)], [5, 3]))
    slow = ("torch.compile", "sentence-transformers cached", "inf-cl", "cut-cross-entropy exact")  # tested elsewhere, or CUDA only
    monkeypatch.setattr(gpu_peers, "ONE", {k: v for k, v in gpu_peers.ONE.items() if k not in slow})

    def run(*more, **gate):
        args = [*more, "--sizes", "24", "--widths", "16", "--repeats", "2", "--search", "10", "50", "16", "--temperature", "0.1", "--output", str(tmp_path / "out/gpu")]
        import argparse

        parser = argparse.ArgumentParser()
        gpu.add_arguments(parser)
        return gpu.run(parser.parse_args(args), gpu.Host(), **{"n": 12, "m": 20, "d": 16, "dtypes": (torch.bfloat16,), "names": ("plain", "pairs, symmetric"), **gate})

    run.commands, run.folder = commands, tmp_path / "out"
    yield run
    if dist.is_initialized():  # the ring of one's
        dist.destroy_process_group()


def test_gate_tables_and_files(small, capsys):
    assert small() == 0
    printed = capsys.readouterr().out
    assert any("tests/kernels/test_triton_exp_panel.py" in command for command in small.commands[0])
    rows = list(csv.DictReader((small.folder / "gpu.csv").open()))
    options = gpu_options.table(24, 16)
    assert [row["name"] for row in rows] == [*options, *gpu_peers.SEARCH, *gpu_peers.ONE, *gpu_peers.BOTH, *gpu_peers.SIGMOID, *gpu_peers.SEARCH]
    assert {"symmetric", "matryoshka 2 4 8 16", "value alone", "ring of one", "pooled, 4 tokens", "masks", "label_smoothing"} <= set(options)
    assert all(row["ms_p50"] and not row["note"] for row in rows[: len(options)]), [row["note"] for row in rows[: len(options)]]
    assert [(row["n"], row["m"], row["d"]) for row in rows[len(options) :][:3]] == [("10", "50", "16")] * 3
    by_name = {row["name"]: row for row in rows}
    for row in rows:
        assert bool(row["ms_p50"]) != bool(row["note"]), row  # a time, or the reason why there is none
    for name in ("contrastive_kernels triton", "contrastive_kernels triton, autograd", "contrastive_kernels triton, symmetric", "eager", "F.linear_cross_entropy", "contrastive_kernels sigmoid", "eager sigmoid"):
        row = by_name[name]
        assert float(row["ms_p20"]) <= float(row["ms_p50"]) <= float(row["ms_p80"]), row
        assert float(row["loss_error"]) < 0.02 and float(row["d_query_error"]) < 0.05 and float(row["d_target_error"]) < 0.05, row
    assert float(by_name["contrastive_kernels triton"]["d_query_error"]) < float(by_name["eager"]["d_query_error"])
    assert float(by_name["contrastive_kernels triton"]["predicted_ms"]) > 0
    assert all(by_name[name]["ms_p50"] and not by_name[name]["loss_error"] for name in gpu_peers.SEARCH)
    text = (small.folder / "gpu.md").read_text()
    assert "N = 24, M = 24, D = 16" in text and "N = 10, M = 50, D = 16" in text and all(name in text for name in by_name)
    attention = list(csv.DictReader((small.folder / "gpu-attention.csv").open()))
    assert attention[0]["provider"] == "sdpa" and float(attention[0]["error_of_allowed"]) <= 1 and "0 wrong" in printed


def test_nothing_is_timed_when_a_kernel_is_wrong(small, monkeypatch, capsys):
    from contrastive_kernels.triton import rows

    update = rows.update
    monkeypatch.setattr("contrastive_kernels.triton.writer.update", lambda *args, **kwargs: update(*args, **{**kwargs, "a": kwargs["a"] * 1.02 if kwargs.get("a") is not None else None}))
    assert small(names=("plain",)) == 1
    assert "d_query: error" in capsys.readouterr().err and not small.folder.exists()
    assert small("--keep-going", names=("plain",)) == 1 and (small.folder / "gpu.csv").exists()


def test_gate_takes_every_way():
    rows = gpu_gate.check("cpu", n=20, m=36, d=16, dtypes=(torch.bfloat16,), names=("temperature gradient", "pairs, symmetric"))
    assert {row["path"] for row in rows} == {"exp", "chunk", "fused", "joint"}
    assert not [row for row in rows if row["wrong"]]
    assert {key for row in rows for key in row} >= {"loss", "d_query", "d_target", "d_temperature"}


def test_gate_takes_all_levels_in_one_sweep():
    # 64: what widths of prefixes are multiples of
    rows = gpu_gate.check("cpu", n=12, m=20, d=128, dtypes=(torch.bfloat16,), names=("matryoshka", "matryoshka, masks"))
    assert {(row["options"], row["path"]) for row in rows if row["path"] != "fused"} == {
        (name, path) for name in ("matryoshka", "matryoshka, masks") for path in ("exp", "chunk", "levels")
    }
    assert not [row for row in rows if row["wrong"]]


def test_far_corner_is_compared(monkeypatch):
    assert gpu_gate.far("cpu", 70, 90, 16) == []
    from contrastive_kernels.triton import exp_panel

    original = exp_panel.exp_panel
    monkeypatch.setattr(exp_panel, "exp_panel", lambda x, y, **kwargs: original(x.flip(0), y, **kwargs))
    assert len(gpu_gate.far("cpu", 70, 90, 16)) == 2
