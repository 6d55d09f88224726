"""`InfoNCELoss` with a learnable temperature: its value, its gradient, and the bounds that it cannot be lost behind."""

import pytest
import torch

from contrastive_kernels import InfoNCELoss, info_nce


def pairs(easy: bool):
    """A batch whose loss falls with the temperature (positives are nearest), or grows."""
    query = torch.nn.functional.normalize(torch.randn(6, 4, dtype=torch.float64), dim=1)
    return query, query if easy else query.roll(1, 0)


@pytest.mark.parametrize("easy", [True, False])
def test_gradient_within_the_bounds_is_that_of_the_logarithm(easy):
    module = InfoNCELoss(temperature=0.5, learnable_temperature=True).double()
    temperature = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    query, target = pairs(easy)
    module(query, target).backward()
    info_nce(query, target, temperature=temperature).backward()
    torch.testing.assert_close(module.log_temperature.grad, temperature.grad.reshape(1) * 0.5, rtol=1e-6, atol=0)
    assert (module.log_temperature.grad > 0) == easy


@pytest.mark.parametrize("beyond", [0.0, 1.0])
@pytest.mark.parametrize("bound, leads_back", [(0.001, False), (10.0, True)])
def test_beyond_a_bound_only_what_leads_back_passes(bound, leads_back, beyond):
    """Easy pairs pull the temperature down, hard ones up: the one is the way back from above, the other from below."""
    module = InfoNCELoss(temperature=bound, learnable_temperature=True)
    with torch.no_grad():
        module.log_temperature += beyond if bound > 1 else -beyond
    assert abs(float(module.temperature.detach()) / bound - 1) < 1e-6
    for easy in (True, False):
        module.log_temperature.grad = None
        module(*pairs(easy)).backward()
        assert bool(module.log_temperature.grad != 0) == (easy == leads_back), (easy, module.log_temperature.grad)


def test_what_a_module_says_of_itself():
    assert repr(InfoNCELoss(temperature=0.07, symmetric=True)) == "InfoNCELoss(temperature=0.07, symmetric=True)"
    assert repr(InfoNCELoss(temperature=0.05, learnable_temperature=True)) == "InfoNCELoss(temperature=0.05, learnable_temperature=True)"
