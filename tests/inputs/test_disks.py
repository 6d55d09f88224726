"""Full disks and places that cannot be written: one line that names the place, nothing half there, and the same command goes on.

A limit on the size of a file stands for a full disk: the system refuses the same writes, to whatever library writes.
"""

import errno
import os
import resource
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.evaluation_layouts import mmeb
from tests.helpers.tiny_models import BUILDERS
from tests.helpers.tiny_recipe import write_recipe
from train.run import run
from vlm2vec import files
from vlm2vec.files import replacing, write_text


def limited(limit, *words):
    """(exit code, last line of standard error) of a command whose files may have `limit` bytes; None for no limit."""
    program = "train" if words[0] == "train" else "vlm2vec.cli"
    words = [str(word) for word in (words[1:] if words[0] == "train" else words)]

    def limit_files():
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    ended = subprocess.run([sys.executable, "-m", program, *words], capture_output=True, text=True, preexec_fn=limit_files)
    assert "Traceback" not in ended.stderr, ended.stderr[-3000:]
    return ended.returncode, (ended.stderr.strip().splitlines() or [""])[-1]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disks")
    assert run([str(write_recipe(folder, output=str(folder / "whole"), save_steps=2))]) == 0
    return folder


@pytest.mark.timeout(300)
@pytest.mark.parametrize("full_at", ["weights", "optimizer"])
def test_a_training_on_a_full_disk_goes_on_to_the_same_bits(root, tmp_path, full_at):
    weights = (root / "whole" / "model.safetensors").stat().st_size
    output = tmp_path / "output"
    recipe = write_recipe(root, output=str(output), save_steps=2)
    recipe = recipe.rename(tmp_path / "recipe.yaml")
    code, error = limited(weights // 2 if full_at == "weights" else weights + 4096, "train", recipe)
    assert code == 2 and error.startswith("train: ") and str(output) in error and len(error) < 500, error
    assert "free" in error and "the same command goes on" in error
    assert not list(output.glob("checkpoint-*")) and not (output / "model.safetensors").exists()
    assert limited(None, "train", recipe)[0] == 0
    expected, got = (load_file(folder / "model.safetensors") for folder in (root / "whole", output))
    assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.timeout(120)
def test_an_evaluation_on_a_full_disk_keeps_what_was_encoded(root, tmp_path):
    mmeb(tmp_path, rows=20)
    words = ["eval", root / "model", "--data", tmp_path / "eval", "--images", tmp_path / "images", "--output", tmp_path / "out"]
    code, error = limited(1500, *words, "--device", "cpu")
    assert code == 2 and error.startswith("vlm2vec eval: ") and str(tmp_path / "out") in error and len(error) < 500, error
    assert not list((tmp_path / "out").rglob("*.part")) and not (tmp_path / "out" / "summary.json").exists()
    assert limited(None, *words, "--device", "cpu")[0] == 0


@pytest.mark.timeout(120)
def test_embed_on_a_full_disk_leaves_the_old_file(root, tmp_path):
    out = tmp_path / "out.safetensors"
    words = ["embed", root / "model", "--text", "a", "-o", out, "--device", "cpu"]
    assert limited(None, *words)[0] == 0
    before = out.read_bytes()
    code, error = limited(100, *words)
    assert code == 2 and str(out) in error and "free" in error and out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out.safetensors"]


@pytest.mark.timeout(120)
def test_saving_on_a_full_disk_leaves_the_old_model(tmp_path):
    BUILDERS["qwen2_vl"](tmp_path / "model") if (tmp_path / "model").mkdir() is None else None
    code = (
        "import sys; from vlm2vec import VLM2Vec\n"
        "m = VLM2Vec.from_pretrained(sys.argv[1], device='cpu')\n"
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        "try:\n  m.save_pretrained(sys.argv[1])\nexcept OSError as e: print(e.filename); sys.exit(3)"
    )
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model")], capture_output=True, text=True)
    assert ended.returncode == 3, ended.stderr[-2000:]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before and str(tmp_path) in ended.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


PLACES = {"below a file": "file/out", "a device": "/dev/null/out", "in proc": "/proc/out", "in sys": "/sys/out"}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", ["embed", "eval", "mine", "train"])
def test_an_output_that_cannot_be_written(root, tmp_path, place, command):
    (tmp_path / "file").touch()
    out = tmp_path / PLACES[place]
    mmeb(tmp_path, rows=3)
    words = {
        "embed": ["embed", root / "model", "--text", "a", "-o", f"{out}.safetensors"],
        "eval": ["eval", root / "model", "--data", tmp_path / "eval", "--images", tmp_path / "images", "--output", out],
        "mine": ["mine", root / "model", "--data", root / "train", "--images", root / "images", "--output", out],
        "train": ["train", write_recipe(root), "--output", out],
    }[command]
    code, error = limited(None, *words, *([] if command == "train" else ["--device", "cpu"]))
    assert code == 2 and str(out).split("/out")[0] in error and len(error) < 500, (code, error)


def test_a_disk_that_fails_when_the_file_is_synced_is_told(tmp_path, monkeypatch):
    """Some disks, and all files over a network, refuse only then."""
    write_text(tmp_path / "a.txt", "old")

    def failing(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", failing)
    with pytest.raises(OSError, match="No space left") as refused, replacing(tmp_path / "a.txt") as part:
        part.write_text("new")
    assert str(refused.value.filename).startswith(str(tmp_path / "a.txt"))
    assert (tmp_path / "a.txt").read_text() == "old" and [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_system_that_cannot_sync_is_no_error(tmp_path, monkeypatch):
    def without(descriptor):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(files.os, "fsync", without)
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
