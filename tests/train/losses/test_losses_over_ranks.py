"""Losses that see all ranks' rows: the value of one process on both, and gradients whose mean over the ranks is one process's."""

import math

import pytest
import torch

from tests.helpers.processes import collected, join
from train.losses.cosent import cosent
from train.losses.distillation import distillation
from train.losses.scores import score_distillation
from train.losses.temperature import RowTemperatures

N, D, K = 8, 5, 2
KEPT = torch.tensor([True, True, False, True, True, True, True, True])  # unequal numbers of rows on the ranks


def inputs():
    generator = torch.Generator().manual_seed(4)
    return {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64)
        for name, shape in {"query": (N, D), "target": (N, D), "hard": (N * K, D), "scores": (N, 1 + K), "tq": (N, 3), "tt": (N, 3)}.items()
    }


def losses(part, leaves, group):
    """{name: loss} of the rows in `part`."""
    x = {name: value[part] if name != "hard" else value[part.start * K : part.stop * K] for name, value in inputs().items()}
    x |= leaves
    masks = {"query_mask": KEPT[part], "target_mask": KEPT[part], "group": group}
    count = part.stop - part.start
    grades, sources = torch.arange(N).double()[part] % 3, (torch.arange(N) // 5)[part]
    scores = x["scores"].index_fill(0, torch.tensor([count - 1]), math.nan) if part.start else x["scores"]
    scores = scores.index_fill(0, torch.tensor([N - 1]), math.nan) if count == N else scores
    hard = {"hard_negatives": x["hard"], "hard_offsets": torch.arange(count + 1) * K}
    teacher = {"teacher_query": x["tq"], "teacher_target": x["tt"], "known": torch.ones(count, dtype=torch.bool)}
    pair, temperatures = (x["query"], x["target"]), {"temperature": 0.3, "teacher_temperature": 0.5}
    return {
        "cosent": cosent(*pair, grades=grades, sources=sources, temperature=0.3, **masks),
        "score_distillation": score_distillation(*pair, scores=scores, **temperatures, **hard, **masks),
        "distillation": distillation(*pair, **teacher, **temperatures, **masks),
    }


def found(part, group=None):
    """{name: (loss, gradient of the queries, of the targets)}."""
    answers = {}
    for name in ("cosent", "score_distillation", "distillation"):
        leaves = {side: inputs()[side][part].clone().requires_grad_() for side in ("query", "target")}
        loss = losses(part, leaves, group)[name]
        loss.backward()
        answers[name] = (loss.item(), *(leaf.grad.numpy().copy() for leaf in leaves.values()))
    return answers


def temperatures(part, group=None):
    """(loss, gradient of the log-temperatures) of rows with temperatures of their own."""
    module, x = RowTemperatures(("a", "b"), 0.2).double(), inputs()
    of = torch.tensor([0, 0, 1, 0, 1, 1, 1, 1])[part]
    loss = module(x["query"][part], x["target"][part], temperature_of=of, normalize=True, group=group)
    loss.backward()
    return loss.item(), module.log_temperature.grad.numpy().copy()


def _rank(rank, port, queue):
    join(rank, port)
    torch.distributed.init_process_group("gloo")
    for name, values in found(slice(4 * rank, 4 * rank + 4), torch.distributed.group.WORLD).items():
        queue.put((rank, name, *values))
    queue.put((rank, "temperatures", *temperatures(slice(4 * rank, 4 * rank + 4), torch.distributed.group.WORLD)))
    torch.distributed.destroy_process_group()


def test_two_ranks_are_one_process():
    whole, ranks = found(slice(0, N)), collected(_rank, each=4)
    for name, (loss, *gradients) in whole.items():
        for rank in range(2):
            got, *shards = ranks[name, rank]
            assert got == pytest.approx(loss, rel=1e-11), name
            for shard, gradient in zip(shards, gradients):
                mine = torch.from_numpy(gradient)[4 * rank : 4 * rank + 4]
                torch.testing.assert_close(torch.from_numpy(shard), 2 * mine, rtol=1e-9, atol=1e-12, msg=f"{name}, rank {rank}")
    loss, gradient = temperatures(slice(0, N))
    assert all(ranks["temperatures", rank][0] == pytest.approx(loss, rel=1e-11) for rank in range(2))
    mean = sum(torch.from_numpy(ranks["temperatures", rank][1]) for rank in range(2)) / 2
    torch.testing.assert_close(mean, torch.from_numpy(gradient), rtol=1e-9, atol=1e-12)
