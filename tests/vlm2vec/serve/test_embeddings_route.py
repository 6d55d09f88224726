"""/v1/embeddings says what `encode` says, in OpenAI's shapes, and refuses by name what it does not take."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from vlm2vec.checkpoint.words import said_as

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")
from vlm2vec.commands.serve.errors import BadRequest
from vlm2vec.commands.serve.requests import parse


def uri(path):
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def vectors(answer):
    return np.array([one["embedding"] for one in answer["data"]], np.float32)


def test_texts(server, model):
    status, answer, _ = server.ask("/v1/embeddings", {"input": ["a fox", "an owl", "a"], "model": "tiny"})
    assert status == 200 and answer["object"] == "list" and [one["index"] for one in answer["data"]] == [0, 1, 2]
    np.testing.assert_allclose(vectors(answer), model.encode(["a fox", "an owl", "a"]), atol=1e-6)
    assert answer["model"] == "tiny" and answer["usage"] == {"prompt_tokens": 12, "total_tokens": 12}
    status, single, _ = server.ask("/v1/embeddings", {"input": "a fox"})
    np.testing.assert_allclose(vectors(single), vectors(answer)[:1], atol=1e-6)


def test_content_parts_and_messages(server, model, place):
    picture = place / "pictures/fox.png"
    image = {"type": "image_url", "image_url": {"url": uri(picture)}}
    text = {"type": "text", "text": "what is it?"}
    truth = model.encode([{"image": picture}, {"image": picture, "text": "what is it?"}, "plain"])
    status, answer, _ = server.ask("/v1/embeddings", {"input": [[image], {"content": [image, text]}, "plain"]})
    assert status == 200, answer
    np.testing.assert_allclose(vectors(answer), truth, atol=1e-6)
    for body in ({"input": [image, text]}, {"messages": [{"role": "user", "content": [image, text]}]}):
        status, answer, _ = server.ask("/v1/embeddings", body)
        assert status == 200 and len(answer["data"]) == 1, "parts alone are one input"
        np.testing.assert_allclose(vectors(answer), truth[1:2], atol=1e-6)
    status, answer, _ = server.ask("/v1/embeddings", {"input": uri(picture)})
    np.testing.assert_allclose(vectors(answer), truth[:1], atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*so far cut to")
def test_texts_that_lose_their_end_are_told(server, model):
    long = "word " * 5000
    status, answer, _ = server.ask("/v1/embeddings", {"input": ["short", long, "a", long]})
    assert status == 200 and answer["truncated"] == [1, 3] and model.preprocess([long])[0].cut
    np.testing.assert_allclose(vectors(answer)[3], model.encode(long), atol=1e-6)
    assert "truncated" not in server.ask("/v1/embeddings", {"input": ["short"]})[1]


def test_dimensions_base64_and_roles(server, model):
    status, answer, _ = server.ask("/v1/embeddings", {"input": "a fox", "dimensions": 5, "encoding_format": "base64"})
    got = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(got, model.encode("a fox", truncate_dim=5), atol=1e-6)
    said, prompt = said_as(model, ["a fox"], "query")
    status, answer, _ = server.ask("/v1/embeddings", {"input": "a fox", "input_type": "query"})
    np.testing.assert_allclose(vectors(answer), model.encode(said, prompt=prompt), atol=1e-6)


def pixels(width, height):
    content = io.BytesIO()
    Image.new("RGB", (width, height)).save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


REFUSED = [
    ({}, "expected input, or messages", "input"),
    ({"input": []}, "an empty list", "input"),
    ({"input": 7}, "expected a text or a list", "input"),
    ({"input": [1, 2, 3]}, "token ids are not read", "input"),
    ({"input": [[1, 2], [3]]}, "input[0]: token ids are not read", "input"),
    ({"input": ["a", None]}, "input[1]: expected a text", "input"),
    ({"input": "a", "dimensions": 0}, "dimensions: expected an integer of at least 1", "dimensions"),
    ({"input": "a", "dimensions": 4096}, "dimensions: 4096: expected 1 to 32", "dimensions"),
    ({"input": "a", "encoding_format": "int8"}, "encoding_format: expected float or base64", "encoding_format"),
    ({"input": "a", "input_type": "passage"}, "input_type: expected query or document", "input_type"),
    ({"input": "a", "temperature": 1}, "unknown field 'temperature'", "temperature"),
    ({"input": "a", "messages": []}, "input, or messages, one of them", "input"),
    ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0]: role 'robot'", "messages"),
    ({"input": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}, "expected a data URI", "input"),
    ({"input": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}]}, "addresses and files are not read", "input"),
    ({"input": [{"type": "image", "image": "file:///etc/passwd"}]}, "expected a data URI", "input"),
    ({"input": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}, "input[0]: image 3 bytes: ", "input"),
    ({"input": [{"type": "image_url", "image_url": {"url": pixels(501, 500)}}]}, "501 x 500 is over the limit of 250000 pixels", "input"),
    ({"input": [{"type": "audio", "audio": "x"}]}, "got type 'audio'", "input"),
    ({"input": [{"image": "fox.png"}]}, "input[0]: expected a text, a list of content parts", "input"),
    ({"input": "two <|image_1|> <|image_2|>", "model": "gpt"}, "no model 'gpt' here; there is tiny", "model"),
    ({"input": ["a"] * 65}, "65 inputs: expected at most 64", "input"),
    (b"{", "the body: not JSON", None),
    (b"[1]", "expected a JSON object, got a list", None),
    (b"\xff", "not UTF-8", None),
    (b'{"input": ' + b"[" * 100_000, "nested too deep", None),
]


@pytest.mark.parametrize(("body", "said", "param"), REFUSED, ids=[said for _, said, _ in REFUSED])
def test_what_is_refused(server, body, said, param):
    status, answer, _ = server.ask("/v1/embeddings", body)
    error = answer["error"]
    assert said in error["message"] and error["param"] == param and len(error["message"]) <= 500
    assert status == (404 if param == "model" else 400) and error["type"] == "invalid_request_error"
    assert server.ask("/v1/embeddings", {"input": "still there"})[0] == 200


def test_a_large_body_is_refused_before_it_is_read(server):
    status, answer, _ = server.ask("/v1/embeddings", json.dumps({"input": "a" * (5 << 20)}).encode())
    assert status == 413 and "expected at most 4194304" in answer["error"]["message"]


def test_an_input_that_the_model_cannot_take_is_named(server, place):
    cut = base64.b64encode((place / "pictures/fox.png").read_bytes()[:3000]).decode()  # its header is whole
    picture = {"type": "image_url", "image_url": f"data:image/png;base64,{cut}"}
    status, answer, _ = server.ask("/v1/embeddings", {"input": ["fine", [picture]]})
    assert status == 400 and answer["error"]["message"].startswith("input 1: ") and answer["error"]["param"] == "input"


def test_models_health_and_metrics(server):
    status, answer, _ = server.ask("/v1/models")
    assert status == 200 and [one["id"] for one in answer["data"]] == ["tiny"] and answer["data"][0]["object"] == "model"
    assert server.ask("/v1/models/tiny")[1]["id"] == "tiny"
    status, answer, _ = server.ask("/v1/models/other")
    assert status == 404 and answer["error"]["code"] == "model_not_found"
    assert server.ask("/health")[:2] == (200, {"status": "ok", "model": "tiny", "queued_inputs": 0})
    before = server.ask("/metrics")[1].decode()
    server.ask("/v1/embeddings", {"input": ["one", "two"]})
    after = server.ask("/metrics")[1].decode()

    def number(text, name):
        return float(next(line.split()[-1] for line in text.splitlines() if line.startswith(name + " ")))

    assert number(after, "vlm2vec_inputs_total") - number(before, "vlm2vec_inputs_total") == 2
    assert number(after, "vlm2vec_tokens_total") - number(before, "vlm2vec_tokens_total") == 6
    assert number(after, "vlm2vec_index_entries") == 4
    assert server.ask("/nowhere")[0] == 404 and "error" in server.ask("/nowhere")[1]


def test_the_openai_client(server, model, place):
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    answer = client.embeddings.create(model="tiny", input=["a fox", "an owl"])  # in base64, which the client asks for by itself
    np.testing.assert_allclose([one.embedding for one in answer.data], model.encode(["a fox", "an owl"]), atol=1e-6)
    assert answer.usage.prompt_tokens == 11 and answer.model == "tiny"
    answer = client.embeddings.create(model="tiny", input="a fox", dimensions=7, encoding_format="float")
    np.testing.assert_allclose(answer.data[0].embedding, model.encode("a fox", truncate_dim=7), atol=1e-6)
    parts = [{"type": "image_url", "image_url": {"url": uri(place / "pictures/fox.png")}}]
    answer = client.embeddings.create(model="tiny", input=parts, extra_body={"input_type": "document"})
    said, prompt = said_as(model, [place / "pictures/fox.png"], "document")
    np.testing.assert_allclose(answer.data[0].embedding, model.encode(said, prompt=prompt)[0], atol=1e-6)
    assert [one.id for one in client.models.list()] == ["tiny"]
    with pytest.raises(openai.BadRequestError, match="token ids are not read"):
        client.embeddings.create(model="tiny", input=[[1, 2]])
    with pytest.raises(openai.NotFoundError, match="no model 'gpt' here"):
        client.embeddings.create(model="gpt", input="a")


def test_parsing_reads_no_file(place):
    with pytest.raises(BadRequest):
        parse(json.dumps({"input": {"content": [{"type": "image", "image": str(place / "pictures/fox.png")}]}}).encode(), 10**6)
