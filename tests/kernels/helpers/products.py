"""Both ways in which a CPU forms the loss's products, forced on any processor: the rule itself goes by the processor at hand.

"mm" is the way of torch.mm; "onednn" that of oneDNN, layouts, cuts and packed operands included, with oneDNN itself in float32 where
torch has it. "onednn float64" takes the same way with torch.mm in the place of oneDNN, so that float64's tolerances hold it to the
definition: a forgotten cut or tile is no matter of rounding.
"""

import pytest
import torch

from contrastive_kernels.eager import gemm
from contrastive_kernels.eager import matryoshka as levels
from contrastive_kernels.eager import sweep as panels

WAYS = ("mm", "onednn float64")
FLOAT32_WAYS = ("mm", "onednn")


def is_built_in() -> bool:
    return torch.backends.mkldnn.is_available() and all(
        hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")
    )


def force(monkeypatch, way: str, small: bool = True) -> list[torch.Size]:
    """Products go `way` from here on; `small`: also those below a thousandth of a second, their sums in parts of a few terms.

    Returns a list to which every operand that is packed adds its shape.
    """
    if way == "onednn" and not is_built_in():
        pytest.skip("this torch is built without oneDNN")
    dtype = torch.float64 if way == "onednn float64" else torch.float32
    for module in (gemm, levels, panels):
        monkeypatch.setattr(module, "prefers_onednn", lambda given, device: way != "mm" and given == dtype and device.type == "cpu")
    if small:
        for name, value in {"LEAST_FLOP": 1, "FEW_TERMS": 2, "UNCUT_TERMS": 4, "MOST_TERMS": 5}.items():
            monkeypatch.setattr(gemm, name, value)
    if way == "onednn float64":
        monkeypatch.setattr(gemm, "_pack", lambda b, rows: b.clone())
        monkeypatch.setattr(gemm, "_onednn", lambda a, b: a @ b.T)
    packed, real = [], gemm._pack
    monkeypatch.setattr(gemm, "_pack", lambda b, rows: packed.append(b.shape) or real(b, rows))
    return packed
