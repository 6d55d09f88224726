"""Texts as people and scrapers write them: broken characters, odd line ends, markers in captions, numbered pictures, whole books."""

import json
import re
import warnings

import numpy as np
import pytest
from PIL import Image

from tests.helpers.tiny_generic import BUILDERS as GENERIC
from tests.helpers.tiny_models import BUILDERS
from train.data.rows import content_id
from vlm2vec.backbones.literals import LiteralTokenizer, WithLiterals
from vlm2vec.commands.common import read_jsonl
from vlm2vec.data.json_lines import read_json_lines, read_json_rows
from vlm2vec.evaluation.runner import Options, run_tasks
from vlm2vec.evaluation.tasks import find_tasks
from vlm2vec.inputs import as_item, whole_characters
from vlm2vec.model import VLM2Vec

HALF, WHOLE = "\ud83e", "\U0001f98a"


def picture(width=60, height=40, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("texts")
    loaded = {}

    def get(name, **options):
        if not (place / name).is_dir():
            (place / name).mkdir()
            {**BUILDERS, **GENERIC}[name](place / name)
        key = (name, json.dumps(options))
        if key not in loaded:
            loaded[key] = VLM2Vec.from_pretrained(place / name, **options)
        return loaded[key]

    return get


# -- halves of surrogate pairs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        (f"a {HALF} b", "a � b"),
        (f"{HALF}{HALF}", "��"),
        ("\udd8a", "�"),
        ("\ud83e\udd8a", WHOLE),  # two halves that belong together
        ("", ""),
        ("a fox", "a fox"),
    ],
)
def test_texts_that_utf8_cannot_hold(models, text, whole):
    assert whole_characters(text) == whole
    model = models("qwen2_vl")
    if text:
        np.testing.assert_array_equal(model.encode(text), model.encode(whole))
        np.testing.assert_array_equal(model.encode("x", prompt=text), model.encode("x", prompt=whole))
        np.testing.assert_array_equal(model.encode({"text": "x", "instruction": text}), model.encode({"text": "x", "instruction": whole}))
        assert content_id({"text": text}) == content_id({"text": whole})


def test_an_evaluation_outlives_half_a_character(models, tmp_path):
    folder = tmp_path / "data" / "Own"
    folder.mkdir(parents=True)
    rows = [{"qry_text": f"fox {HALF}", "qry_img_path": "", "tgt_text": [f"fox {HALF}", "an owl"], "tgt_img_path": ["", ""]}]
    (folder / "test-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tasks = find_tasks(tmp_path / "data", None, {})
    (row,) = run_tasks(models("qwen2_vl"), tasks, tmp_path / "data", tmp_path, tmp_path / "scores", options=Options(progress=False))
    assert row["score"] == 1.0
    assert "fox �" in (tmp_path / "scores" / "Own_top.jsonl").read_text(encoding="utf-8")


# -- lines of JSON -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\u0085", "\u001c", "\v", "\f", "\r"])
def test_lines_end_at_line_feeds_alone(tmp_path, inside):
    file = tmp_path / "rows.jsonl"
    text = f"one{inside}line"
    raw = json.dumps({"text": text}, ensure_ascii=inside < " ")  # JSON wants characters below a blank escaped
    file.write_bytes(f"{raw}\r\n\n{raw}".encode())
    assert read_jsonl(str(file)) == (["0", "2"], [{"text": text}] * 2)
    assert read_json_rows(file) == {"text": [text, text]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "a"}\n{"text":\n', "rows.jsonl, line 2: not JSON"),
        (b'{"text": "a"}\nnull\n', "rows.jsonl, line 2: expected an object"),
        (b'["a"]\n', "rows.jsonl, line 1: expected an object"),
        (b'\n\n"\xff"\n', "rows.jsonl is not UTF-8 text"),
        (b"[" * 100_000, "rows.jsonl, line 1: nested too deep to be read"),
    ],
)
def test_lines_that_are_no_rows_are_named(tmp_path, content, said):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    for read in (read_json_rows, lambda path: read_jsonl(str(path))):
        with pytest.raises(ValueError, match=re.escape(said)) as caught:
            read(file)
        assert len(str(caught.value)) < 500


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n', encoding="utf-8-sig")
    assert read_json_lines(tmp_path / "rows.jsonl") == [(1, {"text": "a"})]


