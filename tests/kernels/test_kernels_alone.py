"""The kernels without the rest: a wheel of their own, and the folder that Hugging Face's `kernels` package loads under another name."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from tests.helpers.repository import ROOT
from vlm2vec.checkpoint.release import __version__

LOSS = """
import torch
torch.manual_seed(0)
query, target = (torch.randn(6, 8, dtype=torch.float64) for _ in range(2))
query.requires_grad_()
def loss(package):
    value = package.info_nce(query, target, normalize=True, temperature=0.1)
    return value.item(), *torch.autograd.grad(value, query)[0].flatten().tolist()
"""


def python(code: str, *paths, **variables: str) -> list[str]:
    """Lines that a process of its own prints, in an empty folder, with nothing of this checkout on its path but `paths`."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, paths)), "HF_HUB_OFFLINE": "1"} | variables
    done = subprocess.run([sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


# -- the wheel ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """What `pip wheel kernels/` builds, in a copy of the tree, so that nothing is written into the checkout."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed; pip install setuptools")
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "kernels", tree / "kernels", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    (tree / "vlm2vec/checkpoint").mkdir(parents=True)
    shutil.copy(ROOT / "vlm2vec/checkpoint/release.py", tree / "vlm2vec/checkpoint")
    return built(tree / "kernels", tmp_path_factory.mktemp("wheel"))


def built(tree, out):
    code = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out / done.stdout.splitlines()[-1]


def test_the_wheel_holds_the_kernels_alone(wheel):
    assert wheel.name == f"contrastive_kernels-{__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    folder = ROOT / "kernels/contrastive_kernels"
    modules = {f"contrastive_kernels/{path.relative_to(folder).as_posix()}" for path in folder.rglob("*.py")}
    about = f"contrastive_kernels-{__version__}.dist-info/"
    assert {name for name in names if not name.startswith(about)} == modules
    assert f"{about}licenses/LICENSE" in names
    said = zipfile.ZipFile(wheel).read(f"{about}METADATA").decode()
    assert "Requires-Dist: torch>=2.11" in said and said.count("Requires-Dist") == 1


def test_the_unpacked_wheel_runs_a_loss_with_torch_alone(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = f"{LOSS}\nimport contrastive_kernels, sys\nprint(contrastive_kernels.__file__)\nprint(loss(contrastive_kernels)[0])\n"
    code += "print([name for name in ('vlm2vec', 'transformers', 'train') if name in sys.modules])"
    where, value, others = python(code, tmp_path)[-3:]
    assert where.startswith(str(tmp_path)) and 0 < float(value) < 20 and others == "[]"


def test_an_archive_of_the_kernels_alone_knows_its_version(tmp_path):
    """Beside it there is no project to ask."""
    pytest.importorskip("setuptools", reason="setuptools is not installed; pip install setuptools")
    shutil.copytree(ROOT / "kernels", tmp_path / "alone", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    (tmp_path / "alone/PKG-INFO").write_text("Metadata-Version: 2.4\nName: contrastive-kernels\nVersion: 7.8.9\n")
    assert "-7.8.9-" in built(tmp_path / "alone", tmp_path).name


def test_the_licence_is_the_projects():
    assert (ROOT / "kernels/LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


# -- the Kernel Hub ----------------------------------------------------------------------------------------------------


def build(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "kernels/build_hub_folder.py"), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "contrastive-kernels"
    done = build("-o", folder)
    assert done.returncode == 0, done.stderr
    return folder


BESIDE = """
import importlib.util, json, sys
def load(variant):
    # as kernels 0.17 does it
    name = json.load(open(variant + "/metadata.json"))["id"]
    spec = importlib.util.spec_from_file_location(name, variant + "/contrastive_kernels/__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""


def test_the_folder_loads_under_another_name_beside_the_package(repository, tmp_path):
    """Both, and a copy of other sources, keep operators of their own, also under torch.compile."""
    other = tmp_path / "other"
    shutil.copytree(repository / "build/torch-universal", other)
    said = json.loads((other / "metadata.json").read_text())
    (other / "metadata.json").write_text(json.dumps(said | {"id": "_another"}))
    code = f"""{LOSS}{BESIDE}
first, second = load({str(repository / "build/torch-universal")!r}), load({str(other)!r})
print("contrastive_kernels" in sys.modules)
import contrastive_kernels
packages = [contrastive_kernels, first, second]
print([package.__name__ for package in packages])
print(len({{loss(package) for package in packages}}))
compiled = [torch.compile(lambda q, p=p: p.info_nce(q, target, normalize=True), backend="eager", fullgraph=True) for p in packages]
print(len({{run(query).item() for run in compiled}}))
print([hasattr(torch.ops, p.__name__) and len(dir(getattr(torch.ops, p.__name__))) > 3 for p in packages])
"""
    alone, names, values, compiled, operators = python(code, ROOT / "kernels")[-5:]
    assert alone == "False", "the copy imports nothing by the package's name"
    assert names == str(
        ["contrastive_kernels", json.loads((repository / "build/torch-universal/metadata.json").read_text())["id"], "_another"]
    )
    assert (values, compiled, operators) == ("1", "1", "[True, True, True]")


def test_the_kernels_package_loads_the_folder(repository):
    spec = importlib.util.find_spec("kernels")
    if spec is None or spec.origin is None:  # the repository's folder of that name is no package
        pytest.skip("Hugging Face's kernels is not installed; pip install kernels")
    code = f"{LOSS}\nfrom pathlib import Path\nfrom kernels import get_local_kernel\n"
    code += f"kernel = get_local_kernel(Path({str(repository)!r}))\nprint(kernel.__name__)\nprint(loss(kernel)[0])"
    name, value = python(code, *filter(None, [os.environ.get("PYTHONPATH")]))[-2:]
    assert name.startswith("_contrastive_kernels_1_") and 0 < float(value) < 20


def test_the_folder_says_what_it_is_and_other_folders_are_left_alone(repository, tmp_path):
    said = json.loads((repository / "build/torch-universal/metadata.json").read_text())
    assert (said["name"], said["version"], said["python-depends"]) == ("contrastive-kernels", 1, [])
    card = (repository / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\n") and "get_local_kernel" in card
    assert not list(repository.rglob("*.pyc"))
    shutil.copytree(repository, tmp_path / "again")
    assert build("-o", tmp_path / "again", "--version", 2).returncode == 0, "its own folder is written anew"
    again = json.loads((tmp_path / "again/build/torch-universal/metadata.json").read_text())
    assert again["id"] == said["id"].replace("_1_", "_2_")
    (tmp_path / "mine.txt").write_text("mine")
    for words, told in ((("-o", tmp_path), "choose a new one"), (("-o", tmp_path / "new", "--version", 0), "whole number from 1")):
        done = build(*words)
        assert done.returncode == 2 and told in done.stderr and (tmp_path / "mine.txt").exists()
