"""Training checkpoints on torch.distributed.checkpoint: written in the background, published by one rename.

A checkpoint is the folder `step_000010`: each rank's shards (`__0_0.distcp`, ...), `.metadata`, which says where each
tensor lies, and `identity.json`, the settings that a run must share to load it. While it is written its name is
`.step_000010.tmp`, so a folder called `step_...` is always complete, whenever a process was killed. All ranks need one
file system. `.metadata` is a pickle: load only checkpoints of runs that you trust.

State is a nested dict of tensors, DTensors and Python values, flattened to names such as `networks.generator.bias`. A
plain tensor or value must be equal on every rank that has its name, for only one of them writes it; what differs from
rank to rank needs names of its own.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import WriteResult

from longlive.errors import InputError
from longlive.weights.files import read_json, shorten, write_json

T = TypeVar("T")

_IDENTITY = "identity.json"
logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run. Methods are collective: every rank calls them and gets the same answer or error."""

    def __init__(self, folder: Path, keep_last: int, identity: Mapping[str, Any]) -> None:
        """Keep the newest `keep_last` checkpoints in `folder`. `identity`: settings that JSON can hold."""
        if keep_last < 1:
            raise InputError(f"checkpoints to keep: {keep_last}, expected at least 1")
        self._folder = folder
        self._keep_last = keep_last
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))  # tuples become lists, as in the file
        # The background thread talks to its peers while training does: in a group of its own they cannot mix.
        self._group = dist.new_group(backend="gloo")
        self._saving: Future[Any] | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Start to write `state` as the checkpoint of `step`; return once it is copied to host memory.

        Waits for a save under way and raises its error. When complete, the checkpoint is published and the oldest ones
        beyond `keep_last` are deleted. A checkpoint of this step that is already there stays as it is. Raises
        `InputError` when the folder cannot be written; problems met later are raised by the next call of any method.
        """
        assert _keys_are_text(state), "names are made of text keys; others would come back as text"
        path = self._folder / f"step_{step:06d}"
        temporary = path.with_name(f".{path.name}.tmp")
        if not self._on_main(lambda: self._prepare(path, temporary)):
            logger.info("%s is already there", path)
            return
        # Blocking copies to ordinary memory: when the stager returns, the state may change.
        stager = DefaultStager(StagingOptions(False, False, False, False))
        writer = _Writer(temporary, publish=lambda: self._publish(temporary, path))
        saving = dcp.async_save(state, storage_writer=writer, process_group=self._group, async_stager=stager)
        stager.close()
        assert isinstance(saving, Future)
        self._saving = saving

    def load(self, path: Path, state: dict[str, Any]) -> None:
        """Fill `state` from the checkpoint `path`: tensors in place, Python values replaced inside the dict.

        `state` may ask for a part of what the checkpoint holds (see `keys`), and may be sharded in another way. Raises
        `InputError` naming `path` when it is missing or damaged, belongs to a run with another identity, or lacks a
        tensor of the name, shape and dtype asked for; `state` may then be filled in part.
        """
        assert _keys_are_text(state), "names are made of text keys"
        self._on_main(lambda: self._check(path))
        with _own_errors():
            dcp.load(state, storage_reader=_Reader(path), planner=_ExactPlanner(path), process_group=self._group)

    def latest(self) -> Path | None:
        """The newest complete checkpoint, a save under way included."""
        return self._on_main(lambda: find_latest(self._folder))

    def keys(self, path: Path) -> set[str]:
        """The names of all tensors and values in the checkpoint `path`. Raises `InputError` as `load` does."""
        return self._on_main(lambda: read_keys(path))

    def wait(self) -> None:
        """Until the save under way is published. Raises what went wrong with it, on every rank."""
        saving, self._saving = self._saving, None
        if saving is not None:
            with _own_errors():
                saving.result()

    def _on_main(self, look: Callable[[], T]) -> T:
        """What `look` returns or raises on the main rank, for every rank."""
        self.wait()  # its messages would mix with these
        answer: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                answer = [look()]
            except Exception as error:
                answer = [error]
        dist.broadcast_object_list(answer, src=0, group=self._group)
        if isinstance(answer[0], Exception):
            raise answer[0]
        result: T = answer[0]
        return result

    def _prepare(self, path: Path, temporary: Path) -> bool:
        """Make the folder to write in, without what killed processes left; False if `path` is already complete."""
        with _writing_in(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in self._folder.glob(".step_*"):
                shutil.rmtree(leftover)
            if path.exists():
                return False
            temporary.mkdir()
            return True

    def _publish(self, temporary: Path, path: Path) -> None:
        """Give a checkpoint that every rank has written its name, then delete those that are not kept."""
        write_json(temporary / _IDENTITY, self._identity)
        _flush(temporary / _IDENTITY)
        _flush(temporary)
        temporary.rename(path)
        _flush(self._folder)
        # Newer ones, of a run that went further before this one resumed from an older step, do not count.
        for old in [other for other in _complete(self._folder) if _step(other) <= _step(path)][: -self._keep_last]:
            doomed = old.rename(old.with_name(f".{old.name}.old"))
            shutil.rmtree(doomed)

    def _check(self, path: Path) -> None:
        check_identity(path, self._identity)
        _read_metadata(path)


def check_identity(path: Path, identity: Mapping[str, Any]) -> None:
    """Raise `InputError` unless the checkpoint `path` was saved with these settings; needs no process group."""
    theirs, ours = _flat(read_identity(path)), _flat(json.loads(json.dumps(identity)))
    told = [
        f"{name} is {theirs.get(name, 'not set')} there and {ours.get(name, 'not set')} here"
        for name in [*ours, *(name for name in theirs if name not in ours)]
        if name not in theirs or name not in ours or theirs[name] != ours[name]
    ]
    if told:
        raise InputError(f"{path}: belongs to a run with other settings: {shorten(told)}; a new run needs a new folder")


def find_latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`; needs no process group."""
    return max(_complete(folder), key=_step, default=None)


