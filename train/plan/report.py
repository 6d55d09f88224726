"""A plan as a page of Markdown."""

from __future__ import annotations

import os

from ..command import COMMAND
from .best.money import Bill
from .search import CONTEXT_GIB, FRAGMENTATION, Plan

_GIB = 2**30
_ORDER = (
    "weights",
    "gathered weights",
    "gradients",
    "optimizer",
    "activations",
    "kept graphs",
    "frozen features",
    "embeddings",
    "loss scratch",
    "all-reduce buckets",
)
_WORDS = {
    "activations": "activations of a chunk",
    "kept graphs": "graphs kept from the first pass (`retain`)",
    "frozen features": "features of the frozen vision tower (`keep_mib`)",
    "embeddings": "embeddings and their gradients",
    "gathered weights": "weights gathered from other ranks",
    "all-reduce buckets": "buckets of the gradients, DDP's own and those of the one all-reduce",
}


def report(plan: Plan, overrides: list[str] = (), *, price: float | None = None) -> str:
    """Markdown that says what is predicted and what cannot be. `price`: of one GPU for an hour."""
    r, s = plan.recipe, plan.simulation
    bill = Bill(plan.step_seconds * r.steps / 3600, plan.ranks, price)
    lines = [
        f"# Plan of {os.path.basename(plan.name)}",
        "",
        f"`{r.model}`, {_how(plan)}, on {plan.ranks} x {plan.gpu.name}. Everything below is predicted, by",
        "",
        "```",
        " ".join(
            [f"{COMMAND} plan", plan.name, f"--gpu {plan.gpu.name}", *([f"--ranks {plan.ranks}"] if plan.ranks > 1 else []), *overrides]
        ),
        "```",
        "",
        "| predicted memory of a GPU at its peak | GiB | share |",
        "|---|---:|---:|",
    ]
    parts = sorted(s.parts.items(), key=lambda item: _ORDER.index(item[0]) if item[0] in _ORDER else len(_ORDER))
    lines += [f"| {_WORDS.get(part, part)} | {size / _GIB:.2f} | {size / s.peak:.1%} |" for part, size in parts if size >= 1e-3 * s.peak]
    lines += [
        f"| **peak of live tensors** | **{s.peak / _GIB:.2f}** | |",
        f"| usable: {plan.gpu.gib:g} less {CONTEXT_GIB:g} for CUDA and {FRAGMENTATION:.0%} for gaps | {plan.usable / _GIB:.2f} | |",
        f"| **{'left over' if plan.fits else 'LACKING'}** | **{abs(plan.usable - s.peak) / _GIB:.2f}** | |",
        "",
        "| predicted step | |",
        "|---|---:|",
        f"| weights trained, of all | {s.trained:,} of {s.weights:,} |",
        f"| pairs, global and of a rank | {r.global_batch:,} and {r.global_batch // plan.ranks:,} |",
        f"| tokens of a rank, longest sample | {plan.tokens:,}, {plan.longest:,} |",
        f"| chunks of a rank{f' of {r.chunk_tokens:,} tokens' if r.chunk_rows is None else f' of {r.chunk_rows} rows'} | {s.chunks:,} |",
    ]
    if plan.largest_chunk is not None:
        lines.append(f"| largest `chunk_tokens` that fits | {_budget(plan)} |")
    lines += [
        f"| FLOPs of a rank | {s.cost.flops:.3g} |",
        f"| seconds | {_seconds(plan.step_seconds)} |",
        *(
            [f"| of them collectives, at {plan.gpu.link_gb_s:g} GB/s and not hidden | {_seconds(plan.link_seconds)} |"]
            if plan.ranks > 1
            else []
        ),
        f"| pairs a second, all ranks | {r.global_batch / plan.step_seconds:,.1f} |",
        f"| hours of {r.steps:,} steps | {bill.hours:,.1f}{f' ({bill.in_words()})' if bill.hours >= 48 else ''} |",
        *([f"| money at {price:g} for an hour of a GPU | {bill.money_in_words()} |"] if price is not None else []),
        *_media(plan),
        "",
        f"Seconds: matrix products at {plan.efficiency:.0%} of {plan.gpu.tflops:g} TFLOP/s, everything else at "
        f"{plan.gpu.reached_bandwidth:.0%} of {plan.gpu.tb_s:g} TB/s, whichever takes an operator longer; "
        f"attention counted as full squares, no operator faster than {1e6 * plan.gpu.dispatch:g} us.",
        "",
        *([bill.warning(), ""] if bill.takes_weeks else []),
        f"What dominates: {_dominates(plan)}.",
        "",
        *_mend(plan),
        "What this cannot know: " + "; ".join(_unknown(plan)) + ".",
    ]
    return "\n".join(lines) + "\n"


