"""Makes the Triton sweep take one of the ways of `dispatch.py`, whatever it would choose by itself."""

import dataclasses

import pytest

PATHS = ("exp", "chunk", "fused", "dense")


def force(monkeypatch, path: str, rows: int | None = None) -> None:
    """Skips the test when the way cannot take its problem. `rows` of a panel, instead of what the workspace holds."""
    from contrastive_kernels.triton import sweep

    plan_for = sweep.plan_for

    def forced(*args):
        plan = plan_for(*args)
        way = next(way for way in plan.ways if way.path == path)
        if way.reason:
            pytest.skip(way.reason)
        return dataclasses.replace(plan, chosen=dataclasses.replace(way, rows=rows or way.rows))

    monkeypatch.setattr(sweep, "plan_for", forced)
