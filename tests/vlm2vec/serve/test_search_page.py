"""The page to search an index: its routes, and the page itself in a browser, by words and by a dropped picture."""

import base64
import json
import re
import shutil
import subprocess
import threading
import urllib.request

import pytest

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
pytest.importorskip("prometheus_client", reason="the extra `serve` is not installed")
from fastapi import Response

from vlm2vec.cli import main
from vlm2vec.commands.serve.app import Service, create_app
from vlm2vec.commands.serve.limits import Limits
from vlm2vec.commands.serve.search_page import add_routes
from vlm2vec.commands.serve.server import Server, bound
from vlm2vec.data.index import Index

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
# A page around the page: what a hand would do, and what is seen then, as text for --dump-dom.
HAND = """<!doctype html><body><iframe src="/%s" width="1000" height="700"></iframe><script>
const frame = document.querySelector("iframe");
async function seen() {
  for (let i = 0; i < 400 && !frame.contentDocument.body.dataset.searched; i++) await new Promise((done) => setTimeout(done, 25));
  const inside = frame.contentDocument, found = [...inside.querySelectorAll("#found li")];
  await Promise.all([...inside.images].map((image) => image.decode().catch(() => null)));
  document.title = "done";
  document.body.textContent = "SEEN" + btoa(unescape(encodeURIComponent(JSON.stringify({
    keys: found.map((item) => item.querySelector(".named div").textContent),
    shown: found.map((item) => item.querySelector("img") ? item.querySelector("img").naturalWidth : item.querySelector("p").textContent),
    told: inside.getElementById("told").textContent,
    bold: inside.querySelectorAll("#found b, #found i").length,
    dropped: inside.querySelectorAll("#drop img").length,
    outside: [...inside.querySelectorAll("[src],[href]")].filter((one) => /^https?:/.test(one.getAttribute("src") || one.href)).length,
  })))) + "END";
}
frame.onload = async () => { %s; await seen(); };
</script></body>"""
DROP = """
const blob = await (await fetch("/thumbnail?key=fox.png")).blob(), there = frame.contentWindow, data = new there.DataTransfer();
data.items.add(new there.File([blob], "fox.jpg", {type: "image/jpeg"}));
frame.contentDocument.dispatchEvent(new there.DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}))"""


@pytest.fixture(scope="module")
def site(place, model):
    """(address, index) of the application in a thread, with the pages of a hand beside it."""
    index = Index.open(place / "index", model=model)
    service = Service(model, "tiny", Limits(), index)
    app = create_app(service)
    add_routes(app, service)

    @app.get("/hand/{what}")
    async def hand(what: str) -> Response:
        page = HAND % (("?q=a%20fox", "") if what == "words" else ("", DROP))
        return Response(page, media_type="text/html")

    import uvicorn

    listening = bound("127.0.0.1", 0)
    listening.listen()
    server = Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1), service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}", index
    server.should_exit = True
    thread.join(30)
    service.batcher.close()


def in_browser(address, tmp_path):
    """What the page of a hand has seen."""
    if CHROMIUM is None:
        pytest.skip("no chromium here; apt-get install chromium")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=20000"]
    done = subprocess.run([CHROMIUM, *options, "--dump-dom", address], capture_output=True, text=True, timeout=120)
    found = re.search("SEEN(.*?)END", done.stdout)
    assert found, (done.stdout[-500:], done.stderr[-1500:])
    return json.loads(base64.b64decode(found[1]))


def get(address):
    with urllib.request.urlopen(address, timeout=60) as response:
        return response.read()


def test_words_in_the_browser(site, tmp_path):
    address, index = site
    seen = in_browser(address + "/hand/words", tmp_path)
    hits = index.search("a fox", 24)
    assert seen["keys"] == [hit.key for hit in hits] and "more/owl <b>.png" in seen["keys"]
    assert seen["shown"] == [60 if hit.kind == "image" else "a note on <i>foxes</i>" for hit in hits], (
        "pictures are loaded, texts are shown"
    )
    assert re.fullmatch(r"4 found in \d+ ms", seen["told"]) and seen["bold"] == 0, "names are text, never markup"
    assert seen["outside"] == 0, "the page asks no other server"


def test_a_dropped_picture_in_the_browser(site, tmp_path):
    address, index = site
    seen = in_browser(address + "/hand/drop", tmp_path)
    assert seen["keys"] == [hit.key for hit in index.search(get(address + "/thumbnail?key=fox.png"), 24)]
    assert seen["dropped"] == 1 and len(seen["keys"]) == 4


def test_search_follows_updates(place, site, tmp_path, server):
    picture = "data:image/png;base64," + base64.b64encode((place / "pictures/fox.png").read_bytes()).decode()
    _, index = site
    for body, query in (({"text": "a fox", "k": 3}, "a fox"), ({"image": picture, "k": 2}, {"image": place / "pictures/fox.png"})):
        status, answer, _ = server.ask("/search", body)
        hits = index.search(query, body["k"])
        assert status == 200 and [one["key"] for one in answer["results"]] == [hit.key for hit in hits]
        assert [one["score"] for one in answer["results"]] == pytest.approx([hit.score for hit in hits], abs=2e-6)
    shutil.copy(place / "pictures/fox.png", place / "pictures/twin.png")
    try:
        assert main(["index", str(place / "pictures"), "-o", str(place / "index"), "--device", "cpu"]) == 0
        assert "twin.png" in [one["key"] for one in server.ask("/search", {"text": "a fox"})[1]["results"]]
    finally:
        (place / "pictures/twin.png").unlink()
        main(["index", str(place / "pictures"), "-o", str(place / "index"), "--device", "cpu"])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({}, "say what to look for"),
        ({"text": " "}, "say what to look for"),
        ({"text": 7}, "text: expected a text"),
        ({"text": "a", "k": 0}, "k: expected an integer from 1 to 200"),
        ({"text": "a", "where": "/"}, "expected an object with text, image or k"),
        ({"image": "fox.png"}, "expected a data URI"),
        (b"[", "not JSON"),
    ],
)
def test_searches_that_are_refused(server, body, said):
    status, answer, _ = server.ask("/search", body)
    assert status == 400 and said in answer["error"]["message"]


@pytest.mark.parametrize("key", ["note.txt", "gone.png", "../model/config.json", "/etc/passwd", "..%2fmodel%2fconfig.json", ""])
def test_only_pictures_of_the_index_are_shown(server, key):
    assert server.ask(f"/thumbnail?key={key}")[0] == 404


def test_the_page_asks_no_other_server(server):
    status, page, headers = server.ask("/")
    text = page.decode()
    assert status == 200 and not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//|@import|url\(", text)
    assert "default-src 'none'" in headers["Content-Security-Policy"]