def _how(plan: Plan) -> str:
    r = plan.recipe
    how = r.whole_words
    if r.lora is not None:
        beside = f" beside {how}" if how else ""
        how = f"{'DoRA' if r.lora.dora else 'LoRA'} of rank {r.lora.r}" + (" over four-bit weights" if r.quantization else "") + beside
    how += f", weights in {r.dtype}" + (f" under {r.autocast} autocast" if r.autocast and r.autocast != r.dtype else "")
    how += ", gradient checkpointing" if r.gradient_checkpointing else ""
    return how + (f", sharded over {plan.ranks} ranks (FSDP2)" if r.distributed == "fsdp" and plan.ranks > 1 else "")


def _budget(plan: Plan) -> str:
    if plan.largest_chunk == 0:
        return "none: not even the longest sample's"
    return f"{plan.largest_chunk:,}" + (" (the whole batch)" if plan.largest_chunk >= plan.tokens else "")


def _media(plan: Plan) -> list[str]:
    """Host memory for decoded images."""
    r, (total, largest) = plan.recipe, plan.media
    if not total:
        return []
    if not plan.streamed:
        buffered = total * (1 + (1 if r.workers == 0 else r.workers * (2 if r.global_batch // plan.ranks <= 2048 else 1)))
        return [f"| host memory of a rank for images, decoded with their batch, {r.workers} workers ahead, GiB | {buffered / _GIB:.2f} |"]
    bound = r.media_mib * 2**20
    capped = min(total, bound)
    ahead = min(total, 2 * max(largest, total * r.chunk_tokens / max(1, plan.tokens)))
    again = max(0.0, 1 - bound / total)
    return [
        f"| host memory of a rank for images: kept and two chunks ahead, GiB | {(capped + (ahead if again else 0)) / _GIB:.2f} |",
        f"| images decoded a second time in a step | {again:.0%} |",
    ]


def _dominates(plan: Plan) -> str:
    s = plan.simulation
    part, size = max(s.parts.items(), key=lambda item: item[1])
    products = s.cost.flops / (plan.gpu.tflops * 1e12 * plan.efficiency)
    shares = {
        "matrix products": products,
        "operators bound by memory": max(0.0, s.cost.seconds - products),
        "collectives": plan.link_seconds,
    }
    what, seconds = max(shares.items(), key=lambda item: item[1])
    return f"memory, {_WORDS.get(part, part)} ({size / s.peak:.0%}); time, {what} ({seconds / plan.step_seconds:.0%})"


def _mend(plan: Plan) -> list[str]:
    if plan.fits:
        return []
    r, mends = plan.recipe, []
    if plan.largest_chunk:
        mends.append(f"chunk_tokens: {plan.largest_chunk}")
    if not r.gradient_checkpointing:
        mends.append("gradient_checkpointing: true")
    if plan.simulation.kept:
        mends.append("a smaller retain")
    if r.lora is None:
        mends.append("a `lora:` section")
    elif not r.quantization:
        mends.append("quantization: nf4")
    if plan.ranks > 1 and r.distributed != "fsdp" and not r.quantization:
        mends.append("distributed: fsdp")
    return [f"The recipe is NOT predicted to fit. Mends: {'; '.join(mends) or 'a larger GPU'}; `--best` looks for settings that fit.", ""]


def _unknown(plan: Plan) -> list[str]:
    r = plan.recipe
    unknown = ["what kernels take inside themselves", "the allocator's gaps beyond the share above", "other programs on the GPU"]
    if plan.measured_rows:
        unknown.append("batches other than the first, whose lengths these are")
    else:
        unknown.append("lengths and image sizes of the real rows: `plan.rows` of the recipe are assumed")
    unknown.append("how fast files are read and images decoded")
    if plan.ranks > 1:
        unknown.append("how much of the collectives is hidden behind work, and the wait for the slowest rank")
    if r.offload_activations:
        unknown.append("what offloaded activations leave on the GPU: they are counted as if they stayed there")
    if "paged" in r.optimizer:
        unknown.append("how much of the paged optimizer state moves to the host: it is counted here whole")
    if r.quantization:
        unknown.append("bitsandbytes' own scratch; its weights are counted by arithmetic")
    return unknown


def _seconds(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"
