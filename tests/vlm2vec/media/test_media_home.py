"""Nothing outside of vlm2vec.media opens pictures or films, so that what is decided there holds everywhere."""

import ast

import pytest

from tests.helpers.repository import ROOT

# Modules that open pictures or films, whole or these names of them. PIL.Image.new and fromarray draw and wrap: they open nothing.
LIBRARIES = {"av", "cv2", "decord", "imageio", "torchcodec", "torchvision.io", "moviepy", "skimage.io", "matplotlib.image"}
OPENERS = {"PIL.Image.open", "PIL.ImageFile.Parser", "PIL.ImageSequence.Iterator", "transformers.image_utils.load_image"}
OPENERS |= {"transformers.video_utils.load_video", "pyvips.Image.new_from_file"}
CODE = ("vlm2vec", "train", "bench", "examples")
EXCEPTIONS = {"bench/eval/": "changes one pixel of pictures that it has drawn itself, so that the reading it measures stays out of it"}


def openers(source: str) -> set[str]:
    """Full names of what a module's source uses to open pictures or films."""
    tree = ast.parse(source)
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = alias.name if alias.asname else alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    used = set(names.values()) | {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name) and parts:
            used.add(".".join([names.get(node.id, node.id), *reversed(parts)]))
    return {name for name in used if name in OPENERS or any(f"{name}.".startswith(f"{library}.") for library in LIBRARIES)}


@pytest.mark.parametrize(
    "source",
    [
        "from PIL import Image\nImage.open(x)",
        "import PIL.Image as P\nwith P.open(x) as y: pass",
        "def f():\n    import av\n    av.open(x)",
        "from torchvision import io\nio.read_image(x)",
        "import torchvision\ntorchvision.io.read_video(x)",
        "from torchcodec.decoders import VideoDecoder",
    ],
)
def test_an_opener_is_seen(source):
    assert openers(source)
    assert not openers("from PIL import Image\nImage.new('RGB', (1, 1)); Image.fromarray(x); open(x)")


def test_only_media_opens():
    seen = {}
    for file in (file for folder in CODE for file in sorted((ROOT / folder).rglob("*.py"))):
        if not file.is_relative_to(ROOT / "vlm2vec" / "media") and not file.name.startswith("test_"):
            seen[str(file.relative_to(ROOT))] = openers(file.read_text(encoding="utf-8"))
    assert len(seen) > 100, "the folders are where this test looks for them"
    opened = {file: sorted(names) for file, names in seen.items() if names}
    for folder in EXCEPTIONS:
        excepted = [file for file in opened if file.startswith(folder)]
        assert excepted, f"nothing below {folder} opens any: the exception goes"
        opened = {file: names for file, names in opened.items() if file not in excepted}
    assert not opened, f"open pictures and films by vlm2vec.media: {opened}"
    home = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "vlm2vec" / "media").glob("*.py"))
    assert {"av.open", "PIL.Image.open"} <= openers(home), "this test sees what media does"
