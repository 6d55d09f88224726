"""What optimizers, casts, sharding and state dicts do to the numbers that a loss learns."""

import copy

import pytest
import torch

from contrastive_kernels import InfoNCELoss
from tests.helpers.processes import collected, join
from train.losses.sigmoid import ScaledSigmoid

MODULES = {
    "temperature": lambda: InfoNCELoss(temperature=0.02, learnable_temperature=True, normalize=True),
    "scale and bias": lambda: ScaledSigmoid(10.0, -10.0, True),
}
OPTIONS = {"temperature": {}, "scale and bias": {"normalize": True}}
CASTS = {
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "to a dtype": lambda m: m.to(torch.bfloat16),
    "inside a model": lambda m: torch.nn.Sequential(torch.nn.Linear(2, 2), m).bfloat16()[1],
    "there and back": lambda m: m.bfloat16().float(),
    "copied": lambda m: copy.deepcopy(m).bfloat16(),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("kind", MODULES)
def test_casts_leave_them_float32_to_the_last_bit(kind, cast):
    module = MODULES[kind]()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module = CASTS[cast](module)
    for name, value in module.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, before[name])


@pytest.mark.parametrize("kind", MODULES)
def test_a_cast_model_learns_steps_that_bfloat16_would_lose(kind):
    """100 steps of 1e-4 move log(temperature) by 0.01, less than half a bfloat16 step at 3.9."""
    module = MODULES[kind]().bfloat16()
    query, target = torch.randn(6, 8).bfloat16(), torch.randn(6, 8).bfloat16()
    before = {name: value.clone() for name, value in module.named_parameters()}
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-4)
    for _ in range(100):
        optimizer.zero_grad()
        module(query, target, **OPTIONS[kind]).backward()
        optimizer.step()
    for name, value in module.named_parameters():
        assert 0.005 < float((value.detach() - before[name]).abs()) < 0.011, name


@pytest.mark.parametrize("kind", MODULES)
def test_gradients_keep_their_dtype_through_a_cast(kind):
    module = MODULES[kind]()
    module(torch.randn(6, 8), torch.randn(6, 8), **OPTIONS[kind]).backward()
    before = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.bfloat16()
    assert all(torch.equal(p.grad, before[name]) for name, p in module.named_parameters())


@pytest.mark.parametrize("kind", MODULES)
def test_double_stays_double(kind):
    assert all(p.dtype == torch.float64 for p in MODULES[kind]().double().parameters())


@pytest.mark.parametrize("kind", MODULES)
def test_state_dicts_of_numbers_0_d_load(kind):
    """As they were saved before: the same values, strictly, also inside a model."""
    saved = {name: torch.tensor(0.5) for name in MODULES[kind]().state_dict()}
    module = MODULES[kind]()
    module.load_state_dict(saved)
    assert all(p.shape == (1,) and float(p) == 0.5 for p in module.parameters())
    model = torch.nn.Sequential(MODULES[kind]())
    model.load_state_dict({f"0.{name}": value for name, value in saved.items()})
    assert all(float(p) == 0.5 for p in model.parameters())


@pytest.mark.parametrize("kind", MODULES)
def test_they_are_named_for_what_they_must_not_do(kind):
    """Decay is kept from them by their names; with it, a gradient of nothing pulls the temperature to 1."""
    module = MODULES[kind]()
    assert module.no_weight_decay() == {name for name, _ in module.named_parameters()}


def _shard(rank, port, queue):
    try:
        join(rank, port)
        torch.distributed.init_process_group("gloo")
        from torch.distributed.fsdp import fully_shard

        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
        for kind in MODULES:
            torch.manual_seed(0)
            query, target = torch.randn(6, 8), torch.randn(6, 8)
            plain, module = MODULES[kind](), MODULES[kind]()
            plain(query, target, **OPTIONS[kind]).backward()
            fully_shard(module, mesh=mesh)
            module(query, target, **OPTIONS[kind]).backward()
            got = {name: p.grad.full_tensor() for name, p in module.named_parameters()}
            worst = max(float((got[name] - p.grad).abs()) for name, p in plain.named_parameters())
            queue.put((rank, kind, worst, sorted(got)))
        torch.distributed.destroy_process_group()
    except Exception as error:
        queue.put((rank, "failed", repr(error)))
        raise


def test_they_are_sharded():
    """`fully_shard` over two ranks: the gradient of one rank. It refused the 0-d parameters of before."""
    found = collected(_shard, each=len(MODULES))
    for kind in MODULES:
        for rank in range(2):
            worst, names = found[kind, rank]
            assert worst < 1e-6 and names == sorted(name for name, _ in MODULES[kind]().named_parameters())
