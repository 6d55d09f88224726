"""Fast kernels for the layers with state: flash-linear-attention's and causal-conv1d's, where they are and prove right.

    delta_rule     fla.ops.gated_delta_rule.chunk_gated_delta_rule, samples told apart by `cu_seqlens`
    convolution    causal_conv1d.causal_conv1d_fn, samples told apart by `seq_idx`

Both are for CUDA, float16 and bfloat16. Their kernels have crashed on some cards (WeMM-Embedding's authors switched them off), so that
neither is used before it has passed a small case on the device, value and gradients against plain torch, in a process of its own: an
illegal access there leaves this one's CUDA alone. What fails is told once, by a warning in the log, and plain torch does the work.
`attn="sdpa"` asks for torch's own operations, here too.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch

from vlm2vec.attention import Segments

DEVICES = ("cuda",)
DTYPES = (torch.float16, torch.bfloat16)
PACKAGES = {"delta_rule": "fla", "convolution": "causal_conv1d"}
SECONDS = 300.0  # for the check: a first start compiles some kernels in several ways

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_found: dict[tuple, Callable | None] = {}


def delta_rule(segments: Segments, query: torch.Tensor, value: torch.Tensor) -> Callable | None:
    """A function like `gated_delta_rule` that is right on this device; None where plain torch has to do.

    Args:
        segments: a provider that is an object may have a `delta_rule(query, key, value, decay, beta, segments)` of its own.
        query: (T, Hk, Dk). value: (T, Hv, Dv); their widths and dtype are what is checked.
    """
    if own := getattr(segments.provider, "delta_rule", None):
        return lambda q, k, v, decay, beta, layout: own(q, k, v, decay, beta, segments)
    if not _allowed(segments, value):
        return None
    sizes = (query.shape[1], value.shape[1], query.shape[2], value.shape[2])
    function = _checked("delta_rule", value.device, value.dtype, sizes)
    return None if function is None else lambda q, k, v, decay, beta, layout: function(q, k, v, decay, beta, layout["boundaries"])


def convolution(segments: Segments, x: torch.Tensor, kernel: int) -> Callable | None:
    """A function like `causal_convolution` that is right on this device; None where plain torch has to do. x: (T, C)."""
    return _checked("convolution", x.device, x.dtype, (x.shape[1], kernel)) if _allowed(segments, x) else None


def _allowed(segments: Segments, x: torch.Tensor) -> bool:
    """Whether anything but plain torch may run: not where it was asked for, and not under a plan, which brings its own attention."""
    return isinstance(segments.provider, str) and segments.provider != "sdpa" and x.device.type in DEVICES and x.dtype in DTYPES


def _checked(kind: str, device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> Callable | None:
    asked = (kind, device, dtype, sizes)
    if asked not in _found:
        with _lock:
            if asked not in _found:
                _found[asked] = _try(*asked)
    return _found[asked]


def _try(kind: str, device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> Callable | None:
    package = PACKAGES[kind]
    if find_spec(package) is None:
        _log.info("%s is not installed: the %s of this model runs in plain torch", package, kind.replace("_", " "))
        return None
    wrong = check_in_child(kind, device, dtype, sizes)
    if wrong is None:
        return FUNCTIONS[kind]
    _log.warning("%s is not used on %s in %s, plain torch is: %s", package, device, str(dtype)[6:], wrong)
    return None


def check_in_child(kind: str, device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> str | None:
    """What is wrong with the kernel of a kind, in one line; None when it is right."""
    command = [sys.executable, "-m", "vlm2vec.backbones.qwen3_5.self_check", kind, str(device), str(dtype)[6:], *map(str, sizes)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
    except (OSError, ValueError, subprocess.SubprocessError) as e:
        return f"the self-check did not run ({type(e).__name__})"
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        return f"its process ended with {done.returncode}" + (f" ({said[-1].strip()[:200]})" if said else "")
    return json.loads(done.stdout.splitlines()[-1])["wrong"]


def fla_delta_rule(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, decay: torch.Tensor, beta: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """`gated_delta_rule` by flash-linear-attention; cu_seqlens: (B + 1,) boundaries of the samples, int64 as it takes them."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    shared = value.shape[1] // query.shape[1]
    query, key = (x.repeat_interleave(shared, dim=1) if shared > 1 else x for x in (query, key))  # old releases share no key heads
    out = chunk_gated_delta_rule(
        *(x[None].contiguous() for x in (query, key, value)),
        g=decay[None],
        beta=beta[None],
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=cu_seqlens.long(),
    )
    return out[0][0]


def conv1d_convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, layout: dict[str, Any]) -> torch.Tensor:
    """`causal_convolution` by causal-conv1d, which takes samples apart in the layout that holds a token's channels together."""
    from causal_conv1d import causal_conv1d_fn

    bias = None if bias is None else bias.to(x.dtype)
    out = causal_conv1d_fn(x.contiguous()[None].mT, weight.to(x.dtype), bias, seq_idx=layout["sample"], activation="silu")
    return out[0].mT


FUNCTIONS: dict[str, Callable] = {"delta_rule": fla_delta_rule, "convolution": conv1d_convolution}
