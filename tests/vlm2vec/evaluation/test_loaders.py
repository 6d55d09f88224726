"""The task table and the loaders: what is encoded, what is ranked, what is right, in each layout."""

import hashlib

import pytest
import yaml

from tests.helpers.evaluation_layouts import documents, frames, mmeb, parquet, picture
from vlm2vec.evaluation.loaders import LOADERS, load_task
from vlm2vec.evaluation.loaders.document import stored_name
from vlm2vec.evaluation.loaders.image import rebuild_query, rebuild_target
from vlm2vec.evaluation.tasks import custom_task, find_tasks, label_sets, load_tasks, make_task, published


def test_table_holds_the_78_tasks():
    tasks = load_tasks()
    count = {}
    for task in tasks.values():
        count[task.modality] = count.get(task.modality, 0) + 1
        assert task.loader in LOADERS
        assert task.metric == ("ndcg_linear@5" if task.modality == "visdoc" else "hit@1")
    assert count == {"image": 36, "video": 18, "visdoc": 24}
    assert sum(t.split == "ind" for t in tasks.values()) == 20 and sum(t.split == "ood" for t in tasks.values()) == 16
    assert set(published()["models"]) == set(tasks)
    sizes = {name: len(labels) for name, labels in label_sets().items()}
    assert sizes == {"Breakfast": 10, "HMDB51": 51, "UCF101": 101, "Kinetics-700": 700}


def test_table_agrees_with_the_facts(golden):
    facts = golden / "facts"
    tasks = load_tasks()
    v1 = yaml.safe_load((facts / "mmeb_v1.yaml").read_text())["datasets"]
    v2 = yaml.safe_load((facts / "mmeb_v2.yaml").read_text())["datasets"]
    assert list(tasks) == [d["name"] for d in v1 + v2]
    for fact in v1:
        task = tasks[fact["name"]]
        assert (task.query_prompt, task.target_prompt) == (fact["query"]["template"], fact["target"]["template"])
        assert (task.split, task.meta_task, task.form) == (fact["split"], fact["meta_task"], fact["v2_parser"])
    for fact in v2:
        task = tasks[fact["name"]]
        assert (task.group, task.metric, task.candidates) == (fact["group"], fact["metric"], fact["eval_type"])


def test_v2_parts_rebuild_the_v1_strings():
    """For each of the 36: instruction and text as V2 keeps them apart give the exact V1 template."""
    for task in list(load_tasks().values())[:36]:
        head, _, tail = task.query_prompt.partition("{text}")
        has_image = task.query_prompt.startswith("<|image_1|>") and task.form != "image_t2i"
        quote = head.endswith('"')
        instruction = head[:-1] if quote else head
        text = '"words"' if quote else "words" if tail else ""
        ours = rebuild_query(task.form, instruction.rstrip(), text, has_image, task.options.get("query_end", ""))
        assert ours == task.query_prompt.replace("{text}", "words"), task.name
        if task.target_prompt.startswith("<|image_1|>"):
            head, _, tail = task.target_prompt.partition("{text}")
            instruction = head[:-1] if head.endswith('"') else head
            text = '"words"' if head.endswith('"') else "words" if tail else ""
            ours = rebuild_target(task.form, instruction.rstrip(), text, True)
            assert ours.rstrip("\n") == task.target_prompt.replace("{text}", "words").rstrip("\n"), task.name


def test_mmeb_rows(tmp_path):
    data, images = mmeb(tmp_path, rows=5, candidates=4)
    loaded = load_task(load_tasks()["ImageNet-1K"], data, images)
    assert loaded.queries[3] == {"text": "<|image_1|>\nWhat is it? tag:3\n", "image": str(images / "ImageNet-1K/3.png")}
    assert len(loaded.candidates) == 4 and loaded.local[1][0] == loaded.labels[1][0]
    assert loaded.names[loaded.labels[2][0]] == "label tag:2"
    assert not loaded.problems


def test_stray_marker_is_text(tmp_path):
    """WebQA and EDIS queries carry a marker without an image: the model is told so."""
    parquet(
        tmp_path / "WebQA" / "test-00000.parquet",
        qry_text=["<|image_1|>\nFind: x\n"],
        qry_img_path=[""],
        tgt_text=[["<|image_1|>\nA", "<|image_1|>\nA"]],
        tgt_img_path=[["a.png", "b.png"]],
    )
    loaded = load_task(load_tasks()["WebQA"], tmp_path, tmp_path)
    assert loaded.queries[0] == {"text": "<|image_1|>\nFind: x\n", "image": None}
    assert loaded.names == ["a.png", "b.png"]


