"""Losses over prefixes and over what an index of few bits makes of the embeddings."""

import pytest
import torch

from contrastive_kernels import info_nce, sigmoid_loss
from train.losses import LOSSES, LossBatch
from train.losses.copies import Matryoshka, Quantised, quantised
from train.recipe.from_yaml import build

N, D = 6, 8
OPTIONS = LossBatch(torch.arange(N), torch.arange(N), sources=torch.zeros(N, dtype=torch.int64), grades=torch.arange(N).double())


def embeddings():
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(N, D, generator=generator, dtype=torch.float64) for _ in range(2)]


def value(section, query, target):
    loss = section.function()
    loss = loss.double() if isinstance(loss, torch.nn.Module) else loss
    got = loss(query, target, **section.options(OPTIONS))
    return got[0] if isinstance(got, tuple) else got


def test_int8_is_the_nearest_step_and_binary_the_sign():
    rows = torch.tensor([[1.27, -0.004, 0.006, -1.0], [0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    unit = torch.nn.functional.normalize(rows, dim=1)
    steps = quantised(rows, "int8") / (unit[:, :1].clamp(min=1e-9) / 127)
    torch.testing.assert_close(steps, torch.tensor([[127.0, 0.0, 1.0, -100.0], [0.0] * 4], dtype=torch.float64), rtol=1e-12, atol=1e-12)
    signs = torch.tensor([[0.5, -0.5, 0.5, -0.5], [-0.5] * 4], dtype=torch.float64)
    assert torch.equal(quantised(rows, "binary"), signs)


@pytest.mark.parametrize("kind", ["int8", "binary"])
def test_gradient_goes_straight_through(kind):
    rows = embeddings()[0].requires_grad_()
    weights = torch.arange(float(N * D), dtype=torch.float64).view(N, D)
    (quantised(rows, kind) * weights).sum().backward()
    got, rows.grad = rows.grad, None
    (torch.nn.functional.normalize(rows, dim=-1) * weights).sum().backward()
    assert torch.equal(got, rows.grad)


@pytest.mark.parametrize("name", ["info_nce", "sigmoid_loss", "cosent"])
def test_the_term_is_added_with_its_weight(name):
    query, target = embeddings()
    plain, sums = LOSSES[name](), LOSSES[name](quantised=Quantised(["int8", "binary"], weight=0.5))
    copies = [value(plain, quantised(query, kind), quantised(target, kind)) for kind in ("int8", "binary")]
    torch.testing.assert_close(value(sums, query, target), value(plain, query, target) + 0.25 * sum(copies), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["sigmoid_loss", "cosent"])
def test_prefixes_are_added_with_their_weights(name):
    query, target = embeddings()
    section = LOSSES[name](matryoshka=Matryoshka([3, 8], [0.5, 2.0]))
    prefix = value(LOSSES[name](), query[:, :3], target[:, :3])
    torch.testing.assert_close(value(section, query, target), 0.5 * prefix + 2 * value(LOSSES[name](), query, target), rtol=1e-12, atol=0)
    assert section.figures(section.function()) == LOSSES[name]().figures(LOSSES[name]().function())


def test_info_nce_takes_them_in_its_own_sweep():
    section = build(LOSSES["info_nce"], {"temperature": 0.1, "matryoshka": {"dims": [3, 8], "weights": [0.5, 2]}}, "loss.")
    assert section.function() is info_nce
    options = section.options(OPTIONS)
    assert (options["matryoshka_dims"], options["matryoshka_weights"]) == ([3, 8], [0.5, 2])


@pytest.mark.parametrize(
    "section, words",
    [
        ({"quantised": {"kinds": ["int4"]}}, r"loss.quantised.kinds: expected some of int8, binary, got \['int4'\]"),
        ({"matryoshka": {"dims": []}}, "loss.matryoshka.dims must list widths of at least 1"),
        ({"matryoshka": {"dims": [4, 8], "weights": [1]}}, "loss.matryoshka.weights: expected 2 numbers, one a width, got 1"),
        ({"matryoshka": {"dims": [4]}, "matryoshka_dims": [4]}, "say the same; expected one of them"),
    ],
)
def test_what_they_do_not_know_is_refused(section, words):
    with pytest.raises(ValueError, match=words):
        build(LOSSES["info_nce"], section, "loss.").check()
    if "matryoshka_dims" not in section:
        with pytest.raises(ValueError, match=words):
            build(LOSSES["cosent"], section, "loss.").check()


@pytest.mark.parametrize("name", ["info_nce", "sigmoid_loss", "cosent", "score_distillation", "distillation"])
def test_a_prefix_beyond_the_model_is_refused(name):
    with pytest.raises(ValueError, match="loss.matryoshka.dims: 64 is above the 32 dimensions of m"):
        LOSSES[name](matryoshka=Matryoshka([8, 64])).check_width(32, "m")


def test_hard_negatives_are_copied_too():
    """A loss whose hard negatives kept their bits would compare copies with originals."""
    query, target = embeddings()
    hard = torch.randn(N, D, dtype=torch.float64)
    section = LOSSES["info_nce"](temperature=0.1, quantised=Quantised(["binary"]))
    options = section.options(OPTIONS) | {"hard_negatives": hard, "hard_offsets": torch.arange(N + 1)}
    plain = {name: option for name, option in options.items() if name != "return_stats"}
    copies = {name: quantised(x, "binary") for name, x in (("query", query), ("target", target), ("hard_negatives", hard))}
    truth = info_nce(query, target, **plain) + info_nce(**plain | copies)
    torch.testing.assert_close(section.function()(query, target, **options)[0], truth, rtol=1e-12, atol=0)


def test_the_sigmoid_loss_alone_is_unchanged():
    query, target = embeddings()
    alone = sigmoid_loss(query, target, scale=10.0, bias=-10.0, normalize=True, target_ids=torch.arange(N))
    torch.testing.assert_close(value(LOSSES["sigmoid_loss"](), query, target), alone, rtol=1e-6, atol=0)  # log(10) in float32
