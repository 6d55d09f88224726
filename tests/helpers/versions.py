"""What only newer versions have, by version: tests of it are skipped on older ones, and run (and fail) where a newer one lost it."""

import PIL
import pytest
import torch
import transformers
from torch.distributed.fsdp import FSDPModule

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
TRANSFORMERS = tuple(int(part) for part in transformers.__version__.split(".")[:2])

# A sharded rank that runs out of memory goes on with the others; without it the error is raised there, with the mend.
LACKS_RESET_ITER_STATE = TORCH < (2, 14) and not hasattr(FSDPModule, "reset_iter_state")
needs_reset_iter_state = pytest.mark.skipif(
    LACKS_RESET_ITER_STATE, reason=f"FSDPModule.reset_iter_state: torch 2.14 has it, {torch.__version__} has not"
)

# Pillow 13 reduces some sizes otherwise than 11 and 12 do; the reference's outputs in tests/golden were made by 13.
needs_pillow_13 = pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13,
    reason=f"the reference's pixels are those of Pillow 13, which resizes otherwise than {PIL.__version__}",
)

# Older releases map Qwen2.5-Omni's thinker to its class with a head alone, and the generic path refuses it by name.
LACKS_BARE_THINKER = TRANSFORMERS < (5, 24) and transformers.Qwen2_5OmniThinkerConfig not in transformers.MODEL_MAPPING


def require_bare_thinker() -> None:
    if LACKS_BARE_THINKER:
        pytest.skip(f"Qwen2.5-Omni's thinker without its head: transformers 5.24 has it, {transformers.__version__} has not")
