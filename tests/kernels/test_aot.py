"""Every kernel in every configuration the launchers can choose, compiled for sm_80, sm_90 and sm_100 without a GPU."""

import functools
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from bench import aot, sass  # noqa: E402
from contrastive_kernels import roofline  # noqa: E402
from contrastive_kernels.triton import configs  # noqa: E402
from tests.kernels.paths import force  # noqa: E402

pytestmark = pytest.mark.slow
# the cost model's instructions are those of triton 3.8 and 3.9; 3.6 takes up to 18.02 where they take 15.5
OLDER = 1.17 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8) else 1.0


@functools.lru_cache(maxsize=None)
def all_rows(arch: int) -> list[dict]:
    return aot.rows(arch)


def compiled(arch: int) -> list[dict]:
    return [row for row in all_rows(arch) if "error" not in row]


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_no_kernel_has_a_fault(arch):
    # no code at all, spills, shared memory over the limit, no tensor cores in the hot loop, copies narrower than 16 bytes, no occupancy
    assert not {row["case"]: aot.verdict(row) for row in all_rows(arch) if aot.verdict(row)}


def test_a_kernel_that_does_not_compile_is_a_fault_of_its_own(monkeypatch, tmp_path):
    from bench import aot_compile, aot_launches

    launch = aot_compile.Caught(SimpleNamespace(fn=SimpleNamespace(__name__="_kernel")), {}, {}, (1,))
    good = next(row for row in compiled(90) if not aot.verdict(row))

    def description(name, *rest):
        if name == "bad":
            raise RuntimeError("PassManager::run | failed")
        return good

    monkeypatch.setattr(aot_launches, "launches", lambda arch: [("bad", launch, False), ("good", launch, False)])
    monkeypatch.setattr(aot_compile, "description", description)
    rows = list(aot_compile.rows(90))
    assert [aot.verdict(row) for row in rows] == [["does not compile: RuntimeError: PassManager::run | failed"], []]
    assert "| 90 | bad | | | | | | | | | | | | does not compile: RuntimeError: PassManager::run / failed |" in aot.table(rows)
    monkeypatch.setattr(aot, "compile_all", lambda *a: rows)
    monkeypatch.setattr(aot, "CACHE", tmp_path)
    assert aot.rows(90) == rows and not list(tmp_path.iterdir())  # tried again next time


ELSEWHERE = {  # kernels that other types than bfloat16 reach, by family
    "pool": ["forward", "backward", "forward, rows as they are", "backward, rows as they are"], "rows": ["update, store", "dots", "scatter, add"],
    "chunk": ["write"], "symmetric": ["combine"],
}
KEPT = (2, 4, 8, 16, 32, 64, 128)
SEARCHES = [f"k {kept}" for kept in KEPT] + [f"k {kept}, exclude" for kept in KEPT if kept not in (4, 8)]
CONFIGURATIONS = {
    "bfloat16": ELSEWHERE | {
        "exp panel": [
            "plain", "stats", "sums alone", "redo", "redo, normalize", "redo, all", "redo, all, sums alone", "odd", "symmetric", "joint", "joint, sums alone",
            "joint, all", "normalize", "ids", "threshold", "keep", "all", "all, odd", "prefixes", "prefixes, sums alone", "prefixes, ids", "prefixes, all",
            "prefixes, all, sums alone", "prefixes, all, odd",
        ],
        "sigmoid": ["plain", "all", "loss alone"], "topk": SEARCHES,
        "pool": [*ELSEWHERE["pool"], "last token, int64 mask", "last token, bool mask"],
        "rows": [
            *ELSEWHERE["rows"], "update, add, dot", "update, dot alone", "update, positives alone", "update, no factor", "scatter, both, store",
            "scatter, targets alone, add",
        ],
        "chunk": ["write", "write, all", "reduce", "reduce, smoothing", "reduce, all"],
        "fused": [
            *(f"{which} D={width}{more}" for width in (32, 64, 128) for which in ("forward", "backward") for more in ("", ", all")),
            "sums alone", "sums alone, all", "forward, odd", "backward, odd",
        ],
    },
    "float16": ELSEWHERE | {
        "sigmoid": ["plain", "all", "loss alone"], "topk": ["k 16", "k 128"],
        "fused": ["forward D=128", "forward D=128, all", "backward D=128", "backward D=128, all", "sums alone"],
    },
    "float32": ELSEWHERE | {"topk": SEARCHES},
}  # fmt: skip


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_every_configuration_is_compiled(arch):
    expected = {f"{family}, {case}, {dtype}" for dtype, families in CONFIGURATIONS.items() for family, cases in families.items() for case in cases}
    assert {row["case"] for row in compiled(arch)} == expected


