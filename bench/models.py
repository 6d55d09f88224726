"""What encode, eval, step, plan and gpu measure: random Qwen2-VL models of two sizes, and a fixed mix of text and images.

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
# width x height of the images: 32 to 324 image tokens
IMAGES = [(112, 224), (224, 224), (336, 224), (224, 448), (448, 336), (308, 196), (504, 504), (280, 420), (196, 140), (392, 280)]
SAMPLES = {"tiny": 160, "100m": 32}
MARKER = "<|image_pad|>"
BATCH = 16  # rows of a padded batch


def build(size: str):
    """(Qwen2VLForConditionalGeneration, tokenizer, image processor), random weights from a fixed seed."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessor
    from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

    (width, layers, heads, key_heads, inner, vocabulary), (v_width, v_layers, v_heads) = SIZES[size]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", MARKER, "<|video_pad|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(special + letters)}, merges=[]))
    words.add_special_tokens(special)
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left")
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
            eos_token_id=special.index("<|im_end|>"),
            pad_token_id=0,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [half - 2 * (half // 3), half // 3, half // 3]},
        ),
        vision_config=dict(depth=v_layers, embed_dim=v_width, hidden_size=width, num_heads=v_heads, mlp_ratio=4),
        image_token_id=special.index(MARKER),
        video_token_id=special.index("<|video_pad|>"),
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(config).eval()
    images = Qwen2VLImageProcessor(size={"shortest_edge": 3136, "longest_edge": 1003520})
    return model, tokenizer, images


def write(size: str, folder: str) -> None:
    """Save the model as a folder that transformers, sentence-transformers and VLM2Vec load."""
    from transformers import Qwen2VLProcessor, Qwen2VLVideoProcessor

    model, tokenizer, images = build(size)
    # sentence-transformers takes text beside an image only through a template; this one adds nothing but a newline
    template = (
        "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}"
        + MARKER
        + "\n{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    )
    model.save_pretrained(folder)
    Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=template).save_pretrained(folder)


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


def padded_batch(features: list) -> dict[str, torch.Tensor]:
    """Left-padded tensors of one batch, as the reference's collator makes them; positions 0..n-1 over the real tokens."""
    length = max(f.length for f in features)
    ids = torch.zeros(len(features), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, f in enumerate(features):
        ids[row, length - f.length :], mask[row, length - f.length :] = f.input_ids, 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0).expand(3, -1, -1)
    seen = [f for f in features if f.vision]
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    if seen:
        batch["pixel_values"] = torch.cat([f.vision["pixel_values"] for f in seen])
        batch["image_grid_thw"] = torch.cat([f.vision["grid_thw"] for f in seen])
    return batch
