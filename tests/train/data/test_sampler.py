"""The sampler is a pure function of (seed, step) and draws what the weights say."""

import numpy as np
import pytest

from train.data.sampler import BlockSampler


def make(**changes):
    options = dict(global_batch=32, block=8, steps=50, seed=7)
    return BlockSampler([40, 100, 13], [1.0, 2.0, 1.0], **(options | changes))


def test_step_does_not_depend_on_the_length_of_the_run():
    long, short = make(steps=50), make(steps=20)
    assert [long.batch(s) for s in range(20)] == [short.batch(s) for s in range(20)]


def test_ranks_hold_contiguous_slices_of_the_same_batch():
    whole = list(make())
    for world_size in (2, 4):
        ranks = [list(make(rank=r, world_size=world_size)) for r in range(world_size)]
        assert [sum((rank[s] for rank in ranks), []) for s in range(50)] == whole


def test_blocks_come_from_one_source_and_visit_every_row_once_an_epoch():
    sampler = make(steps=200)
    seen = {source: [] for source in range(3)}
    for step in range(200):
        rows = sampler.batch(step)
        for k in range(0, 32, 8):
            block = rows[k : k + 8]
            assert len({source for source, _ in block}) == 1
            seen[block[0][0]] += [row for _, row in block]
    for source, size in enumerate([40, 100, 13]):
        epochs = len(seen[source]) // size
        assert epochs >= 2
        for epoch in range(epochs):
            assert sorted(seen[source][epoch * size : (epoch + 1) * size]) == list(range(size))
        first, second = seen[source][:size], seen[source][size : 2 * size]
        assert first != second, "another permutation every epoch"


def test_sources_are_drawn_by_weight():
    sampler = make(steps=5000)
    drawn = np.bincount(sampler._source, minlength=3) / len(sampler._source)
    # 20,000 draws: one standard deviation is 0.0035
    np.testing.assert_allclose(drawn, [0.25, 0.5, 0.25], atol=0.015)


def test_seed_changes_the_order():
    assert make(seed=1).batch(0) != make(seed=2).batch(0)


@pytest.mark.parametrize(
    "changes,words", [({"block": 7}, "must divide global_batch"), ({"world_size": 3}, "divisible by the number of ranks")]
)
def test_contradictions_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        make(**changes)


def test_empty_source_is_refused():
    with pytest.raises(ValueError, match="has no rows"):
        BlockSampler([4, 0], [1, 1], global_batch=2, block=2, steps=1, seed=0)


def test_a_source_joins_at_its_step_and_not_before():
    sampler = make(from_step=[0, 20, 0], steps=60)
    early = {source for s in range(20) for source, _ in sampler.batch(s)}
    late = [source for s in range(20, 60) for source, _ in sampler.batch(s)]
    assert early == {0, 2}
    assert 0.35 < late.count(1) / len(late) < 0.65
    assert make(from_step=[0, 0, 0]).batch(7) == make().batch(7)
    with pytest.raises(ValueError, match="0 for at least one"):
        make(from_step=[1, 2, 3])
