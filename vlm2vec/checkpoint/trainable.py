"""What a trainer asks of a `VLM2Vec`: activation checkpointing under transformers' names, a card's tags, adapters."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from typing import Any, Self

from torch import nn

from vlm2vec.checkpoint import adapters


class Trainable:
    """Methods of `VLM2Vec` that a trainer calls; `self.model` is the transformers module."""

    model: nn.Module

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **kwargs: Any) -> None:
        """Recompute layers in the backward pass (transformers' own switch; non-reentrant unless asked).

        Args:
            activation_checkpointing_kwargs: of `torch.utils.checkpoint.checkpoint`.
            kwargs: what this transformers takes besides: `every_n_layers`, `offload`.

        Example:
            >>> model.activation_checkpointing_enable()
            >>> model.is_activation_checkpointing
            True
        """
        chosen = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if hasattr(self.model, "activation_checkpointing_enable"):
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs=chosen, **kwargs)
        else:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=chosen, **kwargs)
        if not chosen["use_reentrant"]:
            # Only the reentrant kind needs inputs that require gradients; hooks for it would make gradients that nobody reads and
            # keep the module from being pickled.
            self.model.disable_input_require_grads()

    def activation_checkpointing_disable(self) -> None:
        """Keep activations for the backward pass again.

        Example:
            >>> model.activation_checkpointing_enable()
            >>> model.activation_checkpointing_disable()
            >>> model.is_activation_checkpointing
            False
        """
        getattr(self.model, "activation_checkpointing_disable", self.model.gradient_checkpointing_disable)()

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether any layer is recomputed in the backward pass.

        Example:
            >>> model.is_activation_checkpointing
            False
        """
        return any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs: Any) -> None:
        """`activation_checkpointing_enable` by the name that transformers had before 5.24.

        Example:
            >>> model.gradient_checkpointing_enable()
            >>> model.is_gradient_checkpointing
            True
        """
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    gradient_checkpointing_disable = activation_checkpointing_disable
    is_gradient_checkpointing = is_activation_checkpointing

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Tags of the model's card, which TRL's trainers set (transformers' own method).

        Example:
            >>> model.add_model_tags("embedding")
            >>> model.model.model_tags
            ['embedding']
        """
        self.model.add_model_tags(tags)

    def add_adapter(self, **lora: Any) -> None:
        """A fresh LoRA or DoRA adapter to train: r, alpha, dropout, dora, targets, vision (`vlm2vec.checkpoint.adapters.add`).

        Example:
            >>> model.add_adapter(r=4, alpha=8, targets=["q_proj", "v_proj"])
            >>> sum(p.numel() for p in model.parameters() if p.requires_grad) < sum(p.numel() for p in model.parameters()) / 4
            True
        """
        adapters.add(self, **lora)

    def merge_adapter(self) -> Self:
        """Fold the adapter into the weights, so that encoding costs what the base model costs.

        Example:
            >>> model.add_adapter(r=4, alpha=8)
            >>> any("lora" in name for name in model.merge_adapter().state_dict())
            False
        """
        if adapters.has_adapter(self):
            adapters.merge(self)
        return self

    @classmethod
    def merge(
        cls,
        models: Sequence[str | os.PathLike],
        weights: Sequence[float] | None = None,
        method: str = "linear",
        *,
        folder: str | os.PathLike | None = None,
        base: str | None = None,
        density: float = 0.2,
        scale: float = 1.0,
    ) -> Self:
        """Several checkpoints of one base made into one (`vlm2vec.checkpoint.merging`), loaded.

        Args:
            models: folders or hub names, all full checkpoints or all adapters.
            weights: one a model, above 0, brought to a sum of 1; equal ones by default.
            method: "linear", the mean, or "ties".
            folder: new folder that keeps the merged model; by default it is in memory alone.
            base: for "ties" of full checkpoints the model that they started from; for adapters in place of what they name.
            density, scale: of "ties": the share of each model's changes that is kept, and what the merged ones are times.

        Raises:
            ValueError: models of several kinds, families, bases, or shapes.

        Example:
            >>> model.save_pretrained("one")
            >>> merged = VLM2Vec.merge(["one", "quickstart/model"], weights=[1, 3])
            >>> bool(abs(merged.encode("a fox") - model.encode("a fox")).max() < 1e-5)  # two copies of one model
            True
        """
        from vlm2vec.checkpoint.merging import merge

        options = {"weights": weights, "method": method, "base": base, "density": density, "scale": scale}
        names = [os.fspath(model) for model in models]
        if folder is not None:
            merge(names, folder, cls.from_pretrained, **options)
            return cls.from_pretrained(folder)
        with tempfile.TemporaryDirectory(prefix="vlm2vec-merge-") as work:
            merge(names, work, cls.from_pretrained, **options)
            return cls.from_pretrained(work)
