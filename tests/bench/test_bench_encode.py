"""The encode benchmark's inputs are the stated mix, and its peers agree before anything is timed."""

import pytest
import torch

from bench import encode, models


def test_the_mix_is_what_it_says():
    for size in models.SAMPLES:
        data = models.inputs(size)
        kinds = ["text" if isinstance(x, str) else "both" if "text" in x else "image" for x in data]
        assert [round(kinds.count(k) / len(kinds), 1) for k in ("text", "image", "both")] == [0.3, 0.5, 0.2]
        assert all(10 <= len(x) <= 60 for x in data if isinstance(x, str))  # one token a letter
        assert len({x["image"].size for x in data if not isinstance(x, str)}) >= 5


def test_every_peer_gives_the_same_vectors(tmp_path, monkeypatch):
    monkeypatch.setitem(models.SIZES, "tiny", ((32, 1, 2, 1, 48, 512), (32, 1, 2)))
    monkeypatch.setattr(models, "IMAGES", [(56, 56), (112, 56), (84, 140)])
    monkeypatch.setitem(models.SAMPLES, "tiny", 20)
    models.write("tiny", str(tmp_path))
    rows = {peer: encode.measured(peer, "tiny", str(tmp_path), repeat=1) for peer in ("packed", "reference", "sorted-padded")}
    vectors = {peer: torch.load(row["vectors"], weights_only=True) for peer, row in rows.items()}
    for peer in ("reference", "sorted-padded"):
        torch.testing.assert_close(vectors[peer], vectors["packed"], atol=1e-5, rtol=0)
    assert encode.verdicts("tiny", [{**r, "ms_p50": 1.0, "cpu_ms": 1.0} for r in rows.values()]) == [
        "tiny: packed is 1.00x as fast as reference, aim 1.3x"
    ]
    pytest.importorskip("sentence_transformers")
    assert encode.measured("st", "tiny", str(tmp_path), repeat=1)["end_to_end_ms_p50"] > 0


def test_hybrid_peers_give_the_same_vectors(tmp_path, monkeypatch):
    monkeypatch.setitem(models.HYBRIDS, "hybrid-tiny", ((32, 4, 2, 1, 32, 48, 512), (2, 16), (32, 1, 2)))
    monkeypatch.setattr(models, "IMAGES", [(64, 64), (112, 300)])
    monkeypatch.setitem(models.SAMPLES, "hybrid-tiny", 10)
    models.write("hybrid-tiny", str(tmp_path))
    rows = {peer: encode.measured(peer, "hybrid-tiny", str(tmp_path), repeat=1) for peer in encode.HYBRID_PEERS}
    vectors = [torch.load(row["vectors"], weights_only=True) for row in rows.values()]
    torch.testing.assert_close(*vectors, atol=1e-5, rtol=0)
    alike = [{**row, "ms_p50": 1.0, "cpu_ms": 1.0, "process_mib": 9, "before_mib": 1} for row in rows.values()]
    assert encode.verdicts("hybrid-tiny", alike) == ["hybrid-tiny: packed is 1.00x as fast as sorted-padded, aim 1.3x"]
    alike[0].update(ms_p50=0.5, cpu_ms=0.5, process_mib=10)
    assert encode.verdicts("hybrid-tiny", alike) == ["hybrid-tiny: packed grows by 9 MiB, sorted-padded by 8"]
