"""Small random models of the published embedders that are fed as their authors feed them, with a template of our own.

The template renders the strings that the authors' render for one message of a user and one of a system.
"""

import json

from tests.helpers import tiny_generic, tiny_models

FAMILIES = {**tiny_generic.BUILDERS, **tiny_models.BUILDERS}
TEMPLATE = (
    "{%- for message in messages -%}<|im_start|>{{ message.role }}\n"
    "{%- set said = message.content if message.content is string else message.content | map(attribute='text') | join -%}"
    "{{ '\n' }}{{ SAID }}<|im_end|>{{ '\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\n' }}{%- endif -%}"
)
WIDTHS = [8, 16, 32]
SIZES = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
PROCESSOR = {  # one file, as the published one, with a least area of a picture that is smaller
    "processor_class": "Qwen3VLProcessor",
    "image_processor": {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": 8 * 32**2, "longest_edge": 16384 * 32**2},
        **SIZES,
    },
    "video_processor": {
        "video_processor_type": "Qwen3VLVideoProcessor",
        "size": {"shortest_edge": 4 * 32**2, "longest_edge": 24576 * 32**2},
        **SIZES,
    },
}


def ending(token: str, id_: int) -> dict:
    """A tokenizer's post-processor that puts a token behind every text."""
    return {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": token, "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {token: {"id": token, "ids": [id_], "tokens": [token]}},
    }


def edited(path, **changes):
    content = json.loads(path.read_text(encoding="utf-8"))
    content.update(changes)
    path.write_text(json.dumps(content), encoding="utf-8")


def id_of(path, token: str) -> int:
    return next(each["id"] for each in json.loads(path.read_text(encoding="utf-8"))["added_tokens"] if each["content"] == token)


def qwen3_vl_embedding(folder):
    """Fed so where the folder's name says it, or `feeding="authors"`."""
    FAMILIES["qwen3_vl"](folder)
    words = folder / "tokenizer.json"
    edited(words, post_processor=ending("<|endoftext|>", id_of(words, "<|endoftext|>")))
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("SAID", "said"), encoding="utf-8")


def wemm(folder):
    """Tells itself by the token `<embedding>`; names code that is not there, as the published ones do."""
    FAMILIES["qwen3_5"](folder)
    words = folder / "tokenizer.json"
    words.write_text(words.read_text(encoding="utf-8").replace("<global-img>", "<embedding>"), encoding="utf-8")
    newline = {"type": "Replace", "pattern": {"Regex": "\\n$"}, "content": ""}
    edited(words, post_processor=ending("<embedding>", id_of(words, "<embedding>")), normalizer=newline)
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("SAID", "said | trim"), encoding="utf-8")
    place = "modeling_wemm_embedding.WeMMEmbedding"
    edited(folder / "config.json", architectures=["WeMMEmbedding"], auto_map={"AutoModel": place}, matryoshka_dimensions=WIDTHS)
    (folder / "preprocessor_config.json").unlink(missing_ok=True)
    (folder / "processor_config.json").write_text(json.dumps(PROCESSOR), encoding="utf-8")


EMBEDDERS = {"qwen3_vl_embedding": qwen3_vl_embedding, "wemm": wemm}
