"""Small random models of families that have no file of their own: the generic path."""

from tests.helpers.tiny_models import TEXT, VOCABULARY, spread, token, tokenizer

VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)


def smolvlm(folder):
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    config = SmolVLMConfig(
        text_config={**TEXT, "model_type": "llama", "vocab_size": VOCABULARY},
        vision_config={**VISION, "model_type": "smolvlm_vision"},
        image_token_id=token("<image>"),
        scale_factor=2,
        pad_token_id=token("<pad>"),
    )
    spread(SmolVLMForConditionalGeneration(config)).save_pretrained(folder)
    size = {"longest_edge": 64}
    images = SmolVLMImageProcessor(size=size, max_image_size={"longest_edge": 32}, do_image_splitting=True)
    videos = SmolVLMVideoProcessor(
        size=size, max_image_size={"longest_edge": 32}, video_sampling={"fps": 1, "max_frames": 4, "video_size": {"longest_edge": 32}}
    )
    SmolVLMProcessor(images, tokenizer(), videos, image_seq_len=4).save_pretrained(folder)


def gemma3(folder):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3ImageProcessor, Gemma3Processor

    config = Gemma3Config(
        text_config={
            **TEXT,
            "vocab_size": VOCABULARY,
            "head_dim": 8,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_id=token("<image_soft_token>"),
        boi_token_id=token("<start_of_image>"),
        eoi_token_id=token("<end_of_image>"),
    )
    spread(Gemma3ForConditionalGeneration(config)).save_pretrained(folder)
    words = tokenizer(bos=True, image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    Gemma3Processor(Gemma3ImageProcessor(size={"height": 32, "width": 32}), words, image_seq_length=4).save_pretrained(folder)


BUILDERS = {"smolvlm": smolvlm, "gemma3": gemma3}
