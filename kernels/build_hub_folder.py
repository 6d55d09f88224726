"""Lays contrastive_kernels out as a repository of the Kernel Hub, which Hugging Face's `kernels` package loads.

    python kernels/build_hub_folder.py -o DIR [--version 1]

DIR holds the card (README.md), the licence, and build/torch-universal/: the package and `metadata.json`. Universal: Triton and torch
compile what they need where they run, so that one build serves every backend. What is loaded has the name of `metadata.json`'s `id`,
which tells these sources from all others; `get_local_kernel(Path(DIR))` loads it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE, NAME, VARIANT = "contrastive_kernels", "contrastive-kernels", "torch-universal"


def sources() -> dict[str, bytes]:
    """Files of the package by their path below it."""
    folder = HERE / PACKAGE
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.py"))}


def metadata(files: dict[str, bytes], version: int) -> dict:
    """What `metadata.json` says: keys are those of the `kernels` package, 0.17."""
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return {
        "id": f"_{PACKAGE}_{version}_{digest.hexdigest()[:12]}",
        "name": NAME,
        "version": version,
        "license": "apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},  # of those that it runs on the one that every machine has; the variant says that it is universal
    }


def build(folder: Path, version: int) -> Path:
    """Writes the repository. Returns the folder of its one build.

    Raises:
        ValueError: the folder holds something else, or the version is no whole number from 1.
    """
    if version < 1:
        raise ValueError(f"--version {version}: expected a whole number from 1, which get_kernel(..., version=) takes; say --version 1")
    variant = folder / "build" / VARIANT
    if folder.exists() and any(folder.iterdir()) and not (variant / "metadata.json").is_file():
        raise ValueError(f"-o {folder}: expected a new or empty folder, or one that this command wrote, got another; choose a new one")
    files = sources()
    shutil.rmtree(variant, ignore_errors=True)
    for name, content in files.items():
        path = variant / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (variant / "metadata.json").write_text(json.dumps(metadata(files, version), indent=2) + "\n", encoding="utf-8")
    for name in ("README.md", "LICENSE"):
        shutil.copyfile(HERE / name, folder / name)
    return variant


def main(argv: list[str] | None = None) -> int:
    """Exit code: 2 where the folder cannot be written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the repository")
    parser.add_argument("--version", type=int, default=1, help="of the kernel, a whole number that goes up with its interface")
    args = parser.parse_args(argv)
    try:
        print(build(args.output, args.version))
    except (OSError, ValueError) as error:
        print(f"build_hub_folder: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
