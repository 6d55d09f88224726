"""Qwen3-VL-Embedding and WeMM-Embedding against their authors' own code: ids, positions, pixels, embeddings; errors by row.

The vectors lie beside the repository (`tests.helpers.golden_files.beside`), since they hold their authors' chat templates.
"""

import hashlib
import json
from functools import cached_property

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.golden_files import beside
from tests.helpers.versions import needs_pillow_13
from vlm2vec.model import VLM2Vec

pytestmark = needs_pillow_13
SETS = ("qwen3_vl_embedding_a", "wemm_a")
BATCHES = ("mixed", "texts", "images", "films")


class Golden:
    """One set, and the models with the options that its cases ask for."""

    def __init__(self, name):
        pytest.importorskip("av")
        self.folder = beside(name)
        self.about = json.loads((self.folder / "cases.json").read_text(encoding="utf-8"))
        self.cases = {case["name"]: case for case in self.about["cases"]}
        self.models = {}

    @cached_property
    def expected(self):
        return load_file(self.folder / "expected.safetensors")

    def located(self, x):
        """An input with its relative paths under the folder."""
        if isinstance(x, str):
            return str(self.folder / x) if x.startswith(("images/", "videos/")) else x
        if isinstance(x, dict):
            return {key: self.located(value) for key, value in x.items()}
        return [self.located(value) for value in x] if isinstance(x, list) else x

    def input(self, case):
        return self.located(case["input"] if "input" in case else case["messages"])

    def model(self, settings):
        """Fed as the folder itself tells; pictures lie as they are stored, as the authors read them."""
        key = json.dumps(settings, sort_keys=True)
        if key not in self.models:
            self.models[key] = VLM2Vec.from_pretrained(self.folder, dtype="float32", device="cpu", orientation="stored", **settings)
        return self.models[key]

    def model_of(self, case):
        limit = {"max_length": case["max_length"]} if "max_length" in case else {}
        return self.model({**case.get("settings", {}), **limit})


@pytest.fixture(scope="module", params=SETS)
def golden_set(request):
    return Golden(request.param)


def close(ours, theirs, atol=1e-5):
    torch.testing.assert_close(torch.as_tensor(ours), theirs, atol=atol, rtol=0)


def pixels_of(features, processing, kind):
    """Patches of the sample's pictures, or of its films."""
    token = processing.image_token_id if kind == "image" else processing.video_token_id
    seen, parts, at = 0, [], 0
    ids = features.input_ids[features.visual_index]
    for patches in features.vision["grid_thw"].prod(dim=1).tolist():
        if ids[seen] == token:
            parts.append(features.vision["pixel_values"][at : at + patches])
        seen, at = seen + patches // processing.merge**2, at + patches
    return torch.cat(parts)


@pytest.mark.filterwarnings("ignore:.*cut to:UserWarning")
def test_every_case_alone(golden_set):
    """Token ids, positions and pixels to the bit, embeddings within 1e-5; all faults are told, not the first."""
    faults = []
    for name, case in golden_set.cases.items():
        model = golden_set.model_of(case)
        assert model.options["feeding"] == "authors"
        (features,) = model.preprocess([golden_set.input(case)])
        if features.input_ids.tolist() != [token for token, count in case["input_ids_rle"] for _ in range(count)]:
            faults.append(f"{name}: token ids")
        positions = golden_set.expected.get(f"position_ids.{name}", torch.arange(features.length).expand(3, -1))
        ours = torch.arange(features.length) if features.position_ids is None else features.position_ids
        if not torch.equal(ours.expand(3, -1), positions):
            faults.append(f"{name}: positions")
        for kind, key in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if f"{key}_sha256" in case:
                pixels = pixels_of(features, model.processing, kind)
                if hashlib.sha256(pixels.numpy().tobytes()).hexdigest() != case[f"{key}_sha256"]:
                    faults.append(f"{name}: {key}")
        with torch.no_grad():
            embedding = torch.nn.functional.normalize(model(model.pack([features])), dim=-1)[0]
        error = (embedding - golden_set.expected[f"embedding.{name}"]).abs().max().item()
        if not error < 1e-5:
            faults.append(f"{name}: embedding differs by {error:.1e}")
    assert not faults, faults


@pytest.mark.parametrize("batch", BATCHES)
def test_in_a_batch_as_alone(golden_set, batch):
    names = golden_set.about["batches"][batch]["rows"]
    cases = [golden_set.cases[name] for name in names]
    assert not any(case.get("settings") for case in cases)
    model = golden_set.model({})
    inputs = [golden_set.input(case) for case in cases]
    close(model.encode(inputs), torch.stack([golden_set.expected[f"embedding.{name}"] for name in names]))
    for width in golden_set.about["mrl_dims"] if batch == "texts" else ():
        wanted = torch.stack([golden_set.expected[f"embedding_mrl{width}.{name}"] for name in names])
        close(model.encode(inputs, truncate_dim=width), wanted)


@pytest.mark.filterwarnings("ignore:.*cut to:UserWarning")
def test_what_spoils_their_batch_names_our_row(golden_set):
    errors = golden_set.about["errors"]
    good = {"text": "A dog."}
    for name, error in errors.items():
        if name.startswith("dimension"):
            with pytest.raises(ValueError, match="truncate_dim=17: expected one of 16, 32, 64, 96"):
                golden_set.model({}).encode([good], truncate_dim=17)
            continue
        inputs = error["inputs"] if "inputs" in error else [error["messages"]]
        said = {"missing": r"not_there\.png: no such file", "frames_": "expected one size", "image_t": "max_length=20: expected room"}
        bad = next(at for at, x in enumerate(inputs) if isinstance(x, list) or {"image", "video"} & set(x))
        with pytest.raises(ValueError, match=rf"^input {bad + 1}: .*{said[name[:7]]}"):
            golden_set.model(error.get("settings", {})).encode([good, *golden_set.located(inputs)])
