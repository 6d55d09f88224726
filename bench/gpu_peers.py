"""Value and gradients of InfoNCE by everyone who runs on a GPU: `make(query, target, temperature) -> callable`.

A callable runs forward and backward once and returns (loss, d_query, d_target). A peer that is not installed, or that refuses the shape,
raises, and the caller reports it with the reason; nothing here hides one. ONE has one direction, BOTH the mean of both, SIGMOID the
sigmoid loss, SEARCH the ten best targets of every query (no gradients).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.autograd import labels as _labels
from bench.autograd import step as _step


def ours(**options):
    def make(query, target, temperature):
        from contrastive_kernels import info_nce_value_and_grad

        def run():
            out = info_nce_value_and_grad(query, target, **{"temperature": temperature, "grad_dtype": torch.float32, **options})
            return out.loss, out.d_query, out.d_target

        return run

    return make


def ours_autograd(query, target, temperature):
    from contrastive_kernels import info_nce

    return _step(lambda q, t: info_nce(q, t, temperature=temperature, backend="triton"), query, target)


def eager(query, target, temperature):
    labels = _labels(query)
    return _step(lambda q, t: F.cross_entropy((q @ t.T).float() / temperature, labels), query, target)


def compiled(query, target, temperature):
    labels = _labels(query)
    return _step(torch.compile(lambda q, t: F.cross_entropy((q @ t.T).float() / temperature, labels)), query, target)


def linear_cross_entropy(query, target, temperature):
    options, labels = torch.nn.LinearCrossEntropyOptions(), _labels(query)
    return _step(lambda q, t: F.linear_cross_entropy(q / temperature, t, labels, options=options), query, target)


def sentence_transformers(query, target, temperature):
    from bench.loss_arms import sentence_transformers as make

    return make(query, target, temperature)


def inf_cl(query, target, temperature):
    from inf_cl import cal_flash_loss

    labels, scale = _labels(query), torch.tensor(1 / temperature, device=query.device)
    return _step(lambda q, t: cal_flash_loss(q, t, labels, scale).mean(), query, target)


def cut_cross_entropy(query, target, temperature):
    """Without its gradient filter, which drops mass: `cce_exact`, as releases before it have a name for it spell it."""
    from cut_cross_entropy import linear_cross_entropy as cce

    labels = _labels(query)

    def loss_of(q, t):
        try:
            return cce(q / temperature, t, labels, impl="cce_exact")
        except NotImplementedError:
            return cce(q / temperature, t, labels, impl="cce", filter_eps=None)

    return _step(loss_of, query, target)


def liger(query, target, temperature):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss, labels = LigerFusedLinearCrossEntropyLoss(), _labels(query)
    return _step(lambda q, t: loss(t, q / temperature, labels), query, target)


def memeff(query, target, temperature):
    """`stable=False`: the other setting rescales the gradient with the batch size."""
    import memeff

    loss = memeff.MemoryEfficientCLIPLoss(temperature=temperature, normalized_inputs=True, stable=False)
    return _step(loss, query, target)


def eager_symmetric(query, target, temperature):
    labels = _labels(query)

    def loss_of(q, t):
        logits = (q @ t.T).float() / temperature
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    return _step(loss_of, query, target)


def three_gemms(query, target, temperature):
    """The limit: the products alone, into memory that is there already, no loss."""
    logits, d_query, d_target = torch.empty(len(query), len(target), dtype=query.dtype, device=query.device), torch.empty_like(query), torch.empty_like(target)

    def run():
        torch.mm(query, target.T, out=logits)
        torch.mm(logits, target, out=d_query)
        torch.mm(logits.T, query, out=d_target)
        return None

    return run


SCALE, BIAS = 10.0, -10.0  # where SigLIP starts


def sigmoid_ours(query, target, temperature):
    from contrastive_kernels import sigmoid_loss

    return _step(lambda q, t: sigmoid_loss(q, t, scale=SCALE, bias=BIAS), query, target)


def sigmoid_eager(query, target, temperature):
    def loss_of(q, t):
        logits = (q @ t.T).float() * SCALE + BIAS
        return F.softplus(logits).sum(1).mean() - logits.diagonal().mean()

    return _step(loss_of, query, target)


def siglip_kernel(query, target, temperature):
    from siglip_kernel import fused_siglip_loss

    log_scale, bias = torch.tensor(SCALE, device=query.device).log(), torch.tensor(BIAS, device=query.device)
    return _step(lambda q, t: fused_siglip_loss(q, t, log_scale, bias), query, target)


def _search(backend):
    def make(query, target, temperature):
        from contrastive_kernels import topk_similarity

        def run():
            topk_similarity(query, target, 10, backend=backend)

        return run

    return make


def search_dense(query, target, temperature):
    def run():
        (query @ target.T).topk(10, dim=1)

    return run


LIMIT = "three bare GEMMs (limit)"
# peers come last: a kernel of theirs that dies takes the process's device with it
ONE = {
    LIMIT: three_gemms, "contrastive_kernels triton": ours(backend="triton"), "contrastive_kernels triton, autograd": ours_autograd,
    "contrastive_kernels torch": ours(backend="torch"), "eager": eager, "torch.compile": compiled, "F.linear_cross_entropy": linear_cross_entropy,
    "sentence-transformers cached": sentence_transformers, "cut-cross-entropy exact": cut_cross_entropy, "Liger FLCE": liger, "inf-cl": inf_cl,
}
BOTH = {
    LIMIT: three_gemms, "contrastive_kernels triton, symmetric": ours(backend="triton", symmetric=True),
    "contrastive_kernels triton, symmetric, normalize": ours(backend="triton", symmetric=True, normalize=True),
    "eager, symmetric": eager_symmetric, "memeff CLIP": memeff,
}
SIGMOID = {LIMIT: three_gemms, "contrastive_kernels sigmoid": sigmoid_ours, "eager sigmoid": sigmoid_eager, "siglip-kernel": siglip_kernel}
SEARCH = {"top-10, contrastive_kernels triton": _search("triton"), "top-10, contrastive_kernels torch": _search("torch"), "top-10, dense product and topk": search_dense}
