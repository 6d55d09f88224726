"""The report: figures are those of the score files, the page needs nothing from elsewhere, and what is missing is named."""

import json
import re
from html.parser import HTMLParser

import pytest

from vlm2vec.files.report import Answer, Card, Query, Score, Series, curve, grid, inline_image, mean_by_meta_task, score_lines, score_table
from vlm2vec.quickstart import build
from vlm2vec.quickstart.__main__ import main
from vlm2vec.quickstart.benchmark import Size
from vlm2vec.quickstart.report import report

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Balanced(HTMLParser):
    """Fails on a tag that is not closed in order, and gathers addresses."""

    def __init__(self):
        super().__init__()
        self.open, self.addresses = [], []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for key, value in attrs if key in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def check(html):
    parser = Balanced()
    parser.feed(html)
    assert not parser.open
    return parser


@pytest.fixture
def folder(tmp_path):
    """A quickstart as the other commands leave it, with invented answers: the right one is second for odd rows."""
    out = tmp_path / "run"
    data = build.build_data(out, size=Size(subjects=8, drawings=5, pairs=4, quads=2), workers=1, say=None)
    for when, hits in (("before", 1), ("after", 4)):
        scores = out / f"scores-{when}"
        scores.mkdir()
        for task in build.read_summary(data)["tasks"]:
            (scores / f"{task['name']}_score.json").write_text(json.dumps({"acc": hits / 8, "num_correct": hits, "num_pred": 8}))
            lines = []
            picture = str(next((data / "images" / "eval" / "drawings").iterdir()))
            for row in range(8):
                candidates = [{"text": f"answer {k} <&>", "image": picture if "image" in task["target"] else ""} for k in range(6)]
                right = row % 2
                query = {"text": task["prompt"].replace("{}", f"question {row}"), "image": picture if "image" in task["query"] else ""}
                lines.append(
                    json.dumps(
                        {
                            "row": row,
                            "query": query,
                            "labels": [candidates[right]],
                            "rank": right + 1,
                            "top": [{**c, "name": "", "score": 0.5, "correct": k == right} for k, c in enumerate(candidates[:5])],
                        }
                    )
                )
            (scores / f"{task['name']}_top.jsonl").write_text("\n".join(lines) + "\n")
    import torch
    from safetensors.torch import save_file

    (out / "model").mkdir()
    (out / "model-init").mkdir()
    save_file({"w": torch.zeros(1000, 1500)}, out / "model-init" / "model.safetensors")
    (out / "model-init" / "config.json").write_text(
        json.dumps({"text_config": {"num_hidden_layers": 3, "hidden_size": 128}, "vision_config": {"depth": 3}})
    )
    history = [{"step": s, "loss": 5 - s / 10, "accuracy": s / 40} for s in range(10, 50, 10)] + [{"step": 40, "train_runtime": 1.0}]
    (out / "model" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    (out / "model" / "train_result.json").write_text(
        json.dumps(
            {
                "steps": 40,
                "loss": 1.0,
                "seconds": 130.0,
                "peak_memory_mib": 2048.0,
                "recipe": {"global_batch": 64, "loss": {"temperature": 0.05}},
            }
        )
    )
    return out


def test_page_is_whole_and_self_contained(folder, capsys):
    assert main(["report", str(folder)]) == 0
    printed = capsys.readouterr().out
    html = (folder / "report.html").read_text(encoding="utf-8")
    parser = check(html)
    assert parser.addresses and all(address.startswith("data:image/png;base64,") for address in parser.addresses)
    assert "http" not in html.replace("http://www.w3.org", "") and "@import" not in html and "url(" not in html
    assert html.count('class="right"') == 11 * 4 and html.count('<div class="query hit">') == 11 * 2  # rows alternate
    for expected in ("50.0 %", "12.5 %", "1.50 million parameters", "2 min 10 s", "2.00 GiB", "CC BY-SA 4.0", "question", "1.000 nats"):
        assert expected in html
    assert "answer 0 &lt;&amp;&gt;" in html and "<|image_1|>" not in html
    assert "OpenMoji-Recolour" in printed and "mean retrieval" in printed and max(map(len, printed.splitlines()[:-1])) <= 79
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("scores-after/OpenMoji_t2i_score.json", "run vlm2vec eval"),
        ("scores-after/OpenMoji_t2i_top.jsonl", "run vlm2vec eval"),
        ("model/trainer_state.json", "python -m train"),
        ("data/tasks.json", "build the benchmark first"),
    ],
)
def test_what_is_missing_or_broken_is_named(folder, capsys, gone, message):
    (folder / "report.html").write_text("an earlier report")
    (folder / gone).write_text("{half")
    with pytest.raises(ValueError, match=f"{gone.split('/')[-1]}: not readable"):
        report(folder, say=None)
    (folder / gone).unlink()
    assert main(["report", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and gone.split("/")[-1] in error and message in error
    assert (folder / "report.html").read_text() == "an earlier report"


def test_means_are_over_tasks_and_compared_with_chance():
    scores = [Score("a", "x", 0.5, 0.01, 0.01, 100), Score("b", "x", 0.1, 0.03, 0.03, 33), Score("c", "y", 1.0)]
    mean = mean_by_meta_task(scores)
    assert mean[0].after == pytest.approx(0.3) and mean[0].chance == pytest.approx(0.02) and mean[1].chance is None
    lines = score_lines(scores)
    assert re.search(r"^mean x +2\.0 % +2\.0 % +30\.0 % +15$", "\n".join(lines), re.M)
    html = score_table(scores, {"x": "The <first>"})
    check(html)
    assert "The &lt;first&gt;" in html and "50×" in html and "width:30.00%" in html


def test_curve_survives_odd_logs():
    check(curve(Series("loss", [(10, 4.0), (20, float("nan")), (30, 2.0)])))
    assert curve(Series("loss", [(10, 4.0), (20, float("nan")), (30, 2.0)])).count("<title>") == 2
    assert "too few" in curve(Series("loss", [(10, float("inf"))]))
    for values in ([3.0, 3.0], [0.0, 0.0], [1e-6, 2e-6], [-5.0, 1e4]):  # flat, zero, tiny, wide
        svg = curve(Series("loss", list(enumerate(values, 1))))
        check(svg)
        heights = [float(y) for y in re.findall(r'class="point" cx="[\d.]+" cy="([-\d.]+)"', svg)]
        assert len(heights) == 2 and all(0 <= y <= 260 for y in heights)


def test_grid_shows_the_right_answer_that_was_missed(tmp_path):
    from PIL import Image

    Image.new("RGB", (900, 300), "red").save(tmp_path / "wide.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    html = grid(
        [
            Query(
                Card("q", tmp_path / "wide.png"),
                [Answer(Card("no"), False), Answer(Card("", tmp_path / "broken.png"), False)],
                Card("yes"),
                17,
            )
        ]
    )
    check(html)
    assert "right: no. 17" in html and "broken.png cannot be shown" in html and 'class="missed"' in html and "query miss" in html
    assert inline_image(tmp_path / "wide.png").startswith("data:image/jpeg;base64,")  # large ones are made smaller
    assert len(inline_image(tmp_path / "wide.png")) < 3000 and inline_image(tmp_path / "broken.png") == ""
