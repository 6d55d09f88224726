"""Large panels find unsafe rows by their sums: what comes out is what maxima give, to the bit."""

import pytest
import torch

pytest.importorskip("triton")

from contrastive_kernels import info_nce_value_and_grad, roofline
from contrastive_kernels.reference import info_nce_reference
from contrastive_kernels.triton import panel_sums as panel
from contrastive_kernels.triton.kernels import row_state
from tests.kernels.helpers.paths import force

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, D = 80, 32  # two tiles of rows, the last one ragged
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float64


def pairs(case: str):
    query, target = (torch.nn.functional.normalize(torch.randn(N, D, dtype=torch.float64), dim=1) for _ in range(2))
    options = dict(temperature=0.02)
    if case == "cold":  # the best logits of many rows are hundreds below 1 / temperature: sums are 0
        options["temperature"] = 0.002
    elif case == "hot":  # logits far above it: sums are infinite in float32
        query[60:70] *= 40
    elif case == "one hot row":
        query[72] *= 40
    elif case == "nothing left":  # a row without negatives has sum 0 as well
        options["target_ids"] = torch.zeros(N, dtype=torch.int64, device=DEVICE)
    elif case == "not a number":
        query[3, 5] = float("nan")
    elif case == "two blocks":
        options |= dict(query_negatives=True, temperature=0.004)
    return query.to(DTYPE).to(DEVICE), target.to(DTYPE).to(DEVICE), options


CASES = ["safe", "cold", "hot", "one hot row", "nothing left", "not a number", "two blocks"]


@pytest.mark.parametrize("case", CASES)
def test_as_with_maxima_to_the_bit(case, monkeypatch):
    query, target, options = pairs(case)
    force(monkeypatch, "exp", rows=70)  # two panels, of two tiles and of one
    results, asked = {}, []
    launcher = panel.exp_panel
    monkeypatch.setattr(panel, "exp_panel", lambda *args, **kwargs: asked.append(kwargs) or launcher(*args, **kwargs))
    for least in (0, 1 << 60):
        monkeypatch.setattr(roofline, "SUMS_ALONE", least)
        results[least] = info_nce_value_and_grad(query, target, backend="triton", **options)
        first = [kwargs for kwargs in asked if kwargs.get("redo") is None]
        assert first and all(kwargs["row_max"] == (least > 0) for kwargs in first)
        asked.clear()
    ours, maxima = results[0], results[1 << 60]
    for name in ("loss", "d_query", "d_target"):
        assert torch.equal(getattr(ours, name).nan_to_num(7.0), getattr(maxima, name).nan_to_num(7.0)), name
    if case == "not a number":
        assert ours.loss.isnan()
    elif DTYPE == torch.float64:
        truth = info_nce_reference(query, target, **options)
        torch.testing.assert_close(ours.loss, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "total, marked", [(1.0, 0), (1e-17, 0), (1e-18, 1), (0.0, 1), (1e28, 0), (1e29, 1), (float("inf"), 1), (float("nan"), 0)]
)
def test_which_sums_are_suspicious(total, marked):
    # e^-40 = 4.2e-18, e^65 = 1.7e28; a NaN is seen in the loss, and no shift would mend it
    parts = torch.full((2, 40), 0.5, device=DEVICE)
    parts[:, 37] = total / 2
    shift = torch.zeros(40, device=DEVICE)
    assert row_state.mark_by_sums(parts, shift, 16).tolist() == [0, 0, marked]
    shift[37] = float("inf")  # takes no part
    assert row_state.mark_by_sums(parts, shift, 16).tolist() == [0, 0, 0]


def test_statistics_need_maxima():
    assert roofline.by_sums(16_384, 16_384, False, False)
    assert not roofline.by_sums(16_384, 16_384, False, True) and not roofline.by_sums(16_384, 16_384, True, False)
    assert not roofline.by_sums(4096, 4096, False, False)  # two launches would cost more
