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
from functools import partial
from typing import Any

import torch

from .chunks import SIDES, Chunk, by_side, dummy_chunk, graph_mode, make_chunks
from .embedding_gradients import LateGradients, embedding_gradients, scaled
from .generator_state import GeneratorState
from .gradient_sync import GradientSync
from .out_of_memory import OutOfMemory
from .retention import FeatureStore, GraphSize, counting_saved, fitting_chunks, retained_chunks

logger = logging.getLogger(__name__)


class GradCache:
    """Exact large-batch contrastive gradients, one chunk in memory at a time.

    Args:
        encode: `encode(inputs, rows, features=None) -> (len(rows), D)`, differentiable embeddings of the named rows.
            A pair of such functions encodes query and target apart; hard negatives go with the target.
        loss: `info_nce` (the default), or any callable `loss(query, target, **options) -> scalar`, for example an
            `InfoNCELoss` with a learnable temperature, whose own parameters receive their gradient too. A learned tensor
            that is no leaf goes in as a loss option: captured by the callable, it could not be used twice by a step done again.
        chunk_tokens: most tokens of a chunk, after sorting by length. Or:
        chunk_size: rows of a chunk, after sorting by length.
        retain: how many of the first pass's last chunks keep their graph and so need no second forward: a number,
            "all", or "auto", which keeps what fits into `retain_mib`. "auto" measures the graphs of four chunks in the first
            step; their bytes per token stand for those of later steps, raised by kept graphs that turn out larger.
        retain_mib: bound for `retain="auto"`, MiB. Default on CUDA: 80 % of what is free, on the device or
            unused in torch's allocator; on a CPU it must be given.
        freeze: `freeze(inputs, rows) -> features`, run without gradients; both passes hand its result to `encode` as
            `features=`, for parts of the encoder that are not trained (a frozen vision tower). A pair as `encode`.
        keep_mib: bound on features kept between the passes, MiB; beyond it they are computed again.
        prefetch: `prefetch(inputs, rows)`, told the rows of the next chunk before the present one runs, so that reading
            or decoding them can begin. Chunks whose graph or features are kept are not announced again. A pair as `encode`.
        release: `release(inputs, rows)`, told rows that will not be asked for again in this step unless with kept features,
            so that what was read or decoded for them can go. A pair as `encode`.
        module: the module that `encode` calls, or a sequence of them (separate towers). Where they are wrapped
            (DistributedDataParallel or `fully_shard`), gradients are synchronised once per step; so are, by their mean over
            the ranks, those of a learned temperature, of the loss's parameters and of modules in the sequence that are not
            wrapped. Their parameters are also what a step that runs out of memory has to undo: without them it raises.
        scaler: a `torch.amp.GradScaler`; gradients are scaled before they enter the encoder, as `scaler.scale(loss)`
            would.

    Numerics: embedding gradients are formed in float32 (float64 for float64 embeddings), whatever the model's dtype.
    CPU and CUDA generators are replayed, so dropout masks agree between the passes.

    Several sharded modules: each serves the query side, or the target and hard-negative side, or both.

    Out of memory: the first time a chunk raises `torch.OutOfMemoryError`, on any rank, all ranks undo the step, halve
    `chunk_tokens` (or `chunk_size`) for good with a warning, and do it again. The second time all ranks raise. Under
    `fully_shard` the failing rank first goes through the rest of the chunk's collectives (`sharded_recovery`); where that
    cannot be done it raises at once and names the mend.

    Example:
        >>> import torch
        >>> from contrastive_kernels import info_nce
        >>> model, queries, targets = torch.nn.Linear(4, 8), torch.randn(6, 4), torch.randn(6, 4)
        >>> cache = GradCache(lambda batch, rows, features=None: model(batch[rows]), chunk_size=2, module=model)
        >>> result = cache.step(queries, targets, lengths=([1] * 6, [1] * 6), normalize=True)
        >>> chunked = model.weight.grad.clone()
        >>> model.zero_grad()
        >>> info_nce(model(queries), model(targets), normalize=True).backward()
        >>> torch.allclose(chunked, model.weight.grad, atol=1e-5)
        True
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
        release: Callable | tuple[Callable, Callable] | None = None,
        module: torch.nn.Module | Sequence[torch.nn.Module] | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ):
        if (chunk_tokens is None) == (chunk_size is None):
            raise ValueError("expected exactly one of chunk_tokens= and chunk_size=; they are two ways to cut a batch")
        if not (retain in ("all", "auto") or (isinstance(retain, int) and retain >= 0)):
            raise ValueError(f'retain must be a number of chunks, "all" or "auto", got {retain!r}')
        if retain == "auto" and retain_mib is None and not torch.cuda.is_available():
            raise ValueError('retain="auto" needs retain_mib= where there is no GPU whose free memory bounds it')
        self.encode = by_side(encode)
        self.loss = loss
        self.chunk_tokens, self.chunk_size = chunk_tokens, chunk_size
        self.retain, self.retain_mib = retain, retain_mib
        self.freeze = by_side(freeze) if freeze is not None else None
        self.keep_mib = keep_mib
        self.prefetch = by_side(prefetch) if prefetch is not None else None
        self.release = by_side(release) if release is not None else None
        modules = [] if module is None else [module] if isinstance(module, torch.nn.Module) else [*module]
        if isinstance(loss, torch.nn.parallel.DistributedDataParallel):
            modules.append(loss)  # its reductions are deferred like the others'
        self.sync = GradientSync(modules)
        self.memory = OutOfMemory(self.sync)
        self.scaler = scaler
        self._graph_sizes: dict[int, GraphSize] = {}
        self._late = LateGradients()
        self._stand_ins: list[Chunk | None] = []  # the shortest row of each side

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
            raise ValueError(f"lengths must hold one sequence a side ({', '.join(SIDES[: len(sides)])}), got {len(lengths)}")
        with self.memory.watching():
            result = self._attempt(sides, lengths, loss_options, late_options)
            if result is None:
                self.memory.undo()
                self._halve()
                result = self._attempt(sides, lengths, loss_options, late_options)
        return result

    def _attempt(self, sides, lengths, loss_options, late_options):
        """One whole step; None where some rank ran out of memory and the step can be undone."""
        self.memory.begin()
        chunks = self._plan(lengths)
        self._stand_ins = [dummy_chunk(side, side_lengths) if len(side_lengths) else None for side, side_lengths in enumerate(lengths)]
        retained = retained_chunks(self.retain, len(chunks)) if self.retain != "auto" else None
        features = FeatureStore(self.keep_mib)
        embeddings = self._first_pass(sides, lengths, chunks, retained, features)
        if self.memory.failed():
            return None
        self.memory.between_passes()
        after_first_pass = GeneratorState.capture()
        result = self._loss(embeddings, loss_options if late_options is None else {**loss_options, **late_options()})
        self._second_pass(sides, chunks, result, features)
        if self.memory.failed():
            return None
        learned = self._late.learned()
        self._late.deposit()
        self.sync.finish(learned)
        after_first_pass.restore()  # a step draws from the generators as if it had run forward once
        return result

    def _halve(self) -> None:
        if self.chunk_tokens is not None:
            before, self.chunk_tokens = self.chunk_tokens, max(1, self.chunk_tokens // 2)
            what, now = "chunk_tokens", self.chunk_tokens
        else:
            before, self.chunk_size = self.chunk_size, max(1, self.chunk_size // 2)
            what, now = "chunk_size", self.chunk_size
        self._graph_sizes.clear()
        logger.warning("out of memory in a chunk: %s is %d instead of %d from now on, and the step is done again", what, now, before)

    def _plan(self, lengths: tuple[Sequence[int], ...]) -> list[Chunk]:
        return make_chunks(lengths, self.chunk_tokens, self.chunk_size, self.sync)

    def _first_pass(self, sides, lengths, chunks, retained, features) -> list[torch.Tensor]:
        embeddings: list[torch.Tensor | None] = [None] * len(sides)
        if retained is None:
            retained = self._measure_retained(sides, chunks)
        for index, chunk in enumerate(chunks):
            self._announce(sides, chunks[index + 1 : index + 2])
            keep_graph = index in retained and not self.memory.has_failed_here
            encoded = self.memory.run(
                partial(self._forward_chunk, sides, index, chunk, features, keep_graph), partial(self._stand_in, sides, chunk)
            )
            if self.memory.must_stop:
                break
            if encoded is None:
                for failed in chunks:
                    failed.graph = None  # the step is done again
            if encoded is None or chunk.is_dummy:
                continue
            if keep_graph or features.get(index) is not None:
                self._release(sides, chunk)
            if embeddings[chunk.side] is None:
                embeddings[chunk.side] = encoded.new_empty(len(lengths[chunk.side]), encoded.shape[1])
            embeddings[chunk.side][chunk.index(encoded.device)] = encoded.detach()
        return embeddings

    def _forward_chunk(self, sides, index: int, chunk: Chunk, features: FeatureStore, keep_graph: bool) -> torch.Tensor:
        """Embeddings of a chunk in the first pass."""
        frozen = self._frozen(sides, chunk, index, features)
        chunk.encode_state = GeneratorState.capture()
        is_counted = keep_graph and self.retain == "auto"
        with self.sync.deferred(), graph_mode(keep_graph), counting_saved() if is_counted else contextlib.nullcontext() as saved:
            encoded = self._run(self.encode[chunk.side], sides[chunk.side], chunk.rows, frozen)
        if encoded.dim() != 2 or encoded.shape[0] != len(chunk.rows):
            raise ValueError(f"encode must return ({len(chunk.rows)}, D) for {len(chunk.rows)} rows, got {tuple(encoded.shape)}")
        if keep_graph:
            chunk.graph = encoded
        if is_counted:
            self._graph_sizes[min(chunk.side, 1)].observe(chunk.tokens, saved.bytes)
        return encoded

    def _stand_in(self, sides, chunk: Chunk, *, has_graph: bool = False, backward: bool = False) -> None:
        """Passes over the shortest row, for the collectives of a chunk that failed. `has_graph`: only its backward was due."""
        other = self._stand_ins[chunk.side]
        frozen = None
        if self.freeze is not None:
            with torch.no_grad():
                frozen = self.freeze[other.side](sides[other.side], other.rows)
        with self.memory.recovery.alone() if has_graph else contextlib.nullcontext(), graph_mode(backward):
            encoded = self._run(self.encode[other.side], sides[other.side], other.rows, frozen)
        if backward and encoded.requires_grad:
            encoded.backward(torch.zeros_like(encoded))

    def _measure_retained(self, sides, chunks) -> frozenset[int]:
        """The last chunks whose graphs fit, judged by those of the first and last chunk of query and target."""
        if not self._graph_sizes:
            before = GeneratorState.capture()
            for side in range(2):
                real = [chunk for chunk in chunks if chunk.side == side and not chunk.is_dummy]
                # A sharded module's forward is collective, and another rank may have more chunks: two always.
                ends = [real[0], real[-1]] if len(real) > 1 or self.sync.is_fsdp else real
                self._graph_sizes[side] = GraphSize.fit([(chunk.tokens, self._graph_bytes(sides, chunk)) for chunk in ends])
            before.restore()
            self.memory.between_passes()  # a stand-in leaves no weights to go on with
        return fitting_chunks([self._graph_sizes[min(c.side, 1)].of(c.tokens) for c in chunks], self.retain_mib, self.sync)

    def _graph_bytes(self, sides, chunk: Chunk) -> float:
        def measure() -> int:
            frozen = None
            if self.freeze is not None:
                with torch.no_grad():
                    frozen = self.freeze[chunk.side](sides[chunk.side], chunk.rows)
            with graph_mode(True), counting_saved() as saved:
                graph = self._run(self.encode[chunk.side], sides[chunk.side], chunk.rows, frozen)  # noqa: F841  keeps it alive
            return saved.bytes

        with self.sync.deferred():
            measured = self.memory.run(measure, partial(self._stand_in, sides, chunk), is_trial=True)
        # No room for a graph: whether the passes fit without one is seen when they run.
        return float("inf") if measured is None else measured

    def _frozen(self, sides, chunk: Chunk, index: int, store: FeatureStore):
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
        with self.sync.deferred():
            result, self._late = embedding_gradients(self.loss, embeddings, options, self.scaler)
        return result

    def _second_pass(self, sides, chunks: list[Chunk], result, features: FeatureStore) -> None:
        gradients = [result.d_query, result.d_target, result.d_hard_negatives]
        # Graphs that were kept go first: each frees its memory before a chunk is encoded again.
        order = [i for i, c in enumerate(chunks) if c.graph is not None]
        order += [i for i, c in enumerate(chunks) if c.graph is None]
        last_of_part = {self.sync.part(chunks[index].side): index for index in order}
        for position, index in enumerate(order):
            chunk = chunks[index]
            coming = order[position + 1 : position + 2]
            self._announce(sides, [chunks[i] for i in coming if chunks[i].graph is None and features.get(i) is None])
            has_graph = chunk.graph is not None
            with self.sync.last_backward() if index in last_of_part.values() else self.sync.deferred():
                self.memory.run(
                    partial(self._backward_chunk, sides, index, chunk, gradients[chunk.side], features),
                    partial(self._stand_in, sides, chunk, has_graph=has_graph, backward=True),
                )
            if self.memory.must_stop:
                break
            features.drop(index)
            chunk.graph = None

    def _backward_chunk(self, sides, index: int, chunk: Chunk, gradient: torch.Tensor | None, features: FeatureStore) -> None:
        """Sends a chunk's rows of the embeddings' gradient through its graph, which is made again where it was not kept."""
        encoded = chunk.graph
        if encoded is None:
            frozen = self._frozen(sides, chunk, index, features)
            chunk.encode_state.restore()
            with graph_mode(True):
                encoded = self._run(self.encode[chunk.side], sides[chunk.side], chunk.rows, frozen)
            self._release(sides, chunk)
        if chunk.is_dummy or gradient is None:
            rows = torch.zeros_like(encoded)
        else:
            rows = gradient[chunk.index(gradient.device)]
        if encoded.requires_grad:
            encoded.backward(scaled(self.scaler, rows).to(encoded.dtype))

    def _announce(self, sides, coming: list[Chunk]) -> None:
        if self.prefetch is not None:
            for chunk in coming:
                self.prefetch[chunk.side](sides[chunk.side], chunk.rows)

    def _release(self, sides, chunk: Chunk) -> None:
        # A dummy's row stands in a real chunk too, which releases it.
        if self.release is not None and not chunk.is_dummy:
            self.release[chunk.side](sides[chunk.side], chunk.rows)
