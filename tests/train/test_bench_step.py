"""`python -m bench step`: what it concludes from its rows. That the arms agree and what they take, only a run tells."""

import pytest

from bench.step import AIMS, unmeasured, verdicts


def row(arm, time, live=100, rss=100, flops=1.0):
    return {"arm": arm, "cpu_ms": time, "p50_ms": time, "threads": 1, "live_mib": live, "rss_mib": rss, "flops": flops, "fewest_flops": 1.0}


def rows(trained, **changes):
    out = {arm: row(arm, 100) for arm in ("ours", "ours-mrope", "ours-retained")}
    out |= {other: row(other, 1000) for which, _, other, _ in AIMS if which == trained}
    return [{**made, **changes.get(arm.replace("-", "_"), {})} for arm, made in out.items()]


@pytest.mark.parametrize("trained", ["all", "vision-frozen"])
def test_met(trained):
    assert verdicts(trained, rows(trained)) == [] == unmeasured(trained, {r["arm"] for r in rows(trained)})


@pytest.mark.parametrize(
    "trained, changes, words",
    [
        ("all", {"reference": {"cpu_ms": 170, "p50_ms": 170}}, "ours is 1.70x as fast as reference, aim 1.8x"),
        ("vision-frozen", {"reference": {"cpu_ms": 270, "p50_ms": 270}}, "ours is 2.70x as fast as reference, aim 2.8x"),
        ("all", {"st_tokens": {"cpu_ms": 110, "p50_ms": 110}}, "ours-mrope is 1.10x as fast as st-tokens"),
        ("all", {"ours": {"live_mib": 101}}, "ours peaks at 101"),
        ("all", {"ours_mrope": {"rss_mib": 101}}, "ours-mrope peaks at 101"),
        ("all", {"ours_retained": {"flops": 1.06}}, "1.060x the fewest FLOPs"),
    ],
)
def test_missed(trained, changes, words):
    missed = verdicts(trained, rows(trained, **changes))
    assert len(missed) == 1 and words in missed[0]


def test_an_aim_without_its_arm_is_named():
    assert unmeasured("all", {"ours", "reference"}) == ["all: ours-mrope against st-tokens was not measured", "all: ours-retained was not measured"]
