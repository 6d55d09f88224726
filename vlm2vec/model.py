"""`VLM2Vec`: one embedding model for any mix of text, images and video."""

import os
import warnings

import torch
from torch import nn

from vlm2vec import encoding
from vlm2vec.attention import choose_provider
from vlm2vec.checkpoint import adapters, saving
from vlm2vec.packing import Features, PackedBatch


class VLM2Vec(nn.Module):
    """A vision-language backbone that gives one vector per input: the hidden state of the last token.

    Attributes:
        model: the transformers module, without lm_head.
        backbone: the family's rules (`vlm2vec.backbones`).
        processing: picklable, weightless; `processing(input) -> Features`.
        prompts: {"query": str, "document": str, ...}, used by `encode_query` and `encode_document`.
        always_vision: run the vision tower in every forward, on a grey placeholder that adds nothing where a chunk has no
            visuals. For sharded towers, whose forward all ranks must enter together.
    """

    def __init__(self, model: nn.Module, backbone, processing, *, attn: str | None = None, source: str = "", prompts=None):
        super().__init__()
        self.model = model
        self.backbone = backbone
        self.processing = processing
        self.attn = attn
        self.source = source
        self.base_source = source
        self.revision: str | None = None
        self.adapter_settings: dict | None = None
        self.prompts = {**processing.prompts, **(prompts or {})}
        self.similarity_fn_name = "cosine"
        self.always_vision = False
        backbone.finish(model)

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir,
        base: str | None = None,
        *,
        dtype="auto",
        device=None,
        attn: str | None = None,
        revision: str | None = None,
        quantize: str | None = None,
        liger: bool = False,
        **family_options,
    ) -> "VLM2Vec":
        """Load a public checkpoint, a base model, a PEFT adapter, or a folder that `save_pretrained` wrote.

        Args:
            name_or_dir: local folder or hub name.
            base: for an adapter, overrides the base model that its config names.
            dtype: "auto" (the checkpoint's own), a torch.dtype or its name.
            device: default CUDA when there is one, else the CPU.
            attn: "auto", "sdpa", "flash_attn" or "varlen" (`vlm2vec.attention`).
            quantize: "nf4" loads the linear layers of the language model in 4 bits (needs bitsandbytes).
            liger: apply Liger kernels (needs liger-kernel).
            family_options: options of the family's processing, e.g. positions="mrope", num_crops=4; they override those that
                the folder's vlm2vec.json holds.

        Raises:
            ValueError: not a model folder, an unknown family or option, weights that do not fit, a missing base.
        """
        from vlm2vec.checkpoint.pretrained import load

        return load(
            cls,
            os.fspath(name_or_dir),
            base,
            dtype=dtype,
            device=device,
            attn=attn,
            revision=revision,
            quantize=quantize,
            liger=liger,
            options=family_options,
        )

    # -- facts ----------------------------------------------------------------------------------------------------------

    @property
    def family(self) -> str:
        return self.backbone.name

    @property
    def config(self):
        return self.model.config

    @property
    def options(self) -> dict:
        """The family options in force, as `save_pretrained` writes them."""
        return self.processing.options

    @property
    def embedding_dim(self) -> int:
        return self.backbone.embedding_dim(self.model.config)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.text_model(self.model).get_input_embeddings().weight.dtype

    @property
    def processor(self):
        """The image processor and tokenizer holder as transformers' own processor class, None when the family has none."""
        return self.processing.hf_processor()

    # -- running --------------------------------------------------------------------------------------------------------

    def preprocess(self, inputs: list) -> list[Features]:
        """CPU work on each input. Errors name the position of the input in the list."""
        return encoding.preprocess(self.processing, inputs)

    def pack(self, features: list[Features]) -> PackedBatch:
        """One packed sequence, on the CPU; move it with `.to(device)`."""
        return self.backbone.pack(features, choose_provider(self.attn, self.device, self.dtype))

    def vision(self, packed: PackedBatch) -> torch.Tensor | None:
        """Vision features of all visuals of the chunk (V, width), None without visuals or when the family fuses its tower.

        Hand them to `forward` as `vision_features`: a frozen tower then runs once for two passes.
        """
        return self.backbone.vision(self.model, packed)

    def forward(self, packed: PackedBatch, vision_features: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states of the last tokens after the final norm, (B, D), in the model's dtype, not normalised."""
        features = self.backbone.vision(self.model, packed) if vision_features is None else vision_features
        seen = None
        if features is None and self.always_vision and not packed.vision:
            # A sharded tower's forward and backward are collective: another rank's chunk may have visuals. The tower runs
            # before the decoder, as it does there, and its backward after the decoder's.
            seen = self.backbone.vision(self.model, self.placeholder().to(packed.input_ids.device))
        hidden = self.backbone.last_hidden(self.model, packed, features)
        return hidden if seen is None else hidden + 0 * seen.sum().to(hidden.dtype)

    def placeholder(self) -> PackedBatch:
        """A chunk of one small grey image: what a sharded tower sees where a chunk has no visuals."""
        from PIL import Image

        return self.pack([self.processing({"image": Image.new("RGB", (64, 64), (128, 128, 128))})])

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """Recompute layers in the backward pass (transformers' own switch; non-reentrant)."""
        kwargs = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # renamed in transformers 6, the old name serves both
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)

    def gradient_checkpointing_disable(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.model.gradient_checkpointing_disable()

    # -- encoding -------------------------------------------------------------------------------------------------------

    def encode(
        self,
        inputs,
        *,
        prompt=None,
        batch_size=32,
        show_progress_bar=None,
        convert_to_tensor=False,
        normalize_embeddings=True,
        truncate_dim=None,
    ):
        """Embed one input or a list of inputs, in the caller's order.

        Args:
            inputs: see `vlm2vec.inputs`; a list gives (N, D), one input gives (D,).
            prompt: a name in `self.prompts` or the text itself, put before each input's text (behind its image markers).
            batch_size: at most so many inputs per chunk; long ones are fewer, chunks are cut by tokens.
            show_progress_bar: None shows it on a terminal for more than 512 inputs.
            convert_to_tensor: a float32 tensor on the model's device instead of a NumPy array.
            normalize_embeddings: L2 to length 1, in float32.
            truncate_dim: keep the first dimensions (Matryoshka), then normalise.

        Raises:
            ValueError: names the input that cannot be read, by its position.
        """
        return encoding.encode(
            self,
            inputs,
            prompt=prompt,
            batch_size=batch_size,
            show_progress_bar=show_progress_bar,
            convert_to_tensor=convert_to_tensor,
            normalize_embeddings=normalize_embeddings,
            truncate_dim=truncate_dim,
        )

    def encode_query(self, inputs, **kwargs):
        """`encode` with the family's query prompt (empty for the reference's families)."""
        return self.encode(inputs, **{"prompt": self.prompts.get("query"), **kwargs})

    def encode_document(self, inputs, **kwargs):
        """`encode` with the family's document prompt (empty for the reference's families)."""
        return self.encode(inputs, **{"prompt": self.prompts.get("document"), **kwargs})

    def similarity(self, a, b) -> torch.Tensor:
        """Cosine similarity of two sets of embeddings, (N, D) and (M, D) -> (N, M) float32."""
        a, b = (nn.functional.normalize(torch.as_tensor(x).float().reshape(-1, x.shape[-1]), dim=-1) for x in (a, b))
        return a @ b.to(a.device).T

    # -- saving ---------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder, merge: bool = False, state_dict: dict | None = None) -> None:
        """Write weights (an adapter alone when there is one and `merge` is False), processor files and vlm2vec.json.

        Args:
            merge: fold the adapter in and write a full model, laid out as the family's hub checkpoints are.
            state_dict: weights gathered from shards, under the names of `self.state_dict()`; default is the model's own.
        """
        state = None if state_dict is None else {k.removeprefix("model."): v for k, v in state_dict.items()}
        saving.save(self, os.fspath(folder), merge=merge, state=state)

    def to_sentence_transformer(self):
        """A SentenceTransformer with the same weights and embeddings (`vlm2vec.st`)."""
        from vlm2vec.st import to_sentence_transformer

        return to_sentence_transformer(self)

    # -- adapters -------------------------------------------------------------------------------------------------------

    def add_adapter(self, **lora) -> None:
        """A fresh LoRA or DoRA adapter to train: r, alpha, dropout, dora, targets, vision (`vlm2vec.checkpoint.adapters.add`)."""
        adapters.add(self, **lora)

    def merge_adapter(self) -> "VLM2Vec":
        """Fold the adapter into the weights, so that encoding costs what the base model costs."""
        if adapters.has_adapter(self):
            adapters.merge(self)
        return self
