"""Out of memory on one of two ranks in the middle of a Qwen2-VL: all ranks undo the step, sharded or not, and do it again.

All cases share one pair of processes: starting them costs more than the cases do.
"""

import logging
import traceback

import pytest
import torch

from tests.helpers.processes import collected, join
from tests.helpers.tiny_recipe import first_batch, gradients, write_recipe
from tests.helpers.versions import LACKS_RESET_ITER_STATE, needs_reset_iter_state
from train.build import build_model
from train.recipe.schema import load_recipe
from train.step import ContrastiveStep

LIMIT, BUDGET = 65, 130  # tokens that a chunk has room for, and may have at first
LORA = {"lora": {"r": 2, "vision": True, "dropout": 0.0}}
# name: (sharded, changes of the recipe, where rank 1 runs out of memory)
CASES = {
    "ddp, backward": (False, {}, "backward"),
    "fsdp, without a graph": (True, {}, "without a graph"),
    "fsdp, with a graph": (True, {}, "with a graph"),
    "fsdp, with a graph that is kept": (True, {"retain": "all"}, "with a graph"),
    "fsdp, backward": (True, {"retain": 1}, "backward"),
    "fsdp, checkpointing, backward": (True, {"gradient_checkpointing": True}, "recomputation"),
    "fsdp, checkpointing, vision adapter, backward": (True, {"gradient_checkpointing": True, **LORA}, "recomputation"),
    "fsdp, frozen vision, backward": (True, {"freeze_vision": True, "keep_mib": 0.0}, "backward"),
}
# ranks share their processes: what stops one of them would take every later case along
POSSIBLE = {name: case for name, case in CASES.items() if not (LACKS_RESET_ITER_STATE and case[0])}
COMMON = {"dtype": "float64", "global_batch": 8, "interleave_batch_size": 4, "chunk_tokens": BUDGET, "seed": 3}
STEP = 2  # the first rank's share is pictures, the second's texts


def prepare(root, changes):
    recipe = load_recipe(write_recipe(root, **COMMON | changes))
    torch.manual_seed(0)  # a fresh adapter is random
    model = build_model(recipe, device="cpu").train()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(p, 0.05)
    return recipe, model, first_batch(recipe, model, step=STEP)


def run_out_of_memory(model, where):
    """Makes the second decoder layer fail for chunks above the limit. Returns a list that grows with each failure."""
    layer, struck = model.model.language_model.layers[1].mlp, []

    def fail(*args):
        struck.append(where)
        raise torch.OutOfMemoryError("no room")

    def before(module, arguments):
        tokens = arguments[0].numel() // arguments[0].shape[-1]
        in_backward = torch._C._current_graph_task_id() != -1
        if tokens <= LIMIT:
            return
        if where == "backward" and arguments[0].requires_grad:
            arguments[0].register_hook(fail)
        elif where == ("recomputation" if in_backward else "with a graph" if torch.is_grad_enabled() else "without a graph"):
            fail()

    layer.register_forward_pre_hook(before)
    return struck


def rank_main(rank, port, root, queue):
    try:
        join(rank, port)
        logging.disable(logging.WARNING)
        import accelerate

        accelerate.PartialState(cpu=True)
        for name, case in POSSIBLE.items():
            queue.put((rank, name, *one_case(rank, root / f"rank{rank}", *case)))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        queue.put((rank, "failed", traceback.format_exc()))
        raise


def one_case(rank, root, is_sharded, changes, where):
    from train.parallel import sharding

    recipe, model, batch = prepare(root, changes)
    struck = run_out_of_memory(model, where) if rank == 1 else []
    wrapped = sharding.shard(model) if is_sharded else torch.nn.parallel.DistributedDataParallel(model)
    step = ContrastiveStep(recipe, wrapped, model, device=torch.device("cpu"), world_size=2)
    rows = slice(4 * rank, 4 * rank + 4)
    share = {key: batch[key][rows] for key in ("query", "target", "query_ids", "target_ids", "kept", "rows")}
    share |= {"negatives": [], "hard_offsets": batch["hard_offsets"][:5], "hard_ids": batch["hard_ids"], "errors": []}
    found = []
    for _ in range(2):  # what the failure left behind must not spoil the next step
        model.zero_grad(set_to_none=True)
        result, _ = step(share)
        whole = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients(model).items()}
        found.append((result.loss.item(), {name: g.numpy().copy() for name, g in whole.items()}))
    assert step.media._held == 0
    return len(struck), step.gradcache.chunk_tokens, found


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failures")
    for name in ("alone", "rank0", "rank1"):  # a recipe file is written by each process
        write_recipe(folder / name)
    return folder


@pytest.fixture(scope="module")
def results(root):
    return collected(rank_main, root, each=len(POSSIBLE))


@pytest.mark.parametrize("name", [pytest.param(name, marks=[needs_reset_iter_state] if case[0] else []) for name, case in CASES.items()])
def test_the_step_is_done_again_and_its_gradients_are_those_of_one_process(root, results, name):
    recipe, model, batch = prepare(root / "alone", CASES[name][1])
    result, _ = ContrastiveStep(recipe, model, model, device=torch.device("cpu"))(batch)
    expected = gradients(model)
    for rank in range(2):
        struck, budget, steps = results[name, rank]
        assert (struck > 0) == (rank == 1) and budget == BUDGET // 2
        for loss, found in steps:
            assert loss == pytest.approx(result.loss.item(), abs=1e-12)
            assert found.keys() == expected.keys()
            for parameter, gradient in expected.items():
                torch.testing.assert_close(
                    torch.from_numpy(found[parameter]), gradient, rtol=1e-10, atol=1e-10, msg=f"rank {rank}: {parameter}"
                )
