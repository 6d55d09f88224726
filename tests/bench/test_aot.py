"""Every kernel in every configuration the launchers can choose, compiled for sm_80, sm_90 and sm_100 without a GPU."""

import functools
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from bench.aot import compile as aot_compile
from bench.aot import predictions, sass
from bench.aot import run as aot
from bench.aot.launch_capture import CapturedLaunch
from contrastive_kernels import roofline
from contrastive_kernels.triton import configs
from contrastive_kernels.triton.kernels import warp_specialised
from tests.kernels.helpers.paths import force

pytestmark = pytest.mark.slow
# the cost model's instructions are those of triton 3.8 and 3.9; 3.6 takes up to 18.02 where they take 15.5
OLDER = 1.17 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8) else 1.0


@functools.cache
def all_rows(arch: int) -> list[dict]:
    return aot.rows(arch)


def compiled(arch: int) -> list[dict]:
    return [row for row in all_rows(arch) if "error" not in row]


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_no_kernel_has_a_fault(arch):
    # no code at all, spills, shared memory over the limit, no tensor cores in the hot loop, copies narrower than 16 bytes, no occupancy
    assert not {row["case"]: aot.verdict(row) for row in all_rows(arch) if aot.verdict(row)}


def test_a_kernel_that_does_not_compile_is_a_fault_of_its_own(monkeypatch, tmp_path):
    launch = CapturedLaunch(SimpleNamespace(fn=SimpleNamespace(__name__="_kernel")), {}, {}, (1,))
    good = next(row for row in compiled(90) if not aot.verdict(row))

    def description(name, *rest):
        if name == "bad":
            raise RuntimeError("PassManager::run | failed")
        return good

    monkeypatch.setattr(aot_compile, "launches", lambda arch: [("bad", launch, False), ("good", launch, False)])
    monkeypatch.setattr(aot_compile, "description", description)
    rows = list(aot_compile.rows(90))
    assert [aot.verdict(row) for row in rows] == [["does not compile: RuntimeError: PassManager::run | failed"], []]
    assert "| 90 | bad | | | | | | | | | | | | does not compile: RuntimeError: PassManager::run / failed |" in aot.table(rows)
    monkeypatch.setattr(aot, "compile_all", lambda *a: rows)
    monkeypatch.setattr(aot, "CACHE", tmp_path)
    assert aot.rows(90) == rows and not list(tmp_path.iterdir())  # tried again next time


SWITCHES = """
import collections, json, re, sys
from triton.runtime.jit import JITFunction
from bench.aot.launches import launches

seen = collections.defaultdict(lambda: collections.defaultdict(set))

def text(function, done=()):
    # source of a kernel with that of the functions it calls
    called = {function.fn.__globals__.get(name) for name in re.findall(r"\\b_\\w+", function.src)} - {*done, function}
    return function.src + "".join(text(f, (*done, function)) for f in called if isinstance(f, JITFunction))

def note(switches, kernel, name, value):
    if isinstance(value, bool):
        switches[name].add(value)
    elif re.search(rf"\\b{name.split('.')[-1]} is (not )?None", kernel):
        switches[name].add(value is not None)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        for field in value._fields:
            note(switches, kernel, f"{name}.{field}", getattr(value, field))

for _, launch, _ in launches(int(sys.argv[1])):
    switches = seen[launch.function.fn.__name__]  # a kernel may have none
    for parameter in launch.function.params:
        note(switches, text(launch.function), parameter.name, launch.arguments[parameter.name])
print(json.dumps({kernel: {name: sorted(values) for name, values in switches.items()} for kernel, switches in seen.items()}))
"""
# flags, and arguments that a kernel asks for, that no launch of a GPU turns the other way: candidates without a positive among them
FIXED = {"masks.positive": [True], "out.masks.positive": [True]}
# distillation has no false negatives: of all masks it knows a row's own target
NO_MASKS = {f"masks.{name}": [False] for name in ("ids", "more_ids", "threshold", "keep")}


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_every_kernel_is_compiled_with_every_switch_both_ways(arch):
    """As the sources have them, so that neither a new kernel nor a new switch is left out."""
    folder = aot.ROOT / "kernels/contrastive_kernels/triton"
    kernels = {name for path in folder.rglob("*.py") for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.M)}
    child = subprocess.run(
        [sys.executable, "-c", SWITCHES, str(arch)], capture_output=True, text=True, check=True, env=aot._environment(), cwd=aot.ROOT
    )
    seen = json.loads(child.stdout)
    if warp_specialised.obstacle(arch, torch.bfloat16, plain=True, columns=1024, interpreted=False):
        assert arch == 80 or arch == 100 and triton.__version__.startswith("3.6.")
        kernels.remove("_warp_specialised_kernel")
    assert set(seen) == kernels
    assert not {
        (kernel, name): values
        for kernel, switches in seen.items()
        for name, values in switches.items()
        if values != (FIXED | (NO_MASKS if "distil" in kernel else {})).get(name, [False, True])
    }


