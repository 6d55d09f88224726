"""Checks of options that need no data: ValueError with what was expected, what came, and the mend."""

from __future__ import annotations

import difflib
import math

import torch

LEAST_TEMPERATURE = torch.finfo(torch.float32).tiny


def one_of(name: str, value, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, n=1)
        mend = f"did you mean {near[0]!r}?" if near else f"{allowed[0]!r} is the default"
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}; {mend}")


def check_switches(**values) -> None:
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}: expected True or False, got {value!r}; call bool()")


def check_ignore_index(value) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"ignore_index: expected an int, got {value!r}; -100 is the default")


def is_finite(value) -> bool:
    # compared, for a tracer would make a constant of what it hands to math.isfinite
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def check_temperature(temperature, name: str = "temperature") -> None:
    """A number above 0, or a floating-point tensor of one or of one a row, whose values are looked at later."""
    if not isinstance(temperature, torch.Tensor):
        if not (is_finite(temperature) and temperature > 0):
            raise ValueError(f"{name}: expected a number above 0, got {temperature!r}; 0.02 is usual")
        if temperature < LEAST_TEMPERATURE:
            raise ValueError(f"{name}: expected one whose inverse float32 can hold, got {temperature!r}; 0.02 is usual")
    elif temperature.dim() > 1:
        raise ValueError(f"{name}: expected a 0-d, (1,) or (N,) tensor, got shape {tuple(temperature.shape)}; call .flatten()")
    elif not temperature.dtype.is_floating_point:
        raise ValueError(f"{name}: expected a floating-point tensor, got {temperature.dtype}; call .float()")


def check_workspace(workspace_mib) -> None:
    if workspace_mib is not None and not (is_finite(workspace_mib) and workspace_mib > 0):
        raise ValueError(f"workspace_mib: expected MiB above 0, got {workspace_mib!r}; None takes the default")


def check_group(group, reduction: str) -> None:
    """A process group, with a reduction that all ranks can share; or None."""
    if group is None:
        return
    if not isinstance(getattr(group, "group_name", None), str):
        raise ValueError(
            f"group: expected a torch.distributed process group that this rank belongs to, got {group!r}; "
            "pass torch.distributed.group.WORLD, or what new_group gave"
        )
    if reduction != "mean":
        raise ValueError(
            f"group cannot be had with reduction: expected 'mean', the only one that is the same on all ranks, got {reduction!r}; "
            "use reduction='mean'"
        )


def check_exchange(exchange: str, group) -> None:
    if exchange != "gather" and group is None:
        raise ValueError(f"exchange: expected a group beside {exchange!r}, got group=None; pass the process group or leave exchange out")


def check_number(name: str, value, mend: str, none: bool = False) -> None:
    if not is_finite(value) and not (value is None and none):
        raise ValueError(f"{name}: expected a finite number, got {value!r}; {mend}")


def check_hardness(name: str, value) -> None:
    check_number(name, value, "0 turns it off")
    if value < 0:
        raise ValueError(f"{name}: expected 0 or more, got {value}; 0 turns it off")


def check_smoothing(name: str, value) -> None:
    check_number(name, value, "0 turns it off")
    if not 0 <= value < 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value}; 0.1 is usual, 0 turns it off")
