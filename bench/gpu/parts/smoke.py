"""Every path once, smallest first: what would stop everything else shows within seconds."""

from __future__ import annotations

import functools

import torch
import torch.distributed as dist

from bench.gpu import cases
from bench.gpu.cases import result_on
from bench.gpu.check import Check
from bench.gpu.parts.profile import special
from bench.peers import on_gpu
from contrastive_kernels import (
    GradCache,
    distillation_loss,
    info_nce,
    info_nce_value_and_grad,
    pooled_info_nce,
    sigmoid_loss,
    topk_similarity,
)
from contrastive_kernels.reference import distillation_loss_reference

TEMPERATURE = 0.05
# Errors against float64 of the inputs as rounded: float32 logits and sums; exponentials and factors rounded to 16 bits once.
LOSS, GRADIENT, FLOAT32 = 2**-20, 2**-8, 2**-18
# path: (width, type, options)
LOSSES = {
    "exp": (256, torch.bfloat16, {}),
    "chunk": (256, torch.float32, {}),
    "fused": (64, torch.bfloat16, {}),
    "joint": (256, torch.bfloat16, {"symmetric": True, "normalize": True}),
    "dense": (256, torch.bfloat16, {}),
    "levels": (256, torch.bfloat16, {"matryoshka_dims": (64, 128, 256)}),
}


def checks(machine):
    yield Check("float32 += bfloat16 product, by the library", lambda: add_product(machine))
    for path in LOSSES:
        yield Check(f"info_nce, {path}", functools.partial(loss, machine, path), seconds=45)
    yield Check("warp-specialised panel", lambda: warp_specialised(machine))
    yield Check("info_nce, cold rows redone", lambda: cold(machine))
    yield Check("info_nce, hard negatives and statistics", lambda: hard(machine))
    yield Check("sigmoid_loss", lambda: sigmoid(machine))
    yield Check("distillation_loss", lambda: distillation(machine))
    yield Check("topk_similarity", lambda: topk(machine))
    yield Check("pooled_info_nce", lambda: pooled(machine))
    yield Check("the loss never waits for the device", lambda: never_waits(machine))
    yield Check("torch.compile of info_nce", lambda: compiled(machine))
    yield Check("CUDA graph of a whole call", lambda: graph(machine))
    yield Check("packed attention, attn='auto'", lambda: attention(machine))
    yield Check("tiny Qwen2-VL, one GradCache step", lambda: gradcache_step(machine))
    yield Check("one rank, NCCL and a ring", lambda: one_rank(machine), seconds=45)


def _rows(machine) -> int:
    return 24 if machine.dry else 512


def _unit(machine, *shape, dtype=torch.bfloat16, seed=0):
    return cases.unit(*shape, generator=torch.Generator().manual_seed(seed)).to(machine.device, dtype)


def _pair(machine, d=256, dtype=torch.bfloat16):
    """(query, target): each target near its query, as a trained model has them."""
    query, other = (_unit(machine, _rows(machine), d, dtype=torch.float32, seed=seed) for seed in (0, 1))
    return query.to(dtype), torch.nn.functional.normalize(query + other, dim=-1).to(dtype)


def judged(errors: dict[str, float], allowed: dict[str, float]) -> dict:
    """A row of errors; wrong where one is above what is allowed, or no number."""
    wrong = [f"{name} {error:.1e}, allowed {allowed[name]:.1e}" for name, error in errors.items() if not error <= allowed[name]]
    row = {f"{name}_error": f"{error:.1e}" for name, error in errors.items()} | {"note": "against float64"}
    return row | ({"wrong": wrong} if wrong else {})


def compared(got: dict, right: dict, dtype=torch.bfloat16) -> dict:
    gradient = FLOAT32 if dtype == torch.float32 else GRADIENT
    errors = {name: on_gpu.relative(got[name], right[name]) for name in right}
    return judged(errors, {name: LOSS if name == "loss" else gradient for name in right})


