"""`retain="auto"`: how many graphs are kept, what is counted, and that it changes no gradient."""

import contextlib

import pytest
import torch
from torch import nn

from contrastive_kernels import GradCache
from contrastive_kernels.core.workspace import free_cuda_bytes
from contrastive_kernels.gradcache.observer import CHUNK_BACKWARD
from contrastive_kernels.gradcache.retention import GraphSize, counting_saved, fitting_chunks
from tests.kernels.helpers.gradcache_encoder import Encoder, assert_same, batch, gradients

MIB = 2**20


def step(cache, encoder, query, target, seed=9):
    encoder.zero_grad()
    torch.manual_seed(seed)
    cache.step(query, target, lengths=([len(x) for x in query], [len(x) for x in target]), normalize=True)
    return gradients(encoder)


def test_auto_measures_in_the_first_step_alone_and_changes_nothing():
    query, target = batch(8, 1), batch(8, 2)
    encoder, calls = Encoder(), []

    def counted(inputs, rows):
        calls.append(rows)
        return encoder(inputs, rows)

    def steps(**options):
        cache = GradCache(counted, chunk_size=2, **options)
        found = []
        for seed in (9, 10):
            calls.clear()
            found.append((step(cache, encoder, query, target, seed), len(calls)))
        return found

    plain = steps(retain=0)
    few, all_ = steps(retain="auto", retain_mib=1e-3), steps(retain="auto", retain_mib=64.0)
    for k in range(2):
        assert_same(few[k][0], plain[k][0])
        assert_same(all_[k][0], plain[k][0])
    assert [calls for _, calls in plain] == [16, 16]  # 8 chunks, twice
    assert [calls for _, calls in all_] == [12, 8]  # 8 chunks once, and first the four that were measured
    assert few[0][1] == few[1][1] + 4 and 8 < few[1][1] < 16


class Wide(nn.Module):
    """Weights of 2 MiB each, four rows: what a graph holds besides the weights is small."""

    width = 512

    def __init__(self, frozen):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Sequential(nn.Linear(self.width, self.width), nn.Tanh()) for _ in range(3)]).double()
        self.layers[1].requires_grad_(not frozen)

    def forward(self, inputs, rows):
        return self.layers(torch.stack([inputs[row] for row in rows]))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("fitting", [0, 3, 7])
def test_auto_counts_no_weights(frozen, fitting):
    model = Wide(frozen)
    sides = torch.randn(2, 8, model.width, dtype=torch.float64)
    kept = []
    # A chunk of two rows saves its input and each tanh's output; those are inputs of the next layer too.
    graph = 2 * model.width * 8 * 4

    def encode(inputs, rows):
        kept.append(torch.is_grad_enabled())
        return model(inputs, rows)

    cache = GradCache(encode, chunk_size=2, retain="auto", retain_mib=(fitting + 0.5) * graph / MIB)
    options = {"lengths": ([1] * 8, [1] * 8), "normalize": True}
    cache.step(*sides, **options)
    kept.clear()
    cache.step(*sides, **options)
    assert sum(kept[:8]) == fitting, "of the eight chunks of the first pass"
    assert len(kept) == 16 - fitting


def test_counted_bytes_are_those_of_the_storages_a_graph_holds():
    layer = nn.Linear(32, 16)
    x = torch.randn(5, 32)
    with counting_saved() as saved:
        y = layer(x).exp()
        z = (y * x[:, :16]).sum()  # saves y again, and a view of x
    assert z.requires_grad and saved.bytes == 4 * (5 * 32 + 5 * 16)


def test_graphs_with_a_part_that_does_not_grow():
    """Autocast copies weights into every graph: a short chunk holds as many of those bytes as a long one."""
    size = GraphSize.fit([(100, 1000.0 + 700), (10, 1000.0 + 70)])
    assert (size.constant, size.per_token) == (1000.0, 7.0)
    assert fitting_chunks([size.of(t) for t in (100, 10, 10)], 2200 / MIB, GradCache(lambda: 0, chunk_size=1).sync) == {1, 2}
    dear = GraphSize.fit([(100, 5000.0), (90, 900.0)])  # pictures and text: no line through them
    assert (dear.constant, dear.per_token) == (0.0, 50.0)
    assert GraphSize.fit([(8, float("inf")), (2, 4.0)]).of(1) == float("inf")


def test_larger_graphs_in_a_later_step_lower_the_number_kept():
    torch.manual_seed(0)
    encoder, repeats = nn.Linear(4, 3).double(), {"count": 1}

    def encode(inputs, rows):
        hidden = encoder(inputs[rows])
        for _ in range(repeats["count"]):
            hidden = hidden.tanh()
        return hidden

    sides = torch.randn(2, 8, 4, dtype=torch.float64)
    graph = 2 * 8 * (4 + 3)  # of two rows
    kept = []

    def observer(phase):
        if phase.name == CHUNK_BACKWARD:
            kept.append(phase.retains_graph)
        return contextlib.nullcontext()

    cache = GradCache(encode, chunk_size=2, retain="auto", retain_mib=4.5 * graph / MIB, observer=observer)

    def run():
        kept.clear()
        cache.step(*sides, lengths=([1] * 8, [1] * 8), normalize=True)
        return sum(kept)

    assert run() == 4
    repeats["count"] = 8  # 2 * 8 * (4 + 24) bytes: four times as much
    assert [run(), run()] == [4, 1]


def test_auto_measures_again_once_the_budget_was_halved():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3).double()
    sides = torch.randn(2, 8, 4, dtype=torch.float64)
    measured, fails = [], {"at": 4}

    def encode(inputs, rows):
        if torch.is_grad_enabled():
            measured.append(len(rows))
        elif len(rows) == fails["at"]:
            raise torch.OutOfMemoryError("no room")
        return layer(inputs[rows])

    cache = GradCache(encode, chunk_size=4, module=layer, retain="auto", retain_mib=1e-9)
    cache.step(*sides, lengths=([1] * 8, [1] * 8), normalize=True)
    assert measured[:8] == [4, 4, 4, 4, 2, 2, 2, 2], "four before, four after; the rest is the second pass"


def test_a_graph_that_does_not_fit_alone_is_not_kept():
    layer, fails = nn.Linear(4, 3).double(), {"now": True}

    def encode(inputs, rows):
        if torch.is_grad_enabled() and fails["now"]:
            fails["now"] = len(calls) < 3
            calls.append(rows)
            raise torch.OutOfMemoryError("no room")
        return layer(inputs[rows])

    calls = []
    sides = torch.randn(2, 4, 4, dtype=torch.float64)
    cache = GradCache(encode, chunk_size=2, retain="auto", retain_mib=64.0)  # no module: such a step could not be undone
    cache.step(*sides, lengths=([1] * 4, [1] * 4), normalize=True)
    assert len(calls) == 4 and layer.weight.grad is not None


def test_free_memory_is_what_the_device_and_torchs_allocator_have(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 80)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 30)
    assert free_cuda_bytes() == 60
    sync = GradCache(lambda: 0, chunk_size=1).sync
    assert fitting_chunks([16.0] * 9, None, sync) == {6, 7, 8}  # 80 % of 60 bytes
