"""Pixels of the cases of WeMM-Embedding's golden set, remade from its pictures and films the way its README says: two resizes each.

Target sizes of films are the set's own; what comes out is compared with the rows of pixels that the set holds before it is used.
"""

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from vlm2vec.backbones.pixels import patchify, smart_resize

TOKEN = 32  # pixels of a token's side


def on_white(path) -> Image.Image:
    """The file as it is stored, what is transparent on white."""
    image = Image.open(path)
    if image.mode != "RGBA":
        return image.convert("RGB")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def resized(image: Image.Image, side: int, part: dict) -> Image.Image:
    limits = {"min_pixels": part.get("min_pixels", 4 * side**2), "max_pixels": part.get("max_pixels", 16384 * side**2)}
    height, width = smart_resize(image.height, image.width, factor=side, reference_edges=False, **limits)
    return image.resize((width, height))


def bicubic(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    return tvf.resize(frames, [height, width], interpolation=InterpolationMode.BICUBIC, antialias=True)


def patches(frames: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """(F, 3, H, W) of 8-bit values -> ((P, 1536), (t, h, w))."""
    if len(frames) == 1:
        frames = frames.repeat(2, 1, 1, 1)
    values = (frames.float() - 127.5) / 127.5
    cut, grid = patchify(values.permute(0, 2, 3, 1).numpy(), patch=16, merge=2, temporal=2)
    return torch.from_numpy(cut), grid


def picture(folder, part: dict):
    pixels = tvf.pil_to_tensor(resized(on_white(folder / part["image"]), TOKEN, part))[None]
    limits = {"min_pixels": 65_536, "max_pixels": 16_777_216}
    return patches(bicubic(pixels, *smart_resize(*pixels.shape[-2:], factor=TOKEN, reference_edges=False, **limits)))


def film(folder, part: dict, about: dict):
    """Frames of a list, or those of a file that the set names, brought to the set's size."""
    if isinstance(part["video"], list):
        frames = [tvf.pil_to_tensor(resized(on_white(folder / name), 2 * TOKEN, part)) for name in part["video"]]
        frames += frames[-1:] * (len(frames) % 2)
    else:
        import av

        with av.open(str(folder / part["video"])) as container:
            every = [np.ascontiguousarray(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
        frames = [torch.from_numpy(every[at]).permute(2, 0, 1) for at in about["frames_indices"]]
    values = bicubic(torch.stack(frames).float(), *about["resized_frames"][-2:])  # in float32, a picture's in 8 bits
    return patches(values.clamp(0, 255).round())


def vision_of(folder, case: dict, expected: dict) -> dict:
    """`Features.vision` of a case, visuals in the order of its message; empty without any. Compared with what the set holds of it."""
    parts = [p for m in case["messages"] if not isinstance(m["content"], str) for p in m["content"] if p["type"] != "text"]
    made = [picture(folder, p) if p["type"] == "image" else film(folder, p, case["videos"][0]) for p in parts]
    for kind, key in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        mine = [pixels for part, (pixels, _) in zip(parts, made) if part["type"] == kind]
        if mine:
            torch.testing.assert_close(torch.cat(mine)[case[f"{key}_rows"]], expected[f"{key}.{case['name']}"], atol=1e-6, rtol=0)
    return {"pixel_values": torch.cat([p for p, _ in made]), "grid_thw": torch.tensor([g for _, g in made])} if made else {}
