"""What takes plain torch although a GPU was there is said once, with its reason; what was asked for by name is refused instead."""

import logging

import pytest
import torch

pytest.importorskip("triton")

from contrastive_kernels import info_nce, sigmoid_loss, topk, topk_similarity
from contrastive_kernels.core import backend, backends
from contrastive_kernels.eager.backend import EAGER
from contrastive_kernels.triton.backend import TRITON


@pytest.fixture(autouse=True)
def nothing_said():
    backend.log_once.cache_clear()
    yield
    backend.log_once.cache_clear()


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == backend.logger.name]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is what stands in the way")
def test_once_with_its_reason(caplog):
    caplog.set_level(logging.WARNING)
    for _ in range(3):
        assert backends.choose("auto", torch.bfloat16, torch.device("cuda")) is EAGER
    assert len(said(caplog)) == 1 and "TRITON_INTERPRET" in said(caplog)[0]
    with pytest.raises(ValueError, match="TRITON_INTERPRET.*use backend='auto' or 'torch'"):
        backends.choose("triton", torch.bfloat16, torch.device("cuda"))


@pytest.mark.parametrize(
    "capability, chosen", [((7, 5), "torch"), ((8, 0), "triton"), ((8, 9), "triton"), ((9, 0), "triton"), ((12, 0), "triton")]
)
def test_a_gpu_without_bfloat16_takes_torch(capability, chosen, caplog, monkeypatch):
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr("contrastive_kernels.triton.kernels.common.INTERPRET", False)
    monkeypatch.setattr("contrastive_kernels.triton.available", lambda: (True, ""))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert backends.choose("auto", torch.bfloat16, torch.device("cuda")).name == chosen
    assert said(caplog) == [] if chosen == "triton" else "compute capability 7.5" in said(caplog)[0]


def test_another_reason_is_said_too(caplog, monkeypatch):
    caplog.set_level(logging.WARNING)
    for reason in ("one", "one", "two"):
        monkeypatch.setattr(backends, "obstacle", lambda *args: reason)
        backends.choose("auto", torch.bfloat16, torch.device("cuda"))
    assert len(said(caplog)) == 2


def test_plain_torch_on_a_cpu_is_no_fallback(caplog):
    caplog.set_level(logging.WARNING)
    assert backends.choose("auto", torch.bfloat16, torch.device("cpu")) is EAGER
    assert backends.choose("torch", torch.bfloat16, torch.device("cuda")) is EAGER
    assert not said(caplog)


def test_more_neighbours_than_the_kernel_keeps(caplog, monkeypatch):
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(topk, "choose", lambda *args: TRITON)
    query, target = torch.randn(2, 8), torch.randn(200, 8)
    for _ in range(2):
        scores, _ = topk_similarity(query, target, 150)
    assert torch.allclose(scores, (query @ target.T).topk(150).values, atol=1e-5)
    assert said(caplog) == ["contrastive_kernels: backend='auto' takes torch: topk_similarity with k=150, and the kernel keeps at most 128"]


def test_sigmoid_in_float32(caplog, monkeypatch):
    caplog.set_level(logging.WARNING)
    taken = []
    monkeypatch.setattr("contrastive_kernels.core.sigmoid.choose", lambda *args: TRITON)
    monkeypatch.setattr("contrastive_kernels.triton.backend.INTERPRET", False)
    monkeypatch.setattr("contrastive_kernels.eager.sigmoid.add_columns", lambda *args: taken.append("torch"))
    monkeypatch.setattr("contrastive_kernels.triton.kernels.sigmoid_panel.add_columns", lambda *args: taken.append("triton"))
    for dtype in (torch.float32, torch.bfloat16):
        sigmoid_loss(torch.randn(4, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype), scale=10.0, bias=-10.0)
    assert taken == ["torch", "triton"]
    assert len(said(caplog)) == 1 and "float32" in said(caplog)[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="float64 runs under the interpreter")
def test_mixed_types_meet_in_the_wider():
    query, target = torch.randn(6, 16, dtype=torch.bfloat16), torch.randn(6, 16)
    with torch.autocast("cpu"):
        got = info_nce(query, target, normalize=True, backend="triton")
    torch.testing.assert_close(got, info_nce(query.float(), target, normalize=True, backend="torch"))


@pytest.mark.parametrize("wide", ["query", "target"])
@pytest.mark.parametrize(
    "call",
    [info_nce, lambda q, t, **k: info_nce(q, t, matryoshka_dims=(4, 8), **k), lambda q, t, **k: topk_similarity(q, t, 2, **k)],
    ids=["loss", "levels", "topk"],
)
def test_the_wider_of_two_types_decides(call, wide, monkeypatch):
    """Under autocast they may differ; the kernels' products are in the wider one, which may be one that they do not have."""
    monkeypatch.setattr(backends, "obstacle", lambda dtype, device: f"asked for {dtype}")
    query, target = (torch.randn(4, 8, dtype=torch.float64 if name == wide else torch.bfloat16) for name in ("query", "target"))
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="asked for torch.float64"):
        call(query, target, backend="triton")
