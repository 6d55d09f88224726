"""How a run may be started, and what it makes of a machine with several GPUs."""

import pytest
import torch

from tests.helpers.tiny_recipe import write_recipe
from train.build import build_model
from train.data.rows import PairDataset
from train.recipe.schema import load_recipe
from train.run import run
from train.trainer import ContrastiveTrainer, training_arguments


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    write_recipe(folder)
    return folder


@pytest.mark.parametrize(
    "variable,name",
    [
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_FSDP", "accelerate's FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism config"),
    ],
)
def test_other_launchers_are_refused_before_anything_is_read(root, tmp_path, monkeypatch, variable, name):
    recipe = write_recipe(root, model="no/such-model", output=str(tmp_path / "output"))
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=f"{variable} is set: {name}.* is not supported .*; start with torchrun .*--distributed fsdp"):
        run([str(recipe)])
    monkeypatch.setenv(variable, "false")
    with pytest.raises(ValueError, match="no/such-model"):
        run([str(recipe)])


def test_the_trainer_refuses_them_too(root, tmp_path, monkeypatch):
    recipe = load_recipe(write_recipe(root, output=str(tmp_path / "output")))
    model = build_model(recipe)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "True")
    with pytest.raises(ValueError, match="DeepSpeed is not supported"):
        ContrastiveTrainer(recipe, model, PairDataset(recipe.data, model.processing))


def test_one_process_on_a_machine_of_two_gpus_uses_one(root, tmp_path, monkeypatch, capsys):
    """The library would wrap the model in nn.DataParallel, which calls it with pieces of a packed chunk."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # but none is available: the run stays on the CPU
    path = write_recipe(root, output=str(tmp_path / "output"), cpu=False, steps=2)
    assert training_arguments(load_recipe(path)).n_gpu == 1
    called = []
    monkeypatch.setattr(torch.nn.DataParallel, "__init__", lambda *_, **__: called.append("DataParallel"))
    assert run([str(path)]) == 0 and not called
    assert "one of 2 GPUs is used; torchrun --nproc-per-node 2 -m train RECIPE uses all of them" in capsys.readouterr().out


def test_nothing_is_said_of_gpus_where_there_is_nothing_to_say(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert run([str(write_recipe(root, output=str(tmp_path / "output"), steps=1))]) == 0  # cpu: true
    assert "GPUs" not in capsys.readouterr().out
