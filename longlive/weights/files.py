"""Checkpoint files on disk: read through mmap, written atomically, loaded strictly.

A state dict read here is a view of the file: pages come in when touched and belong to the page cache, so a large
checkpoint never sits in memory twice. The mapping is private, so changing such a tensor never changes the file.
"""

import contextlib
import hashlib
import json
import math
import os
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from longlive.errors import InputError

StateDict = dict[str, Tensor]

PICKLE_SUFFIXES = (".pt", ".pth", ".bin")
_NUM_KEYS_SHOWN = 3
_NUM_SAMPLES, _SAMPLE_BYTES = 64, 4096
_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a `.safetensors`, `.pt`, `.pth` or `.bin` file, or the shards an `.index.json` file lists, through mmap.

    Returns what the file holds: a state dict, or for pickles also a dict of state dicts and numbers. Pickles are read
    with `weights_only=True`, so code in a file is refused. Raises `InputError` naming the file when it is missing,
    empty, truncated, corrupt, a Git LFS pointer, or contains code.
    """
    path = Path(path)
    read = {".json": _read_shards, ".safetensors": _read_safetensors, **dict.fromkeys(PICKLE_SUFFIXES, _read_pickle)}
    _check_readable(path)
    if path.suffix not in read:
        raise InputError(f"{path}: not a checkpoint file; accepted are {', '.join(read)}")
    return read[path.suffix](path)


def read_metadata(path: Path) -> dict[str, str]:
    """The text metadata in the header of a `.safetensors` file that `read_checkpoint` could read."""
    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `InputError` naming the file."""
    _check_readable(path)
    return parse_json(path.read_bytes(), path)


def parse_json(text: str | bytes, source: str | Path) -> dict[str, Any]:
    """The JSON object in `text` (bytes are UTF-8). Raises `InputError` naming the source."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InputError(f"{source}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"{source}: expected a JSON object, found {type(content).__name__}")
    return content


def fingerprint(path: str | Path) -> str:
    """A short hex digest of what a file holds; for an `.index.json` file, of its shards as well.

    Cheap for huge files: of those beyond 256 KiB only the size and 64 evenly spread blocks count. Copies have the same
    digest, whatever their names and dates; training changes weights everywhere and hence the digest, but an edit of a
    few bytes may go unseen. Raises `InputError` as `read_checkpoint` does for a file that is not there or a stand-in.
    """
    path = Path(path)
    _check_readable(path)
    shards = sorted(set(_weight_map(path).values())) if path.name.endswith(".index.json") else []
    digest = hashlib.sha256()
    for file in [path, *shards]:
        _check_readable(file)
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        step = max(_SAMPLE_BYTES, (size - _SAMPLE_BYTES) // (_NUM_SAMPLES - 1))
        with file.open("rb") as content:
            for start in range(0, size, step):
                content.seek(start)
                digest.update(content.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` for writing; it takes the place of `path` only when all went well.

    Missing parent folders are made. Raises `InputError` when the disk is full or the folder not writable; whatever
    `path` held before then stays as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save fails a second time, with a RuntimeError, when it closes an archive that could not be written.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        not_folder = isinstance(cause, FileExistsError)
        reason = f"{path.parent} is not a folder" if not_folder else cause.strerror or cause
        raise InputError(f"{path}: cannot write ({reason})") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, text as it is (UTF-8)."""
    # What UTF-8 cannot hold, lone surrogates, becomes \udcxx, which is JSON's own escape for them.
    encoded = json.dumps(content, indent=2, ensure_ascii=False).encode(errors="backslashreplace")
    with atomic_file(path) as file:
        file.write(encoded + b"\n")


def write_pickle(path: str | Path, state_dict: StateDict, dtype: torch.dtype | None = None) -> None:
    """Write a `.pt`/`.pth` file atomically, floating-point tensors as `dtype` where one is given."""
    # Copies, because a pickle holds whole storages, and a tensor may be a view of a large file.
    own = {name: tensor.to(_target_dtype(tensor, dtype), copy=True) for name, tensor in state_dict.items()}
    with atomic_file(path) as file:
        torch.save(own, file)


