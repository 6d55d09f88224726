"""Groups: never on both sides of the held-out split, whichever source they are in, and no negatives of each other."""

import json
import logging

import numpy as np
import pytest
import torch

from tests.helpers.processes import collected, join
from train.data.groups import NO_GROUP, group_id, joined_ids, split
from train.data.rows import PairDataset
from train.data.sources import open_source
from train.recipe.schema import Data, Source


def source(folder, name, groups, column="item", **more):
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps({"q": f"{name} q{i}", "t": f"{name} t{i}", column: group}) for i, group in enumerate(groups)))
    return Source(name, path=str(path), query="q", target="t", group=column, **more)


def parts(folder, sources, rows):
    data = Data(sources=sources)
    tables = [open_source(data, source) for source in sources]
    return tables, split(tables, [s.name for s in sources], rows)


def sides(table, part):
    groups = table.groups()
    positions = [part.row(at) for at in range(part.trained + part.held)]
    assert sorted(positions) == list(range(len(table))), "every row once"
    return [{groups[row] for row in chosen} - {None} for chosen in (positions[: part.trained], positions[part.trained :])]


def test_no_group_stands_on_both_sides(tmp_path):
    generator = np.random.default_rng(0)
    groups = [f"g{g}" for g in generator.integers(0, 40, 200)]  # scattered, of one to ten rows
    (table,), (part,) = parts(tmp_path, [source(tmp_path, "one", groups)], 15)
    trained, held = sides(table, part)
    assert held and not trained & held and 10 <= part.held <= 15
    assert groups[-1] in held, "the last group that fits comes first"


def test_a_group_held_out_in_one_source_is_so_in_all_of_its_column(tmp_path):
    one = source(tmp_path, "one", [f"g{i // 2}" for i in range(100)])
    two = source(tmp_path, "two", [f"g{49 - i // 4}" for i in range(100)])  # the same groups from the other end
    other = source(tmp_path, "other", [f"g{i // 2}" for i in range(100)], column="sku")
    tables, made = parts(tmp_path, [one, two, other], 10)
    (trained, held), (trained_two, held_two), (_, held_other) = (sides(t, p) for t, p in zip(tables, made))
    assert not (trained | trained_two) & (held | held_two) and held & held_two
    assert made[2].held == 10 and held_other == {f"g{i}" for i in range(45, 50)}, "another column, other groups"


def test_rows_without_a_group_are_trained_on_and_one_huge_group_is_told(tmp_path, caplog):
    (table,), (part,) = parts(tmp_path, [source(tmp_path, "some", ["", None, "a", " "] * 10)], 4)
    assert part.held == 0, "the group has ten rows, a tenth is four"
    with caplog.at_level(logging.WARNING, logger="train.data.groups"):
        parts(tmp_path, [source(tmp_path, "huge", ["a"] * 100)], 4)
    assert "source huge: no group of column 'item' has 4 rows or fewer" in caplog.text


def test_rows_are_those_of_the_data_wherever_they_are_counted(tmp_path):
    class Counts:
        options = {"frames": 8, "fps": None, "max_frames": None}

        def measure(self, item):
            return item["text"]

    data = Data(sources=[source(tmp_path, "one", [f"g{i % 10}" for i in range(40)])])
    dataset = PairDataset(data, Counts(), 4)
    held = [dataset[0, at] for at in dataset.held_out_rows()[0]]
    assert [sample["row"] for sample in held] == [9, 19, 29, 39] and held[0]["query"] == "one q9"
    trained = {dataset[0, at]["row"] for at in range(dataset.sizes[0])}
    assert trained == set(range(40)) - {9, 19, 29, 39}
    assert {sample["group_id"] for sample in held} == {group_id("item", "g9")}


# -- duplicates ---------------------------------------------------------------------------------------------------------------------


def components(contents, groups):
    """The definition: two rows are one thing where a chain of equal contents and equal groups leads from one to the other."""
    count = len(contents)
    linked = (contents[:, None] == contents) | ((groups[:, None] == groups) & (groups[:, None] != NO_GROUP))
    for _ in range(count):
        linked = (linked.astype(int) @ linked.astype(int)) > 0
    return linked


@pytest.mark.parametrize("seed", range(5))
def test_joined_ids_are_the_components(seed):
    generator = np.random.default_rng(seed)
    contents = generator.integers(0, 30, 40) * 7919
    groups = np.where(generator.random(40) < 0.4, NO_GROUP, generator.integers(0, 12, 40))
    targets, hard = joined_ids(contents, groups, np.append(contents[:5], 5), None, torch.device("cpu"))
    assert np.array_equal(targets[:, None] == targets, components(contents, groups))
    assert np.array_equal(hard[:5], targets[:5]) and hard[5] == 5, "a negative that is no target of the batch keeps its id"


