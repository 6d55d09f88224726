"""Four-bit base weights (QLoRA) and Liger kernels: both optional, both asked for by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

    from vlm2vec.backbones.base import Backbone


def nf4_config(quantize: str, dtype: torch.dtype, backbone: Backbone) -> BitsAndBytesConfig:
    """The bitsandbytes settings of QLoRA: NF4, double quantisation, products in `dtype`. The vision tower stays as it is.

    Raises:
        ValueError: another scheme than "nf4", or bitsandbytes missing.
    """
    if quantize != "nf4":
        raise ValueError(f"quantize={quantize!r}: expected 'nf4' or None")
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        raise ValueError("quantize='nf4' needs bitsandbytes; pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=list(backbone.unquantized),
    )


def keep_layout(model: nn.Module) -> None:
    """Keep bitsandbytes' four-bit layers as they were stored, on every CPU.

    On a CPU with AVX512-BF16 their first forward call outside training re-packs the weights, with scales cut to bfloat16, for
    a kernel that also computes in bfloat16: embeddings would depend on the machine and on what ran before, merging would read
    a layout that it does not know, and layers narrower than a quantisation block would fail.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def apply_liger(model: nn.Module) -> None:
    """Swap RMSNorm, rotary embedding and SwiGLU for Liger's kernels, in place.

    Raises:
        ValueError: liger-kernel missing, or no kernels for the family.
    """
    from importlib.util import find_spec

    if find_spec("liger_kernel") is None:
        raise ValueError("liger=True needs liger-kernel; pip install liger-kernel")
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(f"liger=True: liger-kernel has no kernels for {kind}; there are {', '.join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))}")
    if model.device.type != "cuda":
        raise ValueError(f"liger=True needs CUDA, the model is on {model.device}; leave it out")
    # No head here, so none of the loss kernels.
    MODEL_TYPE_TO_APPLY_LIGER_FN[kind](model=model.model, fused_linear_cross_entropy=False, cross_entropy=False)
