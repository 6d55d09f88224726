"""What peers' GPU kernels round, emulated on a CPU: (query, target, temperature) -> loss and gradients in the inputs' dtype.

Each follows what its project documents of its products and of what is stored between them; the order of sums inside a tile is not
emulated. cut-cross-entropy and Liger are losses of a linear layer: queries are divided by the temperature before they are handed over.
"""

from __future__ import annotations

import torch


def _tf32(x: torch.Tensor) -> torch.Tensor:
    """float32 with the ten bits of mantissa that TF32 tensor cores read, to nearest."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def _softmax_minus_one(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean loss, and its gradient with respect to the logits, as `softmax - 1` at the positive."""
    lse, positive = logits.logsumexp(1), logits.diagonal()
    gradient = (logits - lse[:, None]).exp()
    gradient.diagonal().sub_(1)
    return (lse - positive).mean(), gradient / len(logits)


def inf_cl(query, target, temperature):
    """Inf-CL: TF32 products, running sums in float32."""
    q, t = _tf32(query.float()), _tf32(target.float())
    loss, gradient = _softmax_minus_one(q @ t.T / temperature)
    gradient = _tf32(gradient / temperature)
    return loss, (gradient @ t).to(query.dtype), (gradient.T @ q).to(target.dtype)


def _linear(query, target, temperature, rounds_logits: bool):
    dtype = query.dtype
    scaled = query / temperature
    logits = (scaled @ target.T).float() if rounds_logits else scaled.float() @ target.float().T
    loss, gradient = _softmax_minus_one(logits)
    gradient = gradient.to(dtype)
    return loss, (gradient @ target) / temperature, gradient.T @ scaled


def cce_exact(query, target, temperature):
    """cut-cross-entropy without its filter: logits stay in float32, their gradient is rounded to the inputs' dtype."""
    return _linear(query, target, temperature, rounds_logits=False)


def liger(query, target, temperature):
    """Liger's fused linear cross entropy: logits and their gradient are stored in the inputs' dtype."""
    return _linear(query, target, temperature, rounds_logits=True)
