"""What a score file says of data that stays in its files: texts and media apart, each input read once."""

import shutil

import pytest

from tests.helpers import v3_layouts
from tests.helpers.evaluation_layouts import picture
from vlm2vec.evaluation.encode.keys import ContentHashes
from vlm2vec.evaluation.encode.missing import plan_shards
from vlm2vec.evaluation.loaders import load_task
from vlm2vec.evaluation.loaders.rows import Held, Lines, Table
from vlm2vec.evaluation.runner import prepare
from vlm2vec.evaluation.tasks import load_tasks

KINDS = {"products": "MCMR", "screens": "GAE-GUIAct_q2s", "tools": "toolde/web/apibank"}


@pytest.fixture(params=KINDS)
def task(request, tmp_path):
    getattr(v3_layouts, request.param)(tmp_path)
    return load_tasks("v3")[KINDS[request.param]], tmp_path


def prepared(task, root):
    return prepare(load_task(task, root, root), ContentHashes())


def test_a_changed_picture_is_no_changed_text(task):
    task, root = task
    before = prepared(task, root).contents
    assert before == prepared(task, root).contents
    moved = root.parent / f"{root.name}-moved"
    shutil.copytree(root, moved)
    assert prepared(task, moved).contents == before, "where the folder lies is no content"
    if task.modality == "tool":
        return
    for path in (root / task.media).rglob("*.*g"):
        picture(path, 77)
    after = prepared(task, root).contents
    assert after["media"] != before["media"]
    assert {side: after[side] for side in before if side != "media"} == {side: before[side] for side in before if side != "media"}


def test_every_input_is_read_once_for_its_key_and_once_for_the_plan(task, monkeypatch):
    task, root = task
    data = load_task(task, root, root)
    read = []
    for kind in (Held, Lines, Table):
        monkeypatch.setattr(kind, "__getitem__", lambda rows, at, old=kind.__getitem__: (read.append(at), old(rows, at))[1])
    done = prepare(data, ContentHashes())
    lazy = sum(not isinstance(item, dict) for item in data.queries + data.candidates)
    assert lazy and len(read) == lazy
    read.clear()
    items = {key: item for key, item in zip(done.candidate_keys, data.candidates) if key is not None}
    assert plan_shards(items) and len(read) <= len(items)