def add_product(machine) -> dict:
    """`addmm.dtype_out`, on which every gradient of the targets hangs."""
    from contrastive_kernels.triton.products import add_matmul

    query, target = _pair(machine)
    out = torch.ones(query.shape, device=machine.device)
    weights = torch.rand(len(query), len(query), device=machine.device).bfloat16()
    expected = out.double() + weights.double().T @ query.double()
    add_matmul(out, weights.T, query)
    return judged({"product": on_gpu.relative(out, expected)}, {"product": 2**-20})


def loss(machine, path: str) -> dict:
    d, dtype, options = LOSSES[path]
    n, options = _rows(machine), {"temperature": TEMPERATURE, **options}
    query, target = _pair(machine, d, dtype)
    result = result_on(cases.Case(path, dtype, n, n, d), path, query, target, options)
    if result is None:
        return {"wrong": f"the path {path} was not taken"}
    right = cases.truth_of(query, target, options, torch.float64)
    row = compared({name: getattr(result, name) for name in right}, right, dtype)
    return row


def warp_specialised(machine) -> dict:
    """The panel that dispatch takes once it is measured to be faster: exponentials and row sums, positives left out, with norms."""
    from contrastive_kernels.triton.kernels.exp_panel import exp_panel

    special(machine)
    query, target = _pair(machine)
    positive, shift = torch.arange(len(query), device=machine.device), torch.full((len(query),), 1 / TEMPERATURE, device=machine.device)
    ones = torch.ones(len(query), device=machine.device)
    panel = exp_panel(
        query, target, scale=1 / TEMPERATURE, shift=shift, positive=positive, row_scale=ones, col_scale=0.5 * ones, panel="warp_specialised"
    )
    right = (query.double() @ target.double().T * 0.5 / TEMPERATURE - 1 / TEMPERATURE).exp().fill_diagonal_(0)
    errors = {"panel": on_gpu.relative(panel.e[0], right), "row_sums": on_gpu.relative(panel.row_sum[0], right.sum(1))}
    return judged(errors, {"panel": 2**-9, "row_sums": FLOAT32})


def cold(machine) -> dict:
    """Temperature 0.002: exponentials under a fixed shift would be zero, and their rows are done again."""
    query, target = _pair(machine)
    options = {"temperature": 0.002}
    result = info_nce_value_and_grad(query, target.flip(0), backend="triton", grad_dtype=torch.float32, **options)
    right = cases.truth_of(query, target.flip(0), options, torch.float64)
    return compared({name: getattr(result, name) for name in right}, right)


