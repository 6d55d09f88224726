"""report.html: one self-contained page with the scores and, for each task, pictures of what went wrong and right."""

from __future__ import annotations

import html
import json
import os
from pathlib import Path
from typing import Any

from vlm2vec.evaluation.report.listing import published_columns
from vlm2vec.evaluation.report.summary import percent
from vlm2vec.evaluation.score.aggregate import aggregate
from vlm2vec.files import AnyPath, write_text
from vlm2vec.inputs import MARKER
from vlm2vec.media.inline import inline_thumbnail

WRONG, RIGHT = 6, 2  # answers of each task that are shown
THUMBNAIL = 112  # pixels

STYLE = Path(__file__).with_name("report.css")


def _short(text, length=140):
    text = MARKER.sub("", text or "").strip()
    return html.escape(text if len(text) <= length else text[: length - 1] + "…")


def figure(side: dict[str, Any], caption: str = "", kind: str = "", length: int = 140) -> str:
    """One picture or text card. side: {"text", "image", "video"}."""
    image = side.get("image") or (side["video"][0] if isinstance(side.get("video"), list) and side["video"] else "")
    uri = inline_thumbnail(image, THUMBNAIL) if image else None
    inside = f'<img alt="" src="{uri}">' if uri else _short(side.get("text") or os.path.basename(image), 90)
    below = f"{caption} {_short(side.get('text'), length) if uri else ''}"
    return f'<figure class="{kind}"><div class="pic">{inside}</div><figcaption>{below}</figcaption></figure>'


def answers_row(row: dict[str, Any]) -> str:
    """One query with its best candidates; the label at the end when it is not among them."""
    cells = [figure(row["query"], kind="query")]
    for place, answer in enumerate(row["top"], 1):
        cells.append(figure(answer, f"<b>{place}</b> {answer['score']:.3f}", "ok" if answer["correct"] else "no", 60))
    if not any(answer["correct"] for answer in row["top"]) and row["labels"]:
        where = f"rank {row['rank']}" if row["rank"] else "not ranked"
        label = {**row["labels"][0], "text": row["labels"][0]["text"] or row["labels"][0]["name"]}
        cells.append(figure(label, f"<b>right answer</b>, {where}", "ok", 60))
    return f'<div class="row">{"".join(cells)}</div>'


def pick_rows(rows: list[dict[str, Any]], wrong: int = WRONG, right: int = RIGHT) -> list[dict[str, Any]]:
    """The failures the model was surest of, then a few successes with the smallest lead."""

    def lead(row):
        top = [a["score"] for a in row["top"]]
        return top[0] - top[1] if len(top) > 1 else 0.0

    ranked = [r for r in rows if r["top"]]
    failures = sorted((r for r in ranked if not r["top"][0]["correct"]), key=lead, reverse=True)[:wrong]
    return failures + sorted((r for r in ranked if r["top"][0]["correct"]), key=lead)[:right]


def read_rows(path: AnyPath) -> list[dict[str, Any]]:
    """Rows of a {dataset}_top.jsonl."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _score_table(rows):
    protocol = "v3" if any(r.get("protocol") == "v3" for r in rows) else "v2"
    columns = [(name, scores) for name, scores in published_columns(protocol).values() if any(r["task"] in scores for r in rows)]
    head = "".join(f'<th class="n">{html.escape(name)}</th>' for name, _ in columns)
    out = [
        '<div class="wide"><table><tr><th>task</th><th>kind</th><th>metric</th><th class="n">score</th><th></th>'
        f'<th class="n">chance</th>{head}</tr>'
    ]
    for r in rows:
        chance = r["chance"] if r["metric"] == "hit@1" else None
        mark = f'<b style="left:{100 * chance:.1f}%"></b>' if chance is not None else ""
        theirs = "".join(f'<td class="n">{scores.get(r["task"], "-")}</td>' for _, scores in columns)
        out.append(
            f"<tr><td>{html.escape(r['task'])}</td><td>{html.escape(r['meta_task'])}</td><td>{r['metric']}</td>"
            f'<td class="n"><b>{percent(r["score"])}</b></td>'
            f'<td><div class="bar"><i style="width:{100 * (r["score"] or 0):.1f}%"></i>{mark}</div></td>'
            f'<td class="n">{percent(chance)}</td>{theirs}</tr>'
        )
    return "".join(out) + "</table></div>"


def _means_table(means):
    out = ['<table><tr><th>mean over</th><th class="n">data sets</th><th class="n">score</th></tr>']
    for field in ("meta_task", "group", "split", "modality"):
        for name, part in means[field].items():
            out.append(
                f'<tr><td>{field.replace("_", "-")} {html.escape(name)}</td><td class="n">{part["tasks"]}</td>'
                f'<td class="n">{percent(part["score"])}</td></tr>'
            )
    overall = means["overall"]
    return (
        "".join(out)
        + f'<tr><td><b>all</b></td><td class="n">{overall["tasks"]}</td><td class="n"><b>{percent(overall["score"])}</b></td></tr></table>'
    )


def write_report(output: AnyPath, rows: list[dict[str, Any]], model: str) -> Path:
    """Write OUTPUT/report.html from the summaries and the {dataset}_top.jsonl files. Returns the path."""
    output = Path(output)
    affected = sum(r["problems"].get("affected_rows", 0) for r in rows)
    note = f" {affected} rows had unreadable or missing data; summary.md names them." if affected else ""
    parts = [
        f"<h1>{html.escape(model)}</h1><p>{len(rows)} tasks, {sum(r['num_queries'] for r in rows)} queries; scores in percent, "
        f"means unweighted over data sets.{note}</p>",
        "<h2>Scores</h2>",
        _score_table(rows),
        "<h2>Means</h2>",
        _means_table(aggregate(rows)),
        "<h2>Answers</h2><p>For each task, wrong answers with the largest lead over the runner-up, then the closest right ones. "
        "Green is right, red is wrong; numbers are rank and cosine.</p>",
    ]
    for r in rows:
        path = output / f"{r['task']}_top.jsonl"
        picked = pick_rows(read_rows(path)) if path.exists() else []
        first = " open" if r is rows[0] else ""
        parts.append(f"<details{first}><summary>{html.escape(r['task'])}<span>{r['metric']} {percent(r['score'])}</span></summary>")
        parts += [answers_row(row) for row in picked] + ["</details>"]
    style = STYLE.read_text(encoding="utf-8")
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(model)}: evaluation</title><style>\n{style}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )
    write_text(output / "report.html", page)
    return output / "report.html"