def read_identity(path: Path) -> dict[str, Any]:
    """The settings that the checkpoint `path` was saved with. Raises `InputError` naming what is not there."""
    if not path.is_dir():
        raise InputError(f"{path}: no such checkpoint; expected a folder such as checkpoints/step_000010")
    return read_json(path / _IDENTITY)


def read_keys(path: Path) -> set[str]:
    """The names of all tensors and values in the checkpoint `path`; needs no process group."""
    return set(_read_metadata(path).state_dict_metadata)


def read_state(path: Path, prefix: str) -> dict[str, Tensor]:
    """All tensors below `prefix`, such as `networks.generator`: whole, on the CPU, named as below it.

    Reads on this process alone and needs no process group. Raises `InputError` naming `path` when it is missing or
    damaged or holds no tensor there.
    """
    held = _read_metadata(path).state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in held.items()
        if name.startswith(f"{prefix}.") and isinstance(entry, TensorStorageMetadata)
    }
    if not state:
        raise InputError(f"{path}: holds no tensors below {prefix!r}")
    with _own_errors(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as asked for
        dcp.load(state, storage_reader=_Reader(path), planner=_ExactPlanner(path), no_dist=True)
    return {name.removeprefix(f"{prefix}."): tensor for name, tensor in state.items()}


class _Writer(dcp.FileSystemWriter):
    """Writes into a folder that `publish` renames, on the main rank, once every rank has written its part."""

    def __init__(self, temporary: Path, publish: Callable[[], None]) -> None:
        # One thread: with more, the library loses the errors of all but the first. Nothing is copied ahead from the
        # device, because the state is in host memory already.
        super().__init__(temporary, thread_count=1, per_thread_copy_ahead=0, sync_files=True)
        self._folder = temporary.parent
        self._publish = publish

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        with _writing_in(self._folder):
            return super().write_data(plan, planner)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        with _writing_in(self._folder):
            super().finish(metadata, results)
            self._publish()


class _Reader(dcp.FileSystemReader):
    """Reads what a plan asks for; damage is an `InputError`."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        try:
            return super().read_data(plan, planner)
        except Exception as error:  # unpickling damaged bytes can raise anything
            raise InputError(f"{self.path}: damaged checkpoint, a file in it is missing or truncated") from error


class _ExactPlanner(DefaultLoadPlanner):
    """Refuses to load what does not fit exactly: the library would convert dtypes and replace tensors by values."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        held = self.metadata.state_dict_metadata
        missing = [name for name in self.state_dict if name not in held]
        if missing:
            raise InputError(f"{self._path}: does not hold {shorten(missing)}")
        unfit = [
            f"{name} is {_describe(held[name])}, expected {_describe(value)}"
            for name, value in self.state_dict.items()
            if _describe(held[name]) != _describe(value)
        ]
        if unfit:
            raise InputError(f"{self._path}: does not fit; {shorten(unfit)}")
        return super().create_local_plan()


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, TensorStorageMetadata):
        return f"{value.properties.dtype} {list(value.size)}"
    return "not a tensor"


def _read_metadata(path: Path) -> Metadata:
    read_identity(path)
    try:
        return dcp.FileSystemReader(path).read_metadata()
    except Exception as error:  # unpickling damaged bytes can raise anything
        raise InputError(f"{path}: damaged checkpoint, .metadata is missing or corrupt") from error


def _complete(folder: Path) -> list[Path]:
    """All complete checkpoints, oldest first."""
    return sorted((path for path in folder.glob("step_*") if re.fullmatch(r"step_\d+", path.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _flush(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _keys_are_text(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _keys_are_text(item) for key, item in value.items())
    return all(map(_keys_are_text, value)) if isinstance(value, list) else True


@contextlib.contextmanager
def _writing_in(folder: Path) -> Iterator[None]:
    """What the file system refuses, a full disk or a folder without the right to write, as an `InputError`."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch.save fails a second time, with a RuntimeError, when it closes an archive that could not be written.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise InputError(f"{folder}: cannot write a checkpoint ({cause.strerror or cause})") from error


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """One rank's own error in place of the library's collection of them, which is no `Exception`."""
    try:
        yield
    except CheckpointException as failure:
        errors = [error for error, _ in failure.failures.values()]
        raise next((error for error in errors if isinstance(error, InputError)), errors[0]) from failure
