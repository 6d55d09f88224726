"""One run of a recipe: start, resume or recognise that it is finished; train; publish the model."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from vlm2vec.files import give_umask_mode, sync_to_disk, sync_tree_to_disk, writing
from vlm2vec.files.locks import LOCK, locked

from . import checkpoints, preflight
from .build import build_model, trained_parameters
from .data.fingerprints import changed, fingerprints
from .data.rows import PairDataset
from .parallel import sharding
from .parallel.launch import idle_gpus, ranks, refuse_other_launchers
from .recipe.from_yaml import build
from .recipe.schema import Recipe, load_recipe
from .reports.callbacks import Progress, StopOnInterrupt
from .reports.card import model_card
from .reports.metrics import peak_memory_mib
from .trainer import ContrastiveTrainer

# Keys that may change between a run and its resumption without changing what is computed.
_FREE_KEYS = {
    "workers",
    "decode_threads",
    "save_steps",
    "keep_checkpoints",
    "logging_steps",
    "report_to",
    "run_name",
    "keep_mib",
    "media_mib",
    "offload_activations",
    "output",
    "plan",
    "profile",
}
# Keys that a run which stopped is told to mend: its resumption may have other ones, and says so.
_MENDS = {"learning_rate", "max_grad_norm", "chunk_tokens", "chunk_rows", "retain", "retain_mib", "gradient_checkpointing"}


def run(argv: list[str]) -> int:
    """Exit code of `python -m train` with these arguments. Raises ValueError for what the user can mend."""
    fresh = "--fresh" in argv
    recipe = load_recipe(argv[0], [word for word in argv[1:] if word != "--fresh"])
    recipe.check_ranks(ranks())
    refuse_other_launchers()
    output = Path(recipe.output)
    is_main = int(os.environ.get("RANK", "0")) == 0
    with locked(output, "a training run") if is_main else contextlib.nullcontext():
        return _run(recipe, output, fresh, is_main)


def _run(recipe: Recipe, output: Path, fresh: bool, is_main: bool) -> int:
    """`run` of a checked recipe, while the output is this run's alone."""
    inputs = fingerprints(recipe)
    finished = not fresh and _is_finished(recipe, output, inputs)
    _wait_for_everyone()  # all have looked before the main process changes anything
    if finished:
        if is_main:
            untraced = "" if recipe.profile is None else f" and traces step {recipe.profile}"
            print(f"{output} is already trained by this recipe; --fresh trains it again{untraced}")
        return 0
    resumable = [] if fresh else checkpoints.complete_checkpoints(output)
    checkpoint = resumable[-1] if resumable else None
    if fresh:
        _require_discardable(output)
    mended = []
    if checkpoint is not None:
        mended = _require_same(recipe, output, checkpoint, inputs)
        checkpoints.require_whole(checkpoint)
    preflight.check(recipe, ranks=ranks(), resumed=checkpoint is not None)
    if is_main:
        print(recipe.to_yaml(), end="")
        if (hint := idle_gpus()) and not recipe.cpu:
            print(hint)
        other = f" with other {', '.join(mended)}" if mended else ""
        print(f"resuming from {checkpoint}{other}" if checkpoint else f"starting from {recipe.model}", flush=True)
        if checkpoint is not None and recipe.profile is not None and recipe.profile <= checkpoints.step_of(checkpoint):
            print(f"profile: step {recipe.profile} is behind {checkpoint.name}, so no trace is written; name a later step, or pass --fresh")
    transformers.set_seed(recipe.seed)
    model = build_model(recipe, checkpoint, device="cpu" if recipe.cpu else None)
    data = PairDataset(recipe.data, model.processing, recipe.held_out_rows)
    _wait_for_everyone()
    if is_main:
        for source, table in zip(recipe.data.sources, data.tables):
            if table.left_out:
                print(f"source {source.name}: {len(table.left_out)} lines are no rows and left out, the first: {table.left_out[0]}")
    if is_main:  # only now that model and data are known to be there
        if fresh:
            _discard(output)
        output.mkdir(parents=True, exist_ok=True)
        checkpoints.remove_unfinished(output)
        checkpoints.write_text(output / checkpoints.INPUTS, json.dumps(inputs, indent=1))
        checkpoints.write_text(output / checkpoints.RECIPE, recipe.to_yaml())
    _wait_for_everyone()
    weights = trained_parameters(model)
    if is_main:
        print(f"training {weights[0]:,} of {weights[1]:,} parameters", flush=True)
    if recipe.distributed == "fsdp" and ranks() > 1:
        sharding.shard(model, getattr(torch, recipe.autocast) if recipe.autocast else None)
    interrupt = StopOnInterrupt()
    trainer = ContrastiveTrainer(recipe, model, data, [interrupt])
    trainer.remove_callback(transformers.trainer_callback.ProgressCallback)
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    progress = Progress()
    trainer.add_callback(progress)
    trainer.weights = weights
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        progress.close()
        if trainer.profile is not None:
            trainer.profile.abandon()
    if interrupt.requested and trainer.state.global_step < recipe.steps:
        if is_main:
            print(f"stopped at step {trainer.state.global_step} of {recipe.steps}; the same command goes on from there")
        return 130
    with writing(output):
        _publish(trainer, recipe, output)
    _wait_for_everyone()
    return 0


