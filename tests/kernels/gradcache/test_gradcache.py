"""GradCache against one backward through the same chunks with every graph kept (float64, 1e-10)."""

import pytest
import torch
from torch import nn

from contrastive_kernels import GradCache, InfoNCELoss, info_nce
from contrastive_kernels.gradcache.chunking import row_chunks, token_budget_chunks
from contrastive_kernels.gradcache.generator_state import GeneratorState
from tests.kernels.helpers.gradcache_encoder import Encoder, assert_same, batch, gradients


def kept_graphs(encoder, query, target, chunks, **options):
    """Truth: every chunk encoded once with its graph, one backward."""
    sides = []
    for inputs, rows_of_chunks in zip((query, target), chunks, strict=True):
        encoded = torch.cat([encoder(inputs, rows) for rows in rows_of_chunks])
        order = torch.tensor([row for rows in rows_of_chunks for row in rows])
        sides.append(torch.zeros_like(encoded).index_copy(0, order, encoded))
    loss = info_nce(sides[0], sides[1], normalize=True, **options)
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("retain", [0, 1, 3, "all"])
@pytest.mark.parametrize("budget", [9, 12, 1000])
def test_equals_kept_graphs_with_dropout(retain, budget):
    query, target = batch(7, 1), batch(14, 2)  # two targets a query
    lengths = [len(x) for x in query], [len(x) for x in target]
    encoder = Encoder()
    torch.manual_seed(3)
    truth_loss = kept_graphs(encoder, query, target, [token_budget_chunks(x, budget) for x in lengths], temperature=0.1)
    truth, after = gradients(encoder), torch.get_rng_state()

    encoder.zero_grad()
    torch.manual_seed(3)
    cache = GradCache(encoder, chunk_tokens=budget, retain=retain)
    result = cache.step(query, target, lengths=lengths, normalize=True, temperature=0.1)
    torch.testing.assert_close(result.loss, truth_loss, rtol=1e-12, atol=1e-12)
    assert_same(gradients(encoder), truth)
    assert torch.equal(torch.get_rng_state(), after), "a step must leave the generator where one forward leaves it"


def test_equals_one_big_batch_without_dropout():
    query, target = batch(9, 4), batch(9, 5)
    encoder = Encoder(dropout=0.0)
    info_nce(encoder(query, range(9)), encoder(target, range(9)), normalize=True, temperature=0.05).backward()
    truth = gradients(encoder)
    encoder.zero_grad()
    GradCache(encoder, chunk_size=2).step(
        query, target, lengths=([len(x) for x in query], [len(x) for x in target]), normalize=True, temperature=0.05
    )
    assert_same(gradients(encoder), truth)


@pytest.mark.parametrize("keep_mib,runs", [(1.0, 1), (0.0, 2)])
def test_frozen_part_runs_once_where_it_is_kept(keep_mib, runs):
    query, target = batch(6, 6), batch(6, 7)
    lengths = [len(x) for x in query], [len(x) for x in target]
    encoder = Encoder()
    for parameter in (*encoder.tower.parameters(), *encoder.embed.parameters()):
        parameter.requires_grad_(False)
    chunks = [row_chunks(x, 2) for x in lengths]
    torch.manual_seed(8)
    kept_graphs(encoder, query, target, chunks, temperature=0.1)
    truth = gradients(encoder)
    encoder.zero_grad()
    encoder.tower_runs = 0
    torch.manual_seed(8)
    cache = GradCache(encoder, chunk_size=2, freeze=encoder.features, keep_mib=keep_mib)
    cache.step(query, target, lengths=lengths, normalize=True, temperature=0.1)
    assert_same(gradients(encoder), truth)
    assert encoder.tower_runs == runs * sum(map(len, chunks))


def test_separate_towers_hard_negatives_and_temperature():
    query, target, hard = batch(5, 1), batch(5, 2), batch(7, 3)
    offsets = torch.tensor([0, 2, 2, 3, 6, 7])  # any number per query, none included
    towers = nn.ModuleList([Encoder(0.0), Encoder(0.0)])
    log_temperature = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))

    def loss_of(q, t, h):
        return info_nce(q, t, normalize=True, temperature=log_temperature.exp(), hard_negatives=h, hard_offsets=offsets)

    loss_of(towers[0](query, range(5)), towers[1](target, range(5)), towers[1](hard, range(7))).backward()
    truth = gradients(towers) | {"temperature": log_temperature.grad.clone()}
    towers.zero_grad()
    log_temperature.grad = None
    GradCache((towers[0], towers[1]), chunk_tokens=10).step(
        query,
        target,
        hard_negatives=hard,
        lengths=tuple([len(x) for x in side] for side in (query, target, hard)),
        normalize=True,
        temperature=log_temperature.exp(),
        hard_offsets=offsets,
    )
    assert_same(gradients(towers) | {"temperature": log_temperature.grad}, truth)