@pytest.mark.parametrize("arch, groups", [(90, 2), (100, 1)])
def test_warps_are_specialised(arch, groups):
    """Operands copied by descriptors and registers handed over between the groups, each with its own products and exponentials."""
    rows = [row for row in compiled(arch) if row["kernel"] == "_warp_specialised_kernel"]
    assert rows or arch == 100 and triton.__version__.startswith("3.6.")
    for row in rows:
        elements = row["block"] / (32 * row["warps"] * groups)  # of a thread
        assert row["copies_by_descriptor"] >= 1 + groups and row["register_hand_overs"] and row["blocks_per_sm"] == 1, row["case"]
        assert elements <= row["epilogue_exponentials"] <= elements + 4, row["case"]
        assert row["exponentials"] >= groups * elements
        if "odd" not in row["case"] and "normalize" not in row["case"] and arch == 90:
            assert row["epilogue"] <= 8 * elements  # the plain panel's is 9 to 12


@pytest.mark.parametrize("arch, most", [(80, 1.9), (90, 1.75), (100, 3.5 if OLDER == 1 else 4.5)])
def test_predicted_time_of_a_search(arch, most):
    pieces, bare = predictions.search(compiled(arch), arch)
    assert 1 < sum(piece.seconds for piece in pieces) / bare <= most


def test_tiles_of_sm_80_fit_where_they_are_lent():
    # sm_86, sm_89 and sm_120 have 99 KiB of shared memory a block
    assert (
        {configs.tuned_as(arch) for arch in (80, 86, 89, 120, 121)} == {80} and configs.tuned_as(103) == 100 and configs.tuned_as(110) == 0
    )
    assert max(row["shared"] for row in compiled(80)) <= 99 * 1024


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_the_cost_model_prices_the_tiles_that_are_launched(arch):
    shapes = {}
    for row in compiled(arch):
        if row["kernel"] == "_exp_panel_kernel":
            shapes[row["case"].split(", ", 1)[1].removesuffix(", bfloat16")] = row["block_r"], row["block_c"]
    assert shapes["plain"] == configs.exp_panel_tile(arch, 2, 4096) and shapes["stats"] == configs.exp_panel_tile(
        arch, 2, 4096, row_max=True
    )
    assert shapes["prefixes"] == shapes["prefixes, all"] == configs.exp_panel_tile(arch, 2, 4096, levels=True)
    assert shapes["joint"] == configs.exp_panel_tile(arch, 2, 4096, col_sum=True)


