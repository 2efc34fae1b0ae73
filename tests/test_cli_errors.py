"""The command line: exit codes, one-line errors, help."""

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longlive import cli
from longlive.config import InferenceConfig, Section, config_keys
from longlive.errors import OUT_OF_MEMORY, InputError
from longlive.train_config import TrainConfig

ROOT = Path(__file__).parents[1]


def failure(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that must exit with 2 and print nothing else."""
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def run(cwd: Path, *arguments: str, stdout: int = subprocess.PIPE) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["inferense"], "invalid choice: 'inferense'"),
        (["--sed"], "required: command"),
        (["inference", "num_ouput_frames=3"], "did you mean 'num_output_frames'?"),
        (["interactive", "model_kwargs.sinksize=3"], "did you mean 'model_kwargs.sink_size'?"),
        (["inference", "seed=1", "--config_path", "none.yaml", "fps=8"], "none.yaml: cannot read"),
        (["inference", "--config-path", "none.yaml"], "none.yaml: cannot read"),
        (["inference", "--config_path"], "--config_path/--config-path: expected one argument"),
        (["inference", "--config", "x.yaml"], "unknown option --config: settings are written key=value"),
        (["inference", "--seed", "3"], "unknown option --seed: settings are written key=value"),
        (["inference", "--seed=3"], "unknown option --seed=3: settings are written key=value"),
        (["inference", "seed=1", "--config_path", str(ROOT / "configs/longlive_inference.yaml"), "fps=0"], "fps=0"),
        (["inference", "prompt=a\n| b |"], "prompt=a | b |"),
        (["live", "prompt=a red circle"], "prompt means nothing to live"),
    ],
)
def test_mistakes_are_one_line(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in failure(argv, capsys)


def test_each_command_has_its_own_default_file(capsys: pytest.CaptureFixture[str]) -> None:
    # The files differ in num_output_frames, which only fits the blocks of the other one.
    assert "num_output_frames=120" in failure(["inference", "num_frame_per_block=7"], capsys)
    assert "num_output_frames=240" in failure(["interactive", "num_frame_per_block=7"], capsys)


def fail_with(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("two\nlines"), "error: two lines\n"),
        (torch.OutOfMemoryError("CUDA out of memory"), f"error: {OUT_OF_MEMORY}\n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), f"error: {OUT_OF_MEMORY}\n"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), f"error: {OUT_OF_MEMORY}\n"),
        (OSError(errno.ENOSPC, "No space left on device", "v.mp4"), "error: No space left on device: v.mp4\n"),
        (PermissionError(errno.EACCES, "Permission denied", "videos"), "error: Permission denied: videos\n"),
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device\n"),
    ],
)
def test_failures_the_user_can_mend(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.exit_code(lambda: fail_with(error)) == 2
    assert capsys.readouterr().err == line


def test_a_broken_run_is_no_mistake_of_the_user(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.exit_code(lambda: fail_with(cli.BrokenRunError("step 3: loss"))) == 1
    assert capsys.readouterr().err == "error: step 3: loss\n"


def test_interruption(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.exit_code(lambda: fail_with(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err.startswith("interrupted; what is complete is kept")


@pytest.mark.parametrize("error", [RuntimeError("shapes"), OSError(errno.EIO, "input/output"), ValueError("a bug")])
def test_bugs_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        cli.exit_code(lambda: fail_with(error))


@pytest.mark.parametrize(
    ("command", "schema"), [("inference", InferenceConfig), ("interactive", InferenceConfig), ("train", TrainConfig)]
)
def test_help_lists_every_key(command: str, schema: type[Section], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for key in config_keys(schema).values():
        assert f"  {key.name}  {key.type_name}, {key.default_text}" in lines
    assert any("relative to the working directory" in line for line in lines)


@pytest.mark.parametrize("argv", [["--help"], []])
def test_help_lists_the_commands(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in cli.COMMANDS)


@pytest.mark.parametrize(("rank", "level"), [("0", logging.INFO), ("1", logging.WARNING)])
def test_only_the_main_process_tells_of_progress(
    rank: str, level: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    failure(["inference", "seed=x"], capsys)
    assert logging.getLogger("longlive.inference").getEffectiveLevel() == level
    assert logging.getLogger("another.library").getEffectiveLevel() == logging.WARNING


def test_processes_from_any_directory(tmp_path: Path) -> None:
    version = run(tmp_path, "-m", "longlive", "--version")
    assert (version.returncode, version.stderr) == (0, "")
    assert version.stdout.startswith("longlive ")
    wrong = run(tmp_path, "-m", "longlive", "interactive", "sede=3")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "error: command line: unknown key 'sede'; did you mean 'seed'?\n"


@pytest.mark.parametrize("command", ["inference", "train", "export", "plot"])
def test_help_needs_no_heavy_module(command: str, tmp_path: Path) -> None:
    done = run(tmp_path, "-X", "importtime", "-m", "longlive", command, "--help")
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "longlive.config" in imported
    assert not imported & {"torch", "diffusers", "transformers"}


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = run(tmp_path, "-m", "longlive", "inference", "--help", stdout=write_end)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [("ZeroDivisionError('bug')", 1, "ZeroDivisionError: bug"), ("InputError('no')", 2, "error: no")],
)
def test_one_of_many_leaves_though_threads_live(error: str, code: int, told: str, tmp_path: Path) -> None:
    """A normal exit would wait for the thread for ever."""
    program = f"""
import threading
from longlive.cli import InputError, as_one_of_many
threading.Thread(target=threading.Event().wait).start()
def command():
    raise {error}
as_one_of_many(command)
"""
    done = run(tmp_path, "-c", program)
    assert done.returncode == code
    assert done.stderr.endswith(f"{told}\n")
