"""A server for the tests of this folder: the program itself, in a process of its own, over a small index."""

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from tests.helpers.repository import ROOT
from tests.helpers.tiny_models import qwen2_vl


class Running:
    """`vlm2vec serve ...`, started."""

    def __init__(self, *options):
        paths = os.pathsep.join([str(ROOT / "kernels"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "vlm2vec.cli", "serve", "--port", "0", "--device", "cpu", *map(str, options)]
        environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        self.said = self.process.stdout.readline()
        if "/v1/embeddings" not in self.said:
            self.process.kill()
            pytest.fail(f"no server: {self.said}{self.process.communicate()[1][-2000:]}")
        self.url = self.said.split(" at ")[1].split("/v1/embeddings")[0]
        self.port = int(self.url.rsplit(":", 1)[1])

    def ask(self, path, body=None, headers=()):
        """(status, JSON or bytes, headers) of a request: GET, or POST with a body."""
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, content, dict(headers)), timeout=60) as response:
                status, kind, got, head = response.status, response.headers["Content-Type"], response.read(), response.headers
        except urllib.error.HTTPError as error:
            status, kind, got, head = error.code, error.headers["Content-Type"], error.read(), error.headers
        return status, json.loads(got) if kind == "application/json" else got, head

    def stop(self, how=signal.SIGTERM):
        """The exit code, after a signal."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        return self.process.returncode


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with model, pictures and an index of them."""
    from vlm2vec.cli import main

    place = tmp_path_factory.mktemp("serve")
    qwen2_vl(place / "model")
    (place / "pictures/more").mkdir(parents=True)
    for i, name in enumerate(("fox.png", "more/owl <b>.png", "red.png")):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (50, 60, 3), dtype=np.uint8)).save(place / "pictures" / name)
    (place / "pictures/note.txt").write_text("a note on <i>foxes</i>")
    assert main(["index", str(place / "pictures"), "--model", str(place / "model"), "-o", str(place / "index"), "--device", "cpu"]) == 0
    return place


@pytest.fixture(scope="session")
def server(place):
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(package, reason="the extra `serve` is not installed")
    running = Running("--index", place / "index", "--name", "tiny", "--inputs", 64, "--pixels", 250_000, "--body-mib", 4)
    yield running
    running.stop()


@pytest.fixture(scope="session")
def model(place):
    from vlm2vec import VLM2Vec

    return VLM2Vec.from_pretrained(place / "model", device="cpu")
