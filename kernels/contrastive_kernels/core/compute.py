"""The computation behind the public losses: every direction and level of one rank, value and wanted gradients."""

from __future__ import annotations

import torch

from ..options import InfoNCEOptions
from . import distributed
from .backend import Backend
from .backends import choose
from .gradients import Computed, Gradients, finish_gradients
from .matryoshka import level_options, weighted_sum
from .operands import product_dtype
from .problem import build, directions, own_columns
from .reduce import reduce_directions
from .workspace import workspace_bytes


def compute(query: torch.Tensor, target: torch.Tensor, options: InfoNCEOptions, wanted: frozenset[str]) -> Computed:
    """Loss and the gradients named in `wanted`: of "query", "target", "hard_negatives", "temperature".

    With reduction "none" and gradients wanted, `options.weight` must already hold the cotangent; use "sum" then.
    """
    with torch.no_grad(), torch.autocast(device_type=query.device.type, enabled=False):
        backend = choose(options.backend, product_dtype(query, target), query.device)
        if options.matryoshka_dims is None:
            return _one_width(query, target, options, wanted, backend)
        levels = level_options(options)
        together = backend.matryoshka(query, target, options, levels, wanted, workspace_bytes(options, query, target))
        if together is not None:
            return together
        apart = (_one_width(query[:, :dim], target[:, :dim], level, wanted, backend) for dim, level in levels)
        return weighted_sum(query, target, options, apart)


def _one_width(query, target, options: InfoNCEOptions, wanted: frozenset[str], backend: Backend) -> Computed:
    workspace = workspace_bytes(options, query, target)
    if options.group is not None:
        return distributed.one_width(query, target, options, wanted, workspace, backend)
    problem = build(query, target, options, backend)
    gradients = Gradients(problem, wanted) if wanted else None
    computed = reduce_directions(problem, directions(problem, *own_columns(problem)), gradients, workspace)
    if gradients is not None:
        finish_gradients(problem, gradients, computed)
    return computed
