"""A VLM2Vec model inside mteb: `mteb.evaluate(MTEBEncoder("folder or name"), tasks)`.

Queries get the task's instruction in the layout the model was trained with; text documents stay bare, image documents
get "Represent the given image.", as MMEB's targets do. mteb says of neither side of a zero-shot classification what it is: texts
of a task about pictures or films are the labels, which are documents; where both sides are text, both are fed as queries.
Films are decoded here, by `vlm2vec.media`, as in `vlm2vec eval`. mteb itself is imported where it is needed only.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm2vec.inputs import MODALITIES, NOTHING

if TYPE_CHECKING:
    import torch
    from mteb.models import ModelMeta

    from vlm2vec.model import VLM2Vec


IMAGE_DOCUMENT = "Represent the given image."


class MTEBEncoder:
    """mteb's EncoderProtocol around `vlm2vec.VLM2Vec`.

    Args:
        model_name: checkpoint folder, hub name, or a loaded VLM2Vec model.
        revision: hub revision. device: as for `from_pretrained`.
        instructions: {task name or task type: instruction, or {"query": .., "document": ..}}; it goes before the prompt in
            mteb's own task metadata. use_instructions=False feeds everything bare.
        batch_size: inputs per forward pass unless mteb says otherwise.
        options: family options such as max_pixels, num_crops, positions.
    """

    def __init__(
        self,
        model_name: str | os.PathLike | VLM2Vec,
        revision: str | None = None,
        *,
        device: str | None = None,
        instructions: dict[str, str | dict[str, str]] | None = None,
        use_instructions: bool = True,
        batch_size: int = 32,
        **options: Any,
    ):
        if not isinstance(model_name, (str, os.PathLike)):
            self.model, self.name = model_name, getattr(model_name, "source", "") or "vlm2vec-model"
        else:
            from vlm2vec import VLM2Vec

            self.model = VLM2Vec.from_pretrained(model_name, device=device, **({"revision": revision} if revision else {}), **options)
            self.name = str(model_name)
        self.revision = revision or "local"
        self.instructions = instructions or {}
        self.use_instructions = use_instructions
        self.batch_size = batch_size

    def instruction(self, task_metadata: Any, prompt_type: Any) -> str:
        """The instruction for one side of a task, or ""."""
        if not self.use_instructions:
            return ""
        side = getattr(prompt_type, "value", prompt_type) or "query"
        for source in (self.instructions.get(task_metadata.name), self.instructions.get(task_metadata.type), task_metadata.prompt):
            if isinstance(source, dict) and source.get(side):
                return source[side]
            if isinstance(source, str) and source and side == "query":
                return source
        return ""

    def items(self, batch: dict[str, list], instruction: str, is_document: bool) -> list[dict[str, Any]]:
        """Inputs of `VLM2Vec.encode` from one of mteb's batches ({"text": [..], "image": [..], "video": [..]})."""
        columns = {name: batch[name] for name in MODALITIES if batch.get(name) is not None}
        if not columns:
            raise ValueError(f"expected a batch with {', '.join(MODALITIES[:-1])} or {MODALITIES[-1]}, got {', '.join(batch)}")
        out = []
        for row in zip(*columns.values()):
            item = {name: value for name, value in zip(columns, row) if value is not None}
            if "video" in item:
                item["video"] = film_of(item["video"])
            if not item.get("text", "x"):
                # mteb marks an absent text by ""; alone it has no tokens, so it is fed as the reference feeds nothing
                item["text"] = "" if len(item) > 1 else NOTHING
            visual = "image" in item or "video" in item
            said = instruction or (IMAGE_DOCUMENT if is_document and visual and self.use_instructions else "")
            if said:
                item["instruction"] = said
            out.append(item)
        return out

    def encode(
        self,
        inputs: Iterable[dict[str, list]],
        *,
        task_metadata: Any,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """(N, D) float32 vectors for a DataLoader of mteb's batches."""
        size = kwargs.get("batch_size") or self.batch_size
        show = bool(kwargs.get("show_progress_bar", False))
        vectors = []
        for batch in undecoded_films(inputs):
            side = side_of(batch, task_metadata, prompt_type)
            instruction = self.instruction(task_metadata, side)
            with stored_films(batch) as stored:
                items = self.items(stored, instruction, side == "document")
                vectors.append(self.model.encode(items, batch_size=size, show_progress_bar=show))
        if not vectors:
            return np.zeros((0, getattr(self.model, "embedding_dim", 0)), dtype=np.float32)
        return np.concatenate([np.asarray(v, dtype=np.float32) for v in vectors])

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosine similarity, (N, M)."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosine similarity of row pairs, (N,)."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)

    @property
    def mteb_model_meta(self) -> ModelMeta:
        """mteb.ModelMeta of the loaded model."""
        return model_meta(self)


