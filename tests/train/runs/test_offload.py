"""Activation offload: what a backward pass needs leaves the device, weights stay, gradients are the same."""

import contextlib
import functools
from collections import Counter

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import train.step
from contrastive_kernels.gradcache.observer import CHUNK_BACKWARD
from contrastive_kernels.gradcache.retention import counting_saved
from tests.helpers.tiny_recipe import first_batch, gradients, write_recipe
from train.build import build_model
from train.parallel.offload import offloaded
from train.recipe.schema import load_recipe
from train.step import ContrastiveStep

everything = functools.partial(offloaded, least_bytes=0, move_cpu=True)


class Layers(torch.nn.Module):
    """Two layers; `held` are the storages of what the second layer reads, by what made it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(6, 32).double(), torch.nn.Linear(32, 4).double()

    def forward(self, x):
        hidden = self.first(x).tanh()
        self.held = StorageWeakRef(hidden.untyped_storage())
        return self.second(hidden).exp()


@pytest.mark.parametrize("least_bytes,moved", [(0, True), (5 * 32 * 8, True), (5 * 32 * 8 + 1, False)])
def test_what_is_saved_moves_and_its_storage_goes(least_bytes, moved):
    torch.manual_seed(0)
    layers, x = Layers(), torch.randn(5, 6, dtype=torch.float64)
    layers(x).sum().backward()
    expected = gradients(layers)
    layers.zero_grad(set_to_none=True)
    with offloaded(True, least_bytes=least_bytes, move_cpu=True):
        out = layers(x)
    assert layers.held.expired() == moved, "the activation lives on only where it was not moved"
    out.sum().backward()
    for name, gradient in expected.items():
        assert torch.equal(gradients(layers)[name], gradient), name


def test_without_it_the_graph_holds_the_activation():
    layers, x = Layers(), torch.randn(5, 6, dtype=torch.float64)
    for context in (offloaded(False, move_cpu=True), offloaded(True, least_bytes=0)):  # on a CPU nothing moves
        with context:
            out = layers(x)
        assert not layers.held.expired()
        del out


def test_weights_and_their_views_stay_and_what_moves_is_counted():
    layers, x = Layers(), torch.randn(5, 6, dtype=torch.float64)
    layers.second.weight.requires_grad_(False)
    weights = {p.untyped_storage().data_ptr() for p in layers.parameters()}
    with counting_saved() as plain:
        out = layers(x)
    with counting_saved() as moved, everything(True):
        again = layers(x)
    assert plain.bytes == moved.bytes == 8 * 5 * (6 + 32 + 4), "the input and what tanh and exp gave, moved or not"
    assert not weights & {*plain.storages, *moved.storages}
    seen = Counter()
    node = again.grad_fn.next_functions[0][0]  # of the second layer: it saves a view of its frozen weight
    seen.update(t.untyped_storage().data_ptr() in weights for t in (node._saved_mat2,))
    assert seen[True] == 1, "the weight was not copied"
    del out


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offload")
    write_recipe(folder)
    return folder


def step_gradients(root, **changes):
    recipe = load_recipe(write_recipe(root, **({"dtype": "float64", "seed": 3, "chunk_tokens": 120} | changes)))
    model = build_model(recipe).train()
    kept = []

    def observer(phase):
        if phase.name == CHUNK_BACKWARD:
            kept.append(phase.retains_graph)
        return contextlib.nullcontext()

    step = ContrastiveStep(recipe, model, model, device=torch.device("cpu"), observer=observer)
    step(first_batch(recipe, model))
    return gradients(model), sum(kept)


@pytest.mark.parametrize("changes", [{}, {"retain": 2}, {"gradient_checkpointing": True}], ids=str)
def test_a_step_with_offload_has_the_gradients_of_one_without(root, monkeypatch, changes):
    expected, _ = step_gradients(root, **changes)
    copies = []

    def watched(enabled):
        assert enabled == torch.is_grad_enabled()
        copies.append(enabled)
        return everything(enabled)

    monkeypatch.setattr(train.step, "offloaded", watched)
    got, _ = step_gradients(root, offload_activations=True, **changes)
    assert any(copies)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


def test_auto_keeps_as_many_graphs_with_offload_as_without(root, monkeypatch):
    """Hooks that move what is saved hide it from the count; then everything would be kept, in host memory without bound."""
    bound = {"retain": "auto", "retain_mib": 2.5}
    expected, kept = step_gradients(root, **bound)
    monkeypatch.setattr(train.step, "offloaded", everything)
    got, moved = step_gradients(root, offload_activations=True, **bound)
    everything_fits = step_gradients(root, retain="all")[1]
    assert 0 < kept < everything_fits
    assert abs(moved - kept) <= 1, "views that share a storage are copied one by one"
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-10, atol=1e-12, msg=name)
