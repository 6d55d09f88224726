"""`python -m bench accuracy` at a small size: loss and gradients as near to float64 as is claimed, and verdicts that can fail."""

import argparse

from bench import accuracy


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
