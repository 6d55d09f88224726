"""A small encoder for GradCache, and gradients to compare."""

import torch
from torch import nn


class Encoder(nn.Module):
    """Mean of embedded tokens through a frozen and a trained layer, with dropout; rows of different lengths."""

    def __init__(self, dropout=0.3):
        super().__init__()
        self.embed = nn.Embedding(50, 12)
        self.tower = nn.Sequential(nn.Linear(12, 12), nn.Tanh())
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(12, 8), nn.Dropout(dropout))
        self.tower_runs = 0
        self.double()

    def features(self, inputs, rows):
        self.tower_runs += 1
        return self.tower(torch.stack([self.embed(inputs[row]).mean(0) for row in rows]))

    def forward(self, inputs, rows, features=None):
        return self.head(self.features(inputs, rows) if features is None else features)


def batch(count, seed):
    generator = torch.Generator().manual_seed(seed)
    # lengths 1 to 9: chunks under a budget of 12 hold one to many rows
    return [torch.randint(50, (1 + (7 * i + seed) % 9,), generator=generator) for i in range(count)]


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same(ours, truth):
    assert ours.keys() == truth.keys()
    for name in truth:
        torch.testing.assert_close(ours[name], truth[name], rtol=1e-10, atol=1e-10, msg=name)
