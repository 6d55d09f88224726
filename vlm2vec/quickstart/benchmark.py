"""The quickstart benchmark: which pictures are drawn, and the rows of every task, in MMEB's columns.

Pictures
    drawings   one subject, 56 x 56. Training: 32 a subject. Evaluation: a gallery of 4 a subject, on four grounds, and one
               more as a query.
    pairs      two subjects, 112 x 56; every subject is in one evaluation pair.
    quads      four subjects, 84 x 84; every subject is in two evaluation quads, on different grounds.
    crops      a subject cut out of a quad.
Nothing leaks: all names are known in training (as in ImageNet), but no evaluation picture, pairing or scene is drawn from a
seed that training uses, and clutter is of kinds that training never shows (`pictures.STYLES`). Each subject is the right
answer equally often, so that guessing a frequent answer gains nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vlm2vec.quickstart.catalogue import GROUPS, subjects, with_article
from vlm2vec.quickstart.pictures import CELL, COLOURS, QUAD_CELL, Scene
from vlm2vec.quickstart.tasks import CROP, PICTURE, TASKS

CORNERS = ("top left", "top right", "bottom left", "bottom right")
GALLERY = 4


@dataclass(frozen=True)
class Size:
    """How much is drawn. `subjects` takes a multiple of 8 out of the catalogue's 320, evenly over its groups."""

    subjects: int = 160
    drawings: int = 32  # a subject, training
    pairs: int = 1600  # training
    quads: int = 1200  # training
    crops: int = 2  # a training quad


@dataclass
class Plan:
    """Everything the benchmark consists of: scenes to draw, and rows {"train": {task: rows}, "eval": {task: rows}}."""

    scenes: list[Scene] = field(default_factory=list)
    rows: dict = field(default_factory=lambda: {"train": {}, "eval": {}})


def plan(seed: int, size: Size = Size()) -> Plan:
    """Decide everything, draw nothing. The same seed and size give the same plan."""
    benchmark = Plan()
    world = _World(seed, size)
    for split in ("train", "eval"):
        drawings, pairs, quads = world.drawings(split), world.pairs(split), world.quads(split)
        benchmark.scenes += [scene for _, scene in drawings + pairs + quads]
        write = _train_rows if split == "train" else _eval_rows
        benchmark.rows[split] = write(world, drawings, pairs, quads)
    return benchmark


