"""Are the kernels right on the device at hand? Every option on every way that dispatch can take, against float64; repeated bit for bit.

Runs on a GPU (`python -m bench.gpu`), and small under the interpreter, which is how its own test runs it. An error passes when it is at
most twice eager's in the same type plus one unit in the last place, of the result and of a float32 logit, and at most CAP: eager's
logits in bfloat16 forgive too much.
"""

from __future__ import annotations

import contextlib
import dataclasses
from unittest import mock

import torch

from contrastive_kernels import info_nce_value_and_grad
from contrastive_kernels.reference import info_nce_reference

CAP = {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 2**-13}
PATHS = ("exp", "chunk", "fused", "joint", "levels")


def unit(*shape, dtype, device):
    return torch.nn.functional.normalize(torch.randn(*shape, device=device), dim=-1).to(dtype)


def cases(n: int, m: int, d: int, dtype, device) -> dict:
    """Options by name; tensors are on the device."""

    def ints(*shape, low=0, high=4):
        return torch.randint(low, high, shape, device=device)

    def keep(count):
        return torch.rand(count, device=device) > 0.2

    out = {
        "plain": {}, "weight, sum": dict(weight=torch.rand(n, device=device), reduction="sum"),
        "positives": dict(positives=torch.where(ints(n) == 0, -100, ints(n, high=m))), "ids": dict(target_ids=ints(m, low=-1, high=20)),
        "masks": dict(query_mask=keep(n), target_mask=keep(m), own_negatives_only=ints(n) == 0), "margin": dict(mask_margin=0.05, mask_relative=0.5),
        "query and target negatives": dict(query_negatives=True, target_negatives=True, query_ids=ints(n, low=-1, high=20)),
        "hardness": dict(hardness=5.0), "hard negatives": dict(hard_negatives=unit(n, 3, d, dtype=dtype, device=device)),
        "smoothing": dict(label_smoothing=0.1, target_mask=keep(m)), "normalize": dict(normalize=True),
        "temperature gradient": dict(temperature=torch.tensor(0.07, device=device)), "cold": dict(temperature=0.003),
        "matryoshka": dict(matryoshka_dims=(d // 2, d)), "symmetric": dict(symmetric=True),
        "matryoshka, masks": dict(matryoshka_dims=(d // 2, d), target_mask=keep(m), target_ids=ints(m, low=-1, high=20), mask_margin=0.1),
        "symmetric, shared positives": dict(symmetric=True, positives=ints(n, high=m // 2), mask_margin=0.3),
    }
    if n == m:
        out["pairs, symmetric"] = dict(symmetric=True, normalize=True, target_ids=ints(m, low=-1, high=n))
    return {name: {"temperature": 0.05, **options} for name, options in out.items()}


@contextlib.contextmanager
def forced(path: str, taken: list):
    """The sweep takes `path`, where it can; `taken` notes what it took. Matryoshka levels share a sweep for "levels" alone."""
    from contrastive_kernels.triton import levels, sweep, symmetric

    plan_for, decide, plan_levels = sweep.plan_for, symmetric.decide, levels.plan

    def chosen(plan):
        way = next((way for way in plan.ways if way.path == path and not way.reason), plan.chosen)
        taken.append(way.path)
        return dataclasses.replace(plan, chosen=way)

    def both(*args):
        plan = decide(*args) if path == "joint" else None
        return plan if plan is None else chosen(plan)

    def together(*args):
        plan = plan_levels(*args)
        way = next(way for way in plan.ways if way.path == ("levels" if path == "levels" else "apart"))
        if way.reason:
            return plan
        taken.extend(["levels"] if path == "levels" else [])
        return dataclasses.replace(plan, chosen=way)

    with mock.patch.object(sweep, "plan_for", lambda *args: chosen(plan_for(*args))), mock.patch.object(symmetric, "decide", both), \
            mock.patch.object(levels, "plan", together):  # fmt: skip
        yield


def truth_of(query, target, options, dtype) -> dict[str, torch.Tensor]:
    """Loss and gradients of the dense definition, computed in `dtype`."""
    leaves = {"query": query, "target": target} | {k: v for k, v in options.items() if k in ("temperature", "hard_negatives") and isinstance(v, torch.Tensor)}
    leaves = {k: v.detach().to(dtype).requires_grad_() for k, v in leaves.items()}
    rest = {k: v for k, v in leaves.items() if k not in ("query", "target")}
    options = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()} | rest
    loss = info_nce_reference(leaves["query"], leaves["target"], **options)
    return {"loss": loss.detach()} | {f"d_{k}": g for k, g in zip(leaves, torch.autograd.grad(loss, list(leaves.values())))}


def relative(got, expected) -> float:
    return float((got.double() - expected).norm() / expected.norm().clamp(min=1e-300))


def check(device: str, n: int = 384, m: int = 640, d: int = 128, dtypes=(torch.bfloat16, torch.float16, torch.float32), names=None) -> list[dict]:
    """A row for every option, way and type: errors, what was allowed, and whether it passed."""
    rows = []
    for columns in (m, n):
        for dtype in dtypes:
            torch.manual_seed(0)
            query, target = unit(n, d, dtype=dtype, device=device), unit(columns, d, dtype=dtype, device=device)
            for name, options in cases(n, columns, d, dtype, device).items():
                if (names is None and (columns == n) != name.startswith("pairs")) or (names is not None and name not in names):
                    continue
                truth, eager = truth_of(query, target, options, torch.float64), truth_of(query, target, options, dtype)
                for path in PATHS:
                    rows += _one(path, name, options, query, target, truth, eager)
    return rows


def _one(path, name, options, query, target, truth, eager) -> list[dict]:
    taken, dtype = [], query.dtype
    ulp = torch.finfo(dtype).eps + torch.finfo(torch.float32).eps / float(options["temperature"])
    with forced(path, taken):
        first, second = (info_nce_value_and_grad(query, target, backend="triton", grad_dtype=torch.float32, **options) for _ in range(2))
    if path not in taken:
        return []  # this way does not take these options or this type
    row = {"options": name, "path": path, "dtype": str(dtype)[6:], "n": len(query), "m": len(target), "d": query.shape[1], "wrong": []}
    for key, right in truth.items():
        mine = relative(getattr(first, key), right)
        allowed = min(2 * relative(eager[key].nan_to_num(), right) + ulp, CAP[dtype])
        row[key] = f"{mine:.1e} of {allowed:.1e}"
        if not mine <= allowed:
            row["wrong"].append(f"{key}: error {mine:.1e}, allowed {allowed:.1e}")
        if not torch.equal(getattr(first, key), getattr(second, key)):
            row["wrong"].append(f"{key} differs from run to run")
    return [row]


def far(device: str, rows: int = 49_152, columns: int = 49_152, width: int = 64) -> list[str]:
    """Offsets beyond 2^31: one panel of more elements than that, its far corner against a product of its own."""
    from contrastive_kernels.triton.exp_panel import exp_panel

    x, y = unit(rows, width, dtype=torch.bfloat16, device=device), unit(columns, width, dtype=torch.bfloat16, device=device)
    out = torch.full((1, rows, columns), float("nan"), dtype=torch.bfloat16, device=device)
    panel = exp_panel(x, y, scale=20.0, shift=torch.zeros(rows, device=device), out=out)
    truth = (x[-64:].float() @ y.float().T * 20).exp()
    wrong = []
    if not relative(panel.row_sum[0, -64:], truth.double().sum(1)) <= 1e-4:
        wrong.append("row sums of the last rows of a panel beyond 2^31 elements")
    if not relative(out[0, -64:], truth.double()) <= 2**-8:
        wrong.append("last rows of a panel beyond 2^31 elements")
    return wrong
