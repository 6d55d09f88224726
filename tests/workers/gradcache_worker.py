"""What one rank of the GradCache tests runs: cases of wrappers, chunks and failures, each against float64 truth.

Truth twice: one backward through the same chunks with every graph kept, averaged over the ranks by hand; and, without
dropout, one process on the whole batch.
"""

import contextlib
import os
import traceback
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from contrastive_kernels import GradCache, InfoNCELoss, info_nce
from contrastive_kernels.gradcache.observer import CHUNK_BACKWARD
from contrastive_kernels.gradcache.retention import counting_saved

ROWS, WIDTH = 16, 10


@dataclass
class Case:
    """`fault`: (rank, pass, block): chunks of more than `limit` rows run out of memory there; passes are "first" (a forward
    without a graph), "second" (with one) and "backward". `parts`: modules sharded one by one; the root keeps the rest."""

    wrapper: str = "ddp"
    unequal: bool = False  # the first rank has more chunks
    retain: int | str = 0
    retain_mib: float | None = None
    budget: int = 9
    frozen: bool = False
    keep_mib: float = 1.0
    dropout: float = 0.0
    hard: bool = False
    towers: int = 1
    learned: str | None = None  # "temperature", "module" or "closure"
    parts: tuple[str, ...] = ("first", "second", "vision", "head")
    bare_root: bool = False  # the root has no parameters of its own
    fault: tuple[int, str, str] | None = None
    limit: int = 2
    times: int = 1000  # that the fault strikes
    pictures: bool = True


@dataclass
class Fault:
    """Shared by the towers of a rank; how often it struck is for the test to see."""

    where: tuple[str, str] | None = None
    limit: int = ROWS
    times: int = 0
    struck: int = 0

    def pass_through(self, block, hidden):
        if self.where is None or self.where[1] != block or len(hidden) <= self.limit or self.struck == self.times:
            return hidden
        if self.where[0] == ("second" if torch.is_grad_enabled() else "first"):
            self.strike()
        if self.where[0] == "backward" and hidden.requires_grad:
            hidden = hidden * 1.0
            hidden.register_hook(lambda gradient: self.strike())
        return hidden

    def strike(self):
        self.struck += 1
        raise torch.OutOfMemoryError("no room")


class Tower(nn.Module):
    """Rows of text use `first`, `second` and `head`, rows with a picture `vision` too: a chunk of text leaves it unused.

    Not so with `always_vision`: a sharded module's forward is collective, so under FSDP2 a chunk of text runs `vision` on a
    placeholder that adds nothing.
    """

    def __init__(self, dropout, bare_root, always_vision=False):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, WIDTH), nn.Tanh())
        self.vision = nn.Sequential(nn.Linear(4, WIDTH), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Dropout(dropout))
        self.head = nn.Linear(WIDTH, 5)
        self.offset = None if bare_root else nn.Parameter(torch.randn(WIDTH))
        self.always_vision = always_vision
        self.fault = Fault()
        self.double()

    def look(self, pictures):
        """(picture rows, their features)."""
        present = ~torch.isnan(pictures[:, 0])
        return self.vision(pictures[present])

    def forward(self, texts, pictures, features=None):
        hidden = self.fault.pass_through("first", self.first(texts))
        present = ~torch.isnan(pictures[:, 0])
        if present.any():
            features = self.look(pictures) if features is None else features
            hidden = hidden.index_add(0, present.nonzero()[:, 0], features)
        elif self.always_vision:
            hidden = hidden + 0 * self.vision(torch.zeros_like(pictures[:1]))
        hidden = hidden if self.offset is None else hidden + self.offset
        hidden = self.fault.pass_through("second", self.second(hidden))
        return self.fault.pass_through("head", self.head(hidden))


def make_towers(case, always_vision=False):
    torch.manual_seed(0)
    towers = [Tower(case.dropout, case.bare_root, always_vision) for _ in range(case.towers)]
    if case.frozen:
        for tower in towers:
            tower.vision.requires_grad_(False)
    return nn.ModuleList(towers)


