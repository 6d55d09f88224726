"""One folder, one run: a second is refused while the first lives, and a killed one leaves nothing that would refuse the next."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.evaluation_layouts import StubModel, mmeb
from tests.helpers.tiny_models import BUILDERS
from tests.helpers.tiny_recipe import write_recipe
from train.checkpoints import CHECKSUMS, complete_checkpoints
from train.run import run
from vlm2vec.cli import main as vlm2vec
from vlm2vec.commands import common
from vlm2vec.evaluation.encode.keys import model_identity
from vlm2vec.evaluation.encode.store import EmbeddingStore
from vlm2vec.evaluation.runner import Options, run_tasks
from vlm2vec.evaluation.tasks import find_tasks
from vlm2vec.files import locks
from vlm2vec.files.locks import LOCK, locked
from vlm2vec.model import VLM2Vec

HOLDER = """
import sys, time
from vlm2vec.files.locks import locked
with locked(sys.argv[1], "a training run"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder():
    """Starts processes that hold a folder; ends what is left of them."""
    processes = []

    def start(folder):
        process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def test_a_second_process_is_refused_and_told_by_whom(tmp_path, holder):
    process = holder(tmp_path / "output")
    with pytest.raises(ValueError) as refused, locked(tmp_path / "output", "a training run"):
        pass
    message = str(refused.value)
    assert f"{tmp_path / 'output'} is in use: a training run, process {process.pid} on {socket.gethostname()} since " in message
    assert "wait for it to end or choose another folder" in message and len(message) < 500


def test_a_killed_process_leaves_no_lock_behind(tmp_path, holder):
    process = holder(tmp_path / "output")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "output" / LOCK).exists(), "the file is there, and means nothing"
    with locked(tmp_path / "output", "a training run"):
        assert json.loads((tmp_path / "output" / LOCK).read_text())["process"] == os.getpid()


def test_another_path_to_the_same_folder_is_the_same_folder(tmp_path, holder):
    holder(tmp_path / "output")
    (tmp_path / "link").symlink_to(tmp_path / "output")
    with pytest.raises(ValueError, match="is in use"), locked(tmp_path / "link" / ".." / "link", "a training run"):
        pass


def test_a_thread_is_refused_and_a_block_within_a_block_is_not(tmp_path):
    def other():
        with locked(tmp_path, "an evaluation"):
            pass

    with locked(tmp_path, "an evaluation"), locked(tmp_path, "an evaluation"), ThreadPoolExecutor(1) as pool:
        assert "in use by another thread of this process" in str(pool.submit(other).exception())
        assert (tmp_path / LOCK).exists()
    other()


