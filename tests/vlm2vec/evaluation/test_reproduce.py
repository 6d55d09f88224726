"""--reproduce and --check: what a score was made with, what differs here, and what explains a score."""

import json

import pytest
import yaml

from tests.helpers import tiny_models
from tests.helpers.evaluation_layouts import frames, parquet, picture
from vlm2vec.cli import main
from vlm2vec.evaluation.reproduce.causes import fitting_causes, known_causes
from vlm2vec.evaluation.reproduce.compare import Difference, differences
from vlm2vec.evaluation.reproduce.expected import interval
from vlm2vec.evaluation.reproduce.rows import find_row, read_scores
from vlm2vec.evaluation.reproduce.verdict import compare_with, lines
from vlm2vec.evaluation.tasks.score_rows import score_rows
from vlm2vec.evaluation.tasks.task import TASK_MODALITIES


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The quickstart's layout (MMEB's, with tasks.json) with one task of pictures, one of films, a tiny model, and its scores."""
    root = tmp_path_factory.mktemp("small")
    (root / "model").mkdir()
    tiny_models.qwen2_vl(root / "model")
    count = 12
    for i in range(count):
        picture(root / "images" / "Object" / f"{i}.png", i, (112, 84))
        frames(root / "images" / "video-tasks/frames/video_cls/UCF101" / f"v{i}", 10, 100 + 20 * i)
    names = [f"thing {i}" for i in range(count)]
    parquet(
        root / "eval" / "OpenMoji-Object" / "test-00000.parquet",
        qry_text=["<|image_1|>\nIdentify the object shown in the image\n"] * count,
        qry_img_path=[f"Object/{i}.png" for i in range(count)],
        tgt_text=[names[i:] + names[:i] for i in range(count)],
        tgt_img_path=[[""] * count] * count,
    )
    labels = ["Biking", "Archery", "Bowling", "Diving"]
    parquet(root / "eval" / "UCF101" / "test-00000.parquet", video_id=[f"v{i}" for i in range(count)], pos_text=(labels * count)[:count])
    (root / "eval" / "tasks.json").write_text(json.dumps({"OpenMoji-Object": "classification"}))
    assert main(["eval", *where(root), "--output", str(root / "out"), "--no-report"]) == 0
    return root


def where(root):
    return [str(root / "model"), "--data", str(root / "eval"), "--images", str(root / "images"), "--device", "cpu"]


def check(root, capsys, *words, file="out/tasks/UCF101.json"):
    capsys.readouterr()
    code = main(["eval", *where(root), "--check", str(root / file), *words])
    return code, capsys.readouterr().out


FILES = ["out/summary.json", "out/tasks/OpenMoji-Object.json", "out/OpenMoji-Object_score.json", "out/video/UCF101_score.json", "out"]


@pytest.mark.parametrize("file", FILES)
def test_nothing_differs_where_nothing_changed(small, capsys, file):
    code, out = check(small, capsys, file=file)
    assert code == 0 and out.count("nothing differs") == (2 if file in ("out", "out/summary.json") else 1)


@pytest.mark.parametrize(
    ("words", "file", "wanted"),
    [
        (["--frames", "4"], "UCF101", ["frames:    frames: '8' there, '4' here"]),
        (["--option", "max_pixels=3136"], "OpenMoji-Object", ["limit:     max_pixels: 1,003,520 there, 3136 here"]),
        (["--option", "max_length=64"], "UCF101", ["limit:     max_length: none there, 64 here"]),
        (["--prompt", "Find: "], "OpenMoji-Object", ["prompt:    prompt: none there, 'Find: ' here"]),
        (["--protocol", "v2"], "UCF101", ["protocol:  protocol: 'v1' there, 'v2' here"]),
        (["--option", "orientation=exif"], "UCF101", ["pictures: {} there, {'orientation': 'exif'}", "orientation: 'stored' there"]),
        (["--option", "positions=mrope"], "UCF101", ["feeding:   positions: 'sequential' there, 'mrope' here"]),
        (["--dtype", "bfloat16"], "UCF101", ["precision: model dtype: 'torch.float32' there, 'torch.bfloat16' here"]),
    ],
)
def test_a_changed_setting_is_named(small, capsys, words, file, wanted):
    code, out = check(small, capsys, *words, file=f"out/tasks/{file}.json")
    assert code == 1 and all(text in out for text in wanted), out
    assert not {"texts of the queries", "pictures or frames"} & {line.split(":")[1].strip() for line in out.splitlines()[1:]}


def test_what_cannot_move_a_score_is_said_and_does_not_count(small, capsys):
    code, out = check(small, capsys, "--frames", "4", "--batch-size", "8", file="out/tasks/OpenMoji-Object.json")
    assert code == 0 and "nothing that moves its score differs" in out
    assert "frames: '8' there, '4' here (moves no score of this task)" in out and "batch size: 32 there, 8 here (moves" in out


def test_a_check_that_compared_nothing_fails(small, capsys, tmp_path):
    """Tasks of the file that are not here are counted; a file of MMEB-V3 brings its protocol and feeding with it."""
    code, out = check(small, capsys, "--tasks", "UCF101", file="out/tasks/OpenMoji-Object.json")
    assert code == 1 and "0 of 1 tasks of" in out and "1 are not among the tasks here" in out
    code, out = check(small, capsys, "--tasks", "UCF101", file="out/summary.json")
    assert code == 0 and out.count("nothing differs") == 1, "the tasks that were named are compared"
    import shutil

    shutil.copytree(small / "eval" / "OpenMoji-Object", tmp_path / "OpenMoji-Object")
    part = ["eval", str(small / "model"), "--data", str(tmp_path), "--images", str(small / "images"), "--device", "cpu"]
    assert main([*part, "--check", str(small / "out" / "summary.json")]) == 1
    assert "1 of 2 tasks of" in capsys.readouterr().out
    v3 = tmp_path / "v3"
    sides = {"qry_text": ["a"], "qry_img_path": [""], "tgt_text": [["a", "b"]], "tgt_img_path": [["", ""]]}
    parquet(v3 / "image-query" / "NIGHTS" / "test-00000.parquet", **sides)
    words = ["eval", str(small / "model"), "--data", str(v3), "--device", "cpu"]
    how = ["--no-report", "--protocol", "v3", "--feeding", "wemm", "--tasks", "NIGHTS"]
    assert main([*words, "--output", str(tmp_path / "out"), *how]) == 0
    capsys.readouterr()
    assert main([*words, "--check", str(tmp_path / "out" / "tasks" / "NIGHTS.json")]) == 0
    assert "NIGHTS: nothing differs" in capsys.readouterr().out


def test_changed_data_and_weights_are_named(small, capsys, tmp_path):
    """A prompt within the rows, one other picture, one other answer, other weights."""
    import shutil

    for name in ("eval", "images", "model", "out"):
        shutil.copytree(small / name, tmp_path / name)
    file = tmp_path / "eval" / "OpenMoji-Object" / "test-00000.parquet"
    import pyarrow.parquet as pq

    rows = pq.read_table(file).to_pydict()
    picture(tmp_path / "images" / "Object" / "3.png", 99, (112, 84))
    code, out = check(tmp_path, capsys, file="out/tasks/OpenMoji-Object.json")
    assert code == 1 and "media:     pictures or frames: not the same" in out and "texts" not in out
    parquet(file, **{**rows, "qry_text": ["<|image_1|>\nName it\n"] * len(rows["qry_text"])})
    code, out = check(tmp_path, capsys, file="out/tasks/OpenMoji-Object.json")
    assert code == 1 and "prompt:    first query: '<|image_1|>\\nIdentify the object" in out and "\\nName it\\n' here" in out
    parquet(file, **{**rows, "tgt_text": [row[::-1] for row in rows["tgt_text"]]})
    assert "answers:   right answers or candidate lists: not the same" in check(tmp_path, capsys, file="out/tasks/OpenMoji-Object.json")[1]
    (tmp_path / "other").mkdir()
    from transformers import Qwen2VLForConditionalGeneration

    other = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "model")
    other.model.language_model.norm.weight.data += 0.5
    other.save_pretrained(tmp_path / "model")
    assert "model:     model weights: not the same" in check(tmp_path, capsys)[1]


def reproduce(root, capsys, output, *words, row="out/summary.json"):
    capsys.readouterr()
    words = ["--reproduce", str(root / row) if "@" not in str(row) else row, "--output", str(output), "--no-report", *words]
    code = main(["eval", *where(root), *words])
    told = json.loads((output / "reproduce.json").read_text())
    return code, capsys.readouterr().out, {task["task"]: task for task in told["tasks"]}


def test_a_run_is_made_again(small, capsys, tmp_path):
    """Settings that a row was made with are taken from it; those given by hand win, and are the causes."""
    first = tmp_path / "first"
    words = ["--frames", "3", "--prompt", "Find: ", "--option", "max_pixels=6272", "--option", "background=white", "--protocol", "v2"]
    assert main(["eval", *where(small), "--output", str(first), "--no-report", *words]) == 0
    code, out, tasks = reproduce(small, capsys, tmp_path / "again", row=first / "summary.json")
    assert code == 0 and "2 tasks compared: 2 equal" in out and "known to differ" not in out
    for name in ("image/OpenMoji-Object", "video/UCF101"):
        files = [(folder / f"{name}_score.json").read_bytes() for folder in (first, tmp_path / "again")]
        assert files[0] == files[1]


@pytest.mark.parametrize(
    ("words", "task", "cause"),
    [
        (["--frames", "1"], "UCF101", "frames: '8' there, '1' here"),
        (["--option", "max_pixels=3136"], "OpenMoji-Object", "max_pixels: 1,003,520 there, 3136 here"),
        (["--prompt", "Once upon a time in a land far away: "], "OpenMoji-Object", "prompt: none there, 'Once upon"),
    ],
)
def test_a_changed_setting_is_the_cause_of_a_difference(small, capsys, tmp_path, words, task, cause):
    """The row's scores are set so that ours are far from them: what is known to differ is named first."""
    content = json.loads((small / "out" / "summary.json").read_text())
    for row in content["tasks"]:
        row["score"] = 1.0 if row["score"] < 0.5 else 0.0
    (tmp_path / "row.json").write_text(json.dumps(content))
    _, out, tasks = reproduce(small, capsys, tmp_path / "again", *words, row=tmp_path / "row.json")
    assert tasks[task]["state"] == "outside" and tasks[task]["causes"][0].startswith(cause), tasks[task]
    assert "OUTSIDE" in out and cause in out
    other = next(name for name in tasks if name != task)
    if words[0] == "--frames":
        assert not tasks[other]["causes"], "frames move no pictures' scores"


