"""The command line: embed, search, info; one line and exit code 2 for what a user can mend."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from tests.helpers.tiny_models import qwen2_vl
from vlm2vec.cli import main
from vlm2vec.model import VLM2Vec


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("cli")
    qwen2_vl(place / "model")
    (place / "images/more").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.jpg", "more/c.png")):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(place / "images" / name)
    rows = [{"key": "first", "text": "a cat"}, {"text": "<|image_1|>\nwhat?", "image": "images/a.png"}, {"id": 7, "image": "images/b.jpg"}]
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return place


def read(path):
    with safe_open(path, "pt") as f:
        return f.get_tensor("embeddings").numpy(), json.loads(f.metadata()["keys"])


def test_embed_files_folders_rows_and_text(place, capsys):
    out = place / "out.safetensors"
    argv = ["embed", place / "model", place / "images", place / "rows.jsonl", "--text", "a dog", "-o", out, "--device", "cpu"]
    assert main([str(a) for a in argv]) == 0
    assert "7 embeddings of 32 dimensions" in capsys.readouterr().out
    rows, keys = read(out)
    assert keys == [str(place / "images/a.png"), str(place / "images/b.jpg"), str(place / "images/more/c.png"), "first", "1", "7", "a dog"]
    model = VLM2Vec.from_pretrained(place / "model")
    truth = model.encode([place / "images/a.png", {"text": "<|image_1|>\nwhat?", "image": place / "images/a.png"}, "a dog"])
    np.testing.assert_allclose(rows[[0, 4, 6]], truth, atol=1e-6)


def test_search_in_images_and_in_embeddings(place, capsys):
    out = place / "images.safetensors"
    assert main(["embed", str(place / "model"), str(place / "images"), "-o", str(out)]) == 0
    capsys.readouterr()
    for where in (["--images", str(place / "images")], ["--embeddings", str(out)]):
        assert main(["search", str(place / "model"), "a happy cat", *where, "-k", "2"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ["rank", "score", "image"] and len(lines) == 3
        scores = [float(line.split()[1]) for line in lines[1:]]
        assert scores == sorted(scores, reverse=True)
    bare = ["--images", str(place / "images"), "--prompt", "", "--image-prompt", ""]
    assert main(["search", str(place / "images/b.jpg"), "--model", str(place / "model"), *bare]) == 0
    first = capsys.readouterr().out.splitlines()[1].split()
    assert first[2] == "b.jpg" and float(first[1]) > 0.9999  # an image finds itself


def test_search_says_what_the_model_was_trained_to_hear(place, capsys):
    """MMEB's words, line ends and all, where neither the model nor the command has a prompt."""
    model = VLM2Vec.from_pretrained(place / "model")
    pictures = sorted((place / "images").rglob("*.[pj][np]g"))
    targets = model.encode([{"text": "<|image_1|>\nRepresent the given image.\n", "image": path} for path in pictures])
    queries = model.encode(
        [
            "Find me an everyday image that matches the given caption: a happy cat\n",
            {"text": "<|image_1|>\nFind a day-to-day image that looks similar to the provided image.\n", "image": pictures[0]},
        ]
    )
    for words, query in zip(("a happy cat", str(pictures[0])), queries):
        assert main(["search", str(place / "model"), words, "--images", str(place / "images"), "-k", "3"]) == 0
        got = {line.split()[2]: float(line.split()[1]) for line in capsys.readouterr().out.splitlines()[1:]}
        assert got == pytest.approx(
            {str(path.relative_to(place / "images")): float(query @ target) for path, target in zip(pictures, targets)}, abs=1e-4
        )


def test_info(place, capsys):
    assert main(["info", str(place / "model"), "--json", "--option", "max_pixels=6272"]) == 0
    facts = json.loads(capsys.readouterr().out)
    parameters = facts["parameters"]
    model = VLM2Vec.from_pretrained(place / "model")
    assert parameters["total"] == sum(p.numel() for p in model.parameters()) == sum(v for k, v in parameters.items() if k != "total")
    assert facts["family"] == "qwen2_vl" and facts["embedding dimensions"] == 32 and facts["options"]["max_pixels"] == 6272
    assert main(["info", str(place / "model")]) == 0
    assert "vision tower" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["fly"], "no command 'fly'"),
        (["embed", "MODEL", "nothing.png", "-o", "OUT"], "nothing.png: no such file"),
        (["embed", "MODEL", "-o", "OUT"], "nothing to embed"),
        (["embed", "MODEL", "--text", "a", "-o", "x.npy"], "ends in .safetensors"),
        (["embed", "./nowhere", "--text", "a", "-o", "OUT"], "no such folder"),
        (["embed", "MODEL", "PLACE/bad.jsonl", "-o", "OUT"], "line 2: not JSON"),
        (["embed", "MODEL", "PLACE/junk.png", "-o", "OUT"], "junk.png"),
        (["search", "MODEL", "cat"], "--images DIR or --embeddings FILE"),
        (["search", "MODEL", "cat", "--images", "PLACE/model"], "no images in it"),
        (["search", "cat", "--images", "PLACE/images"], "no model named"),
        (["search", "MODEL", "cat", "--embeddings", "PLACE/rows.jsonl"], "not a file of embeddings"),
        (["info", "PLACE/images"], "not a model folder"),
        (["info", "MODEL", "--option", "x"], "expected NAME=VALUE"),
        (["info", "MODEL", "--option", "x=1"], "unknown options"),
        (["info", "MODEL", "--option", "max_pixels=big"], "expected an integer of at least 1"),
        (["info", "MODEL", "--option", "min_pixels=99999999"], "above max_pixels"),
        (["info", "MODEL", "--option", "resolution=vast"], "'high', 'mid', 'low'"),
        (["info", "MODEL", "--option", "layout=odd"], "expected 'image' or 'space'"),
        (["info", "MODEL", "--device", "toaster"], "expected 'cpu'"),
        (["embed", "MODEL", "--text", "a"], "required: --output/-o; vlm2vec embed --help says more"),
        (["embed", "MODEL", "--text", "a", "-o", "OUT", "--batch-size", "few"], "invalid int value: 'few'"),
        (["embed", "MODEL", "--text", "a", "-o", "PLACE/junk.png/not-written.safetensors"], "junk.png: "),
        (["mine", "MODEL", "--data", "PLACE", "--images", "PLACE", "--output", "OUT", "--batch-size", "0"], "at least 1, got 0"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(place, capsys, monkeypatch, argv, said):
    monkeypatch.chdir(place)
    (place / "bad.jsonl").write_text('{"text": "a"}\n{"text":\n')
    (place / "junk.png").write_text("junk")
    out = place / "not-written.safetensors"
    argv = [a.replace("MODEL", str(place / "model")).replace("PLACE", str(place)).replace("OUT", str(out)) for a in argv]
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and "Traceback" not in captured.err
    assert not list(place.glob("not-written*"))


def test_help_is_lazy(capsys):
    assert main([]) == 2 and main(["--help"]) == 0
    assert "search" in capsys.readouterr().out
