"""`feeding="authors"` on tiny models with a template of our own: what is put around an input, limits, saving."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.tiny_embedders import EMBEDDERS, WIDTHS, edited, qwen3_vl_embedding
from vlm2vec.inputs import as_item
from vlm2vec.model import VLM2Vec

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
OTHER = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 128, 3), dtype=np.uint8))
SYSTEM = "<|im_start|>system\nRepresent the user's input.<|im_end|>\n"
END = "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
SEEN = "<|vision_start|>{}<|vision_end|>"
IMAGE, FILM = SEEN.format("<|image_pad|>"), SEEN.format("<|video_pad|>")


@pytest.fixture(scope="module")
def embedder(folders):
    return VLM2Vec.from_pretrained(folders / "qwen3_vl_embedding")


@pytest.fixture(scope="module")
def wemm(folders):
    return VLM2Vec.from_pretrained(folders / "wemm")


def fed(model, x):
    """What the model is fed, a run of media tokens as one."""
    text = model.processing.tokenizer.decode(model.preprocess([x])[0].input_ids)
    return re.sub(r"(<\|(image|video)_pad\|>)+", r"\1", text)


# -- Qwen3-VL-Embedding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "user"),
    [
        ("a fox \n", "a fox \n"),
        ({"text": ""}, ""),
        ({}, "NULL"),
        ({"text": None, "image": None}, "NULL"),
        ({"text": ["one ", "two"]}, "one two"),
        (PICTURE, IMAGE),
        ({"text": "\n\n a\n", "image": PICTURE}, IMAGE + "\n\n a\n"),
        ({"text": "<|image_1|>\nFind it:\n", "image": PICTURE}, IMAGE + "Find it:"),
        ({"text": "both <|image_2|> and <|image_1|>", "images": [PICTURE, OTHER]}, IMAGE * 2 + "both  and "),
        ({"text": "what?", "image": PICTURE, "video": [PICTURE] * 3}, f"<0.2 seconds>{FILM}<1.2 seconds>{FILM}{IMAGE}what?"),
        ({"text": "the <|image_pad|> tag", "image": PICTURE}, IMAGE + "the <|image_pad|> tag"),
        ({"text": "the <|image_1|> tag", "image": None}, "the <|image_1|> tag"),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "see "}, {"type": "image", "image": PICTURE}, {"type": "text", "text": "!"}],
                }
            ],
            IMAGE + "see !",
        ),
    ],
)
def test_films_pictures_and_texts_in_that_order(embedder, x, user):
    assert fed(embedder, x) == f"{SYSTEM}<|im_start|>user\n{user}{END}"


@pytest.mark.parametrize(
    ("instruction", "said"),
    [
        (None, "Represent the user's input."),
        ("", "Represent the user's input."),
        (" \n ", "Represent the user's input."),
        (" Find it ", "Find it."),
        ("Find it!", "Find it!"),
        ("检索图片。", "检索图片。"),
        ("1 + 1 = 2", "1 + 1 = 2."),
        ("cost < 5 $", "cost < 5 $."),  # a symbol is no punctuation
    ],
)
def test_the_instruction_is_the_system_message(embedder, instruction, said):
    wanted = f"<|im_start|>system\n{said}<|im_end|>\n<|im_start|>user\na{END}"
    assert fed(embedder, {"text": "a", "instruction": instruction}) == wanted
    if instruction:
        assert fed(embedder, [{"role": "system", "content": instruction}, {"role": "user", "content": "a"}]) == wanted
        np.testing.assert_array_equal(embedder.encode("a", prompt=instruction), embedder.encode({"text": "a", "instruction": instruction}))
    else:
        np.testing.assert_array_equal(embedder.encode_query("a"), embedder.encode("a"))


def test_a_template_beside_and_none_at_all(folders, tmp_path, embedder):
    qwen3_vl_embedding(tmp_path)
    template = (tmp_path / "chat_template.jinja").read_text()
    (tmp_path / "chat_template.jinja").unlink()
    assert fed(VLM2Vec.from_pretrained(tmp_path, feeding="authors"), "a") == fed(embedder, "a")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": template.replace("assistant", "helper")}))
    assert fed(VLM2Vec.from_pretrained(tmp_path, feeding="authors"), "a") == fed(embedder, "a").replace("assistant", "helper")


def test_a_cut_takes_the_end_and_leaves_the_last_token(folders):
    model = VLM2Vec.from_pretrained(folders / "qwen3_vl_embedding", max_length=100)
    with pytest.warns(UserWarning, match=r"cut to max_length=100 tokens"):
        features = model.preprocess([{"text": "x" * 500, "image": PICTURE}])[0]
    assert features.length == 100
    assert re.fullmatch(
        re.escape(f"{SYSTEM}<|im_start|>user\n{IMAGE}") + "x+" + re.escape("<|endoftext|>"),
        fed(model, {"text": "x" * 500, "image": PICTURE}),
    )
    with pytest.raises(ValueError, match=r"input 1: max_length=100: expected room for the input's 60 image and video tokens, got a cut"):
        model.preprocess(["a", {"image": PICTURE.resize((320, 192))}])
    refusing = VLM2Vec.from_pretrained(folders / "qwen3_vl_embedding", max_length=100, truncation=False)
    with pytest.raises(ValueError, match="tokens are more than max_length=100; shorten the text"):
        refusing.preprocess(["x" * 500])


def test_limits_of_pictures_and_films(folders, embedder):
    assert {name: embedder.options[name] for name in ("max_length", "min_pixels", "max_pixels", "total_pixels", "fps", "max_frames")} == {
        "max_length": 8192,
        "min_pixels": 4096,
        "max_pixels": 1843200,
        "total_pixels": 7864320,
        "fps": 1,
        "max_frames": 64,
    }  # fmt: skip - one line as the authors' own constructor has them
    large = Image.new("RGB", (1600, 900))

    def grid(**options):
        frames = options.pop("frames", None)
        model = VLM2Vec.from_pretrained(folders / "qwen3_vl_embedding", **options)
        (features,) = model.preprocess([{"video": [large] * frames} if frames else {"image": large}])
        return features.vision["grid_thw"].tolist()[0]

    assert grid() == [1, 56, 100] and grid(max_pixels=40960) == [1, 8, 16]
    assert grid(frames=2) == [1, 40, 74] and grid(frames=2, total_pixels=400_000) == [1, 28, 52]


@pytest.mark.parametrize("said", [{"max_pixels": 40960}, {"min_pixels": 500_000}])
def test_one_picture_has_limits_of_its_own(folders, said):
    for name in EMBEDDERS:
        model, whole = VLM2Vec.from_pretrained(folders / name), VLM2Vec.from_pretrained(folders / name, **said)
        part = [
            {"role": "user", "content": [{"type": "image", "image": PICTURE.resize((640, 320)), **said}, {"type": "image", "image": OTHER}]}
        ]
        one, other = model.preprocess([part])[0].vision["grid_thw"].tolist()
        assert [one] == whole.preprocess([PICTURE.resize((640, 320))])[0].vision["grid_thw"].tolist()
        assert [other] == model.preprocess([OTHER])[0].vision["grid_thw"].tolist()
        assert [one] != model.preprocess([PICTURE.resize((640, 320))])[0].vision["grid_thw"].tolist()


def test_settings_follow_their_pictures(embedder):
    """Pictures are put in the order that the text names; what was said of one goes with it."""
    item = as_item({"text": "<|image_2|><|image_1|>", "images": [PICTURE, OTHER]})
    swapped = as_item(replace(item, text="<|image_2|><|image_1|>", settings={"image": [{"max_pixels": 4096}, {}], "video": []}))
    assert swapped.images == [PICTURE, OTHER] and swapped.settings["image"] == [{}, {"max_pixels": 4096}]
    grids = embedder.preprocess([swapped])[0].vision["grid_thw"].tolist()
    assert grids == [[1, 4, 6], [1, 2, 4]]


# -- WeMM-Embedding ----------------------------------------------------------------------------------------------------


def message(*parts, system=None):
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part} for part in parts]
    return [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("x", "said"),
    [
        ("a fox\n\n", "user\na fox"),
        ("", "user"),
        ("a\n\nb\n\n\nc\nd", "user\na\nb\nc\nd"),
        (message("see ", PICTURE, " and ", OTHER, "!"), f"user\nsee {IMAGE} and {IMAGE}!"),
        (message(PICTURE, "what?"), f"user{IMAGE}what?"),
        ({"text": "what?", "image": PICTURE}, f"user{IMAGE}what?"),
        ({"text": "<|image_1|>\nwhat?\n", "image": PICTURE}, f"user{IMAGE}what?"),
        (message("a", system=" Find it "), "system\nFind it<|im_end|><|im_start|>user\na"),
        ({"text": "a", "image": PICTURE, "instruction": "Find it."}, f"user{IMAGE}Find it.\na"),
        ({"image": PICTURE, "instruction": "Represent this image."}, f"user{IMAGE}Represent this image."),
        ({"video": [PICTURE] * 2, "text": "a"}, f"user\n<0.2 seconds>{FILM}a"),
    ],
)
def test_parts_stand_in_the_callers_order(wemm, x, said):
    assert fed(wemm, x) == f"<|im_start|>{said}<|im_end|><embedding>"
    np.testing.assert_array_equal(wemm.encode([x]), wemm.encode_document([x]))


def test_the_published_normalizer_is_kept(folders, wemm, tmp_path):
    """Of newlines before a special token, one goes; transformers' own class for the family keeps it, from some release on."""
    from tokenizers import Tokenizer

    text, without = "<|im_start|>user\n<|im_end|>\n", "<|im_start|>user<|im_end|>"
    published = Tokenizer.from_file(str(folders / "wemm/tokenizer.json"))
    assert wemm.processing.tokenizer(text)["input_ids"] == published.encode(text).ids == published.encode(without).ids
    wemm.save_pretrained(tmp_path)
    again = VLM2Vec.from_pretrained(tmp_path)
    assert again.processing.tokenizer(text)["input_ids"] == wemm.processing.tokenizer(text)["input_ids"]


