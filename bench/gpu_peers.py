"""Value and gradients of InfoNCE by everyone who runs on a GPU, in one shape: `make(query, target, temperature) -> callable`.

Each callable runs forward and backward once and returns the loss. A peer that is not installed, or that refuses the shape, is
reported by the caller with the reason; nothing here hides one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def _leaves(query, target):
    return query.detach().clone().requires_grad_(), target.detach().clone().requires_grad_()


def _step(loss_of, query, target):
    q, t = _leaves(query, target)

    def run():
        q.grad = t.grad = None
        loss = loss_of(q, t)
        loss.backward()
        return loss, q.grad, t.grad

    return run


def _labels(query):
    return torch.arange(len(query), device=query.device)


def ours(query, target, temperature):
    from contrastive_kernels import info_nce

    return _step(lambda q, t: info_nce(q, t, temperature=temperature, backend="triton"), query, target)


def ours_torch(query, target, temperature):
    from contrastive_kernels import info_nce

    return _step(lambda q, t: info_nce(q, t, temperature=temperature, backend="torch"), query, target)


def eager(query, target, temperature):
    return _step(lambda q, t: F.cross_entropy((q @ t.T).float() / temperature, _labels(query)), query, target)


def compiled(query, target, temperature):
    labels = _labels(query)
    return _step(torch.compile(lambda q, t: F.cross_entropy((q @ t.T).float() / temperature, labels)), query, target)


def linear_cross_entropy(query, target, temperature):
    options = torch.nn.functional.LinearCrossEntropyOptions()
    labels = _labels(query)
    return _step(lambda q, t: F.linear_cross_entropy(q / temperature, t, labels, options=options), query, target)


def inf_cl(query, target, temperature):
    from inf_cl import cal_flash_loss

    scale = torch.tensor(1 / temperature, device=query.device)
    return _step(lambda q, t: cal_flash_loss(q, t, _labels(query), scale), query, target)


def memeff(query, target, temperature):
    import memeff

    return _step(lambda q, t: memeff.infonce_loss(q, t, temperature=temperature), query, target)


def cut_cross_entropy(query, target, temperature):
    from cut_cross_entropy import linear_cross_entropy as cce

    return _step(lambda q, t: cce(q / temperature, t, _labels(query), impl="cce_exact"), query, target)


def liger(query, target, temperature):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return _step(lambda q, t: loss(t, q / temperature, _labels(query)), query, target)


def three_gemms(query, target, temperature):
    """The limit: the products alone, into bfloat16, no loss."""

    def run():
        s = query @ target.T
        return s[0, 0], s @ target, s.T @ query

    return run


ALL = {
    "contrastive_kernels triton": ours, "contrastive_kernels torch": ours_torch, "eager": eager, "torch.compile": compiled,
    "F.linear_cross_entropy": linear_cross_entropy, "inf-cl": inf_cl, "memeff": memeff, "cut-cross-entropy cce_exact": cut_cross_entropy,
    "Liger FLCE": liger, "three bare GEMMs (limit)": three_gemms,
}
