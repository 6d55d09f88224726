"""Layers that are alike take alike: a planned pass runs the outer layers of each stack and replays what one of them did.

A stand-in keeps as many bytes as the layer that was run, books its work and raises the peak as it did, the gathers and reductions
of FSDP2 included; gradients, optimizer and all that is counted are those of every layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .meter import Meter, Span

_FEWEST = 6  # layers of a stack that is worth it
_FIRST = 2  # layers that are run: the very first one's input may need no gradient, or be held by others


class LayersDiffer(Exception):
    """Layers that looked alike did not take alike; the pass has to run them all."""


class RepeatedLayers:
    """The stacks of like layers in a model, of which only the outer ones are run from here on.

    Args:
        model: its weights are fake. Stand-ins take the places of layers, so what is to be known of all weights is asked before.
        sharded: whether FSDP2 holds the weights.
        outer: which layer from the end tells what the backward pass of one takes: the last, or the one before it where a model
            looks at the last but one's output (vision towers of CLIP). Where weights are sharded it is one further inside:
            reductions of another layer are under way from the second one on.
    """

    def __init__(self, model: nn.Module, meter: Meter, sharded: bool, outer: int = 1):
        self.stacks: list[_Stack] = []
        inside: set[int] = set()
        for module in [*model.modules()]:
            if not isinstance(module, nn.ModuleList) or id(module) in inside:
                continue
            inside.update(id(m) for m in module.modules())
            if len(module) >= _FEWEST and len({_signature(layer) for layer in module}) == 1:
                self.stacks.append(_Stack(module, meter, sharded, outer))

    def label_gradients(self) -> None:
        """Whole gradients that FSDP2 holds between chunks count as gradients."""
        for stack in self.stacks:
            for place in stack.places:
                size = sum(tensor.nbytes for tensor in place.state.values())
                place.state.clear()
                if size:
                    place.state["gradients"] = place.meter.hold("gradients", size)

    def sharded_weights(self) -> list[nn.Parameter]:
        """Weights whose gradients FSDP2 does not make, since their layers are not run: the bytes are there."""
        return [p for stack in self.stacks for place in stack.places if place.sharded for p in place.layer.parameters() if p.requires_grad]


def _signature(layer: nn.Module) -> tuple:
    """What makes a layer take what it takes: its modules, their settings and weights."""
    groups = []
    for name, module in layer.named_modules():
        settings = {k: repr(v) for k, v in vars(module).items() if isinstance(v, (bool, int, float, str, tuple)) and k != "layer_idx"}
        tensors = [*module._parameters.items(), *module._buffers.items()]
        shapes = [(k, t.shape, t.dtype, t.requires_grad) for k, t in tensors if t is not None]
        groups.append((name, type(module).__qualname__, tuple(sorted(settings.items())), tuple(shapes)))
    return tuple(groups)


@dataclass
class _Pass:
    """One pass through a stack.

    Attributes:
        like: shape and type of the hidden states that the layers were handed; `beside`: the other objects, weakly where that can be.
        forward, backward: spans of the layers that are run.
        out: size, stride and dtype of what a layer gives.
        kept: bytes that a layer's graph keeps, by part.
        input: weak reference to the storage of a layer's input; `saves_input`: whether the layer's graph keeps it.
    """

    like: tuple = ()
    beside: list = field(default_factory=list)
    forward: Span | None = None
    backward: Span | None = None
    out: tuple = ()
    kept: dict[str, int] = field(default_factory=dict)
    input: Any = None
    saves_input: bool | None = None

    def begin_backward(self, meter: Meter) -> None:
        self.backward = meter.begin()

    def replayed(self, meter: Meter, hidden: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
        """What a layer gives; what its graph keeps is left to the caller."""
        if self.forward is None or self.like != _like(hidden) or (any(self.kept.values()) and not hidden.requires_grad):
            raise LayersDiffer
        if not _same(self.beside, [*_flat((args, kwargs))]):
            raise LayersDiffer
        if self.saves_input is None:
            self.saves_input = self.input() is not None
        meter.replay(self.forward)
        size, stride, dtype = self.out
        with meter.quiet():
            return torch.empty_strided(size, stride, dtype=dtype)


class _Stack:
    def __init__(self, layers: nn.ModuleList, meter: Meter, sharded: bool, outer: int):
        last = len(layers) - outer - sharded
        self.places = [_Place(layer, meter, sharded) for layer in layers[_FIRST:last]]
        self.at = _Pass()
        for index, layer in enumerate([*layers]):
            if _FIRST <= index < last:
                layers[index] = _StandIn(layer, self, self.places[index - _FIRST])
            else:
                layers[index] = _Watched(layer, self, meter, index, index == last)


class _Inside(nn.Module):
    """Stands before a layer; whoever asks for something of the layer's gets it."""

    def __init__(self, layer: nn.Module, stack: _Stack):
        super().__init__()
        self.__dict__.update(_layer=layer, _stack=stack)  # no part of the model

    def __getattr__(self, name: str):
        return getattr(self.__dict__["_layer"], name)


