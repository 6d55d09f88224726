"""Sounds: read to 16 kHz mono, and heard by a model that transformers has (Qwen2.5-Omni's thinker, tiny) through the generic path."""

import io
import wave

import numpy as np
import pytest
import torch
from transformers.models.auto import modeling_auto

from tests.helpers.tiny_generic import smolvlm
from tests.helpers.tiny_omni import qwen2_5_omni_thinker
from vlm2vec.media.sounds import RATE, Sound, read_sound, read_wave
from vlm2vec.model import VLM2Vec


def tone(seconds=0.5, cycles=200.0):
    return (0.5 * np.sin(2 * np.pi * cycles * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def wav(samples, width=2, channels=1, rate=RATE):
    """Bytes of a WAV file of whole numbers."""
    whole = np.round(np.asarray(samples, dtype=np.float64) * (2 ** (8 * width - 1) - 1)).astype(np.int64)
    raw = (whole + 128).astype(np.uint8).tobytes() if width == 1 else b"".join(int(v).to_bytes(width, "little", signed=True) for v in whole)
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(width)
        out.setframerate(rate)
        out.writeframes(raw)
    return file.getvalue()


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_waves_of_every_width(width):
    samples = tone(0.05)
    found, rate = read_wave(wav(samples, width))
    assert rate == RATE and found.dtype == np.float32
    np.testing.assert_allclose(found, samples, atol=2.0 ** (1 - 8 * width) * 1.5 + 1e-7)


def test_two_channels_are_mixed_and_parts_cut(tmp_path):
    left, right = tone(1.0), np.full(RATE, 0.25, dtype=np.float32)
    content = wav(np.stack([left, right], axis=1).ravel(), channels=2)
    path = tmp_path / "a.wav"
    path.write_bytes(content)
    whole = read_sound(path)
    np.testing.assert_allclose(whole, (left + right) / 2, atol=1e-4)
    part = read_sound(Sound(str(path), 0.25, 0.5))
    np.testing.assert_array_equal(part, whole[RATE // 4 : RATE // 2])
    np.testing.assert_array_equal(read_sound(content, max_seconds=0.1), whole[: RATE // 10])
    np.testing.assert_array_equal(read_sound(Sound(str(path), 0.5), max_seconds=0.1), whole[RATE // 2 : RATE // 2 + RATE // 10])
    for same in (str(path), content, {"bytes": content, "path": None}, {"bytes": None, "path": str(path)}):
        np.testing.assert_array_equal(read_sound(same), whole)
    np.testing.assert_array_equal(read_sound({"array": list(left), "sampling_rate": RATE}), left)


def test_other_rates_are_resampled():
    pytest.importorskip("av")
    samples = np.sin(2 * np.pi * 200 * np.arange(44_100) / 44_100)
    found = read_sound(wav(samples, rate=44_100))
    assert abs(len(found) - RATE) <= 32
    clean = slice(200, RATE - 400)
    np.testing.assert_allclose(found[clean], np.sin(2 * np.pi * 200 * np.arange(len(found)) / RATE)[clean], atol=0.02)


@pytest.mark.parametrize(
    "source, told",
    [
        ("gone.wav", "gone.wav: No such file"),
        (b"no sound at all", "does not decode|need PyAV"),
        (np.zeros((2, 2), dtype=np.float32), r"a waveform is \(n,\) floats of 16000 Hz"),
        (np.zeros(0, dtype=np.float32), "no samples"),
        (7, "expected a path, bytes, a waveform"),
        (Sound(np.zeros(100, dtype=np.float32), 1.0, 2.0), "no samples in it, or in the part from 1 s"),
    ],
)
def test_what_is_no_sound_is_told(source, told):
    with pytest.raises(ValueError, match=told):
        read_sound(source)


def test_a_release_that_has_the_model_with_its_head_alone_is_told(tmp_path, monkeypatch):
    smolvlm(tmp_path)
    monkeypatch.setattr(modeling_auto, "MODEL_MAPPING", {})
    with pytest.raises(ValueError, match="expected a transformers that has 'smolvlm' without its head, got .*; install a newer one"):
        VLM2Vec.from_pretrained(tmp_path, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("omni")
    qwen2_5_omni_thinker(place)
    return place


@pytest.fixture(scope="module")
def model(folder):
    return VLM2Vec.from_pretrained(folder, device="cpu")


def test_a_sound_is_heard(model):
    assert model.modalities == ("text", "image", "video", "audio")
    inputs = [{"text": "a bell", "audio": tone(cycles=c)} for c in (200, 210)] + [{"text": "a bell"}, {"audio": tone()}]
    vectors = torch.tensor(model.encode(inputs))
    similar = vectors @ vectors.T
    assert similar.fill_diagonal_(0).max() < 0.9999, "no two of the inputs are alike to the model"


def test_vectors_do_not_depend_on_the_batch(model):
    """Sounds of several lengths, several to an input, beside texts and pictures of other lengths."""
    from PIL import Image

    picture = Image.new("RGB", (56, 84), (200, 30, 30))
    inputs = [
        {"text": "a bell", "audio": tone(0.3)},
        "no sound, and a longer text than the others have",
        {"text": "two", "audio": [tone(0.2), tone(0.7, 100)]},
        {"text": "seen and heard", "audio": tone(0.9), "image": picture},
        {"audio": tone(0.5)},
    ]
    together = model.encode(inputs)
    for one, alone in zip(inputs, together):
        np.testing.assert_allclose(model.encode([one])[0], alone, atol=2e-6)


def test_vectors_are_transformers_own(model, folder):
    """The processor's words and the library's forward pass, by hand."""
    from transformers import AutoProcessor, Qwen2_5OmniThinkerForConditionalGeneration

    whole = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(text=["<|audio_bos|><|AUDIO|><|audio_eos|>\na bell"], audio=[tone()], return_tensors="pt")
    with torch.no_grad():
        hidden = whole.model(**inputs).last_hidden_state[0, -1]
    ours = torch.tensor(model.encode([{"text": "a bell", "audio": tone()}]))[0]
    torch.testing.assert_close(ours, torch.nn.functional.normalize(hidden, dim=0), atol=2e-6, rtol=0)


def test_sounds_are_cut_at_the_head(folder):
    short = VLM2Vec.from_pretrained(folder, device="cpu", audio_max_seconds=0.25)
    long, head = tone(0.9), tone(0.9)[: RATE // 4]
    np.testing.assert_array_equal(short.encode([{"audio": long}]), short.encode([{"audio": head}]))


def test_a_mask_of_frames_is_no_row_of_tokens(model):
    """A text of as many tokens as the sound's mask has frames (100): the mask goes whole to the encoder."""
    letters = 101 - model.preprocess([{"text": "a", "audio": tone()}])[0].length
    features = model.preprocess([{"text": "a" * letters, "audio": tone()}])[0]
    assert features.length == 100 and features.vision["feature_attention_mask"].shape == (1, 100)
    inputs = [{"text": "a" * letters, "audio": tone()}, {"text": "b", "audio": tone()}]
    np.testing.assert_allclose(model.encode(inputs)[0], model.encode(inputs[:1])[0], atol=2e-6)


def test_what_cannot_be_heard_is_refused(model, tmp_path):
    from tests.helpers.tiny_models import qwen2_vl

    with pytest.raises(ValueError, match="holds '<|AUDIO|>', which Qwen2_5OmniProcessor takes for the place of one"):
        model.encode([{"text": "say <|AUDIO|>", "audio": tone()}])
    qwen2_vl(tmp_path)
    deaf = VLM2Vec.from_pretrained(tmp_path, device="cpu")
    assert deaf.modalities == ("text", "image", "video")
    with pytest.raises(ValueError, match="input 0: Qwen2VLProcessing takes no audio"):
        deaf.encode([{"text": "a", "audio": tone()}])