def test_tiles_of_sm_80_fit_where_they_are_lent():
    # sm_86, sm_89 and sm_120 have 99 KiB of shared memory a block
    assert {configs.tuned_as(arch) for arch in (80, 86, 89, 120, 121)} == {80} and configs.tuned_as(103) == 100 and configs.tuned_as(110) == 0
    assert max(row["shared"] for row in compiled(80)) <= 99 * 1024


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_the_cost_model_prices_the_tiles_that_are_launched(arch):
    shapes = {}
    for row in compiled(arch):
        if row["kernel"] == "_exp_panel_kernel":
            shapes[row["case"].split(", ", 1)[1].removesuffix(", bfloat16")] = row["block_r"], row["block_c"]
    assert shapes["plain"] == shapes["stats"] == roofline.TILE[arch]
    assert shapes["prefixes"] == shapes["prefixes, all"] == roofline.LEVEL_TILE[arch]
    assert shapes["joint"] == shapes["joint, all"] == roofline.JOINT_TILE


@pytest.mark.parametrize("arch, name", [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_tensor_cores_of_the_architecture(arch, name):
    for row in compiled(arch):
        if row["dot"]:
            assert row["tensor"].get(name), row["case"]


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_every_family_is_compiled(arch):
    assert {row["kernel"] for row in compiled(arch)} >= {
        "_exp_panel_kernel", "_chunk_reduce_kernel", "_chunk_write_kernel", "_topk_kernel", "_fused_fwd_kernel", "_fused_bwd_kernel",
        "_update_kernel", "_scatter_kernel", "_dots_kernel", "_sigmoid_kernel", "_combine_kernel", "_pool_fwd_kernel", "_pool_bwd_kernel", "_last_token_kernel",
    }


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_epilogue_is_as_cheap_as_the_cost_model_says(arch):
    rows = compiled(arch)
    assert aot.per_element(rows, arch) <= OLDER * roofline.EPILOGUE_INSTRUCTIONS[arch]
    assert aot.per_element(rows, arch, "joint") <= OLDER * roofline.JOINT_INSTRUCTIONS[arch]
    assert aot.per_element(rows, arch, "prefixes") <= OLDER * roofline.LEVEL_INSTRUCTIONS[arch]
    assert aot.fused_per_element(rows, arch) <= OLDER * roofline.FUSED_INSTRUCTIONS[arch]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("n", [16_384, 65_536])
@pytest.mark.parametrize("d", aot.WIDTHS)
def test_predicted_time_stays_near_three_products(arch, n, d):
    pieces, limit = aot.predicted(roofline.for_arch(arch), n, d, aot.per_element(compiled(arch), arch))
    assert roofline.seconds(pieces) <= (1.43 if d == 768 else 1.18) * limit
    assert not aot.too_slow(compiled(arch))


GROUPS = {  # what launchers note, by the piece of the cost model that stands for it
    "exp_panel": ("logits product",), "gemm": ("logits, float32", "d_query = ", "d_target +="), "row_scaled": ("scaled query",),
    "rows_update": ("row factors",), "rows_scatter": ("positives of",), "chunk": ("softmax over",), "fused_": ("fused ",),
    "exp_panel_redo": ("unsafe rows",), "row_dots": ("cosines of",),
}


# 64: three panels; 96: two panels of a tile and a half each; 192: one panel, which stores where the others add
@pytest.mark.parametrize("wrt", [("query", "target"), ("query",), ("target",)])
@pytest.mark.parametrize("path, panel", [("exp", 64), ("exp", 192), ("chunk", 96), ("chunk", 192), ("fused", 192)])
def test_launched_work_equals_the_cost_model(path, panel, wrt, monkeypatch):
    """FLOPs of grids times tiles, and bytes of the tensors that the launches touch, against the pieces that dispatch prices."""
    from contrastive_kernels import info_nce_value_and_grad
    from contrastive_kernels.triton import configs, work
    from contrastive_kernels.triton.common import INTERPRET

    if not INTERPRET and not torch.cuda.is_available():
        pytest.skip("needs the interpreter or a GPU")
    n, d = 192, 64
    force(monkeypatch, path, rows=panel)
    tile = configs.Tile(32, 64, 64, 4, 1, 2)
    monkeypatch.setattr(configs, "exp_panel", lambda *a: tile)
    monkeypatch.setitem(roofline.TILE, 90, (tile.block_r, tile.block_c))
    query = torch.nn.functional.normalize(torch.randn(n, d), dim=1).bfloat16()
    with work.record() as launches:
        info_nce_value_and_grad(query, query.roll(1, 0), backend="triton", wrt=wrt)
    wants = dict(d_query="query" in wrt, d_target="target" in wrt)
    if path == "fused":
        pieces = roofline.fused_passes(roofline.H100, n, n, d, itemsize=2, **wants)
    else:
        pieces = roofline.panels(roofline.H100, n, n, d, panel, itemsize=2, path=path, **wants)
    matched = 0
    for start, names in GROUPS.items():
        ours = [x for x in launches if x.name.startswith(start) and (start != "exp_panel" or x.name == start)]
        theirs = [p for p in pieces if p.name.startswith(names)]
        assert sum(x.flops for x in ours) == sum(p.flops * p.times for p in theirs), start
        assert sum(x.bytes_read for x in ours) == sum(p.read * p.times for p in theirs), start
        assert sum(x.bytes_written for x in ours) == sum(p.written * p.times for p in theirs), start
        matched += len(ours)
    assert matched == len(launches)  # nothing is launched that the model does not know
    if len(wrt) == 2:
        assert sum(x.flops for x in launches) == (8 if path == "fused" else 6) * n * n * d


PEER = """
import torch, triton, triton.language as tl

@triton.autotune([triton.Config({"BLOCK": 256}, num_warps=4), triton.Config({"BLOCK": 512}, num_warps=8)], key=["n"])
@triton.jit
def double(p_x, n, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_x + o, tl.load(p_x + o, mask=o < n, other=0.0) * 2, mask=o < n)

class MemoryEfficientCLIPLoss:
    def __init__(self, **options): pass
    def __call__(self, x, y):
        assert x.is_cuda and torch.cuda.get_device_capability() == (9, 0)
        double[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x.detach(), x.numel())
        raise ValueError("and | then nothing")
"""


def test_a_peer_is_caught_and_its_failure_told(tmp_path, monkeypatch):
    (tmp_path / "memeff").mkdir()
    (tmp_path / "memeff/__init__.py").write_text(PEER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rows = [row for row in aot.peer_rows(90) if row["peer"] == "memeff"]
    kernel, failure = rows
    assert kernel["case"] == "memeff, double" and kernel["registers"] >= 8 and kernel["spills"] == 0 and kernel["warps"] == 4
    assert failure["note"] == "ValueError: and | then nothing"
    table = aot.peer_table(rows)
    assert " w4 s3 |" in table and "and / then nothing" in table


def test_disassembly_reader():
    text = """
.L_x_1:
        /*0010*/                   LDGSTS.E.BYPASS.LTC128B.128 [R1], [R2.64] ;
        /*0020*/              @!P0 LDGSTS.E [R1], [R2.64] ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   MUFU.EX2 R1, R1 ;
        /*0060*/                   STL [R1], R2 ;
"""
    code = sass.parse(text)
    loop = code.hot_loop()
    assert loop == (0, 3)
    assert code.count(*loop)["HMMA"] == 1 and code.count(loop[1] + 1)["STL"] == 1
    assert code.narrow_loads(*loop) == ["LDGSTS.E"]
