"""Every public name of `contrastive_kernels` is documented, its docstring ends with an example, and the example runs."""

import doctest
import inspect

import pytest
import torch

import contrastive_kernels

PUBLIC = [name for name in contrastive_kernels.__all__ if callable(getattr(contrastive_kernels, name))]


def ends_with_an_example(docstring: str) -> bool:
    """The last paragraph is an interactive session."""
    paragraphs = inspect.cleandoc(docstring).split("\n\n")
    return any(line.strip().startswith(">>> ") for line in paragraphs[-1].splitlines())


def test_what_an_example_is():
    assert ends_with_an_example("Meaning.\n\nExample:\n    >>> 1 + 1\n    2\n")
    assert not ends_with_an_example("Meaning.\n\nExample:\n    >>> 1 + 1\n    2\n\nNumerics: float32.\n")
    assert not ends_with_an_example("Meaning.")


@pytest.mark.parametrize("name", PUBLIC)
def test_ends_with_an_example(name):
    docstring = getattr(contrastive_kernels, name).__doc__ or ""
    assert ends_with_an_example(docstring), f"{name}: end its docstring with an example (>>> ...)"


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_runs(name):
    subject = getattr(contrastive_kernels, name)
    torch.manual_seed(0)
    scope = {each: getattr(contrastive_kernels, each) for each in contrastive_kernels.__all__}
    tests = [test for test in doctest.DocTestFinder(recurse=False).find(subject, name, globs=scope) if test.examples]
    assert len(tests) == 1
    told = []
    failed, tried = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(tests[0], out=told.append)
    assert tried and not failed, "".join(told)