def make_batch(case):
    """Sides of (texts, pictures, lengths), and the offsets of the hard negatives, any number a row, none included."""
    generator = torch.Generator().manual_seed(5)
    offsets = torch.cumsum(torch.tensor([0] + [(0, 2, 1)[i % 3] for i in range(ROWS)]), 0)
    sides = []
    for side in range(3):
        count = ROWS if side < 2 else int(offsets[-1])
        texts = torch.randn(count, 6, generator=generator, dtype=torch.float64)
        pictures = torch.randn(count, 4, generator=generator, dtype=torch.float64)
        pictures[3 + side if case.pictures else 0 :] = float("nan")  # only the first rank holds pictures
        # Long rows on the first rank alone: it needs more chunks than the others under one token budget.
        sides.append((texts, pictures, [7 if case.unequal and row < 3 else 2 for row in range(count)]))
    return sides, offsets


def shard(batch, rank, world_size):
    sides, offsets = batch
    rows = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    hard = slice(int(offsets[rows.start]), int(offsets[rows.stop]))
    parts = [rows, rows, hard]
    own = [(texts[p], pictures[p], lengths[p]) for (texts, pictures, lengths), p in zip(sides, parts, strict=True)]
    return own, offsets[rows.start : rows.stop + 1] - offsets[rows.start]


class Learned:
    """A temperature that is learned outside the encoder, one way or another."""

    def __init__(self, case):
        self.kind = case.learned
        self.loss = None
        self.leaf = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64)) if self.kind in ("temperature", "closure") else None
        if self.kind == "module":
            self.loss = InfoNCELoss(temperature=0.1, learnable_temperature=True).double()
            self.leaf = self.loss.log_temperature
        elif self.kind == "closure":
            self.loss = lambda q, t, **options: info_nce(q, t, temperature=self.leaf.exp(), **options)

    def options(self):
        if self.kind is None:
            return {"temperature": 0.1}
        return {"temperature": self.leaf.exp()} if self.kind == "temperature" else {}


