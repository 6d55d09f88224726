"""Files and folders appear whole or not at all: errors, kills, several writers."""

import json
import subprocess
import sys
import threading

import pytest

from vlm2vec.files import filling_folder, replacing, replacing_folder, write_json, write_lines, write_text

KILLED = """
import os, signal, sys
from pathlib import Path
from vlm2vec import files
with getattr(files, sys.argv[1])(sys.argv[2]) as part:
    (part / "a.txt" if part.is_dir() else part).write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "below" / "a.txt"
    write_text(path, "old")

    def lines():
        yield "half"
        raise RuntimeError("the source broke off")

    with pytest.raises(RuntimeError, match="broke off"):
        write_lines(path, lines())
    assert path.read_text() == "old" and [file.name for file in path.parent.iterdir()] == ["a.txt"]
    with pytest.raises(TypeError):
        write_json(path, {"not JSON": object()})
    assert path.read_text() == "old"
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "gone" / "a.txt", "new", make_parents=False)


@pytest.mark.parametrize("writer", ["replacing", "replacing_folder", "filling_folder"])
def test_a_kill_leaves_what_was_there(tmp_path, writer):
    place = tmp_path / "place"
    file = place if writer == "replacing" else place / "a.txt"
    write_text(file, "old")
    ended = subprocess.run([sys.executable, "-c", KILLED, writer, str(place)])
    assert ended.returncode == -9 and file.read_text() == "old"
    with {"replacing": replacing, "replacing_folder": replacing_folder, "filling_folder": filling_folder}[writer](place) as part:
        (part / "a.txt" if part.is_dir() else part).write_text("new")
    assert file.read_text() == "new"


def test_a_replaced_folder_holds_what_was_written_and_no_more(tmp_path):
    write_text(tmp_path / "place" / "old.txt", "old")
    write_text(tmp_path / "place.part" / "half.txt", "left by a process that was killed")
    with replacing_folder(tmp_path / "place") as part:
        assert not list(part.iterdir())
        write_text(part / "deep" / "new.txt", "new")
    assert [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.txt")] == ["place/deep/new.txt"]
    with pytest.raises(ValueError, match="cannot be made"), replacing_folder(tmp_path / "place" / "deep" / "new.txt" / "below"):
        pass


def test_a_filled_folder_keeps_its_other_files(tmp_path):
    write_text(tmp_path / "place" / "other.txt", "other")
    with filling_folder(tmp_path / "place") as part:
        write_json(part / "deep" / "new.json", {"é": 1})
        assert not (tmp_path / "place" / "deep").exists()
    assert (tmp_path / "place" / "other.txt").read_text() == "other"
    assert json.loads((tmp_path / "place" / "deep" / "new.json").read_text(encoding="utf-8")) == {"é": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_several_writers_of_one_folder(tmp_path):
    """All of them succeed, and the folder is one writer's whole: frames of one film that two processes unpack."""
    barrier, errors = threading.Barrier(8), []

    def write(number: int) -> None:
        try:
            with replacing_folder(tmp_path / "film", durable=False, shared=True) as part:
                for frame in range(5):
                    (part / f"{frame}.txt").write_text(str(number))
                barrier.wait(timeout=60)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    said = [file.read_text() for file in (tmp_path / "film").iterdir()]
    assert len(said) == 5 and len(set(said)) == 1 and [path.name for path in tmp_path.iterdir()] == ["film"]
