"""The quickstart's benchmark through the runner by real processes: one or two, killed and gone on, tasks in any order."""

import multiprocessing
import os
import random
import socket
import sys
import time

import pytest
import torch

from tests.helpers.evaluation_layouts import files, shards
from vlm2vec.evaluation.encode.keys import identity_digest, model_identity
from vlm2vec.evaluation.runner import Options, run_tasks
from vlm2vec.evaluation.tasks import find_tasks
from vlm2vec.model import VLM2Vec

SHARD_COST = 200  # about six pictures: enough shards for ten kills to fall between them
FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None
pytestmark = pytest.mark.skipif(FORK is None or sys.platform == "darwin", reason="the processes of these tests are forked")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A small benchmark, its model, and what one undisturbed process makes of them."""
    pytest.importorskip("emoji")
    from vlm2vec.quickstart import build, tiny_model
    from vlm2vec.quickstart.benchmark import Size

    folder = tmp_path_factory.mktemp("quickstart")
    build.build_data(folder, seed=3, size=Size(subjects=32, drawings=2, pairs=16, quads=8), workers=1, say=None)
    tiny_model.build_model(folder, 3)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # forked processes have no other threads, and sums depend on how many there are
    yield folder, evaluate(folder, folder / "whole")
    torch.set_num_threads(threads)


def evaluate(folder, output, order=1, **options):
    model = VLM2Vec.from_pretrained(folder / "model-init", device="cpu")
    data = folder / "data"
    tasks = find_tasks(data / "eval")[::order]
    return run_tasks(
        model, tasks, data / "eval", data / "images", output, options=Options(progress=False, shard_cost=SHARD_COST, workers=1, **options)
    )


def forked(folder, output, rank=0, world=1, port=0):
    """A process that runs the benchmark; the ranks of several meet as under torchrun."""

    def main():
        torch.set_num_threads(1)
        if world > 1:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        from vlm2vec.evaluation.encode.processes import finish, process_group

        rank_, world_, barrier = process_group()
        assert (rank_, world_) == (rank, world)
        evaluate(folder, output, rank=rank_, world=world_, barrier=barrier)
        finish()

    process = FORK.Process(target=main)
    process.start()
    return process


def test_the_benchmark_tells_models_apart(place):
    _, rows = place
    assert len(rows) == 11 and len({r["score"] for r in rows}) > 3 and any(0 < r["score"] < 1 for r in rows)


def test_what_changes_a_vector_changes_its_place_in_the_store(place):
    folder, _ = place

    def digest(change=None, **options):
        model = VLM2Vec.from_pretrained(folder / "model-init", device="cpu", **options)
        if change:
            change(model)
        return identity_digest(model_identity(model))

    def nudge(model):
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] += 1e-3

    same = {digest(), digest(dtype="float32"), digest(attn="sdpa")}
    others = [
        digest(max_pixels=56 * 56),
        digest(min_pixels=6272),
        digest(positions="mrope"),
        digest(max_length=9),
        digest(dtype="bfloat16"),
        digest(nudge),
        digest(lambda model: model.add_adapter(r=2)),
        digest(lambda model: model.prompts.update(query="Find ")),
    ]
    assert len(same) == 1 and len(same | set(others)) == 1 + len(others)


def test_tasks_in_another_order(place, tmp_path):
    folder, rows = place
    assert evaluate(folder, tmp_path / "out", order=-1)[::-1] == rows
    assert files(tmp_path / "out") == files(folder / "whole")


def test_two_processes(place, tmp_path):
    folder, _ = place
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [forked(folder, tmp_path / "out", rank, 2, port) for rank in (0, 1)]
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    assert files(tmp_path / "out") == files(folder / "whole")
    assert shards(tmp_path / "out").keys() == shards(folder / "whole").keys()


def test_killed_at_ten_random_moments(place, tmp_path):
    """SIGKILL, ten times in one run. A shard that is on disk is never written again."""
    folder, _ = place
    whole = shards(folder / "whole")
    assert len(whole) > 20, "too few shards for ten kills to fall between them"
    rng, out, before = random.Random(2), tmp_path / "out", {}
    for moment in sorted(rng.sample(range(len(whole)), 10)):  # shards on disk; the delay reaches into the next ones
        process = forked(folder, out)
        while len(shards(out)) < moment and process.is_alive():
            time.sleep(0.002)
        process.join(rng.uniform(0, 0.03))
        process.kill()
        process.join()
        now = shards(out)
        assert before.items() <= now.items(), "a finished shard was encoded again"
        before = now
    evaluate(folder, out)
    assert before and before.items() <= shards(out).items()
    assert shards(out).keys() == whole.keys()
    assert files(out) == files(folder / "whole")
    tasks = [{p.name: p.read_text() for p in (run / "tasks").iterdir()} for run in (out, folder / "whole")]
    assert tasks[0] == tasks[1] and len(tasks[0]) == 11
