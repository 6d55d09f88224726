"""GradCache over 2 and 4 gloo ranks: after DDP's or FSDP2's mean, the gradients are those of the whole batch.

All cases of a number of ranks share their processes: starting them costs more than the cases do.
"""

import queue as queue_module

import pytest
import torch.multiprocessing as mp

from tests.helpers.versions import LACKS_RESET_ITER_STATE, needs_reset_iter_state
from tests.workers import gradcache_worker
from tests.workers.gradcache_worker import Case

SHARDED = {"wrapper": "fsdp"}
BARE = {"wrapper": "fsdp", "bare_root": True}

EXACT = {
    2: {
        "ddp, unequal": Case(unequal=True),
        "ddp, unequal, retain 1, dropout": Case(unequal=True, retain=1, dropout=0.4),
        "ddp, retain all, frozen": Case(retain="all", frozen=True),
        "ddp, frozen, nothing kept, dropout": Case(frozen=True, keep_mib=0.0, dropout=0.4),
        "ddp, hard negatives": Case(hard=True, unequal=True),
        "ddp, one row a chunk": Case(budget=1, retain=3),
        "ddp, one chunk": Case(budget=1000),
        "ddp, two towers": Case(towers=2, unequal=True, retain=1),
        "ddp, two towers, hard negatives, dropout": Case(towers=2, hard=True, dropout=0.4),
        "ddp, learned temperature": Case(learned="temperature", unequal=True),
        "ddp, loss module": Case(learned="module", towers=2),
        "ddp, loss closure": Case(learned="closure"),
        "fsdp, unequal": Case(**SHARDED, unequal=True),  # rank 1 has fewer chunks and runs dummies
        "fsdp, unequal, retain 1": Case(**SHARDED, unequal=True, retain=1),
        "fsdp, unequal, retain all": Case(**SHARDED, unequal=True, retain="all"),
        "fsdp, unequal, the last backward a dummy's": Case(**SHARDED, unequal=True, retain=4),
        "fsdp, retain 1, dropout": Case(**SHARDED, retain=1, dropout=0.4),
        "fsdp, unequal, dropout": Case(**SHARDED, unequal=True, dropout=0.4),
        "fsdp, frozen, features kept": Case(**SHARDED, frozen=True),
        "fsdp, frozen, nothing kept, dropout": Case(**SHARDED, frozen=True, keep_mib=0.0, dropout=0.4),
        "fsdp, frozen, retain all": Case(**SHARDED, frozen=True, retain="all", unequal=True),
        "fsdp, hard negatives": Case(**SHARDED, hard=True, unequal=True),
        "fsdp, one row a chunk": Case(**SHARDED, budget=1, retain=3),
        "fsdp, one chunk": Case(**SHARDED, budget=1000),
        "fsdp, bare root, the last backward a dummy's": Case(**BARE, unequal=True, retain=4),
        "fsdp, bare root": Case(**BARE, unequal=True, retain=1),
        "fsdp, the root holds all": Case(**SHARDED, parts=()),
        "fsdp, two towers, unequal": Case(**SHARDED, towers=2, unequal=True, retain=1),
        "fsdp, two towers, hard negatives": Case(**SHARDED, towers=2, hard=True, dropout=0.4),
        "fsdp, two towers, retain all": Case(**SHARDED, towers=2, retain="all", unequal=True),
        "fsdp, learned temperature": Case(**SHARDED, learned="temperature", unequal=True),
        "fsdp, loss module": Case(**SHARDED, learned="module", towers=2),
    },
    4: {
        "ddp, unequal": Case(unequal=True, hard=True, retain=1),
        "ddp, retain 1": Case(retain=1),  # ranks 1 to 3 hold text alone: `vision` is unused there
        "ddp, two towers, learned": Case(towers=2, learned="temperature", unequal=True, dropout=0.4),
        "fsdp, unequal": Case(**SHARDED, unequal=True),
        "fsdp, unequal, retain 1": Case(**SHARDED, unequal=True, retain=1, dropout=0.4),
        "fsdp, unequal, retain all": Case(**SHARDED, unequal=True, retain="all", hard=True),
        "fsdp, frozen": Case(**SHARDED, frozen=True, unequal=True),
        "fsdp, two towers, learned": Case(**SHARDED, towers=2, unequal=True, learned="module"),
    },
}
# Out of memory on one rank alone, in chunks of more than two rows. With a budget of 9 a chunk holds four rows at most.
FAULTS = {
    2: {
        **{
            f"ddp, {where}": Case(fault=(1, where, "second"), learned="temperature", dropout=0.4)
            for where in ("first", "second", "backward")
        },
        **{
            f"fsdp, {where}, {block}, retain {retain}": Case(**SHARDED, fault=(1, where, block), retain=retain, learned="temperature")
            for where in ("first", "second", "backward")
            for block in ("first", "second", "head")
            for retain in (0, 1, "all")
            if not (where == "first" and retain == "all")  # every chunk has its graph
        },
        "fsdp, second, bare root": Case(**BARE, fault=(1, "second", "second"), retain=1),
        "fsdp, backward, bare root": Case(**BARE, fault=(0, "backward", "second"), retain=1),
        "fsdp, backward, unequal": Case(**SHARDED, unequal=True, fault=(1, "backward", "first"), dropout=0.4),
        "fsdp, backward, one chunk": Case(**SHARDED, budget=16, limit=4, fault=(1, "backward", "second"), retain="all"),
        "fsdp, backward, frozen": Case(**SHARDED, frozen=True, fault=(0, "backward", "second")),
        "fsdp, backward, two towers": Case(**SHARDED, towers=2, hard=True, fault=(1, "backward", "second"), retain=1),
        "fsdp, first, two towers": Case(**SHARDED, towers=2, unequal=True, fault=(0, "first", "head")),
    },
    4: {
        "ddp, second": Case(fault=(3, "second", "head")),
        "fsdp, first": Case(**SHARDED, fault=(2, "first", "second"), dropout=0.4),
        "fsdp, backward": Case(**SHARDED, fault=(3, "backward", "second"), retain=1),
    },
}
RAISING = {
    f"{wrapper}, {where}, {'again' if limit else 'gradients of earlier steps'}": Case(
        wrapper=wrapper, fault=(1, where, "second"), limit=limit
    )
    for wrapper in ("ddp", "fsdp")
    for where in ("first", "backward")
    for limit in (1, 0)
    if not (wrapper == "fsdp" and limit == 0)
}
AUTO = {
    "ddp": Case(),
    "fsdp": Case(**SHARDED, frozen=True),
    "fsdp, no room to measure on one rank": Case(**SHARDED, frozen=True, fault=(1, "second", "second"), limit=3, times=4),
}


