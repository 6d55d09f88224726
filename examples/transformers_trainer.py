"""transformers.Trainer: `compute_loss` from hidden states, pooling and normalisation included.

python examples/transformers_trainer.py
"""

import tempfile

import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel, Trainer, TrainingArguments

from contrastive_kernels import pooled_info_nce

TEMPERATURE = 0.05


class Before(Trainer):
    """Last token by hand, normalise, all logits, cross entropy."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        rows = []
        for side in ("query", "target"):
            mask = inputs[f"{side}_mask"]
            hidden = model(input_ids=inputs[f"{side}_ids"], attention_mask=mask).last_hidden_state
            rows.append(F.normalize(hidden[torch.arange(len(hidden)), mask.sum(1) - 1], dim=-1))
        logits = rows[0] @ rows[1].T / TEMPERATURE
        return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


class After(Trainer):
    """Hidden states in, loss out."""

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        hidden = {s: model(input_ids=inputs[f"{s}_ids"], attention_mask=inputs[f"{s}_mask"]).last_hidden_state for s in ("query", "target")}
        return pooled_info_nce(
            hidden["query"],
            hidden["target"],
            query_attention_mask=inputs["query_mask"],
            target_attention_mask=inputs["target_mask"],
            temperature=TEMPERATURE,
        )


def rows(count=16, length=9):
    """Pairs of token ids, padded on the right to one length."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for _ in range(count):
        row = {}
        for side in ("query", "target"):
            used = int(torch.randint(3, length + 1, (), generator=generator))
            row[f"{side}_ids"] = torch.randint(1, 60, (length,), generator=generator)
            row[f"{side}_mask"] = (torch.arange(length) < used).long()
        out.append(row)
    return out


def run(trainer_class):
    """Losses that the trainer logs over two steps, and the weights after them."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertModel(config, add_pooling_layer=False)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=2,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            remove_unused_columns=False,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = trainer_class(model=model, args=arguments, train_dataset=rows())
        trainer.train()
        losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        norms = torch.tensor([float(entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry])
    query = {k: torch.stack([row[k] for row in rows()]) for k in rows()[0]}
    model.zero_grad()
    loss = trainer.compute_loss(model, query)
    loss.backward()
    return {
        "logged losses": losses,
        "logged norms": norms,
        "loss": loss.detach(),
        "gradient": model.encoder.layer[0].output.dense.weight.grad,
    }


def before():
    return run(Before)


def after():
    return run(After)


if __name__ == "__main__":
    one, other = before(), after()
    for name, value in other.items():
        print(f"{name:<14} largest difference {float((value - one[name]).abs().max()):.1e} of {float(value.abs().max()):.1e}")
