"""The trainer over two gloo ranks: gradients of DDP and FSDP2 are one process's, and an FSDP2 run saves and goes on.

All cases share one pair of processes: starting them costs more than the cases do.
"""

import gzip
import json
import shutil
import traceback

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.processes import collected, join
from tests.helpers.tiny_recipe import first_batch, gradients, write_recipe
from train.build import build_model
from train.losses import InfoNCE
from train.recipe.from_yaml import build
from train.recipe.schema import load_recipe
from train.step import ContrastiveStep

SUM = {
    "loss": [{"temperature": 0.1}, {"name": "sigmoid_loss", "scale": 5.0, "bias": -3.0, "weight": 0.3}],
    "own": {"temperature": 0.3, "quantised": {"kinds": ["int8"]}},
}
# name: (wrapper, changes of the recipe, row whose image is damaged)
CASES = {
    "ddp": ("ddp", {"retain": 1}, None),
    "ddp, frozen vision": ("ddp", {"freeze_vision": True}, None),
    "ddp, one rank has a damaged image": ("ddp", {}, 1),
    "ddp, hard negatives on one rank": ("ddp", {"hard_negatives": True}, None),
    "fsdp, hard negatives on one rank": ("fsdp", {"hard_negatives": True, "loss": {"mask_duplicates": False}}, None),
    "ddp, a sum, and a loss of a source's own": ("ddp", SUM, None),
    "ddp, a sum, one rank has a damaged image": ("ddp", SUM, 1),
    "fsdp, a sum, and a loss of a source's own": ("fsdp", SUM, None),
    "fsdp": ("fsdp", {"retain": 1}, None),
    "fsdp, frozen vision": ("fsdp", {"freeze_vision": True, "retain": 1, "keep_mib": 0.0}, None),
    "fsdp, vision adapter, checkpointing": (
        "fsdp",
        {"lora": {"r": 2, "vision": True, "dropout": 0.0}, "gradient_checkpointing": True},
        None,
    ),
}
COMMON = {"dtype": "float64", "global_batch": 8, "interleave_batch_size": 4, "chunk_tokens": 60, "seed": 3}
LEARNED = {"loss": [{"temperature": {"start": 0.1, "learn": "global"}}, {"name": "sigmoid_loss"}], "weight_decay": 0.1}
STEP = 2  # its first block draws pictures, its second texts


def prepare(root, changes, damaged):
    changes = dict(changes)
    hard, own = changes.pop("hard_negatives", False), changes.pop("own", None)
    recipe = load_recipe(write_recipe(root, **COMMON | changes))
    recipe.data.hard_negatives = hard
    if own is not None:
        recipe.data.sources[1].loss = build(InfoNCE, own, "loss.")
    torch.manual_seed(0)  # a fresh adapter is random
    model = build_model(recipe, device="cpu").train()
    if recipe.lora:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.fill_(0.05)
    batch = first_batch(recipe, model, step=STEP)
    if damaged is not None:
        batch["query"][damaged]["pending"] = [[str(root / "damaged.jpg")]]
    return recipe, model, batch


def share(batch, rank, ranks):
    """The contiguous slice of a global batch that a rank holds."""
    rows = len(batch["query"]) // ranks
    part = slice(rank * rows, (rank + 1) * rows)
    taken = {name: batch[name][part] for name in ("query", "target", "query_ids", "target_ids", "kept", "rows")}
    offsets = batch["hard_offsets"][rank * rows : (rank + 1) * rows + 1]
    own = slice(offsets[0], offsets[-1])
    hard = {"negatives": batch["negatives"][own], "hard_ids": batch["hard_ids"][own], "hard_offsets": offsets - offsets[0]}
    return taken | hard | {"errors": []}


def rank_main(rank, port, root, queue):
    try:
        join(rank, port)
        import accelerate

        accelerate.PartialState(cpu=True)
        for name, (wrapper, changes, damaged) in CASES.items():
            queue.put((rank, name, *one_case(rank, root, wrapper, changes, damaged)))
        queue.put((rank, "run", *whole_run(root, rank)))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        queue.put((rank, "failed", traceback.format_exc(), None))
        raise


def one_case(rank, root, wrapper, changes, damaged):
    from train.parallel import sharding

    recipe, model, batch = prepare(root / f"rank{rank}", changes, damaged)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if wrapper == "ddp" else sharding.shard(model)
    step = ContrastiveStep(recipe, wrapped, model, device=torch.device("cpu"), world_size=2)
    result, _ = step(share(batch, rank, 2))
    found = {}
    for name, gradient in gradients(model).items():
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        found[name] = gradient.numpy().copy()
    return result.loss.item(), found


