"""The benchmark: the same seed draws the same, splits share no picture, and the numbers it states about itself are true."""

import hashlib
import json
from collections import Counter

import pytest

from vlm2vec.data import mmeb
from vlm2vec.quickstart import build
from vlm2vec.quickstart.benchmark import Size, plan
from vlm2vec.quickstart.catalogue import GROUPS, subjects, with_article
from vlm2vec.quickstart.pictures import CELL, STYLES, Scene, crop, draw, glyph
from vlm2vec.quickstart.tasks import META_TASKS, TASKS

SMALL = Size(subjects=32, drawings=4, pairs=16, quads=8)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A small benchmark on disk."""
    folder = tmp_path_factory.mktemp("quickstart")
    return build.build_data(folder, seed=3, size=SMALL, workers=1, say=None)


def content(folder):
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.rglob("*")) if file.is_file()
    }


def test_catalogue_has_320_different_drawings():
    """Thirty-two groups of ten, one name and one picture each: otherwise two candidates would be right."""
    found = subjects()
    assert len(found) == 320 and len({s.name for s in found}) == 320 and len({s.character for s in found}) == 320
    assert len({glyph(s.character).tobytes() for s in found}) == 320
    assert all(len(names.split()) == 10 for names in GROUPS.values()) and len(GROUPS) == 32
    assert with_article("octopus") == "an octopus" and with_article("french fries") == "french fries"


@pytest.fixture(scope="module")
def full():
    """The plan of the whole benchmark; nothing is drawn."""
    return plan(0)


def test_full_plan_states_its_own_difficulty(full):
    """At least 100 candidates except for groups; every subject the right answer equally often; one right candidate a query."""
    made = full
    assert {TASKS[name].meta_task for name in made.rows["eval"]} == set(META_TASKS)
    for name, rows in made.rows["eval"].items():
        assert len(rows) == 160
        for row in rows:
            candidates = list(zip(row["tgt_text"], row["tgt_img_path"]))
            assert len(candidates) == len(set(candidates)) >= (32 if name == "OpenMoji-Group" else 160)
        right = Counter((row["tgt_text"][0], row["tgt_img_path"][0]) for row in rows)
        assert set(right.values()) == ({5} if name == "OpenMoji-Group" else {1})
    files = [scene.file for scene in made.scenes]
    assert len(files) == len(set(files)) and len({(s.split, s.key) for s in made.scenes}) == len(files)


def test_every_kind_of_query_and_target():
    """Text, picture and both, on either side; rows hold what their task says, in training and in evaluation."""
    made = plan(0, SMALL)
    assert {task.query for task in TASKS.values()} == {task.target for task in TASKS.values()} == {"text", "image", "image+text"}
    for name, task in TASKS.items():
        for row in made.rows["train"][name]:
            assert bool(row["qry_image_path"]) == ("image" in task.query) == ("<|image_1|>" in row["qry"])
            assert bool(row["pos_image_path"]) == ("image" in task.target) == ("<|image_1|>" in row["pos_text"])
            assert (row["neg_text"], row["neg_image_path"]) != (row["pos_text"], row["pos_image_path"])
        for row in made.rows["eval"][name]:
            assert bool(row["qry_img_path"]) == ("image" in task.query)
            assert bool(row["tgt_img_path"][0]) == ("image" in task.target)


def test_shortcuts_are_what_the_tasks_say(full):
    """The stated ceiling of a model that ignores an input is what the candidates allow."""
    made = full
    name_of = {scene.file: scene for scene in made.scenes}
    crops = {file: (scene, cell) for scene in made.scenes for cell, file in scene.crops}
    for row in made.rows["eval"]["OpenMoji-Labelled"][:40]:
        own_scene, cell = crops[row["tgt_img_path"][0]]
        label = own_scene.characters[cell]
        same = [file for file in row["tgt_img_path"] if crops[file][0].characters[crops[file][1]] == label]
        assert len(same) == 2 and len({crops[file][0].colour for file in same}) == 2
    for row in made.rows["eval"]["OpenMoji-Recolour"][:40]:
        label = name_of[row["tgt_img_path"][0]].characters
        same = [name_of[file] for file in row["tgt_img_path"] if name_of[file].characters == label]
        assert len(same) == 4 and len({scene.colour for scene in same}) == 4
    for row in made.rows["eval"]["OpenMoji_i2i"]:
        assert name_of[row["qry_img_path"]].colour != name_of[row["tgt_img_path"][0]].colour


def test_no_picture_is_in_both_splits(built):
    """By name, by content and by kind of clutter."""
    hashes = content(built / "images")
    train = {h for file, h in hashes.items() if file.startswith("train")}
    held = {h for file, h in hashes.items() if file.startswith("eval")}
    assert train and held and not train & held
    assert not set(STYLES["train"].clutter) & set(STYLES["eval"].clutter)
    for name in mmeb.dataset_names(built / "train"):
        used = {path for row in mmeb.read_train(built / "train", name) for path in (row["qry_image_path"], row["pos_image_path"]) if path}
        assert all(path.startswith("train/") for path in used)


def test_rows_name_pictures_that_are_there(built):
    from PIL import Image

    for name in TASKS:
        mmeb.read_train(built / "train", name, image_root=built / "images")
        mmeb.read_eval(built / "eval", name, image_root=built / "images")
    sizes = {Image.open(file).size for file in (built / "images").rglob("*.png")}
    assert sizes == {(56, 56), (112, 56), (84, 84)}


def test_same_seed_same_bytes_other_seed_other_pictures(built, tmp_path):
    """Also with another number of drawing processes. No picture of another seed is one of this seed's."""
    again = build.build_data(tmp_path / "again", seed=3, size=SMALL, workers=2, say=None)
    assert content(again) == content(built)
    other = build.build_data(tmp_path / "other", seed=4, size=Size(subjects=8, drawings=4, pairs=4, quads=4), workers=1, say=None)
    assert not set(content(built / "images").values()) & set(content(other / "images").values())


