"""Training in several processes, one after the other and together: real ones, with gloo, as torchrun starts them."""

import logging
import os
import shutil
import signal
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_world import CPU, Setup, launch, losses, train, training

from longlive.cli import main
from longlive.training.checkpoint import find_latest, read_keys, read_state
from longlive.training.distribution_matching import Streaming
from longlive.training.metrics import read_metrics
from longlive.training.parallel import fill, process_group, shard, whole
from longlive.training.trainer import EMAConfig, Trainer

TINY_CONFIG = Path(__file__).parents[1] / "configs" / "tiny_train_init.yaml"
EMA = EMAConfig(decay=0.8, start_step=2)
SHORT: dict[str, Any] = {"clip": 4, "switches": (6,), "max_frames": 8}

# After 3 steps the streaming run is in the middle of a sequence whose switch is still to come; it ends in the next one.
FULL = Setup("self_forcing", num_steps=5, save_interval=2, ema=EMA)
LORA = Setup(
    "streaming", num_steps=5, save_interval=2, ema=EMA, has_lora=True, relative=True, switches=(22,), max_frames=24
)


def newest(folder: Path) -> Path:
    latest = find_latest(folder / "checkpoints")
    assert latest is not None
    return latest


def newest_state(folder: Path) -> dict[str, Tensor]:
    """All tensors of a run's newest checkpoint: weights, averages, both optimizers, the sequence in the making."""
    path = newest(folder)
    prefixes = [
        prefix for prefix in ("networks", "stage.samples") if any(k.startswith(prefix) for k in read_keys(path))
    ]
    return {f"{prefix}.{key}": value for prefix in prefixes for key, value in read_state(path, prefix).items()}


def assert_same_run(folder: Path, expected: Path) -> None:
    """Bit for bit: everything logged, everything saved at the end."""
    assert losses(folder) == losses(expected)
    assert newest(folder).name == newest(expected).name
    found, wanted = newest_state(folder), newest_state(expected)
    assert found.keys() == wanted.keys()
    assert all(any(part in name for name in found) for part in (".weights.", ".ema.", ".exp_avg_sq"))
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def assert_close_run(folder: Path, expected: Path, first_step: int = 1) -> None:
    """The same up to rounding, from a step on: Adam makes thousandths of a step, 1e-3, of it where gradients vanish."""
    found, wanted = ([r for r in losses(f) if r["step"] >= first_step] for f in (folder, expected))
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=2e-5)
    states = newest_state(folder), newest_state(expected)
    assert states[0].keys() == states[1].keys()
    for name in states[0]:
        if ".weights." in name or ".ema." in name:
            one, other = (state[name] for state in states)
            assert (one - other).norm() <= 1e-5 * other.norm() + 4e-6, name


# --- what disturbs a run ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Terminate:
    """SIGTERM to one of the processes after a step."""

    step: int
    rank: int = 0

    def __call__(self, trainer: Trainer) -> None:
        trainer.sample = lambda step: self._after(step, trainer)
        trainer.config = replace(trainer.config, sample_interval=1)

    def _after(self, step: int, trainer: Trainer) -> None:
        if step == self.step:
            if isinstance(trainer.stage, Streaming):
                sequence = trainer.stage.sequence
                assert sequence is not None
                assert sequence.switch_frame is not None
                assert trainer.stage.config.num_frames < sequence.num_frames <= sequence.switch_frame
            if trainer.group.rank == self.rank:
                os.kill(os.getpid(), signal.SIGTERM)


@dataclass(frozen=True)
class AtEvent:
    """A signal to this process the first time it opens or renames a file of the checkpoint of a step."""

    number: signal.Signals
    event: str
    file: str

    def __call__(self, trainer: Trainer | None = None) -> None:
        sent = []

        def on_event(event: str, arguments: tuple[Any, ...]) -> None:
            if event == self.event and str(arguments[0]).endswith(self.file) and not sent:
                sent.append(True)
                os.kill(os.getpid(), self.number)

        sys.addaudithook(on_event)


@dataclass(frozen=True)
class Poison:
    """NaN in the gradients of one process after a step."""

    step: int
    rank: int

    def __call__(self, trainer: Trainer) -> None:
        def poisoned(module: nn.Module, inputs: object, output: Tensor) -> None:
            if output.requires_grad and trainer.progress.step == self.step and trainer.group.rank == self.rank:
                output.register_hook(lambda gradient: gradient * torch.nan)

        trainer.networks["critic"].module.head.register_forward_hook(poisoned)  # type: ignore[union-attr]


# --- stopping and going on --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of runs from beginning to end, by stage."""
    folders = {setup.stage: tmp_path_factory.mktemp(setup.stage) for setup in (FULL, LORA)}
    for setup in (FULL, LORA):
        assert launch(train, 1, setup, folders[setup.stage]) == [0]
    return folders


