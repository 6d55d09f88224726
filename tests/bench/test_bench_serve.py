"""The server's table, a tenth of a tenth of it: no answer lost or mixed up, throughput and memory told."""

import argparse
import os

import pytest

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
pytest.importorskip("prometheus_client", reason="the extra `serve` is not installed")

import numpy as np

from bench import models
from bench.serve import indexing, run, traffic
from vlm2vec import VLM2Vec

SMALL = [(56, 84), (84, 56), (56, 56)]


def test_many_clients_get_their_own_answers(tmp_path):
    models.write("tiny", str(tmp_path))
    made = traffic.pool(SMALL, 30)
    model = VLM2Vec.from_pretrained(tmp_path, dtype="float32", device="cpu")
    truth = np.stack([model.encode([x])[0] for x in made])
    wanted = traffic.requests(150, len(made))
    with run.Served(str(tmp_path)) as served:
        traffic.send(served.port, made, wanted[:20], truth, 4)
        before = served.resident()
        told = traffic.send(served.port, made, wanted, truth, 16)
        after = served.resident()
        others = traffic.send(served.port, made, wanted[:5], np.roll(truth, 1, axis=0), 2)
    assert not told.errors and told.requests == 150 and told.inputs == sum(map(len, wanted))
    assert told.worst <= 1e-6 < others.worst, "an answer that is another's is seen"
    assert after < 1.15 * before + 20, (before, after)


def test_a_server_that_sleeps_misses_the_aim():
    assert not run.too_slow(0.81, 0.5, apart=True) and "0.40 of offline throughput by the clock" in run.too_slow(0.4, 0.9, apart=True)[0]
    assert not run.too_slow(0.4, 0.9, apart=False) and run.too_slow(0.4, 0.7, apart=False)
    found = run.halves()
    if found is not None:
        serving, asking = found
        with run.on(asking):
            assert os.sched_getaffinity(0) == asking and not serving & asking
        assert os.sched_getaffinity(0) >= serving | asking


def test_the_index_part_is_held_to_an_exhaustive_search(capsys):
    rows, missed = indexing.part(argparse.Namespace(rows=300, width=[8]))
    assert not missed and {row["name"] for row in rows} >= {"build", "one added", "one removed", "open", "search, one query"}
    assert "300 vectors of 8" in capsys.readouterr().out
