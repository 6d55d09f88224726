"""summary.json, summary.md and the table on the terminal: our scores next to the published rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm2vec.evaluation.report.listing import published_columns
from vlm2vec.evaluation.score.aggregate import aggregate
from vlm2vec.evaluation.tasks import V2_GROUPS, known_tasks, published
from vlm2vec.files import AnyPath, write_json, write_lines

V1_TABLE = ("classification", "vqa", "retrieval", "grounding", "ind", "ood", "overall")
V2_TABLE = (*V2_GROUPS[:4], "image", *V2_GROUPS[4:8], "video", *V2_GROUPS[8:], "visdoc", "all")


def percent(value: float | None) -> str:
    """One decimal, as the papers print; a dash where there is nothing."""
    return "-" if value is None else f"{100 * value:.1f}"


def own_row(means: dict[str, Any]) -> dict[str, float]:
    """{column: fraction} in the columns of both published tables."""
    row = {name: part["score"] for name, part in means["meta_task"].items() if name in V1_TABLE}
    row |= {name: part["score"] for name, part in means["split"].items()}
    row |= {name: part["score"] for name, part in means["group"].items()}
    row |= {name: part["score"] for name, part in means["modality"].items()}
    if set(means["modality"]) == {"image"}:
        row["overall"] = means["overall"]["score"]
    row["all"] = means["overall"]["score"]
    return row


def not_as_published(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each task that bears a published name and has another number of queries or candidates than was published."""
    lines, table = [], known_tasks()
    for row in rows:
        task = table.get(row["task"])
        if task is not None and task.queries and row["score"] is not None and row["num_queries"] != task.queries:
            lines.append(
                f"{row['task']} has {row['num_queries']:,} queries here, {task.queries:,} as published: its scores cannot be compared"
            )
    return lines


def v3_lines(means: dict[str, Any]) -> list[str]:
    """Lines of MMEB-V3's means: what a model cannot do counted 0, and beside it the mean over what was run; [] without them."""
    if "v3" not in means:
        return []
    lines = ["", "## MMEB-V3", "", "Tasks of inputs that the model does not take count 0; *run* is the mean over those that were run.", ""]
    lines += ["| mean over | tasks run | unsupported | of | score | run |", "|---|---|---|---|---|---|"]
    for kind, part in means["v3"].items():
        title = {"subgroups": "sub-group ", "sets": "set "}.get(kind, "")
        for name, mean in part.items():
            whole = mean["tasks"] + mean["unsupported"] == mean["of"]
            score = percent(mean["score"]) if whole else "-"
            lines.append(f"| {title}{name} | {mean['tasks']} | {mean['unsupported']} | {mean['of']} | {score} | {percent(mean['ran'])} |")
    return lines


