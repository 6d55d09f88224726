"""The plan against runs: live bytes predicted under fake tensors, next to those of the same step on real ones."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers.measured_peak import measured
from tests.helpers.tiny_recipe import write_recipe
from train.build import trained_parameters
from train.plan.batch import _counts, first_batch
from train.plan.fake.model import fake_model
from train.plan.gpus import GPUS, parse_gpu
from train.plan.live_bytes import LiveBytes
from train.plan.report import report
from train.plan.search import _largest_chunk, make_plan, usable
from train.plan.simulate import simulate
from train.recipe.schema import load_recipe

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LORA = {"lora": {"r": 4, "alpha": 8, "dropout": 0.1, "dora": False}}
KINDS = {
    "full": {},
    "vision-frozen": {"freeze_vision": True},
    "checkpointing": {"gradient_checkpointing": True},
    "lora": LORA,
    "qlora": {**LORA, "quantization": "nf4"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    write_recipe(folder)
    return folder


@pytest.mark.parametrize("kind,retain", [(kind, 0) for kind in KINDS] + [("full", "all"), ("full", 2), ("lora", "all"), ("qlora", "all")])
def test_predicted_peak_is_the_measured_one(root, kind, retain):
    recipe = load_recipe(write_recipe(root, output=str(root / "o"), retain=retain, **KINDS[kind]))
    plan = simulate(recipe, None, make_batch=lambda processing: first_batch(recipe, processing, 1), flash=False, most_chunks=1000)
    assert 1.0 <= plan.peak / measured(recipe) <= 1.02
    assert sum(plan.parts.values()) == plan.peak


def test_live_bytes_follow_storages_not_tensors():
    with LiveBytes() as live:
        x = torch.ones(256)
        views = [x[:10], x.view(16, 16)]
        assert live.current == 1024
        y = x + 1
        assert live.current == live.peak == 2048
        del x
        assert live.current == 2048, "views hold the storage"
        del views
        assert live.current == 1024
        y.untyped_storage().resize_(0)
        assert live.current == 0
        with live.counting_as("kept"):
            z = torch.zeros(4)
        assert live.by_part["kept"] == 16 and live.peak == 2048
        live.relabel([z, None], "other")
        assert live.by_part["kept"] == 0 and live.by_part["other"] == 16
    assert torch.UntypedStorage.resize_ is live._original_resize


def test_a_sharded_plan_holds_whole_gradients_and_a_share_of_the_state(root):
    values = {"output": str(root / "o"), "global_batch": 8, "chunk_tokens": 100}
    alone = load_recipe(write_recipe(root, **values))
    sharded = load_recipe(write_recipe(root, distributed="fsdp", **values))
    one = simulate(alone, None, make_batch=lambda processing: first_batch(alone, processing, 1))
    four = simulate(sharded, None, ranks=4, make_batch=lambda processing: first_batch(sharded, processing, 4))
    assert four.trained == one.trained
    assert four.resident < 0.35 * one.resident, "weights and optimizer state are a quarter each, with padding"
    assert four.gathered == pytest.approx(one.weights * 4 * 3 / 4, rel=0.01)
    assert not torch.distributed.is_initialized()


def test_a_plan_says_what_fits_and_how_to_mend_what_does_not(root):
    recipe = load_recipe(write_recipe(root, output=str(root / "o")))
    plan = make_plan(recipe, parse_gpu("80:989:3.35"), name="r.yaml")
    text = report(plan)
    assert plan.fits and plan.largest_chunk == plan.tokens and "predicted" in text and "What this cannot know" in text
    small = make_plan(recipe, parse_gpu("0.7505:100:1"), name="r.yaml")
    assert not small.fits and "NOT predicted to fit" in report(small) and "gradient_checkpointing: true" in report(small)


@pytest.mark.parametrize("word", ["h1000", "80:989", "80:x:1", "0:1:1", "48:inf:1", "nan:1:1"])
def test_an_unknown_gpu_is_refused(word):
    with pytest.raises(ValueError, match="SIZE_GiB:TFLOPS:TBs"):
        parse_gpu(word)
    assert parse_gpu("h100-80") is GPUS["h100-80"]


def test_a_chunk_budget_below_the_longest_sample_is_refused(root):
    recipe = load_recipe(write_recipe(root, output=str(root / "o"), chunk_tokens=8))
    with pytest.raises(ValueError, match="below the longest sample"):
        make_plan(recipe, GPUS["h100-80"])


def test_shares_add_up_to_the_batch():
    assert _counts([0.55, 0.25, 0.2], 10) == [6, 2, 2]
    assert _counts([1, 1, 1], 100) == [34, 33, 33]


@pytest.mark.parametrize(
    "name,published,head_is_tied",
    [
        ("Qwen/Qwen2-VL-2B-Instruct", 2_208_985_600, True),
        ("Qwen/Qwen2-VL-7B-Instruct", 8_291_375_616, False),
        ("Qwen/Qwen3-VL-8B-Instruct", 8_767_123_696, False),
        ("llava-hf/llava-v1.6-mistral-7b-hf", 7_566_747_648, False),
        ("microsoft/Phi-3.5-vision-instruct", 4_146_621_440, False),
    ],
)
def test_models_have_the_published_number_of_weights(root, name, published, head_is_tied):
    """The published models end in a head over the vocabulary, which embeddings do without."""
    recipe = load_recipe(write_recipe(root, output=str(root / "o"), model=name))
    model = fake_model(recipe, FakeTensorMode())
    text = model.config.get_text_config()
    head = 0 if head_is_tied else text.vocab_size * text.hidden_size
    assert trained_parameters(model)[1] + head == published
    assert model.config.tie_word_embeddings is head_is_tied


@pytest.mark.parametrize("kink", [0, 30_000, 90_000])
@pytest.mark.parametrize("start", [1024, 8192, 40_000, 70_000])
def test_the_largest_chunk_is_found_from_wherever_the_search_starts(root, kink, start):
    """Peaks that stand still and then rise, as where the optimizer's step needs more than small chunks do."""
    gpu, tried = parse_gpu("10:100:1"), []

    def peak_of(tokens):
        return int(2.0**30 * (4 + max(0, tokens - kink) / 10_000))

    def simulated(tokens):
        return SimpleNamespace(peak=peak_of(tokens), largest=(int(2.0**30 * tokens / 10_000), tokens))

    def run(recipe, most):
        tried.append(recipe.chunk_tokens)
        return simulated(recipe.chunk_tokens)

    recipe = load_recipe(write_recipe(root, output=str(root / "o"), chunk_tokens=start))
    limit = next(tokens for tokens in range(256, 10**6, 256) if peak_of(tokens) > usable(gpu)) - 256
    found = _largest_chunk(recipe, gpu, simulated(start), 100, 500_000, run)
    assert 0.9 * limit <= found <= limit and len(tried) <= 4
    assert _largest_chunk(recipe, gpu, simulated(start), 100, start, run) == (start if start <= limit else found)
    assert _largest_chunk(recipe, gpu, simulated(start), limit + 1000, 500_000, run) == 0
    assert limit - 512 <= _largest_chunk(recipe, gpu, simulated(limit + 8000), limit - 512, 500_000, run) <= limit
