"""One task of the table: what it is, how it is read and scored."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from vlm2vec.files.documents import shown

TASK_MODALITIES = ("image", "video", "visdoc", "text", "tool", "gui", "memory", "audio")
META_OF_GROUP = {
    "image_cls": "classification",
    "image_qa": "vqa",
    "image_ret": "retrieval",
    "image_vg": "grounding",
    "video_cls": "video classification",
    "video_qa": "video question answering",
    "video_ret": "video retrieval",
    "video_mret": "moment retrieval",
    "vidore_v1": "document retrieval",
    "vidore_v2": "document retrieval",
    "visrag": "document retrieval",
    "visdoc_ood": "document retrieval",
    "mcmr": "product retrieval",
    "text_reasoning": "text retrieval",
    "text_instruction": "text retrieval",
    "text_long": "text retrieval",
    "text_conditions": "text retrieval",
    "text_general": "text retrieval",
    "tool_web": "tool retrieval",
    "tool_code": "tool retrieval",
    "tool_customized": "tool retrieval",
    "gui_q2t": "screen retrieval",
    "gui_q2s": "screen retrieval",
    "gui_s2s": "screen retrieval",
    "gui_t2s": "screen retrieval",
    "memory_episodic": "memory retrieval",
    "memory_dialogue": "memory retrieval",
    "memory_semantic": "memory retrieval",
    "memory_procedural": "memory retrieval",
    "audio_cls": "audio classification",
    "audio_t2a": "audio retrieval",
    "audio_a2v": "audio retrieval",
    "audio_a2i": "audio retrieval",
    "audio_gnd": "audio grounding",
    "vidore_v3": "document retrieval",
}
GROUPS = tuple(META_OF_GROUP)
V2_GROUPS = GROUPS[: GROUPS.index("mcmr")]
FEEDINGS = ("official", "wemm", "authors")
GROUP_OF_META = {"classification": "image_cls", "vqa": "image_qa", "retrieval": "image_ret", "grounding": "image_vg"}


@dataclass(frozen=True)
class Task:
    """One line of tasks.yaml; the comments at the top of that file say what the keys mean.

    `media` is the sub-folder of the media root where the task's pictures or sounds lie, where it has one. `wemm` holds what the second
    published evaluation of MMEB-V3 does otherwise: prompts, candidates, options.
    """

    name: str
    modality: str = "image"
    group: str = "custom"
    meta_task: str = "custom"
    split: str | None = None
    loader: str = "mmeb"
    form: str | None = None
    metric: str = "hit@1"
    candidates: str = "local"
    queries: int | None = None
    per_query: int | str | None = None
    query_prompt: str | dict | None = None
    target_prompt: str | None = None
    hub: dict = field(default_factory=dict)
    frames: str | None = None
    path: str | None = None
    media: str | None = None
    report_as: str | None = None
    options: dict = field(default_factory=dict)
    wemm: dict = field(default_factory=dict)

    def __post_init__(self):
        from vlm2vec.evaluation.score.metrics import METRICS

        if self.modality not in TASK_MODALITIES:
            raise ValueError(f"task {self.name!r}: modality is one of {', '.join(TASK_MODALITIES)}, got {self.modality!r}")
        if self.candidates not in ("local", "global"):
            raise ValueError(f"task {self.name!r}: candidates is local or global, got {self.candidates!r}")
        metric, _, k = self.metric.partition("@")
        if metric not in METRICS or not k.isdigit() or int(k) < 1:
            raise ValueError(f"task {self.name!r}: metric is one of {', '.join(METRICS)} with @k, got {self.metric!r}")
        parts = self.name.split("/") if self.report_as and "/" not in self.report_as else [self.name]
        if not all(parts) or any("/" in part or part.startswith(".") for part in parts):
            raise ValueError(f"a task's name also names its files: no slash without a report_as, no leading dot, got {self.name!r}")
        if unknown := sorted(set(self.wemm) - {"query_prompt", "target_prompt", "candidates", "options"}):
            raise ValueError(f"task {self.name!r}: wemm holds query_prompt, target_prompt, candidates or options, got {unknown[0]!r}")

    @property
    def report_name(self) -> str:
        """Key of the task in a leaderboard file."""
        return self.report_as or self.name

    @property
    def hub_name(self) -> str | None:
        """Name of its data set on the hub, without the owner's."""
        return self.hub["dataset"].rsplit("/", 1)[-1] if self.hub.get("dataset") else None

    def is_called(self, word: str) -> bool:
        """Whether a word of `--tasks` means this task: its name, group, kind or modality, its name on the hub or in
        reports, a set that its name holds."""
        known = (self.name, self.report_as, self.group, self.meta_task, self.modality, self.hub_name, *self.name.split("/")[:-1])
        return word in known or (word == "agent" and self.modality in ("tool", "gui", "memory"))

    def fed(self, feeding: str) -> Task:
        """The task as a published evaluation feeds it: "official" is the task itself, "wemm" has what its `wemm` says instead
        ("authors" is told by `tasks.instructions.bare_task`)."""
        if feeding not in FEEDINGS:
            raise ValueError(f"feeding is {' or '.join(FEEDINGS)}, got {shown(feeding)}")
        if feeding != "wemm" or not self.wemm:
            return self
        return replace(self, **{**self.wemm, "options": {**self.options, **self.wemm.get("options", {})}})


def _kinds(told: str) -> tuple[type, ...]:
    """The types of a field's annotation, such as "str | None"."""
    types = {"str": str, "int": int, "dict": dict, "None": type(None)}
    return tuple(types[name.strip()] for name in told.split("|"))


def make_task(values: dict[str, Any], source: str) -> Task:
    """A Task from a mapping; ValueError names the source and the keys that no task has."""
    if not isinstance(values, dict) or "name" not in values:
        raise ValueError(f"{source}: a task is a mapping with at least a name, got {shown(values)}")
    known = {f.name: f.type for f in fields(Task)}
    unknown = sorted(map(str, set(values) - set(known)))
    if unknown:
        raise ValueError(f"{source}: task {shown(values['name'])} has unknown keys {shown(unknown)}; known are {', '.join(sorted(known))}")
    for key, value in values.items():
        if key != "name" and not isinstance(value, _kinds(known[key])):
            raise ValueError(f"{source}: task {shown(values['name'])}: {key} should be {known[key]}, got {shown(value)}")
    values = dict(values, name=str(values["name"]))
    if "meta_task" not in values and values.get("group") in META_OF_GROUP:
        values["meta_task"] = META_OF_GROUP[values["group"]]
    if "group" not in values and values.get("meta_task") in GROUP_OF_META and values.get("modality", "image") == "image":
        values["group"] = GROUP_OF_META[values["meta_task"]]
    return Task(**values)
