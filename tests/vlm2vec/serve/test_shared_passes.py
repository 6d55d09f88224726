"""The queue: inputs of many requests share passes, each answer is its request's own, and one request's trouble is nobody else's."""

import threading
import time
import weakref
from concurrent.futures import CancelledError

import numpy as np
import pytest
import torch

from vlm2vec.commands.serve.batcher import Batcher
from vlm2vec.commands.serve.limits import Limits, Refused

TEXTS = [" ".join(["word"] * (1 + i % 9)) + f" {i}" for i in range(60)]


class Watched:
    """The model of a test: counts what it runs, may be held, may fail."""

    def __init__(self, model):
        self.model, self.held, self.passes, self.poison = model, threading.Event(), [], None
        self.held.set()

    def __getattr__(self, name):
        return getattr(self.model, name)

    def __call__(self, packed):
        self.held.wait(20)
        self.passes.append(len(packed))
        if self.poison is not None and bool((packed.input_ids == self.poison).any()):
            raise RuntimeError("out of memory, says the test")
        return self.model(packed)


@pytest.fixture
def watched(model):
    return Watched(model)


@pytest.fixture
def queue(watched):
    made = Batcher(watched, Limits(batch_size=8, queued_inputs=100, held_mib=1))
    yield made
    watched.held.set()
    made.close()


def rows(answer):
    return torch.nn.functional.normalize(answer.vectors, dim=1).numpy()


def until(true, seconds=20):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_many_requests_share_passes_and_get_their_own(queue, watched, model):
    truth = model.encode(TEXTS)
    watched.held.clear()
    futures = [queue.submit(TEXTS[i : i + 3]) for i in range(0, 60, 3)]
    watched.held.set()
    for i, future in zip(range(0, 60, 3), futures):
        np.testing.assert_allclose(rows(future.result(30)), truth[i : i + 3], atol=1e-6)
    assert sum(watched.passes) == 60 and len(watched.passes) <= 20 and max(watched.passes) == 8
    assert sum(future.result().tokens for future in futures) == sum(f.length for f in model.preprocess(TEXTS))
    assert queue.queued == 0


def test_a_short_request_is_not_kept_by_a_long_one(queue, watched):
    ended = []
    watched.held.clear()
    long = queue.submit(TEXTS + TEXTS[:39])  # more than three times what may be ready: it cannot end in the pass of the short one
    until(lambda: queue._ready)
    short = queue.submit(["short"])
    for name, future in (("long", long), ("short", short)):
        future.add_done_callback(lambda _, name=name: ended.append(name))
    watched.held.set()
    short.result(30)
    assert long.result(30).vectors.shape[0] == 99
    assert ended == ["short", "long"]


def test_too_much_is_refused_with_a_time(queue, watched):
    watched.held.clear()
    first = queue.submit(TEXTS)
    with pytest.raises(Refused, match="60 inputs wait already, of at most 100") as e:
        queue.submit(TEXTS)
    assert e.value.status == 429 and 1 <= e.value.retry_after <= 60
    queue.submit(["a"], weight=1 << 19)
    with pytest.raises(Refused, match="MiB are held already"):
        queue.submit(["a"], weight=1 << 20)
    with pytest.raises(ValueError, match="3000 inputs: expected at most 2048 in one request"):
        queue.submit(["a"] * 3000)
    watched.held.set()
    first.result(30)
    until(lambda: queue.queued == 0)
    assert len(queue.submit(TEXTS).result(30).vectors) == 60


def test_what_nobody_waits_for_is_not_run(queue, watched):
    watched.held.clear()
    head = queue.submit(["head"])
    until(lambda: not queue._waiting and not queue._ready and not queue._reading)
    gone = queue.submit(TEXTS)
    assert gone.cancel()
    watched.held.set()
    head.result(30)
    assert len(queue.submit(["next"]).result(30).vectors) == 1
    assert sum(watched.passes) == 2 and queue.queued == 0
    with pytest.raises(CancelledError):
        gone.result(0)


