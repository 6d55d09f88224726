"""`python -m bench step`: what it concludes from its rows. That the peers agree and what they take, only a run tells."""

import pytest
import torch

from bench.step import run as step
from bench.step.run import AIMS, measure_work, unmeasured, verdicts


def row(peer, time, live=100, rss=100, flops=1.0):
    return {
        "name": peer,
        "cpu_ms": time,
        "ms_p50": time,
        "threads": 1,
        "live_mib": live,
        "rss_mib": rss,
        "flops": flops,
        "fewest_flops": 1.0,
    }


def rows(trained, **changes):
    out = {peer: row(peer, 100) for peer in ("ours", "ours-8", "ours-16", "ours-mrope", "ours-retained", "hybrid", "hybrid-retained")}
    out |= {other: row(other, 1000) for which, _, other, _ in AIMS if which == trained}
    return [{**columns, **changes.get(peer.replace("-", "_"), {})} for peer, columns in out.items()]


@pytest.mark.parametrize("trained", ["all", "vision-frozen"])
def test_met(trained):
    assert verdicts(trained, rows(trained)) == [] == unmeasured(trained, {r["name"] for r in rows(trained)})


@pytest.mark.parametrize(
    "trained, changes, words",
    [
        (
            "all",
            {"ours": {"cpu_ms": 590, "ms_p50": 590}, "reference_16": {"cpu_ms": 1100, "ms_p50": 1100}},
            "ours is 1.69x as fast as reference-8, aim 1.8x",
        ),
        ("vision-frozen", {"reference_16": {"cpu_ms": 270, "ms_p50": 270}}, "ours is 2.70x as fast as reference-16, aim 2.8x"),
        ("all", {"st_tokens": {"cpu_ms": 110, "ms_p50": 110}}, "ours-mrope is 1.10x as fast as st-tokens"),
        ("all", {"ours": {"live_mib": 101}, "reference_16": {"live_mib": 200}}, "ours peaks at 101 (live_mib), reference-8 at 100"),
        ("all", {"reference_8": {"rss_mib": 99}, "ours_8": {"rss_mib": 90}}, "ours peaks at 100 (rss_mib), reference-8 at 99"),
        ("all", {"ours_16": {"cpu_ms": 600, "ms_p50": 600, "rss_mib": 120}}, "ours-16 is 1.67x as fast as reference-16"),
        ("all", {"ours_mrope": {"rss_mib": 101}}, "ours-mrope peaks at 101"),
        ("all", {"ours_retained": {"flops": 1.06}}, "all: ours without a second forward executes 1.060x the fewest FLOPs"),
        ("all", {"hybrid_retained": {"flops": 1.06}}, "all: hybrid without a second forward executes 1.060x the fewest FLOPs"),
        ("vision-frozen", {"hybrid_padded": {"cpu_ms": 120}}, "hybrid is 1.20x as fast as hybrid-padded, aim 1.3x"),
        ("all", {"hybrid": {"live_mib": 101}}, "hybrid peaks at 101 (live_mib), hybrid-padded at 100"),
    ],
)
def test_missed(trained, changes, words):
    missed = verdicts(trained, rows(trained, **changes))
    assert len(missed) == 1 and words in missed[0]


def test_an_aim_without_its_peer_is_named():
    had = {"ours", "ours-8", "ours-16", "reference-8", "reference-16"}
    absent = ("ours-mrope against st-tokens", "hybrid against hybrid-padded", "ours-retained", "hybrid-retained")
    assert unmeasured("all", had) == [f"all: {peers} was not measured" for peers in absent]


class Sliced(torch.nn.Module):
    """Holds its batch where no list of inputs names it, as the peers do, and slices it inside of the step."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(256, 256))
        self.sides = [{"pixels": torch.randn(1024, 256)} for _ in range(2)]

    def step(self) -> float:
        for side in self.sides:
            for first in range(0, 1024, 128):
                (side["pixels"][first : first + 128] @ self.weight).sum().backward()
        return 0.0


def test_views_of_the_batch_count_for_no_peer(monkeypatch):
    """Slices of 2 MiB of pixels within the step: a view's storage is the whole of what it looks at."""
    monkeypatch.setattr(step, "makers", lambda: {"sliced": lambda folder, count, frozen: ((made := Sliced()).step, made)})
    assert 0 < measure_work("sliced", "", 4, False)["live_mib"] < 1.5
