"""The rows of a recipe as the model will be fed them, and what of them cannot be read; for `vlm2vec data preview`. No weight is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vlm2vec.checkpoint.pretrained import describe
from vlm2vec.checkpoint.words import FIND_BY_TEXT, IMAGE, ROLES
from vlm2vec.media import measure_picture
from vlm2vec.media.sources import image_name
from vlm2vec.packing import Features

from ..recipe.schema import Recipe
from .rows import PairDataset

LOOKED_AT = 10_000  # rows of a source, unless all are asked for
NAMED = 10  # rows that cannot be read, by name
SIDES = ("query", "target", "negative")


@dataclass(frozen=True)
class Shown:
    """One side of a row.

    Attributes:
        side: of `SIDES`. prompt: what is fed, a run of a picture's tokens as `<|image_pad|> x 77`. tokens: its length.
        media: a line for each picture and film. item: the input itself.
    """

    side: str
    prompt: str
    tokens: int
    media: tuple[str, ...]
    item: dict[str, Any]


@dataclass
class SourceShown:
    """A source: its first rows, and the count of what cannot be read.

    Attributes:
        rows: [(row, its sides, or why it cannot be read)]. errors: of the rows looked at. lengths: {side: tokens of each of its samples}.
    """

    name: str
    place: str
    total: int
    trained: int
    held: int
    groups: int | None
    looked_at: int = 0
    rows: list[tuple[int, list[Shown] | str]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    left_out: tuple[str, ...] = ()
    lengths: dict[str, list[int]] = field(default_factory=dict)
    hint: str | None = None


def preview(recipe: Recipe, *, rows: int = 4, every: bool = False, decode: bool = False) -> list[SourceShown]:
    """What `vlm2vec data preview` shows of each source.

    Args:
        rows: how many are shown. every: look at all rows, not at `LOOKED_AT` spread over the source.
        decode: decode pictures too; otherwise their headers are read, and damage behind these goes unseen.

    Raises:
        ValueError: a source that cannot be opened, or a model without tokenizer or processor.
    """
    model = describe(recipe.model, options=recipe.model_options)
    dataset = PairDataset(replace(recipe.data, strict=False), model.processing, recipe.held_out_rows)
    found = []
    for at, source in enumerate(recipe.data.sources):
        table = dataset.tables[at]
        held = len(dataset.held_out_rows()[at])
        groups = len({group for group in table.groups() if group is not None}) if table.group else None
        shown = SourceShown(source.name, source.path or source.root or recipe.data.root, len(table), dataset.sizes[at], held, groups)
        shown.left_out = tuple(table.left_out)
        _look(shown, dataset, at, None if every else LOOKED_AT, decode)
        for row in range(min(rows, len(table))):
            shown.rows.append((row, _row(dataset, at, row)))
        prompts = {**model.processing.prompts, **model.settings.get("prompts", {})}
        if source.path is not None and not any(prompts.get(role) for role in ROLES):
            shown.hint = _other_words([sides for _, sides in shown.rows if isinstance(sides, list)])
        found.append(shown)
    return found


def _look(shown: SourceShown, dataset: PairDataset, source: int, most: int | None, decode: bool) -> None:
    total = shown.total
    positions = range(total) if most is None or total <= most else np.linspace(0, total - 1, most).astype(int).tolist()
    lengths: dict[str, list[int]] = {side: [] for side in SIDES}
    for position in positions:
        sample = dataset[source, position]
        error = sample["error"]
        features = [("query", sample["query"]), ("target", sample["target"]), *(("negative", n) for n in sample["negatives"])]
        if decode and error is None:
            error = _damage(dataset, f"{shown.name}, row {sample['row']}", [one for _, one in features])
        if error is not None:
            shown.errors.append(error)
            continue
        for side, one in features:
            lengths[side].append(one.length)
    shown.looked_at, shown.lengths = len(positions), {side: found for side, found in lengths.items() if found}


def _damage(dataset: PairDataset, where: str, features: list[Features]) -> str | None:
    """Why the pictures of a row cannot be decoded; None where they can."""
    try:
        for one in features:
            if one.pending:
                dataset.processing.decode(one)
    except Exception as error:  # decoders raise what they like
        return f"{where}: {error}"
    return None


def _row(dataset: PairDataset, source: int, row: int) -> list[Shown] | str:
    """The sides of a row of the data, or why it cannot be read."""
    sample = dataset.sample(source, row)
    if sample["error"]:
        return sample["error"]
    query, target, negatives = dataset.tables[source].row(row, dataset.frames)
    negatives = negatives if dataset.data.hard_negatives else []
    items = [("query", query, sample["query"]), ("target", target, sample["target"])]
    items += [("negative", item, features) for item, features in zip(negatives, sample["negatives"])]
    return [
        Shown(side, _prompt(features, dataset.processing), features.length, tuple(_media(item, features, dataset.processing)), item)
        for side, item, features in items
    ]


def _prompt(features: Features, processing: Any) -> str:
    ids = features.input_ids.tolist()
    visual = set() if features.visual_index is None else set(features.visual_index.tolist())
    pieces: list[str] = []
    at = 0
    while at < len(ids):
        end = at
        if at in visual:
            while end < len(ids) and end in visual and ids[end] == ids[at]:
                end += 1
            pieces.append(f"{processing.tokenizer.decode([ids[at]])} x {end - at}")
        else:
            while end < len(ids) and end not in visual:
                end += 1
            pieces.append(processing.tokenizer.decode(ids[at:end]))
        at = end
    return "".join(pieces)


def _media(item: dict[str, Any], features: Features, processing: Any) -> Iterator[str]:
    """A line for each picture and film of an input: its name, its size, and the size that the model sees."""
    grids, patch = features.vision.get("grid_thw"), getattr(processing.image_processor, "patch_size", None)
    seen = [f" as {w * patch} x {h * patch}" for _, h, w in np.asarray(grids).tolist()] if grids is not None and patch else []
    images = item.get("image") or []
    for number, image in enumerate(images if isinstance(images, list) else [images]):
        width, height = measure_picture(image, orientation=processing.options["orientation"]).size
        yield f"{image_name(image)}: {width} x {height} pixels{seen[number] if number < len(seen) else ''}"
    if item.get("video"):
        film = item["video"]
        frames = processing.frames(film) if not isinstance(film, list) or not film or not isinstance(film[0], list) else None
        named = image_name(film) if not isinstance(film, list) else f"{len(film)} files"
        size = f": {len(frames)} frames of {frames[0].size[0]} x {frames[0].size[1]} pixels" if frames else ""
        yield f"{named}{size}{seen[-1] if seen else ''}"


def _other_words(rows: list[list[Shown]]) -> str | None:
    """What to write where `search` will ask for these pictures in other words."""
    for query, target, *_ in rows:
        is_search = not query.item.get("image") and not query.item.get("video") and target.item.get("image")
        if is_search and not (FIND_BY_TEXT in query.item["text"] and IMAGE in target.item["text"]):
            return (
                f"`vlm2vec search` and `index` say {FIND_BY_TEXT!r} in front of a query and {IMAGE!r} beside a picture, these rows other "
                f'words; to be found by them: query: {{text: "{FIND_BY_TEXT} {{COLUMN}}\\n"}}, target: {{text: "<|image_1|>\\n{IMAGE}\\n", '
                "image: COLUMN}"
            )
    return None


def counts(shown: SourceShown) -> Iterator[str]:
    """What cannot be read of a source, counted and named."""
    of = f"{shown.looked_at:,} rows" if shown.looked_at == shown.total else f"{shown.looked_at:,} of {shown.total:,} rows looked at"
    yield f"{len(shown.errors):,} of {of} cannot be read" + (":" if shown.errors else "")
    yield from (f"  {error[:300]}" for error in shown.errors[:NAMED])
    if len(shown.errors) > NAMED:
        yield f"  and {len(shown.errors) - NAMED:,} more"
    if shown.left_out:
        yield f"{len(shown.left_out):,} lines are no rows and left out:"
        yield from (f"  {line[:300]}" for line in shown.left_out[:NAMED])
        if len(shown.left_out) > NAMED:
            yield f"  and {len(shown.left_out) - NAMED:,} more"
