"""What `python -m bench gpu` judges by, on a CPU with the kernels interpreted: the gate's errors, the far corner, the tables of times."""

import pytest
import torch

pytest.importorskip("triton")

from bench.gpu import cases, clock, errors, stateful, timing
from bench.gpu.check import Machine
from bench.gpu.parts import attention, gate, profile, smoke
from bench.peers import on_gpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the program itself")
DRY = Machine("cpu", dry=True)


def dry_case(name, dtype=torch.bfloat16):
    return next(case for case in cases.cases(cases.DRY_SHAPE, cases.DRY, (dtype,)) if case.name == name)


@pytest.mark.parametrize(
    "name, paths",
    [
        ("plain", {"exp", "chunk", "fused", "dense"}),
        ("matryoshka", {"exp", "chunk", "fused", "levels"}),
        ("pairs, symmetric", {"exp", "chunk", "fused", "joint"}),
    ],
)
def test_gate_takes_every_path(name, paths):
    case = dry_case(name)
    rows = gate.judged(case, "cpu")
    assert {row["name"].rpartition(", ")[2] for row in rows} == paths
    assert not [row for row in rows if "wrong" in row]
    assert all({"loss_error", "d_query_error", "d_target_allowed", "d_target_eager"} <= set(row) and row["value"] <= 1 for row in rows)


def test_cases_are_the_same_on_every_device():
    """The CPU draws them: what is known of the errors is known of these numbers."""
    one, two = (dry_case("plain").made("cpu") for _ in range(2))
    torch.manual_seed(5)  # a seed of the caller's changes nothing
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], dry_case("plain").made("cpu")[1])


@pytest.mark.parametrize("shape, names", [(cases.SHAPE, None), (cases.DRY_SHAPE, cases.DRY)])
def test_errors_are_known_of_every_case(shape, names):
    for case in cases.cases(shape, names):
        known = [path for path in case.paths if errors.key(case, path) in errors.known()]
        assert "chunk" in known, case  # the path that takes everything
        if case.dtype == torch.bfloat16 and case.name != "smoothing":
            assert "exp" in known and (case.name != "pairs, symmetric" or "joint" in known), case


def test_a_lost_factor_of_ten_is_above_what_is_allowed_anywhere():
    for at, known in errors.known().items():
        for name, error in known.items():
            # a temperature's gradient is one number but for a temperature a row; by luck nearly exact: judged by units of float32
            scalar = name == "loss" or name == "d_temperature" and not at.startswith("row")
            bound = 2 * error + errors.UNITS * 2**-23
            assert 10 * max(error, 5e-8 if scalar else 0.0) > bound, (at, name)
            # below the 2^-7 of two roundings to bfloat16, far below where a row is not its one slope, as it is when cold; a gradient of
            # the temperature is a sum that nearly cancels
            most = 2**-7.5 if at.startswith("cold") else 2**-8
            assert bound < (most if not scalar else 1e-6 if name == "loss" else 1e-4), (at, name)


def test_gate_sees_a_lost_factor_of_ten(monkeypatch):
    """Errors ten times what they are, in float32 as in bfloat16, gradients as the loss."""
    made = cases.result_on

    def worse(case, path, query, target, options):
        result = made(case, path, query, target, options)
        right = cases.truth_of(query, target, options, torch.float64)[name]
        getattr(result, name).copy_(right + 10 * (getattr(result, name).double() - right))
        return result

    monkeypatch.setattr(cases, "result_on", worse)
    for dtype, name in ((torch.bfloat16, "d_target"), (torch.float16, "d_query"), (torch.float32, "d_query")):
        case = dry_case("plain", dtype)
        rows = gate.judged(case, "cpu")
        assert rows and all(row["wrong"][0].startswith(f"{name}: error") for row in rows), (dtype, rows)


def test_gate_sees_a_factor_in_the_row_update(monkeypatch):
    from contrastive_kernels.triton import products

    made = products.matmul
    monkeypatch.setattr("contrastive_kernels.triton.sweep.matmul", lambda *args: made(*args) * 1.01)
    rows = gate.judged(dry_case("plain"), "cpu")
    assert any("d_query: error" in wrong for row in rows for wrong in row.get("wrong", []))


def test_one_path_that_raises_does_not_end_the_others(monkeypatch):
    made = cases.result_on

    def raising(case, path, *args):
        if path == "exp":
            raise RuntimeError("out of resource: shared memory, Required: 300000")
        return made(case, path, *args)

    monkeypatch.setattr(cases, "result_on", raising)
    rows = {row["name"]: row for row in gate.judged(dry_case("plain"), "cpu")}
    assert rows["plain, bfloat16, exp"]["wrong"] == "RuntimeError: out of resource: shared memory, Required: 300000"
    assert "wrong" not in rows["plain, bfloat16, chunk"] and len(rows) == 4


