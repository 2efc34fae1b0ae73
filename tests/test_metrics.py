"""The log of a training run and the picture of it."""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from longlive.errors import InputError
from longlive.training.metrics import Metrics, Values, check_trackers, read_metrics
from longlive.training.plot import plot

ROOT = Path(__file__).parents[1]


def open_metrics(run: Path, start_step: int = 0) -> Metrics:
    return Metrics(run, tensorboard=False, wandb_project=None, config={}, start_step=start_step)


def write_run(run: Path, num_steps: int, values: Values | None = None) -> Path:
    """A run whose generator is trained every other step; `values` are added to the last step's."""
    metrics = open_metrics(run)
    for step in range(1, num_steps + 1):
        noise = 1 + 0.3 * math.sin(7.0 * step)
        logged = {"critic/loss": 3.0 * noise / step, "critic/timestep": [250.0, 750.0], "time/step_s": 2.0 * noise}
        if step % 2:
            logged |= {"generator/loss": noise, "generator/grad_norm": noise, "time/rollout_s": noise}
        metrics.log(step, logged | (values or {} if step == num_steps else {}))
    metrics.close()
    return run


def steps(run: Path) -> list[int]:
    return [record["step"] for record in read_metrics(run)]


def refuse_constant(name: str) -> float:
    raise AssertionError(f"{name} is not JSON")


def test_lines_are_there_at_once(tmp_path: Path) -> None:
    metrics = open_metrics(tmp_path / "new" / "run")
    before = time.time()
    metrics.log(1, {"critic/loss": 0.25, "critic/timestep": [1.0, 2.5]})
    (record,) = read_metrics(tmp_path / "new" / "run")
    assert before <= record.pop("time") <= time.time()
    assert record == {"step": 1, "critic/loss": 0.25, "critic/timestep": [1.0, 2.5]}
    metrics.log(2, {"critic/loss": 0.5})
    assert steps(tmp_path / "new" / "run") == [1, 2]
    metrics.close()


