"""The layers with state over packed samples, against the recurrence token by token and torch's own convolution, sample by sample."""

import pytest
import torch
import torch.nn.functional as F

from vlm2vec.backbones.qwen3_5.convolution import causal_convolution
from vlm2vec.backbones.qwen3_5.delta_rule import gated_delta_rule
from vlm2vec.backbones.qwen3_5.layout import CHUNK, convolution_layout, delta_layout

LENGTHS = [
    [5],  # a tail alone
    [1, 1, 1],  # single tokens, shorter than the window
    [64],  # a whole chunk and no tail: nobody reads its state
    [64, 128],  # whole chunks of two samples
    [130, 2, 65, 129, 64, 63, 200],  # around the chunk, out of order; two samples end with as many chunks
    [3, 70, 17, 17, 33, 70],  # tails of several widths, fresh and going on, equal samples
]
HEADS = [(2, 2, 4, 4), (1, 3, 4, 6)]  # key heads, value heads, their widths; the second shares its key head


def recurrence(query, key, value, decay, beta):
    """One sample, one token after the other."""
    shared = value.shape[1] // query.shape[1]
    query, key = (F.normalize(x, dim=-1, eps=0) for x in (query, key))
    query, key = ((x.repeat_interleave(shared, dim=1)) for x in (query * query.shape[-1] ** -0.5, key))
    state, out = value.new_zeros(value.shape[1], key.shape[2], value.shape[2]), []
    for q, k, v, g, b in zip(query, key, value, decay, beta):
        state = state * g.exp()[:, None, None]
        state = state + torch.einsum("hk,hv->hkv", k, b[:, None] * (v - torch.einsum("hkv,hk->hv", state, k)))
        out.append(torch.einsum("hkv,hk->hv", state, q))
    return torch.stack(out)


def inputs(total, heads, dtype=torch.float64):
    key_heads, value_heads, key_width, value_width = heads
    made = [torch.randn(total, *shape, dtype=dtype) for shape in ((key_heads, key_width),) * 2 + ((value_heads, value_width),)]
    made += [F.logsigmoid(torch.randn(total, value_heads, dtype=dtype)), torch.rand(total, value_heads, dtype=dtype)]
    return [x.requires_grad_() for x in made]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("heads", "chunk"), [(HEADS[0], 64), (HEADS[1], 64), (HEADS[1], 32)], ids=str)
def test_the_delta_rule_is_the_recurrence_of_each_sample(lengths, heads, chunk, monkeypatch):
    monkeypatch.setattr("vlm2vec.backbones.qwen3_5.delta_rule.EPS", 0.0)
    made = inputs(sum(lengths), heads)
    out = gated_delta_rule(*made, delta_layout(lengths, key_heads=heads[0], value_heads=heads[1], chunk=chunk))
    truth = torch.cat([recurrence(*sample) for sample in zip(*(x.split(lengths) for x in made))])
    cotangent = torch.randn_like(truth)
    assert out.dtype == torch.float64
    for ours, theirs in zip(*((y, *torch.autograd.grad(y, made, cotangent)) for y in (out, truth))):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-9)


def test_a_sample_has_the_same_chunks_in_any_company():
    """Every token has one place; chunks are cut from a sample's own first token, and only tails are padded, by less than a step."""
    lengths = [130, 2, 65, 129, 64, 63, 200]
    layout = delta_layout(lengths, key_heads=1, value_heads=1)
    rows, back = layout["key_rows"]
    assert torch.equal(rows[back], torch.arange(sum(lengths)))
    assert layout["steps"] == [5, 3, 1]
    assert len(rows) - sum(lengths) < 16 * len(lengths)
    at, starts = 0, set(torch.tensor([0, *lengths]).cumsum(0).tolist())
    for group in layout["groups"]:
        for chunk in rows[at : at + group["count"] * group["width"]].view(group["count"], -1):
            start = max(s for s in starts if s <= chunk[0])
            assert (chunk[0] - start) % CHUNK == 0 and (int(chunk[0]) == start) == group["fresh"]
        at += group["count"] * group["width"]


def test_garbage_in_other_samples_is_not_seen():
    """NaN in one sample stays in it, in the layers' values and in their gradients."""
    lengths = [70, 20, 130, 3]
    layouts = delta_layout(lengths, key_heads=2, value_heads=2), convolution_layout(lengths, 4)
    made, x, weight = inputs(223, HEADS[0]), torch.randn(223, 5, requires_grad=True), torch.randn(5, 4)
    bad = slice(70, 90)
    with torch.no_grad():
        for tensor in (*made, x):
            tensor[bad] = float("nan")
    for out, leaf in ((gated_delta_rule(*made, layouts[0]), made[0]), (causal_convolution(x, weight, None, layouts[1]), x)):
        keep = torch.ones(223, dtype=torch.bool)
        keep[bad] = False
        assert out[keep].isfinite().all()
        (grad,) = torch.autograd.grad(out[keep].sum(), leaf)
        assert grad[keep].isfinite().all() and grad[keep].any()


def test_float16_is_computed_wider():
    """bfloat16 and float16 in, the same out, and no further from the truth than their own rounding of what comes out."""
    lengths, heads = [150, 40], HEADS[0]
    for dtype in (torch.bfloat16, torch.float16):
        made = [x.detach().to(dtype) for x in inputs(190, heads)]
        layout = delta_layout(lengths, key_heads=2, value_heads=2)
        out, truth = gated_delta_rule(*made, layout), gated_delta_rule(*(x.double() for x in made), layout)
        assert out.dtype == dtype
        assert ((out.double() - truth).abs() <= torch.finfo(dtype).eps * truth.abs() + 1e-6).all()


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_the_convolution_is_torchs_own_on_each_sample(lengths, bias):
    x = torch.randn(sum(lengths), 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    added = torch.randn(6, dtype=torch.float64, requires_grad=True) if bias else None
    leaves = [x, weight] + ([added] if bias else [])
    out = causal_convolution(x, weight, added, convolution_layout(lengths, 4))
    truth = torch.cat([F.silu(F.conv1d(F.pad(s.T, (3, 0)), weight[:, None], added, groups=6)).T for s in x.split(lengths)])
    cotangent = torch.randn_like(truth)
    for ours, theirs in zip(*((y, *torch.autograd.grad(y, leaves, cotangent)) for y in (out, truth))):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)
