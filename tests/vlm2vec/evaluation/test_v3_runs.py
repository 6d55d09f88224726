"""MMEB-V3 through the runner: killed and gone on, by a model that hears and by one that does not, texts longer than the model's limit."""

import json
import multiprocessing
import os
import random
import sys
import time

import pytest
import torch

from tests.helpers import v3_layouts
from tests.helpers.angles import AngleModel
from tests.helpers.evaluation_layouts import files, shards
from tests.helpers.tiny_omni import qwen2_5_omni_thinker
from vlm2vec.cli import main
from vlm2vec.evaluation.report.export import leaderboard
from vlm2vec.evaluation.report.summary import markdown, terminal, write_summary
from vlm2vec.evaluation.runner import Options, run_tasks
from vlm2vec.evaluation.score.aggregate import aggregate
from vlm2vec.evaluation.support import reason
from vlm2vec.evaluation.tasks import find_tasks, load_tasks, make_task
from vlm2vec.model import VLM2Vec

FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None
forks = pytest.mark.skipif(FORK is None or sys.platform == "darwin", reason="the processes of this test are forked")
pytestmark = pytest.mark.filterwarnings("ignore:.*cut to max_length")
KILLS = 10
LIMIT = 150  # tokens of the model's inputs: some tools and passages are longer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with every kind of V3's loaders, a model that hears, and what one undisturbed run makes of them."""
    folder = tmp_path_factory.mktemp("v3_runs")
    v3_layouts.everything(folder / "data")
    long = {"_id": "long", "text": "word " * 200_000}  # a million characters
    with open(folder / "data" / "text-tasks" / "FollowIR" / "core17-instructions" / "corpus.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(long) + "\n")
    qwen2_5_omni_thinker(folder / "model")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield folder, evaluate(folder, folder / "whole")
    torch.set_num_threads(threads)


def evaluate(folder, output, feeding="official"):
    model = VLM2Vec.from_pretrained(folder / "model", device="cpu", max_length=LIMIT)
    data = folder / "data"
    options = Options(progress=False, protocol="v3", feeding=feeding, shard_cost=100, workers=1)
    return run_tasks(model, find_tasks(data, protocol="v3"), data, data, output, options=options)


def forked(folder, output, feeding):
    def run():
        torch.set_num_threads(1)
        evaluate(folder, output, feeding)

    process = FORK.Process(target=run)
    process.start()
    return process


@forks
@pytest.mark.parametrize("feeding", ["official", "wemm"])
def test_killed_at_random_moments(place, tmp_path, feeding):
    """SIGKILL, ten times in one run of all kinds: the same score files to the byte, and no shard is written twice.

    Half of the moments are told by the shards that there are, so that encoding is hit; half by the clock, over the time in which a run
    with those shards reads, ranks and writes.
    """
    folder, _ = place
    undisturbed, out = folder / ("whole" if feeding == "official" else feeding), tmp_path / "out"
    if feeding != "official":
        evaluate(folder, undisturbed, feeding)
    began = time.monotonic()
    evaluate(folder, undisturbed, feeding)
    short, whole = time.monotonic() - began, shards(undisturbed)
    assert len(whole) > 3 * (KILLS // 2), "too few shards for the kills to fall between them"
    rng, before, killed = random.Random(5), {}, 0
    by_shards = sorted(rng.sample(range(len(whole)), KILLS // 2))
    for moment in [*by_shards, *(None,) * (KILLS - len(by_shards))]:
        process = forked(folder, out, feeding)
        while moment is not None and len(shards(out)) < moment and process.is_alive():
            time.sleep(0.002)
        process.join(rng.uniform(0, 0.05 if moment is not None else short))
        killed += process.is_alive()
        process.kill()
        process.join()
        now = shards(out)
        assert before.items() <= now.items(), "a finished shard was encoded again"
        before = now
    assert killed > KILLS // 2
    evaluate(folder, out, feeding)
    assert shards(out).keys() == whole.keys() and before
    assert files(out) == files(undisturbed)
    tasks = [{str(p.relative_to(run)): p.read_text() for p in (run / "tasks").rglob("*.json")} for run in (out, undisturbed)]
    assert tasks[0] == tasks[1] and len(tasks[0]) == len(find_tasks(folder / "data", protocol="v3"))


def test_long_texts_are_cut_and_counted(place):
    """By the model's limit, and counted again by a run that finds all vectors in the store."""
    folder, rows = place
    rows = {row["task"]: row for row in rows}
    cut = rows["text/FollowIR/core17-instructions"]["cut_texts"]
    assert cut == {"queries": 0, "candidates": 1} and "cut_texts" not in rows["text/NanoBEIR/NanoNQ"]
    again = {row["task"]: row for row in evaluate(folder, folder / "whole")}
    assert again["text/FollowIR/core17-instructions"]["cut_texts"] == cut
    told = "\n".join(markdown(list(rows.values()), aggregate(list(rows.values())), "m"))
    assert "text/FollowIR/core17-instructions: 0 queries and 1 candidates cut to the model's limit" in told
    assert "aops: " in told and "without the candidates that 1 queries exclude" in told


def test_a_model_without_audio(place, tmp_path, capsys):
    """Eleven tasks are told as unsupported, the others run; V3-All counts them 0 and stands beside the mean of what was run."""
    folder, _ = place
    data, names = folder / "data", find_tasks(folder / "data", protocol="v3")
    options = Options(progress=False, protocol="v3")
    rows = run_tasks(AngleModel(("text", "image", "video")), names, data, data, tmp_path / "out", options=options)
    audio = [row for row in rows if row["modality"] == "audio"]
    assert len(audio) == 8 and all(row["score"] is None and row["unsupported"] == "the model takes no audio" for row in audio)
    assert all(row["score"] is not None for row in rows if row["modality"] != "audio")
    assert json.loads((tmp_path / "out" / "tasks" / "TUTSound(hard).json").read_text())["score"] is None
    from vlm2vec.evaluation.support import with_unsupported

    model = AngleModel(("text", "image", "video"))
    whole = with_unsupported(model, [t for t in load_tasks("v3").values() if t.modality != "audio"], "v3")
    assert len(whole) == 190 and with_unsupported(AngleModel(), whole[:5], "v3") == whole[:5]
    assert with_unsupported(model, whole[:5], "v2") == whole[:5]
    texts = with_unsupported(
        AngleModel(("text",)), [t for t in load_tasks("v3").values() if t.modality in ("text", "tool", "memory")], "v3"
    )
    assert len(texts) == 190, "a model of texts does 53 + 35 + 4 of them"
    means = aggregate([*({**rows[0], "task": t.name, "score": None if t.modality == "audio" else 0.5} for t in whole)])
    assert means["v3"]["groups"]["V3-All"] == {
        "score": pytest.approx(0.5 * 179 / 190),
        "ran": 0.5,
        "tasks": 179,
        "unsupported": 11,
        "of": 190,
    }
    assert means["complete"]["v3"]
    text = "\n".join(terminal(rows, {**aggregate(rows), "v3": means["v3"]}))
    assert "not run: the model takes no audio" in text and "V3-All" in text and "11 unsupported counted 0" in text
    summary = write_summary(tmp_path / "out", rows, "deaf", {"protocol": "v3"})
    assert summary["means"]["v3"]["groups"]["audio"] == {"score": 0.0, "ran": None, "tasks": 0, "unsupported": 8, "of": 11}
    told = (tmp_path / "out" / "summary.md").read_text()
    assert "| V3-All | 11 | 8 | 190 | - |" in told, "a mean of a part is no V3-All"
    board = leaderboard(rows, "deaf")["metrics"]
    assert board["audio"] == "DIR_N/A" and board["text"]["aops"]["hit@1"] == 0.5 and board["text"]["biology"] == "FILE_N/A"
    assert list(board) == ["image", "video", "visdoc", "text", "tool", "gui", "memory", "audio"] and len(board["image"]) == 37


def test_a_model_without_films(place, tmp_path):
    """What a model cannot take is told before anything is read, and pollutes no mean of what was run."""
    folder, _ = place
    names = ["Breakfast", "AVE", "SpeechCOCO", "Clotho", "ViDoRe_docvqa", "text/BRIGHT/aops"]
    tasks = [load_tasks("v3")[name] for name in names]
    model = AngleModel(("text", "image", "audio"))
    rows = run_tasks(model, tasks, folder / "data", folder / "data", tmp_path, options=Options(progress=False, protocol="v3"))
    told = {row["task"]: row.get("unsupported") for row in rows}
    assert told == {**dict.fromkeys(names), "Breakfast": "the model takes no video", "AVE": "the model takes no video"}
    assert [reason(AngleModel(("text",)), task) for task in tasks] == [
        "the model takes no video",
        "the model takes no audio and no video",
        "the model takes no audio and no image",
        "the model takes no audio",
        "the model takes no image",
        None,
    ]
    groups = aggregate(rows)["v3"]["groups"]
    assert "video" not in aggregate(rows)["modality"] and groups["video"] == {
        "score": 0.0,
        "ran": None,
        "tasks": 0,
        "unsupported": 1,
        "of": 18,
    }
    own = make_task({"name": "Mine", "modality": "video"}, "a test")
    assert reason(AngleModel(("text",)), own) is None, "the rows of an own task tell"


def test_the_command_line(place, tmp_path, capsys):
    from tests.helpers.tiny_models import qwen2_vl

    folder, _ = place
    qwen2_vl(tmp_path / "deaf")
    words = ["eval", tmp_path / "deaf", "--data", folder / "data", "--output", tmp_path / "out", "--protocol", "v3", "--feeding", "wemm"]
    assert main(list(map(str, [*words, "--option", "max_length=150", "--device", "cpu"]))) == 0
    told, err = capsys.readouterr()
    assert "of 190 tasks of MMEB-V3 are in" in err and "not there: ImageNet-1K, N24News" in err
    assert told.count("not run: the model takes no audio") == 11 and "toolde/web/apibank" in told
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["protocol"], summary["feeding"]) == ("v3", "wemm") and len(summary["tasks"]) == 11 + 11
    assert (tmp_path / "out" / "report.html").exists()
    assert main(list(map(str, [*words[:4], "--output", tmp_path / "other", "--tasks", "BRIGHT", "agent", "--protocol", "v3"]))) == 0
    assert {p.parent.name for p in (tmp_path / "other" / "tasks").rglob("*.json")} == {"BRIGHT", "web", "memory", "tasks"}
    assert main(list(map(str, [*words[:4], "--output", tmp_path / "no", "--feeding", "wemm"]))) == 2
    assert "--feeding wemm is an evaluation of MMEB-V3; add --protocol v3" in capsys.readouterr().err
