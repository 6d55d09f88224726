"""Which kernels the layers with state run on: right ones are taken, wrong and crashing ones are told once and left alone.

Stand-ins have the packages' names and signatures and run on a CPU; the check of a kernel and the choice are the real ones.
"""

import functools
import logging
import sys

import pytest
import torch
import transformers.models.qwen3_5.modeling_qwen3_5  # noqa: F401 (before stand-ins are there: it keeps what it finds by these names)

from tests.helpers.tiny_models import qwen3_5
from vlm2vec import VLM2Vec
from vlm2vec.attention import Segments, sdpa_packed
from vlm2vec.backbones.qwen3_5 import providers, self_check
from vlm2vec.backbones.qwen3_5.layout import stateful

CPU = torch.device("cpu")
SIZES = {"delta_rule": (2, 4, 8, 8), "convolution": (16, 4)}

# flash-linear-attention's function, token by token. BREAK stands for what spoils it.
FLA = """
import torch
def chunk_gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
                           use_qk_l2norm_in_kernel=False, cu_seqlens=None, **kwargs):
    assert use_qk_l2norm_in_kernel and cu_seqlens.dtype == torch.long and q.shape[2] == v.shape[2] and q.dtype != torch.float32
    BREAK
    q, k = (x.float() * torch.rsqrt(x.float().square().sum(-1, keepdim=True) + 1e-6) for x in (q[0], k[0]))
    q, v, g, beta, out, dtype = q * q.shape[-1] ** -0.5, v[0].float(), g[0], beta[0].float(), [], v.dtype
    for start, stop in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:]):
        state = q.new_zeros(q.shape[1], q.shape[2], v.shape[2])
        for t in range(start, stop):
            state = state * g[t].exp()[:, None, None]
            new = beta[t, :, None] * (v[t] - torch.einsum("hkv,hk->hv", state, k[t]))
            state = state + k[t, :, :, None] * new[:, None]
            out.append(torch.einsum("hkv,hk->hv", state, q[t]))
    return torch.stack(out)[None].to(dtype), None
"""
CONV1D = """
import torch
def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None,
                     activation=None):
    assert x.stride(1) == 1 and seq_idx.dtype == torch.int32 and activation == "silu"
    BREAK
    wide, out = x.float()[0], 0
    for back in range(weight.shape[1]):
        shifted = torch.nn.functional.pad(wide, (back, 0))[:, : wide.shape[1]]
        same = torch.nn.functional.pad(seq_idx[0], (back, 0), value=-1)[: wide.shape[1]] == seq_idx[0]
        out = out + shifted * same * weight[:, -1 - back, None].float()
    return torch.nn.functional.silu(out).to(x.dtype)[None]
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """`install(fla=line, conv1d=line)`: stand-ins with the line where BREAK is, on a CPU; what was imported or found is forgotten."""

    def forget():
        providers._found.clear()
        for name in [n for n in sys.modules if n.partition(".")[0] in ("fla", "causal_conv1d")]:
            del sys.modules[name]

    def put(**lines):
        for package, line in lines.items():
            place, source = {"fla": ("fla/ops/gated_delta_rule", FLA), "conv1d": ("causal_conv1d", CONV1D)}[package]
            (tmp_path / place).mkdir(parents=True)
            (tmp_path / place / "__init__.py").write_text(source.replace("BREAK", line))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(providers, "DEVICES", ("cpu",))
        forget()

    forget()
    yield put
    forget()


def wrong(kind, dtype=torch.bfloat16):
    return self_check.wrong(kind, CPU, dtype, SIZES[kind])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_right_kernels_pass(install, dtype):
    install(fla="pass", conv1d="pass")
    assert wrong("delta_rule", dtype) is None and wrong("convolution", dtype) is None


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("cu_seqlens = cu_seqlens[[0, -1]]", "its value is"),  # one sample of all
        ("cu_seqlens = torch.cat([cu_seqlens[:1], cu_seqlens[2:]])", "its"),  # the first two samples joined
        ("cu_seqlens = torch.cat([cu_seqlens[:-2], cu_seqlens[-1:]])", "its"),  # the last two
        ("beta = beta.detach() + 0 * beta", "its d beta is"),
        ("g = g.detach() + 0 * g", "its d decay is"),
        ("v = v * float('nan')", "its value is nan"),
        ("v = v * 1.05", "its value is"),
    ],
)
def test_wrong_delta_rules_are_seen(install, line, said):
    install(fla=line)
    assert said in wrong("delta_rule")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("seq_idx = torch.zeros_like(seq_idx)", "its value is"),  # one sample of all
        ("seq_idx = seq_idx.clamp(min=1)", "its"),  # the first two samples joined
        ("weight = weight.flip(1)", "its value is"),
        ("weight = weight.detach() + 0 * weight", "its d weight is"),
    ],
)
def test_wrong_convolutions_are_seen(install, line, said):
    install(conv1d=line)
    assert said in wrong("convolution")


def test_a_leak_too_small_for_the_norm_is_seen(monkeypatch):
    """A thousandth of the neighbours' gradient, far below what rounding may be: nothing at all may pass."""
    monkeypatch.setattr(self_check, "APART", 1e9)

    def leaks(x, weight, bias, layout):
        return self_check.causal_convolution(x, weight, bias, layout) + 1e-3 * x.mean(0)

    monkeypatch.setitem(self_check.FUNCTIONS, "convolution", leaks)
    assert wrong("convolution") == "its d input reaches from a sample into another"


