"""Every example runs, and loss and gradients are the same before and after its swap."""

import importlib.util
import sys

import pytest
import torch

from tests.helpers.repository import ROOT

EXAMPLES = ROOT / "examples"
NEEDS = {
    "pytorch_loop": (),
    "sentence_transformers_loss": ("sentence_transformers",),
    "sentence_transformers_options": ("sentence_transformers",),
    "open_clip_loss": ("open_clip",),
    "gradcache_loss": ("gradcache",),
    "transformers_trainer": ("transformers", "accelerate"),
}


ELSEWHERE = {"ray_data_embedding": "tests/vlm2vec/scale/test_ray_data.py"}  # no swap of a loss


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_all_are_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NEEDS) | set(ELSEWHERE)
    assert all((ROOT / test).is_file() for test in ELSEWHERE.values())


@pytest.mark.parametrize("name", NEEDS)
def test_nothing_changes(name):
    for package in NEEDS[name]:
        pytest.importorskip(package, reason=f"{package} is not installed; pip install -e '.[peers]'")
    module = load(name)
    before, after = module.before(), module.after()
    assert before.keys() == after.keys() and len(before) >= 3
    for key, value in before.items():
        assert value.isfinite().all() and value.any(), key
        # float32, and optimizer steps that divide by small gradients: a few ulp of the largest entry
        torch.testing.assert_close(after[key], value, rtol=2e-4, atol=2e-5 * float(value.abs().max()), msg=lambda m: f"{key}: {m}")
