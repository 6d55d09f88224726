"""GradCache: the gradients of a contrastive loss over a large batch in the memory of one chunk.

A step encodes the batch chunk by chunk without a graph, forms the loss and its gradient with respect to the
embeddings, then encodes each chunk again with a graph and sends its rows of that gradient through it. The result
equals one backward through the same chunks with every graph kept. Source: Gao et al., "Scaling Deep Contrastive
Learning Batch Size under Memory Limited Setup" (RepL4NLP 2021).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .checks import check_bounds, side_lengths
from .chunks import Chunk, by_side, make_chunks
from .embedding_gradients import LateGradients, embedding_gradients
from .generator_state import GeneratorState
from .gradient_sync import GradientSync
from .observer import FIRST_PASS, LOSS, SECOND_PASS, SYNCHRONISATION, Observer, Phase, joined
from .out_of_memory import OutOfMemory
from .passes import Callbacks, Passes
from .retention import FeatureStore, GraphSize

logger = logging.getLogger(__name__)


class GradCache:
    """Exact large-batch contrastive gradients, one chunk in memory at a time.

    Args:
        encode: `encode(inputs, rows, features=None) -> (len(rows), D)`, differentiable embeddings of the named rows.
            A pair of such functions encodes query and target apart; hard negatives go with the target.
        loss: `info_nce` (the default), or any callable `loss(query, target, **options) -> scalar`, for example an
            `InfoNCELoss` with a learnable temperature, whose own parameters receive their gradient too. A learned tensor
            that is no leaf goes in as a loss option: captured by the callable, it could not be used twice by a step done again.
            An object with a method `value_and_grad` is asked for loss and gradients as `info_nce_value_and_grad` is.
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
            A `GradientSync` (or one that overrides how ranks agree) is taken as it is.
        scaler: a `torch.amp.GradScaler`; gradients are scaled before they enter the encoder, as `scaler.scale(loss)`
            would.
        observer: told each phase of a step (`gradcache/observer.py`), or several of them: for times, traces and accounts.
        select: `select(chunks) -> chunks`, which of a step's chunks run, for accounts of a part of a step; it may set their
            `retains_graph` and `keeps_features`. Rows of chunks left out have embeddings of no value, and no gradient passes them.

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
        >>> result = cache(queries, targets, normalize=True)  # cache.step by its other name
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
        module: torch.nn.Module | Sequence[torch.nn.Module] | GradientSync | None = None,
        scaler: torch.amp.GradScaler | None = None,
        observer: Observer | Sequence[Observer] | None = None,
        select: Callable[[list[Chunk]], list[Chunk]] | None = None,
    ):
        if (chunk_tokens is None) == (chunk_size is None):
            raise ValueError(
                f"expected exactly one of chunk_tokens and chunk_size, got {chunk_tokens!r} and {chunk_size!r}; "
                "they are two ways to cut a batch"
            )
        check_bounds(chunk_tokens=chunk_tokens, chunk_size=chunk_size, retain_mib=retain_mib, keep_mib=keep_mib)
        if not (retain in ("all", "auto") or (isinstance(retain, int) and not isinstance(retain, bool) and retain >= 0)):
            raise ValueError(f'retain: expected a number of chunks, "all" or "auto", got {retain!r}; 0 keeps no graph')
        if retain == "auto" and retain_mib is None and not torch.cuda.is_available():
            raise ValueError('retain_mib: expected MiB beside retain="auto" where no GPU\'s free memory bounds it, got None; pass a bound')
        self.callbacks = Callbacks(
            by_side(encode), *(by_side(function) if function is not None else None for function in (freeze, prefetch, release))
        )
        self.loss = loss
        self.chunk_tokens, self.chunk_size = chunk_tokens, chunk_size
        self.retain, self.retain_mib = retain, retain_mib
        self.keep_mib = keep_mib
        self.observe, self.select = joined(observer), select
        self.sync = module if isinstance(module, GradientSync) else _sync_of(module, loss)
        self.memory = OutOfMemory(self.sync)
        self.scaler = scaler
        self._graph_sizes: dict[int, GraphSize] = {}
        self._late = LateGradients()

    def step(
        self,
        query: Any,
        target: Any,
        *,
        lengths: tuple[Sequence[int], ...] | None = None,
        hard_negatives: Any = None,
        late_options: Callable[[], dict[str, Any]] | None = None,
        **loss_options: Any,
    ):
        """Loss of the whole batch; gradients are added to `.grad` of everything `encode` used.

        Args:
            query, target: inputs of the two sides, of any type; handed to `encode` as they are.
            lengths: tokens per row: (query lengths, target lengths), and a third for `hard_negatives`. With `chunk_size` it may be
                left out where the sides say their rows (`len`, or the rows of their tensors): chunks then keep the caller's order.
            hard_negatives: inputs of the packed hard negatives (H rows); pass `hard_offsets` (N+1,) as loss option.
            late_options: called after the first pass for more loss options, such as a mask of rows that turned out to be
                unreadable while they were encoded.
            loss_options: options of the loss: `temperature`, `positives`, `target_ids`, ... A `temperature` tensor that
                requires grad receives its gradient.

        Returns:
            `InfoNCEResult` with the loss, detached; with another loss than `info_nce`, its stats are empty.

        Raises:
            ValueError: where lengths do not match the sides or their rows, or a side is empty.
            torch.OutOfMemoryError: where a step cannot be undone, or runs out of memory after the budget was halved.
        """
        sides = [query, target] + ([hard_negatives] if hard_negatives is not None else [])
        lengths = side_lengths(sides, lengths, needed=self.chunk_size is None)
        with self.memory.watching():
            result = self._attempt(sides, lengths, loss_options, late_options)
            if result is None:
                self.memory.undo()
                self._halve()
                result = self._attempt(sides, lengths, loss_options, late_options)
        return result

    __call__ = step

    def chunks(self, lengths: tuple[Sequence[int], ...]) -> list[Chunk]:
        """The chunks of a step over rows of these lengths, in the order of the first pass. Collective where a module is sharded.

        Args:
            lengths: tokens per row by side, as for `step`.

        Raises:
            ValueError: the query or target side is empty.
        """
        return make_chunks(lengths, self.chunk_tokens, self.chunk_size, self.sync)

    def _attempt(self, sides, lengths, loss_options, late_options):
        """One whole step; None where some rank ran out of memory and the step can be undone."""
        self.memory.begin()
        chunks = self.chunks(lengths)
        passes = Passes(
            self.callbacks,
            sides,
            lengths,
            chunks if self.select is None else self.select(chunks),
            FeatureStore(self.keep_mib),
            sync=self.sync,
            memory=self.memory,
            scaler=self.scaler,
            observe=self.observe,
            graph_sizes=self._graph_sizes,
        )
        with self.observe(Phase(FIRST_PASS)):
            embeddings = passes.first(self.retain, self.retain_mib)
        if self.memory.failed():
            return None
        self.memory.between_passes()
        after_first_pass = GeneratorState.capture()
        options = loss_options if late_options is None else {**loss_options, **late_options()}
        with self.observe(Phase(LOSS, tensors=tuple(embeddings))), self.sync.deferred():
            result, self._late = embedding_gradients(self.loss, embeddings, options, self.scaler)
        gradients = (result.d_query, result.d_target, result.d_hard_negatives)[: len(sides)]
        with self.observe(Phase(SECOND_PASS, tensors=gradients)):
            passes.second(gradients)
        if self.memory.failed():
            return None
        with self.observe(Phase(SYNCHRONISATION)):
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


def _sync_of(module: torch.nn.Module | Sequence[torch.nn.Module] | None, loss: Callable | None) -> GradientSync:
    modules = [] if module is None else [module] if isinstance(module, torch.nn.Module) else [*module]
    if isinstance(loss, torch.nn.parallel.DistributedDataParallel):
        modules.append(loss)  # its reductions are deferred like the others'
    return GradientSync(modules)