def test_rows_of_an_evaluation_may_lack_columns(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"b": "x"}\n')
    assert read_json_rows(tmp_path / "rows.jsonl") == {"a": [1, None], "b": [None, "x"]}


# -- markers in captions -----------------------------------------------------------------------------------------------

NATIVE = {name: "<|image_pad|>" for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")} | {"llava_next": "<image>"}


@pytest.mark.parametrize("name", NATIVE)
def test_a_caption_may_speak_of_a_models_own_token(models, name):
    """Its characters are fed, beside a picture and without one; the picture stays where it belongs."""
    model, own = models(name), NATIVE[name]
    processing = model.processing
    alone, beside, plain = model.preprocess(
        [f"the {own} tag", {"text": f"the {own} tag", "image": picture()}, {"text": "the tag", "image": picture()}]
    )
    token = processing.image_token_id
    assert token not in alone.input_ids and alone.visual_index is None
    assert processing.tokenizer.decode(alone.input_ids, skip_special_tokens=True).strip() == f"the {own} tag"
    assert beside.visual_index.tolist() == plain.visual_index.tolist(), "the picture comes first, as beside any text"
    assert (beside.input_ids == token).sum() == len(beside.visual_index)
    assert np.isfinite(model.encode([f"the {own} tag", {"text": f"the {own} tag", "image": picture()}])).all()


@pytest.mark.parametrize("name", NATIVE)
def test_a_text_that_begins_with_the_models_own_token_says_where_the_picture_stands(models, name):
    model, own = models(name), NATIVE[name]
    same = [{"text": f"{marker}\nwhat is <b>this</b>?", "image": picture()} for marker in (own, "<|image_1|>")]
    ours, mmebs = model.preprocess(same)
    assert ours.input_ids.tolist() == mmebs.input_ids.tolist() and ours.visual_index.tolist() == mmebs.visual_index.tolist()
    assert as_item({"text": f"{own} {own}", "image": picture()}, model.processing.markers).text == f"<|image_1|>\n{own} {own}"


def test_a_chat_template_beside_literals(models):
    model = models("qwen3_vl", chat_template=True)
    features = model.preprocess([{"text": "see <|image_pad|> and <|video_pad|>", "image": picture(64, 64)}])[0]
    decoded = model.processing.tokenizer.decode(features.input_ids)
    pads = "<|image_pad|>" * len(features.visual_index)
    assert f"<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>see <|image_pad|> and <|video_pad|><|im_end|>" in decoded
    assert (features.input_ids == model.processing.image_token_id).sum() == len(features.visual_index)
    assert (features.input_ids == model.processing.tokenizer.convert_tokens_to_ids("<|im_end|>")).sum() == 2


@pytest.mark.parametrize("name", ["qwen2_vl", "llava_next"])
@pytest.mark.parametrize("text", ["a fox", " two  blanks ", "<|im_start|>user\nhi<|im_end|>", "", "\n<s> x </s>"])
def test_a_text_with_no_literal_has_the_same_ids_by_either_way(models, name, text):
    tokenizer = models(name).processing.tokenizer
    assert LiteralTokenizer(tokenizer).tokenize(WithLiterals(text)) == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("name", [name for name in GENERIC][:2])
def test_a_family_that_cannot_tell_them_apart_refuses_by_name(models, name):
    model = models(name)
    own = model.processing.image_marker
    assert np.isfinite(model.encode(f"the {own} tag")).all()
    with pytest.raises(ValueError, match=f"input 0: .*{re.escape(own)}.*take it out"):
        model.encode([{"text": f"the {own} tag", "image": picture()}])


def test_other_models_tokens_are_text(models):
    model = models("qwen2_vl")
    features = model.preprocess([{"text": "the [IMG] and <|image|> tags", "image": picture()}])[0]
    assert features.visual_index.tolist() == list(range(len(features.visual_index)))


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "images", "said", "order"),
    [
        ("<|image_1|> or <|image_2|>", "ab", "<|image_1|> or <|image_2|>", "ab"),
        ("<|image_2|> or <|image_1|>", "ab", "<|image_1|> or <|image_2|>", "ba"),
        ("<|image_3|><|image_1|><|image_2|>", "abc", "<|image_1|><|image_2|><|image_3|>", "cab"),
        ("<|image_1|> or <|image_1|>", "ab", "<|image_1|> or <|image_1|>", "ab"),  # MMEB names every picture 1
    ],
)
def test_pictures_stand_where_their_numbers_say(text, images, said, order):
    for given in ({"text": text, "images": list(images)}, as_item({"text": text, "images": list(images)})):
        item = as_item(given)
        assert (item.text, "".join(item.images)) == (said, order)