def test_a_fault_is_its_own_requests(queue, watched, model):
    watched.poison = model.preprocess(["~"])[0].input_ids[0]
    watched.held.clear()
    futures = [queue.submit(one) for one in (["fine"], ["a", "bad ~"], [{"text": 7}], ["good"])]
    watched.held.set()
    np.testing.assert_allclose(rows(futures[0].result(30)), model.encode(["fine"]), atol=1e-6)
    np.testing.assert_allclose(rows(futures[3].result(30)), model.encode(["good"]), atol=1e-6)
    with pytest.raises(RuntimeError, match="out of memory"):
        futures[1].result(30)
    with pytest.raises(ValueError, match="input 0: 'text' must be a str"):
        futures[2].result(30)
    assert len(queue.submit(["after"]).result(30).vectors) == 1


def test_the_end_answers_or_refuses_everyone(watched):
    queue = Batcher(watched, Limits(batch_size=4))
    watched.held.clear()
    futures = [queue.submit([text]) for text in TEXTS]
    threading.Timer(0.3, watched.held.set).start()
    queue.close(seconds=0.0)
    told = [future.exception(10) for future in futures]
    assert all(error is None or (isinstance(error, Refused) and error.status == 503) for error in told) and any(told)
    with pytest.raises(Refused, match="stopping"):
        queue.submit(["late"])
    queue = Batcher(watched, Limits(batch_size=4))
    futures = [queue.submit([text]) for text in TEXTS]
    queue.close(seconds=30)
    assert all(future.exception(0) is None for future in futures), "what was taken is answered where there is time"


def test_memory_is_bounded_by_a_few_passes(queue, watched):
    watched.held.clear()
    future = queue.submit(TEXTS + TEXTS[:30])
    until(lambda: len(queue._ready) >= 16 and not queue._reading)
    time.sleep(0.05)
    assert len(queue._ready) <= 4 * 8, "inputs are read as passes are made"
    watched.held.set()
    future.result(30)


def test_a_fault_beside_the_model_ends_no_thread(watched, model, monkeypatch):
    """Whatever raises around a pass fails the requests of that pass, if any; the next one is answered."""

    def full(*numbers):
        raise OSError("disk full, says the test")

    queue = Batcher(watched, Limits(), observe=full)
    np.testing.assert_allclose(rows(queue.submit(["a"]).result(30)), model.encode(["a"]), atol=1e-6)
    for owner, name in ((queue._pages, "give_back"), (queue, "_answer")):
        with monkeypatch.context() as broken:
            broken.setattr(owner, name, full)
            with pytest.raises(OSError, match="disk full"):
                queue.submit(["b"]).result(30)
        np.testing.assert_allclose(rows(queue.submit(["c"]).result(30)), model.encode(["c"]), atol=1e-6)
    assert queue.alive
    queue.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_where_the_thread_of_the_model_ends_nobody_waits(watched, monkeypatch):
    def end(taken):
        raise SystemExit

    queue = Batcher(watched, Limits())
    monkeypatch.setattr(queue, "_answer_all", end)
    with pytest.raises(RuntimeError, match="the thread of the model has ended"):
        queue.submit(["a"]).result(30)
    with pytest.raises(Refused):
        queue.submit(["b"])
    until(lambda: not queue.alive)
    queue.close()


def test_a_pass_that_failed_holds_no_memory_when_its_halves_run(model):
    """The error of a pass holds its frames, and these what it had allocated: on a full card no retry would fit."""

    class Full(Watched):
        lost, sizes, kept = [], [], 0

        def __call__(self, packed):
            self.held.wait(20)
            self.sizes.append(len(packed))
            self.kept += sum(one() is not None for one in self.lost)
            activations = torch.ones(3)
            if len(packed) > 2:
                self.lost.append(weakref.ref(activations))
                raise torch.OutOfMemoryError("says the test")
            return self.model(packed)

    full = Full(model)
    queue = Batcher(full, Limits(batch_size=8))
    full.held.clear()
    first = queue.submit(["first"])
    until(lambda: not queue._waiting and not queue._reading)
    future = queue.submit(TEXTS[:8])
    until(lambda: len(queue._ready) >= 8)
    full.held.set()
    np.testing.assert_allclose(rows(future.result(30)), model.encode(TEXTS[:8]), atol=1e-6)
    assert full.sizes == [1, 8, 4, 2, 2, 4, 2, 2] and full.kept == 0 and len(full.lost) == 3
    first.result(30)
    queue.close()
