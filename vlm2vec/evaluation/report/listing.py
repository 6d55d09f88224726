"""`vlm2vec eval --list`: the published tasks, their protocol and what models have scored on them."""

from __future__ import annotations

from vlm2vec.evaluation.tasks import load_tasks, published
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
    told = "; ".join(f"{short} = {name}" for short, (name, _) in columns.items())
    lines += ["", f"{len(tasks)} tasks; published, in percent: {told}"]
    if protocol == "v3":
        lines.append("queries and candidates (of) that nobody has published are shown as -: the data tells them")
    return lines[1:]
