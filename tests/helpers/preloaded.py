"""Imported once, by the server from which the ranks of the tests are forked: what a run would import on its way."""

import importlib

for name in (
    "accelerate",
    "datasets",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl",
    "transformers.models.qwen2_vl.modeling_qwen2_vl",
    "transformers.models.qwen2_vl.processing_qwen2_vl",
    "transformers.models.qwen2_vl.video_processing_qwen2_vl",
    "train.run",
    "vlm2vec.backbones.qwen2_vl",
    "tests.helpers.tiny_recipe",
):
    importlib.import_module(name)

import transformers

for name in ("AutoImageProcessor", "AutoModel", "AutoTokenizer", "PreTrainedTokenizerFast"):
    getattr(transformers, name)  # transformers imports what holds a class when it is asked for