@pytest.mark.parametrize("arch, name", [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA")])
def test_tensor_cores_of_the_architecture(arch, name):
    for row in compiled(arch):
        if row["dot"]:
            assert row["tensor"].get(name), row["case"]


@pytest.mark.parametrize("arch", aot.ARCHITECTURES)
def test_epilogue_is_as_cheap_as_the_cost_model_says(arch):
    rows = compiled(arch)
    assert predictions.per_element(rows, arch) <= OLDER * roofline.EPILOGUE_INSTRUCTIONS[arch]
    assert predictions.per_element(rows, arch, "joint") <= OLDER * roofline.JOINT_INSTRUCTIONS[arch]
    assert predictions.per_element(rows, arch, "prefixes") <= OLDER * roofline.LEVEL_INSTRUCTIONS[arch]
    assert predictions.fused_per_element(rows, arch) <= OLDER * roofline.FUSED_INSTRUCTIONS[arch]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("n", [16_384, 65_536])
@pytest.mark.parametrize("d", predictions.WIDTHS)
def test_predicted_time_stays_near_three_products(arch, n, d):
    pieces, limit = predictions.predicted(roofline.for_arch(arch), n, d, predictions.per_element(compiled(arch), arch, "plain"))
    assert roofline.seconds(pieces) <= predictions.bound(d) * limit
    assert not predictions.too_slow(compiled(arch))


GROUPS = {  # what launchers note, by the piece of the cost model that stands for it
    "exp_panel": ("logits product",),
    "gemm": ("logits, float32", "d_query = ", "d_target +="),
    "row_scaled": ("scaled query", "unit targets"),
    "rows_update": ("row factors",),
    "rows_scatter": ("positives of",),
    "chunk": ("softmax ",),
    "fused_": ("fused ",),
    "exp_panel_redo": ("unsafe rows",),
    "row_dots": ("cosines of",),
    "mark_rows": ("rows to look",),
    "finish_rows": ("rows worked",),
    "inverse_norms": ("inverse norms",),
    "project_out": ("projection",),
}


# 64: three panels; 96: two panels of a tile and a half each; 192: one panel, which stores where the others add
@pytest.mark.parametrize("wrt", [("query", "target"), ("query",), ("target",)])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("path, panel", [("exp", 64), ("exp", 192), ("chunk", 96), ("chunk", 192), ("fused", 192)])
def test_launched_work_equals_the_cost_model(path, panel, normalize, wrt, monkeypatch):
    """FLOPs of grids times tiles, and bytes of the tensors that the launches touch, against the pieces that dispatch prices."""
    from contrastive_kernels import info_nce_value_and_grad
    from contrastive_kernels.triton import configs, launch_log
    from contrastive_kernels.triton.kernels.common import INTERPRET

    if not INTERPRET and not torch.cuda.is_available():
        pytest.skip("needs the interpreter or a GPU")
    n, d = 192, 64
    force(monkeypatch, path, rows=panel)
    tile = configs.Tile(32, 64, 64, 4, 1, 2)
    monkeypatch.setattr(configs, "exp_panel", lambda *a: tile)
    query = torch.nn.functional.normalize(torch.randn(n, d), dim=1).bfloat16()
    with launch_log.record() as launches:
        info_nce_value_and_grad(query, query.roll(1, 0), backend="triton", wrt=wrt, normalize=normalize)
    wants = dict(d_query="query" in wrt, d_target="target" in wrt, normalize=normalize)
    if path == "fused":
        pieces = roofline.fused_passes(roofline.H100, n, n, d, itemsize=2, **wants)
    else:
        pieces = roofline.panels(roofline.H100, n, n, d, panel, itemsize=2, path=path, tile=(32, 64), bounded=normalize, **wants)
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
    assert loop == (0, 3) and code.around(loop) is None and code.first_with("HMMA") == loop
    assert code.count(*loop)["HMMA"] == 1 and code.count(loop[1] + 1)["STL"] == 1
    assert code.narrow_loads(*loop) == ["LDGSTS.E"]


def test_disassembly_reader_of_a_kernel_that_walks_tiles():
    """A loop over tiles that holds the products' loop, one over loads and another group's: none takes the other's place."""
    text = """
.L_x_1:
        /*0010*/                   IADD3 R1, R1, R1 ;
.L_x_2:
        /*0020*/                   HGMMA.64x256x16.F32.BF16 R4, R8 ;
        /*0030*/               @P1 BRA `(.L_x_2) ;
.L_x_3:
        /*0040*/                   LDG.E R4, R8 ;
        /*0050*/               @P1 BRA `(.L_x_3) ;
        /*0060*/                   MUFU.EX2 R1, R1 ;
        /*0070*/               @P1 BRA `(.L_x_1) ;
.L_x_4:
        /*0080*/                   MUFU.EX2 R1, R1 ;
        /*0090*/               @P1 BRA `(.L_x_4) ;
        /*00a0*/                   EXIT ;
"""
    code = sass.parse(text)
    assert (
        code.hot_loop() == (1, 2)
        and code.around((1, 2)) == (0, 6)
        and code.first_with("MUFU") == (0, 6)
        and code.first_with("HMMA") is None
    )


@pytest.mark.parametrize(
    "registers, shared, threads, blocks", [(255, 147_456, 256, 1), (128, 98_304, 256, 2), (32, 0, 128, 16), (64, 240_000, 128, 0)]
)
def test_occupancy(registers, shared, threads, blocks):
    got, share = aot_compile.occupancy(roofline.H100, registers, shared, threads)
    assert got == blocks and share == blocks * threads / 2048
