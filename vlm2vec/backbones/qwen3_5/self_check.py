"""One kernel on a small case, against plain torch: value, gradients, and that nothing goes from a sample to another.

    python -m vlm2vec.backbones.qwen3_5.self_check delta_rule cuda:0 bfloat16 16 32 128 128     (key heads, value heads, their widths)
    python -m vlm2vec.backbones.qwen3_5.self_check convolution cuda:0 bfloat16 8192 4           (channels, tokens of a window)

Prints a line of JSON: {"wrong": what is wrong, or null}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import torch

from vlm2vec.backbones.qwen3_5.convolution import causal_convolution
from vlm2vec.backbones.qwen3_5.delta_rule import gated_delta_rule
from vlm2vec.backbones.qwen3_5.layout import convolution_layout, delta_layout
from vlm2vec.backbones.qwen3_5.providers import FUNCTIONS

# One token, fewer than a window, a chunk, one more and one fewer, several chunks and a tail.
LENGTHS = [1, 3, 64, 65, 63, 150, 2]
APART = 4  # how many roundings of its dtype a kernel may be from float32, over the norm: products of low precision add up some


def case(kind: str, device: torch.device, sizes: tuple[int, ...], lengths: list[int]) -> tuple[list[torch.Tensor], Callable, Callable]:
    """(inputs in float32 on the CPU, the kernel, plain torch): both take the inputs on the device."""
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(device)
    if kind == "convolution":
        channels, kernel = sizes
        layout = {name: x.to(device) for name, x in convolution_layout(lengths, kernel).items()}
        inputs = [draw(total, channels), draw(channels, kernel)]
        return inputs, lambda x, w: FUNCTIONS[kind](x, w, None, layout), lambda x, w: causal_convolution(x, w, None, layout)
    key_heads, value_heads, key_width, value_width = sizes
    layout = _there(delta_layout(lengths, key_heads=key_heads, value_heads=value_heads), device)
    inputs = [draw(total, key_heads, key_width), draw(total, key_heads, key_width), draw(total, value_heads, value_width)]
    inputs += [torch.nn.functional.logsigmoid(draw(total, value_heads) + 2), draw(total, value_heads).sigmoid()]
    return inputs, lambda *x: FUNCTIONS[kind](*x, boundaries), lambda *x: gated_delta_rule(*x, layout)


def _there(value, device: torch.device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _there(entry, device) for name, entry in value.items()}
    return [_there(entry, device) for entry in value] if isinstance(value, list) else value


def gradients(run: Callable, inputs: list[torch.Tensor], cotangent: torch.Tensor) -> list[torch.Tensor]:
    """The value and the gradient of each input."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = run(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]


def lowered(kind: str, inputs: list[torch.Tensor], device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """The inputs of a case as a model in `dtype` has them: the delta rule's decays stay in float32."""
    return [x.to(device, torch.float32 if kind == "delta_rule" and at == 3 else dtype) for at, x in enumerate(inputs)]


def wrong(
    kind: str, device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...], lengths: list[int] = LENGTHS, *, plain: bool = False
) -> str | None:
    """What is wrong with a kernel, None when nothing is.

    Args:
        sizes: as on the command line. lengths: of the samples.
        plain: looks at plain torch in `dtype` instead of the kernel; both are compared with plain torch in float32.
    """
    inputs, kernel, torchs = case(kind, device, sizes, lengths)
    kernel, low = torchs if plain else kernel, lowered(kind, inputs, device, dtype)
    names = ("value", *(("d query", "d key", "d value", "d decay", "d beta") if kind == "delta_rule" else ("d input", "d weight")))
    cotangent = torch.randn(len(inputs[0]), *_tail(kind, sizes), generator=torch.Generator().manual_seed(1)).to(device, dtype)
    got, truth = gradients(kernel, low, cotangent), gradients(torchs, [x.float() for x in low], cotangent.float())
    most = APART * torch.finfo(dtype).eps
    for name, ours, theirs in zip(names, got, truth, strict=True):
        # Every sample's value by itself: short ones are lost in the norm of all.
        parts = zip(ours.split(lengths), theirs.split(lengths)) if name == "value" else [(ours, theirs)]
        apart = max(float((a.float() - b).norm() / b.norm()) for a, b in parts)
        if not apart <= most:
            return f"its {name} is {apart:.1e} of the norm from plain torch, at most {most:.1e}"
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)
    for turn in (0, 1):  # every other sample is asked for: its neighbours on both sides must hear nothing
        asked = sample % 2 == turn
        heard = gradients(kernel, low, torch.where(asked.view(-1, *[1] * (cotangent.dim() - 1)), cotangent, 0))
        for name, x in zip(names[1:], heard[1:]):
            if len(x) == len(sample) and x[~asked].any():
                return f"its {name} reaches from a sample into another"
    return None


def _tail(kind: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
    return (sizes[0],) if kind == "convolution" else (sizes[1], sizes[3])


def main(arguments: list[str]) -> int:
    kind, device, dtype, *sizes = arguments
    print(json.dumps({"wrong": wrong(kind, torch.device(device), getattr(torch, dtype), tuple(map(int, sizes)))}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
