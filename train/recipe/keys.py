"""The keys of a recipe: sections, their types, defaults and meaning."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any

import yaml

from ..losses import InfoNCE, Loss
from .files import MIXTURES
from .from_yaml import build


@dataclass
class Source:
    """One data set of the mixture: `name` is its folder (or hub config); `rows` takes its first rows only.

    `from_step` leaves it out of the mixture before that step, so that simple tasks can come first. The rest says where its
    rows are when they are not with the others' (`data.root`): a folder or a hub data set with its split, or one file of
    it, its images, and the `format` of its rows (`train.data.sources`).

    A source of own data names its `path` instead, a file, a folder or a data set of the hub in any of the forms of
    `vlm2vec.data.tables`, and says which columns are the `query`, the `target` and the `negatives` (`vlm2vec.data.sides`).
    `split` and `config` choose among those of a data set; `encoding` and `delimiter` are of CSV files. Relative paths of media
    start at `images` (the source's, else the section's), by default at the table's own folder.

    `loss` is that of its rows, in place of the recipe's. `scores` and `grade` are columns: a teacher's scores of the positive and each
    hard negative (`score_distillation`), as a list or in columns of their own, and a number that says how well a pair fits (`cosent`).
    Rows that share the value of the column `group` are held out together, and their targets are no negatives of each other.
    """

    name: str
    weight: float = 1.0
    rows: int | None = None
    from_step: int = 0
    format: str = "mmeb"
    root: str | None = None
    split: str | None = None
    file: str | None = None
    images: str | None = None
    loss: Loss | list[Loss] | None = None
    scores: str | list[str] | None = None
    grade: str | None = None
    path: str | None = None
    query: str | dict[str, Any] | None = None
    target: str | dict[str, Any] | None = None
    negatives: str | dict[str, Any] | list[Any] | None = None
    group: str | None = None
    config: str | None = None
    encoding: str | None = None
    delimiter: str | None = None


@dataclass
class Data:
    """Where the training rows are: a local folder in MMEB's layout or a hub data set, and the folder of their images. Sources that name
    their own `path` need neither.

    `mixture` names a file of train/recipes/mixtures/, whose sources become the recipe's; a source of that name in `sources`
    replaces it, others join it.
    """

    root: str | None = None
    images: str | None = None
    sources: list[Source] = field(default_factory=list)
    mixture: str | None = None
    split: str = "original"
    rows: int | None = None  # first rows of every source that does not say its own number
    hard_negatives: bool = False
    strict: bool = False  # a row that cannot be read stops the run; otherwise it is logged and left out of the loss

    def __post_init__(self) -> None:
        if self.mixture is not None:
            by_name = {source.name: source for source in self.sources}
            listed = [by_name.pop(source.name, source) for source in read_mixture(self.mixture)]
            self.sources, self.mixture = [*listed, *by_name.values()], None  # a resolved recipe stands for itself


def read_mixture(name: str) -> list[Source]:
    """The sources of train/recipes/mixtures/NAME.yaml."""
    path = MIXTURES / f"{name}.yaml"
    known = sorted(file.stem for file in MIXTURES.glob("mmeb-*.yaml"))
    if not path.is_file():
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        raise ValueError(f"data.mixture {name!r} is unknown; {f'did you mean {near[0]}?' if near else f'there are {known}'}")
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [build(Source, entry, f"{path.name}[{i}].") for i, entry in enumerate(entries)]


@dataclass
class Lora:
    """A PEFT adapter; `dora=True` adds the magnitude vectors that the published VLM2Vec adapters have.

    `targets`: last parts of layer names, in place of the reference's (`vlm2vec.checkpoint.adapters.REFERENCE_TARGETS`).
    `vision`: false leaves the vision tower frozen as it is, so that its features are computed once a step; true adapts
    its linear layers too; left out, layers of the tower that bear a target's name are adapted, as the reference does.
    """

    r: int = 16
    alpha: float = 64.0
    dropout: float = 0.1
    dora: bool = True
    targets: list[str] | None = None
    vision: bool | None = None


@dataclass
class HeldOut:
    """Rows that are kept out of training, the last `rows` of each source (at most a tenth of it), and scored every `steps` steps.

    Of a source with a `group`, whole groups, the last that fit. Rows of a group held out in one source are trained on in no source
    whose groups are of a column of the same name.
    """

    rows: int = 128
    steps: int = 100


@dataclass
class Content:
    """One side of an assumed row: tokens of text, and `images` pictures of [width, height] or a film [frames, width, height]."""

    text: int
    image: list[int] | None = None
    images: int = 1
    video: list[int] | None = None


@dataclass
class Rows:
    """A kind of rows and its share of a batch."""

    share: float
    query: Content
    target: Content


@dataclass
class Assumed:
    """What `plan` takes a batch to be where the data is not at hand. Training does not look at it."""

    rows: list[Rows]


@dataclass
class RecipeKeys:
    """The keys of a recipe. `model`: hub name or folder; `output`: folder of checkpoints and of the trained model."""

    model: str
    output: str
    data: Data
    steps: int
    global_batch: int
    interleave_batch_size: int | None = None  # rows drawn from one source in a row; default: the global batch
    chunk_tokens: int = 8192
    chunk_rows: int | None = None  # chunks of so many rows, as the reference cuts them, instead of by tokens
    retain: int | str = 0
    retain_mib: float | None = None
    keep_mib: float = 4096.0  # features of a frozen vision tower kept between the two passes
    media_mib: float = 4096.0  # decoded images kept in host memory between the two passes; the others are decoded again
    decode_threads: int = 4
    loss: Loss | list[Loss] = field(default_factory=InfoNCE)  # one section, or a sum of them
    lora: Lora | None = None
    quantization: str | None = None  # "nf4": the frozen base in four bits (QLoRA)
    train: list[str] | None = None  # parts that train themselves, of language, vision, projector, all; the rest by `lora`, or not
    freeze_vision: bool = False
    dtype: str = "float32"  # of the weights
    autocast: str | None = None  # "bfloat16": matrix products in bf16, weights and loss in `dtype`
    learning_rate: float = 2e-5
    lr_schedule: str = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer: str = "adamw_torch"
    gradient_checkpointing: bool = False
    offload_activations: bool = False  # what the backward pass needs waits in host memory
    distributed: str = "ddp"  # under torchrun: "ddp", or "fsdp" (FSDP2: weights, gradients and optimizer sharded)
    model_options: dict[str, Any] = field(default_factory=dict)
    workers: int = 0
    seed: int = 0
    save_steps: int = 100
    keep_checkpoints: int = 2
    logging_steps: int = 10
    report_to: list[str] = field(default_factory=list)
    run_name: str | None = None
    profile: int | None = None  # a step, from 1, of which a trace for Perfetto is written into the output folder
    held_out: HeldOut | None = None
    cpu: bool = False
    plan: Assumed | None = None