@pytest.mark.parametrize("setup", [FULL, LORA], ids=lambda setup: setup.stage)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, setup: Setup, uninterrupted: dict[str, Path]) -> None:
    assert launch(train, 1, setup, tmp_path, Terminate(3)) == [0]
    assert newest(tmp_path).name == "step_000003"
    assert launch(train, 1, setup, tmp_path) == [0]
    assert_same_run(tmp_path, uninterrupted[setup.stage])
    assert [record["step"] for record in losses(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_run_killed_while_it_saves_goes_on(tmp_path: Path, uninterrupted: dict[str, Path]) -> None:
    kill = AtEvent(signal.SIGKILL, "open", ".step_000004.tmp/__0_0.distcp")
    assert launch(train, 1, LORA, tmp_path, kill) == [-signal.SIGKILL]
    assert newest(tmp_path).name == "step_000002"
    assert launch(train, 1, LORA, tmp_path) == [0]
    assert_same_run(tmp_path, uninterrupted["streaming"])


def command(arguments: list[str], disturb: AtEvent | None = None) -> None:
    """The command line, to its exit code."""
    if disturb is not None:
        disturb()
    sys.exit(main(arguments))


def test_the_command_stops_when_asked_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a red fox\na blue bird\n")
    settings = {
        "logdir": tmp_path / "run",
        "data_path": tmp_path / "prompts.txt",
        "height": 16,
        "width": 16,
        "num_training_frames": 3,
        "adapter.type": "lora",
        "adapter.rank": 2,
        "adapter.alpha": 2,
        "log_iters": 1,
        "vis_interval": 0,
    }
    arguments = ["train", "--config_path", str(TINY_CONFIG), *(f"{key}={value}" for key, value in settings.items())]
    stop = AtEvent(signal.SIGTERM, "os.rename", ".step_000001.tmp")
    assert launch(command, 1, [*arguments, "max_iters=1000"], stop) == [0]
    done = [record["step"] for record in read_metrics(tmp_path / "run")]
    assert newest(tmp_path / "run").name == f"step_{len(done):06d}"
    assert not (tmp_path / "run" / "generator.safetensors").exists()
    assert launch(command, 1, [*arguments, f"max_iters={len(done) + 1}"]) == [0]
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [*done, len(done) + 1]
    assert (tmp_path / "run" / "generator.safetensors").exists()


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("stage", ["self_forcing", "streaming"])
def test_two_processes_are_one(tmp_path: Path, stage: str, has_lora: bool) -> None:
    setup = Setup(stage, num_steps=3, has_lora=has_lora, ema=EMA, **SHORT)
    assert launch(train, 2, setup, tmp_path / "two") == [0, 0]
    train(replace(setup, batch_size=2), tmp_path / "one")
    assert_close_run(tmp_path / "two", tmp_path / "one")


def hold_and_gather(shard_size: int | None) -> None:
    """What a process does: hold its rows of 5 (2, 2, 1 and none; or 3 and 2), and gather all."""
    values = {"weight": torch.arange(15.0).reshape(5, 3), "bias": torch.arange(5.0)}
    with process_group(CPU, shard_size) as group:
        model = nn.Linear(3, 5, device="meta")
        shard(model, group, None)
        fill(model, values.items(), CPU, "values")
        assert all(torch.equal(whole(parameter), values[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("shard_size", [None, 2], ids=["one copy", "two copies"])
def test_rows_that_do_not_divide_come_back_whole(shard_size: int | None) -> None:
    assert launch(hold_and_gather, 4, shard_size) == [0] * 4


def test_several_copies_of_the_weights_are_kept_equal(tmp_path: Path) -> None:
    """Hybrid sharding: 4 processes, of which two and two share a copy."""
    setup = Setup("streaming", num_steps=3, shard_size=2, **SHORT)
    assert launch(train, 4, setup, tmp_path / "four") == [0] * 4
    train(replace(setup, batch_size=4, shard_size=None), tmp_path / "one")
    assert_close_run(tmp_path / "four", tmp_path / "one")


def test_fewer_processes_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    two, one, small = tmp_path / "two", tmp_path / "one", tmp_path / "small"
    # Process 1 alone is told to stop: both do, after the same step.
    assert launch(train, 2, LORA, two, Terminate(3, rank=1)) == [0, 0]
    assert newest(two).name == "step_000003"
    shutil.copytree(two, one)
    shutil.copytree(two, small)
    assert launch(train, 2, LORA, two) == [0, 0]

    with caplog.at_level(logging.WARNING):
        train(replace(LORA, batch_size=2), one)
    assert "samples at a time" not in caplog.text
    assert_close_run(one, two, first_step=4)

    # With half of the samples the sequence cannot go on, and another begins, with the next prompts.
    with training(LORA, small) as trainer:
        stage = trainer.stage
        assert isinstance(stage, Streaming)
        trainer.resume(newest(small))
        assert "The checkpoint is of 2 samples at a time, now 1." in caplog.text
        assert (trainer.progress.step, stage.num_items_used, stage.sequence) == (3, 2, None)
        saved = read_state(newest(small), "networks.generator.weights")
        loaded = trainer.networks["generator"].state()["weights"]
        assert all(torch.equal(whole(loaded[name]), value) for name, value in saved.items())
        assert trainer.fit()
        assert stage.num_items_used > 2
    assert newest(small).name == "step_000005"


def test_what_breaks_on_one_process_stops_all(tmp_path: Path) -> None:
    assert launch(train, 2, FULL, tmp_path, Poison(step=3, rank=1)) == [1, 1]
    assert newest(tmp_path).name == "step_000002"
    assert len(losses(tmp_path)) == 3
