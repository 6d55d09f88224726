"""Requests as clients send them: fixed by a seed, from a pool of texts and pictures, over kept connections of many threads."""

from __future__ import annotations

import base64
import http.client
import io
import json
import random
import threading
import time
from dataclasses import dataclass, field

import numpy as np

POOL = 160  # distinct inputs
SIZES = (1, 1, 1, 1, 2, 2, 4, 8)  # inputs of a request
WORDS = "a red fox an owl the old house by river of two small boats under snow with light green field".split()


@dataclass
class Answered:
    """What came back.

    Attributes:
        seconds: from the first request to the last answer. errors: what went wrong, in words.
        worst: the largest difference of a number from `encode` alone. inputs: that were embedded.
    """

    seconds: float = 0.0
    requests: int = 0
    inputs: int = 0
    tokens: int = 0
    worst: float = 0.0
    errors: list[str] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def add(self, other: Answered) -> None:
        """Count another round in."""
        for name in ("seconds", "requests", "inputs", "tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.worst = max(self.worst, other.worst)
        self.errors += other.errors
        self.waits += other.waits


def picture(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG of soft shapes, as large as a photograph of that size is."""
    from PIL import Image

    coarse = Image.fromarray(rng.integers(0, 256, (height // 20 + 2, width // 20 + 2, 3), dtype=np.uint8))
    content = io.BytesIO()
    coarse.resize((width, height), Image.Resampling.BICUBIC).save(content, "JPEG", quality=90)
    return content.getvalue()


def pool(sizes: list[tuple[int, int]], count: int = POOL) -> list:
    """Inputs as `encode` takes them: three texts, five pictures and two of both in ten."""
    rng, words, made = np.random.default_rng(0), random.Random(0), []
    for i in range(count):
        text = " ".join(words.choice(WORDS) for _ in range(words.randint(3, 14))) + f" {i}"
        if i % 10 < 3:
            made.append(text)
            continue
        content = {"type": "image", "image": picture(rng, *sizes[i % len(sizes)])}
        parts = [content] if i % 10 < 8 else [content, {"type": "text", "text": text}]
        made.append([{"role": "user", "content": parts}])
    return made


def said(x: str | list) -> str | list:
    """An input of the pool as a request says it."""
    if isinstance(x, str):
        return x
    parts = []
    for part in x[0]["content"]:
        if part["type"] == "text":
            parts.append(part)
        else:
            url = "data:image/jpeg;base64," + base64.b64encode(part["image"]).decode()
            parts.append({"type": "image_url", "image_url": {"url": url}})
    return parts


def requests(count: int, inputs: int) -> list[list[int]]:
    """Places in a pool of so many inputs, of each request."""
    rng = random.Random(1)
    return [[rng.randrange(inputs) for _ in range(rng.choice(SIZES))] for _ in range(count)]


def send(port: int, made: list, wanted: list[list[int]], truth: np.ndarray, clients: int) -> Answered:
    """Send the requests from so many threads, each on a connection of its own, and hold every answer to the truth.

    Args:
        made: the pool. wanted: `requests`. truth: (len(made), D), what `encode` gives of each alone.
    """
    bodies = [json.dumps(said(x)).encode() for x in made]
    told, lock, turn = Answered(), threading.Lock(), iter(enumerate(wanted))

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        while True:
            with lock:
                number, rows = next(turn, (None, None))
            if number is None:
                break
            form = b"base64" if number % 4 else b"float"
            body = b'{"input":[' + b",".join(bodies[row] for row in rows) + b'],"model":"","encoding_format":"' + form + b'"}'
            start = time.perf_counter()
            try:
                connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                content = response.read()
                answer = json.loads(content)
                if response.status != 200:
                    raise ValueError(f"{response.status}: {answer}")
                order = [one["index"] for one in answer["data"]]
                vectors = np.stack([vector(one["embedding"]) for one in answer["data"]])
                if order != list(range(len(rows))):
                    raise ValueError(f"order {order}")
                worst = float(np.abs(vectors - truth[rows]).max())
            except (OSError, ValueError, http.client.HTTPException) as e:
                with lock:
                    told.errors.append(f"request {number}: {type(e).__name__} {e}"[:200])
                connection.close()
                continue
            with lock:
                told.waits.append(time.perf_counter() - start)
                told.requests += 1
                told.inputs += len(rows)
                told.tokens += answer["usage"]["prompt_tokens"]
                told.worst = max(told.worst, worst)
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told.seconds = time.perf_counter() - start
    return told


def vector(given: str | list[float]) -> np.ndarray:
    """(D,) float32 of either encoding."""
    return np.frombuffer(base64.b64decode(given), "<f4") if isinstance(given, str) else np.array(given, np.float32)