def hard(machine) -> dict:
    query, target = _pair(machine)
    negatives = _unit(machine, len(query), 3, query.shape[1], seed=2)
    options = {"temperature": TEMPERATURE, "hard_negatives": negatives, "target_ids": torch.arange(len(query), device=machine.device) // 2}
    result = info_nce_value_and_grad(query, target, backend="triton", grad_dtype=torch.float32, return_stats=True, **options)
    right = cases.truth_of(query, target, options, torch.float64)
    return compared({name: getattr(result, name) for name in right}, right)


def sigmoid(machine) -> dict:
    query, target = _pair(machine)
    leaves = [x.detach().requires_grad_() for x in (query, target)]
    value = sigmoid_loss(*leaves, scale=on_gpu.SCALE, bias=on_gpu.BIAS)
    gradients = torch.autograd.grad(value, leaves)
    right = dict(zip(("loss", "d_query", "d_target"), on_gpu.truth(query, target, TEMPERATURE, "sigmoid"), strict=True))
    return compared({"loss": value.detach(), "d_query": gradients[0], "d_target": gradients[1]}, right)


def distillation(machine) -> dict:
    """A teacher three quarters as wide, in one direction."""
    matrices = [*_pair(machine), *_pair(machine, 192)]
    options = {"temperature": TEMPERATURE, "teacher_temperature": TEMPERATURE}

    def run(function, tensors):
        leaves = [x.detach().clone().requires_grad_() for x in tensors[:2]]
        value = function(*leaves, *tensors[2:], **options)
        return dict(zip(("loss", "d_query", "d_target"), (value.detach(), *torch.autograd.grad(value, leaves)), strict=True))

    kernels = functools.partial(distillation_loss, backend="triton")
    return compared(run(kernels, matrices), run(distillation_loss_reference, [x.double() for x in matrices]))


def topk(machine) -> dict:
    """Scores of what it found, and that nothing better was left: ties in bfloat16 may name other rows."""
    query, target = _pair(machine)
    scores, found = topk_similarity(query, target, 5, backend="triton")
    cosine = query.double() @ target.double().T
    right = cosine.topk(5, dim=1).values
    errors = {"scores": on_gpu.relative(scores, right), "found": on_gpu.relative(cosine.gather(1, found), right)}
    return judged(errors, {"scores": 2**-18, "found": 2**-18})


def pooled(machine) -> dict:
    """Two tokens a sample, the last one counts."""
    query, target = _pair(machine)
    n = len(query) // 2
    ends = torch.arange(0, 2 * n + 1, 2, device=machine.device, dtype=torch.int32)
    leaves = [x.detach().requires_grad_() for x in (query, target)]
    options = {"temperature": TEMPERATURE, "normalize": True}
    value = pooled_info_nce(*leaves, query_cu_seqlens=ends, target_cu_seqlens=ends, backend="triton", **options)
    gradients = torch.autograd.grad(value, leaves)
    right = cases.truth_of(query[1::2], target[1::2], options, torch.float64)
    got = {"loss": value.detach(), "d_query": gradients[0][1::2], "d_target": gradients[1][1::2]}
    row = compared(got, right)
    if any(gradient[::2].abs().max() > 0 for gradient in gradients):
        row["wrong"] = [*row.get("wrong", []), "tokens that are not the last got gradients"]
    return row


def never_waits(machine) -> str:
    machine.needs_cuda("waiting for the device")
    query, target = _pair(machine)
    ids = torch.arange(len(query), device=machine.device)
    sets = ({}, {"normalize": True, "symmetric": True}, {"target_ids": ids}, {"return_stats": True}, {"matryoshka_dims": (64, 256)})
    for options in sets:
        info_nce_value_and_grad(query, target, backend="triton", **options)  # compiles
    leaves = [x.detach().requires_grad_() for x in (query, target)]
    info_nce(*leaves, backend="triton").backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for options in sets:
            info_nce_value_and_grad(query, target, backend="triton", **options)
        info_nce(*leaves, backend="triton").backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return f"{len(sets)} sets of options, and a backward"


def compiled(machine) -> dict:
    """In one graph, forward and backward. On a CPU without inductor, which would call a C++ compiler."""
    query, target = _pair(machine)
    run = torch.compile(
        lambda q, t: info_nce(q, t, temperature=TEMPERATURE, backend="triton"),
        fullgraph=True,
        backend="inductor" if machine.device == "cuda" else "aot_eager",
    )
    leaves = [x.detach().requires_grad_() for x in (query, target)]
    value = run(*leaves)
    gradients = torch.autograd.grad(value, leaves)
    right = cases.truth_of(query, target, {"temperature": TEMPERATURE}, torch.float64)
    return compared({"loss": value.detach(), "d_query": gradients[0], "d_target": gradients[1]}, right)


def graph(machine) -> str:
    """Captured once, replayed over new inputs in the same place, bit for bit what a call gives."""
    machine.needs_cuda("a CUDA graph")
    query, target = _pair(machine)
    held = query.clone(), target.clone()
    options = {"temperature": TEMPERATURE, "normalize": True, "backend": "triton"}
    captured, result = on_gpu.captured(lambda: info_nce_value_and_grad(*held, **options))
    for place, new in zip(held, (query.flip(1), target.flip(1)), strict=True):
        place.copy_(new)
    captured.replay()
    expected = info_nce_value_and_grad(*held, **options)
    for name in ("loss", "d_query", "d_target"):
        if not torch.equal(getattr(result, name), getattr(expected, name)):
            error = on_gpu.relative(getattr(result, name), getattr(expected, name).double())
            raise RuntimeError(f"{name} of a replayed graph differs from a call's by {error:.1e}")
    return "replayed over new inputs, equal bit for bit"


def attention(machine) -> dict:
    """Grouped heads, three segments, what `auto` chooses, against float32 by SDPA."""
    from vlm2vec.attention import Segments, choose_provider, packed_attention

    lengths = [70, 33, 5]
    provider = choose_provider("auto", torch.device(machine.device), torch.bfloat16)
    q = torch.randn(sum(lengths), 12, 128, device=machine.device)
    k, v = (torch.randn(sum(lengths), 2, 128, device=machine.device) for _ in range(2))

    def run(dtype, provider):
        leaves = [x.bfloat16().to(dtype).requires_grad_() for x in (q, k, v)]
        segments = Segments.from_lengths(lengths, causal=True, provider=provider).to(machine.device)
        out = packed_attention(*leaves, segments)
        gradients = torch.autograd.grad(out.float().square().sum(), leaves)
        return dict(zip(("output", "d_q", "d_k", "d_v"), (out.detach(), *gradients), strict=True))

    got, right = run(torch.bfloat16, provider), run(torch.float32, "sdpa")
    row = judged({name: on_gpu.relative(got[name], right[name].double()) for name in right}, dict.fromkeys(right, 0.03))
    return row | {"note": f"by {provider}, against float32"}


def gradcache_step(machine) -> dict:
    """Model, packing, attention, loss and both passes in bfloat16; the loss next to that of the same embeddings in float64."""
    import tempfile

    from bench import models
    from vlm2vec import VLM2Vec

    with tempfile.TemporaryDirectory() as folder:
        models.write("tiny", folder)
        model = VLM2Vec.from_pretrained(folder, dtype="bfloat16", device=machine.device).train()
    count = 3 if machine.dry else 8
    samples = models.inputs("tiny", 2 * count)
    sides = [model.preprocess(samples[:count]), model.preprocess(samples[count:])]
    embeddings: dict[tuple[int, int], torch.Tensor] = {}

    def encode(side, rows):
        out = model(model.pack([side[row] for row in rows]).to(torch.device(machine.device), model.dtype))
        embeddings.update({(id(side), row): vector for row, vector in zip(rows, out.detach(), strict=True)})
        return out

    cache = GradCache(encode, chunk_tokens=1024, module=model)
    lengths = tuple([sample.length for sample in side] for side in sides)
    result = cache.step(*sides, lengths=lengths, temperature=TEMPERATURE, normalize=True)
    query, target = (torch.stack([embeddings[id(side), row] for row in range(count)]) for side in sides)
    right = cases.truth_of(query, target, {"temperature": TEMPERATURE, "normalize": True}, torch.float64)["loss"]
    row = judged({"loss": on_gpu.relative(result.loss, right)}, {"loss": LOSS})
    gradients = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    if not gradients or not all(bool(gradient.isfinite().all()) for gradient in gradients) or not any(g.abs().max() > 0 for g in gradients):
        row["wrong"] = [*row.get("wrong", []), "gradients are missing, zero or not finite"]
    return row | {"note": f"{len(gradients)} gradients"}


def one_rank(machine) -> dict:
    """A process group of one: NCCL on a GPU. Both exchanges give what a call without a group gives."""
    import datetime

    query, target = _pair(machine)
    if not dist.is_initialized():
        backend, limit = "nccl" if machine.device == "cuda" else "gloo", datetime.timedelta(seconds=30)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
    options = {"temperature": TEMPERATURE, "backend": "triton", "grad_dtype": torch.float32}
    alone = info_nce_value_and_grad(query, target, **options)
    errors = {}
    for exchange in ("gather", "ring"):
        got = info_nce_value_and_grad(query, target, group=dist.group.WORLD, exchange=exchange, **options)
        for name in ("loss", "d_query", "d_target"):
            errors[f"{exchange}_{name}"] = on_gpu.relative(getattr(got, name), getattr(alone, name).double())
    return judged(errors, {name: 2 * (LOSS if name.endswith("loss") else GRADIENT) for name in errors})
