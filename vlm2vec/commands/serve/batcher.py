"""Inputs of many requests in shared passes of one model: read by threads, sorted by length, cut by tokens as `encode` cuts them.

    submit -> waiting -> (threads: processing) -> ready -> (one thread: the model) -> the request's future

Requests that wait give one input each in turn, so that a short one is not kept by a long one before it. What is ready is bounded by
inputs and tokens, so that memory is that of a few passes, however much waits. A pass begins when enough is ready, when nothing else is
on its way, or when the first input has waited `wait_ms`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from vlm2vec import encoding
from vlm2vec.commands.serve.limits import Limits, Refused
from vlm2vec.commands.serve.memory import FreePages

if TYPE_CHECKING:
    from vlm2vec.model import VLM2Vec
    from vlm2vec.packing import Features

log = logging.getLogger(__name__)
PASSES = 4  # of the model, that may be ready or being read


class Embedded(NamedTuple):
    """The answer to a request: (n, D) float32 vectors as the model gives them, not of length 1 yet, and tokens in all.

    `cut` are the places of inputs whose text was longer than the model's limit, and lost its end.
    """

    vectors: torch.Tensor
    tokens: int
    cut: list[int]


@dataclass(eq=False)
class Request:
    """Inputs that are answered together."""

    inputs: list[Any]
    prompt: str | None
    weight: int
    future: Future = field(default_factory=Future)
    vectors: torch.Tensor | None = None
    tokens: int = 0
    cut: list[int] = field(default_factory=list)
    begun: int = 0  # inputs that a thread has taken
    answered: int = 0

    def __post_init__(self) -> None:
        self.count = len(self.inputs)


@dataclass(eq=False)
class Job:
    """One input of a request."""

    request: Request
    place: int
    features: Features | None = None
    ready_at: float = 0.0

    @property
    def dropped(self) -> bool:
        """Nobody waits for it any more."""
        return self.request.future.done()


class Batcher:
    """A model's queue.

    Args:
        observe: called after each pass with (inputs, tokens, seconds).

    Example:
        >>> from vlm2vec.commands.serve.limits import Limits
        >>> batcher = Batcher(model, Limits())
        >>> batcher.submit(["a fox", "an owl"]).result().vectors.shape == (2, model.embedding_dim)
        True
        >>> batcher.close()
    """

    def __init__(self, model: VLM2Vec, limits: Limits, observe: Callable[[int, int, float], None] | None = None):
        self.model, self.limits, self.observe = model, limits, observe
        self._budget = encoding.MAX_CHUNK_TOKENS.get(model.device.type, encoding.MAX_CHUNK_TOKENS["cuda"])
        self._pages = FreePages()
        self._changed = threading.Condition()
        self._waiting: deque[Request] = deque()
        self._ready: list[Job] = []
        self._requests: set[Request] = set()
        self._reading = self._coming = self._inputs = self._held = 0
        self._rate = 0.0  # inputs a second, lately
        self._closed = self._stopped = False
        threads = [threading.Thread(target=self._run, name="model", daemon=True)]
        readers = min(encoding.MAX_THREADS, os.cpu_count() or 1)
        threads += [threading.Thread(target=self._read, name=f"reader-{i}", daemon=True) for i in range(readers)]
        self._threads = threads
        for thread in threads:
            thread.start()

    # -- what requests call ------------------------------------------------------------------------------------------------

    @property
    def queued(self) -> int:
        """Inputs that are not answered yet."""
        return self._inputs

    @property
    def closed(self) -> bool:
        """Whether nothing more is taken."""
        return self._closed

    @property
    def alive(self) -> bool:
        """Whether every thread that answers is there."""
        return all(thread.is_alive() for thread in self._threads)

    @contextlib.contextmanager
    def coming(self) -> Iterator[None]:
        """Around the reading of a request that is on its way: passes wait for it a little."""
        with self._changed:
            self._coming += 1
        try:
            yield
        finally:
            with self._changed:
                self._coming -= 1
                self._changed.notify_all()

    def submit(self, inputs: list[Any], prompt: str | None = None, weight: int = 0) -> Future:
        """A future of `Embedded`. A cancelled one's inputs are not run.

        Args:
            weight: bytes that the inputs hold.

        Raises:
            Refused: too much waits already, or the server stops.
            ValueError: more inputs than one request may have.

        The future fails with ValueError for an input that cannot be read, with Refused when the server stops before it is answered.
        """
        if len(inputs) > self.limits.inputs:
            raise ValueError(f"{len(inputs)} inputs: expected at most {self.limits.inputs} in one request; send several")
        request = Request(inputs, prompt, weight)
        with self._changed:
            self._admit(len(inputs), weight)
            self._inputs += len(inputs)
            self._held += weight
            self._requests.add(request)
            self._waiting.append(request)
            self._changed.notify_all()
        request.future.add_done_callback(lambda _: self._gone(request))
        return request.future

    def admit(self, weight: int) -> None:
        """Refused where a request of so many bytes would not be taken now: asked before its body is read."""
        with self._changed:
            self._admit(1, weight)

    def hold(self, weight: int, beside: int) -> None:
        """Count more bytes of a body that comes in, until `release`; Refused beyond the limit.

        Args:
            beside: bytes of the same body that are counted already. One body alone is always taken.
        """
        with self._changed:
            self._admit(1, weight, beside)
            self._held += weight

    def release(self, weight: int) -> None:
        """Bytes that `hold` counted are gone."""
        with self._changed:
            self._held -= weight

    def _admit(self, inputs: int, weight: int, beside: int = 0) -> None:
        if self._closed:
            raise Refused(503, "the server is stopping; ask again in a moment", 5)
        if self._inputs and self._inputs + inputs > self.limits.queued_inputs:
            raise Refused(429, f"{self._inputs} inputs wait already, of at most {self.limits.queued_inputs}", self._seconds_left())
        if weight and self._held > beside and self._held + weight > self.limits.held_mib << 20:
            raise Refused(429, f"{self._held >> 20} MiB are held already, of at most {self.limits.held_mib}", self._seconds_left())

    def _seconds_left(self) -> int:
        """By when half of what waits will be done."""
        return min(60, max(1, math.ceil(self._inputs / 2 / self._rate))) if self._rate else 1

    def _gone(self, request: Request) -> None:
        with self._changed:
            if request in self._requests:
                self._requests.discard(request)
                self._inputs -= request.count
                self._held -= request.weight
                request.inputs = []
                self._changed.notify_all()

    def drain(self) -> None:
        """Take nothing more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def close(self, seconds: float = 0.0) -> None:
        """Stop: take nothing more, give what was taken so many seconds, and refuse the rest."""
        self.drain()
        with self._changed:
            self._changed.wait_for(lambda: not self._requests, timeout=seconds)
            self._stopped = True
            left = list(self._requests)
            self._changed.notify_all()
        for request in left:
            _fail(request, Refused(503, "the server is stopping; ask again in a moment", 5))
        for thread in self._threads:
            thread.join(timeout=30)

    # -- threads -----------------------------------------------------------------------------------------------------------

    def _may_read(self) -> bool:
        """Whether another input may be made ready, by inputs and tokens that are."""
        room = PASSES * self.limits.batch_size > len(self._ready) + self._reading
        return bool(self._waiting) and room and PASSES * self._budget > sum(job.features.length for job in self._ready)

    def _read(self) -> None:
        """A thread that turns waiting inputs into features."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._may_read())
                if self._stopped:
                    return
                job = self._next()
                if job is None:
                    continue
                self._reading += 1
            try:
                if not job.dropped:
                    job.features = self._features(job)
            except Exception as e:  # a request's fault, or at the worst a fault of ours that must not end this thread
                _fail(job.request, ValueError(f"input {job.place}: {e}") if isinstance(e, ValueError) else e)
            with self._changed:
                self._reading -= 1
                if job.features is not None and not job.dropped:
                    job.ready_at = time.monotonic()
                    self._ready.append(job)
                self._changed.notify_all()

    def _next(self) -> Job | None:
        """The next input of the request whose turn it is; None where nobody waits for it any more."""
        request = self._waiting.popleft()
        if request.future.done():
            return None
        request.begun += 1
        if request.begun < request.count:
            self._waiting.append(request)
        return Job(request, request.begun - 1)

    def _features(self, job: Job) -> Features:
        x = job.request.inputs[job.place]
        return self.model.processing(encoding.with_prompt(self.model, [x], job.request.prompt)[0])

    def _due(self) -> bool:
        if not self._ready:
            return False
        if len(self._ready) >= 2 * self.limits.batch_size or sum(job.features.length for job in self._ready) >= 2 * self._budget:
            return True
        if not (self._waiting or self._reading or self._coming):
            return True
        return time.monotonic() - min(job.ready_at for job in self._ready) >= self.limits.wait_ms / 1e3

    def _run(self) -> None:
        """The thread of the model. Where it ends by a fault, nobody is left waiting, and `alive` says so."""
        try:
            with encoding.evaluating(self.model), torch.no_grad():
                while taken := self._taken():
                    self._answer_all(taken)
        finally:
            with self._changed:
                left, self._closed = [] if self._stopped else list(self._requests), True
            for request in left:
                _fail(request, RuntimeError("the thread of the model has ended"))

    def _taken(self) -> list[Job] | None:
        """What a pass is due of; None when the server stops."""
        with self._changed:
            while True:
                while not (self._stopped or self._due()):
                    self._changed.wait(self.limits.wait_ms / 1e3 if self._ready else None)
                if self._stopped:
                    return None
                taken, self._ready = [job for job in self._ready if not job.dropped], []
                self._changed.notify_all()
                if taken:
                    return taken

    def _answer_all(self, taken: list[Job]) -> None:
        """Passes over these inputs; a fault beside the model's own fails their requests and nothing else."""
        try:
            self._pages.give_back()
            for rows in encoding.chunks([job.features.length for job in taken], self.limits.batch_size, self.model.device.type):
                self._pass([taken[row] for row in rows])
        except Exception as e:
            log.error("requests failed\n%s", traceback.format_exc())
            for job in taken:
                _fail(job.request, _bare(e))

    def _pass(self, jobs: list[Job]) -> None:
        """One pass of the model; where it fails, each half alone, so that one input's fault is one request's."""
        start = time.monotonic()
        tokens = sum(job.features.length for job in jobs)
        hidden = None
        try:
            hidden = self._hidden(jobs)
        except Exception as e:  # out of memory, or an input that the model cannot take
            log.warning("a pass of %d inputs, %d tokens, failed\n%s", len(jobs), tokens, traceback.format_exc())
            if len(jobs) == 1:
                _fail(jobs[0].request, _bare(e))
        if hidden is None:  # here the error and the frames it held, with all that the pass had allocated, are gone
            self._halves(jobs)
            return
        seconds = time.monotonic() - start
        self._rate = 0.9 * self._rate + 0.1 * len(jobs) / seconds if self._rate else len(jobs) / seconds
        self._observed(len(jobs), tokens, seconds)
        for job, vector in zip(jobs, hidden):
            self._answer(job, vector)

    def _halves(self, jobs: list[Job]) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        middle = len(jobs) // 2
        for half in (jobs[:middle], jobs[middle:]) if middle else ():
            if left := [job for job in half if not job.dropped]:
                self._pass(left)

    def _observed(self, *numbers: float) -> None:
        try:
            if self.observe is not None:
                self.observe(*numbers)
        except Exception:  # what is counted is no part of an answer
            log.error("a pass was not counted\n%s", traceback.format_exc())

    def _hidden(self, jobs: list[Job]) -> torch.Tensor:
        packed = self.model.pack([job.features for job in jobs]).to(self.model.device)
        return self.model(packed).float().cpu()

    def _answer(self, job: Job, vector: torch.Tensor) -> None:
        request = job.request
        if job.dropped:
            return
        if not bool(torch.isfinite(vector).all()):
            _fail(request, ValueError(f"input {job.place}: {encoding.NOT_FINITE}"))
            return
        if request.vectors is None:
            request.vectors = torch.empty(request.count, vector.shape[0])
        request.vectors[job.place] = vector
        request.tokens += job.features.length
        if job.features.cut:
            request.cut.append(job.place)
        request.answered += 1
        job.features = None
        if request.answered == request.count:
            with contextlib.suppress(InvalidStateError):  # cancelled, or the server stops, in this moment
                request.future.set_result(Embedded(request.vectors, request.tokens, sorted(request.cut)))


def _fail(request: Request, error: Exception) -> None:
    """The request's error, unless it has an answer or another error already."""
    with contextlib.suppress(InvalidStateError):
        request.future.set_exception(error)


def _bare(error: Exception) -> Exception:
    """The error without the frames that it came through, whose variables hold a pass' memory; the log has them."""
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)
