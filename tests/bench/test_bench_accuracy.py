"""`python -m bench accuracy` at a small size: loss and gradients as near to float64 as is claimed, and verdicts that can fail."""

import pytest
import torch

from bench import accuracy, tables
from bench.peers import emulated
from contrastive_kernels import info_nce_value_and_grad
from contrastive_kernels.eager import sweep as panels
from tests.kernels.helpers import products


def arguments(tmp_path, *words):
    parser = tables.parser("accuracy", accuracy.__doc__)
    accuracy.add_arguments(parser)
    return parser.parse_args(["--rows", "256", "--width", "256", "--csv", str(tmp_path / "accuracy.csv"), *words])


@pytest.fixture(params=products.FLOAT32_WAYS)
def way(request, monkeypatch):
    """Either library's products, on any processor; 256 rows and columns are what oneDNN would leave uncut."""
    products.force(monkeypatch, request.param, small=False)


# Over eight seeds the greatest ratio to eager's error is 0.61 to 0.76 (aim 1.25) and the geometric mean 0.46 to 0.60 (aim 1), over 48 seeds
# by eights and either way; over two it is 0.57 to 1.06.
SEEDS = ("--seeds", "8")


def test_every_aim_is_met(way, tmp_path, capsys):
    assert accuracy.run(arguments(tmp_path, "--dtypes", "float32", *SEEDS)) == 0
    printed = capsys.readouterr().out
    assert "MISS" not in printed and printed.count("PASS  float32") == 6 and printed.count("PASS  finite") == 32


def test_aims_for_bfloat16_are_met(tmp_path, capsys):
    """At 0.0001 of eager's error, where 0.1 is the aim."""
    assert accuracy.run(arguments(tmp_path, "--dtypes", "bfloat16", "--seeds", "2")) == 0
    assert capsys.readouterr().out.count("PASS  bfloat16") == 2


def float32_rows(tmp_path):
    return accuracy.rows_of(arguments(tmp_path, "--dtypes", "float32", "--temperatures", "0.01", "0.1", *SEEDS))


@pytest.mark.parametrize("part", accuracy.PARTS)
def test_one_part_that_is_worse_is_seen(part, tmp_path):
    """Three times the error of what is measured here."""
    rows = float32_rows(tmp_path)
    assert all(good for good, _ in accuracy.verdicts(rows))
    worse = [row | {f"{part}_error": 3 * row[f"{part}_error"]} if row["name"] == "ours" else row for row in rows]
    assert {sentence.split(":")[0] for good, sentence in accuracy.verdicts(worse) if not good} == {f"float32 {part}"}


def test_products_that_are_worse_are_seen(tmp_path, monkeypatch):
    """Candidates that have lost five bits of their 24, as TF32 has lost thirteen."""
    real = panels.product_into
    monkeypatch.setattr(
        panels, "product_into", lambda out, a, b: real(out, ((a.contiguous().view(torch.int32) + 16) & ~31).view(torch.float32), b)
    )
    missed = [sentence for good, sentence in accuracy.verdicts(float32_rows(tmp_path)) if not good]
    assert any("d_query" in sentence for sentence in missed) and any("d_target" in sentence for sentence in missed)


@pytest.mark.parametrize("peer", [emulated.inf_cl, emulated.cce_exact, emulated.liger])
def test_peers_are_emulated_up_to_what_they_round(peer):
    for dtype, allowed in ((torch.float32, 2e-3 if peer is emulated.inf_cl else 2e-6), (torch.bfloat16, 0.02)):
        query, target = accuracy.embeddings("isotropic", 64, 32, dtype)
        made = peer(query, target, 0.1)
        errors = [accuracy.relative(a, b) for a, b in zip(made, accuracy.truth(query, target, 0.1))]
        assert 0 < max(errors) < allowed, errors
        assert made[1].dtype == made[2].dtype == dtype and made[0].dtype == torch.float32


@pytest.mark.parametrize("products_of", products.FLOAT32_WAYS)
@pytest.mark.parametrize("temperature", [0.02, 0.1])
@pytest.mark.parametrize("kind", ["isotropic", "crowded"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_at_a_tenth_of_eagers_error(products_of, dtype, kind, temperature, monkeypatch):
    products.force(monkeypatch, products_of)
    query, target = accuracy.embeddings(kind, 256, 96, dtype)
    expected = accuracy.truth(query, target, temperature)
    q, t = query.clone().requires_grad_(), target.clone().requires_grad_()
    torch.nn.functional.cross_entropy(q @ t.T / temperature, torch.arange(len(q))).backward()
    ours = info_nce_value_and_grad(query, target, temperature=temperature, grad_dtype=torch.float32)
    for got, eager, true in zip((ours.d_query, ours.d_target), (q.grad, t.grad), expected[1:]):
        assert accuracy.relative(got, true) <= 0.1 * accuracy.relative(eager, true)
    assert accuracy.relative(ours.loss, expected[0]) < 1e-6
