"""Qwen3.5 and what is trained from it: three layers of a gated delta rule to one of full attention, in one packed sequence.

backbone.py      how the module is loaded and run          processing.py   raw inputs, VLM2Vec's way
layers.py        what packed batches ask of its modules    layout.py       samples cut into chunks, once for all layers
delta_rule.py    the rule in plain torch                   convolution.py  the causal convolution in plain torch
providers.py     flash-linear-attention and causal-conv1d, where they are installed and prove right (self_check.py)
"""

from vlm2vec.backbones.qwen3_5.backbone import Qwen35
from vlm2vec.backbones.qwen3_5.processing import Qwen35Processing

__all__ = ["Qwen35", "Qwen35Processing"]
