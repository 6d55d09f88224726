"""report.html: one self-contained page with the scores and, for each task, pictures of what went wrong and right."""

import base64
import html
import io
import json
import os
from pathlib import Path

from vlm2vec.evaluation.report.summary import percent
from vlm2vec.evaluation.score.aggregate import aggregate
from vlm2vec.evaluation.tasks import published

WRONG, RIGHT, SIDE = 6, 2, 112

STYLE = """
:root{--ink:#1d2330;--soft:#68738a;--line:#e2e6ee;--good:#1f8a4c;--bad:#c2442d;--card:#fff;--page:#f6f7fa;--bar:#4c6fff}
@media (prefers-color-scheme:dark){:root{--ink:#e8ebf2;--soft:#97a1b5;--line:#2c3344;--good:#4cc38a;--bad:#ff8a70;--card:#181d29;--page:#10141d;--bar:#7d96ff}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:32px 20px 80px}h1{font-size:26px;margin:0 0 4px}h2{margin:40px 0 12px;font-size:19px}
p{color:var(--soft);margin:0 0 14px;max-width:75ch}table{border-collapse:collapse;width:100%;background:var(--card);border:1px solid var(--line)}
th,td{padding:6px 10px;text-align:left;border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums}th{color:var(--soft);font-weight:600}
td.n,th.n{text-align:right}.wide{overflow-x:auto}.bar{height:8px;border-radius:4px;background:var(--line);min-width:90px;position:relative}
.bar i{position:absolute;inset:0 auto 0 0;border-radius:4px;background:var(--bar)}.bar b{position:absolute;top:-3px;bottom:-3px;width:2px;background:var(--bad)}
details{background:var(--card);border:1px solid var(--line);margin:0 0 8px;padding:0 14px}summary{cursor:pointer;padding:10px 0;font-weight:600}
summary span{color:var(--soft);font-weight:400;margin-left:8px}.row{display:flex;gap:10px;padding:12px 0;border-top:1px solid var(--line);overflow-x:auto}
figure{margin:0;width:124px;flex:none}figure .pic{width:124px;height:112px;border:1px solid var(--line);display:flex;align-items:center;justify-content:center;overflow:hidden;background:var(--page);font-size:12px;padding:4px;color:var(--soft)}
figure.query{width:170px;padding-right:14px;border-right:2px solid var(--line)}figure.query .pic{width:156px}
figure .pic img{max-width:100%;max-height:100%}figcaption{font-size:12px;line-height:1.35;margin-top:4px;overflow-wrap:anywhere}
figure.ok .pic{border:2px solid var(--good)}figure.no .pic{border:2px solid var(--bad)}.ok figcaption b{color:var(--good)}.no figcaption b{color:var(--bad)}
"""


def thumbnail(path, side=SIDE):
    """A data URI of a small JPEG, or None when the picture does not open."""
    from vlm2vec.media.images import open_image

    try:
        picture = open_image(path)
    except (ValueError, OSError):
        return None
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _short(text, length=140):
    text = (text or "").replace("<|image_1|>", "").replace("<|video_1|>", "").strip()
    return html.escape(text if len(text) <= length else text[: length - 1] + "…")


def figure(side, caption="", kind="", length=140):
    """One picture or text card. side: {"text", "image", "video"}."""
    image = side.get("image") or (side["video"][0] if isinstance(side.get("video"), list) and side["video"] else "")
    uri = thumbnail(image) if image else None
    inside = f'<img alt="" src="{uri}">' if uri else _short(side.get("text") or os.path.basename(image), 90)
    below = f"{caption} {_short(side.get('text'), length) if uri else ''}"
    return f'<figure class="{kind}"><div class="pic">{inside}</div><figcaption>{below}</figcaption></figure>'


