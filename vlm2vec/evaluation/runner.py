"""Score a model on tasks: read all, encode each distinct input once, rank task by task, write files."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlm2vec.backbones.processing import READING
from vlm2vec.evaluation.encode.keys import ContentHashes, Contents, item_key, model_identity
from vlm2vec.evaluation.encode.missing import collect_unreadable, fill_store, share_unreadable
from vlm2vec.evaluation.encode.store import EmbeddingStore
from vlm2vec.evaluation.frames import frame_rule, has_films, with_rule
from vlm2vec.evaluation.limits import text_limit
from vlm2vec.evaluation.loaders import load_task
from vlm2vec.evaluation.report.export import write_faiss, write_predictions
from vlm2vec.evaluation.report.outputs import top_rows, write_v1, write_v2
from vlm2vec.evaluation.reproduce.record import run_record
from vlm2vec.evaluation.score.details import chance, cut_texts, other_metric, parts_and_exclusions, v3_facts
from vlm2vec.evaluation.score.metrics import KS, METRICS, mean_of, per_query_metrics
from vlm2vec.evaluation.score.ranking import rank
from vlm2vec.evaluation.score.ties import WARN_ABOVE, ties
from vlm2vec.evaluation.support import reason as unsupported
from vlm2vec.evaluation.support import unsupported_row
from vlm2vec.evaluation.tasks import known_tasks
from vlm2vec.evaluation.tasks.task_data import whole
from vlm2vec.files import AnyPath, write_json, write_lines
from vlm2vec.files.locks import locked
from vlm2vec.media.images import REFERENCE

if TYPE_CHECKING:
    from vlm2vec.evaluation.tasks import Task
    from vlm2vec.evaluation.tasks.task_data import TaskData
    from vlm2vec.media.sampling import FrameRule


TOP = 100
MISSING_SHARE = 0.5


@dataclass
class Options:
    """How tasks are run; every field has the command line's default."""

    protocol: str = "v1"
    feeding: str = "official"  # which published evaluation of MMEB-V3 words, pools and judgements follow; see `Task.fed`
    hub: bool = False
    strict: bool = False
    batch_size: int = 32
    prompt: str | None = None
    top: int = TOP
    report_top: int = 5
    progress: bool = True
    device: str | None = None
    rank: int = 0
    world: int = 1
    barrier: object = None
    shard_cost: int | None = None
    faiss: bool = False
    workers: int | None = None
    frames: FrameRule | None = None  # of every film; None: as `frames.frame_rule` says
    pictures: dict = field(default_factory=dict)  # orientation and background that hold for all tasks; see `reading`
    broken_shards: list = field(default_factory=list)  # filled by the run: shards that did not read back and were made again


@dataclass
class Prepared:
    """A task whose inputs have keys. A key is None where a file cannot be read."""

    data: object
    query_keys: list
    candidate_keys: list
    reasons: dict = field(default_factory=dict)
    contents: dict = field(default_factory=dict)  # digests of the sides' texts and of all media; see `keys.Contents`


def prepare(data: TaskData, hashes: ContentHashes, prompt: str | None = None) -> Prepared:
    """Key every input of a task; unreadable files are noted, not raised. ValueError when most of a task's files are missing."""
    reasons, visual, bad = {}, 0, []
    contents = Contents(hashes)

    def key(lazy, side):
        nonlocal visual
        item = whole(lazy)  # read once: all that is asked of it is asked here
        shows = bool(item.get("image") or item.get("video") or item.get("audio") is not None or item.get("unreadable"))
        shows = shows and not item.get("row")
        visual += shows
        contents.add(side, item)
        try:
            return item_key(item, hashes, prompt)
        except ValueError as error:
            reasons[id(lazy)] = str(error)
            bad.extend([str(error)] * shows)
            return None

    keys = [[key(item, side) for item in items] for side, items in (("query", data.queries), ("candidate", data.candidates))]
    prepared = Prepared(data, *keys, reasons, contents.digests())
    if bad and len(bad) > MISSING_SHARE * visual:
        kinds = "sounds" if data.task.modality == "audio" else "images or videos"
        raise ValueError(
            f"task {data.task.name}: {len(bad)} of {visual} {kinds} cannot be read, the first {bad[0]}; "
            "is the image folder (--images) right?"
        )
    return prepared


