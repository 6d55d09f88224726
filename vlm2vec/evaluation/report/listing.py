"""`vlm2vec eval --list`: the published tasks, their protocol and what models have scored on them."""

from __future__ import annotations

from vlm2vec.evaluation.tasks import known_tasks, load_tasks, published
from vlm2vec.evaluation.tasks.score_rows import score_rows, v3_columns


def published_columns(protocol: str) -> dict[str, tuple[str, dict[str, float]]]:
    """{short name: (what it is, {task: percent})} of the published rows beside a protocol's tasks."""
    if protocol == "v3":
        return {short: (name, score_rows()[name].scores) for short, name in v3_columns().items()}
    books = published()
    return {
        short: (name, {task: cells[short] for task, cells in books["models"].items() if short in cells})
        for short, name in books["columns"].items()
    }


def _vidore_v3(width: int) -> list[str]:
    """Lines of ViDoRe V3's sets, which any protocol runs, and of what was published of them: means over all."""
    rows = {name: row.means["vidore_v3"] for name, row in score_rows().items() if "vidore_v3" in row.means}
    told = ", ".join(f"{name} {mean}" for name, mean in rows.items())
    lines = ["", f"vidore_v3 (document retrieval, visdoc), apart from MMEB; mean over its ten sets: {told}"]
    for task in (task for task in known_tasks().values() if task.group == "vidore_v3"):
        source = "private" if task.hub.get("access") == "private" else task.hub["dataset"]
        counts = f"{task.queries or '-':>7} {task.per_query or '-':>7}"
        lines.append(f"{task.name:<{width}}  {'':<5} {task.metric:<14} {task.candidates:<6} {counts}  {source}")
    return lines


def list_tasks(protocol: str = "v2") -> list[str]:
    """Lines of the table, grouped, with published scores in percent. v1 and v2 have one table; v3 shows all 190 tasks."""
    columns, tasks, lines, group = published_columns(protocol), load_tasks(protocol), [], None
    width = max(len(name) for name in tasks)
    head = f"{'task':<{width}}  {'split':<5} {'metric':<14} {'cand.':<6} {'queries':>7} {'of':>7}  " + "  ".join(f"{c:>6}" for c in columns)
    for task in tasks.values():
        if task.group != group:
            group = task.group
            lines += ["", f"{group} ({task.meta_task}, {task.modality})", head]
        cells = "  ".join(f"{scores.get(task.name, '-'):>6}" for _, scores in columns.values())
        lines.append(
            f"{task.name:<{width}}  {task.split or '':<5} {task.metric:<14} {task.candidates:<6} {task.queries or '-':>7} "
            f"{task.per_query or '-':>7}  {cells}"
        )
    lines += _vidore_v3(width)
    told = "; ".join(f"{short} = {name}" for short, (name, _) in columns.items())
    lines += ["", f"{len(tasks)} tasks; published, in percent: {told}"]
    rows = [name for name, row in score_rows().items() if row.protocol == protocol or "vidore_v3" in row.means]
    lines.append(f"rows for --reproduce: {', '.join(rows)}")
    if protocol == "v3":
        lines.append("queries and candidates (of) that nobody has published are shown as -: the data tells them")
    return lines[1:]