def test_scores_without_settings_are_still_read(small, capsys, tmp_path):
    def without(value):
        if isinstance(value, dict):
            return {key: without(part) for key, part in value.items() if key != "run"}
        return [without(part) for part in value] if isinstance(value, list) else value

    for name in ("summary.json", "OpenMoji-Object_score.json", "video/UCF101_score.json"):
        old = tmp_path / name
        old.parent.mkdir(exist_ok=True)
        old.write_text(json.dumps(without(json.loads((small / "out" / name).read_text()))))
        now, then = read_scores(small / "out" / name), read_scores(old)
        assert {n: s.value for n, s in now.scores.items()} == {n: s.value for n, s in then.scores.items()} and not then.has_runs
        capsys.readouterr()
        assert main(["eval", *where(small), "--check", str(old)]) == 0
        assert "scores without settings" in capsys.readouterr().out
    code, out, _ = reproduce(small, capsys, tmp_path / "again", row=tmp_path / "summary.json")
    assert code == 0 and "2 tasks compared: 2 equal" in out


def test_a_published_row_is_compared(small, capsys, tmp_path):
    code, out, tasks = reproduce(small, capsys, tmp_path / "row", row="VLM2Vec-V2.0-2B@v2-files")
    assert code == 0 and set(tasks) == {"UCF101"} and tasks["UCF101"]["queries"] == 1000
    assert tasks["UCF101"]["there"] == pytest.approx(0.6) and "the row is of VLM2Vec-V2.0-2B" in out
    assert "number of queries: 1000 there, 12 here" in out and "77 tasks of the row were not run" in out
    run = json.loads((tmp_path / "row" / "tasks" / "UCF101.json").read_text())["run"]
    assert run["settings"]["protocol"] == "v2" and run["settings"]["frames"] == "8" and run["model"]["options"]["max_pixels"] == 1003520


