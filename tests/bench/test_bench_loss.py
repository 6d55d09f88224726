"""`python -m bench loss`: a missed aim is a MISS in the table and exit code 1, judged by the wall clock."""

import csv

import pytest
import torch

from bench import measure
from bench import options as loss_options
from bench.loss import memory as loss_memory
from bench.loss import run as loss
from bench.loss import verdicts as judged
from bench.peers import on_cpu


@pytest.fixture
def run(tmp_path):
    def call(*arguments):
        path = tmp_path / "loss.csv"
        code = loss.main(["--csv", str(path), "--repeat", "1", *arguments])
        with path.open(encoding="utf-8") as file:
            return code, list(csv.DictReader(file))

    return call


def verdicts(rows):
    return {row["name"]: row["verdict"] for row in rows if row["verdict"]}


@pytest.mark.parametrize("aim, code, verdict", [(0.0, 0, "PASS"), (1e9, 1, "MISS")])
def test_peers(aim, code, verdict, run, monkeypatch, capsys):
    monkeypatch.setattr(loss, "FASTER_THAN_NAIVE", aim)
    got, rows = run("--tables", "peers", "--shapes", "64x8", "--peers", "ours", "naive")
    assert got == code and verdicts(rows) == {"ours against naive, times as fast": verdict}
    assert [row["note"] for row in rows if row["verdict"]] == ["1 runs, 5 are asked for"]
    assert ("missed: ours against naive" in capsys.readouterr().out) == (verdict == "MISS")


@pytest.mark.parametrize("aim, code", [(1e9, 0), (0.0, 1)])
def test_options(aim, code, run, monkeypatch):
    monkeypatch.setattr(
        loss_options, "cases", lambda n, d: {"normalize": ({"normalize": True}, aim), "weight": ({"weight": torch.ones(n)}, 1e9)}
    )
    got, rows = run("--tables", "options", "--options-shape", "64x8")
    assert got == code and verdicts(rows) == {"normalize": "MISS" if code else "PASS", "weight": "PASS"}


def test_ours_that_is_wrong(run, monkeypatch):
    monkeypatch.setitem(on_cpu.ALL, "ours", lambda q, t, temperature: on_cpu.naive(q, t, 2 * temperature))
    got, rows = run("--tables", "peers", "--shapes", "64x8", "--peers", "ours", "naive")
    assert got == 1 and verdicts(rows) == {"ours against float64": "MISS"}


def test_the_wall_clock_decides():
    assert judged.at_most("x", (2.0, 0.1), (1.0, 1.0), 1.5, 1, 1)["verdict"] == "MISS"
    assert judged.at_most("x", (1.0, 9.0), (1.0, 1.0), 1.5, 1, 1)["verdict"] == "PASS"
    assert judged.faster("x", (1.0, 0.1), (1.2, 1.0), 1.5, 1, 1)["verdict"] == "MISS"
    assert judged.faster("x", (1.0, 9.0), (2.0, 1.0), 1.5, 1, 1)["verdict"] == "PASS"


def test_turns_are_taken_and_the_first_is_not_counted(monkeypatch):
    order, clock = [], iter([*range(0, 100)])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    times = measure.interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3 and times["a"][0] == times["b"][0] == 1e3


@pytest.mark.parametrize("memory, ratio, code", [(512, 1e9, 0), (512, 0.0, 1), (-1e6, 1e9, 1)])
def test_search(memory, ratio, code, run, monkeypatch):
    """In this process: what the children do, and what their numbers are judged by."""
    monkeypatch.setattr(loss_memory, "TOPK_MIB", memory)
    monkeypatch.setattr(loss_memory, "TOPK_RATIO", ratio)
    monkeypatch.setattr(loss_memory, "in_child", lambda what, *given, malloc=None: loss_memory.CHILDREN[what](*given))
    got, rows = run("--tables", "topk", "--topk-shape", "70", "4200", "8")
    assert got == code and len(verdicts(rows)) == 4
    assert verdicts(rows)["top-k, sampled rows that differ from the dense answer"] == "PASS"


@pytest.mark.parametrize("bound, code", [(1e6, 0), (-1e6, 1)])
def test_memory(bound, code, run, monkeypatch):
    monkeypatch.setattr(loss_memory, "WORKSPACE_MIB", bound)
    monkeypatch.setattr(loss_memory, "WIDE", 64)
    monkeypatch.setattr(loss_memory, "WIDE_GIB", 1e6)
    monkeypatch.setattr(loss_memory, "in_child", lambda what, *given, malloc=None: loss_memory.CHILDREN[what](*given))
    got, rows = run("--tables", "memory", "--memory-shape", "64x8", "--peers", "ours", "naive")
    assert got == code
    shown = [(row["name"], row["options"]) for row in rows if row["part"] == "memory"]
    assert len(shown) == 8 and ("ours, scaled backward", "blocks given back") in shown