def whole_run(root, rank):
    """Four steps under FSDP2, then the last two again from the checkpoint of step 2."""
    from train.run import run

    recipe = load_recipe(root / "fsdp.yaml")
    assert run([str(root / "fsdp.yaml"), "--profile", "2"]) == 0
    first = files(root / "fsdp")
    if rank == 0:
        for trace in (root / "fsdp").glob("profile-*"):
            trace.rename(root / trace.name)
    torch.distributed.barrier()
    if rank == 0:
        for path in (root / "fsdp").iterdir():
            if path.name not in ("checkpoint-2", "recipe.yaml"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    torch.distributed.barrier()
    assert run([str(root / "fsdp.yaml")]) == 0
    again = files(root / "fsdp")
    return all(torch.equal(first[name], again[name]) for name in first), recipe.steps


def files(folder):
    """Weights, and what the loss learned."""
    return load_file(folder / "model.safetensors") | load_file(folder / "loss.safetensors")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    write_recipe(folder)
    picture = (folder / "images" / "1.jpg").read_bytes()
    (folder / "damaged.jpg").write_bytes(picture[: len(picture) // 3])
    write_recipe(folder, output=str(folder / "fsdp"), distributed="fsdp", save_steps=2, keep_checkpoints=4, **LEARNED)
    write_recipe(folder, output=str(folder / "single"), save_steps=9, **LEARNED)
    for rank in range(2):  # a recipe file is written by each process
        shutil.copytree(folder / "model", folder / f"rank{rank}" / "model")
        shutil.copy(folder / "data.yaml", folder / f"rank{rank}")
        shutil.copy(folder / "damaged.jpg", folder / f"rank{rank}")
    return folder


@pytest.fixture(scope="module")
def results(root):
    return collected(rank_main, root, each=len(CASES) + 1)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_process(root, results, name):
    _, changes, damaged = CASES[name]
    recipe, model, batch = prepare(root, changes, damaged)
    pictures = [bool(sample["pending"]) for sample in batch["query"]]
    assert any(pictures[:4]) and not any(pictures[4:]), "the second rank's chunks must be text alone"
    result, _ = ContrastiveStep(recipe, model, model, device=torch.device("cpu"))(batch)
    expected = gradients(model)
    for rank in range(2):
        loss, found = results[name, rank]
        assert loss == pytest.approx(result.loss.item(), abs=1e-12)
        assert found.keys() == expected.keys()
        for parameter, gradient in expected.items():
            got = torch.from_numpy(found[parameter])
            torch.testing.assert_close(got, gradient, rtol=1e-10, atol=1e-10, msg=f"rank {rank}: {parameter}")


def test_each_rank_writes_its_own_trace(root, results):
    assert results["run", 0] and results["run", 1]
    assert sorted(path.name for path in root.glob("profile-*")) == [f"profile-step-2-rank-{rank}.json.gz" for rank in range(2)]
    for rank in range(2):
        with gzip.open(root / f"profile-step-2-rank-{rank}.json.gz", "rt", encoding="utf-8") as file:
            trace = json.load(file)
        names = {str(event["name"]) for event in trace["traceEvents"] if event.get("ph") == "X"}
        assert {f"step: {phase}" for phase in ("waiting for data", "first pass", "loss", "second pass", "optimizer")} <= names
        assert trace["distributedInfo"]["rank"] == rank


def test_an_fsdp_run_saves_whole_weights_and_goes_on_from_its_checkpoint(root, results):
    from train.run import run

    for rank in range(2):
        equal, _ = results["run", rank]
        assert equal, "the run from the checkpoint ends in other weights"
    assert run([str(root / "single.yaml")]) == 0
    single, sharded = (files(root / name) for name in ("single", "fsdp"))
    assert {"info_nce.log_temperature", "sigmoid_loss.log_scale", "sigmoid_loss.bias"} < single.keys()
    assert abs(float(single["sigmoid_loss.bias"]) + 10) > 1e-4, "it moved"
    assert single.keys() == sharded.keys()
    for name in single:  # the same four steps, in float32
        torch.testing.assert_close(sharded[name], single[name], rtol=1e-3, atol=2e-4, msg=name)
