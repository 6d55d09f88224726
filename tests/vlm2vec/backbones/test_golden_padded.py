"""The reference's embeddings of every golden folder: packed whatever the company is, and padded on either side."""

import pytest
import torch

from tests.helpers.golden_files import as_input, read
from tests.helpers.padded_by_hand import padded_rows
from tests.helpers.versions import needs_pillow_13
from vlm2vec.model import VLM2Vec

# folder: (options, its mixed batch: where the items are, name of the expected embeddings)
BATCHES = {
    "qwen2_vl": ({}, lambda cases: cases["items"], "embeddings"),
    "llava_next": ({"resolution": "low"}, lambda cases: cases["batches"]["images_low"]["items"], "images_low.embeddings"),
    "phi3_v": ({}, lambda cases: cases["batches"]["mixed"]["items"], "mixed.embeddings"),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_pillow_13 if name == "qwen2_vl" else ()) for name in sorted(BATCHES)])
def test_padded_and_packed(golden, name):
    folder, cases, expected = read(golden, name)
    options, items, key = BATCHES[name]
    model = VLM2Vec.from_pretrained(folder, **options)
    rows = [as_input(folder, item) for item in items(cases)]
    assert len(rows) > 3 and any("image" in row for row in rows)
    made = {side: padded_rows(model, rows, side) for side in ("left", "right")}
    with torch.no_grad():
        made["packed"] = model(model.pack(model.preprocess(rows)))
        made["packed alone"] = torch.cat([model(model.pack(model.preprocess([row]))) for row in rows])
    for way, hidden in made.items():
        ours = torch.nn.functional.normalize(hidden, dim=-1)
        torch.testing.assert_close(ours, expected[key], atol=1e-5, rtol=0, msg=lambda m: f"{way}: {m}")
