"""`plan --all`: which of the project's recipes fit a card, in hours and money."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ...recipe.files import recipe_names
from ...recipe.schema import load_recipe
from ..gpus import Gpu
from ..search import Plan, Planner, usable
from .money import Bill
from .search import find_best
from .table import Table

_GIB = 2**30


@dataclass(frozen=True)
class Line:
    """A recipe on a card. `plan`: None where it cannot be planned, and `problem` says why."""

    name: str
    plan: Plan | None
    changes: str = ""
    problem: str = ""


def planned_names() -> list[str]:
    """The recipes that can be planned: the quickstart's train what a command makes first."""
    return [name for name in recipe_names() if not name.startswith("quickstart")]


def lines(
    names: Sequence[str], gpu: Gpu, ranks: int, *, best: bool, efficiency: float | None = None, overrides: Sequence[str] = ()
) -> Iterator[Line]:
    """Each recipe's plan as it is or, with `best`, by the fastest settings that fit."""
    for name in names:
        try:
            planner = Planner(load_recipe(name, [*overrides], ranks=ranks), gpu, ranks, name=name, efficiency=efficiency)
            if not best:
                recipe = planner.automatic(planner.recipe)
                simulation = planner.run(recipe)
                planner.require_longest_fits(recipe)
                yield Line(name, planner.plan(recipe, simulation))
                continue
            found = find_best(planner)
            if found.best is None:
                yield Line(name, found.own)
            else:
                changes = found.setting.changes(planner.recipe)
                yield Line(name, found.best, ", ".join(f"{key} {value}" for key, value in changes.items()) or "none")
        except ValueError as error:
            yield Line(name, None, problem=str(error))


def table(every: Iterator[Line], gpu: Gpu, ranks: int, *, best: bool, price: float | None, write: Callable[[str], object]) -> bool:
    """Writes a line of Markdown for each recipe as it is known. Returns whether one fits."""
    how = "" if best else ", settings as they are in the recipes (`--best` looks for faster ones that fit)"
    rows = Table(
        ("recipe", False, True),
        ("fits", False, True),
        ("peak, GiB", True, True),
        ("seconds of a step", True, True),
        ("steps", True, True),
        ("hours", True, True),
        ("money", True, price is not None),
        ("changes", False, best),
    )
    write(f"# What fits {ranks} x {gpu.name}\n\nPredicted; {usable(gpu) / _GIB:.1f} GiB are usable{how}.\n\n")
    write("".join(f"{line}\n" for line in rows.head()))
    fits, slow = False, []
    for line in every:
        plan = line.plan
        if plan is None:
            write(rows.row(line.name, f"cannot: {line.problem}", *[""] * 6) + "\n")
            continue
        bill = Bill(plan.step_seconds * plan.recipe.steps / 3600, ranks, price)
        peak = f"{plan.simulation.peak / _GIB:.1f}"
        if not plan.fits:
            write(rows.row(line.name, "NO", peak, *[""] * 5) + "\n")
            continue
        fits = True
        slow += [line.name] if bill.takes_weeks else []
        hours = f"{bill.hours:,.1f}" + (f" ({bill.in_words()})" if bill.hours >= 48 else "")
        seconds = f"{plan.step_seconds:.3g}"
        write(rows.row(line.name, "yes", peak, seconds, f"{plan.recipe.steps:,}", hours, bill.money_in_words(), line.changes) + "\n")
    if slow:
        write(f"\nTakes weeks here: {', '.join(slow)}.\n")
    return fits
