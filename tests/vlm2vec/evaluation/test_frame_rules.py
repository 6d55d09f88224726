"""Which frames of a film an evaluation takes: the published rules, --frames, and that vectors of one rule do not serve another."""

import pytest
import yaml

from tests.helpers import tiny_models
from tests.helpers.evaluation_layouts import StubModel, frames, parquet
from vlm2vec import VLM2Vec
from vlm2vec.evaluation.frames import V3_FRAMES, frame_rule
from vlm2vec.evaluation.runner import Options, readers, run_tasks
from vlm2vec.evaluation.tasks import load_tasks
from vlm2vec.media.sampling import FrameRule


@pytest.mark.parametrize("text", ["8", "all", "fps:1", "fps:0.5,max:64", "8,repeat", "fps:1,max:64,clips:8,rounded", "all,max:3"])
def test_a_rule_is_written_as_it_is_read(text):
    assert str(FrameRule.parse(text)) == text


@pytest.mark.parametrize("text", ["", "0", "-8", "eight", "fps:", "fps:0", "fps:nan", "8,max:0", "8,every", "max:8", "8,8"])
def test_what_is_no_rule_is_named(text):
    with pytest.raises(ValueError, match="expected .* got .*; write 8 or fps:1,max:64"):
        FrameRule.parse(text)


@pytest.mark.parametrize(
    ("rule", "stored", "clip", "wanted"),
    [
        ("8", 5, False, [0, 1, 2, 3, 4]),  # V2: a short film whole
        ("8", 20, False, [0, 2, 5, 8, 10, 13, 16, 19]),  # integer part of linspace(0, 19, 8)
        ("8,repeat", 5, False, [0, 0, 1, 1, 2, 2, 3, 4]),  # MMEB-V3 since June 2026
        ("3", 100, False, [0, 49, 99]),
        ("1", 5, False, [0]),
        ("all", 5, False, [0, 1, 2, 3, 4]),
        ("fps:1,max:4", 11, False, [0, 3, 6, 10]),  # stored frames have no rate: whole, up to the most
        ("fps:1,max:4,rounded", 11, False, [0, 3, 7, 10]),  # WeMM: round(i * 10 / 3)
        ("fps:1,max:64,clips:2,rounded", 9, True, [0, 8]),
        ("fps:1,max:64,clips:2,rounded", 9, False, list(range(9))),
    ],
)
def test_frames_by_hand(rule, stored, clip, wanted):
    assert FrameRule.parse(rule).take(list(range(stored)), clip=clip) == wanted
    assert FrameRule.parse(rule).take([]) == []


def test_rules_of_v3_are_the_facts(golden):
    facts = yaml.safe_load((golden / "facts" / "mmeb_v3.yaml").read_text())["frames"]
    official, wemm = FrameRule.parse(V3_FRAMES["official"]), FrameRule.parse(V3_FRAMES["wemm"])
    assert official.frames == facts["official"]["per_video"] and official.repeat
    assert (wemm.max_frames, wemm.clips, wemm.rounded) == (facts["wemm"]["per_video"], facts["wemm"]["moment_clips"], True)


def test_a_family_has_its_own_rule_and_a_protocol_another():
    class Fed:
        class processing:
            film_frames = "fps:1,max:64"

    assert str(frame_rule(Fed())) == "fps:1,max:64" and str(frame_rule(StubModel())) == "8"
    assert str(frame_rule(Fed(), protocol="v3")) == "8,repeat"
    assert str(frame_rule(Fed(), protocol="v3", feeding="wemm")) == V3_FRAMES["wemm"]
    assert str(frame_rule(Fed(), asked=FrameRule.parse("4"), protocol="v3")) == "4"


@pytest.fixture
def films(tmp_path):
    for film in range(4):
        frames(tmp_path / "video-tasks/frames/video_cls/UCF101" / f"v{film}", 12, 100 * film)
    parquet(tmp_path / "eval" / "UCF101" / "test-00000.parquet", video_id=[f"v{i}" for i in range(4)], pos_text=["Biking", "Archery"] * 2)
    return tmp_path


def test_frames_of_a_task(films):
    def run(output, frames=None):
        model = StubModel()
        options = Options(progress=False, frames=frames)
        run_tasks(model, [load_tasks()["UCF101"]], films / "eval", films, films / output, store=films / "store", options=options)
        return [visuals.count("frame_") for _, visuals in model.encoded if visuals != "[]"]

    assert run("default") == [8] * 4
    assert run("again") == [], "the same frames are in the store"
    assert run("three", FrameRule.parse("3")) == [3] * 4, "other frames have other keys"
    assert run("all", FrameRule.parse("all")) == [12] * 4


def test_film_files_are_keyed_by_the_rule(tmp_path):
    """A film that is decoded by the model itself is read by the rule's options, which are part of the store's key."""
    tiny_models.qwen2_vl(tmp_path)
    model, task = VLM2Vec.from_pretrained(tmp_path, dtype="float32", device="cpu"), load_tasks()["UCF101"]
    ((read, _),) = readers(model, [task], Options(frames=FrameRule.parse("fps:2,max:16")))
    assert (read.options["fps"], read.options["max_frames"]) == (2.0, 16) and model.options["fps"] is None
    ((picture, _),) = readers(model, [load_tasks()["ImageNet-1K"]], Options(frames=FrameRule.parse("4")))
    assert picture.options["frames"] == model.options["frames"], "tasks without films keep their vectors"
