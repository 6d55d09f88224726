"""GradCache: the gradients of a contrastive loss over a large batch in the memory of one chunk.

A step encodes the batch chunk by chunk without a graph, forms the loss and its gradient with respect to the
embeddings, then encodes each chunk again with a graph and sends its rows of that gradient through it. The result
equals one backward through the same chunks with every graph kept. Source: Gao et al., "Scaling Deep Contrastive
Learning Batch Size under Memory Limited Setup" (RepL4NLP 2021).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from contrastive_kernels.chunks import row_chunks, token_budget_chunks
from contrastive_kernels.generator_state import GeneratorState
from contrastive_kernels.gradient_sync import GradientSync
from contrastive_kernels.retention import FeatureStore, fitting_chunks, graph_bytes, retained_chunks

logger = logging.getLogger(__name__)

_SIDES = ("query", "target", "hard_negatives")


@dataclass
class _Chunk:
    side: int
    rows: list[int]
    tokens: int
    is_dummy: bool = False  # run for its collectives alone: a rank with fewer chunks than another
    encode_state: GeneratorState | None = None
    freeze_state: GeneratorState | None = None
    graph: torch.Tensor | None = field(default=None, repr=False)


class GradCache:
    """Exact large-batch contrastive gradients, one chunk in memory at a time.

    Args:
        encode: `encode(inputs, rows, features=None) -> (len(rows), D)`, differentiable embeddings of the named rows.
            A pair of such functions encodes query and target apart; hard negatives go with the target.
        loss: `info_nce` (the default), or any callable `loss(query, target, **options) -> scalar`, for example an
            `InfoNCELoss` with a learnable temperature, whose own parameters receive their gradient too.
        chunk_tokens: most tokens of a chunk, after sorting by length. Or:
        chunk_size: rows of a chunk, after sorting by length.
        retain: how many of the first pass's last chunks keep their graph and so need no second forward: a number,
            "all", or "auto", which measures the first chunk and keeps what fits into `retain_mib`.
        retain_mib: bound for `retain="auto"`, MiB. Default on CUDA: 80 % of what is free; on a CPU it must be given.
        freeze: `freeze(inputs, rows) -> features`, run without gradients; both passes hand its result to `encode` as
            `features=`, for parts of the encoder that are not trained (a frozen vision tower). A pair as `encode`.
        keep_mib: bound on features kept between the passes, MiB; beyond it they are computed again.
        prefetch: `prefetch(inputs, rows)`, told the rows of the next chunk before the present one runs, so that reading
            or decoding them can begin. A pair as `encode`.
        module: the module that `encode` calls. Where it is wrapped (DistributedDataParallel or `fully_shard`), its
            gradients are synchronised once per step. Its parameters are also what a step that runs out of memory has
            to undo: without it, or under `fully_shard`, whose forward is collective, such a step raises.
        scaler: a `torch.amp.GradScaler`; gradients are scaled before they enter the encoder, as `scaler.scale(loss)`
            would.

    Numerics: embedding gradients are formed in float32 (float64 for float64 embeddings), whatever the model's dtype.
    CPU and CUDA generators are replayed, so dropout masks agree between the passes.

    Out of memory: the first time an `encode` raises `torch.OutOfMemoryError`, on any rank, all ranks undo the step, halve
    `chunk_tokens` (or `chunk_size`) for good with a warning, and do it again. The second time it raises.
    """

    def __init__(
        self,
        encode: Callable | tuple[Callable, Callable],
        loss: Callable | None = None,
        *,
        chunk_tokens: int | None = None,
        chunk_size: int | None = None,
        retain: int | str = 0,
        retain_mib: float | None = None,
        freeze: Callable | tuple[Callable, Callable] | None = None,
        keep_mib: float = 1024.0,
        prefetch: Callable | tuple[Callable, Callable] | None = None,
        module: torch.nn.Module | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ):
        if (chunk_tokens is None) == (chunk_size is None):
            raise ValueError("expected exactly one of chunk_tokens= and chunk_size=; they are two ways to cut a batch")
        if not (retain in ("all", "auto") or (isinstance(retain, int) and retain >= 0)):
            raise ValueError(f'retain must be a number of chunks, "all" or "auto", got {retain!r}')
        if retain == "auto" and retain_mib is None and not torch.cuda.is_available():
            raise ValueError('retain="auto" needs retain_mib= where there is no GPU whose free memory bounds it')
        self.encode = _by_side(encode)
        self.loss = loss
        self.chunk_tokens, self.chunk_size = chunk_tokens, chunk_size
        self.retain, self.retain_mib = retain, retain_mib
        self.freeze = _by_side(freeze) if freeze is not None else None
        self.keep_mib = keep_mib
        self.prefetch = _by_side(prefetch) if prefetch is not None else None
        self.halved = False
        self.sync = GradientSync(module)
        self.scaler = scaler

    def step(
        self,
        query: Any,
        target: Any,
        *,
        lengths: tuple[Sequence[int], ...],
        hard_negatives: Any = None,
        late_options: Callable[[], dict[str, Any]] | None = None,
        **loss_options: Any,
    ):
        """Loss of the whole batch; gradients are added to `.grad` of everything `encode` used.

        Args:
            query, target: inputs of the two sides, of any type; handed to `encode` as they are.
            lengths: tokens per row: (query lengths, target lengths), and a third for `hard_negatives`.
            hard_negatives: inputs of the packed hard negatives (H rows); pass `hard_offsets` (N+1,) as loss option.
            late_options: called after the first pass for more loss options, such as a mask of rows that turned out to be
                unreadable while they were encoded.
            loss_options: options of the loss: `temperature`, `positives`, `target_ids`, ... A `temperature` tensor that
                requires grad receives its gradient.

        Returns:
            `InfoNCEResult` with the loss, detached; with another loss than `info_nce`, its stats are empty.

        Raises:
            ValueError: where lengths do not match the sides, or a side is empty.
            torch.OutOfMemoryError: where a step cannot be undone, or runs out of memory after the budget was halved.
        """
        sides = [query, target] + ([hard_negatives] if hard_negatives is not None else [])
        if len(lengths) != len(sides):
            raise ValueError(f"lengths must hold one sequence a side ({', '.join(_SIDES[:len(sides)])}), got {len(lengths)}")
        undo = self._undo(loss_options)
        if undo is None:
            return self._attempt(sides, lengths, loss_options, late_options, contextlib.nullcontext())
        memory = _OutOfMemory()
        result = self._attempt(sides, lengths, loss_options, late_options, memory)
        if result is None:
            memory.error = None  # and with it the frames that hold the failed chunk
            undo()
            self._halve()
            result = self._attempt(sides, lengths, loss_options, late_options, contextlib.nullcontext())
        return result

    def _attempt(self, sides, lengths, loss_options, late_options, memory):
        """One whole step; None where some rank ran out of memory and `memory` caught it."""
        chunks = self._plan(lengths)
        retained = retained_chunks(self.retain, len(chunks)) if self.retain != "auto" else None
        features = FeatureStore(self.keep_mib)
        embeddings = None
        with memory:
            embeddings = self._first_pass(sides, lengths, chunks, retained, features)
        if self._failed(memory):
            return None
        after_first_pass = GeneratorState.capture()
        result = self._loss(embeddings, loss_options if late_options is None else {**loss_options, **late_options()})
        with memory:
            self._second_pass(sides, chunks, result, features)
        if self._failed(memory):
            return None
        self.sync.finish()
        after_first_pass.restore()  # a step draws from the generators as if it had run forward once
        return result

    def _failed(self, memory) -> bool:
        return isinstance(memory, _OutOfMemory) and self.sync.on_any_rank(memory.error is not None)

    def _undo(self, loss_options: dict[str, Any]) -> Callable[[], None] | None:
        """A function that takes back what a failed step did; None where it could not be taken back or is no use."""
        if self.halved or self.sync.module is None or self.sync.is_fsdp:
            return None
        leaves = [*self.sync.module.parameters()]
        if isinstance(self.loss, torch.nn.Module):
            leaves += self.loss.parameters()
        if isinstance(loss_options.get("temperature"), torch.Tensor):
            leaves.append(loss_options["temperature"])
        if any(leaf.grad is not None for leaf in leaves):
            return None  # gradients of earlier steps are in there too
        generators = GeneratorState.capture()

        def undo() -> None:
            for leaf in leaves:
                leaf.grad = None
            generators.restore()

        return undo

    def _halve(self) -> None:
        self.halved = True
        if self.chunk_tokens is not None:
            before, self.chunk_tokens = self.chunk_tokens, max(1, self.chunk_tokens // 2)
            what, now = "chunk_tokens", self.chunk_tokens
        else:
            before, self.chunk_size = self.chunk_size, max(1, self.chunk_size // 2)
            what, now = "chunk_size", self.chunk_size
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning("out of memory in a chunk: %s is %d instead of %d from now on, and the step is done again", what, now, before)

    def _plan(self, lengths: tuple[Sequence[int], ...]) -> list[_Chunk]:
        chunks = []
        for side, side_lengths in enumerate(lengths):
            if len(side_lengths) == 0 and side < 2:
                raise ValueError(f"the {_SIDES[side]} side is empty; a step needs at least one row on either side")
            if self.chunk_tokens is not None:
                rows_of_chunks = token_budget_chunks(side_lengths, self.chunk_tokens)
            else:
                rows_of_chunks = row_chunks(side_lengths, self.chunk_size)
            chunks += [_Chunk(side, rows, sum(side_lengths[r] for r in rows)) for rows in rows_of_chunks]
        device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
        shortest = min(range(len(lengths[0])), key=lambda row: lengths[0][row])
        for _ in range(self.sync.common_count(len(chunks), device) - len(chunks)):
            # Dummies go first: the last backward, in which FSDP2 reduces, is then a real one on every rank.
            chunks.insert(0, _Chunk(0, [shortest], lengths[0][shortest], is_dummy=True))
        return chunks

    def _first_pass(self, sides, lengths, chunks, retained, features) -> list[torch.Tensor]:
        embeddings: list[torch.Tensor | None] = [None] * len(sides)
        if retained is None:
            retained = self._measure_retained(sides, chunks)
        for index, chunk in enumerate(chunks):
            self._announce(sides, chunks[index + 1 : index + 2])
            encoded = self._forward_chunk(sides, index, chunk, features, keep_graph=index in retained)
            if chunk.is_dummy:
                continue
            if embeddings[chunk.side] is None:
                embeddings[chunk.side] = encoded.new_empty(len(lengths[chunk.side]), encoded.shape[1])
            embeddings[chunk.side][torch.tensor(chunk.rows, device=encoded.device)] = encoded.detach()
        return embeddings

    def _forward_chunk(self, sides, index: int, chunk: _Chunk, features: FeatureStore, keep_graph: bool) -> torch.Tensor:
        """Embeddings of a chunk in the first pass."""
        frozen = self._frozen(sides, chunk, index, features)
        chunk.encode_state = GeneratorState.capture()
        with self.sync.deferred(), _graph(keep_graph):
            encoded = self._run(self.encode[chunk.side], sides[chunk.side], chunk.rows, frozen)
        if encoded.dim() != 2 or encoded.shape[0] != len(chunk.rows):
            raise ValueError(f"encode must return ({len(chunk.rows)}, D) for {len(chunk.rows)} rows, got {tuple(encoded.shape)}")
        if keep_graph:
            chunk.graph = encoded
        return encoded

    def _measure_retained(self, sides, chunks) -> frozenset[int]:
        """The last chunks whose graphs fit, judged by what the graph of the first real chunk holds per token."""
        sample = next(chunk for chunk in chunks if not chunk.is_dummy)
        before = GeneratorState.capture()
        try:
            with self.sync.deferred():
                frozen = None
                if self.freeze is not None:
                    with torch.no_grad():
                        frozen = self.freeze[sample.side](sides[sample.side], sample.rows)
                measured = graph_bytes(lambda: self._run(self.encode[sample.side], sides[sample.side], sample.rows, frozen))
        except torch.OutOfMemoryError:
            measured = float("inf")  # no room for a graph; whether the passes fit without one is seen when they run
        before.restore()
        return fitting_chunks([c.tokens for c in chunks], measured / max(1, sample.tokens), self.retain_mib, self.sync)

    def _frozen(self, sides, chunk: _Chunk, index: int, store: FeatureStore):
        if self.freeze is None:
            return None
        kept = store.get(index)
        if kept is not None:
            return kept.value
        state = chunk.freeze_state
        if state is not None:
            resume = GeneratorState.capture()
            state.restore()
        chunk.freeze_state = GeneratorState.capture()
        with torch.no_grad():
            value = self.freeze[chunk.side](sides[chunk.side], chunk.rows)
        if state is None:
            store.offer(index, value)
        else:
            resume.restore()
        return value

    @staticmethod
    def _run(encode, inputs, rows, frozen):
        return encode(inputs, rows) if frozen is None else encode(inputs, rows, features=frozen)

    def _loss(self, embeddings: list[torch.Tensor], options: dict[str, Any]):
        from contrastive_kernels import InfoNCEResult, info_nce, info_nce_value_and_grad

        query, target, *hard = embeddings
        if hard:
            options = {**options, "hard_negatives": hard[0]}
        if self.loss is None or self.loss is info_nce:
            gradient_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
            result = info_nce_value_and_grad(query, target, grad_dtype=gradient_dtype, **options)
            temperature = options.get("temperature")
            if isinstance(temperature, torch.Tensor) and temperature.requires_grad:
                temperature.backward(self._scaled(result.d_temperature.to(temperature.dtype)))
            return result
        leaves = [e.detach().requires_grad_() for e in embeddings]
        if hard:
            options = {**options, "hard_negatives": leaves[2]}
        with torch.enable_grad():
            value = self.loss(leaves[0], leaves[1], **options)
        # The loss's own parameters see the scaled loss; rows are scaled with the rest in the second pass.
        self._scaled(value).backward()
        unscale = 1.0 if self.scaler is None else 1.0 / self.scaler.get_scale()
        gradients = [None if leaf.grad is None else leaf.grad * unscale for leaf in leaves]
        return InfoNCEResult(
            loss=value.detach(),
            d_query=gradients[0],
            d_target=gradients[1],
            d_hard_negatives=gradients[2] if hard else None,
            d_temperature=None,
            stats=None,
        )

    def _scaled(self, value: torch.Tensor) -> torch.Tensor:
        return value if self.scaler is None else self.scaler.scale(value)

    def _second_pass(self, sides, chunks: list[_Chunk], result, features: FeatureStore) -> None:
        gradients = [result.d_query, result.d_target, result.d_hard_negatives]
        # Graphs that were kept go first: each frees its memory before a chunk is encoded again.
        order = [i for i, c in enumerate(chunks) if c.graph is not None]
        order += [i for i, c in enumerate(chunks) if c.graph is None]
        for position, index in enumerate(order):
            chunk = chunks[index]
            is_last = position == len(order) - 1
            coming = [chunks[i] for i in order[position + 1 : position + 2]]
            self._announce(sides, [c for c in coming if c.graph is None])
            with self.sync.last_backward() if is_last else self.sync.deferred():
                self._backward_chunk(sides, index, chunk, gradients[chunk.side], features)
            features.drop(index)
            chunk.graph = None

    def _backward_chunk(self, sides, index: int, chunk: _Chunk, gradient: torch.Tensor | None, features: FeatureStore) -> None:
        """Sends a chunk's rows of the embeddings' gradient through its graph, which is made again where it was not kept."""
        encoded = chunk.graph
        if encoded is None:
            frozen = self._frozen(sides, chunk, index, features)
            chunk.encode_state.restore()
            with _graph(True):
                encoded = self._run(self.encode[chunk.side], sides[chunk.side], chunk.rows, frozen)
        if chunk.is_dummy or gradient is None:
            rows = torch.zeros_like(encoded)
        else:
            rows = gradient[torch.tensor(chunk.rows, device=gradient.device)]
        if encoded.requires_grad:
            encoded.backward(self._scaled(rows).to(encoded.dtype))

    def _announce(self, sides, coming: list[_Chunk]) -> None:
        if self.prefetch is not None:
            for chunk in coming:
                self.prefetch[chunk.side](sides[chunk.side], chunk.rows)


class _OutOfMemory:
    """A context that stores `torch.OutOfMemoryError` instead of letting it pass."""

    def __init__(self) -> None:
        self.error: torch.OutOfMemoryError | None = None

    def __enter__(self) -> _OutOfMemory:
        return self

    def __exit__(self, kind, error, traceback) -> bool:
        if isinstance(error, torch.OutOfMemoryError):
            self.error = error
            return True
        return False


def _graph(kept: bool) -> contextlib.AbstractContextManager:
    """Gradient mode of one encode call.

    Inside a caller's autocast region the low-precision copies of the weights are cached; copies made without a graph
    would be reused by the pass with one and cut the weights off from their gradient, so the cache is emptied first.
    """
    torch.clear_autocast_cache()
    return torch.enable_grad() if kept else torch.no_grad()


def _by_side(functions: Callable | tuple[Callable, Callable]) -> tuple[Callable, Callable, Callable]:
    """Functions of (query, target, hard negatives): one for all, or a pair of which the second serves the last two."""
    if callable(functions):
        return functions, functions, functions
    query, target = functions
    return query, target, target
