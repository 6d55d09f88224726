"""A tokenizer that transformers makes must cut a probe text as the folder's tokenizer.json does."""

import tomllib

import pytest
from packaging.requirements import Requirement

from tests.helpers.repository import ROOT
from tests.helpers.tiny_models import BUILDERS
from vlm2vec import VLM2Vec
from vlm2vec.checkpoint import loading


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    BUILDERS["qwen2_vl"](folder)
    return folder


def space_before(inner):
    from tokenizers import pre_tokenizers

    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)


def lower_case(inner):
    from tokenizers import normalizers

    inner.normalizer = normalizers.Lowercase()


def composed(inner):
    from tokenizers import normalizers

    inner.normalizer = normalizers.NFC()


def changed_by(change, monkeypatch):
    """transformers makes every tokenizer so."""
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained

    def otherwise(*args, **kwargs):
        tokenizer = made(*args, **kwargs)
        change(tokenizer.backend_tokenizer)
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", otherwise)


@pytest.mark.parametrize("change", [space_before, lower_case])
def test_a_tokenizer_made_otherwise_is_refused(change, folder, monkeypatch):
    """As transformers 5.3.0 and 5.6.0 made Phi-3.5-V's and LLaVA's."""
    changed_by(change, monkeypatch)
    with pytest.raises(
        ValueError, match=r"tokenizer.json: transformers \S+ makes other tokens of a probe text .* install another"
    ) as caught:
        VLM2Vec.from_pretrained(folder, device="cpu")
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_another_normalizer_is_told(folder, monkeypatch):
    """It changes letters with marks alone, as transformers' own class for Qwen3.5 does."""
    changed_by(composed, monkeypatch)
    with pytest.warns(UserWarning, match=r"tokenizer.json: transformers \S+ makes other tokens .* letters with marks"):
        VLM2Vec.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize("name", ["qwen2_vl", "phi3_v", "llava_next"])
def test_the_reference_folders_pass(name, golden):
    from transformers import AutoTokenizer

    if not (golden / name / "tokenizer.json").exists():
        pytest.skip("made of vocab.json and merges.txt")
    loading.check_tokenizer(str(golden / name), AutoTokenizer.from_pretrained(golden / name))


def test_a_folder_without_the_file_passes(folder, tmp_path):
    loading.check_tokenizer(str(tmp_path), None)


@pytest.mark.parametrize("version", ["5.3.0", "5.6.0"])
def test_releases_that_change_token_ids_are_excluded(version):
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = next(r for r in map(Requirement, table["train"]) if r.name == "transformers")
    assert f"!={version}" in str(wanted.specifier) and version not in wanted.specifier
