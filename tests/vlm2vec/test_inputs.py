"""What may be fed and what is refused: markers, prompts, images of every mode, long texts, videos."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.tiny_models import qwen2_vl, qwen3_vl
from vlm2vec.checkpoint.prompts import layout, prepend
from vlm2vec.inputs import Item, as_item
from vlm2vec.media.films import read_frames
from vlm2vec.model import VLM2Vec


def picture(width=60, height=40, mode="RGB", seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2_vl")
    qwen2_vl(folder)
    return VLM2Vec.from_pretrained(folder)


# -- items -------------------------------------------------------------------------------------------------------------


def test_forms_of_one_input(tmp_path, model):
    image = picture()
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    forms = [
        image,
        tmp_path / "a.png",
        data,
        {"image": image},
        {"image": str(tmp_path / "a.png")},
        {"images": [image]},
        [{"role": "user", "content": [{"type": "image", "image": image}]}],
    ]
    rows = [model.encode(form) for form in forms]
    assert all(row.shape == (model.embedding_dim,) for row in rows)
    for row in rows[1:]:
        np.testing.assert_array_equal(row, rows[0])
    assert model.encode(["x"]).shape == (1, model.embedding_dim)
    assert model.encode([]).shape == (0, model.embedding_dim)


def test_an_image_without_a_marker_comes_first_then_a_newline():
    assert as_item({"text": "what?", "image": picture()}).text == "<|image_1|>\nwhat?"
    assert as_item({"image": picture()}).text == "<|image_1|>"
    assert as_item({"text": "see <|image_1|>", "image": picture()}).text == "see <|image_1|>"
    assert as_item({"text": "what?", "images": [picture(), picture()]}).text == "<|image_1|>\n<|image_2|>\nwhat?"


def test_chat_messages_without_a_template():
    item = as_item(
        [
            {"role": "system", "content": "Find it."},
            {"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "what?"}]},
        ]
    )
    assert (item.text, item.instruction, len(item.images)) == ("<|image_1|>\nwhat?", "Find it.", 1)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (7, "got int"),
        ({"txt": "x"}, "unknown keys"),
        ({"text": 7}, "'text' must be a str"),
        ({"text": "a", "instruction": 7}, "'instruction' must be a str"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "audio"),
        ("", "no tokens"),
        ({"text": "", "image": None}, "no tokens"),
        ("<|image_1|> what?", "1 image markers and 0 images"),
        ({"text": "<|image_1|> <|image_2|>", "image": picture()}, "2 image markers and 1 images"),
        ({"text": "<|image_1|>", "images": [picture(), picture()]}, "1 image markers and 2 images"),
        ({"video": []}, "no tokens"),
        ({"video": 7}, "video file"),
    ],
)
def test_bad_inputs_are_named_by_position(model, bad, said):
    with pytest.raises(ValueError, match="input 1:") as e:
        model.encode(["fine", bad])
    assert said in str(e.value)


def test_a_marker_that_is_said_to_stand_for_nothing_is_a_token(model):
    """WebQA and EDIS queries: the marker stays one ordinary token with its plain embedding."""
    features = model.preprocess([{"text": "<|image_1|> what?", "image": None}])[0]
    assert features.visual_index is None and not features.vision
    assert (features.input_ids == model.processing.image_token_id).sum() == 1
    assert np.isfinite(model.encode({"text": "<|image_1|> what?", "image": ""})).all()


# -- prompts -----------------------------------------------------------------------------------------------------------


def test_layouts_of_the_reference():
    assert layout("Find it.", "<|image_1|>\nwhat?") == "<|image_1|>\nFind it. what?\n"
    assert layout("Find it.", "what?") == "Find it. what?\n"
    assert layout("Find it.", "<|image_1|>") == "<|image_1|>\nFind it.\n"
    assert layout("Find it.", "<|video_1|>\nwhat?", "space") == "<|video_1|> Find it. what?"
    with pytest.raises(ValueError, match="layout"):
        layout("a", "b", "other")


def test_a_prompt_stands_behind_the_markers(model):
    assert prepend("Find: ", "<|image_1|>\nwhat?") == "<|image_1|>\nFind: what?"
    np.testing.assert_array_equal(model.encode("cat", prompt="Find: "), model.encode("Find: cat"))
    model.prompts["query"] = "Find: "
    try:
        np.testing.assert_array_equal(model.encode_query("cat"), model.encode("Find: cat"))
        np.testing.assert_array_equal(model.encode_document("cat"), model.encode("cat"))
    finally:
        del model.prompts["query"]


def test_a_prompt_leaves_the_callers_items_alone(model):
    item = Item(text="cat")
    model.encode([item], prompt="Find: ")
    assert item.text == "cat"


# -- images ------------------------------------------------------------------------------------------------------------


def test_image_limits_and_edges(model):
    def grid(width, height, **options):
        made = type(model.processing)(model.processing.tokenizer, model.processing.image_processor, model.config, options)
        return made.process_image(picture(width, height)).tensors["grid_thw"][0].tolist()

    assert grid(20, 17) == [1, 4, 4]  # a side under 28: 56 x 56
    assert grid(500, 20) == [1, 4, 4]
    assert grid(6000, 29) == [1, 70, 70]  # aspect ratio above 200: a square of the longer side, then the limit
    assert grid(4000, 3000)[1] * grid(4000, 3000)[2] * 14 * 14 <= 1003520
    assert grid(60, 40, resolution="low") == [1, 10, 10] and grid(60, 40, resolution=(56, 112)) == [1, 8, 4]
    assert grid(1000, 1000, max_pixels=56 * 56) == [1, 4, 4]


def test_torchvision_pixels_are_near_but_not_the_same(model):
    made = type(model.processing)(model.processing.tokenizer, model.processing.image_processor, model.config, {"pixels": "torchvision"})
    ours = model.processing.process_image(picture(150, 90)).tensors["pixel_values"]
    theirs = made.process_image(picture(150, 90)).tensors["pixel_values"]
    assert 0 < (ours - theirs).abs().max() < 0.2


# -- length ------------------------------------------------------------------------------------------------------------


def test_long_text_is_cut_around_the_image_with_a_count(tmp_path, model):
    processing = type(model.processing)(model.processing.tokenizer, model.processing.image_processor, model.config, {"max_length": 12})
    with pytest.warns(UserWarning, match="1 text so far cut to max_length=12"):
        features = processing({"text": "ab <|image_1|> " + "c" * 30, "image": picture(56, 56)})
    image = (features.input_ids == processing.image_token_id).nonzero().flatten().tolist()
    assert features.length == 12 and image == [3, 4, 5, 6] and features.visual_index.tolist() == image
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert processing("c" * 12).length == 12
    with pytest.raises(ValueError, match="below the 16 image tokens"):
        processing({"image": picture(112, 112)})
    assert processing.truncated == 1


def test_a_chat_template_keeps_its_own_tokens(tmp_path):
    qwen3_vl(tmp_path)
    model = VLM2Vec.from_pretrained(tmp_path, chat_template=True, max_length=130)
    with pytest.warns(UserWarning, match="cut to max_length=130"):
        long, short = model.preprocess([{"text": "x" * 500}, "x"])
    decode = model.processing.tokenizer.decode
    assert long.length == 130 and short.length < 130
    assert decode(long.input_ids).endswith("xx<|im_end|>\n<|im_start|>assistant\n")
    assert decode(short.input_ids) == (
        "<|im_start|>system\nRepresent the user's input.<|im_end|>\n<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"
    )


# -- videos ------------------------------------------------------------------------------------------------------------


def test_videos_from_files_and_folders(tmp_path, model):
    av = pytest.importorskip("av")
    frames = [picture(64, 48, seed=i) for i in range(12)]
    (tmp_path / "frames").mkdir()
    for i, frame in enumerate(frames):
        frame.save(tmp_path / "frames" / f"{i:03}.png")
    with av.open(str(tmp_path / "v.mp4"), "w") as out:
        stream = out.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_image(frame)))
        out.mux(stream.encode())
    assert len(read_frames(str(tmp_path / "v.mp4"), 5)) == 5
    assert [p[-7:] for p in read_frames(tmp_path / "frames", 3)] == ["000.png", "005.png", "011.png"]
    for video in (tmp_path / "frames", str(tmp_path / "v.mp4")):
        features = model.preprocess([{"video": video}])[0]
        assert features.vision["grid_thw"][0, 0] == 4  # 8 frames in pairs
    (tmp_path / "bad.mp4").write_bytes(b"junk")
    for bad, said in (("bad.mp4", "cannot be decoded"), ("none.mp4", "no such file")):
        with pytest.raises(ValueError, match=said):
            read_frames(str(tmp_path / bad), 4)


def test_frames_all_take_the_first_ones_size(model):
    features = model.preprocess([{"video": [picture(112, 56), picture(40, 300, seed=1), picture(30, 30, seed=2)]}])[0]
    assert features.vision["grid_thw"].tolist() == [[2, 4, 8]]


def test_processing_is_picklable_and_small(model):
    data = pickle.dumps(model.processing)
    twin = pickle.loads(data)
    x = {"text": "what?", "image": picture()}
    ours, theirs = model.processing(x), twin(x)
    assert torch.equal(ours.input_ids, theirs.input_ids) and torch.equal(ours.vision["pixel_values"], theirs.vision["pixel_values"])
    assert len(data) < 2_000_000
