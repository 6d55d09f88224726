"""The trainer: transformers' own loop, checkpoints, schedule and launching, with a GradCache step inside."""

from __future__ import annotations

import functools
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from contrastive_kernels.gradcache.generator_state import GeneratorState
from vlm2vec.files import writing

from . import checkpoints
from .data import held_out
from .data.rows import PairDataset, collate, longest_sample
from .data.sampler import BlockSampler
from .data.unreadable_rows import UnreadableRows
from .losses import learned as learned_loss
from .parallel import sharding
from .parallel.launch import refuse_other_launchers
from .recipe.schema import Recipe
from .reports.callbacks import StepEnd
from .reports.metrics import StepStats
from .reports.phases import DATA, OPTIMIZER, OTHER, PhaseTimes
from .reports.profile import StepProfile
from .step import ContrastiveStep

logger = logging.getLogger(__name__)


class ContrastiveTrainer(transformers.Trainer):
    """Trains a `VLM2Vec` by a recipe. Differences from its base class:

    * a step is one `GradCache.step` over this rank's share of the global batch;
    * batches come from `BlockSampler`, so they depend on (seed, step) alone;
    * a checkpoint is a loadable model folder and appears by one rename.

    Args:
        recipe: what to train and how.
        model: a `VLM2Vec`; when resuming, already loaded from the checkpoint.
        dataset: rows of the recipe's sources.
    """

    def __init__(self, recipe: Recipe, model: torch.nn.Module, dataset: PairDataset, callbacks: list | None = None):
        self.recipe = recipe
        refuse_other_launchers()
        arguments = training_arguments(recipe)
        if recipe.global_batch % arguments.world_size:
            raise ValueError(f"global_batch ({recipe.global_batch}) must be divisible by the number of ranks ({arguments.world_size})")
        self.sharded = sharding.is_sharded(model)
        dtype = torch.float64 if recipe.dtype == "float64" else torch.float32
        self.loss = learned_loss.attach(recipe.objective, model, device=arguments.device, dtype=dtype)
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=dataset,
            eval_dataset=dataset if recipe.held_out else None,
            data_collator=collate,
            callbacks=callbacks,
        )
        if self.sharded:
            # The shards are placed and their gradients reduced by FSDP2: nothing of it is accelerate's to wrap.
            self.accelerator.prepare_model = functools.partial(self.accelerator.prepare_model, evaluation_mode=True)
        self._staging: str | None = None
        self._stats = StepStats()
        self._times = PhaseTimes(arguments.device)
        self.profile: StepProfile | None = None
        if recipe.profile is not None:
            self.profile = StepProfile(recipe.profile, Path(recipe.output), arguments.process_index, arguments.world_size)
        self.add_callback(StepEnd(self._step_ended))
        self._step: ContrastiveStep | None = None
        self._unreadable = UnreadableRows()
        self._warned_of_length = False
        self._generators_from: str | None = None
        self._began: float | None = None
        self._seconds_before = 0.0

    # Data

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        return self.loader(self.args.process_index, self.args.world_size)

    def loader(self, rank: int, world_size: int) -> torch.utils.data.DataLoader:
        """The batches of one rank, in order."""
        recipe, dataset = self.recipe, self.train_dataset
        sampler = BlockSampler(
            dataset.sizes,
            [source.weight for source in recipe.data.sources],
            global_batch=recipe.global_batch,
            block=recipe.interleave_batch_size,
            steps=recipe.steps,
            seed=recipe.seed,
            from_step=[source.from_step for source in recipe.data.sources],
            rank=rank,
            world_size=world_size,
        )
        # Not prepared by accelerate: the sampler has already taken this rank's share, and chunks go to the device one
        # by one.
        return torch.utils.data.DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=recipe.workers,
            persistent_workers=False,
            # Samples are small, undecoded, but a large batch holds many of them.
            prefetch_factor=(2 if recipe.global_batch // world_size <= 2048 else 1) if recipe.workers else None,
        )

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        if self.profile is not None and self.state.global_step + 1 == self.profile.step:
            self.profile.start()
        self._enter(DATA)
        try:
            batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        except ValueError as error:
            if not str(error).startswith("Caught "):
                raise
            # From a worker, its traceback in front.
            raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error
        self._enter(OTHER)
        return batch

    # The step

    def seconds(self) -> float:
        """Seconds of training, those before an interruption included up to their last logged step."""
        return self._seconds_before + (time.perf_counter() - self._began if self._began is not None else 0.0)

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        model.train()
        if self._began is None:
            self._began = time.perf_counter()
            self._seconds_before = max((entry.get("seconds", 0.0) for entry in self.state.log_history), default=0.0)
        if self._generators_from is not None:
            with checkpoints.reading(self._generators_from, "rng_state.pth" if self.args.world_size <= 1 else "rng_state_*.pth"):
                super()._load_rng_state(self._generators_from)
            self._generators_from = None
        self._before, self._rows = GeneratorState.capture(), inputs["rows"]
        self._warn_of_length(inputs)
        result, lengths = self._contrastive_step(model)(inputs)
        for error in inputs["errors"]:
            logger.warning("left out of step %d: %s", self.state.global_step + 1, error)
        self._unreadable.add(
            inputs["errors"],
            self.recipe.global_batch,
            device=self.args.device,
            world_size=self.args.world_size,
            is_last=self.state.global_step + 1 == self.recipe.steps,
        )
        if not torch.isfinite(result.loss):
            self._stop(f"the loss is {result.loss.item()}", inputs["rows"])
        self._stats.add(result, lengths)
        self._enter(OPTIMIZER)
        return result.loss.detach().float()

    def _enter(self, phase: str) -> None:
        """From here on time belongs to `phase`, in the log and in a trace."""
        self._times.enter(phase)
        if self.profile is not None:
            self.profile.enter(None if phase == OTHER else phase)

    def _step_ended(self) -> None:
        self._times.step_ended()
        if self.profile is not None and self.profile.is_running:
            path = self.profile.finish()
            if self.is_world_process_zero():
                others = ", a file of each rank" if self.args.world_size > 1 else ""
                tqdm.write(f"trace of step {self.profile.step}: {path}{others}; open it at https://ui.perfetto.dev", file=sys.stdout)

    def _contrastive_step(self, model: torch.nn.Module) -> ContrastiveStep:
        if self._step is None:
            self._step = ContrastiveStep(
                self.recipe,
                model,
                self.accelerator.unwrap_model(model),
                device=self.args.device,
                autocast=self.accelerator.autocast,
                scaler=self.accelerator.scaler,
                world_size=self.args.world_size,
                loss=self.loss,
                observer=[self._times.observe, *([self.profile.observe] if self.profile is not None else [])],
            )
        return self._step

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Scores the held-out rows (`train.data.held_out`) and logs them. Called on every rank."""
        step = self._contrastive_step(self.model_wrapped)
        figures = held_out.evaluate(step, self.train_dataset, self.recipe, self.args.process_index, self.args.world_size)
        if figures:
            self.log(figures)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)
        return figures

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        if not torch.isfinite(torch.as_tensor(norm)):
            scaler = self.accelerator.scaler
            # A gradient scaler expects overflows: it skips the step and halves its scale, until that cannot be the cause.
            if scaler is None or scaler.get_scale() < 1:
                at = "" if scaler is None else f" at a scale of {scaler.get_scale():g}"
                self._stop(f"the gradient's norm is {float(norm)}{at}", self._rows)
        return norm

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Waits for the first step, so that what is drawn on the way there, by a loader's start, moves nothing."""
        self._generators_from = checkpoint

    def _warn_of_length(self, inputs: dict[str, Any]) -> None:
        """Once: a sample longer than a chunk's budget is a chunk of its own, and memory must hold it."""
        if self._warned_of_length or self.recipe.chunk_rows is not None:
            return
        row, tokens = longest_sample(inputs)
        if tokens > self.recipe.chunk_tokens:
            self._warned_of_length = True
            logger.warning(
                "%s, row %d has %d tokens, more than chunk_tokens (%d): such samples are chunks of their own",
                self.recipe.data.sources[row[0]].name,
                row[1],
                tokens,
                self.recipe.chunk_tokens,
            )

    def _clip_grad_norm(self, model):
        if self.sharded:
            return sharding.gradient_norm(list(model.parameters()), self.args.max_grad_norm)
        return super()._clip_grad_norm(model)

    def _stop(self, what: str, rows: list[tuple[int, int]]) -> None:
        """Saves the state before this step, then stops the run with the step, the rows and their sources named."""
        step = self.state.global_step + 1
        self._before.restore()
        self.model.zero_grad(set_to_none=True)
        self._save_checkpoint(self.model_wrapped, None)
        bad_rows = self._step.not_finite(rows)
        if self.args.world_size > 1:
            everyone: list[Any] = [None] * self.args.world_size
            torch.distributed.all_gather_object(everyone, (rows, bad_rows))
            rows, bad_rows = ([row for rank in everyone for row in rank[i]] for i in range(2))
        message = failure(what, step, [source.name for source in self.recipe.data.sources], rows, bad_rows)
        raise FloatingPointError(
            f"{message}; the state before the step is in checkpoint-{step - 1}, and the same command goes on from there"
        )

    # Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.recipe.objective.figures(self.loss))
            logs.update(self._stats.drain(self.args.device, self.args.world_size))
            logs.update(self._times.drain())
            logs["seconds"] = round(self.seconds(), 3)
        super().log(logs, start_time)

    # Checkpoints

    def _get_output_dir(self, trial) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial) -> None:
        output = Path(self.args.output_dir)
        name = f"checkpoint-{self.state.global_step}"
        self._staging = os.fspath(output / checkpoints.STAGING)
        try:
            with writing(output / name):
                super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        if self.args.world_size > 1:
            torch.distributed.barrier()  # every rank's random state is in the folder
        if self.args.should_save:
            checkpoints.publish(output / checkpoints.STAGING / name, output / name)
            checkpoints.rotate(output, self.recipe.keep_checkpoints)
        if self.args.world_size > 1:
            torch.distributed.barrier()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the model's folder. Called on every rank: shards are gathered."""
        weights = sharding.gathered_weights(self.model) if self.sharded else None
        if self.args.should_save:
            self.model.save_pretrained(output_dir or self.args.output_dir, state_dict=weights)
            learned_loss.save(self.loss, output_dir or self.args.output_dir)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = sharding.gathered_optimizer(self.model, self.optimizer.optimizer)
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, OPTIMIZER_NAME))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        # not by transformers: of two ranks on a CPU 5.17 asks torch for "cpu:0", which torch.load does not know
        with checkpoints.reading(checkpoint, OPTIMIZER_NAME):
            state = torch.load(os.path.join(checkpoint, OPTIMIZER_NAME), map_location="cpu", weights_only=True, mmap=self.sharded)
        with checkpoints.reading(checkpoint, SCHEDULER_NAME):
            schedule = torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True)
        if self.sharded:
            sharding.scatter_optimizer(self.model, self.optimizer.optimizer, state)
        else:
            self.optimizer.load_state_dict(state)
        self.lr_scheduler.load_state_dict(schedule)
        self._take_learning_rate()

    def _take_learning_rate(self) -> None:
        """The recipe's, where a run goes on with another one than its checkpoint's, at the same place of the schedule."""
        scheduler, rate = self.lr_scheduler, self.args.learning_rate
        if all(base == rate for base in scheduler.base_lrs):
            return
        scheduler.base_lrs = [rate] * len(scheduler.base_lrs)
        for group, share in zip(scheduler.optimizer.param_groups, scheduler.lr_lambdas):
            group["initial_lr"], group["lr"] = rate, rate * share(scheduler.last_epoch)
        scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """Loads what the loss learned. The model was loaded from the checkpoint, so that its weights are in memory only once."""
        learned_loss.load(self.loss, resume_from_checkpoint)

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.sharded:
            learned = [p for name, p in self.model.named_parameters() if name.startswith(learned_loss.PREFIX)]
            sharding.group_apart(self.optimizer, learned)
        return optimizer

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """All weights that decay; what a loss learned does not."""
        return [name for name in super().get_decay_parameter_names(model) if not name.startswith(learned_loss.PREFIX)]


