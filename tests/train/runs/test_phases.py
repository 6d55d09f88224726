"""Where a step's time goes: phases that add up to it, and a trace of one step that Perfetto opens."""

import gzip
import json
import time

import pytest
import torch

from contrastive_kernels.gradcache import Phase
from tests.helpers.tiny_recipe import write_recipe
from train.recipe.schema import load_recipe
from train.reports import phases
from train.reports.phases import DATA, LOGGED, OPTIMIZER, PhaseTimes
from train.run import run
from train.trainer import ContrastiveTrainer

WITHIN = 1e-3 * len(LOGGED)  # ms: each figure of a log line is rounded to 1e-4


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phases")
    write_recipe(folder)
    return folder


def lines(output):
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "loss" in entry]


def test_all_time_between_two_marks_belongs_to_the_first(monkeypatch):
    now = iter([10.0, 10.5, 12.5, 12.75, 13.0, 14.0, 20.0, 21.0])
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(now))
    times = PhaseTimes(torch.device("cpu"))
    times.enter(DATA)  # at 10
    with times.observe(Phase("first pass")):  # 10.5 to 12.5
        with times.observe(Phase("chunk forward", 0)):
            pass
    with times.observe(Phase("loss")):  # 12.75 to 13
        pass
    times.enter(OPTIMIZER)  # 14 to 20
    times.step_ended()
    assert times.drain() == {
        "data_ms": 500.0,
        "first_pass_ms": 2000.0,
        "loss_ms": 250.0,
        "second_pass_ms": 0.0,
        "sync_ms": 0.0,
        "optimizer_ms": 6000.0,
        "other_ms": 2250.0,
        "step_ms": 11000.0,
    }
    assert times.drain() == {}, "no step, no figures"


def test_on_a_gpu_marks_are_events_and_only_the_log_line_waits(monkeypatch):
    """Events of a stream that stands still until somebody waits for it; each mark is one second of the GPU's time."""
    told = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing
            self.at = None

        def record(self, stream):
            assert stream == "the stream in use"
            self.at = len(told)
            told.append("record")

        def synchronize(self):
            told.append("wait")

        def elapsed_time(self, end):
            assert "wait" in told, "an event that the GPU has not come to has no time"
            return 1e3 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the stream in use")
    times = PhaseTimes(torch.device("cuda"))
    times.enter(DATA)
    with times.observe(Phase("first pass")):
        pass
    with times.observe(Phase("loss")):
        pass
    times.enter(OPTIMIZER)
    times.step_ended()
    assert told == ["record"] * 7, "nothing in a step waits"
    figures = times.drain()
    assert told == ["record"] * 8 + ["wait"]
    assert figures == {
        "data_ms": 1000.0,
        "first_pass_ms": 1000.0,
        "loss_ms": 1000.0,
        "second_pass_ms": 0.0,
        "sync_ms": 0.0,
        "optimizer_ms": 1000.0,
        "other_ms": 3000.0,
        "step_ms": 7000.0,
    }


def test_phases_of_a_run_add_up_to_the_wall_clock(root, tmp_path, monkeypatch):
    """Slow data and a slow optimizer show where they are; a step's phases are its time between two log lines."""
    stamps, batch, norm, log = ([], ContrastiveTrainer.get_batch_samples, ContrastiveTrainer._get_grad_norm, ContrastiveTrainer.log)

    class Slow:
        def __init__(self, batches):
            self.batches = batches

        def __next__(self):
            time.sleep(0.2)
            return next(self.batches)

    def slow_norm(self, *args, **kwargs):
        time.sleep(0.1)
        return norm(self, *args, **kwargs)

    def stamped(self, logs, *args):
        log(self, logs, *args)
        stamps.append(time.perf_counter())

    monkeypatch.setattr(ContrastiveTrainer, "get_batch_samples", lambda self, batches, *more: batch(self, Slow(batches), *more))
    monkeypatch.setattr(ContrastiveTrainer, "_get_grad_norm", slow_norm)
    monkeypatch.setattr(ContrastiveTrainer, "log", stamped)
    output = tmp_path / "output"
    assert run([str(write_recipe(root, output=str(output)))]) == 0
    logged = lines(output)
    assert len(logged) == 4
    for entry in logged:
        assert sum(entry[name] for name in LOGGED.values()) == pytest.approx(entry["step_ms"], abs=WITHIN)
        assert all(entry[name] > 0 for name in LOGGED.values()), entry
        assert entry["data_ms"] >= 200 and entry["optimizer_ms"] >= 100
        assert entry["first_pass_ms"] < entry["step_ms"] - 300
    for index in (1, 2, 3):  # logged after its step; the stamp is taken when the line is written
        between = 1e3 * (stamps[index] - stamps[index - 1])
        assert logged[index]["step_ms"] == pytest.approx(between, rel=0.2)