def test_killed_process_loses_nothing(tmp_path: Path) -> None:
    script = f"""
import os, signal
from pathlib import Path
from longlive.training.metrics import Metrics
metrics = Metrics(Path({str(tmp_path)!r}), tensorboard=False, wandb_project=None, config={{}}, start_step=0)
for step in (1, 2, 3):
    metrics.log(step, {{"critic/loss": 1.0}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == -signal.SIGKILL
    assert steps(tmp_path) == [1, 2, 3]


def test_non_finite_values_are_strict_json(tmp_path: Path) -> None:
    metrics = open_metrics(tmp_path)
    metrics.log(1, {"critic/loss": math.nan, "critic/timestep": [1.0, math.inf, -math.inf]})
    metrics.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse_constant)
    assert line["critic/loss"] == "nan"
    assert line["critic/timestep"] == [1.0, "inf", "-inf"]
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["critic/loss"])
    assert record["critic/timestep"] == [1.0, math.inf, -math.inf]


def test_resumed_run_continues_its_file(tmp_path: Path) -> None:
    write_run(tmp_path, 9)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    metrics = open_metrics(tmp_path, start_step=6)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"".join(lines[:6])
    metrics.log(7, {"critic/loss": 1.0})
    metrics.close()
    assert steps(tmp_path) == [*range(1, 7), 7]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_new_run_starts_an_empty_file(tmp_path: Path) -> None:
    write_run(tmp_path, 3)
    open_metrics(tmp_path).close()
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize("torn", ['{"step": 4, "criti', '{"step": 4}', "\0\0\0"])
def test_torn_last_line_is_dropped(torn: str, tmp_path: Path) -> None:
    """Even where what is there can be read: its end may be missing, and the next line would join it."""
    write_run(tmp_path, 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert steps(tmp_path) == [1, 2, 3]
    metrics = open_metrics(tmp_path, start_step=4)
    metrics.log(5, {"critic/loss": 1.0})
    metrics.close()
    assert steps(tmp_path) == [1, 2, 3, 5]


@pytest.mark.parametrize("line", ['{"step": 2, "criti', "[1]", '{"loss": 1.0}'])
def test_broken_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    content = path.read_bytes()
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 2: ") as raised:
        read_metrics(tmp_path)
    assert "\n" not in str(raised.value)
    with pytest.raises(InputError, match="line 2"):
        open_metrics(tmp_path, start_step=3)
    assert path.read_bytes() == content


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="not a folder"):
        open_metrics(tmp_path / "file")


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_missing_tracker(package: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    wanted = {"tensorboard": package == "tensorboard", "wandb_project": "project" if package == "wandb" else None}
    with pytest.raises(InputError, match=rf"^{package} .*pip install {package}\)$"):
        check_trackers(**wanted)
    with pytest.raises(InputError, match=package):
        Metrics(tmp_path, **wanted, config={}, start_step=0)
    assert list(tmp_path.iterdir()) == []


def test_trackers_that_are_not_asked_for_are_not_missed() -> None:
    check_trackers(tensorboard=False, wandb_project=None)


def test_tensorboard_hides_what_a_resumed_run_repeats(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for start_step, last_step in ((0, 5), (3, 6)):
        metrics = Metrics(tmp_path, tensorboard=True, wandb_project=None, config={}, start_step=start_step)
        for step in range(start_step + 1, last_step + 1):
            metrics.log(step, {"critic/loss": float(step), "critic/timestep": [1.0, 3.0]})
        metrics.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("critic/loss")] == [(s, s) for s in range(1, 7)]
    assert {event.value for event in events.Scalars("critic/timestep")} == {2.0}


def colours(path: Path) -> set[tuple[int, ...]]:
    with Image.open(path) as image:
        assert image.width > 300
        assert image.height > 300
        return {colour for _, colour in image.convert("RGB").getcolors(image.width * image.height)}


GENERATOR, CRITIC = (0x2F, 0x6D, 0xB5), (0xE0, 0x7B, 0x28)


@pytest.mark.parametrize("num_steps", [1, 3, 500])
def test_curves_of_every_length(num_steps: int, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps)
    assert plot([run]) == run / "curves.png"
    assert {GENERATOR, CRITIC} <= colours(run / "curves.png")
    assert sorted(path.name for path in run.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_only_what_is_there_is_drawn(tmp_path: Path) -> None:
    metrics = open_metrics(tmp_path)
    metrics.log(1, {"critic/loss": 1.0})
    metrics.close()
    drawn = colours(plot([tmp_path]))
    assert CRITIC in drawn
    assert GENERATOR not in drawn


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_values_are_marked(value: float, tmp_path: Path) -> None:
    run = write_run(tmp_path, 40, {"critic/loss": value, "critic/grad_norm": value, "critic/timestep": [value, 1.0]})
    assert {GENERATOR, CRITIC} <= colours(plot([run]))
    metrics = open_metrics(tmp_path / "only")
    metrics.log(1, {"critic/loss": value})
    metrics.close()
    assert CRITIC in colours(plot([tmp_path / "only"]))


def test_runs_are_compared(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name / "run", 40) for name in ("a", "b")]
    assert plot(runs) == runs[0] / "compared.png"
    drawn = colours(runs[0] / "compared.png")
    assert {(0x3A, 0x9A, 0x6D), (0x8A, 0x5F, 0xB0)} <= drawn
    assert not {GENERATOR, CRITIC} & drawn


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_picture_formats(suffix: str, start: bytes, tmp_path: Path) -> None:
    out = tmp_path / "pictures" / f"picture{suffix}"
    assert plot([write_run(tmp_path / "run", 2)], out) == out
    assert out.read_bytes().startswith(start)


def test_bad_plots_are_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 2)
    open_metrics(tmp_path / "young").close()
    for runs, out, words in (
        ([tmp_path], None, "metrics.jsonl: cannot read"),
        ([tmp_path / "none"], None, "expected a folder of a training run"),
        ([tmp_path / "young"], None, "no metrics yet"),
        ([run], tmp_path / "curves.gif", ".png, .pdf, .svg"),
    ):
        with pytest.raises(InputError) as raised:
            plot(runs, out)
        assert words in str(raised.value)
        assert "\n" not in str(raised.value)
