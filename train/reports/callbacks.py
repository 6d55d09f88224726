"""Progress on the terminal, and Ctrl-C that saves before it stops."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm

_SHOWN = {
    "loss": "loss",
    "accuracy": "acc",
    "eval_accuracy": "held-out acc",
    "positive_similarity": "pos",
    "hardest_negative_similarity": "neg",
    "temperature": "T",
    "grad_norm": "grad",
    "learning_rate": "lr",
    "samples_per_second": "samples/s",
    "tokens_per_second": "tokens/s",
    "padding_avoided": "unpadded",
    "peak_memory_mib": "MiB",
}


class Progress(transformers.TrainerCallback):
    """One bar on the main process, with the last log line's figures behind it."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._latest: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            # On a terminal ten times a second; in a file a line every ten seconds.
            interval = 0.1 if sys.stderr.isatty() else 10.0
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="training", unit="step", mininterval=interval, dynamic_ncols=True
            )

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs: Any) -> None:
        if self._bar is not None and logs:
            self._latest.update(logs)
            shown = {short: _brief(self._latest[name]) for name, short in _SHOWN.items() if name in self._latest}
            if shown:
                self._bar.set_postfix(shown, refresh=False)

    def on_train_end(self, args, state, control, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the bar's line, also where training ended in an error."""
        if self._bar is not None:
            self._bar.close()


def _brief(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


class StepEnd(transformers.TrainerCallback):
    """Calls a function where the optimizer's step is over."""

    def __init__(self, function: Callable[[], None]):
        self._function = function

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        self._function()


class StopOnInterrupt(transformers.TrainerCallback):
    """The first Ctrl-C or SIGTERM finishes the step, saves a checkpoint and stops; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
        print("\nfinishing the step, then saving a checkpoint (Ctrl-C again stops at once)", file=sys.stderr)

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        if args.world_size > 1:
            # The signal reaches the ranks at different steps; they stop at the same one.
            flag = torch.tensor(int(self.requested), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self.requested = bool(flag)
        if self.requested:
            control.should_save = True
            control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
