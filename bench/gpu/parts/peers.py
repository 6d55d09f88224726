"""Others' kernels and other ways to the same loss, where they are installed. What they fail at is a note.

Each comes with a truth of its own definition: cut-cross-entropy and others in one direction, CLIP's mean of both, the sigmoid loss.
A kernel of theirs that dies takes its process with it, and a new one goes on with the next.
"""

from __future__ import annotations

from bench.gpu import timing
from bench.gpu.report import LIMIT
from bench.gpu.timing import Peer
from bench.peers import on_gpu

NEED_CUDA = ("cut-cross-entropy", "Liger", "inf-cl", "memeff", "siglip-kernel")


def table() -> list[Peer]:
    one = {
        "cut-cross-entropy, exact": on_gpu.cut_cross_entropy,
        "Liger, fused linear CE": on_gpu.liger,
        "inf-cl": on_gpu.inf_cl,
        "F.linear_cross_entropy": on_gpu.linear_cross_entropy,
        "sentence-transformers, cached": on_gpu.sentence_transformers,
    }
    both = {"memeff, both directions": on_gpu.memeff, "eager, both directions": on_gpu.eager_symmetric}
    rows = [Peer(LIMIT, on_gpu.three_gemms), Peer("ours", on_gpu.ours(backend="triton"), "one", predict=timing.PLAIN)]
    for group, kind in ((one, "one"), (both, "both"), ({"siglip-kernel": on_gpu.siglip_kernel}, "sigmoid")):
        rows += [Peer(name, make, kind, ours=False) for name, make in group.items()]
    return rows


def checks(machine):
    n, d, repeats = (16_384, 1536, 6) if not machine.dry else (24, 16, 2)
    some = [one for one in table() if machine.device == "cuda" or not one.name.startswith(NEED_CUDA)]
    yield from timing.checks(machine, some, n, n, d, repeats)