def test_loss_module_with_its_own_parameter():
    query, target = batch(6, 1), batch(6, 2)
    lengths = [len(x) for x in query], [len(x) for x in target]
    encoder, loss = Encoder(0.0), InfoNCELoss(temperature=0.1, learnable_temperature=True, normalize=True).double()
    loss(encoder(query, range(6)), encoder(target, range(6))).backward()
    truth = gradients(encoder) | gradients(loss)
    encoder.zero_grad()
    loss.zero_grad()
    GradCache(encoder, loss, chunk_size=4).step(query, target, lengths=lengths)
    assert_same(gradients(encoder) | gradients(loss), truth)


def test_autocast_around_the_step_keeps_the_weights_gradients():
    query, target = batch(6, 1), batch(6, 2)
    lengths = [len(x) for x in query], [len(x) for x in target]
    encoder = Encoder(0.0).float()
    collected = []
    for size in (6, 2):
        encoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            GradCache(encoder, chunk_size=size).step(query, target, lengths=lengths, normalize=True)
        collected.append(gradients(encoder))
    assert "head.1.weight" in collected[0]
    for name, value in collected[0].items():
        torch.testing.assert_close(collected[1][name], value, rtol=2e-2, atol=2e-2 * value.abs().max().item())


@pytest.mark.parametrize("loss", [None, "module"])
def test_a_real_scaler_unscales_to_the_plain_gradients(loss):
    query, target = batch(4, 1), batch(4, 2)
    lengths = [len(x) for x in query], [len(x) for x in target]
    encoder = Encoder(0.0)
    module = InfoNCELoss(temperature=0.1, learnable_temperature=True).double() if loss else None
    log_temperature = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))
    learned = module.log_temperature if loss else log_temperature

    def step(scaler):
        encoder.zero_grad()
        learned.grad = None
        options = {} if loss else {"temperature": log_temperature.exp()}
        GradCache(encoder, module, chunk_size=2, scaler=scaler).step(query, target, lengths=lengths, normalize=True, **options)
        return gradients(encoder) | {"temperature": learned.grad.clone()}

    plain = step(None)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD([*encoder.parameters(), learned], lr=0.1)
    scaled = step(scaler)
    assert_same({k: v / 1024.0 for k, v in scaled.items()}, plain)
    scaler.unscale_(optimizer)
    assert_same(gradients(encoder) | {"temperature": learned.grad}, plain)


def test_an_overflow_skips_the_step_and_lowers_the_scale():
    """Half-precision embeddings: their scaled gradient overflows at first, and goes through once the scale has come down."""
    query, target = batch(4, 1), batch(4, 2)
    lengths = [len(x) for x in query], [len(x) for x in target]
    encoder = Encoder(0.0).float()
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, backoff_factor=2.0**-12, growth_interval=1000)
    cache = GradCache(lambda inputs, rows: encoder(inputs, rows).half(), chunk_size=2, scaler=scaler)
    moved, scales = [], []
    for _ in range(2):
        before = [p.detach().clone() for p in encoder.parameters()]
        optimizer.zero_grad()
        cache.step(query, target, lengths=lengths, normalize=True, temperature=0.02)
        scaler.step(optimizer)
        scaler.update()
        moved.append(any(not torch.equal(p, q) for p, q in zip(encoder.parameters(), before, strict=True)))
        scales.append(scaler.get_scale())
    assert moved == [False, True]
    assert scales == [2.0**10, 2.0**10]


def test_chunks_cover_every_row_once_within_the_budget():
    lengths = [3, 9, 1, 1, 20, 4, 0, 5]
    chunks = token_budget_chunks(lengths, 10)
    assert sorted(row for chunk in chunks for row in chunk) == list(range(8))
    assert chunks[0] == [4], "a row above the budget stands alone, and the longest come first"
    assert all(sum(lengths[row] for row in chunk) <= 10 for chunk in chunks[1:])
    assert token_budget_chunks([], 10) == []


def test_generator_state_replays_dropout():
    state = GeneratorState.capture()
    first = torch.rand(3)
    state.restore()
    assert torch.equal(torch.rand(3), first)


@pytest.mark.parametrize(
    "arguments,words",
    [
        ({}, "exactly one of chunk_tokens"),
        ({"chunk_tokens": 4, "chunk_size": 4}, "exactly one of chunk_tokens"),
        ({"chunk_size": 4, "retain": -1}, "retain: expected"),
        ({"chunk_size": 4, "retain": "some"}, "retain: expected"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        GradCache(Encoder(), **arguments)


def test_bad_inputs_are_named():
    encoder = Encoder()
    cache = GradCache(encoder, chunk_size=2)
    with pytest.raises(ValueError, match="lengths: expected a sequence for each"):
        cache.step(batch(2, 1), batch(2, 2), lengths=([1, 2],))
    with pytest.raises(ValueError, match="query: expected at least one row"):
        cache.step([], batch(2, 2), lengths=([], [1, 2]))
    with pytest.raises(ValueError, match="encode: expected"):
        GradCache(lambda inputs, rows: torch.zeros(1), chunk_size=2).step(batch(2, 1), batch(2, 2), lengths=([1, 1], [1, 1]))
