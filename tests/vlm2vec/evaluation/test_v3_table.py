"""MMEB-V3's table: its 190 tasks against the facts, and every printed mean recomputed from what it is a mean of."""

import re

import pytest
import yaml

from vlm2vec.evaluation.report.listing import list_tasks
from vlm2vec.evaluation.score.aggregate import aggregate, v3_means
from vlm2vec.evaluation.tasks import known_tasks, load_tasks
from vlm2vec.evaluation.tasks.score_rows import printed_means, score_rows

COUNTS = {"image": 37, "video": 18, "visdoc": 24, "text": 53, "tool": 35, "gui": 8, "memory": 4, "audio": 11}
SUBGROUPS = {"RR": 20, "IF": 9, "LC": 6, "MC": 5, "GR": 13, "tool_web": 19, "tool_code": 7, "tool_customized": 9}
# every query of these holds one and the same list of all candidates, which is no other ranking than of all
SAME_LIST = {"SoundDescs", "AVE"}
# models of the table of README.md of WeMM-Embedding, and their rows here
PAPER_ROWS = {
    "VLM2Vec-V2 (2B)": "VLM2Vec-V2.0-2B@v3-paper",
    "Qwen3-VL-Embedding (2B)": "Qwen3-VL-Embedding-2B@v3-paper",
    "Qwen3-VL-Embedding (8B)": "Qwen3-VL-Embedding-8B@v3-paper",
    "VLM2Vec (8B)": "VLM2Vec-Qwen2VL-7B@v3-paper",
    "GME (8B)": "GME-7B@v3-paper",
    "WAVE (7B)": "WAVE-7B@v3-paper",
}
PRINTED = 0.05 + 1e-9  # half of the last digit of one decimal
EXACT = 0.005 + 1e-9


def test_table_holds_the_190_tasks():
    tasks = load_tasks("v3")
    assert {m: sum(t.modality == m for t in tasks.values()) for m in COUNTS} == COUNTS and len(tasks) == 190
    means = v3_means(dict.fromkeys(tasks, 1.0))
    assert {name: means["subgroups"][name]["of"] for name in SUBGROUPS} == SUBGROUPS
    assert {n: means["groups"][n]["of"] for n in ("V3-All", "V2", "agent", "Overall-V3", "image36", "MCMR")} == {
        "V3-All": 190,
        "V2": 78,
        "agent": 47,
        "Overall-V3": 111,
        "image36": 36,
        "MCMR": 1,
    }
    assert len({t.report_name for t in tasks.values() if t.modality == "text"}) == 53, "two would write one file"
    assert len(known_tasks()) == 200 and sum(t.group == "vidore_v3" for t in known_tasks().values()) == 10


def paths_of(told):
    """The paths of a fact, as the table writes them: without what it says of configs, a folder's last slash, and names of numbers."""
    paths = {path.split(" (")[0] for path in re.split(" or |, else ", told)}
    return {path.removesuffix("/*.mp4").rstrip("/").replace("{n}", "{fold}").replace("fold1..4", "fold{fold}") for path in paths}


def places_of(task):
    """Every path that a task's loader may read."""
    options = [value for option in task.options.values() for value in (option if isinstance(option, list) else [option])]
    return {str(place) for place in (task.path, task.media, task.frames, *options)}


def in_our_words(told):
    """A fact's prompt with the table's placeholders and markers."""
    told = told.replace("<|image_pad|>", "<|image_1|>").replace("<|video_pad|>", "<|video_1|>")
    return told if "{instruction}" in told else re.sub(r"\{[^}]*\}", "{text}", told)


def test_official_prompts_are_the_facts(golden):
    """Of screens, memories, sounds and MCMR, whose loaders put the text where the facts have its parts."""
    checked = 0
    for fact in yaml.safe_load((golden / "facts" / "mmeb_v3.yaml").read_text(encoding="utf-8"))["datasets"]:
        task = load_tasks("v3")[fact["name"]]
        if fact["group"] in ("agent-gui", "audio"):
            assert task.query_prompt == in_our_words(fact["query_prompt"]), task.name
            assert task.target_prompt == in_our_words(fact["target_prompt"]), task.name
        elif fact["group"] in ("mcmr", "agent-memory"):
            assert task.query_prompt == fact["query_prompt"].replace("{query}", "{text}"), task.name
            assert task.target_prompt.replace("{text}", "") == in_our_words(
                fact["target_prompt"].split("{title}")[0].removesuffix("title: ")
            )
        else:
            continue
        checked += 1
    assert checked == 8 + 11 + 1 + 4


