"""MMEB-V3's sounds: naming what is heard, and finding sounds, films or pictures by a text or a sound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from vlm2vec.evaluation.loaders.ids import CANDIDATE_IDS, QUERY_IDS, QUERY_TEXTS, id_text, pick, read_judgements, row_id
from vlm2vec.evaluation.loaders.rows import Rows, find_files, open_rows, place, require_columns
from vlm2vec.evaluation.loaders.texts import tell_repeated, words
from vlm2vec.evaluation.loaders.video_root import VideoRoot
from vlm2vec.evaluation.tasks import Task
from vlm2vec.evaluation.tasks.task_data import Lazy, Pool, TaskData, unreadable
from vlm2vec.files import AnyPath
from vlm2vec.files.documents import read_text

CAPTIONS = tuple(f"caption_{number}" for number in range(1, 6))


def _columns(names: str | list[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def sound_of(value: Any, folder: Path) -> Any:
    """A table's sound as a model input takes it: bytes, or a path below `folder`; None for none."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    return str(folder / value) if isinstance(value, str) and value else value or None


def heard(text: str, value: Any, folder: Path, where: str) -> dict[str, Any]:
    """A query or candidate with a sound, or what stands for one that has none."""
    sound = sound_of(value, folder)
    return unreadable(f"{where}: no sound") if sound is None else {"text": text, "audio": sound}


def _in_order(rows: Rows, label: str, label_ids: list[str]) -> list[str]:
    """Label names by their integer ids where the table tells them (an id that no row has is the text of its number), else sorted."""
    named: dict[int, str] = {}
    for at, row in enumerate(rows.only(label, *label_ids)):
        number = pick(row, label_ids)
        if number is None or isinstance(number, str) and not number.lstrip("-").isdigit():
            return sorted({str(row[label]) for row in rows.only(label)})
        named.setdefault(int(number), str(row[label]))
        if named[int(number)] != str(row[label]):
            raise ValueError(
                f"{rows.where(at)}: label {number} is {str(row[label])!r} here and {named[int(number)]!r} before; one is wrong"
            )
    most = max(named, default=-1)
    if min(named, default=0) < 0 or most > 10 * len(rows) + 1000:
        raise ValueError(f"{rows.source}: label ids run from 0, got {min(named)} to {most}")
    return [named.get(number, str(number)) for number in range(most + 1)]


def load_sound_labels(task: Task, root: AnyPath | None, media: AnyPath, **_: Any) -> TaskData:
    """A sound against the names of all labels of its set.

    Options: `table` (paths, the first that is there), `audio` (columns), `folder` (where paths start; columns in braces), `label`,
    `label_id` (columns).
    """
    o = task.options
    rows = open_rows(root, task, o["table"], "table")
    label, audio = o["label"], rows.has(*_columns(o["audio"]))
    require_columns(rows, label)
    if audio is None:
        raise ValueError(f"{rows.source}: no column {' or '.join(_columns(o['audio']))}; it has {', '.join(rows.columns)}")
    data, pool, text = TaskData(task, local=[], held=rows), Pool(), words(task.query_prompt, "")
    for name in _in_order(rows, label, _columns(o.get("label_id", []))):
        pool.add(name, {"text": words(task.target_prompt, name)})
    everything = list(range(len(pool.items)))

    def make(row):
        folder = place(o["folder"].format(**row), media, root) if o.get("folder") else Path(media)
        return heard(text, row[audio], folder, task.name)

    for at, row in enumerate(rows.only(label)):
        data.queries.append(Lazy(rows, at, make))
        data.local.append(everything)
        data.labels.append([pool.index[str(row[label])]])
        data.label_names.append([str(row[label])])
    data.candidates, data.names = pool.items, pool.names
    return data


def load_sound_retrieval(task: Task, root: AnyPath | None, media: AnyPath, *, cache: AnyPath, **_: Any) -> TaskData:
    """Sounds, films or pictures by a text or a sound; every candidate is ranked, one is right. `layout` names one of `LAYOUTS`."""
    layout = task.options["layout"]
    if layout not in LAYOUTS:
        raise ValueError(f"task {task.name}: layout is one of {', '.join(LAYOUTS)}, got {layout!r}")
    data, pool, ids = TaskData(task, held=[]), Pool(), []
    for name, query, right in LAYOUTS[layout](task, root, Path(media), data, pool, cache):
        ids.append(name)
        data.queries.append(query)
        data.labels.append([pool.index.get(right, -1)])
        data.label_names.append([right])
    tell_repeated(data, ids, f"task {task.name}, queries")
    data.candidates, data.names = pool.items, pool.names
    return data


