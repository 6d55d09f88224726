"""Known causes of gaps between runs of one model (tasks/scores/causes.yaml), and which of them fit a gap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from vlm2vec.evaluation.reproduce.compare import HARMLESS, Difference
from vlm2vec.evaluation.tasks.score_rows import HERE
from vlm2vec.files.documents import read_yaml


@dataclass(frozen=True)
class Cause:
    """One line of causes.yaml; the comments at the top of that file say what the keys mean."""

    name: str
    about: str
    kinds: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    direction: str | None = None
    size: float | None = None

    def moves(self, task: str, modality: str) -> bool:
        """Whether it moves the scores of a task."""
        return task in self.tasks if self.tasks else modality in self.modalities

    def fits(self, model: str, task: str, modality: str, here_minus_there: float) -> bool:
        """Whether it may explain a gap of so many points: of this model and task, in a direction that one of the two runs explains."""
        named = not self.models or any(part in model.lower() for part in self.models)
        large = self.size is not None and abs(here_minus_there) > 1.5 * self.size
        return named and self.moves(task, modality) and not large


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
    kinds = {difference.kind for difference in known}
    words = [str(difference) for difference in known]
    for cause in known_causes():
        if not cause.fits(model, task, modality, here_minus_there):
            continue
        shows = bool(kinds & set(cause.kinds))
        if shows or (not settings_told and not known) or (not cause.kinds and not settings_told):
            side = f" (it makes scores {cause.direction})" if cause.direction else ""
            words.append(f"{'known cause' if shows else 'may be'}: {cause.name}{side}: {cause.about}")
    return words


def touches(difference: Difference, modality: str) -> bool:
    """Whether a setting has a say in tasks of a modality: frames move films alone, sizes of pictures no texts."""
    if difference.kind == "frames":
        return modality in ("video", "audio")
    if difference.kind == "pictures":
        return modality in ("image", "video", "visdoc", "gui", "audio")
    if difference.kind == "limit" and "pixels" in difference.what:
        return modality in ("image", "video", "visdoc", "gui")
    return True