class _World:
    """The catalogue, its colours, and the random draws that place subjects in scenes."""

    def __init__(self, seed, size):
        if size.subjects % 8 or not 8 <= size.subjects <= len(subjects()):
            raise ValueError(f"expected a multiple of 8 subjects up to {len(subjects())}, got {size.subjects}")
        self.seed, self.size = seed, size
        # taken evenly, so that a small benchmark still has many groups
        self.subjects = subjects()[:: len(subjects()) // size.subjects][: size.subjects]
        self.colours = list(COLOURS)

    def random(self, *key):
        import numpy as np

        return np.random.default_rng([self.seed, 7, *key])

    def drawings(self, split):
        """[((subject, colour), scene)], `per` in a row for each subject; colours of a subject differ while they last."""
        train = split == "train"
        per = self.size.drawings if train else GALLERY + 1
        out = []
        for at, subject in enumerate(self.subjects):
            rng = self.random(train, 1, at)
            order = [colour for _ in range(-(-per // len(self.colours))) for colour in rng.permutation(self.colours)]
            for k in range(per):
                name = subject.name.replace(" ", "_").replace("’", "")
                scene = Scene(f"{split}/drawings/{name}_{k:02d}.png", (train, 1, at, k), split, 1, (subject.character,), order[k])
                out.append(((subject, str(order[k])), scene))
        return out

    def pairs(self, split):
        train = split == "train"
        return self._scenes(split, "pairs", 2, self.size.pairs if train else len(self.subjects) // 2, (train, 2))

    def quads(self, split):
        train = split == "train"
        return self._scenes(split, "quads", 4, self.size.quads if train else len(self.subjects) // 2, (train, 3))

    def _scenes(self, split, kind, cells, count, key):
        """[((subjects, colour), scene)]. Subjects are dealt from shuffled decks, so each is used equally often."""
        rng = self.random(*key)
        decks = []
        while len(decks) * (len(self.subjects) // cells) < count:
            decks.append(rng.permutation(len(self.subjects)))
        out, last = [], {}
        for k in range(count):
            deck, place = divmod(k, len(self.subjects) // cells)
            inside = [self.subjects[i] for i in decks[deck][place * cells : (place + 1) * cells]]
            taken = {last.get(s) for s in inside}
            free = [c for c in self.colours if c not in taken]
            colour = str(free[rng.integers(len(free))])
            last.update((s, colour) for s in inside)
            cut = () if kind == "pairs" else rng.permutation(cells)[: self.size.crops] if split == "train" else range(cells)
            crops = tuple((int(c), f"{split}/crops/{k:05d}_{int(c)}.png") for c in sorted(cut))
            scene = Scene(
                f"{split}/{kind}/{k:05d}.png",
                (*key, k),
                split,
                2,
                tuple(s.character for s in inside),
                colour,
                CELL if kind == "pairs" else QUAD_CELL,
                crops,
            )
            out.append(((inside, colour), scene))
        return out


def _train_rows(world, drawings, pairs, quads):
    """Negatives are filled where the scene itself offers one, as MMEB fills them for some of its sets."""
    rows = {name: [] for name in TASKS}

    def add(name, text, image, pos_text, pos_image, neg_text="", neg_image=""):
        rows[name].append(
            dict(
                qry=TASKS[name].ask(text),
                qry_image_path=image,
                pos_text=pos_text,
                pos_image_path=pos_image,
                neg_text=neg_text,
                neg_image_path=neg_image,
            )
        )

    rng, per = world.random(1, 4), world.size.drawings
    for at, ((subject, colour), scene) in enumerate(drawings):
        same_subject = drawings[at // per * per : (at // per + 1) * per]
        others = [((s, c), d) for (s, c), d in same_subject if c != colour]
        (_, wanted), other = others[rng.integers(len(others))]
        add("OpenMoji-Object", "", scene.file, subject.name, "")
        add("OpenMoji-Group", "", scene.file, subject.group, "")
        add("OpenMoji_t2i", with_article(subject.name), "", PICTURE, scene.file)
        add("OpenMoji_i2t", "", scene.file, with_article(subject.name), "")
        add("OpenMoji_i2i", "", scene.file, PICTURE, other.file)
        add("OpenMoji-Recolour", f"{with_article(wanted)} background", scene.file, PICTURE, other.file, PICTURE, scene.file)
    for ((one, two), _), scene in pairs:
        for asked, neighbour, side in ((one, two, "left"), (two, one, "right")):
            add("OpenMoji-Side", f"What is on the {side}?", scene.file, asked.name, "", neighbour.name)
            add("OpenMoji-Beside", f"What is next to {_the(neighbour)}?", scene.file, asked.name, "", neighbour.name)
    for (inside, _), scene in quads:
        for (cell, file), (_, other) in zip(scene.crops, scene.crops[1:] + scene.crops[:1]):
            add("OpenMoji-Labelled", inside[cell].name, scene.file, CROP, file, CROP, other)
            add("OpenMoji-Pointing", _corner(cell), scene.file, CROP, file, CROP, other)
        matching = TASKS["OpenMoji-Matching"]
        for cell, subject in enumerate(inside):
            other = inside[(cell + int(rng.integers(1, 4))) % 4]
            add(
                matching.name,
                f"the one in the {CORNERS[cell]} corner",
                scene.file,
                matching.ask(_the(subject)),
                scene.file,
                matching.ask(_the(other)),
                scene.file,
            )
    return rows


def _eval_rows(world, drawings, pairs, quads):
    rows = {name: [] for name in TASKS}

    def add(name, text, image, candidates, right):
        """`candidates` are (text, image path); the right one goes first, as in MMEB."""
        order = [candidates[right], *candidates[:right], *candidates[right + 1 :]]
        texts, images = zip(*order)
        rows[name].append(dict(qry_text=TASKS[name].ask(text), qry_img_path=image, tgt_text=list(texts), tgt_img_path=list(images)))

    names = [(s.name, "") for s in world.subjects]
    at = {s: k for k, s in enumerate(world.subjects)}
    groups = [(g, "") for g in GROUPS if any(s.group == g for s in world.subjects)]
    by_subject = [drawings[k : k + GALLERY + 1] for k in range(0, len(drawings), GALLERY + 1)]
    gallery = [drawing for mine in by_subject for drawing in mine[:GALLERY]]
    queries = [mine[GALLERY] for mine in by_subject]
    pictures = [(PICTURE, scene.file) for _, scene in gallery]
    captions = [(with_article(s.name), "") for s in world.subjects]
    rng = world.random(0, 4)
    single = [pictures[GALLERY * k + int(rng.integers(GALLERY))] for k in range(len(by_subject))]  # one picture of every subject
    for k, ((subject, _), scene) in enumerate(queries):
        add("OpenMoji-Object", "", scene.file, names, k)
        add("OpenMoji-Group", "", scene.file, groups, groups.index((subject.group, "")))
        add("OpenMoji_t2i", with_article(subject.name), "", single, k)
        add("OpenMoji_i2t", "", single[k][1], captions, k)
        add("OpenMoji_i2i", "", scene.file, single, k)
        pick = GALLERY * k + int(rng.integers(GALLERY))
        add("OpenMoji-Recolour", f"{with_article(gallery[pick][0][1])} background", scene.file, pictures, pick)
    for ((one, two), _), scene in pairs:
        for wanted, neighbour, side in ((one, two, "left"), (two, one, "right")):
            add("OpenMoji-Side", f"What is on the {side}?", scene.file, names, at[wanted])
            add("OpenMoji-Beside", f"What is next to {_the(neighbour)}?", scene.file, names, at[wanted])
    crops = [(CROP, file) for _, scene in quads for _, file in scene.crops]
    matching = TASKS["OpenMoji-Matching"]
    places = [(matching.ask(_the(subject)), scene.file) for (inside, _), scene in quads for subject in inside]
    asked = set()
    for k, ((inside, _), scene) in enumerate(quads):
        # two of the four, then, in a subject's second scene, those that were not asked for: each is asked for once
        first = 4 * k < len(world.subjects)
        for cell in rng.permutation(4)[:2] if first else [c for c in range(4) if inside[c] not in asked]:
            asked.add(inside[cell])
            where = 4 * k + int(cell)
            add("OpenMoji-Labelled", inside[cell].name, scene.file, crops, where)
            add("OpenMoji-Pointing", _corner(cell), scene.file, crops, where)
            add(matching.name, f"the one in the {CORNERS[cell]} corner", scene.file, places, where)
    return rows


def _the(subject) -> str:
    return f"the {subject.name}"


def _corner(cell) -> str:
    return f"What is in the {CORNERS[cell]} corner?"
