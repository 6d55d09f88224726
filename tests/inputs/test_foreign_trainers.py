"""transformers' Trainer and TRL's over a model, with gradient checkpointing in each form: the weights that a run without it gives."""

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from contrastive_kernels import info_nce
from tests.helpers.tiny_models import qwen2_vl
from vlm2vec import VLM2Vec

PAIRS = Dataset.from_dict({"query": ["find a fox", "a hen", "one cow", "cat"], "target": ["fox", "two hens", "a brown cow", "cats"]})


class Contrastive:
    """A trainer's loss on packed sides; stands before the trainer's class."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        query, target = (model(inputs[side]).float() for side in ("query", "target"))
        loss = info_nce(query, target, normalize=True, temperature=0.1)
        return (loss, {}) if return_outputs else loss


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    qwen2_vl(folder)
    return folder


def trained(trainer, arguments, folder, output, adapter=False, **chosen):
    """The model after two steps, and whether its layers were recomputed in them."""
    model = VLM2Vec.from_pretrained(folder, device="cpu")
    if adapter:
        torch.manual_seed(3)
        model.add_adapter(r=2, alpha=8)

    def collate(rows):
        return {side: model.pack(model.preprocess([row[side] for row in rows])) for side in ("query", "target")}

    made = arguments(
        output_dir=str(output),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        **chosen,
    )
    own = type("Own", (Contrastive, trainer), {})
    own(model=model, args=made, train_dataset=PAIRS, data_collator=collate, processing_class=model.processing.tokenizer).train()
    recomputed = sum(getattr(m, "gradient_checkpointing", False) for m in model.model.language_model.layers)
    return {name: value.clone() for name, value in model.state_dict().items()}, recomputed


# Arguments of the trainer -> how many of the two decoder layers are recomputed.
FORMS = {
    "on": ({"gradient_checkpointing": True}, 2),
    "reentrant": ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, 2),
    "not reentrant": ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}, 2),
    "every second layer": ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"every_n_layers": 2}}, 1),
    "offloaded": ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"offload": True}}, 2),
}
NEWER = ("every second layer", "offloaded")


def same_weights(trainer, arguments, folder, tmp_path, form, **fixed):
    if form in NEWER and not hasattr(VLM2Vec.from_pretrained(folder, device="cpu").model, "activation_checkpointing_enable"):
        pytest.skip("this transformers has no such argument")
    plain, none = trained(trainer, arguments, folder, tmp_path, gradient_checkpointing=False, **fixed)
    chosen, count = FORMS[form]
    found, recomputed = trained(trainer, arguments, folder, tmp_path, **chosen, **fixed)
    assert (none, recomputed) == (0, count)
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)
    before = VLM2Vec.from_pretrained(folder, device="cpu").state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in plain.items() if name in before) or fixed.get("adapter")


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("form", FORMS)
def test_transformers_trainer(form, adapter, folder, tmp_path):
    same_weights(Trainer, TrainingArguments, folder, tmp_path, form, adapter=adapter)


@pytest.mark.parametrize("form", ["on", "every second layer"])
def test_trl(form, folder, tmp_path):
    trl = pytest.importorskip("trl", minversion="1.0")  # older ones go with older transformers
    fixed = {"dataset_kwargs": {"skip_prepare_dataset": True}}
    same_weights(trl.SFTTrainer, trl.SFTConfig, folder, tmp_path, form, **fixed)