def _note_unreadable(prepared, unreadable):
    """Write the problems of a task: which rows touch an input that has no vector. Returns (bad_query, blocked)."""
    data = prepared.data

    def state(item, key):
        return prepared.reasons.get(id(item)) if key is None else unreadable.get(key)

    queries = [state(q, k) for q, k in zip(data.queries, prepared.query_keys)]
    candidates = [state(c, k) for c, k in zip(data.candidates, prepared.candidate_keys)]
    bad = {c for c, reason in enumerate(candidates) if reason}
    for i, reason in enumerate(queries):
        if reason:
            data.problems.add("unreadable_query", i, reason)
        bad_candidates = bad if data.local is None else bad.intersection(data.local[i]) if bad else ()
        for c in bad_candidates:
            data.problems.add("unreadable_candidate", i, candidates[c])
        right = [c for c in data.labels[i] if c >= 0]
        if right and all(c in bad for c in right):
            data.problems.add("unreadable_positive", i, candidates[right[0]])
        if not data.labels[i]:
            data.problems.add("empty_labels", i, f"row {i}")
        elif not right:
            data.problems.add("absent_positive", i, f"row {i}")
    return [bool(r) for r in queries], [bool(r) for r in candidates]


@dataclass
class Ranked:
    """One task after ranking: the best candidates of each query, and the vectors the candidates have."""

    scores: torch.Tensor
    indices: torch.Tensor
    target: torch.Tensor | None
    target_row: list
    blocked: list
    labels: list

    @property
    def lists(self) -> list[list[int | None]]:
        """Candidate numbers per query, best first; None where nothing is left to rank."""
        return [[c if c >= 0 else None for c in row] for row in self.indices.tolist()]


def rank_task(prepared: Prepared, store: EmbeddingStore, unreadable: dict[bytes, str], options: Options) -> Ranked:
    """Rank the candidates of one task; notes its data problems. ValueError under --strict when there are any."""
    data = prepared.data
    bad_query, blocked = _note_unreadable(prepared, unreadable)
    if data.problems and options.strict:
        raise ValueError(f"task {data.task.name}: {data.problems.text()} (refused because of --strict)")
    rows, query_row = {}, {}
    target_row = [rows.setdefault(k, len(rows)) if not b else 0 for k, b in zip(prepared.candidate_keys, blocked)]
    for key, bad in zip(prepared.query_keys, bad_query):
        if not bad:
            query_row.setdefault(key, len(query_row))
    depth, count, target = max(min(options.top, len(data.candidates)), max(KS)), len(data.queries), None
    depth += max(map(len, data.excluded), default=0) if data.excluded else 0  # so many may leave the ranking
    scores, indices = torch.full((count, depth), float("-inf")), torch.full((count, depth), -1)
    if rows and query_row:
        target = store.get(list(rows)).to(options.device or "cpu")
        query = store.get(list(query_row)).to(target.device)[[query_row.get(k, 0) for k in prepared.query_keys]]
        scores, indices = rank(query, target, depth, local=data.local, target_row=target_row, blocked=blocked)
        scores[torch.tensor(bad_query)], indices[torch.tensor(bad_query)] = float("-inf"), -1
    # an absent label must match nothing: give each its own negative number
    labels = [[c if c >= 0 else -2 - j for j, c in enumerate(row)] for row in data.labels]
    return Ranked(scores, indices, target, target_row, blocked, labels)


