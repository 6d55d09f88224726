"""The encode benchmark's inputs are the stated mix, and its arms agree before anything is timed."""

import pytest
import torch

from bench.encode import models as encode_models
from bench.encode import run as encode


def test_the_mix_is_what_it_says():
    for size in encode_models.SIZES:
        data = encode_models.inputs(size)
        kinds = ["text" if isinstance(x, str) else "both" if "text" in x else "image" for x in data]
        assert [round(kinds.count(k) / len(kinds), 1) for k in ("text", "image", "both")] == [0.3, 0.5, 0.2]
        assert all(10 <= len(x) <= 60 for x in data if isinstance(x, str))  # one token a letter
        assert len({x["image"].size for x in data if not isinstance(x, str)}) >= 5


def test_every_arm_gives_the_same_vectors(tmp_path, monkeypatch):
    monkeypatch.setitem(encode_models.SIZES, "tiny", ((32, 1, 2, 1, 48, 512), (32, 1, 2)))
    monkeypatch.setattr(encode_models, "IMAGES", [(56, 56), (112, 56), (84, 140)])
    monkeypatch.setitem(encode_models.SAMPLES, "tiny", 20)
    encode_models.write("tiny", str(tmp_path))
    rows = {arm: encode.measure(arm, "tiny", str(tmp_path), repeat=1) for arm in ("packed", "reference", "sorted-padded")}
    vectors = {arm: torch.load(row["vectors"], weights_only=True) for arm, row in rows.items()}
    for arm in ("reference", "sorted-padded"):
        torch.testing.assert_close(vectors[arm], vectors["packed"], atol=1e-5, rtol=0)
    assert encode.verdicts("tiny", [{**r, "p50_ms": 1.0, "cpu_ms": 1.0} for r in rows.values()]) == [
        "tiny: packed is 1.00x as fast as reference, aim 1.3x"
    ]
    pytest.importorskip("sentence_transformers")
    assert encode.measure("st", "tiny", str(tmp_path), repeat=1)["end_to_end_p50_ms"] > 0
