"""MMEB-V2's video classification, question answering and retrieval, as column names and small rules in tasks.yaml."""

from __future__ import annotations

from pathlib import PurePosixPath

from vlm2vec.evaluation.loaders.tables import configs_of, read_table
from vlm2vec.evaluation.loaders.video_root import VideoRoot
from vlm2vec.evaluation.tasks import Task, label_sets
from vlm2vec.evaluation.tasks.task_data import Pool, TaskData, asked, unreadable
from vlm2vec.files import AnyPath


def _prompt(template, text):
    return template.replace("{text}", text)


def _first(value):
    """Captions may be lists; the first one counts."""
    return (value or [None])[0] if isinstance(value, list) else value


def load_labels(task: Task, root: AnyPath | None, media: AnyPath, *, hub: bool = False, protocol: str = "v2", cache: AnyPath) -> TaskData:
    """Video -> label text: a global label set, or the row's own list (which holds the positive)."""
    o = task.options
    choices = o.get("choices")
    columns = [o["video"], o["label"]] + ([choices] if choices else [])
    table = read_table(root, task, columns=columns, hub=hub)
    videos, pool = VideoRoot(task, media, cache), Pool()
    data = TaskData(task, local=[] if choices else None)
    labels = _label_set(task, table) if not choices else []
    for label in labels:
        pool.add(label, {"text": label})
    for i, row in enumerate(table):
        if o.get("limit") and i >= o["limit"]:
            break
        data.queries.append(videos.item(_prompt(task.query_prompt, ""), str(row[o["video"]])))
        right = row[o["label"]]
        if choices:
            _local(data, pool, i, row[choices] or [], right)
        else:
            data.labels.append([pool.index.get(right, -1)])
            data.label_names.append([right])
    data.candidates, data.names = pool.items, pool.names
    return data


def _label_set(task, table):
    """All labels: a published set by its name, or those that occur in the rows."""
    name = task.options.get("label_set")
    if name is None:
        return list(dict.fromkeys(table[task.options["label"]]))
    if name not in label_sets():
        raise ValueError(
            f"task {task.name}: no label set {name!r}; there are {', '.join(label_sets())}, or leave it out for the rows' own labels"
        )
    return label_sets()[name]


def _local(data, pool, i, texts, right, names=None):
    """Add one row's own candidates; equal names are one candidate."""
    names = names or texts
    mine = [pool.add(name, {"text": text}, name) for name, text in zip(names, texts)]
    distinct = list(dict.fromkeys(mine))
    if len(distinct) < len(mine):
        data.problems.add("duplicate_candidates", i, f"row {i}: {len(mine) - len(distinct)} repeated")
    if not distinct:
        data.problems.add("empty_candidates", i, f"row {i}")
    data.local.append(distinct)
    where = pool.index.get(right, -1)
    data.labels.append([where if where in distinct else -1])
    data.label_names.append([right])


def _bare(option):
    """ "A. Apples." -> "Apples"."""
    return option[option.find(". ") :].strip(". ") if ". " in option else option.strip(". ")


def _letters(count):
    return [chr(ord("A") + i) for i in range(count)]


def _shown(how, question, choices):
    """The question as the query shows it, with its options."""
    if how == "lettered":
        lines = "".join(f"({letter}) {choice}\n" for letter, choice in zip(_letters(len(choices)), choices))
        return f"{question}\nOptions:\n{lines}".rstrip()
    if how == "lines":
        return question + "\n" + "\n".join(choices)
    if how == "joined":
        return question + " ".join(choices)
    if how == "yes_no":
        return question + "? (A) yes; (B) no."
    return question


def _right(task, i, how, answer, choices):
    """Index of the answer among the choices, or -1."""
    if how == "letter":
        where = ord(str(answer).strip()[:1] or "?") - ord("A")
    elif how == "index":
        where = int(answer) if str(answer).strip().lstrip("-").isdigit() else -1
    elif how == "text":
        where = choices.index(answer) if answer in choices else -1
    else:
        raise ValueError(f"task {task.name}: answer_is is letter, index or text, got {how!r}")
    return where if 0 <= where < len(choices) else -1


def load_choice(task: Task, root: AnyPath | None, media: AnyPath, *, hub: bool = False, protocol: str = "v2", cache: AnyPath) -> TaskData:
    """Video and question -> the right one of a few options."""
    o = task.options
    fixed = o.get("fixed_choices")
    listed = [] if fixed else (o["choices"] if isinstance(o["choices"], list) else [o["choices"]])
    videos, pool = VideoRoot(task, media, cache), Pool()
    data = TaskData(task, local=[])
    for config, table in _parts(task, root, [o["video"], o["question"], o["answer"], *listed], hub):
        for row in table:
            i = len(data.queries)
            raw = fixed or (row[listed[0]] or [] if len(listed) == 1 else [row[c] for c in listed])
            choices = [str(c) for c in raw]
            folder = o.get("video_folder", "{}").format(row[o["video"]])
            subset = config or row.get("subset")
            shown = _shown(o.get("shown"), row[o["question"]] or "", choices)
            name = f"{subset}/{folder}" if subset and isinstance(task.hub.get("config"), list) else folder
            fault = None if row[o["question"]] else f"row {i}: no {o['question']}"
            asked_text = _prompt(task.query_prompt.replace("{question}", row[o["question"]] or ""), shown)
            data.queries.append(unreadable(fault) if fault else videos.item(asked_text, name))
            targets = {
                "lettered": [f"({letter}) {c}" for letter, c in zip(_letters(len(choices)), choices)],
                "bare": [_bare(c) for c in choices],
            }.get(o.get("target"), choices)
            names = choices if o.get("name") == "raw" else targets
            where = _right(task, i, o.get("answer_is", "index"), row[o["answer"]], choices)
            _local(data, pool, i, targets, names[where] if where >= 0 else str(row[o["answer"]]), names)
            if where < 0:
                data.labels[-1] = [-1]
    data.candidates, data.names = pool.items, pool.names
    return data


def _parts(task, root, columns, hub):
    """(config, table) pairs: twenty for MVBench when its folders are there, else one."""
    configs = configs_of(task)
    if len(configs) == 1:
        return [(None, read_table(root, task, configs[0], columns=columns, hub=hub))]
    from vlm2vec.evaluation.loaders.tables import has_config

    if root is None or any(has_config(root, task, config) for config in configs):
        return [(c, read_table(root, task, c, columns=columns, hub=hub)) for c in configs]
    return [(None, read_table(root, task, columns=columns, hub=hub))]


def load_retrieval(
    task: Task, root: AnyPath | None, media: AnyPath, *, hub: bool = False, protocol: str = "v2", cache: AnyPath
) -> TaskData:
    """Caption -> video, all videos of the data set as candidates; `skip_missing` leaves rows without a film out (MMEB-V3)."""
    o = task.options
    table = read_table(root, task, columns=[o["video"], o["text"]], hub=hub)
    videos, pool = VideoRoot(task, media, cache), Pool()
    data = TaskData(task, local=None if task.candidates == "global" else [])
    for i, row in enumerate(table):
        name = str(row[o["video"]])
        if o.get("stem"):
            name = PurePosixPath(name).stem
        if o.get("skip_missing") and "unreadable" in (film := videos.item("", name)):
            data.problems.add("dropped_queries", i, film["unreadable"])
            continue
        data.queries.append(asked(task.query_prompt, _first(row[o["text"]]), i, o["text"]))
        where = pool.add(name, lambda n=name: videos.item(task.target_prompt, n))
        data.labels.append([where])
        data.label_names.append([name])
    data.candidates, data.names = pool.items, pool.names
    return data
