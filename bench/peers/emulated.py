"""What peers' GPU kernels round, emulated on a CPU: (query, target, temperature) -> loss and gradients in the inputs' dtype.

Read from inf_cl/flash.py (DAMO-NLP-SG/Inf-CLIP), cce_backward.py (apple/ml-cross-entropy) and fused_linear_cross_entropy.py
(linkedin/Liger-Kernel): the types of their products and of what lies between them, not the order of sums inside a tile. All three
are handed queries that are divided by the temperature.
"""

from __future__ import annotations

import torch


def _tf32(x: torch.Tensor) -> torch.Tensor:
    """float32 with the ten bits of mantissa that TF32 tensor cores read, to nearest."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def inf_cl(query, target, temperature):
    """Inf-CL: casts to float32, TF32 products in the sum over candidates, the positive and its gradient apart in float32."""
    n, q, t = len(query), query.float() / temperature, target.float()
    low_q, low_t = _tf32(q), _tf32(t)
    logits = low_q @ low_t.T
    lse = logits.logsumexp(1)
    p = _tf32((logits - lse[:, None]).exp() / n)
    loss = (lse - torch.linalg.vecdot(q, t)).mean()
    return loss, ((p @ low_t - t / n) / temperature).to(query.dtype), (p.T @ low_q - q / n).to(target.dtype)


def _linear(query, target, temperature, logits_dtype: torch.dtype):
    """A linear layer's cross entropy: softmax - 1 in float32, rounded to the inputs' dtype for the two products."""
    scaled = query / temperature
    logits = (scaled.to(logits_dtype) @ target.to(logits_dtype).T).float()
    lse = logits.logsumexp(1)
    gradient = (logits - lse[:, None]).exp()
    gradient.diagonal().sub_(1)
    gradient = (gradient / len(query)).to(query.dtype)
    return (lse - logits.diagonal()).mean(), (gradient @ target) / temperature, gradient.T @ scaled


def cce_exact(query, target, temperature):
    """cut-cross-entropy without its filter, which takes 16-bit inputs alone: logits stay in float32."""
    return _linear(query, target, temperature, torch.float32)


def liger(query, target, temperature):
    """Liger's fused linear cross entropy: logits are stored in the inputs' dtype."""
    return _linear(query, target, temperature, query.dtype)
