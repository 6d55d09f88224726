"""What is installed: wheel and source archive hold the trainer as `vlm2vec.train` with its recipes, and no top-level package of ours."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from tests.helpers.repository import ROOT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None, reason="setuptools is not installed; pip install setuptools"
)
NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")


def build(tree, kind, out):
    """The file that setuptools makes of a source tree, without isolation and network."""
    out.mkdir(parents=True, exist_ok=True)
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy, so that nothing is written into the checkout."""
    tree = tmp_path_factory.mktemp("source") / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("kernels", "vlm2vec", "train", "bench", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=NOT_COPIED)
    return tree


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    return build(tree, "wheel", tmp_path_factory.mktemp("wheel"))


def sources(folder):
    return {path.relative_to(ROOT / folder).as_posix() for path in (ROOT / folder).rglob("*.py")}


def test_the_wheel_holds_every_module_and_no_other_package(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"contrastive_kernels", "vlm2vec"}
    expected = {f"vlm2vec/train/{name}" for name in sources("train")} | {f"vlm2vec/{name}" for name in sources("vlm2vec")}
    expected |= {f"contrastive_kernels/{name}" for name in sources("kernels/contrastive_kernels")}
    assert {name for name in names if name.endswith(".py")} == expected
    for folder, pattern in (("recipes", "*.yaml"), ("recipes/mixtures", "*.yaml"), ("recipes/plans", "*.md"), ("plan/configs", "*.json")):
        files = {f"vlm2vec/train/{folder}/{path.name}" for path in (ROOT / "train" / folder).glob(pattern)}
        assert files and files <= names, folder


def test_a_wheel_of_the_source_archive_is_the_same(tree, wheel, tmp_path):
    archive = build(tree, "sdist", tmp_path)
    with tarfile.open(archive) as packed:
        packed.extractall(tmp_path, filter="data")
    again = build(archive.with_name(archive.name.removesuffix(".tar.gz")), "wheel", tmp_path / "again")
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the unpacked wheel, and a runner of Python that imports from there, in an empty folder."""
    folder, empty = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("empty")
    zipfile.ZipFile(wheel).extractall(folder)

    def python(*words):
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = str(folder)
        return subprocess.run([sys.executable, *words], cwd=empty, env=environment, capture_output=True, text=True, timeout=240)

    return python


def test_the_unpacked_wheel_lists_and_finds_recipes(installed):
    done = installed("-m", "vlm2vec.cli", "train", "--list")
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in (ROOT / "train" / "recipes").glob("*.yaml")} <= {line.split(" ")[0] for line in done.stdout.splitlines()}
    code = (
        "import vlm2vec.train.run, sys; from vlm2vec.train.recipe.schema import load_recipe;"
        "print(load_recipe('quickstart').model, load_recipe('qwen2-vl-2b-v2.yaml').data.sources[0].name);"
        "print([name for name in sys.modules if name.split('.')[0] in ('train', 'bench', 'tests', 'kernels')])"
    )
    done = installed("-c", code)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()[-2:]
    assert first.startswith("quickstart/model-init ") and second == "[]"
    done = installed("-m", "vlm2vec.cli", "train", "quickstrat")
    assert done.returncode == 2 and "did you mean quickstart? `vlm2vec train --list` lists them" in done.stderr


def test_the_unpacked_wheel_says_its_own_commands(installed):
    done = installed("-m", "vlm2vec.cli", "train", "--help")
    assert done.returncode == 0, done.stderr
    assert "vlm2vec train RECIPE" in done.stdout and "-m vlm2vec.train RECIPE" in done.stdout and "--profile STEP" in done.stdout
    assert "python -m train" not in done.stdout
    done = installed("-m", "vlm2vec.cli", "train", "plan", "--help")
    assert done.returncode == 0 and "usage: vlm2vec train plan" in done.stdout


def test_the_unpacked_wheel_plans(installed):
    done = installed("-m", "vlm2vec.cli", "train", "plan", "bench-100m-lora", "--gpu", "rtx3090-24")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "vlm2vec train plan bench-100m-lora --gpu rtx3090-24" in done.stdout


def test_in_a_checkout_both_commands_are_there():
    for words, command in (
        (["-m", "train", "--help"], "python -m train RECIPE"),
        (["-m", "vlm2vec.cli", "train", "--list"], "quickstart "),
    ):
        environment = os.environ | {"PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}"}
        done = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and command in done.stdout, done.stderr
