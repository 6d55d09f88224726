"""Every option, every pair and a sample of larger sets, against the dense definition in float64: value and gradients.

All of it in both ways of forming products.
"""

import pytest
import torch

from contrastive_kernels import info_nce, info_nce_value_and_grad
from contrastive_kernels.core import operands
from contrastive_kernels.eager import sweep as panels
from contrastive_kernels.reference import info_nce_reference
from tests.kernels.helpers import products
from tests.kernels.helpers.definition import agree, close, run
from tests.kernels.helpers.sampling import Case, random_sets, singles_and_pairs


@pytest.fixture(autouse=True, params=products.WAYS)
def small_pieces(request, monkeypatch):
    """Batches this small would be one tile: shrink it, so that every seam is crossed."""
    packed = products.force(monkeypatch, request.param)
    monkeypatch.setattr(operands, "TILE_BYTES", 400)
    monkeypatch.setattr(panels, "TILE_COLUMNS", 5)
    yield
    assert bool(packed) == (request.param != "mm")


def numbered(sets):
    """(seed, names) of each set, a test of its own."""
    return pytest.mark.parametrize("seed, names", [pytest.param(*pair, id="-".join(pair[1]) or "plain") for pair in enumerate(sets)])


@numbered(singles_and_pairs())
def test_every_option_and_pair(seed, names):
    agree(names, seed)


@pytest.mark.parametrize("block", range(4))
def test_random_sets(block):
    """A hundred sets in one test; all that fail are told, each with its options."""
    failures = []
    for seed, names in enumerate(random_sets(100, seed=block)):
        try:
            agree(names, seed)
        except Exception as error:
            error.add_note(f"options {names}, seed {seed}, block {block}")
            failures.append(error)
    if failures:
        raise ExceptionGroup(f"{len(failures)} of 100 sets of options", failures)


def test_value_and_grad_equals_autograd():
    for seed, names in enumerate(random_sets(60, seed=9)):
        if "none" in names:
            continue
        case = Case(seed)
        options = case.options(names)
        loss, gradients = run(info_nce, case, options, torch.ones(case.n, dtype=torch.float64))
        result = info_nce_value_and_grad(case.query, case.target, return_stats=True, **options)
        close(result.loss, loss, f"{names}")
        for name, gradient in gradients.items():
            close(getattr(result, "d_" + name), gradient, f"{names} {name}")


def test_statistics():
    for seed, names in enumerate(random_sets(60, seed=5)):
        case = Case(seed)
        options = case.options(names)
        _, ours = info_nce(case.query, case.target, return_stats=True, **options)
        _, truth = info_nce_reference(case.query, case.target, return_stats=True, **options)
        for field in vars(truth):
            close(getattr(ours, field), getattr(truth, field), f"{names} {field}")
