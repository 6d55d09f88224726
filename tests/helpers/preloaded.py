"""Imported once, by the server from which the ranks of the tests are forked: what a run would import on its way."""

import accelerate  # noqa: F401
import datasets  # noqa: F401
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp  # noqa: F401
import transformers.models.qwen2_vl.image_processing_pil_qwen2_vl
import transformers.models.qwen2_vl.modeling_qwen2_vl
import transformers.models.qwen2_vl.processing_qwen2_vl
import transformers.models.qwen2_vl.video_processing_qwen2_vl  # noqa: F401
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

import train.run  # noqa: F401
import vlm2vec.backbones.qwen2_vl  # noqa: F401
from tests.helpers.tiny_recipe import tiny_models  # noqa: F401
