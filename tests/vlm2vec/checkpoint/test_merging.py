"""Merged checkpoints: values by hand, what is refused, and nothing left of a merge that failed."""

import json
import shutil
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.tiny_models import qwen2_5_vl, qwen2_vl
from vlm2vec.checkpoint.merging import ties
from vlm2vec.cli import main
from vlm2vec.model import VLM2Vec


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base, two full models a step away from it, and adapters on it."""
    place = tmp_path_factory.mktemp("merging")
    qwen2_vl(place / "base")
    VLM2Vec.from_pretrained(place / "base", device="cpu").save_pretrained(place / "base")
    qwen2_5_vl(place / "other")
    for at, name in enumerate(("a", "b")):
        shutil.copytree(place / "base", place / name)
        generator = torch.Generator().manual_seed(at)
        tensors = load_file(place / name / "model.safetensors")
        for tensor in tensors.values():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
        save_file(tensors, place / name / "model.safetensors", metadata={"format": "pt"})
        (place / name / "trainer_state.json").write_text("{}")
    for at, name in enumerate(("lora_a", "lora_b", "dora_a", "dora_b")):
        model = VLM2Vec.from_pretrained(place / "base", device="cpu")
        model.add_adapter(r=2 + at % 2, alpha=5, dora="dora" in name, targets=["q_proj", "down_proj"], vision=False)
        generator = torch.Generator().manual_seed(at)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if ".lora_" in parameter_name:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(place / name)
    return place


def tensors(folder):
    return {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}


def whole(place, name):
    """Weights of an adapter folded into its base."""
    VLM2Vec.from_pretrained(place / name, device="cpu").save_pretrained(place / f"{name}_whole", merge=True)
    return tensors(place / f"{name}_whole")


def merge(place, *words, out="merged"):
    shutil.rmtree(place / out, ignore_errors=True)
    names = [str(place / word) if (place / word).is_dir() else word for word in words]
    return main(["merge", *names, "-o", str(place / out)])


def test_ties_by_hand():
    """Six numbers: below the trim, both alike, the larger sign wins, trimmed in one, cancelled, zero."""
    one = torch.tensor([0.1, 2.0, 3.0, 4.0, 1.0, 0.0])
    two = torch.tensor([0.2, 4.0, -1.0, 0.3, -1.0, 0.0])
    assert ties.merged([one, two], [0.5, 0.5], [0.5, 0.5]).tolist() == [0.0, 3.0, 3.0, 4.0, 0.0, 0.0]
    got = ties.merged([one, two], [0.2, 0.8], [0.5, 0.5])  # 0.2 * 3 < 0.8 * 1: the other sign
    torch.testing.assert_close(got, torch.tensor([0.0, 3.6, -1.0, 4.0, -1.0, 0.0]))


@pytest.mark.parametrize("density", [1e-9, 0.05, 0.2, 0.5, 1.0])
def test_the_threshold_is_the_kth_largest_over_all_tensors(density):
    generator = torch.Generator().manual_seed(0)
    parts = [
        torch.randn(shape, generator=generator) * size for shape, size in (((40, 50), 1.0), ((300,), 1e-4), ((7, 1), 1e4), ((64,), 0.0))
    ]
    magnitudes = torch.cat([part.flatten().abs() for part in parts]).sort(descending=True).values
    kth = magnitudes[max(1, int(density * len(magnitudes))) - 1]
    assert ties.threshold(lambda: parts, density) == kth.item()


def test_linear_is_the_weighted_mean(place, capsys):
    assert merge(place, "a", "b", "--weights", "1", "3") == 0
    assert "2 full checkpoints in one" in capsys.readouterr().out
    a, b, got = tensors(place / "a"), tensors(place / "b"), tensors(place / "merged")
    assert got.keys() == a.keys()
    for name in got:
        torch.testing.assert_close(got[name], 0.25 * a[name] + 0.75 * b[name], rtol=0, atol=1e-7 * float(a[name].abs().max() + 1))
    beside = {path.name for path in (place / "merged").iterdir()}
    assert beside == {path.name for path in (place / "base").iterdir()} | {"README.md"}
    assert "0.75 of " in (place / "merged" / "README.md").read_text()
    assert VLM2Vec.from_pretrained(place / "merged", device="cpu").encode("a fox").shape == (32,)


def test_ties_of_full_checkpoints(place):
    assert merge(place, "a", "b", "--method", "ties", "--density", "0.3", "--base", str(place / "base"), "--scale", "0.5") == 0
    base, got = tensors(place / "base"), tensors(place / "merged")
    changes = [{n: (t.float() - base[n].float()) for n, t in tensors(place / name).items()} for name in ("a", "b")]
    trimmed = []
    for own in changes:
        every = torch.cat([own[name].flatten().abs() for name in sorted(own)])
        least = every.topk(int(0.3 * len(every))).values[-1]
        trimmed.append({name: torch.where(change.abs() >= least, change, 0) for name, change in own.items()})
    for name in got:
        pair = torch.stack([own[name] for own in trimmed])
        agrees = (pair.sign() == pair.sum(0).sign()) & (pair != 0)
        mean = (pair * agrees).sum(0) / agrees.sum(0).clamp(min=1)
        torch.testing.assert_close(got[name].float(), base[name].float() + 0.5 * mean, rtol=1e-5, atol=1e-6)
    assert any((got[name] == base[name]).any() and (got[name] != base[name]).any() for name in got)


def test_files_in_shards_stay_in_their_shards(place):
    """A second shard and the index; an untied head that the embedding model has not is left out."""
    for name in ("a", "b"):
        shutil.rmtree(place / f"{name}_shards", ignore_errors=True)
        shutil.copytree(place / name, place / f"{name}_shards")
        held = load_file(place / name / "model.safetensors")
        (place / f"{name}_shards" / "model.safetensors").unlink()
        names = sorted(held)
        parts = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
        if name == "a":
            held["lm_head.weight"] = torch.zeros(3, 3)
            parts["model-00002-of-00002.safetensors"].append("lm_head.weight")
        for file, own in parts.items():
            save_file({key: held[key].bfloat16() if "norm" in key else held[key] for key in own}, place / f"{name}_shards" / file)
        index = {"metadata": {}, "weight_map": {key: file for file, own in parts.items() for key in own}}
        (place / f"{name}_shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert merge(place, "a_shards", "b_shards") == 0
    index = json.loads((place / "merged" / "model.safetensors.index.json").read_text())
    first, second = (load_file(place / "merged" / file) for file in sorted(set(index["weight_map"].values())))
    got, a, b = first | second, tensors(place / "a"), tensors(place / "b")
    assert set(index["weight_map"]) == set(got) == set(a) and len(first) == 5
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in got.values())
    for name, tensor in got.items():
        if "norm" in name:
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, ((a[name].bfloat16().float() + b[name].bfloat16().float()) / 2).bfloat16())
        else:
            torch.testing.assert_close(tensor.double(), (a[name] + b[name]) / 2, rtol=0, atol=1e-6)
    assert VLM2Vec.from_pretrained(place / "merged", device="cpu").embedding_dim == 32


def test_the_mean_of_lora_adapters_is_an_adapter_of_their_mean_change(place):
    assert merge(place, "lora_a", "lora_b", "--weights", "0.2", "0.3") == 0
    settings = json.loads((place / "merged" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (5, 5) and not (place / "merged" / "model.safetensors").exists()
    a, b, got = (whole(place, name) for name in ("lora_a", "lora_b", "merged"))
    base = tensors(place / "base")
    assert any((a[name] != base[name]).any() for name in base)
    for name in got:
        torch.testing.assert_close(got[name], 0.4 * a[name] + 0.6 * b[name], rtol=1e-5, atol=1e-6, msg=name)


def changes_of(place, name):
    """{weight: scaling * B A} of a plain adapter, from its file."""
    settings = json.loads((place / name / "adapter_config.json").read_text())
    held = load_file(place / name / "adapter_model.safetensors")
    scaling = settings["lora_alpha"] / settings["r"]
    changes = {}
    for key in held:
        if "lora_A" in key:
            name = key.removeprefix("base_model.model.").replace(".lora_A", "").replace(".language_model", "")
            changes[name] = scaling * (held[key.replace("lora_A", "lora_B")] @ held[key])
    return changes


def test_dora_adapters_give_a_full_model_of_their_mean(place):
    assert merge(place, "dora_a", "dora_b") == 0
    assert not (place / "merged" / "adapter_config.json").exists()
    base, got = tensors(place / "base"), tensors(place / "merged")
    a, b = whole(place, "dora_a"), whole(place, "dora_b")
    for name in base:
        torch.testing.assert_close(got[name], (a[name] + b[name]) / 2, rtol=1e-5, atol=1e-6, msg=name)
    assert sum((got[name] != base[name]).any() for name in base) == 4


def test_one_base_is_in_memory_at_a_time(place, monkeypatch):
    load, models, alive = VLM2Vec.from_pretrained, [], []

    def watched(*args, **options):
        alive.append(sum(model() is not None for model in models))
        model = load(*args, **options)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(VLM2Vec, "from_pretrained", watched)
    assert merge(place, "dora_a", "dora_b") == 0
    assert alive == [0, 0]


def test_ties_of_adapters_is_of_their_changes(place):
    assert merge(place, "lora_a", "lora_b", "--method", "ties") == 0
    base, got = tensors(place / "base"), tensors(place / "merged")
    changes = [changes_of(place, name) for name in ("lora_a", "lora_b")]
    assert len(base.keys() & changes[0].keys()) == 4
    every = [torch.cat([change.flatten().abs() for change in own.values()]) for own in changes]
    least = [own.topk(int(0.2 * len(own))).values[-1] for own in every]
    for name in base:
        if name in changes[0]:
            pair = torch.stack([torch.where(own[name].abs() >= bound, own[name], 0) for own, bound in zip(changes, least)])
            agrees = (pair.sign() == pair.sum(0).sign()) & (pair != 0)
            mean = (pair * agrees).sum(0) / agrees.sum(0).clamp(min=1)
            torch.testing.assert_close(got[name].float(), base[name].float() + mean, rtol=1e-6, atol=1e-7, msg=name)
            assert 0 < (mean != 0).double().mean() < 0.45
        else:
            assert torch.equal(got[name], base[name])


def test_a_model_in_memory(place):
    merged = VLM2Vec.merge([place / "a", place / "b"], [1.0, 1.0])
    assert merge(place, "a", "b") == 0
    assert (merged.encode("a fox") == VLM2Vec.from_pretrained(place / "merged").encode("a fox")).all()


def change(place, name, file, edit):
    shutil.rmtree(place / "changed", ignore_errors=True)
    shutil.copytree(place / name, place / "changed")
    path = place / "changed" / file
    if file.endswith(".json"):
        told = json.loads(path.read_text())
        edit(told)
        path.write_text(json.dumps(told))
    else:
        held = load_file(path)
        edit(held)
        save_file(held, path)


WEIGHTS, ELSEWHERE = "model.safetensors", {"base_model_name_or_path": "elsewhere/x"}


@pytest.mark.parametrize(
    "words, edit, said",
    [
        (["a"], None, "expected at least two models to merge, got 1"),
        (["a", "a"], None, "is named twice"),
        (["a", "b", "--weights", "1"], None, "weights: expected 2 numbers, one a model, got 1"),
        (["a", "b", "--weights", "1", "-1"], None, "weights: expected numbers above 0, got -1.0"),
        (["a", "b", "--weights", "1", "nan"], None, "weights: expected numbers above 0, got nan"),
        (["a", "b", "--density", "0.5"], None, "density and scale: expected method ties beside them"),
        (["a", "b", "--method", "ties"], None, "expected the base that all of them started from, got none; pass --base MODEL"),
        (["a", "b", "--base", "base"], None, "base: expected method ties beside it"),
        (["a", "b", "--method", "ties", "--base", "base", "--density", "0"], None, "density: expected a share above 0"),
        (["a", "lora_a"], None, "lora_a, an adapter, and "),
        (["a", "other"], None, "expected models of one family"),
        (["a", "nothing"], None, "nothing: no such"),
        (["lora_a", "dora_a"], None, "dora_a and "),
        (["a", "changed"], ("b", "model.safetensors", lambda t: t.pop(sorted(t)[0])), "got 1 that "),
        (
            ["a", "changed"],
            ("b", "model.safetensors", lambda t: t.update({sorted(t)[0]: torch.zeros(3)})),
            "expected tensors of the same shapes",
        ),
        (["a", "changed"], ("b", "vlm2vec.json", lambda s: s["options"].update(positions="mrope")), "expected models that are fed alike"),
        (
            ["lora_a", "changed"],
            ("lora_b", "adapter_config.json", lambda s: s.update(base_model_name_or_path="elsewhere/x")),
            "elsewhere/x",
        ),
        (["lora_a", "changed"], ("lora_b", "adapter_model.safetensors", lambda t: t.pop(sorted(t)[0])), "expected the same layers in"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_merged_is_refused_in_one_line(place, capsys, words, edit, said):
    if edit is not None:
        change(place, *edit)
    capsys.readouterr()
    assert merge(place, *words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and len(error) < 560
    assert not (place / "merged").exists() and not [path for path in place.iterdir() if ".merging" in path.name or "part" in path.name]


def test_a_folder_that_holds_something_is_left_alone(place, capsys):
    (place / "held").mkdir()
    (place / "held" / "mine.txt").write_text("x")
    assert main(["merge", str(place / "a"), str(place / "b"), "-o", str(place / "held")]) == 2
    assert "expected a new or empty folder" in capsys.readouterr().err
    assert (place / "held" / "mine.txt").read_text() == "x"
