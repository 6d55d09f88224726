"""Distillation from a teacher's scores against its formula in float64, row by row."""

import math

import pytest
import torch

from train.losses import LOSSES, LossBatch
from train.losses.scores import score_distillation

D = 5
COUNTS = [2, 0, 3, 1]  # hard negatives of each row
OFFSETS = torch.tensor([0, 2, 2, 5, 6])
N, K = 4, 3


def inputs():
    generator = torch.Generator().manual_seed(1)
    query, target, hard = (torch.randn(rows, D, generator=generator, dtype=torch.float64) for rows in (N, N, 6))
    scores = torch.full((N, 1 + K), -math.inf, dtype=torch.float64)
    for row, count in enumerate(COUNTS):
        scores[row, : 1 + count] = 3 * torch.randn(1 + count, generator=generator, dtype=torch.float64)
    return query, target, hard, scores


def by_hand(query, target, hard, scores, row, temperature, teacher_temperature):
    documents = [target[row], *hard[OFFSETS[row] : OFFSETS[row + 1]]]
    cosines = torch.stack([torch.nn.functional.cosine_similarity(query[row], d, dim=0) for d in documents])
    teacher = torch.softmax(scores[row, : len(documents)] / teacher_temperature, 0)
    return float((teacher * (teacher.log() - torch.log_softmax(cosines / temperature, 0))).sum())


@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (0.02, 2.0)])
def test_value_is_the_mean_over_rows(temperatures):
    data = inputs()
    query, target, hard, scores = data
    options = {"temperature": temperatures[0], "teacher_temperature": temperatures[1], "hard_offsets": OFFSETS}
    got = score_distillation(query, target, hard_negatives=hard, scores=scores, **options)
    rows = [by_hand(*data, row, *temperatures) for row in range(N)]
    assert rows[1] == pytest.approx(0.0, abs=1e-15) and min(rows[0], rows[2], rows[3]) > 1e-3
    assert got.item() == pytest.approx(sum(rows) / N, rel=1e-11)
    mask = torch.tensor([True, True, False, True])
    scores[3] = math.nan  # of a source without scores
    got = score_distillation(query, target, hard_negatives=hard, scores=scores, query_mask=mask, target_mask=mask, **options)
    assert got.item() == pytest.approx((rows[0] + rows[1]) / 2, rel=1e-11)


def test_gradient():
    query, target, hard, scores = inputs()

    def loss(query, target, hard):
        options = {"temperature": 0.3, "teacher_temperature": 1.0, "hard_offsets": OFFSETS}
        return score_distillation(query, target, hard_negatives=hard, scores=scores, **options)

    assert torch.autograd.gradcheck(loss, tuple(x.requires_grad_() for x in (query, target, hard)))


def test_what_does_not_count_may_be_anything():
    query, target, hard, scores = inputs()
    query[2], scores[3] = math.nan, math.nan
    leaf = query.clone().requires_grad_()
    mask = torch.tensor([True, True, False, True])
    options = {"temperature": 0.3, "teacher_temperature": 1.0, "hard_offsets": OFFSETS, "query_mask": mask, "target_mask": mask}
    loss = score_distillation(leaf, target, hard_negatives=hard, scores=scores, **options)
    loss.backward()
    assert loss.isfinite() and leaf.grad.isfinite().all() and leaf.grad[0].any() and not leaf.grad[2:].any()


def test_a_batch_without_scores_has_a_section_of_nothing():
    query, target, _, _ = inputs()
    section = LOSSES["score_distillation"]()
    assert section.function()(query, target, **section.options(LossBatch(torch.arange(N), torch.arange(N)))) == 0
