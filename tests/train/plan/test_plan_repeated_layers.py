"""What a plan leaves out: layers that are alike take exactly what they take when all are run; chunks that are not run are bounded."""

import json
import shutil

import pytest
import torch

from tests.helpers.tiny_recipe import tiny_models, write_recipe
from train.plan import repeated_layers
from train.plan import simulate as plan_simulate
from train.plan.batch import first_batch
from train.plan.meter import Meter
from train.plan.simulate import simulate
from train.recipe.schema import load_recipe

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
LORA = {"lora": {"r": 4, "alpha": 8, "dropout": 0.1, "dora": False}}
DORA = {"lora": {"r": 4, "alpha": 8, "dropout": 0.0, "dora": True}}
# name: (family, ranks, changes of the recipe)
CASES = {
    "full": ("qwen2_vl", 1, {"retain": 2}),
    "full, vision frozen, checkpointing": ("qwen2_vl", 1, {"freeze_vision": True, "gradient_checkpointing": True}),
    "adapter, all graphs kept": ("qwen2_vl", 1, {**LORA, "retain": "all"}),
    "DoRA": ("qwen2_vl", 1, DORA),
    "adapter of both over four bits, checkpointing": (
        "qwen2_vl",
        1,
        {"lora": {**LORA["lora"], "vision": True}, "quantization": "nf4", "gradient_checkpointing": True, "retain": 2},
    ),
    "sharded over two": ("qwen2_vl", 2, {"distributed": "fsdp", "retain": 1}),
    "sharded over four, adapter, checkpointing, autocast": (
        "qwen2_vl",
        4,
        {"distributed": "fsdp", **LORA, "gradient_checkpointing": True, "autocast": "bfloat16"},
    ),
    "DDP": ("qwen2_vl", 2, {}),
    "another family, full": ("llava_next", 1, {"gradient_checkpointing": True}),
    "another family, adapter of both, graph kept": ("llava_next", 1, {"lora": {**LORA["lora"], "vision": True}, "retain": 1}),
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """By family a folder with a model of seven layers in each stack, of which only the config is changed: no plan reads weights."""
    found = {}
    for family in ("qwen2_vl", "llava_next"):
        root = found[family] = tmp_path_factory.mktemp(family)
        write_recipe(root)
        if family != "qwen2_vl":
            shutil.rmtree(root / "model")
            (root / "model").mkdir()
            getattr(tiny_models, family)(root / "model")
        path = root / "model" / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["text_config"]["num_hidden_layers"] = 7
        config["text_config"].pop("layer_types", None)
        config["vision_config"]["depth" if family == "qwen2_vl" else "num_hidden_layers"] = 7
        path.write_text(json.dumps(config), encoding="utf-8")
    return found


def planned(root, ranks, changes, **more):
    recipe = load_recipe(write_recipe(root, output=str(root / "o"), **{"global_batch": 4 * ranks, "chunk_tokens": 100} | changes))
    return simulate(recipe, None, ranks=ranks, make_batch=lambda processing: first_batch(recipe, processing, ranks), **more)


@pytest.mark.parametrize("name", CASES)
def test_layers_that_are_alike_take_what_they_take_when_all_are_run(roots, monkeypatch, name):
    family, ranks, changes = CASES[name]
    runs = []
    replay, simulated = Meter.replay, plan_simulate._simulated
    monkeypatch.setattr(plan_simulate, "_simulated", lambda *given: (runs.clear(), simulated(*given))[1])  # the last attempt counts
    monkeypatch.setattr(Meter, "replay", lambda meter, span: (runs.append(span), replay(meter, span)))
    fast = planned(roots[family], ranks, changes)
    assert len(runs) > 10, "layers were left out"
    runs.clear()
    every = planned(roots[family], ranks, changes, every_layer=True)
    assert not runs
    for what in ("peak", "parts", "resident", "largest", "chunks", "kept", "graphs", "trained", "weights", "gathered"):
        assert getattr(fast, what) == getattr(every, what), what
    assert fast.cost.flops == every.cost.flops > 0
    assert fast.cost.moved == pytest.approx(every.cost.moved, rel=1e-9)
    assert fast.cost.seconds == pytest.approx(every.cost.seconds, rel=1e-9)


class Layers(torch.nn.Module):
    """Eight like layers, each handed what `handed` gives."""

    def __init__(self, layer, handed):
        super().__init__()
        self.layers, self.handed = torch.nn.ModuleList(layer() for _ in range(8)), handed

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, self.handed())
        return x


