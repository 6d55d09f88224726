"""From inputs to vectors, shard by shard: media are decoded once, towers run once per picture, alike beginnings are computed once.

While the model runs on one shard, threads read the next. Pictures wait as 8-bit pixels and become floats a chunk at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch

from contrastive_kernels.gradcache.chunking import token_budget_chunks
from vlm2vec.encoding import MAX_CHUNK_TOKENS, chunks, with_prompt
from vlm2vec.evaluation.encode.prefixes import families, family_chunks, pack_families
from vlm2vec.evaluation.tasks.task_data import whole
from vlm2vec.inputs import SETTING_KEYS
from vlm2vec.packing import Features, PackedBatch

BLOCK = 32  # texts that a thread prepares in one go
# Tokens of a chunk, on a CPU below `MAX_CHUNK_TOKENS`: what layers hand on stays in its caches, and is not asked of the system anew.
TOWER_TOKENS, DECODER_TOKENS = {**MAX_CHUNK_TOKENS, "cpu": 1024}, {**MAX_CHUNK_TOKENS, "cpu": 2048}
Made = Features | str  # an input's features, or why it has none


def _budget(tokens: dict[str, int], kind: str) -> int:
    return tokens.get(kind, tokens["cuda"])


def _encode(model, inputs, batch_size, prompt):
    """`model.encode` for models that are not VLM2Vec; what cannot be decoded is found one by one."""
    options = {"batch_size": batch_size, "convert_to_tensor": True, "show_progress_bar": False}
    if prompt is not None:
        options["prompt"] = prompt
    try:
        return list(range(len(inputs))), torch.as_tensor(model.encode(inputs, **options)), {}
    except (ValueError, OSError) as error:
        failures = {}
        for i, item in enumerate(inputs):
            try:
                model.preprocess([item])
            except (ValueError, OSError) as reason:
                failures[i] = str(reason)
        if not failures:
            raise error
    good = [i for i in range(len(inputs)) if i not in failures]
    vectors = torch.as_tensor(model.encode([inputs[i] for i in good], **options)) if good else torch.empty(0, 0)
    return good, vectors, failures


class Encoder:
    """Shard after shard. `run` takes the shards and, beside each input, the content key of its visuals (b"" without any).

    Yields of `run`: (good, vectors, failures) per shard: indices that were encoded, their (n, D) vectors, {index: reason} of
    inputs that cannot be decoded. An error that no single input explains is raised as it came.
    """

    def __init__(self, model: Any, batch_size: int = 32, prompt: str | None = None, workers: int | None = None):
        self.model, self.batch_size, self.prompt = model, batch_size, prompt
        self.workers = workers or min(8, os.cpu_count() or 1)
        self.staged = hasattr(model, "processing") and hasattr(model, "pack")
        self.cut: list[int] = []  # rows of the shard that was yielded last whose texts were cut to the model's limit

    def run(
        self, shards: list[list[dict[str, Any]]], groups: list[list[bytes]]
    ) -> Iterator[tuple[list[int], torch.Tensor, dict[int, str]]]:
        if not self.staged:
            for inputs in shards:
                yield _encode(self.model, [whole(x) for x in inputs], self.batch_size, self.prompt)
            return
        with ThreadPoolExecutor(self.workers) as pool:
            coming = self._submit(pool, shards[0], groups[0]) if shards else []
            for i in range(len(shards)):
                made: dict[int, Made] = {}
                while coming:  # what has been taken is held once
                    rows, future = coming.pop()
                    made.update(zip(rows, future.result()))
                coming = self._submit(pool, shards[i + 1], groups[i + 1]) if i + 1 < len(shards) else []
                yield self._forward(made, groups[i])

    # -- reading, in threads ----------------------------------------------------------------------------------------------

    def _submit(self, pool: ThreadPoolExecutor, inputs: list[dict], groups: list[bytes]) -> list[tuple[list[int], Future]]:
        """[(rows, their features to come)]: the inputs of one picture are read together, texts in blocks."""
        inputs = [whole(x) for x in inputs]
        together: dict[bytes, list[int]] = {}
        for row, group in enumerate(groups):
            together.setdefault(group, []).append(row)
        texts = together.pop(b"", [])
        parts = [*together.values(), *(texts[at : at + BLOCK] for at in range(0, len(texts), BLOCK))]
        prompted = with_prompt(self.model, inputs, self.prompt)
        return [
            (rows, pool.submit(self._read, [prompted[row] for row in rows], self._measurable([inputs[row] for row in rows])))
            for rows in reversed(parts)
        ]

    def _measurable(self, inputs: list[dict]) -> bool:
        """Whether these inputs' media can be laid out by their headers and decoded apart; some bring settings of their own."""
        return self.model.processing.from_headers and not any(x.get(name) is not None for x in inputs for name in SETTING_KEYS)

    def _read(self, inputs: list[Any], measurable: bool) -> list[Made]:
        if measurable:
            try:
                return self._decoded_once([self.model.processing.measure(x) for x in inputs])
            except (ValueError, OSError):  # one of them, or a picture that is not what its header says: each for itself
                pass
        return [self._whole(x) for x in inputs]

    def _decoded_once(self, measured: list[Features]) -> list[Made]:
        """Features of inputs of one picture, of which the first holds its 8-bit pixels."""
        waiting = [f for f in measured if f.pending]
        if waiting:
            decoded = self.model.processing.decode(waiting[0])
            if decoded["pixel_values"].dtype != torch.uint8:
                raise ValueError("pixels that are no bytes")
            waiting[0].vision = {**waiting[0].vision, **decoded}
        for features in waiting:
            features.pending = []
        return measured

    def _whole(self, x: Any) -> Made:
        try:
            return self.model.processing(x)
        except (ValueError, OSError) as reason:
            return str(reason)

    # -- the model --------------------------------------------------------------------------------------------------------

    def _forward(self, made: dict[int, Made], groups: list[bytes]) -> tuple[list[int], torch.Tensor, dict[int, str]]:
        failures = {row: reason for row, reason in made.items() if isinstance(reason, str)}
        good = sorted(row for row in made if row not in failures)
        self.cut = [row for row in good if made[row].cut]
        features, keys = [made[row] for row in good], [groups[row] for row in good]
        kind = self.model.device.type
        seen = self._towers(features, keys)
        vectors = torch.empty(len(good), self.model.embedding_dim)
        for rows, packed, visuals in self._chunks(features, keys, seen, kind):
            vectors[rows] = torch.nn.functional.normalize(self.model(packed, vision_features=visuals).float(), dim=-1).cpu()
        return good, vectors, failures

    def _chunks(self, features: list[Features], keys: list[bytes], seen: dict[bytes, torch.Tensor], kind: str):
        """(rows, packed chunk on the device, its vision features) of all rows; `seen` is the towers' work."""
        model = self.model
        if not seen and any(f.vision for f in features):  # the tower is part of the family's forward
            for rows in chunks([f.length for f in features], self.batch_size, kind):
                yield rows, self._on_device([features[row] for row in rows]), None
            return
        bare = [replace(f, vision={}) if f.vision else f for f in features]
        if bare and model.backbone.shares_prefixes(model.model) and model.pack(bare[:1]).segments.provider == "sdpa":
            for chunk in family_chunks(families(bare, keys), _budget(DECODER_TOKENS, kind), self.batch_size):
                packed, rows = pack_families(chunk, bare, model.pack)
                visuals = [seen[keys[family.rows[0]]] for family in chunk if features[family.rows[0]].vision]
                yield rows, packed.to(model.device), torch.cat(visuals) if visuals else None
            return
        for rows in token_budget_chunks([f.length for f in bare], _budget(DECODER_TOKENS, kind), max_rows=self.batch_size):
            visuals = [seen[keys[row]] for row in rows if features[row].vision]
            yield rows, model.pack([bare[row] for row in rows]).to(model.device), torch.cat(visuals) if visuals else None

    def _towers(self, features: list[Features], keys: list[bytes]) -> dict[bytes, torch.Tensor]:
        """{group: vision features}, each picture once; {} for families whose tower is part of the model's forward."""
        distinct: dict[bytes, Features] = {}
        for f, key in zip(features, keys):
            if f.vision and (key not in distinct or "pixel_values" not in distinct[key].vision):
                distinct[key] = f
        names, out = list(distinct), {}
        budget = _budget(TOWER_TOKENS, self.model.device.type)
        for rows in token_budget_chunks([distinct[name].length for name in names], budget, max_rows=self.batch_size):
            chunk = [distinct[names[row]] for row in rows]
            made = self.model.vision(self._on_device(chunk))
            if made is None:
                return {}
            out.update(zip((names[row] for row in rows), made.split([len(f.visual_index) for f in chunk])))
            for row in rows:
                distinct.pop(names[row]).vision.pop("pixel_values", None)  # seen, and held no longer
        return out

    def _on_device(self, chunk: list[Features]) -> PackedBatch:
        """The packed chunk, its 8-bit pixels as the tower takes them."""
        kinds = {f.vision["pixel_values"].dtype for f in chunk if isinstance(f.vision.get("pixel_values"), torch.Tensor)}
        if len(kinds) > 1:  # pictures that were read whole beside some that wait as bytes; a chunk's are joined
            chunk = [self._floats(f) for f in chunk]
        packed = self.model.pack(chunk).to(self.model.device)
        if kinds != {torch.uint8}:
            return packed
        pixels = packed.vision["pixel_values"]
        processing = self.model.processing
        if isinstance(pixels, torch.Tensor) and hasattr(processing, "normalised_once"):
            floats = processing.normalised_once(pixels)
        else:  # films beside pictures differ in the width of a patch
            parts = pixels if isinstance(pixels, list) else [pixels]
            floats = [processing.normalised(part, packed.vision) for part in parts]
            floats = torch.cat(floats) if len(floats) > 1 else floats[0]
        return replace(packed, vision={**packed.vision, "pixel_values": floats})

    def _floats(self, features: Features) -> Features:
        pixels = features.vision.get("pixel_values")
        if not isinstance(pixels, torch.Tensor) or pixels.dtype != torch.uint8:
            return features
        return replace(features, vision={**features.vision, "pixel_values": self.model.processing.normalised(pixels, features.vision)})
