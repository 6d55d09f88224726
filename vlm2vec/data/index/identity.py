"""What made a set of vectors, and whether a model at hand is the same: JSON-able dictionaries, and the names of what differs."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlm2vec.evaluation.encode.keys import identity_digest, model_identity

# What decides whether two vectors can be compared; limits of images and prompts one side may have otherwise.
COMPARED = ("family", "weights", "dtype", "config", "adapter", "tokenizer")
NOT_OF_VECTORS = ("vlm2vec",)  # the release


def compared(identity: dict[str, Any]) -> dict[str, Any]:
    """The parts of `model_identity` that two sides of a comparison must share."""
    return {name: identity[name] for name in COMPARED if name in identity}


def whole(model: nn.Module | Any) -> dict[str, Any]:
    """Everything that a stored vector depends on besides its input; what is embedded later into the same set must have the same."""
    return {name: value for name, value in model_identity(model).items() if name not in NOT_OF_VECTORS}


def other_parts(made: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names of the parts of `now` that `made` does not have alike."""
    return [name for name in now if made.get(name) != now[name]]


def mismatch(made: dict[str, Any], now: dict[str, Any], where: str, maker: str | None, name: str, again: str) -> str | None:
    """One line where two `compared` identities differ, None where they do not.

    Args:
        where: the file or folder that `made` the vectors. maker: the name of its model.
        name: the model at hand.
        again: what mends it: "embed again".
    """
    other = other_parts(made, now)
    if other == ["dtype"] or (set(other) <= {"dtype", "weights"} and "dtype" in other):
        made_in, loaded = (str(said["dtype"]).removeprefix("torch.") for said in (made, now))
        return f"{where} was embedded in {made_in}, {name} is loaded in {loaded}; give --dtype {made_in}, or {again}"
    return f"{where} was made by another model ({maker}) than {name}: other {', '.join(other)}; {again}" if other else None


def digest(identity: dict[str, Any]) -> str:
    """Hex digest of an identity."""
    return identity_digest(identity)
