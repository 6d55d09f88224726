"""The losses against their definition in float64."""

import torch

from contrastive_kernels import info_nce
from contrastive_kernels.reference import info_nce_reference
from tests.kernels.helpers.sampling import Case

NAMES = ("query", "target", "hard_negatives", "temperature")


def leaves(case, options):
    """The differentiable tensors of a case, as leaves, and the options that hold them."""
    out = {"query": case.query, "target": case.target}
    for name in NAMES[2:]:
        if isinstance(options.get(name), torch.Tensor):
            out[name] = options[name]
    out = {name: tensor.clone().requires_grad_() for name, tensor in out.items()}
    return out, {**options, **{name: out[name] for name in NAMES[2:] if name in out}}


def run(function, case, options, cotangent):
    tensors, options = leaves(case, options)
    loss = function(tensors["query"], tensors["target"], **options)
    gradients = torch.autograd.grad((loss * cotangent[: loss.numel()].view(loss.shape)).sum(), list(tensors.values()), allow_unused=True)
    # a gradient that is masked away may come as None or as zeros
    return loss.detach(), {n: torch.zeros_like(tensors[n]) if g is None else g for n, g in zip(tensors, gradients)}


def close(a, b, what, atol=1e-11):
    scale = max(1.0, b.abs().max().item() if b.numel() else 0.0)
    assert torch.isfinite(a).all(), f"{what}: not finite"
    assert (a - b).abs().max() <= atol * scale if a.numel() else a.shape == b.shape, f"{what}: {(a - b).abs().max()} of {scale}"


def equals_the_definition(case, options, gradient_atol):
    """Loss, every gradient for a random cotangent and every statistic."""
    cotangent = 0.5 + torch.rand(case.n, generator=case.generator, dtype=torch.float64)
    results = []
    for function in (info_nce, info_nce_reference):
        tensors, given = leaves(case, options)
        loss, stats = function(tensors["query"], tensors["target"], **given, return_stats=True)
        gradients = torch.autograd.grad((loss * cotangent[: loss.numel()].view(loss.shape)).sum(), list(tensors.values()))
        results.append((loss.detach(), dict(zip(tensors, gradients)), stats))
    (loss, gradients, stats), (true_loss, true_gradients, true_stats) = results
    close(loss, true_loss, "loss")
    for name in true_gradients:
        close(gradients[name], torch.nan_to_num(true_gradients[name]), name, gradient_atol)
    for field in vars(true_stats):
        close(getattr(stats, field), getattr(true_stats, field), field)


def agree(names, seed, function=info_nce):
    """Loss and gradients of `function` with the options `names`, drawn from `seed`, against the definition."""
    case = Case(seed)
    options = case.options(names)
    cotangent = 0.5 + torch.rand(case.n, generator=case.generator, dtype=torch.float64)
    loss, gradients = run(function, case, options, cotangent)
    true_loss, true_gradients = run(info_nce_reference, case, options, cotangent)
    close(loss, true_loss, "loss")
    for name in true_gradients:
        truth = torch.nan_to_num(true_gradients[name])
        close(gradients[name], truth, f"d {name}", 1e-10)