def test_pictures_are_resized_twice(folders, wemm):
    """By Qwen's tools, then by the folder's own processor, whose least area (8,192 pixels here) undoes a smaller bound."""
    from transformers import AutoImageProcessor

    part = [{"role": "user", "content": [{"type": "image", "image": PICTURE, "max_pixels": 4096}]}]
    assert wemm.preprocess([part])[0].vision["grid_thw"].tolist() == [[1, 4, 8]]
    first = PICTURE.resize((96, 64), Image.Resampling.BICUBIC)
    whole = AutoImageProcessor.from_pretrained(folders / "wemm", backend="torchvision")(images=[first], return_tensors="pt")
    ours = wemm.preprocess([PICTURE])[0].vision
    assert whole["image_grid_thw"].tolist() == ours["grid_thw"].tolist() != [[1, 4, 6]]
    assert torch.equal(ours["pixel_values"], whole["pixel_values"])


def test_films_that_are_large_in_all_are_resized_again(tmp_path):
    from torchvision.transforms import InterpolationMode, functional
    from transformers import AutoVideoProcessor

    EMBEDDERS["wemm"](tmp_path)
    content = json.loads((tmp_path / "processor_config.json").read_text())
    content["video_processor"]["size"]["longest_edge"] = 200_000
    (tmp_path / "processor_config.json").write_text(json.dumps(content))
    model = VLM2Vec.from_pretrained(tmp_path)
    ours = model.preprocess([{"video": [OTHER, OTHER.transpose(Image.Transpose.FLIP_TOP_BOTTOM)]}])[0].vision
    frames = [np.asarray(picture.resize((192, 128))) for picture in (OTHER, OTHER.transpose(Image.Transpose.FLIP_TOP_BOTTOM))]
    film = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
    film = functional.resize(film, [320, 448], interpolation=InterpolationMode.BICUBIC, antialias=True).float()
    whole = AutoVideoProcessor.from_pretrained(tmp_path)(
        videos=[film], do_sample_frames=False, cap_pixels_per_frame=False, return_tensors="pt"
    )
    assert ours["grid_thw"].tolist() == whole["video_grid_thw"].tolist() != [[1, 20, 28]]
    torch.testing.assert_close(ours["pixel_values"], whole["pixel_values_videos"], atol=1e-6, rtol=0)


