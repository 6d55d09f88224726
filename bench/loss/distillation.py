"""Distillation from embeddings: time next to its four bare products and to autograd's, errors next to eager's, resident memory."""

from __future__ import annotations

import math

from bench import measure
from bench.loss.verdicts import at_most, bounded, few
from bench.measure import MIB, interleaved, resident, restart_resident_peak, unit_rows

TEMPERATURE = 0.02
OF_THE_PRODUCTS, OF_EAGER_ERRORS, WORKSPACE_MIB = 1.1, 0.25, 256
ERROR_ROWS, ERROR_WIDTH, SEEDS = 512, 256, 3


def eager(query, target, teacher_query, teacher_target, temperature):
    """As trainers write it: both matrices of logits, and autograd."""
    import torch.nn.functional as F

    student, teacher = query @ target.T / temperature, teacher_query @ teacher_target.T / temperature
    return F.kl_div(F.log_softmax(student, 1), F.log_softmax(teacher, 1), log_target=True, reduction="batchmean")


def ours(query, target, teacher_query, teacher_target, temperature):
    from contrastive_kernels import distillation_loss

    return distillation_loss(query, target, teacher_query, teacher_target, temperature=temperature, teacher_temperature=temperature)


def step(loss, matrices, temperature=TEMPERATURE):
    """(loss, d_query, d_target)."""
    query, target = (x.detach().clone().requires_grad_() for x in matrices[:2])
    value = loss(query, target, *matrices[2:], temperature)
    value.backward()
    return value.detach(), query.grad, target.grad


def four_products(query, target, teacher_query, teacher_target):
    """The limit: both models' logits and the two gradients, by the library that the loss takes, into memory that is there already."""
    import torch

    from contrastive_kernels.eager.gemm import product, product_into

    logits, theirs = (torch.empty(len(query), len(target), dtype=query.dtype) for _ in range(2))
    query_t, target_t = query.T.contiguous(), target.T.contiguous()

    def run():
        product_into(logits, query, target)
        product_into(theirs, teacher_query, teacher_target)
        # what a product costs does not hang on its numbers: N = M here, and the matrix stands in for its transpose
        return logits[0, 0], product(logits, target_t), product(logits, query_t)

    return run


def error_ratios() -> list[list[float]]:
    """Our relative errors over eager's, of loss and gradients, for models that are more and less sure of their own targets."""
    import torch
    import torch.nn.functional as F

    out = []
    for close in (0.0, 0.5, 1.0, 2.0):
        for temperature in (0.02, 0.05, 0.1):
            for seed in range(SEEDS):
                generator = torch.Generator().manual_seed(seed)
                matrices = []
                for width in (ERROR_WIDTH, ERROR_WIDTH * 3 // 2):
                    query, target = (torch.randn(ERROR_ROWS, width, generator=generator, dtype=torch.float64) for _ in range(2))
                    matrices += [F.normalize(x, dim=1).float() for x in (query, target + close * query)]
                truth = step(eager, [x.double() for x in matrices], temperature)
                if not all(x.norm() > 1e-12 for x in truth):
                    continue  # float64's own rounding is all that eager's formula leaves of it
                errors = [
                    [float((x.double() - y).norm() / y.norm()) for x, y in zip(step(loss, matrices, temperature), truth)]
                    for loss in (ours, eager)
                ]
                out.append([mine / its for mine, its in zip(*errors)])
    return out


def child_memory(n: int, d: int) -> dict:
    """Peak beyond inputs and gradients, in a process of its own."""
    import torch

    step(ours, [unit_rows(64, d, torch.float32, seed) for seed in range(4)])
    matrices = [unit_rows(n, d, torch.float32, seed) for seed in range(4)]
    leaves = [x.requires_grad_() for x in matrices[:2]]
    before = restart_resident_peak()
    ours(*matrices, TEMPERATURE).backward()
    return {"peak_mib": resident("VmHWM") - before - sum(x.grad.nbytes for x in leaves) / MIB}


CHILDREN = {"memory": child_memory}


def table(args) -> list[dict]:
    import torch

    n, d = args.distillation_shape
    shape = {"n": n, "m": n, "d": d, "dtype": "float32"}
    matrices = [unit_rows(n, d, torch.float32, seed) for seed in range(4)]
    leaves = [x.clone().requires_grad_() for x in matrices[:2]]

    def run(loss):
        def call():
            for leaf in leaves:
                leaf.grad = None
            loss(*leaves, *matrices[2:], TEMPERATURE).backward()

        return call

    print(f"\ndistillation, value and gradients, N = M = {n}, both models {d} wide, float32, minimum of {args.repeat}")
    times = interleaved({"ours": run(ours), "naive": run(eager), "four products": four_products(*matrices)}, args.repeat)
    rows = []
    for name, (wall, cpu) in times.items():
        print(f"{name:<34} {wall:>10.0f} ms {cpu:>10.0f} cpu ms", flush=True)
        rows.append({"part": "distillation", "name": name, **shape, "ms_min": wall, "cpu_ms": cpu})
    judged = at_most("distillation against its four products", times["ours"], times["four products"], OF_THE_PRODUCTS, n, d)
    rows.append(judged | {"note": few(args.repeat)})
    ratios = error_ratios()
    for name, values in zip(("loss", "d_query", "d_target"), zip(*ratios)):
        mean = math.exp(sum(map(math.log, values)) / len(values))
        named = f"error of {name} over eager's, geometric mean of {len(values)} cases"
        print(f"      {mean:.3f}: {named}", flush=True)
        rows.append(bounded(named, mean, OF_EAGER_ERRORS, "times", ratio=mean))
    extra = measure.in_child("bench.loss.distillation", "memory", n, d)["peak_mib"]
    rows.append(bounded("extra memory of distillation", extra, WORKSPACE_MIB + 64, "MiB", peak_mib=extra, **shape))
    return rows
