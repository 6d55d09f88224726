"""Prompt layouts as the public checkpoints were trained and evaluated (the released rows of TIGER-Lab/MMEB-eval and MMEB-V2).

    image    `{marker}\\n{instruction} {text}\\n`; without a visual `{instruction} {text}\\n`    MMEB image tasks
    space    `{marker} {instruction} {text}`, no final newline                                  V2 video and visual documents

Targets that are plain text are fed bare: give no instruction.
"""

import re

from vlm2vec.inputs import MARKER

LAYOUTS = ("image", "space")


def layout(instruction: str, text: str, style: str = "image") -> str:
    """Lay an instruction and a text out; markers at the head of the text stay in front.

    Raises:
        ValueError: for an unknown style.
    """
    if style not in LAYOUTS:
        raise ValueError(f"layout={style!r}: expected {' or '.join(map(repr, LAYOUTS))}")
    head, body = _split(text)
    markers = head.strip()
    said = f"{instruction} {body}" if instruction and body else instruction or body
    if style == "space":
        return f"{markers} {said}" if markers else said
    return f"{markers}\n{said}\n" if markers else f"{said}\n"


def prepend(prompt: str, text: str) -> str:
    """Put a prompt before the text, behind the markers and white space at its head; nothing else is added."""
    head, body = _split(text)
    return head + prompt + body


def _split(text: str) -> tuple[str, str]:
    """The markers at the head of a text with the white space behind each, and the rest."""
    head = _HEAD.match(text).group(0)
    return head, text[len(head) :]


_HEAD = re.compile(rf"(?:{MARKER.pattern}\s*)*")
