"""Packed attention against dense attention with a block mask; the providers' signatures; chunking and packing."""

import ast
import importlib
import inspect
import random
import sys
import types
from importlib import metadata

import pytest
import torch

from vlm2vec import attention, encoding
from vlm2vec.attention import Segments, choose_provider, packed_attention
from vlm2vec.packing import Features, pack

LENGTHS = [
    [5],  # one segment
    [1, 1, 1],  # single tokens
    [7, 7, 7, 7],  # equal: no gather at all
    [3, 40, 1, 40, 17, 4, 39],  # groups of near lengths, out of order
    [130, 2, 65, 129, 64, 128],  # around the small-segment limit and a power of two
]


def dense(q, k, v, segments, window=None):
    """One (T, T) mask in the tensors' own dtype."""
    which = torch.repeat_interleave(torch.arange(len(segments.lengths)), torch.tensor(segments.lengths))
    at = torch.cat([torch.arange(n) for n in segments.lengths])
    seen = which[:, None] == which[None, :]
    if segments.causal:
        seen &= at[:, None] >= at[None, :]
    if window is not None:
        seen &= (at[:, None] - at[None, :]).abs() < window
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "key_heads", "window"), [(4, 2, None), (2, 2, 9)])
def test_values_and_gradients(lengths, causal, heads, key_heads, window):
    segments = Segments.from_lengths(lengths, causal=causal)
    total = sum(lengths)
    q = torch.randn(total, heads, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(total, key_heads, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    cotangent = torch.randn(total, heads, 8, dtype=torch.float64)
    results = []
    for run in (packed_attention, dense):
        out = run(q, k, v, segments, window=window)
        results.append((out, *torch.autograd.grad(out, (q, k, v), cotangent)))
    for ours, truth in zip(*results):
        torch.testing.assert_close(ours, truth, atol=1e-12, rtol=1e-10)


def test_garbage_in_other_segments_is_not_seen():
    """NaN in one segment stays in it, even where it serves as padding of none."""
    segments = Segments.from_lengths([3, 40, 12, 33], causal=True)
    q, k, v = (torch.randn(88, 2, 8) for _ in range(3))
    for x in (q, k, v):
        x[3:43] = float("nan")
    out = packed_attention(q, k, v, segments)
    assert out[:3].isfinite().all() and out[43:].isfinite().all()


def test_groups_waste_little_and_cover_everything():
    rng = random.Random(0)
    for causal in (True, False):
        lengths = [rng.randint(1, 400) for _ in range(200)]
        segments = Segments.from_lengths(lengths, causal=causal)
        assert sum(g.count for g in segments.groups) == 200
        assert torch.equal(segments.rows[segments.inverse], torch.arange(sum(lengths)))
        scores = sum(g.count * g.length**2 for g in segments.groups if g.length > attention.SMALL)
        real = sum(n**2 for n in lengths if n > attention.SMALL)
        assert scores <= real * 1.25
        assert len(segments.groups) < (40 if causal else 200)


def test_calls_without_segments_are_ordinary_attention():
    attention.register()

    class Layer(torch.nn.Module):
        is_causal, num_key_value_groups = True, 2

    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    out, _ = attention._attention_interface(Layer(), q, k, v, None, scaling=8**-0.5)
    for row in range(2):
        one = dense(*(x[row].transpose(0, 1) for x in (q, k, v)), Segments.from_lengths([6], causal=True))
        torch.testing.assert_close(out[row], one, atol=1e-5, rtol=1e-5)


# -- providers that need CUDA: held to their signatures ----------------------------------------------------------------

# flash_attn.flash_attn_varlen_func of flash-attn 2.x, as its documentation gives it; the package itself builds with CUDA only
FLASH_ATTN = (
    "q",
    "k",
    "v",
    "cu_seqlens_q",
    "cu_seqlens_k",
    "max_seqlen_q",
    "max_seqlen_k",
    "dropout_p",
    "softmax_scale",
    "causal",
    "window_size",
    "softcap",
    "alibi_slopes",
    "deterministic",
    "return_attn_probs",
    "block_table",
)


class Recorder:
    def __init__(self, signature):
        self.__signature__, self.arguments = signature, None  # what inspect.signature says of it

    def __call__(self, *args, **kwargs):
        self.arguments = self.__signature__.bind(*args, **kwargs).arguments
        return args[0]


@pytest.mark.parametrize(
    ("causal", "window", "flash_window"), [(True, None, (-1, 0)), (False, None, (-1, -1)), (True, 5, (4, 0)), (False, 5, (4, 4))]
)
def test_flash_attn_is_called_by_its_signature(monkeypatch, causal, window, flash_window):
    if attention._has_flash_attn():
        from flash_attn import flash_attn_varlen_func

        assert set(FLASH_ATTN[:11]) <= set(inspect.signature(flash_attn_varlen_func).parameters)
    parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in FLASH_ATTN[:7]]
    parameters += [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None) for n in FLASH_ATTN[7:]]
    record = Recorder(inspect.Signature(parameters))
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=record))
    segments = Segments.from_lengths([3, 5], causal=causal)
    q = torch.randn(8, 2, 4)
    attention.flash_attn_packed(q, q, q, segments, scale=0.5, window=window)
    got = record.arguments
    assert got["cu_seqlens_q"].dtype == torch.int32 and got["cu_seqlens_q"].tolist() == [0, 3, 8]
    assert (got["max_seqlen_q"], got["softmax_scale"], got["causal"], got["window_size"]) == (5, 0.5, causal, flash_window)


