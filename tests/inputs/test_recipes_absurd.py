"""Recipes with absurd numbers, values of another kind, anchors that expand, and places that cannot be written."""

import os
import pickle
import shutil

import pytest
import torch
import yaml

from tests.helpers.command_line import assert_refused, assert_runs, call
from tests.helpers.tiny_recipe import write_recipe
from train.checkpoints import complete_checkpoints


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("absurd")
    write_recipe(folder, output=str(folder / "first"))
    return folder


def changed(root, tmp_path, **changes):
    """A recipe of two steps whose output is this test's own; dots lead into sections."""
    recipe = yaml.safe_load(write_recipe(root, output=str(tmp_path / "output"), steps=2, save_steps=1).read_text())
    for key, value in changes.items():
        *sections, last = key.split(".")
        inner = recipe
        for section in sections:
            inner = inner.setdefault(section, {}) if isinstance(inner, dict) else inner[int(section)]
        inner[last] = value
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


# a changed key -> what the message names besides it
NUMBERS = {
    "workers": [10**6, -1, 1.5, "many", True, 10**30],
    "decode_threads": [10**6, 0, 10**30],
    "learning_rate": [1e30, 1e4, 0, -1e-5, float("nan"), float("inf"), "fast"],
    "steps": [10**30, 0, -1, 2.5, [2], "1e9"],
    "global_batch": [10**12, 0, -8, 10**30],
    "interleave_batch_size": [10**12, 3, 0],
    "chunk_tokens": [10**30, 0, 1],
    "chunk_rows": [10**30, 0],
    "warmup_steps": [10**9, -1],
    "weight_decay": [1e30, float("nan"), -0.1],
    "max_grad_norm": [float("nan"), -1],
    "seed": [-1, 2**32, 10**30],
    "save_steps": [10**30, 0],
    "keep_checkpoints": [10**30, 0],
    "logging_steps": [10**30, 0],
    "retain": [10**30, -1, "some"],
    "keep_mib": [float("nan"), -1],
    "media_mib": [float("inf"), -1],
    "profile": [10**30, 0],
    "loss.temperature": [0, 1e-30, 1e30, float("nan"), "hot", -1],
    "lora.r": [10**9, 0, 10**30],
    "lora.alpha": [float("nan"), 1e30, 0],
    "lora.dropout": [1, -0.1, float("nan")],
    "held_out.rows": [10**30, 0],
    "held_out.steps": [10**30, 0],
    "data.rows": [0, -3, 10**30],
    "data.sources.0.weight": [0, -1, float("nan"), float("inf")],
    "data.sources.0.from_step": [-1],
}
# Large and harmless: a limit that is never reached.
FINE = {("chunk_tokens", 10**30), ("chunk_rows", 10**30), ("save_steps", 10**30), ("keep_checkpoints", 10**30), ("logging_steps", 10**30)}
FINE |= {("retain", 10**30), ("held_out.rows", 10**30), ("held_out.steps", 10**30), ("data.rows", 10**30)}
ABSURD = [(key, value) for key, values in NUMBERS.items() for value in values if (key, value if type(value) is int else None) not in FINE]


def named(key):
    return key.replace("data.sources.0.", "").rpartition(".")[2] if key.startswith("data.sources") else key


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("key", "value"), ABSURD, ids=lambda v: str(v)[:20])
def test_an_absurd_number(root, tmp_path, capsys, key, value):
    assert_refused(capsys, ["train", changed(root, tmp_path, **{key: value})], named(key))
    assert not (tmp_path / "output").exists()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("key", sorted({key for key, _ in FINE}))
def test_a_large_limit_that_is_never_reached_runs(root, tmp_path, capsys, key):
    assert_runs(capsys, ["train", changed(root, tmp_path, **{key: 10**30})])


@pytest.mark.timeout(60)
def test_a_run_whose_numbers_explode_publishes_nothing(root, tmp_path, capsys):
    """A rate that is within what may be asked for, and far too high for these weights."""
    code, _, error = call(capsys, "train", changed(root, tmp_path, learning_rate=50.0, steps=4, max_grad_norm=0))
    if code == 0:
        pytest.skip("these weights bear it")
    assert code in (1, 2) and "Traceback" not in error and not (tmp_path / "output" / "model.safetensors").exists()


# -- the file itself ---------------------------------------------------------------------------------------------------------

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
TEXTS = {
    "anchors as an unknown key": BOMB + "model: m\noutput: o\nsteps: 1\n",
    "anchors as a number": BOMB.replace("a8:", "steps:") + "model: m\noutput: o\n",
    "anchors as a section": BOMB.replace("a8:", "data:") + "model: m\noutput: o\nsteps: 1\nglobal_batch: 8\n",
    "anchors as the loss": BOMB.replace("a8:", "loss:") + "model: m\noutput: o\nsteps: 1\nglobal_batch: 8\ndata: {root: r, images: i}\n",
    "an anchor in itself": "model: &m {a: *m}\noutput: o\n",
    "a list in itself": "model: &m [*m]\noutput: o\n",
    "deep": "model: " + "[" * 20_000,
    "deep by lines": "".join(" " * i + f"k{i}:\n" for i in range(3000)),
    "a python object": "model: !!python/object/apply:os.system ['touch /tmp/unpickled-by-a-test']\n",
    "an unknown tag": "model: !secret x\n",
    "two documents": "model: a\n---\nmodel: b\n",
    "nothing": "",
    "null": "null\n",
    "a number": "3\n",
    "a list": "- model\n",
    "tabs": "model: a\n\tsteps: 1\n",
    "keys that are numbers": "1: a\n2: b\n",
    "a null key": "? \n: a\n",
    "a list as key": "? [a, b]\n: c\n",
    "a huge number": f"model: m\nsteps: {'9' * 5000}\n",
    "a date": "model: 2026-01-01\noutput: o\nsteps: 1\nglobal_batch: 8\ndata: {root: r, images: i}\n",
    "a text of a million letters": f"model: m\noutput: o\nsteps: {'x' * 10**6}\nglobal_batch: 8\ndata: {{root: r, images: i}}\n",
    "a key of a million letters": f"{'x' * 10**6}: 1\n",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", TEXTS)
def test_a_file_that_is_no_recipe(tmp_path, capsys, case):
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXTS[case])
    assert_refused(capsys, ["train", path])
    assert not os.path.exists("/tmp/unpickled-by-a-test")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"model: \xe9\n", bytes(100)])
