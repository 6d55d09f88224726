"""The examples of index, server, stream and Ray's embedder run as they are read."""

import doctest
import inspect
import shutil

import pytest

from vlm2vec import Index, encoding
from vlm2vec.ray import Embedder

pytest.importorskip("prometheus_client", reason="the extra `serve` is not installed")
from vlm2vec.commands.serve.batcher import Batcher

SHOWN = {
    "Index": Index,
    "Index.open": Index.open,
    "Index.search": Index.search,
    "encode_stream": encoding.encode_stream,
    "Embedder": Embedder,
    "Batcher": Batcher,
}


@pytest.mark.parametrize("name", SHOWN)
def test_an_example(name, example_names, example_folder):
    pictures = example_folder / "pictures"
    pictures.mkdir(exist_ok=True)
    shutil.copy(example_folder / "fox.png", pictures)
    shutil.rmtree(example_folder / "pictures.index", ignore_errors=True)
    example = doctest.DocTestParser().get_doctest(
        inspect.getdoc(SHOWN[name]), example_names | {"Index": Index, "Embedder": Embedder, "Batcher": Batcher}, name, name, None
    )
    assert example.examples
    said = []
    assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=said.append).failed == 0, "".join(said)
