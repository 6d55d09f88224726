"""A bare PyTorch loop: two lines of the loss become one, and the N x M matrix is gone.

python examples/pytorch_loop.py
"""

import torch
import torch.nn.functional as F

from contrastive_kernels import info_nce

TEMPERATURE = 0.05


def loss_before(query, target):
    logits = F.normalize(query, dim=-1) @ F.normalize(target, dim=-1).T / TEMPERATURE
    return F.cross_entropy(logits, torch.arange(len(query), device=query.device))


def loss_after(query, target):
    return info_nce(query, target, temperature=TEMPERATURE, normalize=True)


def train(loss_of, steps=3):
    """Losses of a few steps, and the gradients of the last."""
    torch.manual_seed(0)
    encoder = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 16))
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        query = torch.randn(64, 32)
        target = query + 0.5 * torch.randn(64, 32)
        optimizer.zero_grad()
        loss = loss_of(encoder(query), encoder(target))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"loss": torch.stack(losses), **{name: p.grad for name, p in encoder.named_parameters()}}


def before():
    return train(loss_before)


def after():
    return train(loss_after)


if __name__ == "__main__":
    for name, value in after().items():
        print(f"{name:<12} largest difference {float((value - before()[name]).abs().max()):.1e} of {float(value.abs().max()):.1e}")
