"""`VLM2Vec`: one embedding model for any mix of text, images and video."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlm2vec import encoding
from vlm2vec.attention import choose_provider, register
from vlm2vec.checkpoint import saving, sentence_transformers_files
from vlm2vec.checkpoint.trainable import Trainable
from vlm2vec.inputs import MODALITIES
from vlm2vec.packing import Features, PackedBatch

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer
    from transformers import PretrainedConfig, ProcessorMixin

    from vlm2vec.backbones.base import Backbone
    from vlm2vec.backbones.processing import Processing


class VLM2Vec(Trainable, nn.Module):
    """A vision-language backbone that gives one vector per input: the hidden state of the last token.

    Attributes:
        model: the transformers module, without lm_head.
        backbone: the family's rules (`vlm2vec.backbones`).
        processing: picklable, weightless; `processing(input) -> Features`.
        prompts: {"query": str, "document": str, ...}, used by `encode_query` and `encode_document`.
        always_vision: run the vision tower in every forward, on a grey placeholder that adds nothing where a chunk has no
            visuals. For sharded towers, whose forward all ranks must enter together.

    Example:
        >>> model = VLM2Vec.from_pretrained("quickstart/model")  # a folder, or a name on the hub
        >>> queries = model.encode_query(["a fox in the snow", {"text": "the same animal", "image": Path("fox.png")}])
        >>> documents = model.encode_document([Path("fox.png"), "a red fox"])
        >>> model.similarity(queries, documents).shape
        torch.Size([2, 2])
    """

    def __init__(
        self,
        model: nn.Module,
        backbone: Backbone,
        processing: Processing,
        *,
        attn: str | None = None,
        source: str = "",
        prompts: dict[str, str] | None = None,
    ):
        super().__init__()
        self.model = model
        self.backbone = backbone
        self.processing = processing
        self.attn = attn
        self.source = source
        self.base_source = source
        self.revision: str | None = None
        self.adapter_settings: dict | None = None
        self.adapter_whole: list[str] = []
        self.prompts = {**processing.prompts, **(prompts or {})}
        self.similarity_fn_name = "cosine"
        self.always_vision = False
        self.eval_mode = encoding.EvalMode()
        backbone.finish(model)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        register()  # a process that unpickles the model has not met the packed attention yet

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | os.PathLike,
        base: str | None = None,
        *,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        attn: str | None = None,
        revision: str | None = None,
        quantize: str | None = None,
        liger: bool = False,
        **family_options: Any,
    ) -> VLM2Vec:
        """Load a public checkpoint, a base model, a PEFT adapter, or a folder that `save_pretrained` wrote.

        Args:
            name_or_dir: local folder or hub name.
            base: for an adapter, overrides the base model that its config names.
            dtype: "auto" (the checkpoint's own), a torch.dtype or its name.
            device: default CUDA when there is one, else the CPU.
            attn: "auto", "sdpa", "flash_attn_4", "flash_attn" or "varlen" (`vlm2vec.attention`).
            quantize: "nf4" loads the linear layers of the language model in 4 bits (needs bitsandbytes).
            liger: apply Liger kernels (needs liger-kernel).
            family_options: options of the family's processing, e.g. positions="mrope", num_crops=4; they override those that
                the folder's vlm2vec.json holds. feeding="raw" or "authors" overrides what name and files tell (docs/feeding.md).

        Raises:
            ValueError: not a model folder, an unknown family or option, weights that do not fit, a missing base.

        Example:
            >>> model = VLM2Vec.from_pretrained("quickstart/model", dtype="float32", device="cpu", max_pixels=56 * 56)
            >>> model.options["max_pixels"]
            3136
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
        """Name of the backbone's family, as vlm2vec.json holds it.

        Example:
            >>> model.family
            'qwen2_vl'
        """
        return self.backbone.name

    @property
    def config(self) -> PretrainedConfig:
        """The transformers module's configuration.

        Example:
            >>> model.config.model_type
            'qwen2_vl'
        """
        return self.model.config

    @property
    def options(self) -> dict:
        """The family options in force, as `save_pretrained` writes them.

        Example:
            >>> model.options["positions"], model.options["frames"]
            ('sequential', 8)
        """
        return self.processing.options

    @property
    def embedding_dim(self) -> int:
        """D, the width of an embedding.

        Example:
            >>> model.encode("a fox").shape == (model.embedding_dim,)
            True
        """
        return self.backbone.embedding_dim(self.model.config)

    @property
    def device(self) -> torch.device:
        """Where the weights are.

        Example:
            >>> model.device
            device(type='cpu')
        """
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, a four-bit base's compute dtype.

        Example:
            >>> model.dtype
            torch.float32
        """
        return self.backbone.text_model(self.model).get_input_embeddings().weight.dtype

    @property
    def processor(self) -> ProcessorMixin | None:
        """The image processor and tokenizer holder as transformers' own processor class, None when the family has none.

        Example:
            >>> type(model.processor).__name__
            'Qwen2VLProcessor'
        """
        return self.processing.hf_processor()

    @property
    def modalities(self) -> tuple[str, ...]:
        """What an input may hold: "text", and "image", "video" and "audio" as far as the family takes them.

        Example:
            >>> model.modalities
            ('text', 'image', 'video')
        """
        marks = (self.processing.image_marker, self.processing.video_marker, self.processing.audio_marker)
        return ("text", *(kind for kind, marker in zip((*MODALITIES[1:], "audio"), marks) if marker is not None))

    def reading(self, **media: Any) -> VLM2Vec:
        """A view of this model, same weights, that reads pictures (`vlm2vec.media.images`: orientation, background) and films (frames,
        fps, max_frames) otherwise; `self` stays as it is.

        Example:
            >>> model.reading(orientation="stored", background="hidden").options["orientation"], model.options["orientation"]
            ('stored', 'exif')
        """
        view = object.__new__(type(self))
        view.__dict__.update(self.__dict__)
        view.processing = self.processing.reading(**media)
        return view

    # -- running --------------------------------------------------------------------------------------------------------

    def preprocess(self, inputs: list) -> list[Features]:
        """CPU work on each input. Errors name the position of the input in the list.

        Example:
            >>> text, both = model.preprocess(["a fox", {"text": "a fox", "image": Path("fox.png")}])
            >>> text.length < both.length
            True
        """
        return encoding.preprocess(self.processing, inputs)

    def pack(self, features: list[Features]) -> PackedBatch:
        """One packed sequence, on the CPU; move it with `.to(device)`.

        Example:
            >>> packed = model.pack(model.preprocess(["a fox", "a red fox"]))
            >>> packed.input_ids.shape[0] == sum(packed.seqlens)
            True
        """
        return self.backbone.pack(features, choose_provider(self.attn, self.device, self.dtype))

    def vision(self, packed: PackedBatch) -> torch.Tensor | None:
        """Vision features of all visuals of the chunk (V, width), None without visuals or when the family fuses its tower.

        Hand them to `forward` as `vision_features`: a frozen tower then runs once for two passes.

        Example:
            >>> packed = model.pack(model.preprocess([Path("fox.png")]))
            >>> features = model.vision(packed)
            >>> torch.equal(model(packed, vision_features=features), model(packed))
            True
        """
        return self.backbone.vision(self.model, packed)

    def forward(self, packed: PackedBatch, vision_features: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states of the last tokens after the final norm, (B, D), in the model's dtype, not normalised.

        Example:
            >>> packed = model.pack(model.preprocess(["a fox", "a red fox"])).to(model.device)
            >>> model(packed).shape == (2, model.embedding_dim)
            True
        """
        if torch.compiler.is_compiling():  # a lock is nothing to compile
            return self._forward(packed, vision_features)
        with self.eval_mode.forward(self.training):
            return self._forward(packed, vision_features)

    def _forward(self, packed: PackedBatch, vision_features: torch.Tensor | None) -> torch.Tensor:
        features = self.backbone.vision(self.model, packed) if vision_features is None else vision_features
        placeholder_features = None
        if features is None and self.always_vision and not packed.vision:
            # A sharded tower's forward and backward are collective: another rank's chunk may have visuals. The tower runs
            # before the decoder, as it does there, and its backward after the decoder's.
            placeholder_features = self.backbone.vision(self.model, self.placeholder().to(packed.input_ids.device))
        hidden = self.backbone.last_hidden(self.model, packed, features)
        return hidden if placeholder_features is None else hidden + 0 * placeholder_features.sum().to(hidden.dtype)

    def train(self, mode: bool = True) -> VLM2Vec:
        """As `nn.Module.train`. ValueError while the model encodes, in this thread or another: dropout would start in the midst.

        Example:
            >>> model.train().training, model.eval().training
            (True, False)
        """
        self.eval_mode.ask(mode)
        return super().train(mode)

    def placeholder(self) -> PackedBatch:
        """A chunk of one small grey image: what a sharded tower sees where a chunk has no visuals.

        Example:
            >>> len(model.placeholder().seqlens), bool(model.placeholder().vision)
            (1, True)
        """
        from PIL import Image

        return self.pack([self.processing({"image": Image.new("RGB", (64, 64), (128, 128, 128))})])

    # -- encoding -------------------------------------------------------------------------------------------------------

    def encode(
        self,
        inputs: Any,
        *,
        prompt: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = True,
        truncate_dim: int | None = None,
        urls: bool = False,
    ) -> np.ndarray | torch.Tensor:
        """Embed one input or a list of inputs, in the caller's order.

        Args:
            inputs: see `vlm2vec.inputs`; a list gives (N, D), one input gives (D,). A string is text, also where it is the name of
                a picture (a warning says so).
            prompt: a name in `self.prompts` or the text itself, put before each input's text (behind its image markers).
            batch_size: at most so many inputs per chunk; long ones are fewer, chunks are cut by tokens.
            show_progress_bar: None shows it on a terminal for more than 512 inputs.
            convert_to_tensor: a float32 tensor on the model's device instead of a NumPy array.
            normalize_embeddings: L2 to length 1, in float32.
            truncate_dim: keep the first dimensions (Matryoshka), then normalise.
            urls: read pictures that are given as http(s) URLs; refused otherwise.

        Raises:
            ValueError: names the input that cannot be read, by its position.

        Example:
            >>> model.encode(["a fox", Path("fox.png"), {"text": "a fox", "image": Path("fox.png")}], truncate_dim=16).shape
            (3, 16)
            >>> model.encode("gone.png is text, Path('gone.png') a file").shape == (model.embedding_dim,)
            True
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
            urls=urls,
        )

    def encode_query(self, inputs: Any, **kwargs: Any) -> np.ndarray | torch.Tensor:
        """`encode` with the family's query prompt (empty for the reference's families).

        Example:
            >>> model.prompts["query"] = "Find: "
            >>> bool((model.encode_query("a fox") == model.encode("Find: a fox")).all())
            True
        """
        return self.encode(inputs, **{"prompt": self.prompts.get("query"), **kwargs})

    def encode_document(self, inputs: Any, **kwargs: Any) -> np.ndarray | torch.Tensor:
        """`encode` with the family's document prompt (empty for the reference's families).

        Example:
            >>> bool((model.encode_document("a fox") == model.encode("a fox")).all())
            True
        """
        return self.encode(inputs, **{"prompt": self.prompts.get("document"), **kwargs})

    def similarity(self, a: np.ndarray | torch.Tensor, b: np.ndarray | torch.Tensor) -> torch.Tensor:
        """Cosine similarity of two sets of embeddings, (N, D) and (M, D) -> (N, M) float32.

        Example:
            >>> foxes = model.encode(["a fox", "a red fox"])
            >>> scores = model.similarity(foxes, foxes)
            >>> scores.shape, bool(scores.diagonal().allclose(torch.ones(2)))
            (torch.Size([2, 2]), True)
        """
        a, b = (nn.functional.normalize(torch.as_tensor(x).float().reshape(-1, x.shape[-1]), dim=-1) for x in (a, b))
        return a @ b.to(a.device).T

    # -- saving ---------------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | os.PathLike, merge: bool = False, state_dict: dict | None = None) -> None:
        """Write weights (an adapter alone when there is one and `merge` is False), processor files and vlm2vec.json.

        Args:
            merge: fold the adapter in and write a full model, laid out as the family's hub checkpoints are.
            state_dict: weights gathered from shards, under the names of `self.state_dict()`; default is the model's own.

        Example:
            >>> model.save_pretrained("saved")
            >>> again = VLM2Vec.from_pretrained("saved")
            >>> bool((again.encode("a fox") == model.encode("a fox")).all())
            True
        """
        state = None if state_dict is None else {k.removeprefix("model."): v for k, v in state_dict.items()}
        saving.save(self, os.fspath(folder), merge=merge, state=state)

    def to_sentence_transformer(self) -> SentenceTransformer:
        """A SentenceTransformer with the same weights and embeddings (`vlm2vec.st`).

        Example:
            >>> model.to_sentence_transformer().encode(["a fox"]).shape == (1, model.embedding_dim)
            True
        """
        return sentence_transformers_files.to_sentence_transformer(self)