def _publish(trainer: ContrastiveTrainer, recipe: Recipe, output: Path) -> None:
    """Puts the trained model into the output folder itself; the result file comes last and says that it is whole."""
    staged = output / checkpoints.STAGING
    if trainer.args.should_save:
        shutil.rmtree(staged, ignore_errors=True)
    trainer.save_model(str(staged))  # on every rank: shards are gathered
    if not trainer.args.should_save:
        return
    trainer.state.save_to_json(str(staged / "trainer_state.json"))
    last = next((entry for entry in reversed(trainer.state.log_history) if "loss" in entry), {})
    last = {**last, **next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), {})}
    trained, total = trainer.weights
    card = model_card(
        recipe,
        base=recipe.model,
        family=trainer.model.family,
        trained=trained,
        total=total,
        steps=trainer.state.global_step,
        figures=last,
        prompts=trainer.model.prompts,
    )
    (staged / "README.md").write_text(card, encoding="utf-8")
    published = sorted(file.name for file in staged.iterdir())
    give_umask_mode(staged)
    sync_tree_to_disk(staged)
    for name in published:
        _take_place(staged / name, output / name)
    staged.rmdir()
    sync_to_disk(output)  # the result file below says that all of this is there
    seconds = trainer.seconds()
    result: dict[str, Any] = {
        "steps": trainer.state.global_step,
        "loss": last.get("loss"),
        "accuracy": last.get("accuracy"),
        **{name: value for name, value in last.items() if name.startswith("eval_")},
        "seconds": round(seconds, 1),
        "peak_memory_mib": round(peak_memory_mib(trainer.args.device), 1),
        "files": published,
        "recipe": recipe.to_dict(),
    }
    checkpoints.write_text(output / checkpoints.RESULT, json.dumps(result, indent=1))
    print(f"trained {result['steps']} steps in {seconds:.0f} s, peak memory {result['peak_memory_mib']:.0f} MiB: {output}")


def _take_place(staged: Path, final: Path) -> None:
    """A file or folder under its published name; an earlier run's folder of that name goes first, since no rename replaces it."""
    if final.is_dir() and not final.is_symlink():
        shutil.rmtree(final)
    os.replace(staged, final)