def side_of(batch: dict[str, list], task_metadata: Any, prompt_type: Any) -> str:
    """ "query" or "document": mteb's prompt type, or what the columns of a zero-shot classification's batch tell."""
    side = getattr(prompt_type, "value", prompt_type)
    if side:
        return side
    zero_shot = "zeroshot" in str(task_metadata.type).lower()
    shows = any(kind in getattr(task_metadata, "modalities", ()) for kind in ("image", "video"))
    says_only = not any(batch.get(kind) is not None for kind in ("image", "video"))
    return "document" if zero_shot and shows and says_only else "query"


def undecoded_films(inputs: Iterable[dict[str, list]]) -> Iterable[dict[str, list]]:
    """mteb's loader, its films as files: {"bytes": ..., "path": ...}. A loader without films is given back."""
    features = getattr(getattr(inputs, "dataset", None), "features", None) or {}
    if type(features.get("video")).__name__ != "Video":
        return inputs
    from datasets import Video
    from torch.utils.data import DataLoader

    files = inputs.dataset.cast_column("video", Video(decode=False))
    return DataLoader(files, batch_size=inputs.batch_size, collate_fn=columns_of)


def columns_of(rows: list[dict]) -> dict[str, list]:
    return {name: [row[name] for row in rows] for name in rows[0]}


@contextmanager
def stored_films(batch: dict[str, list]) -> Iterator[dict[str, list]]:
    """The batch with films that are bytes in files of their own while it is in use."""
    films = batch.get("video") or []
    if not any(isinstance(film, dict) and film.get("bytes") for film in films):
        yield batch
        return
    with tempfile.TemporaryDirectory() as folder:
        stored = []
        for number, film in enumerate(films):
            if isinstance(film, dict) and film.get("bytes"):
                path = Path(folder, f"{number}{Path(film.get('path') or '.mp4').suffix}")
                path.write_bytes(film["bytes"])
                film = {"path": str(path)}
            stored.append(film)
        yield {**batch, "video": stored}


def film_of(video: Any) -> Any:
    """What `VLM2Vec.encode` takes: a film's path, or PIL frames from mteb's (T, C, H, W) tensor; lists are passed on."""
    if isinstance(video, dict):
        return video["path"]
    if isinstance(video, (str, os.PathLike)):
        return video
    if not hasattr(video, "ndim"):
        return list(video)
    from PIL import Image

    array = np.asarray(video)
    array = array.transpose(0, 2, 3, 1) if array.shape[1] == 3 else array
    if array.dtype != np.uint8:
        array = (array * 255 if array.max(initial=0) <= 1 else array).clip(0, 255).round().astype(np.uint8)
    return [Image.fromarray(frame) for frame in array]


def model_meta(encoder: MTEBEncoder) -> ModelMeta:
    """ModelMeta: name "organisation/model", size, modalities, width; mteb asks for a slash in the name."""
    from mteb.models import ModelMeta

    name = encoder.name.rstrip("/")
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    name = "/".join(parts[-2:]) if len(parts) > 1 else f"local/{parts[0] if parts else 'model'}"
    model = encoder.model
    count = sum(p.numel() for p in model.parameters()) if hasattr(model, "parameters") else None
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20 if count else None
    return ModelMeta(
        loader=MTEBEncoder,
        name=name,
        revision=encoder.revision,
        release_date=None,
        languages=None,
        n_parameters=count,
        memory_usage_mb=size,
        max_tokens=None,
        embed_dim=getattr(model, "embedding_dim", None),
        license=None,
        open_weights=True,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch", "Transformers"],
        similarity_fn_name="cosine",
        use_instructions=encoder.use_instructions,
        training_datasets=None,
        modalities=list(MODALITIES),
    )