Found = Iterator[tuple[str, Any, str]]  # the id of a query, its input, the name of the right candidate


def _corpus(task: Task, root: AnyPath | None, data: TaskData, pool: Pool, make: Callable) -> None:
    """Every row of the task's corpus in the pool."""
    corpus = open_rows(root, task, task.options["corpus"], "corpus")
    data.held.append(corpus)
    names = ("corpus-id", *CANDIDATE_IDS)
    for at, row in enumerate(corpus.only(*names)):
        name = row_id(row, names, corpus.where(at))
        if name in pool.index:
            data.problems.add("duplicate_candidates", at, f"{corpus.where(at)}: {name}")
        pool.add(name, Lazy(corpus, at, make), name)


def _beir(task, root, media, data, pool, cache) -> Found:
    """SoundDescs: queries, corpus of sounds, judgements; the positive of the highest grade is right."""
    _corpus(task, root, data, pool, lambda row: heard(task.target_prompt, row.get("audio"), media, task.name))
    queries = open_rows(root, task, task.options["queries"], "queries")
    judged = read_judgements(open_rows(root, task, task.options["qrels"], "judgements"))
    for at, row in enumerate(queries):
        name, text = row_id(row, QUERY_IDS, queries.where(at)), pick(row, QUERY_TEXTS)
        grades = judged.get(name, {})
        if not grades or not text:
            data.problems.add("dropped_queries", at, f"{queries.where(at)}: {name} has no {'text' if grades else 'judgement'}")
            continue
        yield name, {"text": words(task.query_prompt, str(text))}, max(grades, key=lambda right: grades[right])


def _captions(task, root, media, data, pool, cache) -> Found:
    """Clotho: a table of files with five captions each, every caption a query; a row whose file is not there is left out."""
    rows, folder = open_rows(root, task, task.options["queries"], "captions"), place(task.options["folder"], root, media)
    require_columns(rows, "file_name", *CAPTIONS)
    for at, row in enumerate(rows):
        file = folder / row["file_name"]
        if not file.is_file():
            data.problems.add("dropped_queries", at, f"{rows.where(at)}: no file {file}")
            continue
        pool.add(row["file_name"], {"text": task.target_prompt, "audio": str(file)}, row["file_name"])
        for number, column in enumerate(CAPTIONS, 1):
            if row[column] and row[column].strip():
                yield f"{row['file_name']}#{number}", {"text": words(task.query_prompt, row[column])}, row["file_name"]


def _ave(task, root, media, data, pool, cache) -> Found:
    """AVE: lines of category, film, quality, start and end, parted by &; the sound between start and end asks for its film."""
    path = find_files(root or ".", task.options["queries"])
    if not path:
        raise ValueError(f"task {task.name}: no {task.options['queries']} in {root}")
    films, folder = VideoRoot(task, media, cache), place(task.options["folder"], root, media)
    for at, line in enumerate(read_text(path[0]).splitlines(), 1):
        cells = line.strip().split("&")
        if not line.strip() or cells[-1].strip().lower() in ("end", "endtime"):
            continue  # a line of names
        if len(cells) != 5:
            raise ValueError(f"{path[0]}, line {at}: expected Category&VideoID&Quality&Start&End, got {len(cells)} cells")
        film, start, end = cells[1], cells[3], cells[4]
        pool.add(film, lambda film=film: films.item(task.target_prompt, film), film)
        yield f"{film}_{start}_{end}", {"text": task.query_prompt, "audio": str(folder / f"{film}_{start}_{end}.wav")}, film


def _pictures(task, root, media, data, pool, cache) -> Found:
    """SpeechCOCO: spoken queries that name their picture; ids are compared as text."""

    def picture(row):
        image = row.get("image")
        image = (image.get("bytes") or image.get("path")) if isinstance(image, dict) else image
        return {"text": task.target_prompt, "image": image}

    _corpus(task, root, data, pool, picture)
    queries = open_rows(root, task, task.options["queries"], "queries")
    data.held.append(queries)
    require_columns(queries, "audio", "image_id")

    def make(row):
        return heard(task.query_prompt, row["audio"], media, task.name)

    for at, row in enumerate(queries.only("image_id", *QUERY_IDS)):
        where = queries.where(at)
        yield row_id(row, QUERY_IDS, where), Lazy(queries, at, make), id_text(row["image_id"], f"{where}, image_id")


LAYOUTS = {"beir": _beir, "captions": _captions, "ave": _ave, "pictures": _pictures}