def test_without_groups_ids_stay_as_they_are():
    contents = np.array([5, 3, 5, 9])
    targets, hard = joined_ids(contents, np.full(4, NO_GROUP), None, None, torch.device("cpu"))
    assert np.array_equal(targets, contents) and hard is None


def rank_main(rank, port, queue):
    join(rank, port)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    contents, groups = halves()
    part = slice(4 * rank, 4 * rank + 4)
    got = joined_ids(contents[part], groups[part], contents[:2], torch.distributed.group.WORLD, torch.device("cpu"))
    queue.put((rank, "ids", got))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def halves():
    return np.array([1, 2, 3, 4, 5, 2, 7, 4]), np.array([0, NO_GROUP, 1, NO_GROUP, 0, 1, NO_GROUP, NO_GROUP])


def test_what_joins_two_rows_may_lie_on_another_rank():
    found = collected(rank_main, each=1)
    contents, groups = halves()
    targets, hard = joined_ids(contents, groups, contents[:2], None, torch.device("cpu"))
    assert targets[0] == targets[4] and targets[1] == targets[2] == targets[5], "3 and 2 are joined by a row of the other rank"
    assert np.array_equal(np.concatenate([found["ids", rank][0][0] for rank in range(2)]), targets)
    assert all(np.array_equal(found["ids", rank][0][1], hard) for rank in range(2))


def test_a_batch_tells_the_loss_what_a_group_joins(tmp_path):
    """Rows 0 and 1 show one item, rows 1 and 2 say the same: none of the three is a negative of another, as the loss written out has it."""
    import types

    from contrastive_kernels.reference import info_nce_reference
    from train.data.rows import collate
    from train.losses import InfoNCE
    from train.step import ContrastiveStep

    path = tmp_path / "rows.jsonl"
    lines = [("q0", "t0", "a"), ("q1", "t1", "a"), ("q2", "t1", "b"), ("q3", "t3", ""), ("q4", "t4", "")]
    path.write_text("\n".join(json.dumps({"q": q, "t": t, "item": g}) for q, t, g in lines))
    data = Data(sources=[Source("one", path=str(path), query="q", target="t", group="item")])

    class Plain:
        options = {"frames": 8, "fps": None, "max_frames": None}

        def measure(self, item):
            from vlm2vec.packing import Features

            return Features(torch.ones(1, dtype=torch.long))

    dataset = PairDataset(data, Plain())
    batch = collate([dataset[0, row] for row in range(5)])
    step = types.SimpleNamespace(device=torch.device("cpu"), recipe=types.SimpleNamespace(data=data), _tensor=torch.from_numpy)
    known = ContrastiveStep.loss_batch(step, batch, False)
    loss = InfoNCE(temperature=0.5)
    query, target = torch.randn(2, 5, 8, dtype=torch.float64).unbind()
    got, _ = loss.function()(query, target, **loss.options(known))
    same = np.zeros((5, 5), dtype=bool)
    same[:3, :3] = True
    unit = [torch.nn.functional.normalize(x, dim=1) for x in (query, target)]
    logits = unit[0] @ unit[1].T / 0.5
    logits[torch.from_numpy(same & ~np.eye(5, dtype=bool))] = -torch.inf
    torch.testing.assert_close(got, torch.nn.functional.cross_entropy(logits, torch.arange(5)), rtol=1e-12, atol=0)
    plain = info_nce_reference(*unit, temperature=0.5)
    assert abs(float(plain if not isinstance(plain, tuple) else plain[0]) - float(got)) > 1e-3


def test_groups_of_mmebs_layout(tmp_path):
    from vlm2vec.data.mmeb import write_train

    rows = [{"qry": f"q{i}", "qry_image_path": "", "pos_text": f"t{i}", "pos_image_path": "", "item": i // 4} for i in range(40)]
    write_train(tmp_path, "Pairs", rows)
    told = Source("Pairs", group="item")
    data = Data(root=str(tmp_path), images="", sources=[told])
    table = open_source(data, told)
    assert table.groups()[:5] == ["0.0"] * 4 + ["1.0"] and table.group_of(39) == "9.0"
    (part,) = split([table], ["Pairs"], 10)
    assert part.held == 4 and [part.row(at) for at in range(36, 40)] == [36, 37, 38, 39]
