"""One shard of columns at a time, as a ring brings them: sums of all shards first, then every shard's gradients from complete sums.

What `distributed.py` does in plain torch for a shard, with the kernels: 2 n M D FLOP for the sums, whose exponentials are never
stored, and 6 n M D for the gradients.
"""

from __future__ import annotations

import torch

from contrastive_kernels.softmax import RowSums, row_factor
from contrastive_kernels.triton import fused_sweep
from contrastive_kernels.triton import panel as panels
from contrastive_kernels.triton.sweep import Panels, row_sums


def sum_shard(problem, direction, workspace: int, sums: RowSums, want_best: bool) -> None:
    """Add one shard's sums of every row to `sums`."""
    work = Panels(problem, direction, None, workspace)
    if work.path == "fused":
        fused_sweep.forward(work, sums, finished=False)
        return
    for rows in work:
        if work.path == "exp":
            here = panels.exponentials(work.views, rows, [None] * len(work.views), direction.active, want_best=want_best, bounded=work.bounded)
        else:
            cosine = panels.cosines(work.views, rows, problem.dtype)
            here = panels.reduce_cosines(work.views, rows, cosine, direction.active, smoothing=bool(work.smoothing))
            del cosine
        sums.add(rows, row_sums(here))


def differentiate_shard(problem, direction, workspace: int, sums: RowSums, result, logit, gradients) -> None:
    """Add the gradients of one shard of columns, the rows' sums being complete; the positives' own terms are the caller's."""
    work = Panels(problem, direction, gradients, workspace)
    if work.path == "fused":
        fused_sweep.anchors(work, sums)
        fused_sweep.backward(work, sums)
        return
    for rows in work:
        outs = work.outs(rows)
        if work.path == "exp":
            own, inactive = sums.rows(rows), work.inactive(rows)
            # the greatest shift of all shards: none of this shard's exponentials is above what was safe for its sums
            shift = torch.where(own.total > 0, own.shift, float("inf"))
            if inactive is not None:
                shift = torch.where(inactive, float("inf"), shift)
            panels.exponentials_at(work.views, rows, outs, shift)
            factor = row_factor(own, logit[rows], own.shift) * direction.weight[rows]
        else:
            factor = work.write(rows, panels.cosines(work.views, rows, problem.dtype), outs, sums)
        work.products(rows, outs, factor * problem.inverse_temperature)