def test_table_agrees_with_the_facts_of_v3(golden):
    facts = yaml.safe_load((golden / "facts" / "mmeb_v3.yaml").read_text(encoding="utf-8"))["datasets"]
    tasks = load_tasks("v3")
    assert list(tasks) == [fact["name"] for fact in facts]
    for fact in facts:
        task, name = tasks[fact["name"]], fact["name"]
        assert task.metric == fact["metric"], name
        assert task.candidates == ("global" if name in SAME_LIST else fact["eval_type"]), name
        assert task.fed("wemm").candidates == fact.get("eval_type_wemm", task.candidates), name
        assert task.report_name == fact.get("report_key", task.report_name), name
        if isinstance(fact["queries"], int) and fact["group"] not in ("image", "video", "visdoc"):
            assert task.queries == fact["queries"], name
        if isinstance(fact.get("candidates"), int):
            assert task.per_query == fact["candidates"], name
        for key, told in fact["files"].items():
            if key != "qrels_wemm":
                assert paths_of(told) <= places_of(task), (name, key)
        if "qrels_wemm" in fact["files"]:
            assert task.fed("wemm").options["qrels"] == fact["files"]["qrels_wemm"], name


def test_two_feedings_differ_where_the_facts_say_so(golden):
    """Words that the facts give as text alone; the others have tests beside their loaders."""
    facts = yaml.safe_load((golden / "facts" / "mmeb_v3.yaml").read_text(encoding="utf-8"))["datasets"]
    for fact in facts:
        told = fact.get("wemm_query_text")
        task = load_tasks("v3")[fact["name"]]
        if told and fact["group"] in ("text", "agent-tool", "agent-memory", "mcmr"):
            ours = task.fed("wemm").query_prompt.replace("{text}", "{query}")
            assert ours == told.replace("{instruction_og}", "{instruction}").replace("{instruction_changed}", "{instruction}"), fact["name"]
        if fact["group"] in ("text", "agent-tool", "agent-memory"):
            ours = task.query_prompt.replace("{text}", "{query}")
            assert ours == fact["query_prompt"].replace("{instruction_og}", "{instruction}").replace(
                "{instruction_changed}", "{instruction}"
            )
    assert load_tasks("v3")["K700"].fed("wemm").options["label_set"] is None
    assert load_tasks("v3")["K700"].options["label_set"] == "Kinetics-700"
    with pytest.raises(ValueError, match="feeding is official or wemm or authors, got 'other'"):
        load_tasks("v3")["K700"].fed("other")


@pytest.mark.parametrize("model", printed_means()["paper"])
def test_the_papers_means_are_recomputed(model):
    """Groups, subgroups and sets of every row of the paper that tells its tasks."""
    scores = score_rows()[f"{model}@v3-paper"].scores
    means = v3_means(scores)
    flat = {name: part for kind in ("groups", "subgroups", "sets") for name, part in means[kind].items()}
    flat |= {"agent47": flat["agent"]}
    for name, told in printed_means()["paper"][model].items():
        if name == "all190":  # what a model cannot do counts 0
            tasks = {**dict.fromkeys(load_tasks("v3")), **scores}
            assert v3_means(tasks)["groups"]["V3-All"]["score"] == pytest.approx(told, abs=EXACT)
        else:
            assert flat[name]["score"] == pytest.approx(told, abs=EXACT), name
            assert flat[name]["tasks"] == flat[name]["of"], name


def test_v3_all_of_the_printed_groups():
    """V3-All from each row's printed groups, where there is a V2 mean: every task weighs 1/190. Five inputs of one decimal and the
    printed value itself are each rounded by up to 0.05, weights sum to 1."""
    checked = []
    for model, row in printed_means()["v3"].items():
        v2 = printed_means()["v2"].get(model)
        if v2 is None:
            continue
        given = {"text": row["Text"], "tool": row["Agent"], "gui": row["Agent"], "memory": row["Agent"], "audio": row["Audio"]}
        tasks = {name: row["MCMR"] if name == "MCMR" else given.get(task.modality, v2["AVG"]) for name, task in load_tasks("v3").items()}
        assert v3_means(tasks)["groups"]["V3-All"]["score"] == pytest.approx(row["V3-All"], abs=2 * PRINTED), model
        checked.append(model)
    assert len(checked) == 8


