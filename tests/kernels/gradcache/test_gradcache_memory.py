"""A chunk that runs out of memory: the step is undone, what the loss learned included, and done again with half the budget."""

import logging

import pytest
import torch
from torch import nn

from contrastive_kernels import GradCache, InfoNCELoss, info_nce, sigmoid_loss
from contrastive_kernels.gradcache.gradient_sync import GradientSync
from contrastive_kernels.gradcache.out_of_memory import OutOfMemory

ROWS = 8


class Short(nn.Module):
    """A layer with dropout that has no room for more than `limit` rows, with a graph or without."""

    def __init__(self, with_graph):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.4)).double()
        self.with_graph, self.limit, self.failures = with_graph, ROWS, 0

    def forward(self, inputs, rows):
        hidden = self.layer(inputs[rows])
        if len(rows) > self.limit and torch.is_grad_enabled() == self.with_graph:
            self.failures += 1
            raise torch.OutOfMemoryError("no room")
        return hidden


def parts(kind):
    """(loss, options made anew for each step, learned leaves)."""
    if kind == "temperature":
        leaf = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))
        return None, lambda: {"temperature": leaf.exp(), "normalize": True}, [leaf]
    if kind == "module":
        loss = InfoNCELoss(temperature=0.1, learnable_temperature=True, normalize=True).double()
        return loss, dict, [loss.log_temperature]
    if kind == "closure":
        leaf = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))
        return lambda q, t: info_nce(q, t, temperature=leaf.exp(), normalize=True), dict, [leaf]
    scale, bias = nn.Parameter(torch.tensor(1.5, dtype=torch.float64)), nn.Parameter(torch.tensor(-3.0, dtype=torch.float64))
    return sigmoid_loss, lambda: {"scale": scale.exp(), "bias": bias * 1.0, "normalize": True}, [scale, bias]


@pytest.mark.parametrize("with_graph", [False, True], ids=["first pass", "second pass"])
@pytest.mark.parametrize("kind", ["temperature", "module", "closure", "sigmoid"])
def test_what_the_loss_learns_gets_its_gradient_once(kind, with_graph, caplog):
    torch.manual_seed(0)
    model, sides = Short(with_graph), torch.randn(2, ROWS, 6, dtype=torch.float64)
    loss, options, learned = parts(kind)

    def step(size):
        model.zero_grad(set_to_none=True)
        for leaf in learned:
            leaf.grad = torch.ones_like(leaf)  # of an earlier step: they are added to, and none is lost
        torch.manual_seed(4)
        cache = GradCache(model, loss, chunk_size=size, module=model)
        result = cache.step(*sides, lengths=([1] * ROWS, [1] * ROWS), **options())
        return [result.loss, model.layer[0].weight.grad.clone(), *(leaf.grad.clone() for leaf in learned)]

    expected = step(2)
    assert all((grad - 1).abs().max() > 1e-6 for grad in expected[2:])
    model.limit = 2
    with caplog.at_level(logging.WARNING, logger="contrastive_kernels.gradcache.grad_cache"):
        found = step(4)
    assert model.failures == 1 and "chunk_size is 2 instead of 4" in caplog.text
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_without_a_module_the_first_error_passes_through():
    model = Short(False)
    model.limit = 2
    with pytest.raises(torch.OutOfMemoryError, match="^no room$"):
        GradCache(model, chunk_size=4).step(*torch.randn(2, ROWS, 6, dtype=torch.float64), lengths=([1] * ROWS, [1] * ROWS))


def test_a_step_that_cannot_be_undone_leaves_the_losses_leaves_alone():
    model, leaf = Short(True), nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))
    model.limit = 2
    with pytest.raises(torch.OutOfMemoryError):
        GradCache(model, chunk_size=4).step(
            *torch.randn(2, ROWS, 6, dtype=torch.float64), lengths=([1] * ROWS, [1] * ROWS), temperature=leaf.exp(), normalize=True
        )
    assert leaf.grad is None


def test_a_loss_with_statistics_hands_them_on():
    torch.manual_seed(0)
    layer, sides = nn.Linear(6, 5).double(), torch.randn(2, ROWS, 6, dtype=torch.float64)
    results = [
        GradCache(lambda x, rows: layer(x[rows]), loss, chunk_size=3).step(
            *sides, lengths=([1] * ROWS, [1] * ROWS), normalize=True, return_stats=True, temperature=0.1
        )
        for loss in (None, InfoNCELoss())
    ]
    for name, value in vars(results[0].stats).items():
        torch.testing.assert_close(getattr(results[1].stats, name), value)


def test_a_sharded_rank_that_cannot_go_on_says_what_to_do(monkeypatch):
    """Without `reset_iter_state` (older torch) a rank that stopped cannot answer the others; it must not swallow the error."""
    sync = GradientSync(nn.Linear(2, 2))
    monkeypatch.setattr(GradientSync, "is_fsdp", True)
    memory = OutOfMemory(sync)
    memory.recovery.possible = False
    memory.begin()

    def chunk():
        raise torch.OutOfMemoryError("no room")

    for is_trial in (False, True):
        with pytest.raises(torch.OutOfMemoryError, match="(?s)no room.*collective pass.*lower chunk_tokens.*train plan"):
            memory.run(chunk, lambda: pytest.fail("no stand-in"), is_trial=is_trial)
