"""modules.json and its companions in a saved folder, written without importing sentence-transformers."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from vlm2vec.files import write_json
from vlm2vec.inputs import MODALITIES

MODULE = "vlm2vec.st.VLM2VecModule"  # what saved folders name, and what sentence-transformers imports by that name
STOCK = "sentence_transformers."
ABOUT = "config_sentence_transformers.json"  # prompts, default prompt, similarity


def to_sentence_transformer(model: nn.Module) -> Any:
    """`vlm2vec.st.to_sentence_transformer`, found by the name that saved folders hold: that module knows the model, not the reverse."""
    module, _, _ = MODULE.rpartition(".")
    return import_module(module).to_sentence_transformer(model)


def write(model: nn.Module, folder: str, *, full: bool) -> None:
    """Describe the folder to sentence-transformers; `full` says that it holds all weights and not an adapter alone."""
    prompts = {name: text for name, text in model.prompts.items() if text}
    about = {"model_type": "SentenceTransformer", "prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    if not (full and model.processing.stock_modules):
        modules = [{"idx": 0, "name": "0", "path": "", "type": MODULE}]
    else:
        modules = [
            {"idx": 0, "name": "0", "path": "", "type": STOCK + "base.modules.transformer.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": STOCK + "sentence_transformer.modules.pooling.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": STOCK + "base.modules.normalize.Normalize"},
        ]
        about["default_prompt_name"] = next((n for n in ("document", "query") if n in prompts), None)
        method = {"method": "forward", "method_output_name": "last_hidden_state"}
        modalities = {kind: method for kind in MODALITIES} | {"message": {**method, "format": "structured"}}
        write_json(
            Path(folder, "sentence_bert_config.json"),
            {
                "transformer_task": "feature-extraction",
                "modality_config": modalities,
                "module_output_name": "token_embeddings",
                "processing_kwargs": {"chat_template": {"add_generation_prompt": True}},
            },
        )
        write_json(Path(folder, "1_Pooling/config.json"), {"embedding_dimension": model.embedding_dim, "pooling_mode": "lasttoken"})
        write_json(Path(folder, "2_Normalize/config.json"), {})
    write_json(Path(folder, "modules.json"), modules)
    write_json(Path(folder, ABOUT), about)
