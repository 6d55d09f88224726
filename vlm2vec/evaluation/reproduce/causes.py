"""Known causes of gaps between runs of one model (tasks/scores/causes.yaml), and which of them fit a gap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from math import inf
from typing import Any

from vlm2vec.evaluation.reproduce.compare import HARMLESS, Difference
from vlm2vec.evaluation.tasks.score_rows import HERE
from vlm2vec.files.documents import read_yaml
from vlm2vec.media.sampling import FrameRule


@dataclass(frozen=True)
class Cause:
    """One line of causes.yaml; the comments at the top of that file say what the keys mean."""

    name: str
    about: str
    kinds: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    direction: str | None = None
    fault: str | tuple[str, ...] | None = None
    most: float | None = None

    def moves(self, task: str, modality: str) -> bool:
        """Whether it moves the scores of a task."""
        return task in self.tasks if self.tasks else modality in self.modalities

    def shows_in(self, difference: Difference) -> bool:
        """Whether a setting that differs is this cause."""
        name = difference.what.removeprefix("option ")
        return difference.kind in self.kinds or any(fnmatch(name, pattern) for pattern in self.options)

    def fits(self, model: str, task: str, modality: str, here_minus_there: float, shown: Sequence[Difference] = ()) -> bool:
        """Whether it may explain a gap of so many points: of this model and task, and in the direction that the faulty run's side says.

        Args:
            shown: the differences that it shows in.
        """
        named = not self.models or any(part in model.lower() for part in self.models)
        moved = self.moves(task, modality) or any(d.kind == "limit" for d in shown)
        large = self.most is not None and abs(here_minus_there) > self.most
        return named and moved and not large and not self._contradicts(here_minus_there, shown)

    def _contradicts(self, here_minus_there: float, shown: Sequence[Difference]) -> bool:
        sides = {self._faulty_side(difference) for difference in shown} if shown else {"there" if self.fault == "there" else None}
        here_low = {"here": True, "there": False}
        return self.direction == "lower" and None not in sides and all(here_low[side] != (here_minus_there < 0) for side in sides)

    def _faulty_side(self, difference: Difference) -> str | None:
        """ "here" or "there", the run that has the fault; None where that cannot be told."""
        if self.fault == "there":
            return "there"
        if self.fault == "fewer":
            there, here = _amount(difference.there), _amount(difference.here)
            return None if there is None or here is None or there == here else "here" if here < there else "there"
        if self.fault:
            there, here = difference.there in self.fault, difference.here in self.fault
            return None if there == here else "there" if here else "here"
        return None


def _amount(value: Any) -> float | None:
    """How much a setting lets through: a number, the most frames of a rule; None where that cannot be told."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    try:
        rule = FrameRule.parse(str(value))
    except ValueError:
        return None
    return rule.frames or rule.max_frames or inf


@lru_cache(maxsize=1)
def known_causes() -> tuple[Cause, ...]:
    """The causes of causes.yaml, in its order."""
    rows = read_yaml(HERE / "causes.yaml")["causes"]
    return tuple(Cause(**{key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}) for row in rows)


def fitting_causes(
    model: str, task: str, modality: str, here_minus_there: float, known: Sequence[Difference], *, settings_told: bool
) -> list[str]:
    """Why a task's score may differ, the surest first, in words.

    Args:
        model: of the row. here_minus_there: points. known: what is known to differ (`compare.differences`).
        settings_told: the row says all that it was made with. A cause that shows in settings, and does not, then is none.
    """
    known = [difference for difference in known if difference.kind not in HARMLESS and touches(difference, modality)]
    found: dict[tuple[bool, bool], list[str]] = {}
    for cause in known_causes():
        shown = [difference for difference in known if cause.shows_in(difference)]
        if not cause.fits(model, task, modality, here_minus_there, shown):
            continue
        visible = bool(cause.kinds or cause.options)
        if shown or (not settings_told and not known) or (not visible and not settings_told):
            side = f" (it makes scores {cause.direction})" if cause.direction else ""
            told = f"{'known cause' if shown else 'may be'}: {cause.name}{side}: {cause.about}"
            found.setdefault((not shown, not cause.tasks), []).append(told)
    return [*map(str, known), *(told for _, part in sorted(found.items()) for told in part)]


def touches(difference: Difference, modality: str) -> bool:
    """Whether a setting has a say in tasks of a modality: frames move films alone, sizes of pictures no texts."""
    if difference.kind == "frames":
        return modality in ("video", "audio")
    if difference.kind == "pictures":
        return modality in ("image", "video", "visdoc", "gui", "audio")
    if difference.what == "audio_max_seconds":
        return modality == "audio"
    if difference.what == "text_max_length":
        return modality != "image"  # whose texts are far shorter
    if difference.kind == "limit" and "pixels" in difference.what:
        return modality == "video" or (modality in ("image", "visdoc", "gui") and difference.what in ("min_pixels", "max_pixels"))
    return True
