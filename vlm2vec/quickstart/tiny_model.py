"""The untrained model of the quickstart: transformers' own Qwen2-VL classes, small, with random weights from a seed.

About 1.8 million parameters: three vision and three text layers of width 128. The tokenizer is a byte-level BPE trained on
the benchmark's training text, with Qwen2-VL's special tokens; the image processor is Qwen2-VL's. The folder loads with
AutoProcessor, AutoModelForImageTextToText and VLM2Vec.from_pretrained.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from vlm2vec.data import mmeb
from vlm2vec.files import AnyPath, replacing_folder
from vlm2vec.inputs import IMAGE_MARKER
from vlm2vec.quickstart.build import VERSION, read_summary

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer, Qwen2VLForConditionalGeneration


SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VOCABULARY = 2048  # most words of the prompts and of the names become one token
LAYERS, WIDTH, HEAD_WIDTH = 3, 128, 32
TEACHER_LAYERS, TEACHER_WIDTH = 4, 256
# Four times the library's 0.02, which is meant for widths of thousands: at 128 it leaves attention and every layer's
# contribution near zero, and the first hundreds of steps go into growing them.
SPREAD = 0.08
MIN_PIXELS, MAX_PIXELS = 56 * 56, 1280 * 28 * 28  # the reference's limits (VLM2Vec-V2)


def build_model(out: AnyPath, seed: int = 0, say: Callable[[str], object] | None = print, *, teacher: bool = False) -> Path:
    """Make OUT/model-init from the text in OUT/data, unless it is there for this seed.

    Args:
        out: folder of the quickstart, with `data` built.
        seed: fixes the weights; the tokenizer follows from the data.
        teacher: make OUT/teacher-init instead, twice as wide and a layer deeper.

    Returns:
        OUT/model-init.
    """
    out = Path(out)
    folder, data = out / ("teacher-init" if teacher else "model-init"), read_summary(out / "data")
    stamp = {"version": VERSION, "seed": seed, "data": {key: data[key] for key in ("version", "seed", "size")}}
    if _finished(folder, stamp):
        if say:
            say(f"{folder}: already made with seed {seed}")
        return folder
    with replacing_folder(folder) as part:
        tokenizer = train_tokenizer(_texts(out / "data" / "train"))
        model = random_model(tokenizer, seed, *((TEACHER_LAYERS, TEACHER_WIDTH) if teacher else ()))
        _processor(tokenizer).save_pretrained(part)
        model.save_pretrained(part)
        (part / "quickstart.json").write_text(json.dumps(stamp, indent=1), encoding="utf-8")
    if say:
        say(
            f"{folder}: Qwen2-VL architecture, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} million parameters, "
            f"{len(tokenizer)} tokens, random weights"
        )
    return folder


def train_tokenizer(texts: Iterable[str]) -> Qwen2Tokenizer:
    """Qwen2's tokenizer class over a byte-level BPE of these texts. The same texts give the same tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(words), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY - len(SPECIAL), initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False
        ),
    )
    trained = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(pair) for pair in trained["merges"]],
        unk_token=None,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL),
        model_max_length=4096,
    )
    return tokenizer


def random_model(tokenizer: Qwen2Tokenizer, seed: int, layers: int = LAYERS, width: int = WIDTH) -> Qwen2VLForConditionalGeneration:
    """Qwen2VLForConditionalGeneration with random float32 weights; torch's global generator is left as it was."""
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    token, heads = tokenizer.convert_tokens_to_ids, width // HEAD_WIDTH
    config = Qwen2VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            max_position_embeddings=4096,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
            tie_word_embeddings=True,
            initializer_range=SPREAD,
            bos_token_id=None,
            eos_token_id=token("<|im_end|>"),
            pad_token_id=token("<|endoftext|>"),
        ),
        vision_config=dict(
            depth=layers,
            embed_dim=width,
            hidden_size=width,
            num_heads=heads,
            mlp_ratio=4,
            patch_size=14,
            spatial_merge_size=2,
            temporal_patch_size=2,
            initializer_range=SPREAD,
        ),
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2VLForConditionalGeneration(config).float().eval()


def _processor(tokenizer):
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    limits = {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=limits),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=limits),
        chat_template=_CHAT,
    )


def _texts(train: Path):
    """The text of every training row, so that the words of a prompt weigh as often as they are read; no evaluation text."""
    for name in mmeb.dataset_names(train, "original"):
        rows = mmeb.read_train(train, name)
        for column in ("qry", "pos_text"):
            yield from (text.replace(IMAGE_MARKER, "") for text in rows[column])


def _finished(folder: Path, stamp) -> bool:
    try:
        return json.loads((folder / "quickstart.json").read_text(encoding="utf-8")) == stamp
    except (OSError, json.JSONDecodeError):
        return False


# Qwen2-VL's turn layout, for tools that insist on a template; VLM2Vec itself uses none.
_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|>"
    "<|vision_end|>{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
