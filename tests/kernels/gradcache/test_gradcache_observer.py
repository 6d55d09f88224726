"""The observer of a GradCache step: which phases it is told, in which order, and that it changes nothing."""

import contextlib
from dataclasses import replace

import pytest
import torch

from contrastive_kernels import GradCache, InfoNCEResult, info_nce_value_and_grad
from contrastive_kernels.gradcache import PHASES
from contrastive_kernels.gradcache.observer import CHUNK_BACKWARD, CHUNK_FORWARD, FROZEN_FEATURES, LOSS, SECOND_PASS
from tests.kernels.helpers.gradcache_encoder import Encoder, assert_same, batch, gradients


class Told:
    """Keeps every phase as it is entered and left."""

    def __init__(self):
        self.phases, self.events = [], []

    @contextlib.contextmanager
    def __call__(self, phase):
        self.phases.append(phase)
        self.events.append(("in", phase.name, phase.chunk))
        try:
            yield
        finally:
            self.events.append(("out", phase.name, phase.chunk))

    def of(self, name):
        return [phase for phase in self.phases if phase.name == name]


def run(encoder, seed=3, **options):
    query, target = batch(6, 1), batch(6, 2)
    encoder.zero_grad()
    torch.manual_seed(seed)
    cache = GradCache(encoder, chunk_size=2, **options)
    return cache.step(query, target, lengths=([len(x) for x in query], [len(x) for x in target]), normalize=True)


def test_every_phase_is_told_in_its_order_and_nothing_changes():
    encoder, told, second = Encoder(), Told(), Told()
    plain = run(encoder, retain=1)
    truth = gradients(encoder)
    seen = run(encoder, retain=1, observer=[told, second])
    assert torch.equal(plain.loss, seen.loss)
    assert_same(gradients(encoder), truth)
    assert second.events == told.events, "several observers are told the same"
    depth, order = 0, []
    for event, name, chunk in told.events:
        if event == "in":
            order.append((depth, name, chunk))
        depth += 1 if event == "in" else -1
    assert depth == 0
    assert [name for level, name, _ in order if level == 0] == list(PHASES)
    inner = [(name, chunk) for level, name, chunk in order if level == 1]
    # Three chunks a side; the last one of the first pass keeps its graph and goes first in the second.
    assert inner == [(CHUNK_FORWARD, i) for i in range(6)] + [(CHUNK_BACKWARD, i) for i in (5, 0, 1, 2, 3, 4)]


def test_a_phase_says_which_rows_it_is_about():
    encoder, told = Encoder(), Told()
    run(encoder, retain=2, observer=told)
    forward = told.of(CHUNK_FORWARD)
    for side, lengths in (("query", batch(6, 1)), ("target", batch(6, 2))):
        chunks = [phase for phase in forward if phase.side == side]
        assert sorted(row for phase in chunks for row in phase.rows) == list(range(6))
        assert [phase.tokens for phase in chunks] == [sum(len(lengths[row]) for row in phase.rows) for phase in chunks]
    assert [phase.retains_graph for phase in forward] == [False] * 4 + [True] * 2
    assert {phase.chunk for phase in told.of(CHUNK_BACKWARD) if phase.retains_graph} == {4, 5}
    (loss,) = told.of(LOSS)
    assert [tuple(e.shape) for e in loss.tensors] == [(6, 8), (6, 8)]
    (second,) = told.of(SECOND_PASS)
    assert [tuple(g.shape) for g in second.tensors] == [(6, 8), (6, 8)]


@pytest.mark.parametrize("keep_mib,times", [(1.0, 6), (0.0, 12)])
def test_frozen_features_are_told_where_they_are_computed(keep_mib, times):
    encoder, told = Encoder(), Told()
    run(encoder, freeze=encoder.features, keep_mib=keep_mib, observer=told)
    assert len(told.of(FROZEN_FEATURES)) == encoder.tower_runs == times


def test_contexts_are_left_where_a_phase_raises():
    told = Told()

    def failing(inputs, rows):
        raise RuntimeError("broken encoder")

    with pytest.raises(RuntimeError, match="broken encoder"):
        run_failing = GradCache(failing, chunk_size=2, observer=told)
        run_failing.step(batch(2, 1), batch(2, 2), lengths=([1, 1], [1, 1]))
    assert [event for event, *_ in told.events] == ["in", "in", "out", "out"]


def test_a_step_done_again_is_told_again():
    """The first attempt runs out of memory in its second chunk; half the budget fits."""
    encoder, told = Encoder(), Told()

    class Full(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self, inputs, rows):
            if len(rows) > 1:
                raise torch.OutOfMemoryError("full")
            return self.encoder(inputs, rows)

    module = Full()
    run(encoder, observer=told)
    alone = list(told.events)
    told.__init__()
    query, target = batch(6, 1), batch(6, 2)
    encoder.zero_grad()
    GradCache(module, chunk_size=2, module=module, observer=told).step(
        query, target, lengths=([len(x) for x in query], [len(x) for x in target]), normalize=True
    )
    tops = [name for event, name, chunk in told.events if event == "in" and chunk is None]
    assert tops == ["first pass", *PHASES] and len(alone) == 2 * (12 + 4)


def test_chosen_chunks_alone_are_run():
    """A step of which some chunks run: gradients are those of the chosen rows, for what the whole loss hands them."""
    encoder, told = Encoder(0.0), Told()

    def select(chunks):
        for chunk in chunks:
            chunk.retains_graph = chunk.side == 0
        return chunks[:1] + chunks[-1:]

    run(encoder, select=select, observer=told)
    assert len(told.of(CHUNK_FORWARD)) == len(told.of(CHUNK_BACKWARD)) == 2
    assert [phase.retains_graph for phase in told.of(CHUNK_FORWARD)] == [True, False]


def test_a_loss_that_makes_its_own_gradients():
    """`value_and_grad` of an object stands in for `info_nce_value_and_grad`, a learned temperature's gradient included."""

    class Doubled:
        def value_and_grad(self, query, target, *, grad_dtype, **options) -> InfoNCEResult:
            result = info_nce_value_and_grad(query, target, grad_dtype=grad_dtype, **options)
            return replace(result, d_query=2 * result.d_query, d_target=2 * result.d_target, d_temperature=3 * result.d_temperature)

    encoder = Encoder(0.0)
    query, target = batch(6, 1), batch(6, 2)
    found = []
    for loss in (None, Doubled()):
        encoder.zero_grad()
        temperature = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        GradCache(encoder, loss, chunk_size=2).step(
            query, target, lengths=([len(x) for x in query], [len(x) for x in target]), temperature=temperature, normalize=True
        )
        found.append((gradients(encoder), temperature.grad))
    assert_same(found[1][0], {name: 2 * value for name, value in found[0][0].items()})
    torch.testing.assert_close(found[1][1], 3 * found[0][1])
