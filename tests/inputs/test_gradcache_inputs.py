"""What GradCache refuses of lengths and bounds, and a step without lengths."""

import pytest
import torch

from contrastive_kernels import info_nce
from contrastive_kernels.gradcache import GradCache

NAN, INF = float("nan"), float("inf")


def encoder():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 8).double()


def cache_of(model, **options):
    return GradCache(lambda batch, rows, features=None: model(batch[rows]), module=model, **{"chunk_size": 4, **options})


QUERY, TARGET = torch.randn(6, 4).double(), torch.randn(12, 4).double()
REFUSED = {
    "too few": (([1] * 5, [1] * 12), "expected one for each of the 6 rows of query, got 5"),
    "too few targets": (([1] * 6, [1] * 6), "expected one for each of the 12 rows of target, got 6"),
    "too many": (([1] * 7, [1] * 12), "expected one for each of the 6 rows of query, got 7"),
    "none": (([], [1] * 12), "expected one for each of the 6 rows of query, got 0"),
    "negative": (([1, 1, -2, 1, 1, 1], [1] * 12), "got -2 for row 2 of query"),
    "NaN": (([1, 1, 1, 1, NAN, 1], [1] * 12), "got nan for row 4 of query"),
    "halves": (([1] * 6, [1.5] * 12), "got 1.5 for row 0 of target"),
    "texts": (([1] * 6, ["a"] * 12), "got 'a' for row 0 of target"),
    "a tensor of floats": ((torch.ones(6), [1] * 12), "got 1.0 for row 0 of query"),
    "one side": (([1] * 6,), "expected a sequence for each of query, target, got 1"),
}


@pytest.mark.parametrize("budget", [{"chunk_size": 4}, {"chunk_size": None, "chunk_tokens": 4}], ids=["rows", "tokens"])
@pytest.mark.parametrize("kind", REFUSED)
def test_lengths_that_do_not_fit(kind, budget):
    model = encoder()
    lengths, message = REFUSED[kind]
    with pytest.raises(ValueError, match=f"lengths: .*{message}"):
        cache_of(model, **budget).step(QUERY, TARGET, lengths=lengths, normalize=True)
    assert model.weight.grad is None, "nothing has run"


BOUNDS = {
    "no rows": ({"chunk_size": 0}, "chunk_size: expected an integer of at least 1, got 0"),
    "negative rows": ({"chunk_size": -3}, "chunk_size: expected an integer of at least 1, got -3"),
    "half a row": ({"chunk_size": 0.5}, "chunk_size: expected an integer"),
    "NaN rows": ({"chunk_size": NAN}, "chunk_size: expected an integer of at least 1, got nan"),
    "NaN tokens": ({"chunk_size": None, "chunk_tokens": NAN}, "chunk_tokens: expected an integer of at least 1, got nan"),
    "negative tokens": ({"chunk_size": None, "chunk_tokens": -1}, "chunk_tokens: expected an integer"),
    "infinite tokens": ({"chunk_size": None, "chunk_tokens": INF}, "chunk_tokens: expected an integer of at least 1, got inf"),
    "NaN retain_mib": ({"retain": "auto", "retain_mib": NAN}, "retain_mib: expected MiB of at least 0, got nan"),
    "negative retain_mib": ({"retain": "auto", "retain_mib": -1.0}, "retain_mib: expected MiB of at least 0, got -1.0"),
    "NaN keep_mib": ({"keep_mib": NAN}, "keep_mib: expected MiB of at least 0, got nan"),
    "negative keep_mib": ({"keep_mib": -5}, "keep_mib: expected MiB of at least 0, got -5"),
    "no keep_mib": ({"keep_mib": None}, "keep_mib: expected MiB of at least 0, got None"),
    "negative retain": ({"retain": -1}, "retain: expected a number of chunks"),
    "retain True": ({"retain": True}, "retain: expected a number of chunks"),
}


@pytest.mark.parametrize("kind", BOUNDS)
def test_bounds_that_bound_nothing(kind):
    options, message = BOUNDS[kind]
    with pytest.raises(ValueError, match=message):
        cache_of(encoder(), **options)


SIDES = {
    "tensors": (QUERY, TARGET, lambda batch, rows: batch[rows]),
    "dictionaries": ({"x": QUERY, "more": QUERY[:, 0]}, {"x": TARGET, "more": TARGET[:, 0]}, lambda batch, rows: batch["x"][rows]),
    "tuples": ((QUERY, QUERY), (TARGET, TARGET), lambda batch, rows: batch[0][rows]),
    "lists of tensors": ([QUERY, QUERY], [TARGET, TARGET], lambda batch, rows: batch[0][rows]),
    "lists of rows": (QUERY.tolist(), TARGET.tolist(), lambda batch, rows: torch.tensor([batch[r] for r in rows]).double()),
}


@pytest.mark.parametrize("called", ["step", "call"])
@pytest.mark.parametrize("kind", SIDES)
def test_a_step_without_lengths(kind, called):
    """With chunk_size: the gradients of one backward, by `cache(...)` as by `cache.step(...)`."""
    query, target, take = SIDES[kind]
    model = encoder()
    info_nce(model(QUERY), model(TARGET), normalize=True).backward()
    truth = model.weight.grad.clone()
    model.zero_grad()
    cache = GradCache(lambda batch, rows, features=None: model(take(batch, rows)), chunk_size=4, module=model)
    (cache.step if called == "step" else cache)(query, target, normalize=True)
    torch.testing.assert_close(model.weight.grad, truth, rtol=1e-9, atol=1e-12)


def test_without_lengths_where_they_are_needed():
    with pytest.raises(ValueError, match="lengths: expected the tokens of each row beside chunk_tokens, got None"):
        cache_of(encoder(), chunk_size=None, chunk_tokens=4).step(QUERY, TARGET)
    with pytest.raises(ValueError, match="lengths: expected them for query, whose rows cannot be counted"):
        cache_of(encoder()).step(object(), TARGET)


def test_packed_sides_have_a_row_a_token():
    """Lengths that add up to a side's rows are those of packed samples."""
    model, lengths = encoder(), [2, 1, 3]
    starts = [0, 2, 3, 6]

    def last(batch, rows, features=None):
        return model(torch.stack([batch[starts[r] : starts[r + 1]].sum(0) for r in rows]))

    cache = GradCache(last, chunk_tokens=3, module=model)
    loss = cache.step(QUERY, QUERY.flip(0), lengths=(lengths, lengths), normalize=True).loss
    whole = info_nce(last(QUERY, range(3)), last(QUERY.flip(0), range(3)), normalize=True)
    torch.testing.assert_close(loss, whole.detach())