# flash_attn.cute.flash_attn_varlen_func of flash-attn-4 4.0.0b36, as far as packed attention calls it, in its order
FLASH_ATTN_4 = (
    *("q", "k", "v", "qv", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "min_seqlen_k", "seqused_q", "seqused_k"),
    *("gather_kv_indices", "page_table", "softmax_scale", "causal", "window_size"),
)


def installed_flash_attn_4() -> list[str] | None:
    """Names of the arguments in the installed package, read without importing it: that needs a GPU's compiler."""
    if not attention._has_flash_attn_4():
        return None
    file = next(f for f in metadata.files("flash-attn-4") if f.parts[-2:] == ("cute", "interface.py"))
    tree = ast.parse(file.locate().read_text(encoding="utf-8"))
    (function,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "flash_attn_varlen_func")
    return [a.arg for a in function.args.args]


@pytest.mark.parametrize(
    ("causal", "window", "flash_window"), [(True, None, (None, None)), (False, None, (None, None)), (True, 5, (4, 0)), (False, 5, (4, 4))]
)
def test_flash_attn_4_is_called_by_its_signature(monkeypatch, causal, window, flash_window):
    names = installed_flash_attn_4() or FLASH_ATTN_4
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    record = Recorder(inspect.Signature([inspect.Parameter(n, kind, default=None) for n in names]))
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace())
    monkeypatch.setitem(
        sys.modules, "flash_attn.cute", types.SimpleNamespace(flash_attn_varlen_func=lambda *a, **k: (record(*a, **k), None))
    )
    monkeypatch.setattr(attention, "_capability", lambda device: 9)
    segments = Segments.from_lengths([3, 5], causal=causal, provider="flash_attn_4")
    q = torch.randn(8, 2, 16)
    assert attention.packed_attention(q, q, q, segments, scale=0.5, window=window) is q, "the output, without the log-sum-exp"
    got = record.arguments
    assert got["cu_seqlens_q"].dtype == torch.int32 and got["cu_seqlens_q"].tolist() == got["cu_seqlens_k"].tolist() == [0, 3, 8]
    assert (got["max_seqlen_q"], got["max_seqlen_k"], got["softmax_scale"], got["causal"]) == (5, 5, 0.5, causal)
    assert got["window_size"] == flash_window
    with pytest.raises(ValueError, match="dropout"):
        attention.flash_attn_4_packed(q, q, q, segments, dropout=0.1)


def test_heads_that_flash_attn_4_does_not_take_go_through_torch(monkeypatch):
    monkeypatch.setattr(attention, "_has_varlen", lambda: False)
    for width, capability in ((12, 9), (16, 8), (264, 9), (192, 10)):
        monkeypatch.setattr(attention, "_capability", lambda device, capability=capability: capability)
        q = torch.randn(8, 2, width)
        plain, segments = (Segments.from_lengths([3, 5], causal=True, provider=name) for name in ("sdpa", "flash_attn_4"))
        assert torch.equal(attention.packed_attention(q, q, q, segments), attention.packed_attention(q, q, q, plain))
    for width, capability in ((64, 9), (80, 10), (128, 12), (256, 9), (256, 10)):
        assert attention.flash_attn_4_takes(width, capability)


def test_flash_attn_4_is_chosen_where_it_is_installed_and_the_card_takes_it(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(attention, "_has_flash_attn", lambda: True)
    for installed, capability, chosen in (
        (True, 9, "flash_attn_4"),
        (True, 10, "flash_attn_4"),
        (True, 8, "flash_attn"),
        (False, 9, "flash_attn"),
    ):
        monkeypatch.setattr(attention, "_has_flash_attn_4", lambda installed=installed: installed)
        monkeypatch.setattr(attention, "_capability", lambda device, capability=capability: capability)
        assert choose_provider("auto", cuda, torch.bfloat16) == chosen
        if chosen == "flash_attn_4":
            assert choose_provider("flash_attn_4", cuda, torch.float16) == chosen
        else:
            with pytest.raises(ValueError, match="pip install" if not installed else "capability 9 to 12"):
                choose_provider("flash_attn_4", cuda, torch.bfloat16)
    with pytest.raises(ValueError, match="needs CUDA"):
        choose_provider("flash_attn_4", torch.device("cpu"), torch.bfloat16)


def test_flash_attn_4_alone_is_not_taken_for_flash_attn(monkeypatch, tmp_path):
    """Its package is a part of `flash_attn`, whose own file comes with flash-attn 2 alone."""
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    assert not attention._has_flash_attn()
    (tmp_path / "flash_attn" / "__init__.py").touch()
    importlib.invalidate_caches()
    assert attention._has_flash_attn()


def varlen_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None): ...
def varlen_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)): ...
def varlen_2_14(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
): ...


