"""Small random models of every family, written as the folders that `VLM2Vec.from_pretrained` reads.

One byte-level tokenizer serves all: 256 bytes and the families' special tokens. Weights are spread widely, so that attention,
norms and positions all matter to the embedding. Each builder takes the folder.
"""

import torch

SPECIAL = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<image>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<global-img>",
    "<start_of_image>",
    "<end_of_image>",
    "<image_soft_token>",
    *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)),
]
TEXT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
CLIP = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14)


def tokenizer(bos: bool = False, **named):
    """Bytes and special tokens; `bos` puts <s> in front, as Llama's tokenizers do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(SPECIAL + letters)}, merges=[]))
    inner.add_special_tokens(SPECIAL)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))])
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", **named}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=100_000, **names)


VOCABULARY = len(SPECIAL) + 256


def token(name: str) -> int:
    return SPECIAL.index(name)


def spread(model, seed: int = 7, scale: float = 0.5):
    """Random weights of a size at which every layer changes the output; norms around 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.dim() == 1 and name.endswith("weight"):
                p.copy_(1 + 0.1 * noise)
            else:
                p.copy_(noise * (scale / p.shape[-1] ** 0.5 if p.dim() > 1 else 0.1))
    return model.float().eval()


def qwen2_vl(folder):
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig(
        text_config={
            **TEXT,
            "vocab_size": VOCABULARY,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        vision_config=dict(depth=2, embed_dim=32, hidden_size=32, num_heads=2, mlp_ratio=2),
        **qwen_ids(),
    )
    spread(Qwen2VLForConditionalGeneration(config)).save_pretrained(folder)
    qwen_processor(folder)


def qwen2_5_vl(folder):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            **TEXT,
            "vocab_size": VOCABULARY,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        # a window of 56 pixels: images above it have several windows, and block 1 sees them whole
        vision_config=dict(
            depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32, window_size=56, fullatt_block_indexes=[1]
        ),
        **qwen_ids(),
    )
    spread(Qwen2_5_VLForConditionalGeneration(config)).save_pretrained(folder)
    qwen_processor(folder)


def qwen3_vl(folder):
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = Qwen3VLConfig(
        text_config={
            **TEXT,
            "vocab_size": VOCABULARY,
            "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "mrope_interleaved": True},
        },
        vision_config=dict(
            depth=3,
            hidden_size=32,
            intermediate_size=48,
            num_heads=2,
            out_hidden_size=32,
            num_position_embeddings=16,
            deepstack_visual_indexes=[0, 1],
        ),
        **qwen_ids(),
    )
    spread(Qwen3VLForConditionalGeneration(config)).save_pretrained(folder)
    qwen_processor(folder, patch_size=16)


def qwen3_5(folder):
    """Three of four layers carry a state from token to token; two value heads share a key head, half of a head is rotated."""
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    config = Qwen3_5Config(
        text_config={
            **TEXT,
            "vocab_size": VOCABULARY,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_conv_kernel_dim": 4,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
                "partial_rotary_factor": 0.5,
            },
        },
        vision_config=dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32, num_position_embeddings=16),
        **qwen_ids(),
    )
    # Smaller weights: its recurrent state amplifies float32's rounding, 1.5e-6 from float64 at the others' size.
    model = spread(Qwen3_5ForConditionalGeneration(config), scale=0.25)
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__ == "Qwen3_5RMSNorm":
                module.weight -= 1  # an offset from 1
    model.save_pretrained(folder)
    qwen_processor(folder, patch_size=16)


def qwen_ids() -> dict:
    return dict(
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def qwen_processor(folder, patch_size: int = 14):
    from transformers import Qwen2VLImageProcessor

    tokenizer(eos_token="<|im_end|>", pad_token="<|endoftext|>").save_pretrained(folder)
    limits = {"shortest_edge": 4 * (2 * patch_size) ** 2, "longest_edge": 1280 * (2 * patch_size) ** 2}
    Qwen2VLImageProcessor(size=limits, patch_size=patch_size).save_pretrained(folder)


def llava_next(folder):
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextImageProcessor, LlavaNextProcessor

    grids = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    config = LlavaNextConfig(
        text_config={**TEXT, "model_type": "mistral", "vocab_size": VOCABULARY, "sliding_window": None},
        vision_config={**CLIP, "model_type": "clip_vision_model"},
        image_token_index=token("<image>"),
        image_grid_pinpoints=grids,
        image_seq_length=4,
    )
    spread(LlavaNextForConditionalGeneration(config)).save_pretrained(folder)
    images = LlavaNextImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=grids)
    LlavaNextProcessor(
        images, tokenizer(bos=True), patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(folder)


def phi3_v(folder):
    from vlm2vec.backbones.phi3_v.config import Phi3VConfig
    from vlm2vec.backbones.phi3_v.model import Phi3VForCausalLM

    # The original context of 64 tokens lies inside the lengths that tests use: both sets of rope factors are in play.
    config = Phi3VConfig(
        **{**TEXT, "vocab_size": VOCABULARY, "vision_config": CLIP, "original_max_position_embeddings": 64},
        rope_scaling={"type": "su", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 4.0, 8.0]},
    )
    spread(Phi3VForCausalLM(config)).save_pretrained(folder)
    tokenizer(bos=True).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Phi3VImageProcessor", "num_crops": 4}')


# model_type of config.json -> builder
BUILDERS = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_5": qwen3_5,
    "llava_next": llava_next,
    "phi3_v": phi3_v,
}
