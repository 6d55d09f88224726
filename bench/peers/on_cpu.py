"""Value and gradients of one-directional InfoNCE by everyone who runs on a CPU: `make(query, target, temperature) -> callable`.

Each callable returns (loss, d_query, d_target) of embeddings that are normalised already. A peer that is not installed raises
ImportError when it is made; nothing here hides one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.peers.autograd import labels as _labels
from bench.peers.autograd import step as _autograd

NORMALISING = ("sentence-transformers",)  # whose gradients go through a normalisation of their own


def ours(query, target, temperature):
    from contrastive_kernels import info_nce_value_and_grad

    def run():
        out = info_nce_value_and_grad(query, target, temperature=temperature)
        return out.loss, out.d_query, out.d_target

    return run


def naive(query, target, temperature):
    labels = _labels(query)
    return _autograd(lambda q, t: F.cross_entropy(q @ t.T / temperature, labels), query, target)


def compiled(query, target, temperature):
    labels = _labels(query)
    return _autograd(torch.compile(lambda q, t: F.cross_entropy(q @ t.T / temperature, labels)), query, target)


def torch_linear_cross_entropy():
    """torch's own `F.linear_cross_entropy`, chunked by its default options: (input, weight, labels) -> loss.

    Raises: ImportError where torch is older than 2.13, which brought it.
    """
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"F.linear_cross_entropy needs torch 2.13 or newer, got torch {torch.__version__}")
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x, weight, labels: F.linear_cross_entropy(x, weight, labels, options=options)


def linear_cross_entropy(query, target, temperature):
    labels, loss = _labels(query), torch_linear_cross_entropy()
    return _autograd(lambda q, t: loss(q / temperature, t, labels), query, target)


def sentence_transformers(query, target, temperature, mini_batch_size=32):
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    loss = CachedMultipleNegativesRankingLoss(
        torch.nn.Sequential(torch.nn.Identity()), scale=1 / temperature, mini_batch_size=mini_batch_size
    )

    def run():
        q, t = query.detach().requires_grad_(), target.detach().requires_grad_()
        value = loss.calculate_loss([[q], [t]], with_backward=True)
        return value, q.grad, t.grad

    return run


def three_gemms(query, target, temperature):
    """The limit: the products alone, by torch.mm, into memory that is there already. No loss."""
    logits = torch.empty(len(query), len(target), dtype=query.dtype)
    d_query, d_target = torch.empty_like(query), torch.empty_like(target)

    def run():
        torch.mm(query, target.T, out=logits)
        torch.mm(logits, target, out=d_query)
        torch.mm(logits.T, query, out=d_target)
        return logits[0, 0], d_query, d_target

    return run


def three_gemms_onednn(query, target, temperature):
    """The same products by oneDNN, operands laid out as it likes them: the limit where torch.mm is slow."""
    from contrastive_kernels.eager.gemm import prefers_onednn

    if not prefers_onednn(query.dtype, query.device):
        raise ImportError("torch.mm is as fast as oneDNN on this processor")

    def product(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")

    query_t, target_t = query.T.contiguous(), target.T.contiguous()

    def run():
        logits = product(query, target)
        # what a product costs does not hang on its numbers: N = M here, and the matrix stands in for its transpose
        return logits[0, 0], product(logits, target_t), product(logits, query_t)

    return run


ALL = {
    "ours": ours,
    "naive": naive,
    "torch.compile": compiled,
    "F.linear_cross_entropy": linear_cross_entropy,
    "sentence-transformers": sentence_transformers,
    "three torch.mm": three_gemms,
    "three oneDNN": three_gemms_onednn,
}
