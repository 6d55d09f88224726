"""Distillation with the kernels: value and gradients of the dense definition, in one panel and in several, 16-bit types, launched work."""

import gc

import pytest
import torch

pytest.importorskip("triton")

from contrastive_kernels import distillation_loss
from contrastive_kernels.reference import distillation_loss_reference
from contrastive_kernels.roofline import distillation as roofline
from contrastive_kernels.roofline import for_arch as gpu_for_arch
from contrastive_kernels.triton import configs, distillation, launch_log
from contrastive_kernels.triton.backend import TRITON
from contrastive_kernels.triton.kernels.distil_panel import Cosines, distil_reduce
from tests.kernels.helpers.peak_bytes import distillation_scratch as scratch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRUTH = torch.float64 if DEVICE == "cpu" else torch.float32
TIGHT = dict(rtol=1e-11, atol=1e-12) if TRUTH == torch.float64 else dict(rtol=1e-4, atol=1e-5)
TILE = configs.Tile(8, 32, 1, 4, 1)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(configs, "DISTIL_REDUCE", TILE)
    monkeypatch.setattr(configs, "DISTIL_WRITE", TILE)


def embeddings(n, m, dtype=TRUTH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    out = []
    for width in (12, 20):
        query, target = (torch.randn(rows, width, generator=generator, dtype=torch.float64) for rows in (n, m))
        target[: min(n, m)] += query[: min(n, m)]
        out += [torch.nn.functional.normalize(x, dim=1).to(dtype).to(DEVICE) for x in (query, target)]
    return out


def value_and_gradients(function, matrices, *, temperature=0.05, **options):
    query, target, *teacher = (x.clone() for x in matrices)
    # in 16 bits a temperature would be another one
    held = torch.tensor(temperature, dtype=torch.promote_types(query.dtype, torch.float32), device=DEVICE, requires_grad=True)
    leaves = [query.requires_grad_(), target.requires_grad_(), held]
    loss = function(*leaves[:2], *teacher, temperature=leaves[2], **options)
    return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)


@pytest.mark.parametrize("rows", [100, 3], ids=["one panel", "panels"])
@pytest.mark.parametrize(
    "options",
    [{}, {"symmetric": True, "normalize": True}, {"temperature": 0.004, "teacher_temperature": 0.003}, {"reduction": "none"}],
    ids=str,
)
@pytest.mark.parametrize("n, m", [(7, 7), (9, 4), (5, 40), (1, 1)])
def test_value_and_gradients(n, m, options, rows, monkeypatch):
    if options.get("reduction") == "none":
        options = options | {"weight": torch.linspace(0, 2, n, device=DEVICE)}
    monkeypatch.setattr(distillation, "panel_rows", lambda *a: rows)
    matrices = embeddings(n, m)
    ours = value_and_gradients(distillation_loss, matrices, backend="triton", **options)
    truth = value_and_gradients(distillation_loss_reference, matrices, **options)
    for name, got, expected in zip(("loss", "d query", "d target", "d temperature"), ours, truth):
        torch.testing.assert_close(got, expected, **TIGHT, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.1, 0.02])  # with the second rows are sure of their own target
def test_sixteen_bits(dtype, temperature):
    matrices = embeddings(24, 24, dtype)
    options = {"temperature": temperature, "teacher_temperature": temperature}
    ours = value_and_gradients(distillation_loss, matrices, backend="triton", **options)
    truth = value_and_gradients(distillation_loss_reference, [x.double() for x in matrices], **options)
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-5, atol=1e-9)
    for got, expected in zip(ours[1:3], truth[1:3]):
        assert (got.double() - expected).norm() <= 2 * torch.finfo(dtype).eps * expected.norm()


def test_a_row_without_candidates_and_a_nan():
    cos = torch.randn(3, 1, dtype=TRUTH, device=DEVICE)
    model = Cosines.of(cos, 5.0)
    found = distil_reduce(cos, cos, student=model, teacher=model, positive=torch.zeros(3, dtype=torch.int64, device=DEVICE))
    assert found.total_student.tolist() == found.total_teacher.tolist() == found.gap.tolist() == [0, 0, 0]
    for place in range(4):
        matrices = embeddings(5, 5)
        matrices[place][3, 2] = float("nan")
        loss, *gradients = value_and_gradients(distillation_loss, matrices, backend="triton")
        assert loss.isnan() and all(bool(x.isnan().any()) for x in gradients)


def test_launched_work():
    """Four products and two kernels a panel."""
    n, m = 6, 9
    with launch_log.record() as launches:
        value_and_gradients(distillation_loss, embeddings(n, m), backend="triton")
    names = [launch.name for launch in launches]
    assert [names.count(name) for name in ("gemm", "distil_reduce", "distil_write")] == [4, 1, 1]
    assert sum(launch.flops for launch in launches if launch.name == "gemm") == 2 * n * m * (3 * 12 + 20)


@pytest.mark.skipif(DEVICE != "cpu", reason="counts the interpreter's allocations; a GPU counts its own")
def test_scratch_stays_within_the_workspace(monkeypatch):
    """Three panels; scratch of one that lived on into the next would be above the bound."""
    real = distillation._panel
    # the interpreter keeps a launch's arguments in cycles: they are collected before a panel is made
    monkeypatch.setattr(distillation, "_panel", lambda *args: [gc.collect(), real(*args)][1])
    matrices, bound = embeddings(96, 256, torch.float32), 104 * 1024
    assert 96 // 3 <= roofline.panel_rows(96, 256, 12, 4, bound) < 96 // 2
    got = scratch(matrices, TRITON, bound)
    assert 0.5 * bound < got <= bound + 4 * 16 * (96 + 256)  # numbers of a row or a column: sums, shifts, weights


def test_the_price_is_of_the_launches():
    """FLOPs and bytes of the cost model's pieces, in float32, are those of the kernels and products that run."""
    n, m = 6, 9
    with launch_log.record() as launches:
        value_and_gradients(distillation_loss, embeddings(n, m, torch.float32), backend="triton")
    pieces = [piece for piece in roofline.distillation(gpu_for_arch(90), n, m, 12, 20, n, itemsize=4) if piece.bytes]
    assert sum(piece.flops for piece in pieces) == sum(launch.flops for launch in launches)
    for priced, launched in (("both softmaxes' sums", "distil_reduce"), ("difference written", "distil_write")):
        piece, launch = (next(x for x in found if x.name == name) for found, name in ((pieces, priced), (launches, launched)))
        assert (piece.read, piece.written) == (launch.bytes_read, launch.bytes_written)
