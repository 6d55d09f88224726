"""Qwen3.5's backbone on ids, positions and pixels of WeMM-Embedding's own code: its 41 cases, alone and packed.

The set lies beside the repository (shared/golden/wemm_a), since it holds its authors' files; without it there is nothing to compare.
"""

import pytest
import torch

from tests.helpers.golden_files import read
from tests.helpers.repository import ROOT
from tests.helpers.versions import needs_pillow_13
from tests.helpers.wemm_pixels import vision_of
from vlm2vec.backbones import backbone_for
from vlm2vec.checkpoint.loading import load_module, read_json
from vlm2vec.packing import Features

PLACE = next((place for parent in ROOT.parents if (place := parent / "shared" / "golden").is_dir()), ROOT.parent)
SAME = 1e-5

pytestmark = pytest.mark.skipif(not (PLACE / "wemm_a").is_dir(), reason="shared/golden/wemm_a is not beside the repository")


@needs_pillow_13
def test_every_case_alone_and_packed():
    pytest.importorskip("av")
    folder, cases, expected = read(PLACE, "wemm_a")
    backbone = backbone_for("qwen3_5")
    config = backbone.config(str(folder), read_json(str(folder), "config.json"))
    module = load_module(backbone, str(folder), config, dtype=torch.float32, device=torch.device("cpu"))
    backbone.finish(module)
    features, names = [], [case["name"] for case in cases["cases"]]
    for case in cases["cases"]:
        ids = torch.tensor([value for value, count in case["input_ids_rle"] for _ in range(count)])
        vision = vision_of(folder, case, expected)
        places = ((ids == config.image_token_id) | (ids == config.video_token_id)).nonzero()[:, 0] if vision else None
        features.append(Features(ids, vision, places, expected.get(f"position_ids.{case['name']}")))
    assert len(features) == 41

    @torch.no_grad()
    def encode(rows):
        packed = backbone.pack(rows)
        return torch.nn.functional.normalize(backbone.last_hidden(module, packed, backbone.vision(module, packed)), dim=-1)

    truth = torch.stack([torch.nn.functional.normalize(expected[f"hidden.{name}"], dim=-1) for name in names])
    alone = torch.cat([encode([f]) for f in features])
    apart = (alone - truth).abs().amax(dim=1)
    assert apart.max() <= SAME, {name: float(a) for name, a in zip(names, apart) if a > SAME}
    some = [at for at, f in enumerate(features) if f.length < 5000]  # one film takes as long as all the others
    together = torch.cat([encode([features[at] for at in some[i : i + 8]]) for i in range(0, len(some), 8)])
    assert (together - alone[some]).abs().max() <= 1e-6
