"""`vlm2vec search [MODEL] QUERY --images DIR`: the images that fit a text (or an image) best, with their scores."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from vlm2vec.checkpoint.prompts import layout
from vlm2vec.commands import common
from vlm2vec.inputs import IMAGE_MARKER
from vlm2vec.media.endings import PICTURES

QUICKSTART_MODEL = "quickstart/model"
# MMEB's words for the three sides, which models without prompts of their own were trained on (MSCOCO_t2i, NIGHTS, MSCOCO_t2i).
FIND_BY_TEXT = "Find me an everyday image that matches the given caption:"
FIND_BY_IMAGE = "Find a day-to-day image that looks similar to the provided image."
IMAGE = "Represent the given image."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="+",
        metavar="[MODEL] QUERY",
        help=f"the query, a text or an image file; a model in front of it, default {QUICKSTART_MODEL}",
    )
    parser.add_argument("--model", help="the model, instead of naming it in front of the query")
    parser.add_argument("--images", help="folder of images to search")
    parser.add_argument("--embeddings", help="instead of --images: a file that vlm2vec embed wrote with the same model")
    parser.add_argument("-k", type=int, default=5, help="how many to show (default 5)")
    parser.add_argument(
        "--prompt", help="prompt of the query: a name or the text itself (default: the model's for queries, else MMEB's words)"
    )
    parser.add_argument(
        "--image-prompt", help="prompt of the images: a name or the text itself (default: the model's for documents, else MMEB's words)"
    )
    parser.add_argument("--batch-size", type=int, default=32)
    common.add_model_arguments(parser)


def _model_and_query(args) -> tuple[str, str]:
    words = list(args.words)
    if len(words) > 2 or (args.model and len(words) > 1):
        raise ValueError(f"expected one query (quote it), got {len(words)} words: {' '.join(words)!r}")
    if args.model or len(words) == 2:
        return args.model or words[0], words[-1]
    if not os.path.isdir(QUICKSTART_MODEL):
        raise ValueError(f"no model named, and {QUICKSTART_MODEL} is not there; say vlm2vec search MODEL {words[0]!r} --images DIR")
    return QUICKSTART_MODEL, words[0]


def _asked(model, inputs: list, prompt: str | None, role: str, instruction: str) -> tuple[list, str | None]:
    """Inputs and prompt as they are encoded: the prompt asked for, the model's own for this role, or MMEB's instruction."""
    if prompt is not None or model.prompts.get(role):
        return inputs, model.prompts.get(role) if prompt is None else prompt
    pictured = [isinstance(one, Path) for one in inputs]
    return [
        {"text": layout(instruction, IMAGE_MARKER), "image": one} if image else layout(instruction, one)
        for one, image in zip(inputs, pictured)
    ], None


def run(args: argparse.Namespace) -> int:
    from contrastive_kernels import topk_similarity

    name, query = _model_and_query(args)
    if not query.strip():
        raise ValueError("the query is empty; say what to look for")
    if (args.images is None) == (args.embeddings is None):
        raise ValueError("give --images DIR or --embeddings FILE, one of them")
    if args.k < 1:
        raise ValueError(f"-k must be at least 1, got {args.k}")
    paths = common.images_below(args.images) if args.images else None
    stored = common.read_embeddings(args.embeddings) if args.embeddings else None
    model = common.load_model(name, args)
    is_file = query.lower().endswith(PICTURES) and os.path.isfile(query)
    asked, prompt = _asked(model, [Path(query) if is_file else query], args.prompt, "query", FIND_BY_IMAGE if is_file else FIND_BY_TEXT)
    vector = model.encode(asked, prompt=prompt, convert_to_tensor=True)
    if stored is not None:
        targets, keys, about = stored
        common.require_same_model(args.embeddings, about, model, name)
        if targets.shape[1] != vector.shape[1]:
            raise ValueError(
                f"{args.embeddings} holds {targets.shape[1]} dimensions, the model makes {vector.shape[1]}; embed with the same model"
            )
        targets = targets.to(vector.device)
    else:
        keys = [os.path.relpath(p, args.images) for p in paths]
        pictures, prompt = _asked(model, [Path(p) for p in paths], args.image_prompt, "document", IMAGE)
        targets = model.encode(pictures, prompt=prompt, batch_size=args.batch_size, convert_to_tensor=True)
    scores, index = topk_similarity(vector, targets, min(args.k, len(keys)))
    print(f"{'rank':>4}  {'score':>7}  image")
    for rank, (score, i) in enumerate(zip(scores[0].tolist(), index[0].tolist()), 1):
        print(f"{rank:>4}  {score:>7.4f}  {keys[i]}")
    return 0
