"""Loss and embedding gradients of a GradCache step; what the loss learns besides gets its gradient when the step succeeded.

The backward pass of a learned temperature (or another tensor handed to the loss) would free its graph, which a step that
runs out of memory and is done again needs once more. So these gradients wait in `LateGradients` until the second pass is over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..info_nce import InfoNCEResult, info_nce, info_nce_value_and_grad


@dataclass
class LateGradients:
    """Gradients that are not of the encoder.

    Attributes:
        options: (tensor that the loss was given, its gradient); the gradient goes on through the tensor's own graph.
        parameters: (leaf that the loss itself uses, its gradient or None).
    """

    options: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    parameters: list[tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=list)

    def learned(self) -> list[torch.Tensor]:
        """The leaves that receive a gradient, each once, in an order that is the same on every rank."""
        leaves = [leaf for tensor, _ in self.options for leaf in leaves_behind(tensor)] + [leaf for leaf, _ in self.parameters]
        return list({id(leaf): leaf for leaf in leaves}.values())

    def deposit(self) -> None:
        """Adds the gradients to the leaves' `.grad`."""
        if self.options:
            tensors, gradients = zip(*self.options, strict=True)
            torch.autograd.backward(tensors, gradients)
        for leaf, gradient in self.parameters:
            if gradient is not None:
                leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        self.options, self.parameters = [], []


def embedding_gradients(
    loss: Callable | None, embeddings: list[torch.Tensor], options: dict[str, Any], scaler: torch.amp.GradScaler | None
) -> tuple[Any, LateGradients]:
    """(`InfoNCEResult`, late gradients). The late ones are scaled, the embeddings' are not: they are scaled in the second pass.

    Args:
        loss: None or `info_nce`; an object whose `value_and_grad(query, target, *, grad_dtype, **options)` gives an `InfoNCEResult`
            as `info_nce_value_and_grad` does; or another callable `loss(query, target, **options)` that gives a scalar, or a pair of
            it and statistics.
        embeddings: of query, target and, where there are any, hard negatives. No graph hangs on them.

    Raises:
        ValueError: where the loss learns a parameter that `fully_shard` has sharded.
    """
    given = [x for x in options.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    _refuse_sharded([*given, *(leaf for x in given for leaf in leaves_behind(x))])
    if loss is None or loss is info_nce:
        return _of_value_and_grad(info_nce_value_and_grad, embeddings, options, scaler)
    if hasattr(loss, "value_and_grad"):
        return _of_value_and_grad(loss.value_and_grad, embeddings, options, scaler)
    return _of_callable(loss, embeddings, options, scaler)


def _of_value_and_grad(value_and_grad, embeddings, options, scaler):
    query, target, *hard = embeddings
    if hard:
        options = {**options, "hard_negatives": hard[0]}
    gradient_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    result = value_and_grad(query, target, grad_dtype=gradient_dtype, **options)
    temperature, late = options.get("temperature"), LateGradients()
    if isinstance(temperature, torch.Tensor) and temperature.requires_grad:
        late.options.append((temperature, scaled(scaler, result.d_temperature.to(temperature.dtype))))
    return result, late


def _of_callable(loss, embeddings, options, scaler):
    leaves = [e.detach().requires_grad_() for e in embeddings]
    learned = {name: x for name, x in options.items() if isinstance(x, torch.Tensor) and x.requires_grad}
    cut = {name: x.detach().requires_grad_() for name, x in learned.items()}
    options = {**options, **cut}
    if len(leaves) > 2:
        options["hard_negatives"] = leaves[2]
    with torch.enable_grad():
        value = loss(leaves[0], leaves[1], **options)
    value, stats = value if isinstance(value, tuple) else (value, None)
    parameters = leaves_behind(value)
    if isinstance(loss, torch.nn.Module):
        parameters += [p for p in loss.parameters() if p.requires_grad]
    given = {id(x) for x in (*leaves, *cut.values())}
    parameters = list({id(x): x for x in parameters if id(x) not in given}.values())
    _refuse_sharded(parameters)
    before = [leaf.grad for leaf in parameters]
    for leaf in parameters:
        leaf.grad = None
    scaled(scaler, value).backward()
    late = LateGradients(
        [(learned[name], x.grad) for name, x in cut.items() if x.grad is not None], [(leaf, leaf.grad) for leaf in parameters]
    )
    for leaf, gradient in zip(parameters, before, strict=True):
        leaf.grad = gradient
    unscale = 1.0 if scaler is None else 1.0 / scaler.get_scale()
    gradients = [None if leaf.grad is None else leaf.grad * unscale for leaf in leaves]
    return InfoNCEResult(
        loss=value.detach(),
        d_query=gradients[0],
        d_target=gradients[1],
        d_hard_negatives=gradients[2] if len(gradients) > 2 else None,
        d_temperature=None,
        stats=stats,
    ), late


def scaled(scaler: torch.amp.GradScaler | None, value: torch.Tensor) -> torch.Tensor:
    return value if scaler is None else scaler.scale(value)


def leaves_behind(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The leaves that a backward pass from `tensor` gives a gradient to, in an order that its graph alone decides."""
    if not tensor.requires_grad:
        return []
    if tensor.grad_fn is None:
        return [tensor]
    leaves, seen, waiting = [], set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # the node that adds to a leaf's .grad
            leaves.append(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return leaves


def _refuse_sharded(tensors: list[torch.Tensor]) -> None:
    """FSDP2 reduces gradients in the backward of its module alone, which such a parameter's gradient does not pass."""
    if any(hasattr(x, "device_mesh") for x in tensors):
        raise ValueError(
            "expected a temperature and loss parameters that are whole on every rank, got one that fully_shard has sharded; "
            "keep it out of the sharded module, or name it in fully_shard's ignored_params"
        )