def test_a_row_that_there_is_not_is_told_with_its_likes(small, capsys, tmp_path):
    assert main(["eval", *where(small), "--output", str(tmp_path), "--reproduce", "VLM2Vec-V2.0@v2"]) == 2
    assert "no published row or score file 'VLM2Vec-V2.0@v2'" in (err := capsys.readouterr().err) and "VLM2Vec-V2.0-2B@v2-files" in err
    (tmp_path / "odd.json").write_text('{"task": "a", "score": 7}')
    assert main(["eval", *where(small), "--check", str(tmp_path / "odd.json")]) == 2
    assert "expected a task and its score from 0 to 1, got 'a', 7" in capsys.readouterr().err


def test_every_published_row_has_its_settings():
    for name in score_rows():
        row = find_row(name)
        assert row.protocol and row.about and (row.scores or row.means) and not row.has_runs
        assert all(0 <= score.value <= 1 and score.metric for score in row.scores.values())
    assert find_row("Qwen3-VL-Embedding-2B@v3-paper").options["feeding"] == "raw"
    assert find_row("VLM2Vec-Qwen2VL-7B@v2-files").options["resolution"] == "high"
    assert str(find_row("VLM2Vec-V2.0-2B@v3-paper").frames) == "8"
    assert {row.source for row in score_rows().values()} == set(yaml.safe_load(open_settings())["sources"])