def test_finished_is_reused_and_broken_is_rebuilt(built, tmp_path):
    small = Size(subjects=8, drawings=5, pairs=4, quads=2)
    folder = build.build_data(tmp_path, size=small, workers=1, say=None)
    before = content(folder)
    stamp = (folder / "tasks.json").stat().st_mtime_ns
    build.build_data(tmp_path, size=small, workers=1, say=None)
    assert (folder / "tasks.json").stat().st_mtime_ns == stamp
    next((folder / "images").rglob("*.png")).unlink()
    (tmp_path / "data.part").mkdir()  # what an interrupted build leaves
    (tmp_path / "data.part" / "half").write_text("half")
    build.build_data(tmp_path, size=small, workers=1, say=None)
    assert content(folder) == before and not (tmp_path / "data.part").exists()
    build.build_data(tmp_path, seed=9, size=small, workers=1, say=None)
    assert build.read_summary(folder)["seed"] == 9


def test_summary_states_chance(built):
    summary = build.read_summary(built)
    chance = {task["name"]: task["chance"] for task in summary["tasks"]}
    assert chance["OpenMoji-Object"] == pytest.approx(1 / 32) and chance["OpenMoji-Recolour"] == pytest.approx(1 / 128)
    assert "CC BY-SA 4.0" in summary["credits"]
    assert sum(summary["pictures"].values()) == len(list((built / "images").rglob("*.png")))
    (built.parent / "bad").mkdir()
    (built.parent / "bad" / "tasks.json").write_text("{half")
    with pytest.raises(ValueError, match="tasks.json: not readable"):
        build.read_summary(built.parent / "bad")
    with pytest.raises(ValueError, match="tasks.json: not there; build the benchmark first"):
        build.read_summary(built.parent / "nowhere")
    assert json.loads((built / "eval" / "tasks.json").read_text()) == summary


def test_drawing_keeps_subjects_in_their_cells():
    found = subjects()
    for k in range(0, 320, 16):
        scene = Scene("x.png", (5, k), "train", 2, tuple(s.character for s in found[k : k + 4]), "blue", 42)
        picture, boxes = draw(scene, 0)
        assert picture.size == (84, 84) and picture.mode == "RGB"
        for cell, (left, top, right, bottom) in enumerate(boxes):
            assert cell % 2 * 42 <= left < right <= (cell % 2 + 1) * 42 and cell // 2 * 42 <= top < bottom <= (cell // 2 + 1) * 42
            assert crop(picture, boxes[cell]).size == (CELL, CELL)


def test_unusable_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="multiple of 8"):
        plan(0, Size(subjects=12))
    with pytest.raises(ValueError, match="draws nothing"):
        glyph("\u2003")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="cannot be made"):
        build.build_data(tmp_path / "file" / "below", size=Size(subjects=8, drawings=2, pairs=2, quads=2), workers=1, say=None)
