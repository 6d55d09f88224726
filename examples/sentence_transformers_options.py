"""sentence-transformers' further losses as options of info_nce: GTE's joint softmax, hardness modes, CLIP's mean, GIST's margins.

    python examples/sentence_transformers_options.py

Each function takes queries, their positives and a hard negative each, all (N, D) and not normalised, and gives the loss of the recipe
that it is named after. Negatives lie behind the positives in one matrix of targets, so every query sees every other's.
"""

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import GISTEmbedLoss, MultipleNegativesRankingLoss
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from contrastive_kernels import info_nce

ALPHA, MARGIN = 4.0, 0.1


def shared_hard_negatives(query, positive, negative, **options):
    """Everyone's hard negatives are candidates of every query: one matrix of targets, positives first."""
    first = torch.arange(len(query), device=query.device)
    return info_nce(query, torch.cat([positive, negative]), positives=first, normalize=True, **options)


def hardness(scope, query, positive, negative, **options):
    """`hardness_mode`: the own negatives are taken out of the batch (they bear the positive's id) and come back as hard negatives."""
    ids = torch.arange(len(query), device=query.device).repeat(2)
    return shared_hard_negatives(
        query, positive, negative, target_ids=ids, hard_negatives=negative[:, None], hardness=ALPHA, hardness_scope=scope, **options
    )


def gte(query, positive, negative, **options):
    """All four directions in one softmax. Queries are targets too: q_i meets q_j, and d_i, by `target_negatives`, q_j and d_j.

    What belongs to row i bears its number and is dropped. The positive pair stands in the denominator twice, once from either side: the
    second time as a hard negative.
    """
    rows = torch.arange(len(query), device=query.device)
    targets, ids = torch.cat([positive, query]), rows.repeat(2)
    own = positive[:, None]
    return info_nce(query, targets, positives=rows, target_ids=ids, target_negatives=True, hard_negatives=own, normalize=True, **options)


def clip(query, positive, negative, **options):
    """Two directions, a softmax each, and their mean."""
    return info_nce(query, positive, symmetric=True, normalize=True, **options)


def gist(query, positive, negative, *, relative=False, **options):
    """The model guides itself: whatever lies nearer than the positive less a margin is no negative. Queries and positives contrast too."""
    margins = {"mask_relative": -MARGIN} if relative else {"mask_margin": -MARGIN}
    return info_nce(query, positive, query_negatives=True, target_negatives=True, normalize=True, **margins, **options)


class Tower(torch.nn.Module):
    """Stands for a transformer: token embeddings, averaged."""

    max_seq_length = 7

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(100, 16)
        vocabulary = {str(i): i for i in range(100)}
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="0")))

    def forward(self, features):
        return {**features, "sentence_embedding": self.embedding(features["input_ids"]).mean(1)}

    def save(self, *_, **__):
        raise NotImplementedError("the library asks every module for `save`; this one lives as long as the example")


def ranking(columns=3, **options):
    return lambda model, given: MultipleNegativesRankingLoss(model, scale=20.0, **options)(given[:columns], None)


def guided(strategy):
    return lambda model, given: GISTEmbedLoss(model, model, temperature=0.05, margin_strategy=strategy, margin=MARGIN)(given[:2], None)


EVERY = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
# name: (sentence-transformers' loss, ours)
RECIPES = {
    "shared hard negatives": (ranking(), shared_hard_negatives),
    "hardness, all negatives": (
        ranking(hardness_mode="all_negatives", hardness_strength=ALPHA),
        lambda *given, **options: hardness("all", *given, **options),
    ),
    "hardness, in-batch negatives": (
        ranking(hardness_mode="in_batch_negatives", hardness_strength=ALPHA),
        lambda *given, **options: hardness("in_batch", *given, **options),
    ),
    "hardness, hard negatives": (
        ranking(hardness_mode="hard_negatives", hardness_strength=ALPHA),
        lambda *given, **options: hardness("hard", *given, **options),
    ),
    "GTE": (ranking(2, directions=EVERY, partition_mode="joint"), gte),
    "CLIP": (ranking(2, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"), clip),
    "GIST, absolute margin": (guided("absolute"), gist),
    "GIST, relative margin": (guided("relative"), lambda *given, **options: gist(*given, relative=True, **options)),
}


def run(compute):
    """Loss and the gradient of the token embeddings, for one batch."""
    torch.manual_seed(0)
    model = SentenceTransformer(modules=[Tower()], device="cpu")
    given = [{"input_ids": torch.randint(0, 100, (12, 7)), "attention_mask": torch.ones(12, 7, dtype=torch.int64)} for _ in range(3)]
    loss = compute(model, given)
    loss.backward()
    return loss.detach(), model[0].embedding.weight.grad


def fused(recipe):
    return lambda model, given: recipe(*(model(dict(column))["sentence_embedding"] for column in given), temperature=0.05)


def _by_name(which):
    out = {}
    for name, pair in RECIPES.items():
        loss, gradient = run(pair[0] if which == 0 else fused(pair[1]))
        out |= {name: loss, f"{name}, gradient": gradient}
    return out


def before():
    return _by_name(0)


def after():
    return _by_name(1)


if __name__ == "__main__":
    one, other = before(), after()
    for name, value in other.items():
        print(f"{name:<40} largest difference {float((value - one[name]).abs().max()):.1e} of {float(value.abs().max()):.1e}")
