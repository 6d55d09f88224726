"""Are the kernels right on the device at hand? Every option on every path and in every type against float64, twice, bit for bit.

An error passes when it is at most twice what the kernels are known to have there (`bench.gpu.errors`), which is far below what eager
has in bfloat16: a lost factor of ten is seen. Rows also tell eager's error in the same type.
"""

from __future__ import annotations

import functools

import torch

from bench.gpu import cases, errors
from bench.gpu.check import Check
from bench.gpu.faults import described, poisoned
from bench.peers.on_gpu import relative


def checks(machine):
    table = cases.cases(cases.DRY_SHAPE, cases.DRY) if machine.dry else cases.cases()
    for case in table:
        yield Check(f"{case.name}, {case.type_name}", functools.partial(judged, case, machine.device), seconds=90)
    yield Check("beyond 2^31 elements", lambda: far(machine.device, *((70, 90, 16) if machine.dry else (49_152, 49_152, 64))))


def judged(case: cases.Case, device: str) -> list[dict]:
    """A row for every path that takes the case. A path that raises is a complaint of its own, and the others are tried."""
    query, target, options = case.made(device)
    truth, eager = (cases.truth_of(query, target, options, dtype) for dtype in (torch.float64, case.dtype))
    eager = {name: relative(eager[name].nan_to_num(), right) for name, right in truth.items()}
    rows = []
    for path in case.paths:
        row = {"name": f"{case.name}, {case.type_name}, {path}", "dtype": case.type_name, "n": case.n, "m": case.m, "d": case.d}
        try:
            first, second = (cases.result_on(case, path, query, target, options) for _ in range(2))
            if first is None:
                continue
            rows.append(row | _verdict(case, path, first, second, truth, eager))
        except Exception as error:
            if poisoned(error):
                raise
            rows.append(row | {"wrong": described(error)})
    return rows


def _verdict(case, path: str, first, second, truth: dict, eager: dict) -> dict:
    """Errors, the largest of them as a share of what is allowed, and what is wrong."""
    row, wrong, worst = {}, [], 0.0
    allowed = errors.allowed(case, path)
    for name, right in truth.items():
        mine, bound = relative(getattr(first, name), right), allowed[name]
        row |= {f"{name}_error": f"{mine:.1e}", f"{name}_allowed": f"{bound:.1e}", f"{name}_eager": f"{eager[name]:.1e}"}
        worst = max(worst, mine / bound)
        if not mine <= bound:
            wrong.append(f"{name}: error {mine:.1e}, allowed {bound:.1e} (eager {eager[name]:.1e})")
        if not torch.equal(getattr(first, name), getattr(second, name)):
            wrong.append(f"{name} differs from run to run")
    return row | {"value": round(worst, 3), "unit": "of the allowed error"} | ({"wrong": wrong} if wrong else {})


def far(device: str, rows: int, columns: int, width: int) -> dict:
    """Offsets beyond 2^31: one panel of more elements than that, its far corner against a product of its own."""
    from contrastive_kernels.triton.kernels import exp_panel

    generator = torch.Generator().manual_seed(0)
    x, y = (cases.unit(count, width, generator=generator).bfloat16().to(device) for count in (rows, columns))
    out = torch.full((1, rows, columns), float("nan"), dtype=torch.bfloat16, device=device)
    panel = exp_panel.exp_panel(x, y, scale=20.0, shift=torch.zeros(rows, device=device), out=out)
    truth = (x[-64:].float() @ y.float().T * 20).exp()
    sums, last = relative(panel.row_sum[0, -64:], truth.double().sum(1)), relative(out[0, -64:], truth.double())
    wrong = []
    if not sums <= 1e-5:
        wrong.append(f"row sums of the last rows err by {sums:.1e}")
    if not last <= 2**-9:
        wrong.append(f"the last rows err by {last:.1e}")
    return {"value": max(sums / 1e-5, last / 2**-9), "unit": "of the allowed error", "n": rows, "m": columns, "d": width, "wrong": wrong}