class Layer(torch.nn.Linear):
    def __init__(self):
        super().__init__(4, 4)

    def forward(self, x, more):
        return super().forward(x + more)


class Passes(Layer):
    def forward(self, x, more):
        return x


@pytest.mark.parametrize(
    "layer,handed,is_alike",
    [(Layer, lambda: 1.0, True), (Layer, lambda: torch.ones(4), False), (Passes, lambda: 1.0, False)],
    ids=["alike", "each is handed another tensor", "a layer gives what it was given"],
)
def test_layers_that_turn_out_not_alike_are_noticed(layer, handed, is_alike):
    given = handed()
    model = Layers(layer, (lambda: given) if is_alike else handed)
    meter = Meter([*model.parameters()], 1.0, 1.0)
    repeated_layers.RepeatedLayers(model, meter, False)
    with meter:
        x = torch.ones(2, 4, requires_grad=True)
        meter.track(x)
        if not is_alike:
            with pytest.raises(repeated_layers.LayersDiffer):
                model(x).sum().backward()
            return
        (model(x * 1) * 2).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_where_layers_are_not_alike_all_are_run(roots, monkeypatch):
    """Autocast keeps copies of the weights until it ends, which no stand-in has."""
    raised = []
    monkeypatch.setattr(repeated_layers.LayersDiffer, "__init__", lambda self: raised.append(self))
    values = {"autocast": "bfloat16", "freeze_vision": True}
    assert planned(roots["qwen2_vl"], 1, values) == planned(roots["qwen2_vl"], 1, values, every_layer=True)
    assert len(raised) == 2


def test_stacks_are_of_layers_of_one_kind():
    def stacks(*layers):
        model = torch.nn.Module()
        model.layers = torch.nn.ModuleList(layers)
        return len(repeated_layers.RepeatedLayers(model, Meter([], 1.0, 1.0), False).stacks)

    like = [torch.nn.Linear(2, 2) for _ in range(8)]
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    assert stacks(*like) == 1
    assert stacks(*like, torch.nn.Linear(2, 2, bias=False)) == stacks(*like, frozen) == stacks(*like[:3]) == 0


@pytest.mark.parametrize(
    "seed,weights,changes",
    [
        (0, (2.0, 1.0), {"retain": 3}),
        (1, (1.0, 1.0), {"freeze_vision": True, "keep_mib": 0.01}),
        (2, (1.0, 5.0), {"chunk_tokens": 45, "gradient_checkpointing": True}),
        (3, (5.0, 1.0), {**LORA, "retain": "all"}),
    ],
)
def test_chunks_that_are_not_run_are_bounded(tmp_path_factory, seed, weights, changes):
    """Twenty pairs of pictures and texts in chunks of one to three rows: eight are run, and the peak is at most 2 % above that of all."""
    root = tmp_path_factory.mktemp("chunks")
    path = write_recipe(root, output=str(root / "o"), **{"global_batch": 24, "chunk_tokens": 70, "seed": seed} | changes)
    recipe = load_recipe(path)
    for source, weight in zip(recipe.data.sources, weights, strict=True):
        source.weight = weight

    def run(most):
        return simulate(recipe, None, make_batch=lambda processing: first_batch(recipe, processing, 1), most_chunks=most)

    every, some = run(1000), run(8)
    assert every.chunks == some.chunks > 12 and every.kept == some.kept
    assert 1.0 <= some.peak / every.peak <= 1.02, (some.parts, every.parts)
    assert some.cost.flops == pytest.approx(every.cost.flops, rel=0.1)