def test_candidate_keys_of_both_protocols(tmp_path):
    """One path under two texts: two candidates in V1; in V2 too for i2i_vg (path:text), one for t2i (path)."""
    for name in ("RefCOCO-Matching", "WebQA"):
        parquet(
            tmp_path / name / "test-00000.parquet",
            qry_text=["q"],
            qry_img_path=[""],
            tgt_text=[["one", "two", "one"]],
            tgt_img_path=[["a.png", "a.png", "a.png"]],
        )
    sizes = {}
    for name in ("RefCOCO-Matching", "WebQA"):
        for protocol in ("v1", "v2"):
            loaded = load_task(load_tasks()[name], tmp_path, tmp_path, protocol=protocol)
            sizes[name, protocol] = len(loaded.candidates)
            assert loaded.problems.summary()["duplicate_candidates"]["rows"] == 1 and not loaded.problems
    assert sizes == {("RefCOCO-Matching", "v1"): 2, ("RefCOCO-Matching", "v2"): 2, ("WebQA", "v1"): 2, ("WebQA", "v2"): 1}


def test_documents(tmp_path):
    rows = documents(tmp_path)
    task = load_tasks()["ViDoRe_arxivqa"]
    loaded = load_task(task, tmp_path / "eval", tmp_path / "media", cache=tmp_path / "cache")
    assert len(loaded.candidates) == 30 and loaded.local is None
    best = {}
    for q, c, s in rows:
        if s > 0:
            best[q, c] = max(s, best.get((q, c), 0))
    for q, (names, grades, labels) in enumerate(zip(loaded.label_names, loaded.grades, loaded.labels)):
        assert dict(zip(names, grades)) == {c: s for (i, c), s in best.items() if i == q}
        assert [c if c != "gone" else -1 for c in names] == [loaded.names[x] if x >= 0 else -1 for x in labels]
    assert (tmp_path / "cache" / task.name / stored_name("p3")).read_bytes()
    assert loaded.candidates[3]["text"] == "<|image_1|> Understand the content of the provided document image."


def test_long_page_names_are_stored_short():
    assert stored_name("x" * 80 + ".jpg") == "x" * 50 + "_" + hashlib.md5(b"x" * 80 + b".jpg").hexdigest()[:8] + ".jpg"


def test_video_tasks(tmp_path):
    media = tmp_path / "media" / "video-tasks" / "frames"
    frames(media / "video_cls" / "Breakfast" / "v1", 12, 1)
    frames(media / "video_cls" / "Breakfast" / "v2", 3, 50)
    parquet(tmp_path / "Breakfast" / "test-00000.parquet", video_id=["v1", "v2", "v3"], pos_text=["milk", "tea", "dung"])
    loaded = load_task(load_tasks()["Breakfast"], tmp_path, tmp_path / "media")
    assert [p.rpartition("_")[2] for p in loaded.queries[0]["video"]] == [f"{i}.jpg" for i in (1, 2, 4, 5, 7, 8, 10, 12)]
    assert len(loaded.queries[1]["video"]) == 3, "a folder with fewer frames is used whole"
    assert loaded.queries[0]["text"].endswith("in the video. "), "the instruction ends with a space"
    assert "no frames" in loaded.queries[2]["unreadable"] and loaded.labels[2] == [-1]
    assert [loaded.names[x[0]] for x in loaded.labels[:2]] == ["milk", "tea"] and len(loaded.candidates) == 10


def test_video_questions(tmp_path):
    media = tmp_path / "media" / "video-tasks" / "frames" / "video_qa"
    for name in ("Video-MME/a", "NExTQA/a", "EgoSchema/a", "ActivityNetQA/v_a", "MVBench/state_change/a.mp4"):
        frames(media / name, 2, len(name))
    question = "Given a video and a question, select the most accurate answer from the provided candidates. "
    question = "<|video_1|> " + question + "Return only the exact text of your chosen answer. Question:  "
    options = ["A. Apples.", "B. Pears."]
    parquet(tmp_path / "Video-MME" / "test.parquet", videoID=["a"], question=["Which?"], options=[options], answer=["B"])
    parquet(tmp_path / "NExTQA" / "test.parquet", video=["a"], question=["why"], answer=[3], **{f"a{i}": [f"c{i}"] for i in range(5)})
    parquet(tmp_path / "EgoSchema" / "test.parquet", video_idx=["a"], question=["Q"], answer=["1"], option=[options])
    parquet(tmp_path / "ActivityNetQA" / "test.parquet", video_name=["a"], question=["is it"], answer=["no"])
    parquet(
        tmp_path / "MVBench" / "state_change" / "train-0.parquet",
        video=["a.mp4"],
        question=["What"],
        candidates=[["ice", "water", "ice"]],
        answer=["water"],
    )
    parquet(
        tmp_path / "MVBench" / "test.parquet",
        video=["a.mp4"],
        question=["What"],
        subset=["state_change"],
        candidates=[["ice", "water", "ice"]],
        answer=["water"],
    )
    (tmp_path / "MVBench" / "state_change" / "train-0.parquet").unlink()
    (tmp_path / "MVBench" / "state_change").rmdir()
    expected = {
        "Video-MME": ("Which?\nA. Apples.\nB. Pears.", ["Apples", "Pears"], "Pears"),
        "NExTQA": ("why\nOptions:\n(A) c0\n(B) c1\n(C) c2\n(D) c3\n(E) c4", [f"c{i}" for i in range(5)], "c3"),
        "EgoSchema": ("QA. Apples. B. Pears.", ["Apples", "Pears"], "Pears"),
        "ActivityNetQA": ("is it? (A) yes; (B) no.", ["yes", "no"], "no"),
        "MVBench": ("What\nOptions:\n(A) ice\n(B) water\n(C) ice", ["(A) ice", "(B) water", "(C) ice"], "(B) water"),
    }
    for name, (shown, targets, right) in expected.items():
        loaded = load_task(load_tasks()[name], tmp_path, tmp_path / "media")
        assert loaded.queries[0]["text"] == question + shown, name
        assert len(loaded.queries[0]["video"]) == 2, name
        assert [loaded.candidates[c]["text"] for c in loaded.local[0]] == targets, name
        assert loaded.candidates[loaded.labels[0][0]]["text"] == right, name