@pytest.mark.parametrize("model", PAPER_ROWS)
def test_groups_of_the_v3_table_are_the_papers(model):
    means, row = v3_means(score_rows()[PAPER_ROWS[model]].scores), printed_means()["v3"][model]
    for column, group in (("Text", "text"), ("Agent", "agent"), ("MCMR", "MCMR")):
        assert means["groups"][group]["score"] == pytest.approx(row[column], abs=PRINTED), column
    for name, told in printed_means()["v3_subgroups"].get(model, {}).items():
        if (model, name) == ("Qwen3-VL-Embedding (8B)", "RR"):
            assert means["subgroups"][name]["score"] == pytest.approx(20.0, abs=PRINTED), "printed as 18.2, which its tasks do not give"
        else:
            found = means["groups"].get(name) or means["subgroups"][name]
            assert found["score"] == pytest.approx(told, abs=PRINTED + (0.01 if name == "gui" else 0)), name


def test_leaderboard_rows_and_v2():
    """Overall-V3 of the leaderboard is over text, agent and audio; MMEB-V2's means from the 78 of one model."""
    for model, row in printed_means()["leaderboard"].items():
        given = {"text": row["Text"], "audio": row["Audio"]}
        tasks = {n: given.get(t.modality, row["Agent"]) for n, t in load_tasks("v3").items()}
        assert v3_means(tasks)["groups"]["Overall-V3"]["score"] == pytest.approx(row["Overall-V3"], abs=2 * EXACT), model
    card = printed_means()["cards"]["Tianmu-Emb-Uni-8B"]
    given = {"image": card["image (37)"], **dict.fromkeys(("tool", "gui", "memory"), card["agent"]), **card}
    whole = v3_means({n: given[t.modality] for n, t in load_tasks("v3").items()})
    assert whole["groups"]["V3-All"]["score"] == pytest.approx(card["all"], abs=2 * EXACT)
    row = score_rows()["Qwen3-VL-Embedding-8B-leaderboard@v2-qwen3vl"].scores
    printed = printed_means()["v2"]["Qwen3-VL-Embedding (8B)"]
    rows = [
        {"task": n, "score": s, "meta_task": t.meta_task, "group": t.group, "split": t.split, "modality": t.modality}
        for n, s in row.items()
        for t in [load_tasks()[n]]
    ]
    means = aggregate(rows)
    assert means["complete"]["v2"] and means["overall"]["score"] == pytest.approx(printed["AVG"], abs=PRINTED)
    for column in ("Image", "Video", "VisDoc"):
        assert means["modality"][column.lower()]["score"] == pytest.approx(printed[column], abs=PRINTED)


def test_unsupported_tasks_count_nothing_and_are_told():
    scores = {name: None if task.modality == "audio" else 50.0 for name, task in load_tasks("v3").items()}
    whole = v3_means(scores)["groups"]["V3-All"]
    assert whole["score"] == pytest.approx(50 * 179 / 190) and whole["ran"] == 50 and (whole["tasks"], whole["unsupported"]) == (179, 11)
    part = v3_means({"text/BRIGHT/aops": 10.0, "NSynth": None, "my own": 3.0})["groups"]
    assert part["V3-All"] == {"score": 5.0, "ran": 10.0, "tasks": 1, "unsupported": 1, "of": 190} and "video" not in part


def test_list_shows_all_190():
    lines = list_tasks("v3")
    for name, task in load_tasks("v3").items():
        line = next(line for line in lines if line.startswith(name + " "))
        assert task.metric in line and task.candidates in line and str(task.per_query or "-") in line, name
    assert "190 tasks; published" in lines[-3] and "GME-7B@v3-paper" in lines[-2] and "WeMM-Embedding-2B@v3-wemm" in lines[-2]
    columns = next(line for line in lines if line.startswith("task ")).split()
    aops = next(line for line in lines if line.startswith("text/BRIGHT/aops ")).split()
    assert aops[-len(columns) + columns.index("q3_2b")] == "2.4" and aops[-1] == "3.2", "the paper's, and the rerun's of the last column"
    for protocol in ("v1", "v2", "v3"):
        told = "\n".join(list_tasks(protocol))
        assert "Qwen3-VL-Embedding-2B@vidore-v3 52.9, Qwen3-VL-Embedding-8B@vidore-v3 59.0" in told
        assert sum(line.startswith("Vidore3") for line in told.splitlines()) == 10 and "vidore/vidore_v3_hr" in told
