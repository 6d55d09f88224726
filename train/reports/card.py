"""The model card: a README.md beside the weights that says what the model is, what it was trained on and how to do it again."""

from __future__ import annotations

import os
from typing import Any

import yaml

from vlm2vec.checkpoint.words import example

from ..recipe.schema import Recipe

_FIGURES = {
    "eval_accuracy": "held-out rows: accuracy among the targets of their source, mean over sources",
    "eval_loss": "held-out rows: loss (nats)",
    "loss": "loss (nats)",
    "accuracy": "in-batch accuracy",
    "positive_similarity": "similarity of positives",
    "hardest_negative_similarity": "similarity of hardest negatives",
}


def _data_words(recipe: Recipe) -> str:
    own = [f"`{source.path}`" for source in recipe.data.sources if source.path is not None]
    root = [f"`{recipe.data.root}`, split `{recipe.data.split}`"] if len(own) < len(recipe.data.sources) else []
    return "; ".join([*root, ", ".join(own)] if own else root)


def model_card(
    recipe: Recipe,
    *,
    base: str,
    family: str,
    trained: int,
    total: int,
    steps: int,
    figures: dict[str, Any],
    prompts: dict[str, str] | None = None,
) -> str:
    """Markdown with the hub's YAML header.

    Args:
        base: name or folder of the base model.
        family: registry name of the backbone.
        trained, total: numbers of weights.
        steps: steps made.
        figures: the last line of the training log.
        prompts: the model's own; without any, its use is shown in MMEB's words.
    """
    header = {
        "library_name": "vlm2vec",
        "pipeline_tag": "feature-extraction",
        "tags": ["vlm2vec", "multimodal-embedding", family, *(["lora"] if recipe.lora else [])],
    }
    if not os.path.isdir(base):  # a name on the hub
        header["base_model"] = base
        header["base_model_relation"] = "adapter" if recipe.lora else "finetune"
    how = recipe.whole_words
    if recipe.lora:
        kind = "DoRA" if recipe.lora.dora else "LoRA"
        how = f"{kind} adapter of rank {recipe.lora.r}" + (", base in four bits (NF4)" if recipe.quantization else "")
        how += f" beside {recipe.whole_words}" if recipe.whole_words else ""
    total_weight = sum(source.weight for source in recipe.data.sources)
    rows = [f"| {s.name} | {s.weight / total_weight:.1%} | {s.rows or 'all'} |" for s in recipe.data.sources]
    scores = [f"| {words} | {figures[name]:.4g} |" for name, words in _FIGURES.items() if figures.get(name) is not None]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(header, sort_keys=False).rstrip(),
            "---",
            "# Multimodal embedding model",
            "",
            f"One vector for any mix of text and images: `{base}` ({family}) trained contrastively, {how} "
            f"({trained:,} of {total:,} parameters), for {steps:,} steps of {recipe.global_batch:,} pairs "
            f"{recipe.objective.words()}.",
            "",
            "## Use",
            "",
            "```python",
            *example(recipe.output, prompts or {}),
            "```",
            "",
            "On the command line, in the same words:",
            "",
            "```",
            f"vlm2vec embed {recipe.output} PICTURES --as document -o pictures.safetensors",
            f'vlm2vec search "a caption" --model {recipe.output} --embeddings pictures.safetensors',
            "```",
            "",
            "## Data",
            "",
            f"{_data_words(recipe)}; {recipe.interleave_batch_size:,} rows in a row come from one source.",
            "",
            "| source | share of draws | rows |",
            "|---|---|---|",
            *rows,
            "",
            "## Scores",
            "",
            "The end of the training log (means since the line before; not a benchmark):",
            "",
            "| figure | value |",
            "|---|---|",
            *scores,
            "",
            "Benchmark scores come from",
            "",
            "```",
            f"vlm2vec eval {recipe.output} --data MMEB_EVAL_FOLDER --output SCORES",
            "```",
            "",
            "## Training it again",
            "",
            "```",
            f"vlm2vec train {recipe.output}/recipe.yaml --output ANOTHER_FOLDER",
            "```",
            "",
            "with `recipe.yaml`, every key written out:",
            "",
            "```yaml",
            recipe.to_yaml().rstrip(),
            "```",
            "",
        ]
    )