def recovers_sharded(case):
    """Whether a sharded rank runs out of memory in it."""
    return case.wrapper == "fsdp" and case.fault is not None


def all_cases(world_size):
    checked = EXACT[world_size] | {f"out of memory: {name}": case for name, case in FAULTS[world_size].items()}
    cases = {("check", name): ("check", case) for name, case in checked.items()}
    if world_size == 2:
        cases |= {("raises", name): ("raises", case) for name, case in RAISING.items()}
        cases |= {("auto", name): ("auto", case) for name, case in AUTO.items()}
        cases["refusals"] = ("refusals", Case())
    # ranks share their processes: what stops one of them would take every later case along
    return {key: (kind, case) for key, (kind, case) in cases.items() if not (LACKS_RESET_ITER_STATE and recovers_sharded(case))}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By number of ranks, made when they are first asked for: {(case, rank): (seen, error)}."""
    made = {}

    def of(world_size):
        if world_size not in made:
            made[world_size] = run_ranks(tmp_path_factory.mktemp("ranks"), world_size)
        return made[world_size]

    return of


def run_ranks(folder, world_size):
    context, cases = mp.get_context("forkserver"), all_cases(world_size)
    # One server for all tests of a run; what cannot be imported, as tests/train's where that is not collected, is passed over.
    context.set_forkserver_preload(["gradcache_worker", "preloaded"])
    queue = context.Queue()
    arguments = (world_size, folder / "store", cases, queue)
    processes = [context.Process(target=gradcache_worker.run, args=(rank, *arguments)) for rank in range(world_size)]
    for process in processes:
        process.start()
    found = {}
    try:
        while len(found) < world_size * len(cases):
            rank, name, seen, error = queue.get(timeout=120)
            found[name, rank] = seen, error
            if error is not None:
                break
    except queue_module.Empty:
        pass  # the cases that are missing say so
    finally:
        for process in processes:
            process.kill()
    return found


def seen(results, world_size, key):
    found = results(world_size)
    for rank in range(world_size):
        assert (key, rank) in found, f"rank {rank} did not come to it"
        assert found[key, rank][1] is None, f"rank {rank}: {found[key, rank][1]}"
    return [found[key, rank][0] for rank in range(world_size)]


def marked(case):
    return [needs_reset_iter_state] if recovers_sharded(case) else []


def parametrised(table):
    cases = [(n, name, case) for n, named in table.items() for name, case in named.items()]
    return pytest.mark.parametrize("world_size,name", [pytest.param(n, name, marks=marked(case)) for n, name, case in cases])


def parametrised_by_name(cases):
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marked(case)) for name, case in cases.items()])


@parametrised(EXACT)
def test_gradients_are_those_of_kept_graphs_and_of_the_whole_batch(results, world_size, name):
    case = EXACT[world_size][name]
    by_rank = seen(results, world_size, ("check", name))
    if case.wrapper == "fsdp":
        assert len({(rank["chunks"], rank["kept"]) for rank in by_rank}) == 1, "every rank makes as many passes"
        groups = (len(case.parts) - case.frozen * ("vision" in case.parts) + (not case.bare_root)) * case.towers
        assert by_rank[-1]["ends on a dummy"] == ("the last backward a dummy's" in name)
        assert all(rank["reductions"] == groups for rank in by_rank), "one reduction per sharded group and step"
    elif case.unequal:
        assert by_rank[0]["chunks"] > by_rank[1]["chunks"], "no dummies where nothing is collective"


@parametrised(FAULTS)
def test_out_of_memory_on_one_rank_is_undone_on_all(results, world_size, name):
    case = FAULTS[world_size][name]
    by_rank = seen(results, world_size, ("check", f"out of memory: {name}"))
    assert [rank["struck"] > 0 for rank in by_rank] == [rank == case.fault[0] for rank in range(world_size)]


@parametrised_by_name(RAISING)
def test_out_of_memory_that_cannot_be_mended_is_raised_on_every_rank(results, name):
    assert [rank["budget"] for rank in seen(results, 2, ("raises", name))] == [4 if RAISING[name].limit else 9] * 2


@parametrised_by_name(AUTO)
def test_auto_keeps_the_same_chunks_on_every_rank(results, name):
    struck = [rank["struck"] for rank in seen(results, 2, ("auto", name))]
    assert struck == [0, 4 if AUTO[name].fault else 0]


def test_what_cannot_be_synchronised_is_refused(results):
    seen(results, 2, "refusals")
