"""One shard of columns at a time, as a ring brings them: sums of all shards first, then every shard's gradients from complete sums.

What `distributed.py` does in plain torch for a shard, with the kernels: 2 n M D FLOP for the sums, whose exponentials are never
stored, and 6 n M D for the gradients.
"""

from __future__ import annotations

from ..core.softmax import RowSums
from . import fused_sweep
from . import panel_sums as panels
from .kernels.row_state import RowState, finish
from .sweep import PanelSweep


def _state(panel_sweep: PanelSweep, sums: RowSums) -> RowState:
    return RowState.unfilled(panel_sweep.rows, panel_sweep.problem.dtype, panel_sweep.problem.device, panel_sweep.smoothing, sums)


def sum_shard(problem, direction, workspace: int, sums: RowSums, want_best: bool) -> None:
    """Add one shard's sums of every row to `sums`."""
    panel_sweep = PanelSweep(problem, direction, None, workspace)
    state = _state(panel_sweep, sums)
    if panel_sweep.path == "fused":
        fused_sweep.forward(panel_sweep, state, prior=True, complete=False)
        return
    for rows in panel_sweep:
        if panel_sweep.path == "exp":
            parts = [panel_sweep.exponentials(rows, [None] * len(panel_sweep.views), want_best)]
        else:
            cosine = panels.cosines(panel_sweep.views, rows, problem.dtype)
            parts = panel_sweep.reduced(rows, cosine)
            del cosine
        panel_sweep.add(state, rows, parts, prior=True, complete=False)


def differentiate_shard(problem, direction, workspace: int, sums: RowSums, result, logit, gradients) -> None:
    """Add the gradients of one shard of columns, the rows' sums being complete; the positives' own terms are the caller's."""
    panel_sweep = PanelSweep(problem, direction, gradients, workspace)
    state = _state(panel_sweep, sums)
    # relative to the greatest shift of all shards: none of this shard's exponentials is above what was safe for its sums
    finish(
        state,
        slice(0, panel_sweep.rows),
        None,
        direction,
        panel_sweep.inverse_temperature,
        prior=True,
        own_shift=True,
        gain=panel_sweep.gain,
    )
    if panel_sweep.path == "fused":
        fused_sweep.anchors(panel_sweep, state)
        fused_sweep.backward(panel_sweep, state)
        return
    for rows in panel_sweep:
        outs = panel_sweep.outs(rows)
        if panel_sweep.path == "exp":
            panels.exponentials_at(panel_sweep.views, rows, outs, state.shift[rows], panel_sweep.exponent)
        else:
            panel_sweep.write(rows, panels.cosines(panel_sweep.views, rows, problem.dtype), outs, state)
        panel_sweep.products(rows, outs, state.factor[rows])