def open_settings():
    from vlm2vec.evaluation.tasks.score_rows import HERE

    return (HERE / "settings.yaml").read_text()


@pytest.mark.parametrize(
    ("score", "count", "low", "high"),
    [
        (0.5, 1000, 0.4691, 0.5309),  # Wilson's interval by hand: (p + z2/2n -+ z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n)
        (0.0, 100, 0.0, 0.0370),
        (1.0, 10, 0.7225, 1.0),
        (0.018, 433, 0.00907, 0.03541),
    ],
)
def test_expected_differences(score, count, low, high):
    assert interval(score, count) == pytest.approx((low, high), abs=1e-4)
    wide = interval(score, count, rounding=0.0005)
    assert wide[0] <= interval(score, count)[0] and wide[1] >= interval(score, count)[1]
    for bad in ((1.2, 10), (0.5, 0)):
        with pytest.raises(ValueError, match="expected a score from 0 to 1"):
            interval(*bad)


def test_causes_that_fit():
    frames_differ = [Difference("frames", "fps:1,max:64", "8", "frames")]
    words = fitting_causes("Qwen3-VL-Embedding-8B", "K700", "video", -12.0, frames_differ, settings_told=False)
    assert words[0] == "frames: 'fps:1,max:64' there, '8' here" and any("8 frames instead of 64" in word for word in words)
    assert not fitting_causes("Qwen3-VL-Embedding-8B", "OK-VQA", "image", -1, frames_differ, settings_told=True)
    unseen = fitting_causes("Qwen3-VL-Embedding-8B", "OK-VQA", "image", 7.0, [], settings_told=False)
    assert any("final norm" in word for word in unseen) and any("system message" in word for word in unseen)
    assert not any("final norm" in word for word in fitting_causes("VLM2Vec-V2.0-2B", "OK-VQA", "image", 7.0, [], settings_told=False))
    for points in (58.0, -64.5, 66.4, -30.0):  # by the published scores, and what is there of them under other models
        labels = fitting_causes("Qwen3-VL-Embedding-2B", "ViDoSeek-page", "visdoc", points, [], settings_told=False)
        assert "ViDoSeek-page-fixed" in labels[0], labels
    for cause in known_causes():
        assert cause.about and (cause.tasks or cause.modalities) and set(cause.modalities) <= set(TASK_MODALITIES)