def write_safetensors(
    path: str | Path,
    state_dict: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a safetensors file atomically, floating-point tensors as `dtype` where one is given.

    Tensors may be strided, shared or mapped from a file; they are converted and written one at a time, so memory
    does not grow with the file. Raises `InputError` when the file cannot be written.
    """
    dtypes = {name: _target_dtype(tensor, dtype) for name, tensor in state_dict.items()}
    # Readers want aligned data: widest elements first.
    names = sorted(state_dict, key=lambda name: (-dtypes[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in names:
        begin, end = end, end + state_dict[name].numel() * dtypes[name].itemsize
        shape = list(state_dict[name].shape)
        header[name] = {"dtype": _SAFETENSORS_DTYPES[dtypes[name]], "shape": shape, "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with atomic_file(path) as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name in names:
            tensor = state_dict[name].detach().to("cpu", dtypes[name]).contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def load_into(module: nn.Module, state_dict: StateDict, source: str | Path, dtype: torch.dtype | None = None) -> None:
    """Load `state_dict` into `module` strictly; floating-point tensors become `dtype` one by one where one is given.

    A module on the meta device takes the tensors over as they are (no copy when the dtype fits), any other is filled
    in place and keeps its dtypes. `source` is the file named in errors. Raises `InputError` with the first missing,
    unexpected and wrong-shaped keys.
    """
    expected = module.state_dict()
    check_fit(expected, state_dict, source)
    if not any(tensor.is_meta for tensor in expected.values()):
        module.load_state_dict(state_dict)
        return
    module.load_state_dict({k: v.to(_target_dtype(v, dtype)) for k, v in state_dict.items()}, assign=True)


def check_fit(expected: StateDict, found: StateDict, source: str | Path) -> None:
    """Raise `InputError` naming `source` unless `found` has the names and shapes of `expected`."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshapen = [
        f"{name} is {list(found[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "wrong shape": misshapen}
    told = [f"{what}: {shorten(names)}" for what, names in problems.items() if names]
    if told:
        raise InputError(f"{source}: weights do not fit the model; {'; '.join(told)}")


def check_finite(state_dict: StateDict, source: str | Path) -> None:
    """Raise `InputError` naming `source` and the first floating-point tensors with NaN or infinite values.

    Reads every value once and copies none: for a model of 1.3B parameters in memory, a fraction of a second.
    """
    bad = [name for name, tensor in state_dict.items() if tensor.is_floating_point() and not _is_finite(tensor)]
    if bad:
        raise InputError(f"{source}: NaN or infinite values in {shorten(bad)}")


def _is_finite(tensor: Tensor) -> bool:
    if tensor.numel() == 0:
        return True
    # The smallest and the largest are NaN where any value is. Tens of times faster than isfinite, but not for float8.
    smallest, largest = (tensor.float() if tensor.itemsize == 1 else tensor).aminmax()
    return math.isfinite(smallest) and math.isfinite(largest)


def shorten(names: Sequence[object]) -> str:
    """The first few of `names` for an error message, and how many more there are."""
    more = len(names) - _NUM_KEYS_SHOWN
    return ", ".join(map(str, names[:_NUM_KEYS_SHOWN])) + (f" and {more} more" if more > 0 else "")


def state_dict_of(checkpoint: Mapping[str, Any], source: str | Path) -> StateDict:
    """`checkpoint` itself when it is a flat state dict of dense floating-point tensors.

    Raises `InputError` naming `source` and the entries that are something else.
    """
    if not checkpoint:
        raise InputError(f"{source}: holds no tensors")
    nameless = [name for name in checkpoint if not isinstance(name, str)]
    if nameless:
        raise InputError(f"{source}: expected a state dict with names as keys, but these are not: {shorten(nameless)}")
    others = [name for name, value in checkpoint.items() if not isinstance(value, Tensor)]
    if others:
        raise InputError(f"{source}: expected a state dict of tensors, but these entries are not: {shorten(others)}")
    flaws = [f"{name} is {flaw}" for name, tensor in checkpoint.items() if (flaw := _flaw(tensor))]
    if flaws:
        raise InputError(f"{source}: weights must be dense floating-point tensors, but {shorten(flaws)}")
    return dict(checkpoint)


def _flaw(tensor: Tensor) -> str:
    """What keeps `tensor` from being a weight; empty where nothing does."""
    if tensor.is_meta:
        return "without values (meta)"
    if tensor.layout != torch.strided:
        return str(tensor.layout)
    return "" if tensor.is_floating_point() else str(tensor.dtype)


def _target_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _check_readable(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise InputError(f"{path}: cannot read ({error.strerror})") from error
    if not start:
        raise InputError(f"{path}: the file is empty")
    if start.startswith(b"version https://git-lfs"):
        raise InputError(f"{path}: is a Git LFS pointer, not the weights; fetch the file itself (git lfs pull)")


def _read_safetensors(path: Path) -> StateDict:
    try:
        return load_file(path)
    except Exception as error:
        raise InputError(f"{path}: truncated or corrupt safetensors file ({error})") from error


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles and archives that are refused below
            # Only the zip format can be mapped; files in the older one (never zip archives) are read into memory.
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        # torch's own words are not repeated: they advise to run whatever is in the file.
        if "unsupported global" in str(error).lower():
            raise InputError(f"{path}: refused, the pickle contains code; only plain tensors are accepted") from error
        if "weights_only" in str(error):
            raise InputError(f"{path}: refused, corrupt or not of plain tensors; nothing else is accepted") from error
        raise InputError(f"{path}: truncated or corrupt checkpoint") from error
    if not isinstance(checkpoint, dict):
        raise InputError(f"{path}: expected a dict of tensors, found {type(checkpoint).__name__}")
    return checkpoint


def _read_shards(index: Path) -> StateDict:
    weight_map = _weight_map(index)
    shards = {file: read_checkpoint(file) for file in sorted(set(weight_map.values()))}
    missing = [f"{name} in {file.name}" for name, file in weight_map.items() if name not in shards[file]]
    if missing:
        raise InputError(f"{index}: tensors listed but not there: {shorten(missing)}")
    return {name: shards[file][name] for name, file in weight_map.items()}


def _weight_map(index: Path) -> dict[str, Path]:
    """Tensor name -> the shard, beside the index, that holds it."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index}: has no weight_map of tensor names to files")
    return {name: index.parent / Path(str(file)).name for name, file in weight_map.items()}
