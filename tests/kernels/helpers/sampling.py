"""Random batches and random combinations of options, from one seed: what the option tests draw from."""

import itertools

import torch


def unit(*shape, generator, dtype=torch.float64):
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=-1)


class Case:
    """One batch (n queries, m targets, width d) and makers of every option that fits it."""

    def __init__(self, seed: int, n: int = 11, m: int = 22, d: int = 8, dtype=torch.float64):
        self.generator = torch.Generator().manual_seed(seed)
        self.n, self.m, self.d, self.dtype = n, m, d, dtype
        # crowded embeddings, so that margins and ids meet negatives that matter
        centre = torch.randn(1, d, generator=self.generator, dtype=dtype)
        self.query = torch.nn.functional.normalize(centre + unit(n, d, generator=self.generator, dtype=dtype) * 2, dim=-1)
        self.target = torch.nn.functional.normalize(centre + unit(m, d, generator=self.generator, dtype=dtype) * 2, dim=-1)

    def integers(self, low, high, *shape):
        return torch.randint(low, high, shape, generator=self.generator)

    def chance(self, probability, *shape):
        return torch.rand(shape, generator=self.generator) < probability

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=self.dtype)

    def options(self, names) -> dict:
        out = {"temperature": 0.2}
        for name in names:
            out.update(getattr(self, "_" + name)())
        if "query_ids" in out and "target_query_ids" not in out and not (out.get("symmetric") or out.get("query_negatives")):
            # they are refused where no query is a candidate
            out[("symmetric", "query_negatives")[int(self.integers(0, 2))]] = True
        return out

    def _normalize(self):
        self.query = self.query * (0.5 + torch.rand(self.n, 1, generator=self.generator, dtype=self.dtype))
        self.target = self.target * 3
        return {"normalize": True}

    def _learnt_temperature(self):
        return {"temperature": torch.tensor(0.13, dtype=self.dtype)}

    def _positives(self):
        positives = self.integers(0, self.m, self.n)
        positives[1 : 1 + self.n // 8] = positives[0]
        positives[-1] = -100
        return {"positives": positives}

    def _target_ids(self):
        return {"target_ids": self.integers(-1, self.m // 3, self.m)}

    def _query_ids(self):
        return {"query_ids": self.integers(-1, self.n // 2, self.n)}

    def _target_query_ids(self):
        return {**self._query_ids(), "target_query_ids": self.integers(-1, self.n // 2, self.m)}

    def _query_mask(self):
        mask = self.chance(0.8, self.n)
        self.query = torch.where(mask[:, None], self.query, float("nan"))
        return {"query_mask": mask}

    def _target_mask(self):
        mask = self.chance(0.8, self.m)
        self.target = torch.where(mask[:, None], self.target, float("nan"))
        return {"target_mask": mask}

    def _own_negatives_only(self):
        return {"own_negatives_only": self.chance(0.3, self.n)}

    def _hard(self):
        return {"hard_negatives": unit(self.n, 3, self.d, generator=self.generator, dtype=self.dtype)}

    def _hard_with_ids(self):
        return {**self._hard(), "hard_ids": self.integers(-1, self.m // 3, self.n, 3), **self._target_ids()}

    def _packed_hard(self):
        lengths = self.integers(0, 4, self.n)
        lengths[0] = 0
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        total = int(offsets[-1])
        return {
            "hard_negatives": unit(total, self.d, generator=self.generator, dtype=self.dtype),
            "hard_offsets": offsets,
            "hard_ids": self.integers(-1, self.m // 3, total),
            "target_ids": self.integers(-1, self.m // 3, self.m),
        }

    def _query_negatives(self):
        return {"query_negatives": True}

    def _target_negatives(self):
        return {"target_negatives": True}

    def _symmetric(self):
        return {"symmetric": True}

    def _margin(self):
        return {"mask_margin": 0.1}

    def _relative(self):
        return {"mask_relative": 0.05}

    def _hardness(self):
        return {"hardness": 3.0}

    def _hardness_in_batch(self):
        return {"hardness": 2.0, "hardness_scope": "in_batch"}

    def _hardness_hard(self):
        return {"hardness": 2.0, "hardness_scope": "hard"}

    def _smoothing(self):
        return {"label_smoothing": 0.1}

    def _matryoshka(self):
        return {"matryoshka_dims": (3, self.d), "matryoshka_weights": (0.7, 1.3)}

    def _weight(self):
        weight = torch.rand(self.n, generator=self.generator, dtype=self.dtype)
        weight[2] = 0
        return {"weight": weight}

    def _sum(self):
        return {"reduction": "sum"}

    def _none(self):
        return {"reduction": "none"}

    def _small_workspace(self):
        return {"workspace_mib": 0.004}

    def _cold(self):
        return {"temperature": 0.005}

    def _row_temperatures(self):
        return {"temperature": 0.05 + 0.2 * torch.rand(self.n, generator=self.generator, dtype=self.dtype)}


NAMES = [name[1:] for name in vars(Case) if name.startswith("_") and not name.startswith("__")]
CLASHES = [
    {"sum", "none"},
    {"hardness", "hardness_in_batch", "hardness_hard"},
    {"learnt_temperature", "cold", "row_temperatures"},
    {"row_temperatures", "hardness"},  # refused
    {"row_temperatures", "hardness_in_batch"},
    {"row_temperatures", "hardness_hard"},
    {"hard", "packed_hard", "hard_with_ids"},
]


def compatible(names) -> bool:
    return all(len(clash & set(names)) < 2 for clash in CLASHES)


def singles_and_pairs():
    return [c for size in (0, 1, 2) for c in itertools.combinations(NAMES, size) if compatible(c)]


def random_sets(count: int, seed: int = 0):
    """Combinations of three to nine options."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    while len(out) < count:
        size = int(torch.randint(3, 10, (), generator=generator))
        names = tuple(NAMES[i] for i in torch.randperm(len(NAMES), generator=generator)[:size].tolist())
        if compatible(names):
            out.append(names)
    return out