def test_results_that_differ_from_run_to_run_are_wrong(monkeypatch):
    made, calls = cases.result_on, []

    def drifting(*args):
        result = made(*args)
        calls.append(1)
        result.d_query.mul_(1 + 2**-20 * (len(calls) % 2))
        return result

    monkeypatch.setattr(cases, "result_on", drifting)
    assert all("d_query differs from run to run" in row["wrong"] for row in gate.judged(dry_case("plain"), "cpu"))


def test_far_corner_is_compared(monkeypatch):
    assert gate.far("cpu", 70, 90, 16)["wrong"] == []
    from contrastive_kernels.triton.kernels import exp_panel

    original = exp_panel.exp_panel
    monkeypatch.setattr(exp_panel, "exp_panel", lambda x, y, **kwargs: original(x.flip(0), y, **kwargs))
    assert len(gate.far("cpu", 70, 90, 16)["wrong"]) == 2


def test_smoke_judges_numbers():
    right = {"loss": torch.tensor(2.0, dtype=torch.float64), "d_query": torch.ones(3, dtype=torch.float64)}
    assert "wrong" not in smoke.compared({"loss": torch.tensor(2.0), "d_query": torch.full((3,), 1.003)}, right)
    wrong = smoke.compared({"loss": torch.tensor(2.00001), "d_query": torch.full((3,), float("nan"))}, right)["wrong"]
    assert [text.split()[0] for text in wrong] == ["loss", "d_query"]


def test_rows_of_times_are_judged_where_they_are_ours():
    def off(query, target, temperature):
        run = on_gpu.eager(query, target, temperature)
        return lambda: tuple(value * 1.1 for value in run())

    for ours, wrong in ((True, 3), (False, 0)):
        row = timing.measured(DRY, timing.Peer("off", off, "one", ours=ours), 20, 20, 16, 2)
        assert len(row.get("wrong", [])) == wrong and row["ms_p50"] > 0 and float(row["loss_error"]) > 0.05
    row = timing.measured(DRY, timing.Peer("ours", on_gpu.ours(backend="triton"), "one", predict={}), 20, 20, 16, 2)
    assert "wrong" not in row and row["predicted_ms"] > 0 and row["tflops"] > 0


def test_times_are_percentiles():
    times = iter([9.0] + [float(number) for number in range(1, 12)])
    host = clock.Host()
    host.milliseconds = lambda run: next(times)
    assert clock.percentiles(host, lambda: None, 12, warm=0) == {"ms_p20": 2.6, "ms_p50": 6.5, "ms_p80": 9.4}


def test_attention_judges_every_provider(monkeypatch):
    good = attention.compare(DRY, "sdpa", (2, 1, 8, True, None))
    assert "wrong" not in good and good["value"] <= 1
    real = attention.packed_attention
    monkeypatch.setattr(attention, "packed_attention", lambda *a, **k: real(*a, **k) * (1.001 if a[3].provider == "off" else 1))
    monkeypatch.setitem(__import__("vlm2vec.attention", fromlist=["x"])._PROVIDER_FUNCTIONS, "off", attention_off)
    assert "times what is allowed" in attention.compare(DRY, "off", (2, 1, 8, True, None))["wrong"]


def attention_off(*args, **kwargs):
    from vlm2vec.attention import sdpa_packed

    return sdpa_packed(*args, **kwargs)


@pytest.mark.parametrize(("kind", "name"), [("delta_rule", "gated_delta_rule"), ("convolution", "causal_convolution")])
def test_layers_with_state_are_judged(monkeypatch, kind, name):
    sizes = stateful.DRY_SIZES[kind][0]
    good = stateful.compare(DRY, kind, sizes, True)
    assert "wrong" not in good and good["ms_p50"] > 0 and good["tokens"] == 78
    real = getattr(stateful.self_check, name)
    monkeypatch.setattr(stateful.self_check, name, lambda *a: real(*a) * (1.05 if a[0].dtype == torch.bfloat16 else 1))
    assert "of the norm from plain torch" in stateful.compare(DRY, kind, sizes, True)["wrong"]


def test_a_profile_counts_launches():
    rows = profile.kernels(DRY, "plain", {})
    total, logged, *each = rows
    assert total["unit"] == "launches" and total["value"] == sum(row["value"] for row in each)
    assert logged["value"] >= 3  # the logits' panel and the library's two products
    assert abs(total["ms_p50"] - sum(row["ms_p50"] for row in each)) < 1e-2 * total["ms_p50"]


def test_triton_share_is_the_ratio_of_slopes(monkeypatch):
    """Library: 1 ms and 1 ms a width of 16; Triton: 3 ms and 2 ms a width of 16, of which 3 are its epilogue."""
    times = iter([2.0, 5.0, 5.0, 11.0])
    monkeypatch.setattr(profile, "median", lambda *args: next(times))
    rows = {row["name"]: row["value"] for row in profile.triton_share(DRY, "plain")}
    assert rows[f"plain panel: {profile.SHARE}"] == pytest.approx(0.5) and rows["plain panel: epilogue"] == pytest.approx(3.0)
    assert rows["plain panel: main loop, library"] == pytest.approx(2 * 64 * 64 * 48 / 3 / 1e9)
