"""A model in use by several threads gives what one thread gives, to the last bit, or says that it is busy."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.tiny_generic import BUILDERS as GENERIC
from tests.helpers.tiny_models import BUILDERS as NAMED
from vlm2vec.encoding import evaluating
from vlm2vec.model import VLM2Vec

BUILDERS = {**NAMED, **GENERIC}
THREADS = 8


def noise(width, height, seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# One row and several, texts alone, pictures alone, both in one input, alike and of other lengths: what one thread's rows would be
# taken from in another's call shows in the bits.
BATCHES = [
    ["a"],
    ["a photo of a cat", "a"],
    [{"image": noise(56, 56, 1)}],
    ["the museum opened in 1932 and holds paintings", {"text": "what?", "image": noise(40, 28, 2)}, "a photo of a dog"],
    ["a", "a", "a"],
    [{"text": "before <|image_1|> behind", "image": noise(28, 84, 3)}, "short"],
]


def tiny(folder, family, **options):
    BUILDERS[family](folder)
    return VLM2Vec.from_pretrained(folder, dtype="float32", **options)


def differing(model, batches_of_a_thread: int) -> list[tuple[int, int]]:
    """(thread, batch) whose rows are not one thread's; each thread goes through the batches from another one on."""
    alone = [model.encode(batch) for batch in BATCHES]
    start = threading.Barrier(THREADS)

    def work(thread):
        start.wait()
        turns = ((thread + turn) % len(BATCHES) for turn in range(batches_of_a_thread))
        return [(thread, at) for at in turns if not np.array_equal(model.encode(BATCHES[at]), alone[at])]

    with ThreadPoolExecutor(THREADS) as pool:
        return [wrong for found in pool.map(work, range(THREADS)) for wrong in found]


def test_eight_threads_of_400_batches(tmp_path):
    assert not differing(tiny(tmp_path, "qwen2_vl"), 400)


@pytest.mark.parametrize("family", sorted(set(BUILDERS) - {"qwen2_vl"}))
def test_every_family(tmp_path, family):
    assert not differing(tiny(tmp_path, family), 2 * len(BATCHES))


def test_a_model_in_training_mode_stays_there(tmp_path):
    """Threads overlap, so one ends while another is in the midst: no dropout may begin, and each module keeps its own mode."""
    model = tiny(tmp_path, "qwen2_vl")
    expected = [model.encode(batch) for batch in BATCHES]
    model.add_adapter(r=4, dropout=0.9, vision=False)  # a fresh adapter adds nothing but where dropout is on: B is zero
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.05)
    with_adapter = [model.encode(batch) for batch in BATCHES]
    assert not np.array_equal(with_adapter[0], expected[0])
    model.train()
    model.model.visual.eval()  # a frozen tower
    modes = [module.training for module in model.modules()]
    assert not differing(model, 3 * len(BATCHES))
    assert [module.training for module in model.modules()] == modes
    assert all(np.array_equal(model.encode(batch), rows) for batch, rows in zip(BATCHES, with_adapter))


def test_an_error_gives_the_modes_back(tmp_path):
    model = tiny(tmp_path, "qwen2_vl").train()
    with pytest.raises(ValueError, match="input 1: "):
        model.encode(["a", {"image": tmp_path / "gone.png"}])
    assert all(module.training for module in model.modules())


def elsewhere(call):
    """The result or the error of a call in another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(call).exception()


def test_training_under_an_encoding_thread_is_refused(tmp_path):
    model = tiny(tmp_path, "qwen2_vl").train()
    packed = model.pack(model.preprocess(["a"]))
    with evaluating(model):
        assert "another thread encodes with it" in str(elsewhere(lambda: model(packed)))
        assert "call train() when that is done" in str(elsewhere(model.train))
        assert elsewhere(lambda: model.encode("a")) is None  # several may encode
    assert elsewhere(lambda: model(packed)) is None


def test_encoding_under_a_training_thread_is_refused(tmp_path):
    model = tiny(tmp_path, "qwen2_vl").train()
    packed = model.pack(model.preprocess(["a"]))
    errors = []
    handle = model.model.language_model.layers[0].register_forward_hook(
        lambda *_: errors.append(elsewhere(lambda: model.encode("a"))) if model.training else None
    )
    model(packed)
    handle.remove()
    assert [str(error).partition(":")[0] for error in errors] == ["the model is busy"]
    assert model.training
    model.eval()  # in evaluation mode there is nothing to disturb
    handle = model.model.language_model.layers[0].register_forward_hook(lambda *_: None)
    assert elsewhere(lambda: model.encode("a")) is None
    handle.remove()


def test_eval_within_an_encoding_is_meant_to_last(tmp_path):
    model = tiny(tmp_path, "qwen2_vl").train()
    with evaluating(model):
        model.eval()
    assert not model.training


def test_no_hook_and_no_module_is_left_behind(tmp_path):
    model = tiny(tmp_path, "qwen2_vl")
    before = [(name, id(module), len(module._forward_pre_hooks), len(module._forward_hooks)) for name, module in model.named_modules()]
    model.encode(BATCHES[3])
    after = [(name, id(module), len(module._forward_pre_hooks), len(module._forward_hooks)) for name, module in model.named_modules()]
    assert after == before


def test_a_copy_has_modes_of_its_own(tmp_path):
    model = tiny(tmp_path, "qwen2_vl").train()
    other = copy.deepcopy(model)
    with evaluating(model):
        assert other.training
        assert other(other.pack(other.preprocess(["a"]))).requires_grad


def test_a_decoder_bound_to_itself_still_gives_the_last_rows(tmp_path):
    """What accelerate's dispatch and compiling in place do: `forward` on the instance runs the decoder's own norm, on every token."""
    model = tiny(tmp_path, "qwen2_vl")
    expected = model.encode(BATCHES[3])
    text = model.model.language_model
    text.forward = text.forward
    assert np.array_equal(model.encode(BATCHES[3]), expected)


def test_rows_of_the_norm_get_the_gradient_of_the_whole(tmp_path):
    model = tiny(tmp_path, "qwen2_vl")
    packed = model.pack(model.preprocess(["a photo of a cat", "a"]))
    cotangent = torch.randn(2, model.embedding_dim, generator=torch.Generator().manual_seed(1))
    grads = []
    for bound in (False, True):
        if bound:
            model.model.language_model.forward = model.model.language_model.forward
        model.zero_grad()
        (model(packed) * cotangent).sum().backward()
        grads.append(model.model.language_model.norm.weight.grad.clone())
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)
