"""`python -m bench eval`: its model has learnt something, and its gate sees an arm that encodes wrongly."""

import pytest

from bench import models
from bench.eval import model as eval_model
from bench.eval import run as bench_eval
from bench.eval.benchmark import write_benchmark

ROWS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    write_benchmark(folder, ROWS)
    models.write("tiny", str(folder / "model"))
    eval_model.train(folder, steps=48, known=ROWS)
    return folder


def test_the_gate_passes_and_fails(folder, monkeypatch):
    """The fault: the patches of a batch's pictures in reverse."""
    own, theirs = bench_eval.ours(folder)["scores"], bench_eval.reference(folder)["scores"]
    bench_eval.agree(own, theirs, ROWS)
    real = bench_eval.padded_batch

    def reversed_patches(features):
        batch = real(features)
        return {name: x.flip(0) if name == "pixel_values" else x for name, x in batch.items()}

    monkeypatch.setattr(bench_eval, "padded_batch", reversed_patches)
    with pytest.raises(RuntimeError, match="score differently"):
        bench_eval.agree(own, bench_eval.reference(folder)["scores"], ROWS)


def test_scores_that_are_all_0_are_refused():
    with pytest.raises(RuntimeError, match="right too seldom"):
        bench_eval.agree({"a": 0.0, "b": 0.05}, {"a": 0.0, "b": 0.05}, 40)
    bench_eval.agree({"a": 0.0, "b": 0.1}, {"a": 0.0, "b": 0.125}, 40)
    with pytest.raises(RuntimeError, match="score differently"):
        bench_eval.agree({"a": 0.5, "b": 0.5}, {"a": 0.5}, 40)
