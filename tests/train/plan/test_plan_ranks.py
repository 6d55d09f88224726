"""The plan of a run of several ranks against two gloo ranks: live bytes of each, as trained by DDP or sharded by FSDP2.

Both ranks take the same rows, as the plan has it.
"""

import gc
import shutil
import traceback

import pytest
import torch

from contrastive_kernels.gradcache import gradient_sync
from tests.helpers.processes import collected, join
from tests.helpers.tiny_recipe import write_recipe
from train.build import build_model
from train.plan.batch import first_batch
from train.plan.live_bytes import LiveBytes
from train.plan.simulate import simulate
from train.recipe.schema import load_recipe
from train.step import ContrastiveStep

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LORA = {"lora": {"r": 4, "alpha": 8, "dropout": 0.1, "dora": False}}
# name: (bytes of a bucket of the synchronisation, changes of the recipe)
CASES = {
    "ddp": (2**26, {}),
    "ddp, several buckets": (20_000, {}),
    "ddp, one gradient above a bucket": (1000, {}),
    "ddp, vision frozen": (2**26, {"freeze_vision": True, "retain": 1}),
    "ddp, adapter": (2000, LORA),
    "fsdp": (2**26, {"distributed": "fsdp"}),
    "fsdp, graphs kept": (2**26, {"distributed": "fsdp", "retain": "all"}),
    "fsdp, checkpointing": (2**26, {"distributed": "fsdp", "gradient_checkpointing": True}),
    "fsdp, vision frozen": (2**26, {"distributed": "fsdp", "freeze_vision": True}),
    "fsdp, adapter": (2**26, {"distributed": "fsdp", **LORA}),
}


def recipe_of(root, name):
    changes = CASES[name][1]
    return load_recipe(write_recipe(root, output=str(root / "o"), global_batch=16, chunk_tokens=100, **changes))


def rank_main(rank, port, root, queue):
    try:
        join(rank, port)
        import accelerate

        accelerate.PartialState(cpu=True)
        measured(root / f"rank{rank}", "ddp")  # what libraries keep from their first use on
        for name in CASES:
            queue.put((rank, name, *measured(root / f"rank{rank}", name)))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        queue.put((rank, "failed", traceback.format_exc(), None))
        raise


def measured(root, name) -> tuple[int, dict]:
    """Least peak of live bytes of the second to fifth step: gloo's threads may let go of a tensor late, and only add to it."""
    from train.parallel import sharding

    gradient_sync._BUCKET_BYTES = CASES[name][0]
    recipe = recipe_of(root, name)
    model = build_model(recipe, device="cpu").train()
    is_sharded = recipe.distributed == "fsdp"
    if is_sharded:
        sharding.shard(model)
    batches = [first_batch(recipe, model.processing, 2) for _ in range(5)]
    peaks = []
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        wrapped = model if is_sharded else torch.nn.parallel.DistributedDataParallel(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        step = ContrastiveStep(recipe, wrapped, model, device=torch.device("cpu"), world_size=2)
        for batch in batches:
            gc.collect()  # what stands in circles goes when Python pleases
            live.restart_peak()
            step(batch)
            if is_sharded:
                sharding.gradient_norm(trained, 1.0)
            else:
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            peaks.append((live.peak, dict(live.at_peak)))
    return min(peaks[1:], key=lambda peak: peak[0])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planned_ranks")
    write_recipe(folder)
    for rank in range(2):  # a recipe file is written by each process
        shutil.copytree(folder / "model", folder / f"rank{rank}" / "model")
        shutil.copy(folder / "data.yaml", folder / f"rank{rank}")
    return folder


@pytest.fixture(scope="module")
def peaks(root):
    return collected(rank_main, root, each=len(CASES))


@pytest.mark.parametrize("name", CASES)
def test_predicted_peak_is_that_of_each_rank(root, peaks, monkeypatch, name):
    monkeypatch.setattr(gradient_sync, "_BUCKET_BYTES", CASES[name][0])
    recipe = recipe_of(root, name)
    plan = simulate(recipe, None, ranks=2, make_batch=lambda processing: first_batch(recipe, processing, 2), flash=False, most_chunks=1000)
    assert not torch.distributed.is_initialized()
    for rank in range(2):
        peak, parts = peaks[name, rank]
        assert 1.0 <= plan.peak / peak <= 1.02, (plan.peak, plan.parts, peak, parts)