def test_one_of_many_gets_it(tmp_path):
    """Threads as contenders: the registry decides among them, and whoever holds the folder holds it alone."""
    inside, most, refused = [], [], []

    def contend(number):
        for _ in range(50):
            try:
                with locked(tmp_path / "output", "a run"):
                    inside.append(number)
                    most.append(len(inside))
                    time.sleep(0.0005)
                    inside.remove(number)
            except ValueError:
                refused.append(number)

    threads = [threading.Thread(target=contend, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1} and len(most) + len(refused) == 200
    assert not (tmp_path / "output").exists(), "made for nothing, it goes again"


def test_a_folder_that_got_something_stays(tmp_path):
    with locked(tmp_path / "a" / "b", "a run"):
        (tmp_path / "a" / "b" / "file").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["file"]
    with pytest.raises(RuntimeError), locked(tmp_path / "c" / "d", "a run"):
        raise RuntimeError
    assert not (tmp_path / "c").exists()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be made .*choose a folder that can be written"), locked(tmp_path / "file" / "x", "a run"):
        pass


# where the file system keeps no locks: what the file says -> whether the folder can be had
TOLD = {
    "nothing": ("", True),
    "no JSON": ("{", True),
    "a dead process of this machine": ({"host": socket.gethostname(), "process": 2**22 + 1, "since": "then", "doing": "a run"}, True),
    "a living process of this machine": ({"host": socket.gethostname(), "process": 1, "since": "then", "doing": "a run"}, False),
    "another machine": ({"host": "elsewhere", "process": 1, "since": "then", "doing": "a run"}, False),
}


@pytest.mark.parametrize("case", TOLD)
def test_without_the_systems_locks_the_file_decides(tmp_path, monkeypatch, case):
    told, free = TOLD[case]
    monkeypatch.setattr(locks, "fcntl", None)
    (tmp_path / LOCK).write_text(told if isinstance(told, str) else json.dumps(told))
    if free:
        with locked(tmp_path, "a run"):
            pass
    else:
        with pytest.raises(ValueError, match=rf"process 1 on .* since then; .*if it is gone, remove .*{LOCK}"), locked(tmp_path, "a run"):
            pass
        assert (tmp_path / LOCK).exists()


# -- training -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_runs")
    assert run([str(write_recipe(folder, output=str(folder / "alone"), save_steps=2))]) == 0
    return folder


def test_a_training_into_a_living_ones_output_is_refused(root, holder, tmp_path, capsys):
    from train.__main__ import main

    output = tmp_path / "output"
    process = holder(output)
    recipe = write_recipe(root, output=str(output), save_steps=2)
    for more in ([], ["--fresh"]):
        assert main([str(recipe), *more]) == 2
        assert f"{output} is in use: a training run, process {process.pid}" in capsys.readouterr().err
    assert [path.name for path in output.iterdir()] == [LOCK]
    process.kill()
    process.wait()
    assert run([str(recipe)]) == 0
    assert not (output / LOCK).exists()
    expected, got = (load_file(folder / "model.safetensors") for folder in (root / "alone", output))
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_recipe_that_is_refused_makes_no_folder(root, tmp_path):
    recipe = write_recipe(root, output=str(tmp_path / "output"), model=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="gone"):
        run([str(recipe), "--output", str(tmp_path / "deep" / "output")])
    assert not (tmp_path / "deep").exists()


def test_64_changed_bytes_of_a_checkpoint_are_noticed(root, tmp_path):
    import shutil

    output = tmp_path / "output"
    shutil.copytree(root / "alone", output)
    (output / "train_result.json").unlink()
    recipe = write_recipe(root, output=str(output), save_steps=2)
    last = complete_checkpoints(output)[-1]
    told = json.loads((last / CHECKSUMS).read_text())
    assert set(told) == {path.name for path in last.iterdir()} - {CHECKSUMS}
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
        content = (last / name).read_bytes()
        middle = len(content) // 2
        (last / name).write_bytes(content[:middle] + bytes(b ^ 1 for b in content[middle : middle + 64]) + content[middle + 64 :])
        with pytest.raises(ValueError, match=rf"{name} is damaged .*; remove the folder .*{last.name} to go on from the one before it"):
            run([str(recipe)])
        (last / name).write_bytes(content)
    (last / "vlm2vec.json").rename(tmp_path / "vlm2vec.json")
    with pytest.raises(ValueError, match="vlm2vec.json is not there"):
        run([str(recipe)])
    shutil.rmtree(last)
    assert run([str(recipe)]) == 0
    expected, got = (load_file(folder / "model.safetensors") for folder in (root / "alone", output))
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_published_model_is_on_disk_before_the_file_that_says_so(root, tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(descriptor):
        events.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def watched_replace(source, target):
        events.append(("move", str(source), str(target)))
        replace(source, target)

    output = tmp_path / "output"
    recipe = write_recipe(root, output=str(output), save_steps=100)
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    assert run([str(recipe)]) == 0
    said = next(at for at, event in enumerate(events) if event[0] == "move" and event[2] == str(output / "train_result.json"))
    folder = max(at for at, event in enumerate(events[:said]) if event == ("sync", str(output)))
    for name in json.loads((output / "train_result.json").read_text())["files"]:
        moved = next(at for at, event in enumerate(events) if event[0] == "move" and event[2] == str(output / name))
        assert ("sync", events[moved][1]) in events[:moved], f"{name} was moved before it was on disk"
        assert moved < folder < said


# -- evaluation ------------------------------------------------------------------------------------------------------------


def evaluate(model, root, output, **options):
    tasks = find_tasks(root / "eval", None, {})
    return run_tasks(model, tasks, root / "eval", root / "images", output, options=Options(progress=False), **options)


def test_an_evaluation_into_a_living_ones_folder_is_refused(tmp_path, holder):
    mmeb(tmp_path, rows=4)
    holder(tmp_path / "out")
    model = StubModel()
    with pytest.raises(ValueError, match="is in use"):
        evaluate(model, tmp_path, tmp_path / "out")
    assert not model.encoded
    assert evaluate(model, tmp_path, tmp_path / "other", store=tmp_path / "out" / "embeddings")


def test_two_evaluations_with_one_store_do_not_hear_each_other(tmp_path):
    """One has a picture that cannot be read, the other has it whole; both at once, again and again, from the same store."""
    one, other = tmp_path / "one", tmp_path / "other"
    for place in (one, other):
        mmeb(place, rows=6)
    damaged = sorted((one / "images").rglob("*.*g"))[0]
    damaged.write_bytes(damaged.read_bytes()[:40])
    alone = [evaluate(StubModel(), place, tmp_path / f"alone-{place.name}") for place in (one, other)]
    assert alone[0][0]["problems"] and not alone[1][0]["problems"]
    with ThreadPoolExecutor(2) as pool:
        for turn in range(3):
            calls = [
                pool.submit(evaluate, StubModel(), place, tmp_path / f"{place.name}-{turn}", store=tmp_path / f"store-{turn}")
                for place in (one, other)
            ]
            assert [call.result() for call in calls] == alone


# -- what is written may be read by whom the umask says -----------------------------------------------------------------------


def modes(folder):
    return {path.relative_to(folder).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077], ids=oct)
def test_everything_has_the_umasks_mode(root, tmp_path, umask):
    model = tmp_path / "model"
    before = os.umask(umask)
    try:
        model.mkdir()
        BUILDERS["qwen2_vl"](model)
        loaded = VLM2Vec.from_pretrained(model, dtype="float32")
        loaded.save_pretrained(tmp_path / "written" / "saved")
        store = EmbeddingStore(tmp_path / "written" / "store", model_identity(loaded))
        store.add([b"k" * 16], torch.ones(1, loaded.embedding_dim))
        common.write_embeddings(str(tmp_path / "written" / "some.safetensors"), torch.ones(1, 4), ["a"], {})
        recipe = write_recipe(root, output=str(tmp_path / "written" / "trained"), save_steps=2)
        recipe.rename(tmp_path / "recipe.yaml")
        assert run([str(tmp_path / "recipe.yaml")]) == 0
    finally:
        os.umask(before)
    found = modes(tmp_path / "written")
    assert {"some.safetensors", "saved/model.safetensors", "trained/model.safetensors", "trained/checkpoint-4/optimizer.pt"} <= set(found)
    assert any("shard-" in name for name in found)
    assert {name: oct(mode) for name, mode in found.items() if mode != 0o666 & ~umask} == {}


def test_the_command_line_says_it_in_one_line(tmp_path, holder, capsys):
    mmeb(tmp_path, rows=3)
    model = tmp_path / "model"
    model.mkdir()
    BUILDERS["qwen2_vl"](model)
    holder(tmp_path / "out")
    capsys.readouterr()
    words = ["eval", model, "--data", tmp_path / "eval", "--images", tmp_path / "images", "--output", tmp_path / "out", "--device", "cpu"]
    assert vlm2vec([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert "is in use: a training run, process" in error and error.count("\n") == 1
