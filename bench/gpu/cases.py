"""Options of the loss, each alone and some together, and the paths that dispatch could take for them: what the gate goes through."""

from __future__ import annotations

import contextlib
import dataclasses
from unittest import mock

import torch

from bench.peers.on_gpu import relative
from contrastive_kernels import info_nce_value_and_grad
from contrastive_kernels.reference import info_nce_reference

PATHS = ("exp", "chunk", "fused", "joint", "levels", "dense")
DENSE = ("plain", "weight, sum", "positives", "cold")  # options that the dense path knows
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPE = (320, 640, 128)  # one and a quarter row tiles of 256, two and a half of columns, the width that the fused path takes too
DRY_SHAPE = (10, 20, 128)
DRY = ("plain", "matryoshka", "pairs, symmetric")  # together they take every path


def unit(*shape, generator) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def options_of(n: int, m: int, d: int, generator) -> dict[str, dict]:
    """Options by name, tensors on the CPU: the same numbers on every device."""

    def ints(*shape, low=0, high=4):
        return torch.randint(low, high, shape, generator=generator)

    def keep(count):
        return torch.rand(count, generator=generator) > 0.2

    out = {
        "plain": {},
        "weight, sum": dict(weight=torch.rand(n, generator=generator), reduction="sum"),
        "positives": dict(positives=torch.where(ints(n) == 0, -100, ints(n, high=m))),
        "ids": dict(target_ids=ints(m, low=-1, high=20)),
        "masks": dict(query_mask=keep(n), target_mask=keep(m), own_negatives_only=ints(n) == 0),
        "margin": dict(mask_margin=0.05, mask_relative=0.5),
        "query and target negatives": dict(query_negatives=True, target_negatives=True, query_ids=ints(n, low=-1, high=20)),
        "hardness": dict(hardness=5.0),
        "hard negatives": dict(hard_negatives=unit(n, 3, d, generator=generator)),
        "smoothing": dict(label_smoothing=0.1, target_mask=keep(m)),
        "normalize": dict(normalize=True),
        "temperature gradient": dict(temperature=torch.tensor(0.07)),
        "row temperatures": dict(temperature=0.03 + 0.1 * torch.rand(n, generator=generator), symmetric=True),
        "cold": dict(temperature=0.003),
        "matryoshka": dict(matryoshka_dims=(d // 2, d)),
        "symmetric": dict(symmetric=True),
        "matryoshka, masks": dict(matryoshka_dims=(d // 2, d), target_mask=keep(m), target_ids=ints(m, low=-1, high=20), mask_margin=0.1),
        "symmetric, shared positives": dict(symmetric=True, positives=ints(n, high=m // 2), mask_margin=0.3),
    }
    if n == m:
        out["pairs, symmetric"] = dict(symmetric=True, normalize=True, target_ids=ints(m, low=-1, high=n))
    return {name: {"temperature": 0.05, **options} for name, options in out.items()}


@dataclasses.dataclass(frozen=True)
class Case:
    """One set of options at one size and type."""

    name: str
    dtype: torch.dtype
    n: int
    m: int
    d: int

    @property
    def paths(self) -> tuple[str, ...]:
        """Those that a GPU could take for it: float32 has no tensor cores there, float16 no exponents for a fixed shift.

        Whether it does take one, its plan says.
        """
        some = {torch.float32: ("chunk",), torch.float16: ("chunk", "fused")}.get(self.dtype, ("exp", "chunk", "fused"))
        if self.dtype == torch.bfloat16:
            some += ("joint",) * (self.name == "pairs, symmetric") + ("levels",) * self.name.startswith("matryoshka")
        return some + ("dense",) * (self.name in DENSE and self.dtype != torch.float16)

    @property
    def type_name(self) -> str:
        return str(self.dtype)[6:]

    def made(self, device: str, seed: int = 0):
        """(query, target, options) on `device`; the CPU draws them, so that every device sees the same numbers."""
        generator = torch.Generator().manual_seed(seed)
        query, target = unit(self.n, self.d, generator=generator), unit(self.m, self.d, generator=generator)
        options = options_of(self.n, self.m, self.d, generator)[self.name]

        def there(value):
            if not isinstance(value, torch.Tensor):
                return value
            wide = value.is_floating_point() and value.ndim == 3  # hard negatives are of the type of queries and targets
            return value.to(device, self.dtype if wide else value.dtype)

        return query.to(device, self.dtype), target.to(device, self.dtype), {name: there(value) for name, value in options.items()}


def cases(shape=SHAPE, names=None, dtypes=DTYPES) -> list[Case]:
    """Every set of options in every type; pairs at N = M, the rest at `shape`."""
    n, m, d = shape
    out = [Case(name, dtype, n, m, d) for dtype in dtypes for name in options_of(n, m, d, torch.Generator())]
    out += [Case("pairs, symmetric", dtype, n, n, d) for dtype in dtypes]
    return [case for case in out if names is None or case.name in names]


@contextlib.contextmanager
def forced(path: str, taken: list):
    """The sweep takes `path`, where it can; `taken` notes what it took. Matryoshka levels share a sweep for "levels" alone."""
    from contrastive_kernels.triton import matryoshka as levels
    from contrastive_kernels.triton import sweep, symmetric

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

    with (
        mock.patch.object(sweep, "plan_for", lambda *args: chosen(plan_for(*args))),
        mock.patch.object(symmetric, "decide", both),
        mock.patch.object(levels, "plan", together),
    ):
        yield


def truth_of(query, target, options, dtype) -> dict[str, torch.Tensor]:
    """Loss and gradients of the dense definition, computed in `dtype`."""
    leaves = {"query": query, "target": target}
    leaves |= {k: v for k, v in options.items() if k in ("temperature", "hard_negatives") and isinstance(v, torch.Tensor)}
    leaves = {k: v.detach().to(dtype).requires_grad_() for k, v in leaves.items()}
    rest = {k: v for k, v in leaves.items() if k not in ("query", "target")}
    options = {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()} | rest
    loss = info_nce_reference(leaves["query"], leaves["target"], **options)
    return {"loss": loss.detach()} | {f"d_{k}": g for k, g in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)}


def result_on(case: Case, path: str, query, target, options):
    """The result of one call on `path`, None where the path does not take the case."""
    taken: list[str] = []
    with forced(path, taken):
        result = info_nce_value_and_grad(query, target, backend="triton", grad_dtype=torch.float32, **options)
    return result if path in taken else None


def errors_of(case: Case, path: str, device: str, seed: int = 0) -> dict[str, float] | None:
    """Errors of the loss and of each gradient."""
    query, target, options = case.made(device, seed)
    result = result_on(case, path, query, target, options)
    if result is None:
        return None
    truth = truth_of(query, target, options, torch.float64)
    return {name: relative(getattr(result, name), right) for name, right in truth.items()}
