"""--feeding authors: MMEB-V2 as Qwen3-VL-Embedding's authors feed it, down to the rendered text."""

import pytest

from tests.helpers import tiny_models
from tests.helpers.evaluation_layouts import documents, frames, parquet, picture
from vlm2vec import VLM2Vec
from vlm2vec.cli import main
from vlm2vec.evaluation.loaders import load_task
from vlm2vec.evaluation.reproduce.rows import find_row
from vlm2vec.evaluation.tasks import find_tasks, load_tasks, make_task
from vlm2vec.evaluation.tasks.instructions import instruction_of

QA = (
    "Given a video and a question, select the most accurate answer from the provided candidates. "
    "Return only the exact text of your chosen answer."
)
NOTHING = "Represent the user's input."


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("instructions")
    (root / "model").mkdir()
    tiny_models.qwen3_vl(root / "model")
    frames_of = root / "video-tasks/frames"
    for task in ("video_cls/K700", "video_qa/NExTQA", "video_ret/MSVD"):
        frames(frames_of / task / "v0", 2, 1)
    frames(frames_of / "video_mret/MomentSeeker/video_frames/clip", 2, 2)
    picture(root / "a.png", 1)
    parquet(root / "K700/test-00000.parquet", video_id=["v0"], pos_text=["yoga"])
    answers = {f"a{i}": [f"word {i}"] for i in range(5)}
    parquet(root / "NExTQA/test-00000.parquet", video=["v0"], question=["What"], answer=[1], **answers)
    parquet(root / "MSVD/test-00000.parquet", video_id=["v0"], caption=[["a cat"]])
    clip = [[{"output_path": "clip.mp4"}]]
    parquet(
        root / "MomentSeeker/test-00000.parquet",
        query=["jump"] * 2,
        positive_frames=clip * 2,
        negative_frames=clip * 2,
        input_frames=["", "clip.mp4"],
    )
    documents(root, "../ViDoRe_docvqa", pages=4, queries=1)
    sides = {"qry_text": ["red"], "qry_img_path": ["a.png"], "tgt_text": [["", ""]], "tgt_img_path": [["a.png", "a.png"]]}
    told = {"qry_inst": ["<|image_1|>\nFind a similar image: "], "tgt_inst": [["<|image_1|>\nRepresent the given image.\n"] * 2]}
    parquet(root / "CIRR/test-00000.parquet", **sides, **told)
    parquet(root / "NIGHTS/test-00000.parquet", **sides)
    return root


def rendered(root, name):
    """(system, user) of the first query and of the first candidate as the model is told them, media as their kinds."""
    model = VLM2Vec.from_pretrained(root / "model", dtype="float32", feeding="authors")
    data = load_task(load_tasks()[name], root, root, feeding="authors", protocol="v2", cache=root / "cache")
    processing = model.processing
    sides = [dict(processing.messages(processing.item(item))) for item in (data.queries[-1], data.candidates[0])]
    return [(side["system"], side["user"].replace("<|image_1|>", "IMAGE").replace("<|video_1|>", "VIDEO")) for side in sides]


@pytest.mark.parametrize(
    ("name", "query", "candidate"),
    [
        ("K700", ("Recognize the category of the video content.", "VIDEO"), None),
        ("NExTQA", (QA, "VIDEOWhat\nOptions:\n" + "\n".join(f"({'ABCDE'[i]}) word {i}" for i in range(5))), (NOTHING, "(A) word 0")),
        ("MSVD", ("Find the video snippet that corresponds to the given summary.", "a cat"), (NOTHING, "VIDEO")),
        ("MomentSeeker", ("Find the clip that corresponds to the given sentence and video segment.", "VIDEOjump"), (NOTHING, "VIDEO")),
        ("ViDoRe_docvqa", ("Find a document image that matches the given query.", None), (NOTHING, "IMAGE")),
        ("CIRR", ("Find a similar image:", "IMAGEred"), (NOTHING, "IMAGE")),
    ],
)
def test_what_the_model_is_told(root, name, query, candidate):
    """The facts' sentence in the system message, the bare query, and candidates of the default instruction alone."""
    found = rendered(root, name)
    assert found[0][0] == query[0] and query[1] in (None, found[0][1]), found
    assert candidate is None or found[1] == candidate, found
    assert "document" not in found[0][1] and "Understand" not in found[1][1]


def test_rows_that_cannot_be_made_so_are_refused_by_name(root, tmp_path, capsys):
    with pytest.raises(ValueError, match="NIGHTS.*no column 'qry_inst'"):
        load_task(load_tasks()["NIGHTS"], root, root, feeding="authors", protocol="v2", cache=tmp_path)
    own = make_task({"name": "Mine", "loader": "documents"}, "a test")
    with pytest.raises(ValueError, match="task Mine: expected a task of MMEB-V2 with --feeding authors"):
        load_task(own, root, root, feeding="authors", protocol="v2", cache=tmp_path)
    words = ["eval", str(root / "model"), "--data", str(root), "--output", str(tmp_path), "--feeding", "authors", "--protocol", "v3"]
    assert main(words) == 2 and "evaluation of MMEB-V2; add --protocol v2" in capsys.readouterr().err


def test_the_row_of_the_authors_asks_for_it(root):
    for name in ("Qwen3-VL-Embedding-8B-rerun@v2-qwen3vl", "Qwen3-VL-Embedding-8B-leaderboard@v2-qwen3vl"):
        row = find_row(name)
        assert (row.protocol, row.feeding, row.options["feeding"], row.frames) == ("v2", "authors", "authors", "fps:1,max:64")
        assert all(task.loader == "mmeb" or instruction_of(task) for task in load_tasks().values() if task.name in row.scores)
    assert {task.name for task in find_tasks(root)} >= {"K700", "CIRR"}