def score_task(
    prepared: Prepared,
    store: EmbeddingStore,
    unreadable: dict[bytes, str],
    options: Options,
    output: AnyPath,
    run: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Rank one task and write its files. Returns its summary row; `run` says what it was made with (`reproduce.record`)."""
    data, task, output = prepared.data, prepared.data.task, Path(output)
    ranking = rank_task(prepared, store, unreadable, options)
    ranked = ranking.lists
    table = per_query_metrics(ranked, ranking.labels, data.grades)
    metrics = {f"{m}@{k}": mean_of(table[f"{m}@{k}"], data.parts) for m in METRICS for k in KS}
    ranks = [
        next((j for j, c in enumerate(row, 1) if c is not None and c in set(label)), None) for row, label in zip(ranked, ranking.labels)
    ]
    tied, lost = ties(ranking.scores, ranked, ranking.labels)
    v1 = task.modality == "image" and options.protocol == "v1"
    if v1:
        write_v1(output, data, ranking.indices, table["hit@1"] > 0, run)
    write_v2(output, data, ranking.indices[:, : options.top], metrics, info=not v1, run=run)
    lines = (json.dumps(row, ensure_ascii=False) for row in top_rows(data, ranking.scores, ranking.indices, ranks, options.report_top))
    write_lines(output / f"{task.name}_top.jsonl", lines, durable=False)
    write_predictions(output / "predictions" / f"{task.name}.parquet", data, ranking.scores, ranking.indices, ranks, options.top)
    if options.faiss and ranking.target is not None:
        good = [c for c, bad in enumerate(ranking.blocked) if not bad]
        write_faiss(output / "faiss", task.name, ranking.target[[ranking.target_row[c] for c in good]], [data.names[c] for c in good])
    sizes = [len(c) for c in data.local] if data.local is not None else [len(data.candidates)]
    summary = {
        "task": task.name,
        "modality": task.modality,
        "group": task.group,
        "meta_task": task.meta_task,
        "split": task.split,
        "metric": task.metric,
        "score": metrics[task.metric]
        if task.metric in metrics
        else other_metric(ranked, ranking.labels, data.grades, task.metric, data.parts),
        "ties": {
            "queries": sum(tied),
            "share": sum(tied) / max(1, len(tied)),
            "score_ties_lost": other_metric(lost, ranking.labels, data.grades, task.metric, data.parts),
        },
        "metrics": metrics,
        "num_queries": len(data.queries),
        "num_candidates": len(data.candidates),
        "candidates_per_query": sum(sizes) / max(1, len(sizes)),
        "chance": chance(data),
        "problems": data.problems.summary(),
        **parts_and_exclusions(data, ranked, ranking.labels, table),
        **cut_texts(prepared, store),
        **v3_facts(options),
        **({"run": run} if run else {}),
    }
    write_json(output / "tasks" / f"{task.name}.json", summary, durable=False)
    return summary


def _tell_ties(row: dict[str, Any]) -> None:
    """A warning on stderr where more than a few queries of a task are tied."""
    told = row["ties"]
    if told["share"] > WARN_ABOVE:
        print(
            f"{row['task']}: {told['share']:.1%} of the queries are tied between a right candidate and a wrong one; with ties lost "
            f"{row['metric']} is {100 * told['score_ties_lost']:.1f} %, not {100 * row['score']:.1f} %",
            file=sys.stderr,
        )


def reading(
    model: Any, task: Task, asked: dict[str, str], rule: FrameRule | None = None, *, protocol: str = "v1", feeding: str = "official"
) -> tuple[tuple[str, Any], ...]:
    """How a task's pictures and films are read, as options of `VLM2Vec.reading`: published tasks' pictures as the reference reads them,
    others' as the model says, films by `rule`, texts up to the protocol's limit (`limits.text_limit`); () for a model that reads in one
    way only.

    Args:
        asked: orientation and background that were asked for by name, which hold for all tasks.
    """
    if not hasattr(model, "reading"):
        return ()
    own = {name: model.options[name] for name in READING}
    own["text_max_length"] = text_limit(model, task, protocol, feeding)
    films = rule.options if rule is not None and has_films(task) else {}
    return tuple({**own, **(REFERENCE if task.name in known_tasks() else {}), **films, **asked}.items())


def run_tasks(
    model: Any,
    tasks: Sequence[Task],
    data: AnyPath | None,
    media: AnyPath,
    output: AnyPath,
    *,
    store: AnyPath | None = None,
    options: Options | None = None,
) -> list[dict[str, Any]]:
    """Score a model on several tasks. Pictures of published tasks are read as the reference reads them (`reading`).

    Args:
        model: has `encode(list of inputs, batch_size=, convert_to_tensor=)` and `preprocess(list)`.
        tasks: Tasks. data: annotation folder. media: image root / video root. output: folder for all files.
        store: folder of the embedding store, default OUTPUT/embeddings.
        options: Options.

    Returns: list of per-task summaries (also in OUTPUT/tasks/{dataset}.json), in the order of `tasks`. Raises ValueError while another
        evaluation writes into `output`.
    """
    options = options or Options()
    why = {task.name: unsupported(model, task) for task in tasks}
    supported = [task for task in tasks if not why[task.name]]
    with locked(output, "an evaluation") if options.rank == 0 else nullcontext():
        rows = {task.name: unsupported_row(task, told, output, options) for task in tasks if (told := why[task.name])}
        for reader, part in readers(model, supported, options):
            rows |= {row["task"]: row for row in _run_tasks(reader, part, data, media, Path(output), store, options)}
    return [rows[task.name] for task in tasks]


def readers(model: Any, tasks: Sequence[Task], options: Options) -> Iterator[tuple[Any, list[Task]]]:
    """(the model as it reads their media, tasks that are read alike)."""
    parts: dict[tuple, list[Task]] = {}
    rule = frame_rule(model, asked=options.frames, protocol=options.protocol, feeding=options.feeding)
    for task in tasks:
        read = reading(model, task, options.pictures, rule, protocol=options.protocol, feeding=options.feeding)
        parts.setdefault(read, []).append(with_rule(task, rule))
    for media, part in parts.items():
        yield (model.reading(**dict(media)) if media else model), part


def read_tasks(
    tasks: Sequence[Task], data: AnyPath | None, media: AnyPath, cache: AnyPath, hashes: ContentHashes, options: Options
) -> list[Prepared]:
    """The tasks' data with keys; `cache` takes the frames and pages that have to be unpacked."""
    prepared = []
    for task in tasks:
        loaded = load_task(task, data, media, hub=options.hub, protocol=options.protocol, feeding=options.feeding, cache=cache)
        loaded.media = str(media)
        prepared.append(prepare(loaded, hashes, options.prompt))
    return prepared


def _run_tasks(model, tasks, data, media, output: Path, store, options: Options) -> list[dict[str, Any]]:
    """`run_tasks` for tasks whose pictures are read alike, while the output is this run's alone."""
    say = print if options.progress and options.rank == 0 else (lambda *a, **k: None)
    hashes = ContentHashes()
    prepared = read_tasks(tasks, data, media, output / "media", hashes, options)
    items = {}
    for p in prepared:
        for item, key in zip(p.data.queries + p.data.candidates, p.query_keys + p.candidate_keys):
            if key is not None:
                items.setdefault(key, item)
    asked = sum(len(p.query_keys) + len(p.candidate_keys) for p in prepared)
    identity = model_identity(model)
    store = EmbeddingStore(store or output / "embeddings", identity)
    store.verify(items)
    options.broken_shards += store.broken
    for line in store.broken:
        say(f"set aside a shard that does not read back: {line}", file=sys.stderr)
    present = sum(key in store for key in items)
    say(f"{len(tasks)} tasks, {asked} inputs, {len(items)} distinct, {present} already encoded", file=sys.stderr)
    extra = {"shard_cost": options.shard_cost} if options.shard_cost else {}
    with torch.inference_mode():
        failed = fill_store(
            model,
            store,
            items,
            rank=options.rank,
            world=options.world,
            batch_size=options.batch_size,
            prompt=options.prompt,
            progress=options.progress,
            workers=options.workers,
            hashes=hashes,
            **extra,
        )
    unreadable = _all_unreadable(failed, store, output, options)
    store.refresh()
    summaries = {}
    for p in prepared[options.rank :: options.world]:
        run = run_record(model, identity, p, options, (data, media))
        summaries[p.data.task.name] = score_task(p, store, unreadable, options, output, run)
        if p.data.problems:
            print(f"{p.data.task.name}: {p.data.problems.text()}", file=sys.stderr)
        _tell_ties(summaries[p.data.task.name])
    if options.barrier:
        options.barrier()
    for p in prepared:
        name = p.data.task.name
        if name not in summaries:
            summaries[name] = json.loads((output / "tasks" / f"{name}.json").read_text(encoding="utf-8"))
    return [summaries[p.data.task.name] for p in prepared]


def _all_unreadable(failed: dict[bytes, str], store: EmbeddingStore, output: Path, options: Options) -> dict[bytes, str]:
    """What cannot be decoded, over all processes of the run."""
    if options.world == 1:
        return failed
    share_unreadable(store, output, failed, options.rank)
    options.barrier()
    return collect_unreadable(store, output, options.world)


def run_task(model: Any, task: Task, data: AnyPath | None, media: AnyPath, output: AnyPath, **options: Any) -> dict[str, Any]:
    """Score a model on one task; see `run_tasks`."""
    return run_tasks(model, [task], data, media, output, options=Options(**options))[0]