def training_arguments(recipe: Recipe) -> transformers.TrainingArguments:
    """The library's arguments for a recipe."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = transformers.TrainingArguments(
        output_dir=recipe.output,
        max_steps=recipe.steps,
        per_device_train_batch_size=max(1, recipe.global_batch // world_size),
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.lr_schedule,
        warmup_steps=recipe.warmup_steps,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        optim=recipe.optimizer,
        bf16=recipe.autocast == "bfloat16",
        fp16=recipe.autocast == "float16",
        logging_steps=recipe.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if recipe.held_out else "no",
        eval_steps=recipe.held_out.steps if recipe.held_out else None,
        save_steps=recipe.save_steps,
        save_total_limit=None,  # rotation is ours: after the rename
        seed=recipe.seed,
        report_to=recipe.report_to or "none",
        run_name=recipe.run_name,
        remove_unused_columns=False,
        use_cpu=recipe.cpu,
        dataloader_num_workers=recipe.workers,
    )
    # One process drives one GPU. The library would spread the model over all it sees by nn.DataParallel, which cuts a packed
    # chunk anywhere.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def failure(what: str, step: int, names: list[str], rows: list[tuple[int, int]], bad_rows: list[tuple[int, int]]) -> str:
    """One line on a step that gave no finite loss or gradient: whose rows they were, and what to do about it."""
    listed = bad_rows or rows
    sources = ", ".join(sorted({names[source] for source, _ in listed}))
    shown = ", ".join(f"{names[source]}:{row}" for source, row in listed[:8]) + (", ..." if len(listed) > 8 else "")
    if 0 < len(bad_rows) < len(rows):
        return (
            f"step {step}: {what}; {len(bad_rows)} of {len(rows)} rows have embeddings that are not finite: "
            f"{shown} (source {sources}); mend or leave out these rows"
        )
    which = "no embedding is finite, so the weights are not" if bad_rows else "all embeddings are finite"
    return f"step {step}: {what}; {which}; rows {shown} (source {sources}); lower learning_rate or max_grad_norm, or look at these rows"
