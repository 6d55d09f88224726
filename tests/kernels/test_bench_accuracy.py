"""`python -m bench accuracy` at a small size: loss and gradients as near to float64 as is claimed, and verdicts that can fail."""

import argparse

import pytest
import torch

from bench import accuracy, emulated


def arguments(tmp_path, *words):
    parser = argparse.ArgumentParser()
    accuracy.add_arguments(parser)
    return parser.parse_args(["--rows", "256", "--width", "256", "--csv", str(tmp_path / "accuracy.csv"), *words])


def test_every_aim_is_met(tmp_path, capsys):
    assert accuracy.run(arguments(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "MISS" not in printed and printed.count("PASS  float32") == 6 and printed.count("PASS  bfloat16") == 2


def test_a_loss_that_is_worse_is_seen(tmp_path, monkeypatch):
    """As much worse as logits that are rounded once more."""
    rows = accuracy.rows_of(arguments(tmp_path, "--dtypes", "float32", "--temperatures", "0.01", "0.1", "--seeds", "2"))
    assert all(good for good, _ in accuracy.verdicts(rows))
    worse = [row | {"loss_error": 2e-6} if row["name"] == "ours" else row for row in rows]
    assert not all(good for good, _ in accuracy.verdicts(worse))


@pytest.mark.parametrize("peer", [emulated.inf_cl, emulated.cce_exact, emulated.liger])
def test_peers_are_emulated_up_to_what_they_round(peer):
    for dtype, allowed in ((torch.float32, 2e-3 if peer is emulated.inf_cl else 2e-6), (torch.bfloat16, 0.02)):
        query, target = accuracy.embeddings("isotropic", 64, 32, dtype)
        made = peer(query, target, 0.1)
        errors = [accuracy.relative(a, b) for a, b in zip(made, accuracy.truth(query, target, 0.1))]
        assert 0 < max(errors) < allowed, errors
        assert made[1].dtype == made[2].dtype == dtype and made[0].dtype == torch.float32
