"""A server that is told to stop answers what it has taken; a killed one gives clients connection errors, and nothing hangs."""

import http.client
import json
import signal
import socket
import sys
import threading

import pytest

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")

from tests.helpers.command_line import call
from tests.vlm2vec.serve.conftest import Running

TEXTS = [f"{'many words ' * 30}{i}" for i in range(300)]


def asked(port, results):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/v1/embeddings", json.dumps({"input": TEXTS, "encoding_format": "base64"}))
        response = connection.getresponse()
        results.append((response.status, json.loads(response.read())))
    except Exception as e:
        results.append((type(e), None))


def in_flight(running, count):
    """Threads that each wait for a long answer, once the server has taken all of them."""
    results = []
    threads = [threading.Thread(target=asked, args=(running.port, results)) for _ in range(count)]
    for thread in threads:
        thread.start()
    while running.ask("/health")[1]["queued_inputs"] == 0:
        pass
    return threads, results


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["told to stop", "killed"])
def test_the_end_of_a_server(place, how):
    running = Running(place / "model")
    try:
        assert running.ask("/")[0] == 404, "no index, no page"
        upload = socket.create_connection(("127.0.0.1", running.port), timeout=30)
        upload.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
        threads, results = in_flight(running, 2)
        code = running.stop(how)
        for thread in threads:
            thread.join(60)
        assert len(results) == 2
        if how == signal.SIGTERM:
            assert code == 0
            told = upload.makefile("rb").read()
            assert told.startswith(b"HTTP/1.1 503") and b'"error"' in told, "a client in the midst of its body is told too"
            assert all(status in (200, 503) for status, _ in results) and any(status == 200 for status, _ in results), results
            assert all(len(answer["data"]) == len(TEXTS) for status, answer in results if status == 200)
        else:
            assert all(issubclass(status, (ConnectionError, http.client.HTTPException)) for status, _ in results), results
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", running.port), timeout=5)
        upload.close()
    finally:
        running.stop(signal.SIGKILL)


def test_a_missing_extra_is_named(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "vlm2vec.commands.serve.server", raising=False)
    code, _, told = call(capsys, "serve", place / "model", "--port", 0)
    assert code == 2 and told == "vlm2vec serve: needs uvicorn; pip install 'vlm2vec[serve]'\n"


def test_misuse_is_one_line(place, capsys):
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    for words, said in [
        ((), "no model named"),
        ((place / "model", "--port", taken.getsockname()[1]), "cannot be had"),
        ((place / "model", "--index", place / "pictures", "--port", 0), "no index in it"),
        ((place / "model", "--wait-ms", "-1", "--port", 0), "wait_ms=-1.0: expected a number above 0"),
        ((place / "pictures", "--port", 0), "not a model folder"),
    ]:
        code, _, told = call(capsys, "serve", *words)
        assert code == 2 and said in told and told.count("\n") == 1
    taken.close()
