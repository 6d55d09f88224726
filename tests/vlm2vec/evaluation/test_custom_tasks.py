"""Tasks of one's own: a folder in a known layout, a few lines of YAML, and what they must say; video files as they come."""

import json

import pytest

from tests.helpers.evaluation_layouts import StubModel, documents, frames, mmeb, parquet, picture
from vlm2vec.evaluation.loaders import load_task
from vlm2vec.evaluation.loaders.video_root import VideoRoot
from vlm2vec.evaluation.runner import Options, run_tasks
from vlm2vec.evaluation.tasks import find_tasks, load_tasks, make_task, read_task_file

TEN_LINES = """\
tasks:
  - name: Products
    loader: mmeb
    group: image_ret
    metric: hit@5
    query_prompt: "Ask: {text}"
  - name: Clips
    modality: video
    loader: video_labels
    options: {video: file, label: what}
    query_prompt: "<|video_1|> What happens?"
"""


def test_yaml_adds_tasks(tmp_path):
    data, images = mmeb(tmp_path, name="Products", rows=4, candidates=3)
    mmeb(tmp_path, name="Other", rows=4, candidates=3)
    (data / "tasks.json").write_text(json.dumps({"tasks": [{"name": "Other", "meta_task": "vqa", "candidates": 3, "query": "image"}]}))
    for i, name in enumerate("abc"):
        frames(images / "Clips" / name, 2, 10 * i)
    parquet(data / "Clips" / "test.parquet", file=["a", "b", "c"], what=["jump tag:1", "run tag:2", "jump tag:1"])
    (tmp_path / "mine.yaml").write_text(TEN_LINES)
    own = read_task_file(tmp_path / "mine.yaml")
    tasks = {t.name: t for t in find_tasks(data, None, own)}
    assert (tasks["Products"].meta_task, tasks["Products"].metric) == ("retrieval", "hit@5")
    assert (tasks["Other"].meta_task, tasks["Other"].group, tasks["Other"].candidates) == ("vqa", "image_qa", "local")
    assert load_task(tasks["Products"], data, images).queries[0]["text"].startswith("Ask: <|image_1|>")
    assert [t.name for t in find_tasks(data, ["vqa"])] == ["Other"]
    clips = load_task(tasks["Clips"], data, images)
    assert clips.names == ["jump tag:1", "run tag:2"] and clips.labels == [[0], [1], [0]] and len(clips.queries[0]["video"]) == 2
    rows = run_tasks(StubModel(), list(tasks.values()), data, images, tmp_path / "out", options=Options(progress=False))
    assert {r["task"]: r["num_queries"] for r in rows} == {"Products": 4, "Other": 4, "Clips": 3}
    assert not any(r["problems"] for r in rows)


def test_prompts_wrap_rows_that_lack_them_alone(tmp_path):
    """A prompt that a task of one's own states is never left out; published rows hold theirs already."""
    data, images = mmeb(tmp_path, rows=2, candidates=2)
    published = load_tasks()["ImageNet-1K"]
    assert load_task(published, data, images).queries[0]["text"] == "<|image_1|>\nWhat is it? tag:0\n"
    values = {"name": "ImageNet-1K", "group": "image_cls", "query_prompt": "Q {text}", "target_prompt": "A {text}"}
    own = load_task(make_task(values, "here"), data, images)
    assert own.queries[0]["text"] == "Q <|image_1|>\nWhat is it? tag:0\n"
    assert [c["text"] for c in own.candidates] == ["A label tag:0", "A label tag:1"] and own.names == ["label tag:0", "label tag:1"]


def test_a_folder_of_documents_needs_no_yaml(tmp_path):
    documents(tmp_path, name="Invoices", pages=6, queries=3)
    (task,) = find_tasks(tmp_path / "eval")
    assert (task.name, task.modality, task.metric, task.candidates) == ("Invoices", "visdoc", "ndcg_linear@5", "global")
    (row,) = run_tasks(StubModel(), [task], tmp_path / "eval", tmp_path / "eval", tmp_path / "out", options=Options(progress=False))
    assert row["num_candidates"] == 6 and row["num_queries"] == 3


@pytest.mark.parametrize(
    "values, message",
    [
        ({"loader": "video_labels"}, "video_labels needs query_prompt, options.video, options.label"),
        ({"loader": "documents"}, "documents needs query_prompt, target_prompt"),
        ({"loader": "video_choice", "query_prompt": "q", "options": {"video": "v", "question": "q", "answer": "a"}}, "options.choices or"),
        ({"loader": "video_labels", "query_prompt": "q", "options": {"video": "v", "label": "l", "label_set": "X"}}, "no label set 'X'"),
    ],
)
def test_what_a_task_lacks_is_named(tmp_path, values, message):
    parquet(tmp_path / "Mine" / "test.parquet", v=["a"], l=["b"])
    with pytest.raises(ValueError, match=f"task Mine: .*{message}"):
        load_task(make_task({"name": "Mine", **values}, "here"), tmp_path, tmp_path)


def test_published_tasks_say_all_they_need(tmp_path):
    for task in load_tasks().values():
        with pytest.raises(ValueError, match=r"\*\.parquet or \.jsonl in "):
            load_task(task, tmp_path, tmp_path)


def test_video_files(tmp_path):
    """A video file is reduced to at most 64 frames, then sampled; one that does not decode is named and its row counted as wrong."""
    av = pytest.importorskip("av")
    from PIL import Image

    folder = tmp_path / "Breakfast"
    folder.mkdir()
    with av.open(str(folder / "v1.mp4"), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(150):
            out.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (32, 32), (i, i, i)))))
        out.mux(stream.encode())
    (folder / "v2.mp4").write_bytes((folder / "v1.mp4").read_bytes()[:300])
    picture(folder / "x.png", 1)
    task = load_tasks()["Breakfast"]
    videos = VideoRoot(task, tmp_path, tmp_path / "cache")
    kept = videos.all_frames("v1")
    assert len(kept) == 64, "every second of 150 frames, the first 64 of them"
    shades = [Image.open(frame).convert("L").getpixel((16, 16)) for frame in videos.item("", "v1")["video"]]
    assert len(shades) == 8 and shades == sorted(shades) and shades[0] < 6 and abs(shades[-1] - 126) < 6
    assert "v2.mp4" in videos.item("", "v2")["unreadable"]
    assert not list((tmp_path / "cache").rglob("*.part"))
    parquet(tmp_path / "eval" / "Breakfast" / "test-0.parquet", video_id=["v1", "v2", "v1"], pos_text=["milk", "tea", "milk"])
    (row,) = run_tasks(StubModel(), [task], tmp_path / "eval", tmp_path, tmp_path / "out", options=Options(progress=False))
    assert row["problems"]["affected_rows"] == 1 and row["problems"]["unreadable_query"]["rows"] == 1
    assert "v2.mp4" in row["problems"]["unreadable_query"]["examples"][0]