def _is_finished(recipe: Recipe, output: Path, inputs: dict[str, str]) -> bool:
    """Whether the output holds the model of this recipe. More steps than it was trained for are a run that goes on."""
    result = checkpoints.read_result(output)
    if result is None:
        return False
    if not isinstance(result.get("recipe"), dict):
        raise ValueError(f"{output / checkpoints.RESULT} names no recipe; remove it, or pass --fresh")
    other = _changed_keys(result["recipe"], recipe.to_dict())
    longer = recipe.steps > result.get("steps", 0) and bool(checkpoints.complete_checkpoints(output))
    if "steps" in other and longer:
        del other["steps"]
        _refuse_changes(f"{output} holds a model trained", other, output, inputs, output)
        return False
    _refuse_changes(f"{output} holds a model trained", other, output, inputs, output)
    return True


def _require_same(recipe: Recipe, output: Path, checkpoint: Path, inputs: dict[str, str]) -> list[str]:
    """Refuses a resumption by another recipe. Returns what the resumption changes: keys of `_MENDS`, and `steps` that are still to come."""
    path = output / checkpoints.RECIPE
    if not path.is_file():
        raise ValueError(f"{checkpoint} has no {checkpoints.RECIPE} beside it; choose another output, or pass --fresh")
    other = _changed_keys(checkpoints.read_mapping(path), recipe.to_dict())
    mends = _MENDS | ({"steps"} if recipe.steps > checkpoints.step_of(checkpoint) else set())
    _refuse_changes(f"{checkpoint} was made", {key: pair for key, pair in other.items() if key not in mends}, output, inputs, checkpoint)
    return sorted(mends.intersection(other))


def _refuse_changes(what: str, other: dict[str, tuple[Any, Any]], output: Path, inputs: dict[str, str], model: Path) -> None:
    """Refuses keys, {name: (old, new)}, and inputs that are not those of the earlier run, whose weights are in `model`."""
    way_on = f"go on from its weights with --model {model} --output NEW, choose another output, or pass --fresh"
    if other:
        raise ValueError(f"{what} with other {', '.join(_told(key, *pair) for key, pair in other.items())}; {way_on}")
    path = output / checkpoints.INPUTS
    contents = changed(checkpoints.read_mapping(path), inputs) if path.is_file() else []
    if contents:
        raise ValueError(f"{what} from other contents of {', '.join(contents)}; choose another output, or pass --fresh")


def _told(key: str, old: Any, new: Any) -> str:
    """`key (old, now new)`; of sections the keys below it that differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        return ", ".join(_told(f"{key}.{name}", old.get(name), new.get(name)) for name in {**old, **new} if old.get(name) != new.get(name))
    return f"{key} ({_short(old)}, now {_short(new)})"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _changed_keys(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Top-level keys that differ, with the old value and the new. A key that the earlier recipe did not know had its default."""
    before = build(Recipe, {key: value for key, value in before.items() if key in now}, where="").to_dict()
    return {key: (before[key], now[key]) for key in now if key not in _FREE_KEYS and before[key] != now[key]}


def _require_discardable(output: Path) -> None:
    if (
        not any((output / name).is_file() for name in (checkpoints.INPUTS, checkpoints.RESULT))
        and output.is_dir()
        and any(entry.name != LOCK for entry in output.iterdir())
    ):
        raise ValueError(f"{output} is not empty and holds no earlier run; choose another output")


def _discard(output: Path) -> None:
    """Removes what an earlier run wrote into the folder, by name; whatever else is there stays.

    The result file, which says that a model is whole, goes first; the inputs, by which the folder is known, last.
    """
    try:
        published = (checkpoints.read_result(output) or {}).get("files", [])
    except ValueError:  # damaged: its run is discarded all the same
        published = []
    (output / checkpoints.RESULT).unlink(missing_ok=True)
    checkpoints.remove_unfinished(output)
    checkpoints.discard(output)
    for name in [*published, checkpoints.RECIPE, checkpoints.INPUTS]:
        if (output / name).is_dir():
            shutil.rmtree(output / name)
        else:
            (output / name).unlink(missing_ok=True)


def _wait_for_everyone() -> None:
    if ranks() > 1:
        import accelerate

        accelerate.PartialState().wait_for_everyone()
