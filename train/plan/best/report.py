"""What a search found, as a page of Markdown: the settings to write into the recipe, the ranking and why, and their plan."""

from __future__ import annotations

import os
from collections.abc import Sequence

import yaml

from ...command import COMMAND
from ...recipe.schema import Recipe
from ..report import report as plan_report
from ..search import usable
from .money import Bill
from .search import Found
from .table import Table

_GIB = 2**30


def report(found: Found, name: str, *, price: float | None = None, overrides: Sequence[str] = ()) -> str:
    """Markdown.

    Args:
        found: of `find_best`. name: the recipe, as it was named. price: of a card for an hour.
    """
    own = found.own
    words = [f"{COMMAND} plan", name, "--best", f"--gpu {own.gpu.name}", *([f"--ranks {own.ranks}"] if own.ranks > 1 else [])]
    words += [*([f"--price {price:g}"] if price is not None else []), *overrides]
    lines = [f"# The fastest settings for {os.path.basename(name)}", "", f"On {own.ranks} x {own.gpu.name}. Predicted, by", ""]
    lines += ["```", " ".join(words), "```", ""]
    if found.best is None:
        least = min(found.lacking.values(), default=0.0)
        lines += [
            f"NOTHING FITS: the least that a step takes is {least / _GIB:.1f} GiB, where {usable(own.gpu) / _GIB:.1f} are usable. "
            "A `lora:` section, `quantization: nf4` (with it), more cards with `distributed: fsdp`, shorter samples or a larger card help.",
            "",
        ]
        return "\n".join(lines)
    changes = {key: int(value) if key == "keep_mib" else value for key, value in found.setting.changes(own.recipe).items()}
    if changes:
        lines += ["Write into the recipe:", "", "```yaml", yaml.safe_dump(changes, sort_keys=False).strip(), "```", ""]
        lines += [f"A step takes {found.best.step_seconds:.3g} s, where the recipe's own settings take {_own_seconds(found)}.", ""]
    else:
        lines += ["The recipe's own settings are as fast as any that fit.", ""]
    lines += _ranking(found, price)
    lines += ["", *_why(found), ""]
    return "\n".join(lines) + "\n" + plan_report(found.best, [*overrides, *_as_overrides(changes)], price=price)


def _own_seconds(found: Found) -> str:
    return f"{found.own.step_seconds:.3g} s" + ("" if found.own.fits else " and do not fit")


def _as_overrides(changes: dict[str, object]) -> list[str]:
    return [word for key, value in changes.items() for word in (f"--{key}", "null" if value is None else str(value).lower())]


def _ranking(found: Found, price: float | None) -> list[str]:
    own, is_priced, is_many = found.own, price is not None, found.own.ranks > 1
    table = Table(
        ("", False, True),
        ("chunk_tokens", True, True),
        ("chunks", True, True),
        ("retain", True, True),
        ("checkpointing", False, True),
        ("distributed", False, is_many),
        ("computed again", False, True),
        ("peak, GiB", True, True),
        ("seconds", True, True),
        (f"hours of {own.recipe.steps:,} steps", True, True),
        ("money", True, is_priced),
    )

    def row(label: str, recipe: Recipe, chunks: int, kept: int, peak: float, seconds: float) -> str:
        bill = Bill(seconds * recipe.steps / 3600, own.ranks, price)
        budget = f"{recipe.chunk_tokens:,}" if recipe.chunk_rows is None else f"{recipe.chunk_rows} rows"
        again = _again(recipe.gradient_checkpointing, chunks - kept, chunks)
        yes = "yes" if recipe.gradient_checkpointing else "no"
        sizes = f"{peak / _GIB:.1f}", f"{seconds:.3g}", f"{bill.hours:,.1f}", bill.money_in_words()
        return table.row(label, budget, chunks, recipe.retain, yes, recipe.distributed, again, *sizes)

    lines = table.head()
    for c in found.ranking:
        label = "**best**" if c.setting == found.setting else "simulated" if c.is_simulated else "put together"
        lines.append(row(label, c.setting.of(own.recipe), c.chunks, c.kept, c.peak, c.seconds))
    s = own.simulation
    label = "as it is" if own.fits else "as it is: DOES NOT FIT"
    return [*lines, row(label, own.recipe, s.chunks, s.kept, s.peak, own.step_seconds)]


def _again(checkpoints: bool, twice: int, chunks: int) -> str:
    """Which forward passes a step makes more than once."""
    parts = [*(["each layer"] if checkpoints else []), *([f"{twice} of {chunks} chunks"] if twice else [])]
    return " and ".join(parts) or "nothing"


def _why(found: Found) -> list[str]:
    """Sentences: what the winner saves, and what the others lack."""
    way = found.setting.way
    s = found.best.simulation
    lines = []
    if not way.checkpoints and s.kept == s.chunks:
        lines.append("Every graph of the first pass is kept, so that nothing is computed twice.")
    elif not way.checkpoints:
        lines.append(
            f"Graphs of {s.kept} of {s.chunks} chunks are kept; the others run forward twice, which costs less than to make each layer's "
            "graph again in all of them."
        )
    else:
        lines.append(
            f"Whole graphs do not fit in a number that would pay: with checkpointing {s.kept} of {s.chunks} chunks keep theirs, and a "
            "layer's is made again in its backward pass."
        )
    if found.own.ranks > 1:
        lines.append(
            "Whole weights on every rank fit, and nothing is gathered."
            if way.distributed == "ddp"
            else "Sharded weights leave room that is worth more than the gathers take."
        )
    for way, least in found.lacking.items():
        kind = "checkpointing" if way.checkpoints else "no checkpointing"
        beside = f" and {way.distributed}" if found.own.ranks > 1 else ""
        lines.append(f"Not with {kind}{beside}: {least / _GIB:.1f} GiB at least.")
    left = (usable(found.own.gpu) - s.peak) / _GIB
    # the second pass begins with the kept graphs, so that the first of them costs no more than a chunk's own
    beside = ", and a smaller `retain` frees more" if s.kept > 1 else ""
    lines.append(
        "Of settings within 1 % of the fastest the one was taken that needs least memory with its kept chunks full; "
        f"{left:.1f} GiB are left for batches larger than the one that was planned{beside}."
    )
    return [" ".join(lines)]
