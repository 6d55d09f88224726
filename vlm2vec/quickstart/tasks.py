"""The eleven tasks of the quickstart benchmark: what is asked, in which words, and how hard it is.

The words are MMEB's own (`ImageNet-1K`, `OK-VQA`, `MSCOCO`, `CIRR`, ...), so that a model trained here is prompted as a
model trained on MMEB is.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlm2vec.inputs import IMAGE_MARKER

MARK = f"{IMAGE_MARKER}\n"
PICTURE = MARK + "Represent the given image.\n"  # targets of MSCOCO_t2i, CIRR, NIGHTS
CROP = MARK + "Represent the given cropped image of the object"  # targets of MSCOCO and Visual7W-Pointing
META_TASKS = ("classification", "vqa", "retrieval", "grounding")


@dataclass(frozen=True)
class Task:
    """One data set of the benchmark.

    Attributes:
        name: folder and key in the score files.
        meta_task: one of META_TASKS.
        query, target: kinds of the two sides: "text", "image" or "image+text".
        prompt: the query as written, `{}` for what varies.
        shortcut: the best hit@1 a model can have that ignores one of its inputs or skips a step; None where no such way exists.
        how: that way, in words.
        about: one sentence for people.
    """

    name: str
    meta_task: str
    query: str
    target: str
    prompt: str
    about: str
    shortcut: float | None = None
    how: str = ""

    def ask(self, text: str = "") -> str:
        return self.prompt.replace("{}", text)


TASKS = {
    task.name: task
    for task in (
        Task(
            "OpenMoji-Object",
            "classification",
            "image",
            "text",
            MARK + "Identify the object shown in the image\n",
            "Name the picture, out of all 160 names.",
        ),
        Task(
            "OpenMoji-Group",
            "classification",
            "image",
            "text",
            MARK + "Represent the given image for classification\n",
            "Name the group the picture belongs to, out of 32.",
        ),
        Task(
            "OpenMoji-Side",
            "vqa",
            "image+text",
            "text",
            MARK + "Represent the given image with the following question: {}\n",
            "Two things side by side: which one is on the left, or on the right?",
            0.5,
            "naming either thing",
        ),
        Task(
            "OpenMoji-Beside",
            "vqa",
            "image+text",
            "text",
            MARK + "Represent the given image with the following question: {}\n",
            "Two things side by side: what is next to the one that is named?",
            0.5,
            "naming either thing",
        ),
        Task(
            "OpenMoji_t2i",
            "retrieval",
            "text",
            "image",
            "Find me an everyday image that matches the given caption: {}\n",
            "Find the picture by its caption.",
        ),
        Task(
            "OpenMoji_i2t",
            "retrieval",
            "image",
            "text",
            MARK + "Find an image caption describing the given everyday image.\n",
            "Find the caption of a picture.",
        ),
        Task(
            "OpenMoji_i2i",
            "retrieval",
            "image",
            "image",
            MARK + "Find a day-to-day image that looks similar to the provided image.\n",
            "Find the same thing in another drawing, on another ground.",
        ),
        Task(
            "OpenMoji-Recolour",
            "retrieval",
            "image+text",
            "image",
            MARK + "Given an image, find a similar everyday image with the described changes: {}\n",
            "Find the same thing on the ground that the text asks for.",
            0.25,
            "ignoring the text",
        ),
        Task(
            "OpenMoji-Labelled",
            "grounding",
            "image+text",
            "image",
            MARK + 'Select the portion of the image that isolates the object labeled as "{}"\n',
            "Four things in a scene: find the cut-out of the one that is named.",
            0.5,
            "ignoring the scene",
        ),
        Task(
            "OpenMoji-Pointing",
            "grounding",
            "image+text",
            "image",
            MARK + 'Select the portion of the image that answers the question "{}"\n',
            "Four things in a scene: find the cut-out of the one in the corner asked for.",
            0.25,
            "ignoring the question",
        ),
        Task(
            "OpenMoji-Matching",
            "grounding",
            "image+text",
            "image+text",
            MARK + 'Select the portion of the image that follows the language expressions: "{}"\n',
            "Two expressions, one place: match a corner of a scene with the name of what is there.",
            0.25,
            "recognising the scene alone",
        ),
    )
}
