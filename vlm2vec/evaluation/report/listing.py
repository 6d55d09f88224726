"""`vlm2vec eval --list`: the published tasks, their protocol and what models have scored on them."""

from __future__ import annotations

from vlm2vec.evaluation.tasks import load_tasks, published


def list_tasks() -> list[str]:
    """Lines of the table, grouped, with published scores in percent."""
    books, lines, group = published(), [], None
    columns = list(books["columns"])
    width = max(len(name) for name in load_tasks())
    head = f"{'task':<{width}}  {'split':<5} {'metric':<14} {'cand.':<6} {'queries':>7} {'of':>6}  " + "  ".join(f"{c:>6}" for c in columns)
    for task in load_tasks().values():
        if task.group != group:
            group = task.group
            lines += ["", f"{group} ({task.meta_task}, {task.modality})", head]
        scores = books["models"].get(task.name, {})
        cells = "  ".join(f"{scores.get(c, '-'):>6}" for c in columns)
        lines.append(
            f"{task.name:<{width}}  {task.split or '':<5} {task.metric:<14} {task.candidates:<6} {task.queries or '-':>7} "
            f"{task.per_query or '-':>6}  {cells}"
        )
    lines += ["", "published, in percent: " + "; ".join(f"{c} = {books['columns'][c]}" for c in columns)]
    return lines[1:]
