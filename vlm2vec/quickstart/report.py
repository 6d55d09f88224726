"""report.html of a quickstart folder, and the same scores on the terminal.

Read: data/tasks.json (what was asked, chance), scores-before and scores-after ({task}_score.json and {task}_top.jsonl of
`vlm2vec eval`), model/trainer_state.json (loss curve), model/train_result.json (time, memory, recipe).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from vlm2vec.files import AnyPath
from vlm2vec.files.report import (
    Answer,
    Card,
    Query,
    Score,
    Series,
    curve,
    facts,
    grid,
    mean_by_meta_task,
    page,
    picture_strip,
    score_lines,
    score_table,
    section,
    tiles,
    write_page,
)
from vlm2vec.files.report.table import percent
from vlm2vec.inputs import IMAGE_MARKER
from vlm2vec.quickstart.build import read_summary
from vlm2vec.quickstart.tasks import META_TASKS

SHOWN = 4  # queries a task, spread over its rows
TITLES = {"classification": "Classification", "vqa": "Question answering", "retrieval": "Retrieval", "grounding": "Grounding"}
LEGEND = (
    '<p class="legend"><i style="background:var(--ink)"></i>before training<i style="background:var(--missed)"></i>'
    "the most a model can reach by the shortcut that the task names</p>"
)


def report(folder: AnyPath, say: Callable[[str], object] | None = print) -> Path:
    """Write FOLDER/report.html and print the table of scores.

    Returns:
        The file.

    Raises:
        ValueError: the benchmark, the scores or the training log are not there or not readable; names the file and the command.
    """
    folder = Path(folder)
    data = read_summary(folder / "data")
    scores = [_score(folder, task) for task in data["tasks"]]
    log = _read(folder / "model" / "trainer_state.json", "python -m train train/recipes/quickstart.yaml").get("log_history", [])
    result = _read(folder / "model" / "train_result.json", "python -m train train/recipes/quickstart.yaml")
    file = write_page(folder / "report.html", _html(folder, data, scores, log, result))
    if say:
        say("\n".join(["", *score_lines(scores), "", f"{file}: open it in a browser"]))
    return file


def _score(folder, task) -> Score:
    before, after = (
        _read(folder / f"scores-{when}" / f"{task['name']}_score.json", f"vlm2vec eval ... --output {folder}/scores-{when}")
        for when in ("before", "after")
    )
    return Score(
        task["name"],
        task["meta_task"],
        after=_accuracy(after),
        before=_accuracy(before),
        chance=task["chance"],
        candidates=task["candidates"],
        kinds=(task["query"], task["target"]),
        about=task["about"],
        shortcut=task["shortcut"],
        how=task["how"],
    )


def _accuracy(score) -> float:
    """hit@1 of a score file in either of the reference's forms."""
    value = score.get("acc", score.get("hit@1"))
    if value is None:
        raise ValueError(f"a score file holds neither 'acc' nor 'hit@1', but {', '.join(score)}; run vlm2vec eval again")
    return float(value)


def _html(folder, data, scores, log, result) -> str:
    means = mean_by_meta_task(scores)
    drawings = [f for task in data["tasks"] if task["name"] == "OpenMoji_i2i" for f in _pictures(folder, task["name"])]
    minutes = result.get("seconds", 0) / 60
    lead = (
        f"A Qwen2-VL of {_parameters(folder)} learned in {minutes:.1f} minutes to embed text, pictures, and both together in one "
        f"space. It is asked {sum(t['eval_rows'] for t in data['tasks']):,} questions about {data['pictures']['eval']:,} pictures "
        f"that it has not seen; each answer is the nearest of up to {max(t['candidates'] for t in data['tasks']):,} candidates."
    )
    parts = [
        tiles(
            [
                (TITLES.get(m.task, m.task), percent(m.after), f"{percent(m.before)} before training, {percent(m.chance)} by chance")
                for m in means
            ]
        ),
        section(
            "Scores",
            score_table(scores, TITLES),
            LEGEND,
            note="Share of queries whose nearest candidate is the right one (hit@1, MMEB's precision@1). Every thing is the right "
            "answer equally often, and means are unweighted over tasks.",
        ),
        section(
            "Training",
            f'<div class="charts">{_loss(log)}{_accuracy_curve(log)}</div>',
            note="Each query is told apart from all other targets of its batch (InfoNCE), through GradCache.",
        ),
    ]
    for meta_task in META_TASKS:
        tasks = [task for task in data["tasks"] if task["meta_task"] == meta_task]
        blocks = [section(task["name"], grid(_queries(folder, task)), note=_asked(task), level=3) for task in tasks]
        parts.append(
            section(
                TITLES[meta_task],
                *blocks,
                note="Queries at fixed places of each task, not chosen by result; the five nearest "
                "candidates after training, nearest first."
                if meta_task == META_TASKS[0]
                else "",
            )
        )
    parts.append(section("How it was made", facts(_facts(folder, data, result))))
    return page(
        "A picture search engine, trained from nothing",
        *parts,
        kicker="VLM2Vec quickstart",
        lead=lead,
        banner=picture_strip(drawings[:22]),
        footer=f"{data['leakage']}\n{data['credits']} Drawings made from them, this page's included, are under the same licence.",
    )