@pytest.mark.parametrize("torch_version", ["2.11", "2.14", "installed"])
@pytest.mark.parametrize(("key_heads", "window", "varlen_window"), [(2, None, (-1, 0)), (4, None, (-1, 0)), (2, 3, (2, 0))])
def test_torch_varlen_is_called_by_its_signature(monkeypatch, torch_version, key_heads, window, varlen_window):
    from torch.nn.attention import varlen

    function = {"2.11": varlen_2_11, "2.14": varlen_2_14, "installed": varlen.varlen_attn}[torch_version]
    record = Recorder(inspect.signature(function))
    monkeypatch.setattr(varlen, "varlen_attn", record)
    segments = Segments.from_lengths([3, 5], causal=True, provider=choose_provider("varlen", torch.device("cuda"), torch.bfloat16))
    q, k = torch.randn(8, 4, 8), torch.randn(8, key_heads, 8)
    attention.packed_attention(q, k, k, segments, scale=0.5, window=window)
    got = record.arguments
    assert (got["max_q"], got["max_k"], got["scale"], got["window_size"]) == (5, 5, 0.5, varlen_window)
    assert got.get("enable_gqa") == (key_heads != 4 if "enable_gqa" in record.__signature__.parameters else None)
    assert got["cu_seq_q"].tolist() == got["cu_seq_k"].tolist() == [0, 3, 8]
    with pytest.raises(ValueError, match="dropout"):
        attention.varlen_packed(q, k, k, segments, dropout=0.1)


def test_a_varlen_without_a_window_is_not_chosen(monkeypatch):
    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", varlen_2_10)
    monkeypatch.setattr(attention, "_has_flash_attn", lambda: False)
    monkeypatch.setattr(attention, "_has_flash_attn_4", lambda: False)
    cuda = torch.device("cuda")
    assert choose_provider("auto", cuda, torch.bfloat16) == "sdpa"
    with pytest.raises(ValueError, match="torch 2.11 or newer"):
        choose_provider("varlen", cuda, torch.bfloat16)


def test_choice_of_provider():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_provider(None, cpu, torch.float32) == choose_provider("auto", cuda, torch.float32) == "sdpa"
    assert choose_provider("auto", cuda, torch.bfloat16) == ("flash_attn" if attention._has_flash_attn() else "varlen")
    for attn, said in (("eager", "expected 'auto'"), ("flash_attn", "needs CUDA"), ("varlen", "needs CUDA")):
        with pytest.raises(ValueError, match=said):
            choose_provider(attn, cpu, torch.bfloat16)


# -- packing -----------------------------------------------------------------------------------------------------------


def test_chunks_keep_to_the_token_budget_and_the_batch_size(monkeypatch):
    rng = random.Random(1)
    for budget, size in ((1, 5), (50, 99), (1000, 7)):
        monkeypatch.setitem(encoding.MAX_CHUNK_TOKENS, "cpu", budget)
        lengths = [rng.randint(1, 120) for _ in range(99)]
        chunks = encoding.chunks(lengths, size, "cpu")
        assert sorted(i for c in chunks for i in c) == list(range(99))
        assert all(len(c) == 1 or (sum(lengths[i] for i in c) <= budget and len(c) <= size) for c in chunks)
        flat = [lengths[i] for c in chunks for i in c]
        assert flat == sorted(flat, reverse=True)
    assert encoding.chunks([], 5, "cpu") == []


def test_pack_lays_samples_one_behind_the_other():
    a = Features(torch.arange(3), {"x": torch.ones(2, 4)}, torch.tensor([0, 1]))
    b = Features(torch.arange(5), {}, None, torch.arange(5).expand(3, -1) * 2)
    packed = pack([b, a])
    assert packed.seqlens == [5, 3] and packed.cu_seqlens.tolist() == [0, 5, 8] and packed.last_index.tolist() == [4, 7]
    assert packed.position_ids[0].tolist() == [0, 2, 4, 6, 8, 0, 1, 2] and packed.visual_index.tolist() == [5, 6]
    moved = packed.to("cpu", torch.bfloat16)
    assert moved.vision["x"].dtype == torch.bfloat16 and moved.input_ids.dtype == torch.long
    for bad in ([], [Features(torch.empty(0, dtype=torch.long))]):
        with pytest.raises(ValueError):
            pack(bad)
