"""sentence-transformers: (Cached)MultipleNegativesRankingLoss with its loss stage swapped. The model, trainer and data stay.

    python examples/sentence_transformers_loss.py

Both subclasses keep every argument of the loss that they replace but for `similarity_fct`, `directions`, `hardness_*` and
`gather_across_devices`, which they refuse when set: info_nce has options of its own for them (symmetric, query_negatives,
hardness, group).
"""

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss

from contrastive_kernels import info_nce, info_nce_value_and_grad


def options_of(loss, columns, rows):
    """What info_nce is called with: positives first, then the other columns of documents, as these losses lay them out."""
    if loss.directions != ("query_to_doc",) or loss.hardness_mode is not None or loss.gather_across_devices:
        raise ValueError("expected the default directions, hardness and gathering; pass info_nce's own options instead")
    return {
        "target": torch.cat(columns),
        "positives": torch.arange(rows, device=columns[0].device),
        "temperature": 1 / loss.scale,
        "normalize": True,
    }


class FusedLoss(MultipleNegativesRankingLoss):
    """MultipleNegativesRankingLoss without the matrix of scores."""

    def compute_loss_from_embeddings(self, embeddings, labels):
        query, *columns = embeddings
        return info_nce(query, **options_of(self, columns, len(query)))


class FusedCachedLoss(CachedMultipleNegativesRankingLoss):
    """The cached form: embeddings are made in mini-batches, the loss over all of them at once."""

    def calculate_loss(self, reps, labels=None, *, with_backward=False):
        query, *columns = [torch.cat(parts) for parts in reps]
        options = options_of(self, [column.detach() for column in columns], len(query))
        if not with_backward:
            return info_nce(query, **{**options, "target": torch.cat(columns)})
        result = info_nce_value_and_grad(query.detach(), **options)
        sizes = [sum(map(len, parts)) for parts in reps[1:]]
        for parts, gradient in zip(reps, [result.d_query, *result.d_target.split(sizes)]):
            for part, piece in zip(parts, gradient.split([len(part) for part in parts])):
                part.grad = piece
        return result.loss


class Tower(torch.nn.Module):
    """Stands for a transformer: token embeddings, averaged."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(100, 24)
        self.dense = torch.nn.Linear(24, 16)

    def forward(self, features):
        mask = features["attention_mask"][..., None].float()
        mean = (self.embedding(features["input_ids"]) * mask).sum(1) / mask.sum(1)
        return {**features, "sentence_embedding": self.dense(mean)}

    def save(self, *_, **__):
        raise NotImplementedError("the library asks every module for `save`; this one lives as long as the example")


def run(make):
    """Loss and gradients of one batch: queries, positives, and one hard negative each."""
    torch.manual_seed(0)
    model = SentenceTransformer(modules=[Tower()], device="cpu")
    columns = [{"input_ids": torch.randint(0, 100, (12, 7)), "attention_mask": torch.ones(12, 7, dtype=torch.int64)} for _ in range(3)]
    loss = make(model)(columns, None)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def before():
    plain = run(lambda model: MultipleNegativesRankingLoss(model, scale=20.0))
    cached = run(lambda model: CachedMultipleNegativesRankingLoss(model, scale=20.0, mini_batch_size=4))
    return {**plain, **{"cached " + name: value for name, value in cached.items()}}


def after():
    plain = run(lambda model: FusedLoss(model, scale=20.0))
    cached = run(lambda model: FusedCachedLoss(model, scale=20.0, mini_batch_size=4))
    return {**plain, **{"cached " + name: value for name, value in cached.items()}}


if __name__ == "__main__":
    one, other = before(), after()
    for name, value in other.items():
        print(f"{name:<32} largest difference {float((value - one[name]).abs().max()):.1e} of {float(value.abs().max()):.1e}")