def causes(points, *known, task="K700", modality="video", model="Qwen3-VL-Embedding-8B", told=False):
    words = fitting_causes(model, task, modality, points, list(known), settings_told=told)
    return {word.split(": ")[1].split(" (it")[0] for word in words if word.startswith(("known cause", "may be"))}


def test_a_cause_fits_in_its_own_direction():
    """Fewer frames make scores lower, so the run that took fewer cannot be the higher one; likewise the authors' feeding."""
    few, many = (Difference("frames", a, b, "frames") for a, b in (("fps:1,max:64", "8"), ("8", "fps:1,max:64")))
    name = "few frames, or films fed otherwise"
    assert name in causes(-12, few) and name not in causes(12, few) and name in causes(12, many) and name not in causes(-12, many)
    raw, own = (Difference("feeding", a, b, "feeding") for a, b in (("authors", "raw"), ("raw", "authors")))
    name = "instruction in the user's text"
    assert name in causes(-7, raw) and name not in causes(7, raw) and name in causes(7, own) and name not in causes(-7, own)
    name = "state before the final norm"
    assert name in causes(7) and name not in causes(-7), "no run of this toolkit has it"
    name = "precision"
    half = Difference("model dtype", "bfloat16", "float32", "precision")
    assert name in causes(0.8, half, told=True) and name not in causes(1.6, half, told=True)


@pytest.mark.parametrize(
    ("option", "there", "here", "task", "modality", "name"),
    [
        ("max_length", 150, 30, "MVBench", "video", "texts cut at another length"),
        ("max_length", 150, 30, "ViDoRe_docvqa", "visdoc", "texts cut at another length"),
        ("text_max_length", 8192, 2048, "text/LongEmbed/narrativeqa", "text", "texts cut at another length"),
        ("max_pixels", 1003520, 3136, "ViDoRe_docvqa", "visdoc", "pixel limits"),
        ("video_max_pixels", 786432, 3136, "K700", "video", "few frames, or films fed otherwise"),
        ("audio_max_seconds", 30, 10, "Clotho", "audio", "length of sounds"),
    ],
)
def test_a_changed_limit_is_its_own_cause(option, there, here, task, modality, name):
    """Each limit by its name: another length of texts is neither fewer frames nor other sizes of pictures."""
    found = causes(-9, Difference(option, there, here, "limit"), task=task, modality=modality, told=True)
    assert found == {name}
    if option in ("video_max_pixels", "audio_max_seconds"):
        assert causes(-9, Difference(option, there, here, "limit"), task="OK-VQA", modality="image", told=True) == set()


def test_causes_stand_without_their_consequences():
    there = {"settings": {"frames": "8", "prompt": None}, "model": {"options": {"frames": 8}}, "data": {"media": "a", "query_texts": "b"}}
    here = {"settings": {"frames": "4", "prompt": None}, "model": {"options": {"frames": 4}}, "data": {"media": "c", "query_texts": "b"}}
    assert [str(d) for d in differences(there, here)] == ["frames: '8' there, '4' here"]
    there["task"], here["task"] = {"query_prompt": "a {text}"}, {"query_prompt": "b {text}"}
    here["data"]["query_texts"], here["data"]["first_query"], there["data"]["first_query"] = "d", "b x", "a x"
    assert [d.what for d in differences(there, here)] == ["frames", "query prompt"]
    assert differences({}, here) == [] and differences(there, there) == []


def test_a_metric_of_another_name_is_not_compared(small):
    row = read_scores(small / "out" / "tasks" / "UCF101.json")
    mine = {"task": "UCF101", "score": 0.5, "metric": "hit@5", "modality": "video", "num_queries": 12, "run": {}}
    (verdict,) = compare_with(row, [mine])
    assert verdict.state == "not compared" and any("another metric" in line for line in lines(row, [verdict]))