def test_a_recipe_that_is_no_text(tmp_path, capsys, content):
    (tmp_path / "recipe.yaml").write_bytes(content)
    assert_refused(capsys, ["train", tmp_path / "recipe.yaml"], "recipe.yaml")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("place", ["fifo", "folder", "/dev/zero", "gone", "."])
def test_a_recipe_that_is_no_file(tmp_path, capsys, place):
    path = {"fifo": tmp_path / "recipe.yaml", "folder": tmp_path, "gone": tmp_path / "gone.yaml"}.get(place, place)
    if place == "fifo":
        os.mkfifo(path)
    assert_refused(capsys, ["train", path], str(path))


# -- values of another kind -----------------------------------------------------------------------------------------------------

KINDS = {
    "model a list": ({"model": ["a"]}, "model"),
    "model empty": ({"model": ""}, "model"),
    "model a file": ({"model": __file__}, "test_recipes_absurd"),
    "output empty": ({"output": ""}, "output"),
    "output null": ({"output": None}, "output"),
    "output a file": ({"output": __file__}, "test_recipes_absurd"),
    "output below a file": ({"output": __file__ + "/x"}, "test_recipes_absurd"),
    "output a device": ({"output": "/dev/null"}, "/dev/null"),
    "output with a NUL": ({"output": "a\0b"}, "output"),
    "output of a long name": ({"output": "x" * 5000}, "output"),
    "output in proc": ({"output": "/proc/x/y"}, "/proc/x"),
    "data a list": ({"data": []}, "data"),
    "data null": ({"data": None}, "data"),
    "sources null": ({"data.sources": None}, "sources"),
    "sources a number": ({"data.sources": 5}, "sources"),
    "a source that is null": ({"data.sources": [None]}, "sources[0]"),
    "a source without a name": ({"data.sources": [{}]}, "name"),
    "a source named by a number": ({"data.sources": [{"name": 5}]}, "name"),
    "one source twice": ({"data.sources": [{"name": "Texts"}, {"name": "Texts"}]}, "Texts"),
    "no such source": ({"data.sources": [{"name": "Gone"}]}, "Gone"),
    "data root a file": ({"data.root": __file__}, "test_recipes_absurd"),
    "data root empty": ({"data.root": ""}, "root"),
    "images a file": ({"data.images": __file__}, "images"),
    "report to a number": ({"report_to": 5}, "report_to"),
    "dtype a number": ({"dtype": 16}, "dtype"),
    "dtype unknown": ({"dtype": "float8"}, "dtype"),
    "options a list": ({"model_options": [1]}, "model_options"),
    "an option of another kind": ({"model_options": {"max_pixels": "big"}}, "max_pixels"),
    "an option absurd": ({"model_options": {"max_pixels": 10**30, "min_pixels": 10**30}}, "min_pixels"),
    "lora a number": ({"lora": 8}, "lora"),
    "lora targets empty": ({"lora": {"targets": []}}, "targets"),
    "lora targets nowhere": ({"lora": {"targets": ["nope"]}}, "nope"),
    "a section's unknown key": ({"lora": {"rank": 8}}, "rank"),
    "loss unknown": ({"loss": {"name": "nope"}}, "nope"),
    "loss a number": ({"loss": 5}, "loss"),
    "matryoshka of none": ({"loss": {"matryoshka_dims": [0]}}, "matryoshka_dims"),
    "matryoshka too wide": ({"loss": {"matryoshka_dims": [10**9]}}, "matryoshka_dims"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", KINDS)
def test_a_value_of_another_kind(root, tmp_path, capsys, case):
    changes, name = KINDS[case]
    assert_refused(capsys, ["train", changed(root, tmp_path, **changes)], name)


@pytest.mark.timeout(60)
def test_output_over_the_base_model_or_the_data_is_refused(root, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(root / "model", model)
    before = (model / "model.safetensors").read_bytes()
    for output, name in ((model, "model"), (root / "train", "data.root"), (root / "images", "data.images")):
        assert_refused(capsys, ["train", changed(root, tmp_path, model=str(model), output=str(output))], "output", name)
    assert (model / "model.safetensors").read_bytes() == before


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/unpickled-by-a-test",)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_code_in_a_checkpoints_pickle_is_not_run(root, tmp_path, capsys, name):
    recipe = changed(root, tmp_path)
    assert_runs(capsys, ["train", recipe])
    (tmp_path / "output" / "train_result.json").unlink()
    first, last = complete_checkpoints(tmp_path / "output")
    shutil.rmtree(last)
    (first / "checksums.json").unlink()  # as of an earlier version
    torch.save({"state": Evil()}, first / name)
    assert_refused(capsys, ["train", recipe], name, "remove the folder")
    _, _, error = call(capsys, "train", recipe)
    assert "weights_only" not in error and "safe_globals" not in error
    (first / name).write_bytes(pickle.dumps(Evil()))
    assert_refused(capsys, ["train", recipe], name, "remove the folder")
    assert not os.path.exists("/tmp/unpickled-by-a-test")
