"""GradCache over 2 and 4 gloo ranks: after DDP's or FSDP2's mean, the gradients are those of the whole batch."""

import os
import queue as queue_module
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from contrastive_kernels import GradCache, info_nce

ROWS = 8


class Tower(nn.Module):
    """Text rows use `text` alone, rows with a picture `vision` too: a chunk of text leaves `vision` unused.

    Not so with `always_vision`: a sharded module's forward is collective, so under FSDP2 a chunk of text runs `vision` on a
    placeholder that adds nothing.
    """

    def __init__(self, always_vision=False):
        super().__init__()
        self.always_vision = always_vision
        self.text = nn.Sequential(nn.Linear(6, 10), nn.Tanh())
        self.vision = nn.Sequential(nn.Linear(4, 10), nn.Tanh())
        self.head = nn.Linear(10, 5)
        self.double()

    def forward(self, texts, pictures):
        hidden = self.text(texts)
        present = ~torch.isnan(pictures[:, 0])
        if present.any():
            hidden = hidden.index_add(0, present.nonzero()[:, 0], self.vision(pictures[present]))
        elif self.always_vision:
            hidden = hidden + 0 * self.vision(torch.zeros_like(pictures[:1]))
        return self.head(hidden)


def make_batch(unequal):
    generator = torch.Generator().manual_seed(5)
    sides = []
    for side in range(2):
        texts = torch.randn(ROWS, 6, generator=generator, dtype=torch.float64)
        pictures = torch.randn(ROWS, 4, generator=generator, dtype=torch.float64)
        pictures[2 + side :] = float("nan")  # only the first ranks hold pictures
        # Long rows on rank 0 alone: it needs more chunks than the others under one token budget.
        lengths = [9 if unequal and row < 2 else 2 for row in range(ROWS)]
        sides.append((texts, pictures, lengths))
    return sides


def truth(unequal):
    torch.manual_seed(0)
    tower = Tower()
    (qt, qp, _), (tt, tp, _) = make_batch(unequal)
    loss = info_nce(tower(qt, qp), tower(tt, tp), normalize=True, temperature=0.1)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in tower.named_parameters()}


def rank_main(rank, world_size, address, wrapper, unequal, retain, frozen, queue):
    try:
        dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
        torch.set_num_threads(1)
        torch.manual_seed(0)
        tower = Tower(always_vision=wrapper == "fsdp")
        if frozen:
            tower.vision.requires_grad_(False)
        if wrapper == "ddp":
            model = nn.parallel.DistributedDataParallel(tower)
        else:
            from torch.distributed.fsdp import fully_shard

            for part in (tower.text, tower.vision, tower.head):
                fully_shard(part)
            model = fully_shard(tower)
        calls = []
        reductions = count_reductions()
        share = ROWS // world_size
        mine = slice(rank * share, (rank + 1) * share)
        (qt, qp, ql), (tt, tp, tl) = make_batch(unequal)

        def encode(inputs, rows):
            calls.append(rows)
            return model(inputs[0][rows], inputs[1][rows])

        cache = GradCache(encode, chunk_tokens=9, retain=retain, module=model)
        result = cache.step(
            (qt[mine], qp[mine]),
            (tt[mine], tp[mine]),
            lengths=(ql[mine], tl[mine]),
            normalize=True,
            temperature=0.1,
            group=dist.group.WORLD,
        )
        gradients = {}
        for name, parameter in tower.named_parameters():
            gradient = parameter.grad
            if gradient is not None:
                gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
                gradients[name] = gradient.numpy().copy()
        queue.put((rank, result.loss.item(), gradients, len(calls), reductions["count"]))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        queue.put((rank, traceback.format_exc(), None, None, None))
        raise


def count_reductions():
    """Counts the reduce-scatters of this process, which is how FSDP2 synchronises gradients."""
    counter = {"count": 0}
    original = dist.reduce_scatter_tensor

    def counted(*args, **kwargs):
        counter["count"] += 1
        return original(*args, **kwargs)

    dist.reduce_scatter_tensor = counted
    return counter


def run_ranks(tmp_path, world_size, wrapper, unequal=False, retain=0, frozen=False):
    context = mp.get_context("spawn")
    queue = context.Queue()
    address = os.path.join(tmp_path, "rendezvous")
    arguments = (world_size, address, wrapper, unequal, retain, frozen, queue)
    processes = [context.Process(target=rank_main, args=(rank, *arguments)) for rank in range(world_size)]
    for process in processes:
        process.start()
    try:
        results = sorted(queue.get(timeout=120) for _ in range(world_size))
    except queue_module.Empty:
        pytest.fail(f"a rank ended without a word: exit codes {[process.exitcode for process in processes]}")
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    for result in results:
        assert result[2] is not None, result[1]
    return results


@pytest.mark.parametrize(
    "world_size,wrapper,unequal,retain,frozen",
    [
        (2, "ddp", True, 0, False),
        (4, "ddp", False, 1, False),  # ranks 2 and 3 hold text alone: `vision` is unused there
        (2, "ddp", False, "all", True),
        (2, "fsdp", True, 0, False),  # rank 1 has fewer chunks and runs dummies
        (2, "fsdp", False, 1, False),
        (4, "fsdp", False, "all", False),
        (2, "fsdp", False, 0, True),
    ],
)
def test_gradients_are_those_of_the_whole_batch(tmp_path, world_size, wrapper, unequal, retain, frozen):
    loss, expected = truth(unequal)
    for rank, got_loss, gradients, calls, reductions in run_ranks(tmp_path, world_size, wrapper, unequal, retain, frozen):
        assert got_loss == pytest.approx(loss, abs=1e-12)
        assert set(gradients) == {n for n in expected if not (frozen and n.startswith("vision"))}
        for name, gradient in gradients.items():
            torch.testing.assert_close(torch.from_numpy(gradient), expected[name], rtol=1e-10, atol=1e-10, msg=f"rank {rank}: {name}")
        if wrapper == "fsdp":
            assert reductions <= 4, "at most one reduction per sharded group and step"
