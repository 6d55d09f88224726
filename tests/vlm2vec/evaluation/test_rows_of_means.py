"""Published rows of means alone (WeMM-Embedding, ViDoRe V3), and ViDoRe V3 as a benchmark of its own."""

import pytest

from vlm2vec.backbones.authors.feeding import AuthorsProcessing
from vlm2vec.commands.reproduce import tasks_of
from vlm2vec.evaluation.reproduce.means import mean_lines
from vlm2vec.evaluation.reproduce.rows import find_row
from vlm2vec.evaluation.reproduce.verdict import write_verdicts
from vlm2vec.evaluation.score.aggregate import aggregate, members
from vlm2vec.evaluation.tasks import known_tasks, load_tasks
from vlm2vec.evaluation.tasks.choose import chosen_tasks
from vlm2vec.evaluation.tasks.instructions import instruction_of


def scored(tasks, score=0.5):
    return [
        {"task": task.name, "group": task.group, "meta_task": task.meta_task, "split": None, "modality": task.modality, "score": score}
        for task in tasks
    ]


VIDORE_V3 = [task for task in known_tasks().values() if task.group == "vidore_v3"]


def test_rows_of_wemm(tmp_path):
    """Its printed groups with the limits of its evaluation; a mean whose tasks were not all run is told, not compared."""
    row = find_row("WeMM-Embedding-2B@v3-wemm")
    assert (row.protocol, row.feeding, row.scores) == ("v3", "wemm", {})
    wanted = {"V3-All": 56.0, "text": 45.3, "agent": 45.1, "MCMR": 42.5, "audio": 0, "MC": 59.7, "gui": 38.9, "V2": 77.9, "image36": 79.6}
    assert {name: round(100 * row.means[name], 1) for name in wanted} == wanted and all(members()[name] for name in row.means)
    limits = {"min_pixels": 65536, "max_pixels": 8388608, "video_min_pixels": 4096, "video_max_pixels": 262144, "total_pixels": 8388608}
    assert row.options == {"feeding": "authors", **limits}
    assert set(row.options) <= {*AuthorsProcessing.shared_defaults, *AuthorsProcessing.defaults}
    tasks = [task for task in load_tasks("v3").values() if task.modality in ("gui", "tool")]
    assert tasks_of(row, [*tasks, *VIDORE_V3]) == tasks
    lines = mean_lines(row, scored(tasks))
    told = {line.split()[1]: line.split()[2:] for line in lines[1:]}
    assert told["gui"] == ["38.90", "50.00", "+11.10", "8", "of", "8", "tasks"]
    assert told["agent"] == ["45.10", "-", "-", "43", "of", "47", "tasks"] and told["text"][3:] == ["0", "of", "53", "tasks"]
    write_verdicts(tmp_path, row, [], [], lines)
    assert "+11.10" in (tmp_path / "reproduce.md").read_text() and "+11.10" in (tmp_path / "reproduce.json").read_text()


def test_the_row_of_vidore_v3():
    row = find_row("Qwen3-VL-Embedding-8B@vidore-v3")
    assert (row.feeding, row.options["feeding"], tasks_of(row, VIDORE_V3)) == ("authors", "authors", VIDORE_V3)
    assert instruction_of(VIDORE_V3[0]) == "Find a screenshot that is relevant to the user's question."
    all_ten, public = (mean_lines(row, scored(part))[1].split() for part in (VIDORE_V3, VIDORE_V3[:8]))
    assert all_ten[2:5] == ["59.00", "50.00", "-9.00"] and public[2:] == ["59.00", "-", "-", "8", "of", "10", "tasks"]


def test_vidore_v3_is_a_benchmark_of_its_own():
    """From the hub by its own words; its group's mean tells how many of ten, and no other mean holds it."""
    assert len(chosen_tasks(["vidore_v3"], None, hub=True)) == 8, "two are private"
    (task,) = chosen_tasks(["vidore_v3_hr"], None, hub=True, protocol="v3")
    assert task.name == "Vidore3HrRetrieval" and len(task.hub["revision"]) == 40
    assert all(task.group != "vidore_v3" for task in chosen_tasks(["visdoc"], None, hub=True, protocol="v2"))
    rows = [*scored([known_tasks()["ViDoRe_docvqa"]], 0.9), *scored(VIDORE_V3[:1], 0.2), *scored(VIDORE_V3[1:2], 0.4)]
    means = aggregate(rows)
    assert means["group"]["vidore_v3"] == {"score": pytest.approx(0.3), "tasks": 2, "of": 10}
    assert means["modality"]["visdoc"] == means["overall"] == {"score": 0.9, "tasks": 1}
    assert aggregate(rows[1:])["overall"] == {"score": pytest.approx(0.3), "tasks": 2}
