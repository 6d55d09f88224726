"""How long texts may be in MMEB-V3's two published evaluations: inputs without media alone, and the limit stands in the score file."""

import json
import warnings

import pytest

from tests.helpers import tiny_models
from tests.helpers.evaluation_layouts import picture
from tests.helpers.v3_layouts import lines
from vlm2vec import VLM2Vec
from vlm2vec.backbones import backbone_for
from vlm2vec.evaluation.limits import text_limit
from vlm2vec.evaluation.reproduce.rows import find_row, read_scores
from vlm2vec.evaluation.runner import Options, readers, run_tasks
from vlm2vec.evaluation.tasks import find_tasks, load_tasks

pytestmark = pytest.mark.filterwarnings("ignore:.*cut to text_max_length")


class Named:
    def __init__(self, family, **options):
        self.options = options
        if family is not None:
            self.processing = backbone_for(family).processing_class


@pytest.mark.parametrize(
    ("family", "task", "official", "wemm"),
    [  # the facts: 2,048 by default, 8,192 for the qwen3_vl backbone; 8,192 by default, 262,144 for text and gui
        ("qwen2_vl", "text/LongEmbed/narrativeqa", 2048, 262144),
        ("qwen3_vl", "text/LongEmbed/narrativeqa", 8192, 262144),
        ("qwen3_5", "GAE-GUIAct_q2t", 2048, 262144),
        ("qwen3_vl", "toolde/web/apibank", 8192, 8192),
        (None, "MCMR", 2048, 8192),
    ],
)
def test_limits_of_the_facts(family, task, official, wemm):
    task = load_tasks("v3")[task]
    assert [text_limit(Named(family), task, "v3", feeding) for feeding in ("official", "wemm")] == [official, wemm]
    assert text_limit(Named(family), task, "v2", "official") is None
    assert text_limit(Named(family, text_max_length=77), task, "v3", "wemm") == 77, "one that was asked for wins"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_models.qwen2_vl(folder)
    return VLM2Vec.from_pretrained(folder, dtype="float32")


def test_texts_alone_are_cut(model, tmp_path):
    picture(tmp_path / "a.png", 1, (28, 28))
    view = model.reading(text_max_length=20)
    long = "word " * 50
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        text, both = view.preprocess([long, {"text": long, "image": str(tmp_path / "a.png")}])
    assert text.length == 20 and text.cut and not both.cut and both.length > 50
    assert "text_max_length=20 tokens" in str(told[0].message) and not model.preprocess([long])[0].cut


def test_the_limit_stands_in_the_score_file(model, tmp_path):
    task = load_tasks("v3")["text/FollowIR/core17-instructions"]
    paths = [tmp_path / task.options[key] for key in ("queries", "corpus", "qrels")]
    lines(paths[0], {"_id": "q", "text": "a", "instruction_og": "b", "instruction_changed": "c"})
    lines(paths[1], {"_id": "d", "text": "word " * 3000})
    lines(paths[2], {"query-id": "q", "corpus-id": "d", "score": 1})
    options = Options(progress=False, protocol="v3")
    (row,) = run_tasks(model, find_tasks(tmp_path, protocol="v3"), tmp_path, tmp_path, tmp_path / "out", options=options)
    assert row["cut_texts"] == {"queries": 0, "candidates": 1}
    told = json.loads((tmp_path / "out/text/text/FollowIR/core17-instructions_score.json").read_text())
    assert told["run"]["model"]["options"]["text_max_length"] == 2048
    assert read_scores(tmp_path / "out/tasks/text/FollowIR/core17-instructions.json").options["text_max_length"] == 2048
    tasks = [load_tasks("v3")[name] for name in ("text/FollowIR/core17-instructions", "toolde/web/apibank", "K700")]
    read = {
        part[0].name: reader.options["text_max_length"] for reader, part in readers(model, tasks, Options(protocol="v3", feeding="wemm"))
    }
    assert read["text/FollowIR/core17-instructions"] == 262144 and read["toolde/web/apibank"] == 8192


def test_published_rows_have_their_limit():
    for name, limit in {"GME-7B": 2048, "WAVE-7B": 2048, "VLM2Vec-V2.0-2B": 2048, "Qwen3-VL-Embedding-8B": 8192}.items():
        assert find_row(f"{name}@v3-paper").options["text_max_length"] == limit
    rerun, paper = find_row("Qwen3-VL-Embedding-8B@v3-rerun"), find_row("Qwen3-VL-Embedding-8B@v3-paper")
    assert rerun.scores["ViDoSeek-page"].value > 0.75 > 0.25 > paper.scores["ViDoSeek-page"].value
    assert "mended labels" in rerun.about and "faulty labels" in paper.about