def _asked(task) -> str:
    words = task["prompt"].replace(IMAGE_MARKER, "").replace("{}", "…").strip()
    return f"{task['about']} Asked as: {words}"


def _loss(log):
    return curve(Series("Loss", _logged(log, "loss")), y_label="nats", low=0.0)


def _accuracy_curve(log):
    return curve(Series("Right one nearest, within the batch", _logged(log, "accuracy")), low=0.0, high=1.0, share=True)


def _logged(log, key):
    return [(entry["step"], float(entry[key])) for entry in log if key in entry and "step" in entry]


def _queries(folder, task) -> list[Query]:
    rows = _top(folder, task["name"])
    # neighbouring rows come from one scene and neighbouring tasks share pictures: step and offset mix them
    offset = 41 * [other["name"] for other in read_summary(folder / "data")["tasks"]].index(task["name"])
    chosen = [rows[(k * (len(rows) // SHOWN + 1) + offset) % len(rows)] for k in range(min(SHOWN, len(rows)))]
    head, _, tail = task["prompt"].partition("{}")
    queries = []
    for row in chosen:
        asked = row["query"]
        text = asked["text"][len(head) : len(asked["text"]) - len(tail)] if "{}" in task["prompt"] else ""
        answers = [Answer(_card(answer), bool(answer["correct"])) for answer in row["top"][:5]]
        queries.append(Query(Card(text, asked["image"]), answers, _card(row["labels"][0]) if row["labels"] else None, row["rank"]))
    return queries


def _card(shown) -> Card:
    """Without the instruction: a picture's prompt says nothing, and of a quoted one the quotation is what matters."""
    if not shown["image"]:
        return Card(shown["text"])
    _, quote, rest = shown["text"].partition('"')
    return Card(rest.rpartition('"')[0] if quote else "", shown["image"])


def _pictures(folder, name):
    rows = _top(folder, name)
    return [rows[k]["query"]["image"] for k in range(3, len(rows), max(1, len(rows) // 22))]


def _top(folder, name) -> list[dict]:
    file = folder / "scores-after" / f"{name}_top.jsonl"
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    except FileNotFoundError:
        raise ValueError(f"{file}: not there; run vlm2vec eval ... --output {folder}/scores-after first") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not readable ({error}); remove it and run vlm2vec eval again") from error
    if not rows:
        raise ValueError(f"{file}: holds no query; remove it and run vlm2vec eval again")
    return rows


def _facts(folder, data, result) -> list[tuple[str, str]]:
    recipe = result.get("recipe", {})
    config = _read(folder / "model-init" / "config.json", f"python -m vlm2vec.quickstart build {folder}")
    text, vision = config.get("text_config", config), config["vision_config"]
    rows = sum(task["train_rows"] for task in data["tasks"])
    loss = recipe.get("loss", {})
    entries = [
        ("Architecture", f"Qwen2-VL, {text['num_hidden_layers']} text + {vision['depth']} vision layers, width {text['hidden_size']}"),
        ("Parameters", _parameters(folder)),
        ("Start", f"random weights, seed {data['seed']}"),
        ("Pictures", f"{data['pictures']['train']:,} to train, {data['pictures']['eval']:,} to evaluate"),
        ("Training rows", f"{rows:,} in {len(data['tasks'])} tasks"),
        ("Steps", f"{result.get('steps', 0):,}"),
        ("Batch", f"{recipe.get('global_batch', '–')} queries, blocks of {recipe.get('interleave_batch_size', '–')}"),
        ("Temperature", f"{loss.get('temperature', '–')}"),
        ("Learning rate", f"{recipe.get('learning_rate', '–')}, {recipe.get('lr_schedule', 'constant')}"),
        ("Training time", _duration(result.get("seconds", 0))),
        ("Peak memory", f"{result.get('peak_memory_mib', 0) / 1024:.2f} GiB"),
        ("Final loss", f"{result['loss']:.3f} nats" if result.get("loss") is not None else "–"),
    ]
    return entries


def _duration(seconds) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{int(seconds // 60)} min {int(seconds % 60)} s"


def _parameters(folder) -> str:
    from safetensors import safe_open

    file = folder / "model-init" / "model.safetensors"
    if not file.is_file():
        raise ValueError(f"{file}: not there; build it: python -m vlm2vec.quickstart build {folder}")
    with safe_open(file, "pt") as weights:
        count = 0
        for name in weights.keys():
            size = 1
            for n in weights.get_slice(name).get_shape():
                size *= n
            count += size
    return f"{count / 1e6:.2f} million parameters"


def _read(file: Path, command: str) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{file}: no object in it; remove it and run {command} again")
        return content
    except FileNotFoundError:
        raise ValueError(f"{file}: not there; run {command} first") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not readable ({error}); remove it and run {command} again") from error