def test_moments(tmp_path):
    base = tmp_path / "media" / "QVHighlight" / "vid"
    for name in ("query", "clip_2", "clip_10", "positive_0"):
        frames(base / name, 2, len(name))
    parquet(tmp_path / "QVHighlight" / "test.parquet", query=["a dog"], video_path=["x/vid.mp4"])
    loaded = load_task(load_tasks()["QVHighlight"], tmp_path, tmp_path / "media")
    assert [n.rpartition("/")[2] for n in loaded.names] == ["clip_2", "clip_10", "positive_0"]
    assert loaded.label_names == [[loaded.names[2]]] and str(tmp_path) not in loaded.names[2], "where the folder lies is no answer"
    assert loaded.labels == [[2]]
    seeker = tmp_path / "media" / "MomentSeeker"
    for name in ("a_1", "a_2", "b_3", "q_9"):
        frames(seeker / "video_frames" / name, 10, len(name))
    picture(seeker / "query_pic.jpg", 1)

    def clip(*names):
        return [[{"output_path": n} for n in names]] * 3

    parquet(
        tmp_path / "MomentSeeker" / "test.parquet",
        query=["t", "i", "v"],
        input_frames=["", "pic.jpg", "q/9.mp4"],
        positive_frames=clip("a/1.mp4", "a/2.mp4"),
        negative_frames=clip("b/3.mp4"),
    )
    loaded = load_task(load_tasks()["MomentSeeker"], tmp_path, tmp_path / "media")
    assert loaded.labels == [[0, 1]] * 3 and loaded.local == [[0, 1, 2]] * 3
    assert len(loaded.candidates[0]["video"]) == 10, "all stored frames of a clip"
    assert loaded.queries[1]["image"].endswith("query_pic.jpg") and len(loaded.queries[2]["video"]) == 10
    assert loaded.queries[0] == {"text": "Find the clip that corresponds to the given text: t"}


@pytest.mark.parametrize(
    "values, message",
    [
        ({"name": "a", "colour": 1}, "unknown keys \\['colour'\\]"),
        ({"name": "a", "metric": "speed@1"}, "metric is one of hit"),
        ({"name": "a/b"}, "no slash"),
        ({"name": "a", "modality": "smell"}, "modality is one of image, video, visdoc"),
        ("a", "a mapping with at least a name"),
    ],
)
def test_bad_task_lines_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        make_task(values, "tasks.yaml")


def test_bad_data_is_named(tmp_path):
    data, images = mmeb(tmp_path, rows=2, candidates=2)
    with pytest.raises(ValueError, match="no data folder"):
        find_tasks(tmp_path / "nothing")
    with pytest.raises(ValueError, match="no task, group or modality GQA .* it holds ImageNet-1K"):
        find_tasks(data, ["GQA"])
    parquet(data / "GQA" / "test-00000.parquet", qry_text=["a"], qry_img_path=[""], tgt_text=[["a"]])
    with pytest.raises(ValueError, match="GQA/test-00000.parquet: no column 'tgt_img_path'; it has qry_text"):
        load_task(load_tasks()["GQA"], data, images)
    parquet(data / "GQA" / "test-00000.parquet", qry_text=["a"], qry_img_path=[""], tgt_text=[["a", "b"]], tgt_img_path=[[""]])
    with pytest.raises(ValueError, match="task GQA, row 0: 2 tgt_text but 1 tgt_img_path"):
        load_task(load_tasks()["GQA"], data, images)
    parquet(data / "GQA" / "test-00000.parquet", qry_text=["a"], qry_img_path=["../../etc/passwd"], tgt_text=[["a"]], tgt_img_path=[[""]])
    with pytest.raises(ValueError, match="leaves the image folder"):
        load_task(load_tasks()["GQA"], data, images)
    (data / "GQA" / "test-00000.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match="GQA/test-00000.parquet cannot be read"):
        load_task(load_tasks()["GQA"], data, images)
    with pytest.raises(ValueError, match="unknown loader 'magic'"):
        load_task(make_task({"name": "x", "loader": "magic"}, "here"), data, images)
    assert custom_task("x").meta_task == "custom"