def test_media_are_never_cut_and_texts_keep_embedding(folders):
    model = VLM2Vec.from_pretrained(folders / "wemm", max_length=20)
    with pytest.warns(UserWarning, match="cut to max_length=20"):
        assert fed(model, "x" * 100) == "<|im_start|>user\nxxxxxxxxxxxxx<embedding>"
    assert model.preprocess([{"text": "x" * 100, "image": PICTURE}])[0].length > 100


def test_widths_that_it_was_trained_for(wemm):
    assert wemm.encode("a", truncate_dim=WIDTHS[0]).shape == (WIDTHS[0],)
    with pytest.raises(ValueError, match="truncate_dim=9: expected one of 8, 16, 32"):
        wemm.encode("a", truncate_dim=9)


def test_a_tokenizer_without_its_last_token_is_refused(folders, tmp_path):
    EMBEDDERS["wemm"](tmp_path)
    edited(tmp_path / "tokenizer.json", post_processor=None)
    with pytest.raises(ValueError, match="expected a tokenizer that puts <embedding> behind every text"):
        VLM2Vec.from_pretrained(tmp_path)


# -- both --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EMBEDDERS)
def test_alone_as_in_a_batch_and_saved_as_loaded(folders, tmp_path, name):
    model = VLM2Vec.from_pretrained(folders / name, max_length=900, video_max_pixels=200_000)
    inputs = [
        "a",
        {"text": "b", "image": PICTURE},
        {"video": [PICTURE] * 3},
        {},
        {"text": "c", "images": [OTHER, PICTURE], "instruction": "d"},
    ]
    rows = model.encode(inputs)
    np.testing.assert_allclose(np.stack([model.encode(x) for x in inputs]), rows, atol=1e-6)
    model.save_pretrained(tmp_path)
    again = VLM2Vec.from_pretrained(tmp_path)
    assert again.options == model.options and again.options["feeding"] == "authors" and again.family == model.family
    np.testing.assert_allclose(again.encode(inputs), rows, atol=1e-6)
    wrapped = model.to_sentence_transformer()
    np.testing.assert_allclose(wrapped.encode(["a", PICTURE]), model.encode(["a", PICTURE]), atol=1e-6)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("name", EMBEDDERS)
