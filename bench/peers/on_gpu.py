"""Value and gradients of InfoNCE by everyone who runs on a GPU: `make(query, target, temperature) -> callable`.

A callable runs forward and backward once and returns (loss, d_query, d_target). A peer that is not installed, or that refuses the shape,
raises, and the caller reports it with the reason; nothing here hides one. A group of them shares a definition, which `truth` computes in
float64: "one" direction, the mean of "both", the "sigmoid" loss; nothing but time is compared of "search", the ten best targets of
every query, and of a "limit".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.peers.autograd import labels as _labels
from bench.peers.autograd import step as _step
from bench.peers.on_cpu import torch_linear_cross_entropy


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


def graphed(make):
    """`make`'s callable as one CUDA graph, replayed."""

    def made(query, target, temperature):
        run = make(query, target, temperature)
        graph, results = captured(run)

        def replay():
            graph.replay()
            return results

        return replay

    return made


def captured(run):
    """(CUDA graph of one call, what the call returned: tensors that every replay fills).

    The call is first warmed up on a stream of its own, as torch asks.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


def eager(query, target, temperature):
    labels = _labels(query)
    return _step(lambda q, t: F.cross_entropy((q @ t.T).float() / temperature, labels), query, target)


def compiled(query, target, temperature):
    labels = _labels(query)
    return _step(torch.compile(lambda q, t: F.cross_entropy((q @ t.T).float() / temperature, labels)), query, target)


def linear_cross_entropy(query, target, temperature):
    loss, labels = torch_linear_cross_entropy(), _labels(query)
    return _step(lambda q, t: loss(q / temperature, t, labels), query, target)


def sentence_transformers(query, target, temperature):
    from bench.peers.on_cpu import sentence_transformers as make

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
    logits = torch.empty(len(query), len(target), dtype=query.dtype, device=query.device)
    d_query, d_target = torch.empty_like(query), torch.empty_like(target)

    def run():
        torch.mm(query, target.T, out=logits)
        torch.mm(logits, target, out=d_query)
        torch.mm(logits.T, query, out=d_target)
        return None

    return run


def three_gemms_float32(query, target, temperature):
    """The same with gradients in float32, d_target added to what is there: what `contrastive_kernels` asks of the library."""
    from contrastive_kernels.triton.products import add_matmul, matmul

    logits = torch.empty(len(query), len(target), dtype=query.dtype, device=query.device)
    d_target = torch.zeros(target.shape, device=query.device)

    def run():
        torch.mm(query, target.T, out=logits)
        matmul(logits, target, torch.float32)
        add_matmul(d_target, logits.T, query)
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


def truth(query, target, temperature, kind: str):
    """Loss and gradients in float64, the diagonal being the positives. kind: "one" direction, the mean of "both", or "sigmoid"."""
    q, t = query.double().requires_grad_(), target.double().requires_grad_()
    cosine, labels = q @ t.T, _labels(query)
    if kind == "sigmoid":
        logits = cosine * SCALE + BIAS
        loss = -F.logsigmoid(-logits).sum(1).mean() - logits.diagonal().mean()
    else:
        loss = F.cross_entropy(cosine / temperature, labels)
        if kind == "both":
            loss = (loss + F.cross_entropy(cosine.T / temperature, labels)) / 2
    loss.backward()
    return loss.detach(), q.grad, t.grad


def relative(got, expected) -> float:
    """|got - expected| / |expected|."""
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-300))