class _Watched(_Inside):
    """A layer that is run."""

    def __init__(self, layer: nn.Module, stack: _Stack, meter: Meter, index: int, is_model_of_backward: bool):
        super().__init__(layer, stack)
        self._modules["layer"] = layer
        self.__dict__.update(_meter=meter, _index=index, _is_model_of_backward=is_model_of_backward)

    def forward(self, *args, **kwargs):
        hidden, args = _hidden(args)
        run, meter = self._layer, self._meter
        if self._index == 0:
            self._stack.at = _Pass()
        at = self._stack.at
        if self._index == _FIRST - 1:
            at.like, at.beside, at.input = _like(hidden), [*map(_weakly, _flat((args, kwargs)))], meter.reference(hidden)
            span = meter.begin()
            out = run(hidden, *args, **kwargs)
            meter.end(span)
            if not isinstance(out, torch.Tensor) or meter.reference(out) is at.input:
                raise LayersDiffer
            at.forward, at.out, at.kept = span, (out.size(), out.stride(), out.dtype), dict(span.left)
            part = meter.part_of(out)
            at.kept[part] = at.kept.get(part, 0) - out.untyped_storage().nbytes()
            if min(at.kept.values()) < 0:  # it lets go of what was there before
                raise LayersDiffer
            return out
        if self._index >= _FIRST and not torch.is_grad_enabled():
            return at.replayed(meter, hidden, args, kwargs)
        if self._is_model_of_backward and hidden.requires_grad and torch.is_grad_enabled():
            out = run(_OnBackward.apply(hidden, lambda: meter.end(at.backward)), *args, **kwargs)
            return _OnBackward.apply(out, lambda: at.begin_backward(meter))
        return run(hidden, *args, **kwargs)


class _StandIn(_Inside):
    """A layer whose like was run."""

    def __init__(self, layer: nn.Module, stack: _Stack, place: _Place):
        super().__init__(layer, stack)
        self.__dict__.update(_place=place)

    def forward(self, *args, **kwargs) -> torch.Tensor:
        hidden, args = _hidden(args)
        at = self._stack.at
        if torch.is_grad_enabled() and hidden.requires_grad:
            return _Replayed.apply(hidden, self._place, at, args, kwargs)
        return at.replayed(self._place.meter, hidden, args, kwargs)


def _hidden(args: tuple) -> tuple[torch.Tensor, tuple]:
    """The hidden states, and what was handed beside them."""
    if not args or not isinstance(args[0], torch.Tensor):
        raise LayersDiffer
    return args[0], args[1:]


def _like(hidden: torch.Tensor) -> tuple:
    return hidden.size(), hidden.stride(), hidden.dtype, hidden.requires_grad, torch.is_grad_enabled()


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for name, entry in value.items():
            yield name
            yield from _flat(entry)
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from _flat(entry)
    else:
        yield value


def _weakly(value: Any) -> Any:
    """A reference that keeps nothing alive; what cannot be referred to so (numbers, words, None) stands for itself."""
    try:
        return weakref.ref(value)
    except TypeError:
        return value


def _same(references: list, values: list) -> bool:
    pairs = zip(references, values, strict=False)
    return len(references) == len(values) and all(r() is v if isinstance(r, weakref.ref) else r is v or r == v for r, v in pairs)


class _Place:
    """A layer that is not run, with its weights.

    Attributes:
        state: tensors of the bytes that FSDP2 holds for the layer from one chunk to the next, by part.
    """

    def __init__(self, layer: nn.Module, meter: Meter, sharded: bool):
        self.layer, self.meter, self.sharded = layer, meter, sharded
        self.state: dict[str, torch.Tensor] = {}

    def accumulate(self) -> None:
        """Gradients of weights that have none yet."""
        for parameter in () if self.sharded else self.layer.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
                for hook in (parameter._post_accumulate_grad_hooks or {}).values():
                    hook(parameter)

    def agree(self, change: dict[str, int]) -> None:
        """What a layer leaves behind beyond what stands here: FSDP2's, or a sign that layers are not alike."""
        for part, size in change.items():
            size += self.state[part].nbytes if part in self.state else 0
            if size < 0 or (size and not self.sharded):
                raise LayersDiffer
            if size:
                self.state[part] = self.meter.hold(part, size)
            else:
                self.state.pop(part, None)


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, place, at, args, kwargs):
        with torch.enable_grad():  # what the layer was handed is compared with it
            out = at.replayed(place.meter, hidden, args, kwargs)
        ctx.place, ctx.at, ctx.like = place, at, (hidden.size(), hidden.stride(), hidden.dtype)
        # Beside autograd's own saved tensors, so that no hook of offloading sees them.
        ctx.hidden = hidden if at.saves_input else None
        ctx.kept = [place.meter.hold(part, size) for part, size in at.kept.items() if size]
        return out

    @staticmethod
    def backward(ctx, grad):
        place, meter, span = ctx.place, ctx.place.meter, ctx.at.backward
        if span is None:
            raise LayersDiffer
        meter.replay(span)
        mark = meter.begin()
        ctx.hidden = ctx.kept = None
        with meter.quiet():
            size, stride, dtype = ctx.like
            place.accumulate()
            out = torch.empty_strided(size, stride, dtype=dtype)
        meter.end(mark)
        incoming = meter.part_of(grad)  # goes when this returns
        mark.left[incoming] = mark.left.get(incoming, 0) - grad.untyped_storage().nbytes()
        place.agree({part: span.left.get(part, 0) - mark.left.get(part, 0) for part in {**span.left, **mark.left}})
        return out, None, None, None, None


class _OnBackward(torch.autograd.Function):
    """Calls `then` when the backward pass comes by; in the forward pass it does nothing."""

    @staticmethod
    def forward(ctx, x, then):
        ctx.then = then
        return x

    @staticmethod
    def backward(ctx, grad):
        ctx.then()
        return grad, None
