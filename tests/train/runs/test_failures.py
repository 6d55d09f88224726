"""What a run does when a step goes wrong: no finite numbers, or no memory."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from contrastive_kernels import GradCache
from tests.helpers.tiny_recipe import first_batch, gradients, write_recipe
from train.build import build_model
from train.recipe.schema import load_recipe
from train.run import run
from train.step import ContrastiveStep
from train.trainer import ContrastiveTrainer
from vlm2vec.model import VLM2Vec


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("failures")
    write_recipe(folder)
    return folder


def spoil(monkeypatch, at_step, gradient=False):
    """From the given step on, the embedding of the first picture of a chunk, or its gradient, is not a number."""
    forward, calls = VLM2Vec.forward, {"step": 0}
    step = ContrastiveStep.__call__

    def counted(self, batch):
        calls["step"] += 1
        return step(self, batch)

    def spoiled(self, packed, vision_features=None):
        hidden = forward(self, packed, vision_features)
        if calls["step"] >= at_step and len(packed.visual_index):
            factor = torch.ones(len(hidden), 1)
            factor[int((packed.cu_seqlens[1:] <= packed.visual_index[0]).sum())] = float("nan")
            if gradient:
                if hidden.requires_grad:
                    hidden.register_hook(lambda g: g * factor)
            else:
                hidden = hidden * factor
        return hidden

    monkeypatch.setattr(ContrastiveStep, "__call__", counted)
    monkeypatch.setattr(VLM2Vec, "forward", spoiled)


@pytest.mark.parametrize(
    "at_step,gradient,clip,workers",
    [
        (3, False, 1.0, 0),
        (3, True, 1.0, 0),
        (3, True, 0.0, 0),  # nothing is clipped, the norm is looked at all the same
        (1, False, 1.0, 0),  # a checkpoint of no step, whose generators a starting loader must not move
        (1, False, 1.0, 1),
    ],
)
def test_a_step_without_finite_numbers_saves_the_state_before_it_and_says_whose_rows(
    root, tmp_path, monkeypatch, at_step, gradient, clip, workers
):
    whole = tmp_path / "whole"
    # Random masks: the state has generators.
    changes = {"save_steps": 9, "lora": {"r": 2, "dropout": 0.3, "dora": False}, "seed": 3, "max_grad_norm": clip, "workers": workers}
    assert run([str(write_recipe(root, output=str(whole), **changes))]) == 0
    output = tmp_path / "stopped"
    recipe = write_recipe(root, output=str(output), **changes)
    with monkeypatch.context() as patch:
        spoil(patch, at_step, gradient)
        with pytest.raises(FloatingPointError) as error:
            run([str(recipe)])
    message = str(error.value)
    saved = f"checkpoint-{at_step - 1}"
    assert message.startswith(f"step {at_step}:") and "Pictures:" in message and saved in message
    if gradient:
        assert "gradient" in message and "learning_rate" in message
    else:
        assert "rows have embeddings that are not finite" in message and "(source Pictures)" in message
    assert [p.name for p in output.glob("checkpoint-*")] == [saved]
    assert run([str(recipe)]) == 0  # the cause is gone: the run ends as if nothing had been
    expected, got = (load_file(folder / "adapter_model.safetensors") for folder in (whole, output))
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


def test_the_first_step_can_fail_too(root, monkeypatch):
    model = root / "broken"
    model.mkdir()
    for path in (root / "model").iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if name.endswith("norm.weight"))
    tensors[name][:] = float("inf")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FloatingPointError, match="step 1: .*no embedding is finite, so the weights are not.*checkpoint-0"):
        run([str(write_recipe(root, model=str(model), output=str(root / "first")))])


# Out of memory


def prepared(root, **changes):
    recipe = load_recipe(write_recipe(root, dtype="float64", seed=3, chunk_tokens=120, **changes))
    return recipe, build_model(recipe).train()


def short_of_memory(monkeypatch, tokens, only_with_graph):
    forward, sizes = VLM2Vec.forward, []

    def limited(self, packed, vision_features=None):
        sizes.append(len(packed.input_ids))
        hidden = forward(self, packed, vision_features)
        if len(packed.input_ids) > tokens and not (only_with_graph and not torch.is_grad_enabled()):
            raise torch.OutOfMemoryError("no room")
        return hidden

    monkeypatch.setattr(VLM2Vec, "forward", limited)
    return sizes


@pytest.mark.parametrize("only_with_graph", [False, True], ids=["first pass", "second pass"])
def test_out_of_memory_halves_the_chunks_and_gradients_are_exact(root, monkeypatch, caplog, only_with_graph):
    recipe, model = prepared(root)
    step = ContrastiveStep(recipe, model, model, device=torch.device("cpu"))
    expected_loss = step(first_batch(recipe, model))[0].loss
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    sizes = short_of_memory(monkeypatch, 60, only_with_graph)
    with caplog.at_level(logging.WARNING, logger="contrastive_kernels.gradcache.grad_cache"):
        loss = step(first_batch(recipe, model))[0].loss
    assert [r.getMessage() for r in caplog.records] == [
        "out of memory in a chunk: chunk_tokens is 60 instead of 120 from now on, and the step is done again"
    ]
    assert max(sizes) > 60 and max(sizes[-3:]) <= 60
    assert loss.item() == pytest.approx(expected_loss.item(), abs=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, rtol=1e-10, atol=1e-12, msg=name)
    assert step.media._held == 0


def test_the_second_time_it_raises(root, monkeypatch):
    recipe, model = prepared(root)
    step = ContrastiveStep(recipe, model, model, device=torch.device("cpu"))
    short_of_memory(monkeypatch, 20, False)
    with pytest.raises(torch.OutOfMemoryError):
        step(first_batch(recipe, model))
    assert step.gradcache.chunk_tokens == 60


def test_gradients_of_earlier_steps_are_not_thrown_away():
    layer = torch.nn.Linear(3, 2)
    layer.weight.grad = torch.ones_like(layer.weight)

    def encode(inputs, rows):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(torch.OutOfMemoryError):
        GradCache(encode, chunk_size=4, module=layer).step(torch.ones(4, 3), torch.ones(4, 3), lengths=([1] * 4, [1] * 4))
    assert layer.weight.grad.eq(1).all()


def test_dropout_is_replayed_after_halving():
    """The step done again draws the masks that a step with half the budget draws from the start."""
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Dropout(0.5)).double()
    inputs = torch.randn(2, 8, 6, dtype=torch.float64)
    limit = {"rows": 8}

    def encode(side, rows):
        hidden = layer(inputs[side, rows])
        if len(rows) > limit["rows"]:
            raise torch.OutOfMemoryError("no room")
        return hidden

    def step(size):
        torch.manual_seed(5)
        layer.zero_grad(set_to_none=True)
        GradCache(encode, chunk_size=size, module=layer).step(0, 1, lengths=([1] * 8, [1] * 8), normalize=True)
        return layer[0].weight.grad.clone()

    expected = step(2)
    limit["rows"] = 2
    assert torch.equal(step(4), expected)


def test_a_stopped_run_goes_on_with_what_its_message_advises(root, tmp_path, monkeypatch, capsys):
    output = tmp_path / "stopped"
    recipe = str(write_recipe(root, output=str(output), save_steps=9))
    with monkeypatch.context() as patch:
        spoil(patch, 3, gradient=True)
        with pytest.raises(FloatingPointError, match="lower learning_rate or max_grad_norm"):
            run([recipe])
    with pytest.raises(ValueError, match="checkpoint-2 was made with other seed"):
        run([recipe, "--seed", "8", "--learning_rate", "1e-6"])
    assert run([recipe, "--learning_rate", "1e-6", "--max_grad_norm", "0.5", "--chunk_tokens", "120"]) == 0
    assert "checkpoint-2 with other chunk_tokens, learning_rate, max_grad_norm" in capsys.readouterr().out.replace("\n", " ")
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    rates = {entry["step"]: entry["learning_rate"] for entry in history if "learning_rate" in entry}
    assert rates[2] > 1e-5 and 0 < rates[3] <= 1e-6, rates
    with pytest.raises(ValueError, match="holds a model trained with other"):
        run([recipe, "--learning_rate", "1e-5"])


@pytest.mark.parametrize("scale, stops", [(None, True), (0.5, True), (1024.0, False)])
def test_overflows_that_a_scale_cannot_be_the_cause_of_stop_the_run(monkeypatch, scale, stops):
    monkeypatch.setattr(transformers.Trainer, "_get_grad_norm", lambda *args: torch.tensor(float("nan")))
    trainer, said = ContrastiveTrainer.__new__(ContrastiveTrainer), []
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    if scaler is not None:
        scaler.scale(torch.ones(()))  # makes the scale
    trainer.accelerator, trainer._rows, trainer._stop = SimpleNamespace(scaler=scaler), [], lambda what, rows: said.append(what)
    trainer._get_grad_norm(None)
    assert bool(said) == stops and all("the gradient's norm is nan" in what for what in said)