def ask(kind):
    segments = stateful(Segments.from_lengths([5, 3], causal=True, provider="varlen"), key_heads=2, value_heads=4, width=8, kernel=4)
    if kind == "convolution":
        return providers.convolution(segments, torch.zeros(8, 16, dtype=torch.bfloat16), 4)
    return providers.delta_rule(segments, torch.zeros(8, 2, 8, dtype=torch.bfloat16), torch.zeros(8, 4, 8, dtype=torch.bfloat16))


def test_a_kernel_that_ends_its_process_is_left_alone(install, caplog):
    """Checked in a process of its own, once for all calls; this one goes on in plain torch and says why."""
    install(conv1d="import os; os.abort()")
    with caplog.at_level(logging.WARNING, logger=providers.__name__):
        assert ask("convolution") is None and ask("convolution") is None
    assert [r.getMessage() for r in caplog.records] == [
        "causal_conv1d is not used on cpu in bfloat16, plain torch is: its process ended with -6"
    ]


def test_a_right_kernel_is_taken(install, caplog):
    install(conv1d="pass")
    with caplog.at_level(logging.WARNING, logger=providers.__name__):
        assert ask("convolution") is providers.conv1d_convolution
    assert not caplog.records


def test_a_kernel_that_raises_is_left_alone(install, caplog):
    install(fla="raise RuntimeError('no kernel image is available')")
    with caplog.at_level(logging.WARNING, logger=providers.__name__):
        assert ask("delta_rule") is None
    assert "RuntimeError: no kernel image is available" in caplog.text and len(caplog.records) == 1


def test_a_package_that_is_not_there_is_no_warning(install, caplog, monkeypatch):
    install()
    monkeypatch.setattr(providers, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING, logger=providers.__name__):
        assert ask("delta_rule") is None and ask("convolution") is None
    assert not caplog.records


def test_a_model_runs_on_what_was_found_right(install, tmp_path, monkeypatch):
    """The whole model in bfloat16 on both kernels; plain torch where it is asked for."""
    install(fla="pass", conv1d="pass")
    monkeypatch.setattr(providers, "check_in_child", self_check.wrong)
    (tmp_path / "model").mkdir()
    qwen3_5(tmp_path / "model")
    model = VLM2Vec.from_pretrained(tmp_path / "model", dtype="bfloat16", device="cpu")
    packed = functools.partial(model.backbone.pack, model.preprocess(["a fox", "the museum opened in 1932 " * 5]))
    calls = []
    for kind, function in list(providers.FUNCTIONS.items()):
        monkeypatch.setitem(providers.FUNCTIONS, kind, lambda *args, f=function, kind=kind: (calls.append(kind), f(*args))[1])
    with torch.no_grad():
        plain = model(packed(provider="sdpa"))
        assert not calls
        attention = packed(provider="sdpa")
        attention.segments.provider = "varlen"  # what a GPU would be given; on a CPU attention itself has to stay with SDPA
        monkeypatch.setattr("vlm2vec.attention._PROVIDER_FUNCTIONS", dict.fromkeys(("sdpa", "varlen"), sdpa_packed))
        model(attention)
        calls.clear()  # of the check
        fast = model(attention)
    assert calls == ["convolution", "delta_rule"] * 3
    cosine = torch.nn.functional.cosine_similarity(plain.float(), fast.float())
    assert cosine.min() > 0.999 and not torch.equal(plain, fast)


def test_what_plain_torch_is_asked_for(install):
    """float32, another device, `attn="sdpa"` and a plan's own attention: nothing is looked for."""
    install(fla="raise AssertionError", conv1d="raise AssertionError")
    for provider, dtype in (("sdpa", torch.bfloat16), (lambda *a, **k: None, torch.bfloat16), ("varlen", torch.float32)):
        segments = stateful(Segments.from_lengths([5, 3], causal=True, provider=provider), key_heads=2, value_heads=4, width=8, kernel=4)
        assert providers.convolution(segments, torch.zeros(8, 16, dtype=dtype), 4) is None
    assert not providers._found
