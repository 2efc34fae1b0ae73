"""What a training run says of itself: `metrics.jsonl` always, TensorBoard and wandb where asked for."""

import importlib
import importlib.util
import json
import math
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from longlive.errors import InputError
from longlive.weights.files import atomic_file, parse_json

Values = Mapping[str, float | list[float]]

# JSON has no numbers for these; written as text, which `float` reads back.
_NON_FINITE = ("nan", "inf", "-inf")


class Metrics:
    """The log of a run, kept by its main process.

    Names are `<network>/<quantity>`, such as `critic/loss`; a list holds a value for each sample. `metrics.jsonl` gets
    one strict JSON object per step, with the Unix time in seconds; NaN and infinities are the strings "nan", "inf" and
    "-inf". TensorBoard and wandb get the mean of a list.

    A run resumed after `start_step` steps continues its logs as if it had never stopped: later lines, and one torn
    when the process was killed, are dropped. Raises `InputError` when the folder cannot be written, its log is not
    one of ours, or a tracker is not installed or refuses.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: bool,
        wandb_project: str | None,
        config: Mapping[str, Any],
        start_step: int,
    ) -> None:
        check_trackers(tensorboard, wandb_project)
        path = folder / "metrics.jsonl"
        kept = [line for line, record in _lines(path) if record["step"] <= start_step] if path.exists() else []
        with atomic_file(path) as file:
            file.writelines(line + b"\n" for line in kept)
        self._board = _open_tensorboard(folder, start_step) if tensorboard else None
        self._wandb = _open_wandb(folder, wandb_project, config, start_step) if wandb_project else None
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Values) -> None:
        """Write the values of a step, at once: of a process killed later, nothing is lost."""
        record = {"step": step, "time": time.time(), **{name: _encode(value) for name, value in values.items()}}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        means = {name: sum(v) / len(v) if isinstance(v, list) else v for name, v in values.items() if v != []}
        if self._board is not None:
            for name, value in means.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(means, step=step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def check_trackers(tensorboard: bool, wandb_project: str | None) -> None:
    """Raise `InputError` when a tracker is asked for and not installed; cheap, for before anything is loaded."""
    for package, is_wanted in (("tensorboard", tensorboard), ("wandb", bool(wandb_project))):
        if is_wanted and importlib.util.find_spec(package) is None:
            raise InputError(f"{package} is asked for but not installed; install it (pip install {package})")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`, non-finite values as floats; a torn last line is left out.

    Raises `InputError` when the folder has no such file or another line is broken.
    """
    return [{name: _decode(value) for name, value in record.items()} for _, record in _lines(run / "metrics.jsonl")]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Every whole line and what it says."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read ({error.strerror}); expected a folder of a training run") from error
    *whole, _torn = content.split(b"\n")  # only the newline completes a line
    for number, line in enumerate(whole, start=1):
        record = parse_json(line, f"{path}, line {number}")
        if not isinstance(record.get("step"), int):
            raise InputError(f"{path}, line {number}: has no step, so is not of a training run")
        yield line, record


def _encode(value: float | list[float]) -> Any:
    if isinstance(value, list):
        return [_encode(element) for element in value]
    return value if math.isfinite(value) else str(float(value))


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(element) for element in value]
    return float(value) if value in _NON_FINITE else value


def _open_tensorboard(folder: Path, start_step: int) -> Any:
    """A SummaryWriter; what it wrote of later steps is hidden."""
    module = importlib.import_module("torch.utils.tensorboard")
    return module.SummaryWriter(folder / "tensorboard", purge_step=start_step + 1, flush_secs=10)


def _open_wandb(folder: Path, project: str, config: Mapping[str, Any], start_step: int) -> Any:
    """A wandb run; a resumed one has the id of before. Steps it already has are ignored: they were the same."""
    wandb: ModuleType = importlib.import_module("wandb")
    path = folder / "wandb_id.txt"
    if start_step == 0 or not path.exists():
        with atomic_file(path) as file:
            file.write(secrets.token_hex(4).encode())
    try:
        return wandb.init(
            project=project,
            id=path.read_text().strip(),
            resume="allow",
            name=folder.resolve().name,
            dir=folder,
            config=dict(config),
        )
    except wandb.Error as error:
        raise InputError(f"wandb project {project}: {' '.join(str(error).split())}") from error
