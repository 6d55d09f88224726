"""The table of options: every entry is whole, every option says yes or no to every shortcut, and the shortcuts do as it says."""

import inspect

import pytest
import torch

import contrastive_kernels as ck
from contrastive_kernels.eager import matryoshka, symmetric
from contrastive_kernels.info_nce_op import FIELDS
from contrastive_kernels.options import SHORTCUTS, TABLE, InfoNCEOptions, is_on, option
from tests.kernels.helpers.definition import equals_the_definition
from tests.kernels.helpers.sampling import NAMES, Case

ENTRIES = pytest.mark.parametrize("entry", TABLE, ids=lambda entry: entry.name)


@ENTRIES
def test_an_entry_is_whole(entry):
    assert entry.metadata["meaning"].endswith(".") and entry.type
    assert set(entry.metadata["breaks"]) <= set(SHORTCUTS) and all(entry.metadata["breaks"].values())
    assert entry.name in FIELDS  # the operator takes it


def test_an_option_that_does_not_say_which_shortcuts_it_breaks_is_no_entry():
    with pytest.raises(TypeError, match="breaks"):
        option(None, "float?", "a new one.")


def test_an_unknown_shortcut_is_an_error():
    with pytest.raises(KeyError):
        InfoNCEOptions().obstacle("shared")


@ENTRIES
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_the_obstacle_of_a_shortcut_is_what_the_table_says(entry, shortcut):
    by_type = {bool: True, int: 1, float: 0.5, str: "other"}
    on = torch.ones(2) if entry.name == "temperature" else by_type.get(type(entry.default), torch.ones(2))
    options = InfoNCEOptions().replace(**{entry.name: on})
    reason = entry.metadata["breaks"].get(shortcut)
    assert is_on(on) and not InfoNCEOptions().obstacle(shortcut)
    assert options.obstacle(shortcut) == ("" if reason is None else f"with {entry.name} {reason}")


def taken_with(monkeypatch, module, function: str, names: tuple[str, ...], options: dict) -> tuple[bool, InfoNCEOptions]:
    """Whether a shortcut of plain torch was taken by a call with these options, whose results are held to the definition."""
    taken, real = [], getattr(module, function)
    monkeypatch.setattr(module, function, lambda *args: taken.append(1) or real(*args))
    case = Case(5, n=11, m=11)
    given = case.options(names) | options
    equals_the_definition(case, given, 1e-10)
    return bool(taken), InfoNCEOptions.make(given)


@pytest.mark.parametrize(
    "name", sorted(set(NAMES) - {"symmetric", "matryoshka", "small_workspace", "cold", "learnt_temperature", "row_temperatures"})
)
@pytest.mark.parametrize(
    "shortcut, module, function, options",
    [
        ("shared_logits", symmetric, "sweep", {"symmetric": True, "temperature": 0.2}),
        ("shared_levels", matryoshka, "compute", {"matryoshka_dims": (3, 8), "temperature": 0.2}),
    ],
    ids=["shared_logits", "shared_levels"],
)
def test_a_shortcut_is_taken_where_no_option_breaks_it_and_exact_there(shortcut, module, function, options, name, monkeypatch):
    taken, given = taken_with(monkeypatch, module, function, (name,), options)
    assert taken == (not given.obstacle(shortcut))


@pytest.mark.parametrize("function", [ck.info_nce, ck.info_nce_value_and_grad], ids=lambda function: function.__name__)
def test_signatures_show_every_option(function):
    parameters = inspect.signature(function).parameters
    assert all(parameters[entry.name].default is entry.default for entry in TABLE)


@pytest.mark.parametrize("place", [ck.info_nce, InfoNCEOptions], ids=lambda place: place.__name__)
def test_help_tells_what_every_option_means(place):
    text = " ".join(inspect.getdoc(place).split())
    assert all(f"{entry.name}: {entry.metadata['meaning']}" in text for entry in TABLE)
