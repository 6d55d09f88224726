"""What every peer's timing shares: one forward and backward as a callable, and the labels of a square batch."""

from __future__ import annotations

import torch


def step(loss_of, query, target):
    """A callable that runs `loss_of` and its backward once and returns (loss, d_query, d_target)."""

    def run():
        q, t = query.detach().requires_grad_(), target.detach().requires_grad_()
        loss = loss_of(q, t)
        loss.backward()
        return loss.detach(), q.grad, t.grad

    return run


def labels(query):
    """Row i's positive is target i."""
    return torch.arange(len(query), device=query.device)
