"""Every public docstring of VLM2Vec ends with an example, and the examples run."""

import doctest
import inspect

import pytest

from vlm2vec import VLM2Vec


def public_members(cls: type) -> dict[str, object]:
    """{"Class": it, "Class.name": method or property} of what a class and its bases in this package define for others."""
    kinds = (property, classmethod, staticmethod, type(public_members))
    bases = [base for base in reversed(cls.__mro__) if base.__module__.startswith("vlm2vec.")]
    members = {name: member for base in bases for name, member in vars(base).items() if isinstance(member, kinds)}
    return {cls.__name__: cls} | {f"{cls.__name__}.{name}": member for name, member in members.items() if not name.startswith("_")}


PUBLIC = public_members(VLM2Vec)


@pytest.mark.parametrize("name", PUBLIC)
def test_example(name, example_names):
    text = inspect.getdoc(PUBLIC[name])
    assert text, f"{name} has no docstring"
    example = doctest.DocTestParser().get_doctest(text, example_names, name, "vlm2vec/model.py", None)
    assert example.examples, f"{name} shows no example"
    after = text.splitlines()[example.examples[-1].lineno :]
    assert "" not in after and ">>>" in after[0], f"{name}: the example is not the end of the docstring"
    said = []
    results = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example, out=said.append)
    assert results.failed == 0, "".join(said)