def grid(row):
    """One query with its best candidates; the label at the end when it is not among them."""
    cells = [figure(row["query"], kind="query")]
    for place, answer in enumerate(row["top"], 1):
        cells.append(figure(answer, f"<b>{place}</b> {answer['score']:.3f}", "ok" if answer["correct"] else "no", 60))
    if not any(answer["correct"] for answer in row["top"]) and row["labels"]:
        where = f"rank {row['rank']}" if row["rank"] else "not ranked"
        label = {**row["labels"][0], "text": row["labels"][0]["text"] or row["labels"][0]["name"]}
        cells.append(figure(label, f"<b>right answer</b>, {where}", "ok", 60))
    return f'<div class="row">{"".join(cells)}</div>'


def pick_rows(rows, wrong=WRONG, right=RIGHT):
    """The failures the model was surest of, then a few successes with the smallest lead."""

    def lead(row):
        top = [a["score"] for a in row["top"]]
        return top[0] - top[1] if len(top) > 1 else 0.0

    ranked = [r for r in rows if r["top"]]
    failures = sorted((r for r in ranked if not r["top"][0]["correct"]), key=lead, reverse=True)[:wrong]
    return failures + sorted((r for r in ranked if r["top"][0]["correct"]), key=lead)[:right]


def read_rows(path):
    """Rows of a {dataset}_top.jsonl."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def _score_table(rows):
    books = published()
    columns = [c for c in books["columns"] if any(c in books["models"].get(r["task"], {}) for r in rows)]
    head = "".join(f'<th class="n">{html.escape(books["columns"][c])}</th>' for c in columns)
    out = [
        f'<div class="wide"><table><tr><th>task</th><th>kind</th><th>metric</th><th class="n">score</th><th></th><th class="n">chance</th>{head}</tr>'
    ]
    for r in rows:
        chance = r["chance"] if r["metric"] == "hit@1" else None
        mark = f'<b style="left:{100 * chance:.1f}%"></b>' if chance is not None else ""
        theirs = "".join(f'<td class="n">{books["models"].get(r["task"], {}).get(c, "-")}</td>' for c in columns)
        out.append(
            f"<tr><td>{html.escape(r['task'])}</td><td>{html.escape(r['meta_task'])}</td><td>{r['metric']}</td>"
            f'<td class="n"><b>{percent(r["score"])}</b></td><td><div class="bar"><i style="width:{100 * r["score"]:.1f}%"></i>{mark}</div></td>'
            f'<td class="n">{percent(chance)}</td>{theirs}</tr>'
        )
    return "".join(out) + "</table></div>"


def _means_table(means):
    out = ['<table><tr><th>mean over</th><th class="n">data sets</th><th class="n">score</th></tr>']
    for field in ("meta_task", "group", "split", "modality"):
        for name, part in means[field].items():
            out.append(
                f'<tr><td>{field.replace("_", "-")} {html.escape(name)}</td><td class="n">{part["tasks"]}</td><td class="n">{percent(part["score"])}</td></tr>'
            )
    whole = means["overall"]
    return (
        "".join(out)
        + f'<tr><td><b>all</b></td><td class="n">{whole["tasks"]}</td><td class="n"><b>{percent(whole["score"])}</b></td></tr></table>'
    )


def write_report(output, rows, model):
    """Write OUTPUT/report.html from the summaries and the {dataset}_top.jsonl files. Returns the path."""
    output = Path(output)
    affected = sum(r["problems"].get("affected_rows", 0) for r in rows)
    note = f" {affected} rows had unreadable or missing data; summary.md names them." if affected else ""
    parts = [
        f"<h1>{html.escape(model)}</h1><p>{len(rows)} tasks, {sum(r['num_queries'] for r in rows)} queries; scores in percent, means unweighted "
        f"over data sets.{note}</p>",
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
        parts += [grid(row) for row in picked] + ["</details>"]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(model)}: evaluation</title><style>{STYLE}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )
    part = output / f"report.html.{os.getpid()}.part"
    part.write_text(page, encoding="utf-8")
    os.replace(part, output / "report.html")
    return output / "report.html"