@pytest.mark.parametrize("name", list(BUILDERS))
def test_numbers_reach_the_model(models, name):
    model = models(name)
    one, other = picture(seed=1), picture(seed=2)
    turned = {"text": "<|image_2|> then <|image_1|>", "images": [one, other]}
    plain = {"text": "<|image_1|> then <|image_2|>", "images": [other, one]}
    np.testing.assert_array_equal(model.encode(turned), model.encode(plain))
    assert np.abs(model.encode(turned) - model.encode({**plain, "images": [one, other]})).max() > 1e-3


@pytest.mark.parametrize(
    ("text", "images", "said"),
    [
        ("<|image_2|>", 1, "names images 2; number the 1 given from 1, each once"),
        ("<|image_0|>", 1, "names images 0; number"),
        ("<|image_1|><|image_3|>", 2, "names images 1, 3; number the 2 given"),
        ("<|image_2|><|image_2|>", 2, "names images 2, 2; number the 2 given"),
        ("<|image_1|>", 2, "1 image markers and 2 images"),
        ("<|image_1|><|image_2|>", 1, "2 image markers and 1 images"),
    ],
)
def test_numbers_that_name_no_picture_are_refused(models, text, images, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        models("qwen2_vl").encode([{"text": text, "images": [picture()] * images}])


def test_films_and_pictures_are_numbered_apart():
    item = as_item({"text": "<|video_1|><|image_2|><|image_1|>", "images": ["a", "b"], "video": "v"})
    assert (item.text, item.images, item.videos) == ("<|video_1|><|image_1|><|image_2|>", ["b", "a"], ["v"])


# -- length ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kept", "named"), [({}, 4096, "the model's 4096 positions"), ({"max_length": 12}, 12, "max_length=12 tokens")]
)
def test_longer_texts_are_cut_with_a_count(models, options, kept, named):
    processing = type(models("qwen2_vl").processing)(
        models("qwen2_vl").processing.tokenizer, models("qwen2_vl").processing.image_processor, models("qwen2_vl").config, options
    )
    with pytest.warns(UserWarning, match=f"1 text so far cut to {named}"):
        assert processing("x" * 5000).length == kept
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert processing("x" * kept).length == kept
        processing("x" * 5000)  # the second of many
    assert processing.truncated == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "input 0: 5000 tokens are more than the model's 4096 positions; shorten the text, or say truncation=True"),
        ({"max_length": 12}, "input 0: 5000 tokens are more than max_length=12; shorten the text, or say truncation=True"),
        ({"max_length": 9999}, "input 0: 5000 tokens are more than the model's 4096 positions"),
    ],
)
def test_longer_texts_are_refused_as_asked(models, options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        models("qwen2_vl", truncation=False, **options).encode(["x" * 5000])


def test_pictures_beyond_the_positions_are_refused(models):
    with pytest.raises(ValueError, match="the model's 4096 positions: below the .* image tokens of the input.*lower max_pixels"):
        models("qwen2_vl", max_pixels=5000 * 784, min_pixels=4500 * 784).encode([picture(2000, 2000)])
