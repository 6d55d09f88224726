"""Inputs of the panel kernels, and what they must give."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


TRUTH = torch.float64 if DEVICE == "cpu" else torch.float32  # the interpreter takes float64


TIGHT = dict(rtol=1e-10, atol=1e-12) if TRUTH == torch.float64 else dict(rtol=1e-4, atol=1e-5)


def unit(rows, width, dtype=TRUTH):
    x = torch.nn.functional.normalize(torch.randn(rows, width, dtype=torch.float64), dim=1)
    return x.to(dtype).to(DEVICE)


def dense(x, y, scale, shift, positive=None, ids=(), threshold=None, keep=None, row_scale=None, col_scale=None, offset=0):
    cos = x.double() @ y.double().T
    if row_scale is not None:
        cos = cos * row_scale.double()[:, None] * col_scale.double()[None]
    kept = torch.ones_like(cos, dtype=torch.bool)
    if threshold is not None:
        kept &= ~(cos > threshold.double()[:, None])
    if keep is not None:
        kept &= keep[None]
    if positive is not None:
        kept &= positive[:, None] != torch.arange(offset, offset + len(y), device=x.device)[None]
    for row, col in ids:
        kept &= row[:, None] != col[None]
    e = torch.where(kept, (cos * float(scale) - shift.double()[:, None]).exp(), 0)
    return e, torch.where(kept, cos, float("-inf")).amax(1), kept


def poisoned(*shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)
