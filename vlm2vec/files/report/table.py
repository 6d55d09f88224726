"""Scores next to chance: as an HTML table and as lines for the terminal."""

from __future__ import annotations

from dataclasses import dataclass, replace
from html import escape
from itertools import groupby


@dataclass(frozen=True)
class Score:
    """One task. `before`, `after`, `chance` and `shortcut` are fractions; None where there is no such figure.

    `kinds` are (query, target), each "text", "image" or "image+text". `candidates` is the number a query is ranked against.
    """

    task: str
    meta_task: str
    after: float
    before: float | None = None
    chance: float | None = None
    candidates: int | None = None
    kinds: tuple[str, str] | None = None
    about: str = ""
    shortcut: float | None = None
    how: str = ""


def percent(value: float | None) -> str:
    """One decimal, two below one percent; a dash for None."""
    if value is None:
        return "–"
    return f"{100 * value:.{2 if 0 < value < 0.01 else 1}f} %"


def times(value: float | None, chance: float | None) -> str:
    """How many times chance."""
    if value is None or not chance:
        return "–"
    ratio = value / chance
    return f"{ratio:,.0f}×" if ratio >= 10 else f"{ratio:.1f}×"


def mean_by_meta_task(scores: list[Score]) -> list[Score]:
    """Unweighted means over the tasks of each meta-task, in order of first appearance."""
    order = list(dict.fromkeys(score.meta_task for score in scores))
    return [_mean([s for s in scores if s.meta_task == name], name) for name in order]


def score_table(scores: list[Score], titles: dict[str, str] | None = None) -> str:
    """HTML table, grouped by meta-task, with a bar for each score, a mark at the untrained model and one at the shortcut.

    Args:
        titles: what to call a meta-task, where not by its own name.
    """
    body = []
    means = {score.meta_task: score for score in mean_by_meta_task(scores)}
    for meta_task, members in groupby(sorted(scores, key=lambda s: list(means).index(s.meta_task)), key=lambda s: s.meta_task):
        mean = means[meta_task]
        body.append(_row(replace(mean, task=(titles or {}).get(mean.task, mean.task)), "mean"))
        body += [_row(score, "") for score in members]
    head = (
        '<tr><th>Task</th><th class="kinds">Query → answer</th><th class="num wide">Candidates</th><th class="num">Chance</th>'
        '<th class="num">Before</th><th class="num">After</th><th class="bar">hit@1</th><th class="num wide">vs chance</th></tr>'
    )
    return f'<div class="scroll"><table class="scores"><thead>{head}</thead><tbody>{"".join(body)}</tbody></table></div>'


def score_lines(scores: list[Score]) -> list[str]:
    """The same for the terminal, 79 columns at most for names up to 24 letters."""
    width = max([len("mean classification"), *(len(s.task) for s in scores)])
    lines = [f"{'hit@1':<{width}} {'cand.':>7} {'chance':>8} {'before':>8} {'after':>8} {'x chance':>9}"]
    for mean in mean_by_meta_task(scores):
        lines.append("")
        lines += [_line(score, score.task, width) for score in scores if score.meta_task == mean.meta_task]
        lines.append(_line(mean, f"mean {mean.task}", width))
    return lines


def _mean(members, name):
    def average(values):
        values = list(values)
        return None if any(v is None for v in values) else sum(values) / len(values)

    return Score(name, name, average(s.after for s in members), average(s.before for s in members), average(s.chance for s in members))


def _line(score, name, width):
    candidates = f"{score.candidates:>7,}" if score.candidates else " " * 7
    ratio = times(score.after, score.chance).replace("×", "").replace("–", "-")
    cells = (percent(v).replace("–", "-") for v in (score.chance, score.before, score.after))
    return f"{name:<{width}} {candidates} " + " ".join(f"{cell:>8}" for cell in cells) + f" {ratio:>9}"


def _row(score, kind):
    about = f'<span class="about">{escape(score.about)}</span>' if score.about else ""
    if score.shortcut is not None:
        about += f'<span class="about">At most {percent(score.shortcut)} by {escape(score.how)}.</span>'
    kinds = ""
    if score.kinds:
        kinds = '<span class="to">→</span>'.join(
            "".join(f'<span class="kind">{escape(part)}</span>' for part in side.split("+")) for side in score.kinds
        )
    candidates = f"{score.candidates:,}" if score.candidates else ""
    return (
        f'<tr class="{kind}"><th scope="row">{escape(score.task)}{about}</th><td class="kinds">{kinds}</td>'
        f'<td class="num wide">{candidates}</td><td class="num">{percent(score.chance)}</td>'
        f'<td class="num">{percent(score.before)}</td><td class="num after">{percent(score.after)}</td>'
        f'<td class="bar">{_bar(score)}</td><td class="num wide">{times(score.after, score.chance)}</td></tr>'
    )


def _bar(score):
    marks = ""
    if score.shortcut is not None:
        marks += f'<i class="shortcut" style="left:{100 * score.shortcut:.2f}%" title="shortcut: {percent(score.shortcut)}"></i>'
    if score.before is not None:
        marks += f'<i class="before" style="left:{100 * score.before:.2f}%" title="before: {percent(score.before)}"></i>'
    return f'<div class="track"><b style="width:{100 * score.after:.2f}%"></b>{marks}</div>'
