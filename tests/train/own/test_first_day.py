"""docs/training-on-your-data.md from its first line on: 300 pictures and a CSV, trained, evaluated, indexed, searched and served."""

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

from tests.helpers.command_line import assert_runs
from tests.helpers.repository import ROOT
from tests.helpers.tiny_models import BUILDERS

PAGE = ROOT / "docs" / "training-on-your-data.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COLOURS = ["red", "green", "blue", "yellow", "white", "black", "pink", "teal", "brown", "grey"]
KINDS = ["owl", "fox", "cat", "hen", "bee", "cow", "dog", "elk", "ant", "pig"]


def blocks() -> list[tuple[str, str]]:
    """(language, text) of what the page's numbered sections hold."""
    return BLOCK.findall(PAGE.read_text(encoding="utf-8").split("## What a source takes")[0])


def commands() -> list[list[str]]:
    import shlex

    lines = [line for language, text in blocks() if not language for line in text.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("vlm2vec ")]


def write_drawings(folder):
    """300 pictures of a hundred names, three each, named as the quickstart's are."""
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(300):
        colour, kind = COLOURS[number // 30], KINDS[number // 3 % 10]
        pixels = np.asarray(Image.new("RGB", (56, 56 + 28 * (number % 2)), colour)).astype(int)
        noisy = (pixels + generator.integers(-20, 20, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{colour}_{kind}_{number:03}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An empty folder, the pictures of which the page's snippet makes 300 and a CSV, and the model that its recipe names."""
    folder = tmp_path_factory.mktemp("first-day")
    write_drawings(folder / "quickstart/data/images/eval/drawings")
    BUILDERS["qwen2_vl"](folder / "quickstart/model-init")
    return folder


def serve(words):
    """Starts a server as the page does, on a port of its own; the page is there, and it stops when asked to."""
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", "vlm2vec.cli", *words, "--port", str(port)], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 100
        while True:
            assert process.poll() is None, process.stderr.read()[-2000:]
            try:
                return urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20).read().decode()
            except OSError:
                assert time.monotonic() < deadline, "no answer"
                time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)


@pytest.mark.slow
def test_the_page_runs_as_it_stands(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    for language, text in blocks():
        if language == "python":
            exec(compile(text, str(PAGE), "exec"), {})
        elif language == "yaml":
            (place / text.splitlines()[0].removeprefix("# ")).write_text(text, encoding="utf-8")
    assert len(list((place / "pictures").iterdir())) == 300 and len((place / "captions.csv").read_text().splitlines()) == 301
    told = {}
    for words in commands():
        if find_spec("vlm2vec.data.index") is None:  # an index is one file
            words = [word.replace("shop/index", "shop/index.safetensors") for word in words]
        if words[0] == "serve":
            if find_spec("vlm2vec.commands.serve") is not None:
                told["serve"] = serve(words)
            continue
        told[words[0]] = assert_runs(capsys, words)[0]
    assert list(told)[:5] == ["data", "train", "eval", "index", "search"]
    assert "captions: captions.csv, 300 rows in 100 groups; 270 to train on, 30 held out" in told["data"]
    assert "0 of 300 rows cannot be read" in told["data"] and "note:" not in told["data"], "the words are those of search"
    assert "trained 30 steps" in told["train"]
    summary = json.loads((place / "shop/scores/tasks/captions.json").read_text())
    assert (summary["num_queries"], summary["num_candidates"]) == (30, 30) and (place / "shop/scores/report.html").exists()
    held = [json.loads(line) for line in (place / "shop/scores/held-out/captions/pairs.jsonl").read_text().splitlines()]
    groups = [row["group"] for row in held]
    assert len(set(groups)) == 10 and all(groups.count(group) == 3 for group in groups), "ten animals, whole"
    assert "300" in told["index"]
    first = told["search"].splitlines()[1].split()
    assert (place / "pictures" / first[2]).exists(), told["search"]
    assert "serve" not in told or "<html" in told["serve"]


def test_every_link_of_the_contents_is_there():
    text = PAGE.read_text(encoding="utf-8")
    titles = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= titles