def test_pictures_that_are_measured_decode_to_the_same(folders, tmp_path, name):
    """Training reads headers first and decodes chunk by chunk."""
    for at, picture in enumerate((PICTURE, OTHER, PICTURE)):
        picture.save(tmp_path / f"{at}.png")
    paths = [str(tmp_path / f"{at}.png") for at in range(3)]
    processing = VLM2Vec.from_pretrained(folders / name).processing
    for x in (
        {"text": "a", "image": paths[0]},
        {"images": paths[:2]},
        {"video": [paths[0]] * 3, "image": paths[1]},
        {"video": [PICTURE, paths[0]]},
        {"image": paths[0], "max_pixels": 4096},
    ):
        whole, measured = processing(x), processing.measure(x)
        assert torch.equal(whole.input_ids, measured.input_ids)
        if not measured.pending:
            assert {"video", "max_pixels"} & set(x) and torch.equal(measured.vision["pixel_values"], whole.vision["pixel_values"])
            continue
        decoded = processing.decode(measured)["pixel_values"]
        assert tuple(decoded.shape) == processing.decoded_shape(measured)
        assert torch.equal(processing.normalised(decoded, measured.vision), whole.vision["pixel_values"])
        assert torch.equal(measured.vision["grid_thw"], whole.vision["grid_thw"])


@pytest.mark.parametrize("name", EMBEDDERS)
def test_an_error_names_the_row(folders, tmp_path, name):
    model = VLM2Vec.from_pretrained(folders / name)
    two_sizes = {"video": [PICTURE, PICTURE.resize((200, 300))]}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for bad, said in (
        ({"image": tmp_path / "gone.png"}, "no such file"),
        (two_sizes, r"frames of one film: expected one size, got \(90, 70\) first and \(200, 300\) at 1"),
        (turns, "expected one message of a user beside the system's, got 2"),
        ({"image": PICTURE, "max_pixels": -1}, "max_pixels='-1' of an image: expected a number above 0"),
        ({"video": [PICTURE], "video_start": 1}, "unknown keys"),
        (
            [{"role": "user", "content": [{"type": "video", "video": [PICTURE], "video_start": 1}]}],
            "video_start=1 of a video: expected one of",
        ),
        ({"image": Image.new("RGB", (5000, 20))}, "aspect ratios up to 200"),
    ):
        with pytest.raises(ValueError, match=rf"^input 1: .*{said}"):
            model.encode(["a", bad])


def test_raw_feeding_takes_no_settings_of_one_picture(folders):
    model = VLM2Vec.from_pretrained(folders / "qwen3_vl_embedding", feeding="raw")
    assert fed(model, {"text": "a", "image": PICTURE}) == "<|image_pad|>\na<|endoftext|>"
    with pytest.raises(ValueError, match=r"^input 0: max_pixels of one picture or film: expected an option of the model"):
        model.encode([{"image": PICTURE, "max_pixels": 4096}])


def test_the_stored_picture_and_the_turned_one(folders, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    OTHER.save(tmp_path / "a.jpg", exif=turned)
    for options, grid in (({}, [1, 8, 4]), ({"orientation": "stored"}, [1, 4, 8])):
        model = VLM2Vec.from_pretrained(folders / "qwen3_vl_embedding", **options)
        assert model.preprocess([{"image": tmp_path / "a.jpg"}])[0].vision["grid_thw"].tolist() == [grid]
