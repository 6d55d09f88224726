"""Which frames a task's films give: what was asked for, else what the published evaluation of the model's family takes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vlm2vec.evaluation.tasks import Task
from vlm2vec.media.sampling import FRAMES, FrameRule

V3_FRAMES = {"official": f"{FRAMES},repeat", "wemm": "fps:1,max:64,clips:8,rounded"}  # of both published evaluations of MMEB-V3


def has_films(task: Task) -> bool:
    """Whether a task's inputs hold films."""
    prompts = [task.query_prompt, task.target_prompt]
    prompts = [text for prompt in prompts for text in (prompt.values() if isinstance(prompt, dict) else [prompt])]
    return task.modality == "video" or any("<|video_1|>" in (text or "") for text in prompts)


def frame_rule(model: Any, *, asked: FrameRule | None = None, protocol: str = "v1", feeding: str = "official") -> FrameRule:
    """The rule by which a model's films are read.

    Args:
        asked: what --frames says, which holds for every task.
        protocol, feeding: MMEB-V3's evaluations ("v3") have rules of their own, whatever the model; under the others the family has one.
    """
    if asked is not None:
        return asked
    if protocol == "v3":
        return FrameRule.parse(V3_FRAMES[feeding], whole_too=False)
    family = getattr(getattr(model, "processing", None), "film_frames", None)
    return FrameRule.parse(family or str(FRAMES), whole_too=False)


def with_rule(task: Task, rule: FrameRule) -> Task:
    """The task with the rule where its loader looks for it."""
    return replace(task, options={**task.options, "frame_rule": rule})