def details_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Lines on parts of tasks, excluded candidates, texts that were cut, and tasks that were not run."""
    lines = []
    for row in rows:
        name = row["task"]
        if row.get("unsupported"):
            lines.append(f"* {name}: not run, {row['unsupported']}")
        for part, told in row.get("parts", {}).items():
            lines.append(f"* {name}, {part}: {percent(told['score'])} over {told['queries']} queries")
        if "without_excluded" in row:
            told = row["without_excluded"]
            lines.append(
                f"* {name}: {percent(told['score'])} without the candidates that {told['queries']} queries exclude (its authors' own rule)"
            )
        if "cut_texts" in row:
            told = row["cut_texts"]
            lines.append(f"* {name}: {told['queries']} queries and {told['candidates']} candidates cut to the model's limit")
    return ["", "## Details", "", *lines] if lines else []


def markdown(rows: list[dict[str, Any]], means: dict[str, Any], model: str, broken_shards: Sequence[str] = ()) -> list[str]:
    """Lines of summary.md."""
    books = published()
    columns = published_columns("v3" if "v3" in means else "v2")
    known = any(r["task"] in books["models"] for r in rows)
    others = not_as_published(rows)
    shown = [(name, scores) for name, scores in columns.values() if any(r["task"] in scores for r in rows)] if "v3" in means else []
    shown = shown or [column for column in columns.values() if known]
    head = ["task", "group", "metric", model, *(name for name, _ in shown)]
    lines = [f"# {model}", "", "Scores in percent; the means are unweighted over data sets.", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        cells = [r["task"], r["group"], r["metric"], f"**{percent(r['score'])}**"]
        cells += [str(scores.get(r["task"], "-")) for _, scores in shown]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"* {line}" for line in others)] if others else []
    lines += ["", "## Means", "", "| mean over | data sets | score |", "|---|---|---|"]
    for field, title in (("meta_task", ""), ("group", "group "), ("split", "split "), ("modality", "modality ")):
        for name, part in means[field].items():
            of = f" of {part['of']}" if part.get("of", part["tasks"]) != part["tasks"] else ""
            lines.append(f"| {title}{name} | {part['tasks']}{of} | {percent(part['score'])} |")
    lines.append(f"| all | {means['overall']['tasks']} | {percent(means['overall']['score'])} |")
    own_scores = own_row(means)
    for key, wanted, title in (("v1", V1_TABLE, "MMEB (arXiv:2410.05160)"), ("v2", V2_TABLE, "MMEB-V2 (arXiv:2507.04590)")):
        if not known or (key == "v1" and not any(r["modality"] == "image" for r in rows)):
            continue
        incomplete = "" if means["complete"][key] else " (ours: only the data sets above)"
        lines += ["", f"## Next to {title}{incomplete}", ""]
        lines += ["| model | " + " | ".join(wanted) + " |", "|" + "---|" * (len(wanted) + 1)]
        lines.append(f"| **{model}** | " + " | ".join(percent(own_scores.get(c)) for c in wanted) + " |")
        for name, row in books["tables"][key].items():
            lines.append(f"| {name} | " + " | ".join(str(row.get(c, "-")) for c in wanted) + " |")
    lines += v3_lines(means) + details_lines(rows)
    tied = [r for r in rows if r.get("ties", {}).get("queries")]
    if tied:
        lines += ["", "## Ties", "", "Queries of which a right candidate and a wrong one score the same; above, the first one wins.", ""]
        lines += ["| task | tied queries | score | with ties lost |", "|---|---|---|---|"]
        for r in tied:
            cells = (f"{r['ties']['share']:.1%}", percent(r["score"]), percent(r["ties"]["score_ties_lost"]))
            lines.append(f"| {r['task']} | {' | '.join(cells)} |")
    bad = [r for r in rows if r["problems"]]
    lines += ["", "## Data problems", ""]
    if not bad and not broken_shards:
        lines.append("None.")
    lines += [f"* a shard of the embedding store did not read back, 0 rows affected (encoded again): {line}" for line in broken_shards]
    for r in bad:
        kinds = [f"{k.replace('_', ' ')} {v['rows']} rows" for k, v in r["problems"].items() if isinstance(v, dict)]
        lines.append(f"* {r['task']}: {r['problems']['affected_rows']} of {r['num_queries']} rows affected ({'; '.join(kinds)})")
        for kind, value in r["problems"].items():
            if isinstance(value, dict) and value["examples"]:
                lines.append(f"  * {kind.replace('_', ' ')}: {'; '.join(value['examples'])}")
    return lines


def write_summary(
    output: AnyPath, rows: list[dict[str, Any]], model: str, extra: dict[str, Any] | None = None, broken_shards: Sequence[str] = ()
) -> dict[str, Any]:
    """Write OUTPUT/summary.json and OUTPUT/summary.md. Returns the summary dict.

    summary.json: {"model", "tasks": [per-task rows], "means": aggregate(...), "affected_rows": int, "broken_shards": [...],
    ...extra}.
    """
    means = aggregate(rows)
    affected = sum(r["problems"].get("affected_rows", 0) for r in rows)
    summary = {
        "model": model,
        **(extra or {}),
        "tasks": rows,
        "means": means,
        "affected_rows": affected,
        "broken_shards": list(broken_shards),
    }
    write_json(Path(output) / "summary.json", summary)
    write_lines(Path(output) / "summary.md", markdown(rows, means, model, broken_shards))
    return summary


def terminal(rows: list[dict[str, Any]], means: dict[str, Any]) -> list[str]:
    """Lines for the terminal: one per task, then the means."""
    width = max([len(r["task"]) for r in rows] + [20])
    lines = [f"{'task':<{width}}  {'meta-task':<24} {'metric':<14} {'score':>6}  {'queries':>7} {'cand.':>6}"]
    for r in rows:
        mark = f"  {r['problems']['affected_rows']} rows affected" if r["problems"].get("affected_rows") else ""
        if r.get("ties", {}).get("queries"):
            mark += f"  {r['ties']['share']:.1%} tied, {percent(r['ties']['score_ties_lost'])} with ties lost"
        mark += f"  not run: {r['unsupported']}" if r.get("unsupported") else ""
        lines.append(
            f"{r['task']:<{width}}  {r['meta_task']:<24} {r['metric']:<14} {percent(r['score']):>6}  {r['num_queries']:>7} "
            f"{r['candidates_per_query']:>6.0f}{mark}"
        )
    lines += not_as_published(rows)
    for field in ("meta_task", "split", "modality"):
        if len(means[field]) > 1 or field == "meta_task":
            for name, part in means[field].items():
                lines.append(f"{'mean ' + name:<{width}}  {'':<24} {'':<14} {percent(part['score']):>6}  {part['tasks']:>7} tasks")
    whole = means.get("v3", {}).get("groups", {}).get("V3-All")
    if whole and whole["tasks"] + whole["unsupported"] == whole["of"]:
        lines.append(
            f"{'V3-All':<{width}}  {'':<24} {'':<14} {percent(whole['score']):>6}  {whole['of']:>7} tasks, "
            f"{whole['unsupported']} unsupported counted 0"
        )
    lines.append(
        f"{'mean of all':<{width}}  {'':<24} {'':<14} {percent(means['overall']['score']):>6}  {means['overall']['tasks']:>7} tasks"
    )
    return lines
