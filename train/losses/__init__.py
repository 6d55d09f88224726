"""The losses that a recipe can name. A new one is a file with a dataclass that derives from `base.Loss`, and an entry here."""

from __future__ import annotations

import difflib
from typing import Any

from vlm2vec.files.documents import shown

from .base import Loss as Loss
from .base import LossBatch as LossBatch
from .cosent import CoSENT
from .distillation import Distillation
from .info_nce import InfoNCE as InfoNCE
from .scores import ScoreDistillation
from .sigmoid import Sigmoid

DEFAULT = "info_nce"
LOSSES: dict[str, type[Loss]] = {
    DEFAULT: InfoNCE,
    "sigmoid_loss": Sigmoid,
    "cosent": CoSENT,
    "score_distillation": ScoreDistillation,
    "distillation": Distillation,
}
ALIASES = {"sigmoid": "sigmoid_loss"}


def loss_class(section: Any, where: str = "loss") -> type[Loss]:
    """The class of a recipe's `loss:` section, by its `name`; InfoNCE where it says none.

    Args:
        where: the section stands, for errors.

    Raises:
        ValueError: an unknown name, with the nearest known one.
    """
    name = section.get("name", DEFAULT) if isinstance(section, dict) else DEFAULT
    name = ALIASES.get(name, name) if isinstance(name, str) else name
    if not isinstance(name, str) or name not in LOSSES:
        near = difflib.get_close_matches(str(name)[:80] if isinstance(name, str) else "", LOSSES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(LOSSES)}"
        raise ValueError(f"{where}.name {shown(name)} is unknown; {hint}")
    return LOSSES[name]
