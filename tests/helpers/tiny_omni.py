"""A tiny random model that hears: Qwen2.5-Omni's thinker, which the generic path loads through transformers."""

from tests.helpers.tiny_models import SPECIAL, TEXT, VOCABULARY, spread
from tests.helpers.versions import require_bare_thinker

AUDIO = ("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")


def qwen2_5_omni_thinker(folder):
    """A folder that `VLM2Vec.from_pretrained` reads; sounds are padded to one second's frames."""
    require_bare_thinker()
    from transformers import (
        Qwen2_5OmniProcessor,
        Qwen2_5OmniThinkerConfig,
        Qwen2_5OmniThinkerForConditionalGeneration,
        Qwen2VLImageProcessor,
        WhisperFeatureExtractor,
    )
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    words = tokenizer_with_sounds()
    ids = {name: words.convert_tokens_to_ids(name) for name in (*AUDIO, *SPECIAL)}
    config = Qwen2_5OmniThinkerConfig(
        text_config={
            **TEXT,
            "vocab_size": VOCABULARY + len(AUDIO),
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        vision_config=dict(
            depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32, window_size=56, fullatt_block_indexes=[1]
        ),
        audio_config=dict(
            num_mel_bins=16,
            encoder_layers=2,
            encoder_attention_heads=2,
            encoder_ffn_dim=48,
            d_model=32,
            max_source_positions=100,
            n_window=25,
            output_dim=32,
        ),
        audio_token_index=ids["<|AUDIO|>"],
        audio_start_token_id=ids["<|audio_bos|>"],
        audio_end_token_id=ids["<|audio_eos|>"],
        image_token_index=ids["<|image_pad|>"],
        video_token_index=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    spread(Qwen2_5OmniThinkerForConditionalGeneration(config)).save_pretrained(folder)
    limits = {"shortest_edge": 4 * 28**2, "longest_edge": 1280 * 28**2}
    Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(size=limits),
        video_processor=Qwen2VLVideoProcessor(),
        feature_extractor=WhisperFeatureExtractor(feature_size=16, chunk_length=1, sampling_rate=16_000),
        tokenizer=words,
    ).save_pretrained(folder)


def tokenizer_with_sounds():
    """The shared tokenizer and the tokens around a sound, behind its bytes."""
    from tests.helpers.tiny_models import tokenizer

    named = {
        "image_token": "<|image_pad|>",
        "audio_token": AUDIO[0],
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
        "audio_bos_token": AUDIO[1],
        "audio_eos_token": AUDIO[2],
    }
    words = tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=named)
    words.add_tokens(list(AUDIO), special_tokens=True)
    return words