def trace_of(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)


def test_a_trace_of_a_step_holds_its_phases(root, tmp_path, capsys):
    output = tmp_path / "output"
    assert run([str(write_recipe(root, output=str(output))), "--profile", "2"]) == 0
    path = output / "profile-step-2.json.gz"
    assert f"trace of step 2: {path}" in capsys.readouterr().out
    assert [file.name for file in output.glob("*profile*")] == [path.name]
    events = trace_of(path)["traceEvents"]
    spans = {}
    for event in events:
        if event.get("ph") == "X" and str(event["name"]).startswith("step: "):
            spans.setdefault(event["name"].removeprefix("step: "), []).append((event["ts"], event["ts"] + event["dur"]))
    assert {"waiting for data", "first pass", "loss", "second pass", "synchronisation", "optimizer"} <= spans.keys()
    order = [spans[name][0] for name in ("waiting for data", "first pass", "loss", "second pass", "synchronisation", "optimizer")]
    assert all(a[1] <= b[0] for a, b in zip(order, order[1:], strict=False)), "one after the other"
    inner = [span for name, found in spans.items() for span in found if name.startswith("chunk forward")]
    (first,) = spans["first pass"]
    assert len(inner) > 1 and all(first[0] <= begin and end <= first[1] for begin, end in inner)
    assert any(event["name"] == "aten::mm" or event["name"] == "aten::addmm" for event in events), "operators too"


def test_a_trace_changes_nothing_that_is_trained(root, tmp_path):
    losses = []
    for name, more in (("plain", []), ("traced", ["--profile", "1"])):
        output = tmp_path / name
        assert run([str(write_recipe(root, output=str(output), dtype="float64")), *more]) == 0
        losses.append([entry["loss"] for entry in lines(output)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "step,words", [(5, r"profile \(5\) is beyond the last step \(4\); name one from 1 to 4"), (0, "profile must be at least 1")]
)
def test_a_step_that_does_not_exist_is_refused(root, tmp_path, step, words):
    with pytest.raises(ValueError, match=words):
        load_recipe(write_recipe(root, output=str(tmp_path / "o")), ["--profile", str(step)])


def test_a_step_behind_the_checkpoint_is_told_and_a_later_one_traced(root, tmp_path, capsys, monkeypatch):
    output = tmp_path / "output"
    recipe = str(write_recipe(root, output=str(output), save_steps=2))
    training_step = ContrastiveTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise RuntimeError("killed")
        return training_step(self, *args, **kwargs)

    monkeypatch.setattr(ContrastiveTrainer, "training_step", killed)
    with pytest.raises(RuntimeError, match="killed"):
        run([recipe, "--profile", "3"])
    assert not list(output.glob("profile*")), "the step was not finished"
    monkeypatch.undo()
    capsys.readouterr()
    checkpoint = output / "checkpoint-2"
    assert checkpoint.is_dir()
    with monkeypatch.context() as patch:
        patch.setattr(ContrastiveTrainer, "training_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            run([recipe, "--profile", "1"])
    assert "profile: step 1 is behind checkpoint-2" in capsys.readouterr().out
    assert run([recipe, "--profile", "4"]) == 0
    assert (output / "profile-step-4.json.gz").is_file()
    assert run([recipe, "--profile", "4"]) == 0
    assert "--fresh trains it again and traces step 4" in capsys.readouterr().out
