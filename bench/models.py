"""What encode, eval, step, plan and gpu measure: random Qwen2-VL and Qwen3.5 models of two sizes, and a fixed mix of text and images.

Layers are in the proportion of Qwen2-VL-7B, whose vision tower is a tenth of its language model, so that the share of padding,
head and tower in the time is what a user of such a model sees. The vocabulary is byte-level: a word is several tokens.
"""

import random

import torch

SIZES = {
    # name: (text width, layers, heads, key heads, intermediate, vocabulary), (vision width, layers, heads)
    "tiny": ((128, 3, 4, 2, 384, 2048), (64, 2, 2)),
    "100m": ((768, 10, 12, 4, 2304, 32768), (320, 8, 5)),
}
# Qwen3.5: three of four layers are a gated delta net of as many heads of half the width of a query's, as in Qwen3.5-2B.
HYBRIDS = {
    # name: (text width, layers, heads, key heads, head width, intermediate, vocabulary), (delta heads, their width), (vision ...)
    "hybrid-tiny": ((128, 4, 2, 1, 64, 384, 2048), (4, 32), (64, 2, 2)),
    "hybrid-100m": ((768, 8, 3, 1, 256, 2304, 32768), (6, 128), (320, 8, 5)),
}
# width x height of the images: 32 to 324 image tokens
IMAGES = [(112, 224), (224, 224), (336, 224), (224, 448), (448, 336), (308, 196), (504, 504), (280, 420), (196, 140), (392, 280)]
SAMPLES = {"tiny": 160, "100m": 32, "hybrid-tiny": 160, "hybrid-100m": 32}
MARKER = "<|image_pad|>"
BATCH = 16  # rows of a padded batch


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", MARKER, "<|video_pad|>"]
IDS = {
    "image_token_id": SPECIAL.index(MARKER),
    "video_token_id": SPECIAL.index("<|video_pad|>"),
    "vision_start_token_id": SPECIAL.index("<|vision_start|>"),
    "vision_end_token_id": SPECIAL.index("<|vision_end|>"),
}


def tokenizer():
    """Bytes and Qwen's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(SPECIAL + letters)}, merges=[]))
    words.add_special_tokens(SPECIAL)
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left")


def build(size: str):
    """(a model for conditional generation, tokenizer, image processor), random weights from a fixed seed."""
    return build_hybrid(size) if size in HYBRIDS else build_dense(size)


def build_dense(size: str):
    """Qwen2-VL."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor

    (width, layers, heads, key_heads, inner, vocabulary), (v_width, v_layers, v_heads) = SIZES[size]
    half = width // heads // 2
    config = Qwen2VLConfig(
        text_config=dict(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            bos_token_id=None,
            eos_token_id=SPECIAL.index("<|im_end|>"),
            pad_token_id=0,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]},
        ),
        vision_config=dict(depth=v_layers, embed_dim=v_width, hidden_size=width, num_heads=v_heads, mlp_ratio=4),
        **IDS,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config).eval()
    return model, tokenizer(), Qwen2VLImageProcessor(size={"shortest_edge": 3136, "longest_edge": 1003520})


def build_hybrid(size: str):
    """Qwen3.5."""
    from transformers import Qwen2VLImageProcessor, Qwen3_5Config, Qwen3_5ForConditionalGeneration

    (width, layers, heads, key_heads, head_width, inner, vocabulary), (delta_heads, delta_width), (v_width, v_layers, v_heads) = HYBRIDS[
        size
    ]
    turned = head_width // 8  # frequencies of the quarter of a head that is rotated
    config = Qwen3_5Config(
        text_config=dict(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            head_dim=head_width,
            linear_num_key_heads=delta_heads,
            linear_num_value_heads=delta_heads,
            linear_key_head_dim=delta_width,
            linear_value_head_dim=delta_width,
            eos_token_id=SPECIAL.index("<|im_end|>"),
            pad_token_id=0,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 1e7,
                "mrope_section": [turned - 2 * (turned // 3), turned // 3, turned // 3],
                "mrope_interleaved": True,
                "partial_rotary_factor": 0.25,
            },
        ),
        vision_config=dict(depth=v_layers, hidden_size=v_width, intermediate_size=4 * v_width, num_heads=v_heads, out_hidden_size=width),
        **IDS,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = Qwen3_5ForConditionalGeneration(config).eval()
    return model, tokenizer(), Qwen2VLImageProcessor(size={"shortest_edge": 65536, "longest_edge": 16777216}, patch_size=16)


def write(size: str, folder: str) -> None:
    """Save the model as a folder that transformers, sentence-transformers and VLM2Vec load."""
    from transformers import Qwen2VLProcessor, Qwen2VLVideoProcessor

    model, words, images = build(size)
    # sentence-transformers takes text beside an image only through a template; this one adds nothing but a newline
    template = (
        "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}"
        + MARKER
        + "\n{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    )
    model.save_pretrained(folder)
    Qwen2VLProcessor(images, words, Qwen2VLVideoProcessor(), chat_template=template).save_pretrained(folder)


def inputs(size: str, count: int | None = None) -> list:
    """30 % text of 10 to 60 tokens, 50 % one image, 20 % image and text, in random but fixed order; `count` of them, else `SAMPLES`."""
    import numpy as np
    from PIL import Image

    rng = random.Random(0)
    count = count or SAMPLES[size]
    kinds = ["text"] * round(0.3 * count) + ["image"] * round(0.5 * count)
    kinds += ["both"] * (count - len(kinds))
    rng.shuffle(kinds)
    made = []
    for i, kind in enumerate(kinds):
        text = "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(10, 60)))
        if kind == "text":
            made.append(text)
            continue
        width, height = IMAGES[i % len(IMAGES)]
        image = Image.fromarray(np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8))
        made.append({"image": image} if kind == "image" else {"image": image, "text": text})
    return made


def padded_batch(features: list, side: str = "left") -> dict[str, torch.Tensor]:
    """Padded tensors of one batch, as the reference's collator makes them (on the left); positions are the features' own, or 0..n-1."""
    length = max(f.length for f in features)
    ids = torch.zeros(len(features), length, dtype=torch.long)
    mask, positions = torch.zeros_like(ids), torch.zeros(3, *ids.shape, dtype=torch.long)
    for row, f in enumerate(features):
        real = slice(length - f.length, length) if side == "left" else slice(0, f.length)
        ids[row, real], mask[row, real] = f.input_ids, 1
        positions[:, row, real] = torch.arange(f.length) if f.position_ids is None else f.position_ids
    seen = [f for f in features if f.vision]
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    if seen:
        batch["pixel_values"] = torch.cat([f.vision["pixel_values"] for f in seen])
        batch["image_grid_thw"] = torch.cat([f.vision["grid_thw"] for f in seen])
    return batch