def named_gradients(towers, learned):
    found = {}
    for name, parameter in towers.named_parameters():
        gradient = parameter.grad
        if gradient is not None:
            found[name] = (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()
    if learned.leaf is not None:
        found["learned"] = learned.leaf.grad.clone()
    return found


def whole_batch(case):
    """One process, everything at once."""
    towers, learned = make_towers(case), Learned(case)
    sides, offsets = make_batch(case)
    encoded = [towers[min(side, case.towers - 1)](texts, pictures) for side, (texts, pictures, _) in enumerate(sides)]
    options = {"hard_negatives": encoded[2], "hard_offsets": offsets} if case.hard else {}
    loss = (learned.loss or info_nce)(encoded[0], encoded[1], normalize=True, **options, **learned.options())
    loss.backward()
    return loss.item(), named_gradients(towers, learned)


def kept_graphs(case, chunks, batch):
    """The same chunks, every graph kept, one backward; the mean over the ranks taken by hand."""
    sides, offsets = batch
    towers, learned = make_towers(case, case.wrapper == "fsdp"), Learned(case)
    torch.manual_seed(7 + dist.get_rank())
    embeddings = [torch.zeros(len(texts), 5, dtype=torch.float64) for texts, _, _ in sides]
    for chunk in chunks:
        texts, pictures, _ = sides[chunk.side]
        encoded = towers[min(chunk.side, case.towers - 1)](texts[chunk.rows], pictures[chunk.rows])
        if not chunk.is_dummy:
            embeddings[chunk.side] = embeddings[chunk.side].index_copy(0, torch.tensor(chunk.rows), encoded)
    options = {"hard_negatives": embeddings[2], "hard_offsets": offsets} if case.hard else {}
    loss = (learned.loss or info_nce)(*embeddings[:2], normalize=True, group=dist.group.WORLD, **options, **learned.options())
    loss.backward()
    leaves = [p for p in towers.parameters() if p.requires_grad] + ([learned.leaf] if learned.leaf is not None else [])
    for leaf in leaves:
        leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        dist.all_reduce(leaf.grad)
        leaf.grad /= dist.get_world_size()
    return loss.item(), named_gradients(towers, learned)


def wrap(case, towers):
    if case.wrapper == "ddp":
        return [nn.parallel.DistributedDataParallel(tower) for tower in towers]
    wrapped = []
    for tower in towers:
        # A frozen vision tower stays whole on every rank, as train/ leaves it.
        whole = set(tower.vision.parameters()) if case.frozen else set()
        for name in case.parts:
            if not (case.frozen and name == "vision"):
                fully_shard(getattr(tower, name))
        wrapped.append(fully_shard(tower, ignored_params=whole))
        tower.always_vision = not case.frozen
    return wrapped


class Prepared:
    """A case on this rank, ready to step."""

    def __init__(self, case, rank, world_size):
        self.case, self.learned = case, Learned(case)
        self.batch = shard(make_batch(case), rank, world_size)
        self.towers = make_towers(case)
        self.fault = Fault(times=case.times)
        for tower in self.towers:
            tower.fault = self.fault
        wrapped = wrap(case, self.towers)
        encoders = [lambda inputs, rows, features=None, m=m: m(inputs[0][rows], inputs[1][rows], features) for m in wrapped]
        frozen = [lambda inputs, rows, t=t: t.look(inputs[1][rows]) for t in self.towers]
        self.cache = GradCache(
            encoders[0] if case.towers == 1 else tuple(encoders),
            self.learned.loss,
            chunk_tokens=case.budget,
            retain=case.retain,
            retain_mib=case.retain_mib,
            freeze=(frozen[0] if case.towers == 1 else tuple(frozen)) if case.frozen else None,
            keep_mib=case.keep_mib,
            module=wrapped[0] if case.towers == 1 else wrapped,
            observer=self.watched,
        )
        sides, offsets = self.batch
        self.given = sides if case.hard else sides[:2]
        self.options = {"hard_negatives": sides[2], "hard_offsets": offsets} if case.hard else {}
        self.kept, self.dummies = [], []

    def watched(self, phase):
        if phase.name == CHUNK_BACKWARD:
            self.kept.append(phase.retains_graph)
            self.dummies.append(phase.is_dummy)
        return contextlib.nullcontext()

    @property
    def lengths(self):
        return tuple(lengths for _, _, lengths in self.given)

    def step(self):
        torch.manual_seed(7 + dist.get_rank())
        self.kept.clear()
        for leaf in [*self.towers.parameters(), *([self.learned.leaf] if self.learned.leaf is not None else [])]:
            leaf.grad = None
        sides = self.given
        result = self.cache.step(
            sides[0], sides[1], lengths=self.lengths, normalize=True, group=dist.group.WORLD, **self.options, **self.learned.options()
        )
        return result.loss.item(), named_gradients(self.towers, self.learned)


def same(found, truth, what):
    assert abs(found[0] - truth[0]) < 1e-12, f"{what}: loss {found[0]}, not {truth[0]}"
    assert found[1].keys() == truth[1].keys(), f"{what}: {sorted(found[1].keys() ^ truth[1].keys())}"
    for name, gradient in truth[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-10, atol=1e-10, msg=f"{what}: {name}")


def check(case, rank, world_size):
    """Two steps, so that what a step leaves behind does not spoil the next; returns what the test wants to see."""
    prepared = Prepared(case, rank, world_size)
    if case.fault is not None and case.fault[0] == rank:
        prepared.fault.where, prepared.fault.limit = case.fault[1:], case.limit
    steps, reductions = [], count_reductions()
    for _ in range(2):
        before = reductions["count"]
        steps.append(prepared.step())
        seen = {"reductions": reductions["count"] - before, "kept": sum(prepared.kept), "chunks": len(prepared.kept)}
        seen["ends on a dummy"] = prepared.dummies[-1]
    halved = case.budget // 2 if case.fault is not None else case.budget
    assert prepared.cache.chunk_tokens == halved, f"a budget of {prepared.cache.chunk_tokens}"
    for index, found in enumerate(steps):
        same(found, kept_graphs(case, prepared.cache.chunks(prepared.lengths), prepared.batch), f"step {index + 1}, kept graphs")
        if case.dropout == 0:
            same(found, whole_batch(case), f"step {index + 1}, whole batch")
    reductions["restore"]()
    return seen | {"struck": prepared.fault.struck}


def raises_everywhere(case, rank, world_size):
    """A rank without room for a single row: all ranks say so, none is left waiting."""
    prepared = Prepared(case, rank, world_size)
    if case.fault[0] == rank:
        prepared.fault.where, prepared.fault.limit = case.fault[1:], 1
    for tower in prepared.towers if case.limit == 0 else ():
        for parameter in tower.parameters():
            parameter.grad = torch.ones_like(parameter)  # of an earlier step
    try:
        sides = prepared.given
        prepared.cache.step(*sides, lengths=prepared.lengths, normalize=True, group=dist.group.WORLD, temperature=0.1)
    except torch.OutOfMemoryError as error:
        message = str(error)
    assert ("no room" if case.fault[0] == rank else "another rank") in message and "lower chunk_tokens" in message, message
    assert ("halved already" if case.limit else "earlier steps") in message, message
    return {"budget": prepared.cache.chunk_tokens}


def auto_keeps_what_fits(case, rank, world_size):
    """Ranks with unequal room agree on the smaller number, and it is what the graphs' bytes allow."""
    case = replace(case, pictures=False)  # chunks of one size
    plain = Prepared(replace(case, wrapper="ddp"), rank, world_size)
    tower, sides = plain.towers[0], plain.given
    tower.always_vision = case.wrapper == "fsdp"
    sizes = []
    for chunk in plain.cache.chunks(plain.lengths):
        with counting_saved() as saved:
            graph = tower(sides[chunk.side][0][chunk.rows], sides[chunk.side][1][chunk.rows])
        sizes.append(saved.bytes)
        del graph
    room = sum(sizes[-3:]) + sizes[-4] / 2 if rank == 0 else 10 * sum(sizes)
    prepared = Prepared(replace(case, retain="auto", retain_mib=room / 2**20), rank, world_size)
    if case.fault is not None and case.fault[0] == rank:
        prepared.fault.where, prepared.fault.limit = case.fault[1:], case.limit
    truth = whole_batch(case)
    for _ in range(2):
        same(prepared.step(), truth, "auto")
        assert sum(prepared.kept) == (0 if case.fault else 3), f"{sum(prepared.kept)} kept"
    assert prepared.cache.chunk_tokens == case.budget
    return {"struck": prepared.fault.struck}


def refusals(case, rank, world_size):
    """What cannot be synchronised is refused on every rank, with the mend."""
    alone = [dist.new_group([r]) for r in range(world_size)][rank]
    wrapped = [nn.parallel.DistributedDataParallel(nn.Linear(2, 2), process_group=group) for group in (alone, dist.group.WORLD)]
    refused(lambda: GradCache(len, chunk_size=1, module=wrapped), "one process group")
    prepared = Prepared(case, rank, world_size)
    sides, lengths = prepared.given, prepared.lengths
    temperature = fully_shard(nn.Linear(1, world_size, bias=False)).weight.sum()
    refused(lambda: prepared.cache.step(*sides, lengths=lengths, temperature=temperature), "ignored_params")
    temperature = torch.tensor(0.1, dtype=torch.float64, requires_grad=rank == 0)
    refused(lambda: prepared.cache.step(*sides, lengths=lengths, normalize=True, temperature=temperature), "got 0 to 1 of them")
    return {}


def refused(call, words):
    try:
        call()
    except ValueError as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"not refused: {words}")


def count_reductions():
    """Counts the reduce-scatters of this process, which is how FSDP2 synchronises gradients."""
    names = [name for name in ("reduce_scatter_single", "reduce_scatter_tensor") if hasattr(dist, name)]
    originals = {name: getattr(dist, name) for name in names}
    counter = {"count": 0}

    def counted(original):
        def call(*args, **kwargs):
            counter["count"] += 1
            return original(*args, **kwargs)

        return call

    for name in names[:1]:
        setattr(dist, name, counted(originals[name]))
    counter["restore"] = lambda: [setattr(dist, name, original) for name, original in originals.items()]
    return counter


CHECKS = {"check": check, "raises": raises_everywhere, "auto": auto_keeps_what_fits, "refusals": refusals}


def run(rank, world_size, address, cases, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    for name, (kind, case) in cases.items():
        try:
            queue.put((rank, name, CHECKS[kind](case, rank, world_size), None))
        except BaseException:
            queue.put((rank, name, None, traceback.format_exc()))
            break  # the others wait in a collective; the test ends them
    else:
        dist.barrier()
    queue.close()
    queue.join_thread()
    os._exit(0)  # gloo's threads may abort a process whose peer left first
