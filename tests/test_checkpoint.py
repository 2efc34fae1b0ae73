"""Training checkpoints: real processes with gloo, forked from a server that has torch imported already."""

import copy
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from longlive.errors import InputError
from longlive.training.checkpoint import Checkpoints, find_latest, read_identity, read_state
from longlive.training.parallel import whole

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch.distributed.checkpoint", "torch.distributed.fsdp"])
IDENTITY = {"stage": "streaming", "generator": {"dim": 48, "lora_rank": 16}, "betas": (0.9, 0.99)}


# What the processes run: `job(rank, world_size, *arguments)`, in a process group.


def enter(job: Callable[..., None], rank: int, world_size: int, store: Path, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    job(rank, world_size, *arguments)
    dist.destroy_process_group()


def start(job: Callable[..., None], world_size: int, folder: Path, *arguments: Any) -> list[BaseProcess]:
    """Processes that run `job` with the run folder and further arguments."""
    store = folder.parent / f"{folder.name}.store"
    store.unlink(missing_ok=True)
    processes: list[BaseProcess] = [
        PROCESSES.Process(target=enter, args=(job, rank, world_size, store, (folder, *arguments)))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[BaseProcess]) -> list[int | None]:
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def run(job: Callable[..., None], world_size: int, folder: Path, *arguments: Any) -> None:
    """Run `job` to its end; what a process asserts is in the captured stderr."""
    assert finish(start(job, world_size, folder, *arguments)) == [0] * world_size


def training_state(seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """A sharded network after an optimizer step: rows 3 and 1 do not divide by 2, so shards differ and one is empty."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 5)).sum().backward()
    optimizer.step()
    moments = {name: dict(optimizer.state[parameter]) for name, parameter in model.named_parameters()}
    state = {
        "networks": {"generator": model.state_dict()},
        "optimizers": {"generator": moments},
        "ema": {"shadow": [parameter.detach() * 2 for parameter in model.parameters()]},
        "progress": {"step": seed, "prompts": ["a", "b"], "rate": 0.1 * seed},
    }
    return model, state


def flat(state: Any, name: str = "") -> dict[str, Any]:
    """Copies of a nested state's values by name, tensors whole."""
    if isinstance(state, dict):
        return {k: v for key, value in state.items() for k, v in flat(value, f"{name}.{key}").items()}
    if isinstance(state, list) and isinstance(state[0], Tensor):
        return flat(dict(enumerate(state)), name)
    return {name[1:]: whole(state).detach().clone() if isinstance(state, Tensor) else copy.deepcopy(state)}


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(found[name], value) if isinstance(value, Tensor) else found[name] == value
        assert same, f"{name}: {found[name]}, expected {value}"


def overwrite(model: nn.Module, state: dict[str, Any]) -> None:
    with torch.no_grad():
        for tensor in [*model.parameters(), *state["ema"]["shadow"]]:
            tensor.fill_(-1)
        for moments in state["optimizers"]["generator"].values():
            for tensor in moments.values():
                tensor.fill_(-1)
    state["progress"]["prompts"].append("c")
    state["progress"]["step"] = -1


def save_and_load(rank: int, world_size: int, folder: Path) -> None:
    """What is written is the state at the call of `save`, whatever training does next."""
    checkpoints = Checkpoints(folder, 2, IDENTITY)
    assert checkpoints.latest() is None
    for step in (5, 10):
        model, state = training_state(step)
        expected = flat(state)
        state["streaming"] = {f"rank_{rank}": {"cache": torch.full((2, 3), rank), "frames": [rank, 7]}}
        checkpoints.save(step, state)
        overwrite(model, state)
    if rank == 0:
        torch.save(expected, folder.parent / "expected.pt")
    latest = checkpoints.latest()
    assert latest == folder / "step_000010"
    assert_loads(checkpoints, latest, expected)
    checkpoints.wait()


def load_elsewhere(rank: int, world_size: int, folder: Path) -> None:
    checkpoints = Checkpoints(folder, 2, IDENTITY)
    latest = checkpoints.latest()
    assert latest is not None
    assert_loads(checkpoints, latest, torch.load(folder.parent / "expected.pt"))


def assert_loads(checkpoints: Checkpoints, path: Path, expected: dict[str, Any]) -> None:
    """Everything is there for every rank, in place, the part of each rank that saved included."""
    names = checkpoints.keys(path)
    ranks = sorted({name.split(".")[1] for name in names if name.startswith("streaming.")})
    model, state = training_state(99)
    pointers = [parameter.to_local().data_ptr() for parameter in model.parameters()]
    state["streaming"] = {name: {"cache": torch.zeros(2, 3, dtype=torch.int64), "frames": []} for name in ranks}
    checkpoints.load(path, state)
    assert pointers == [parameter.to_local().data_ptr() for parameter in model.parameters()]
    for number, name in enumerate(ranks):
        assert state["streaming"][name]["frames"] == [number, 7]
        assert torch.equal(state["streaming"][name]["cache"], torch.full((2, 3), number))
    assert names == flat(state).keys()
    del state["streaming"]
    assert_equal(flat(state), expected)


@pytest.mark.parametrize(("saved_by", "loaded_by"), [(1, 2), (2, 1)])
def test_load_gives_what_was_saved_at_any_world_size(tmp_path: Path, saved_by: int, loaded_by: int) -> None:
    folder = tmp_path / "checkpoints"
    run(save_and_load, saved_by, folder)
    assert sorted(os.listdir(folder)) == ["step_000005", "step_000010"]
    run(load_elsewhere, loaded_by, folder)
    expected = torch.load(tmp_path / "expected.pt")
    prefix = "networks.generator"
    assert_equal(
        read_state(folder / "step_000010", prefix),
        {name.removeprefix(f"{prefix}."): value for name, value in expected.items() if name.startswith(prefix)},
    )
    assert read_identity(folder / "step_000010") == json.loads(json.dumps(IDENTITY))
    with pytest.raises(InputError, match=r"step_000010: holds no tensors below 'networks.gen'"):
        read_state(folder / "step_000010", "networks.gen")


def small_state(value: int, num_values: int = 4) -> dict[str, Any]:
    return {"networks": {"weight": torch.full((num_values,), float(value))}, "progress": {"step": value}}


def keep_newest(rank: int, world_size: int, folder: Path) -> None:
    checkpoints = Checkpoints(folder, 2, IDENTITY)
    for step in (8, 9, 999_999, 1_000_000):
        checkpoints.save(step, small_state(step))
    assert checkpoints.latest() == folder / "step_1000000"
    # A run resumed from an older checkpoint keeps what it writes, and leaves alone what is there.
    checkpoints.save(7, small_state(7))
    checkpoints.save(999_999, small_state(0))
    checkpoints.wait()


def test_the_newest_are_kept(tmp_path: Path) -> None:
    run(keep_newest, 1, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["step_000007", "step_1000000", "step_999999"]
    assert read_state(tmp_path / "step_999999", "networks")["weight"][0] == 999_999


def refuse(rank: int, world_size: int, folder: Path) -> None:
    checkpoints = Checkpoints(folder, 2, IDENTITY)
    checkpoints.save(10, small_state(10))
    checkpoints.wait()
    path = folder / "step_000010"

    def refused(match: str, state: dict[str, Any], path: Path = path, by: Checkpoints = checkpoints) -> None:
        with pytest.raises(InputError, match=match) as caught:
            by.load(path, state)
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)

    other = Checkpoints(folder, 2, {"stage": "streaming", "generator": {"dim": 48, "lora_rank": 32}, "seed": 1})
    settings = r"generator\.lora_rank is 16 there and 32 here, seed is not set there and 1 here, betas is \[0.9, 0.99\]"
    refused(settings, small_state(0), by=other)
    refused("no such checkpoint", small_state(0), path=folder / "step_000011")
    refused(r"networks.weight is torch.float32 \[4\], expected torch.float32 \[5\]", small_state(0, num_values=5))
    refused(r"weight is torch.float32 \[4\], expected torch.bf", {"networks": {"weight": torch.zeros(4).bfloat16()}})
    refused("progress.step is not a tensor, expected torch.f", {"progress": {"step": torch.zeros(())}})
    refused(r"does not hold networks\.b, networks\.c", {"networks": {"b": torch.zeros(1), "c": 1, "weight": 0}})

    # Only one rank asks for what is not there: all are told.
    wanted = small_state(0) | ({"more": {"b": 1}} if rank == world_size - 1 else {})
    refused(r"does not hold more\.b", wanted)
    checkpoints.load(path, state := small_state(0))
    assert_equal(flat(state), flat(small_state(10)))

    for file, match in (
        ("__0_0.distcp", "missing or truncated"),
        (".metadata", "metadata is missing or corrupt"),
        ("identity.json", "cannot read"),
    ):
        for damage in (truncate, Path.unlink):
            dist.barrier()
            if rank == 0:
                damage(path / file)
            dist.barrier()
            with pytest.raises(InputError, match=re.escape(str(path))) as caught:
                checkpoints.load(path, small_state(0))
        assert re.search(match, str(caught.value))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_what_does_not_fit_is_refused_on_every_rank(tmp_path: Path) -> None:
    run(refuse, 2, tmp_path / "checkpoints")


class Unwritable:
    def __reduce__(self) -> Any:
        raise ArithmeticError("cannot be pickled")


def fail_in_background(rank: int, world_size: int, folder: Path) -> None:
    checkpoints = Checkpoints(folder, 1, IDENTITY)
    checkpoints.save(10, small_state(10))
    for act in (checkpoints.wait, lambda: checkpoints.save(30, small_state(30)), checkpoints.latest):
        # The last rank's own value, so that another rank learns of the error.
        bad = {"own": DeepCopied()} if rank == world_size - 1 else {}
        checkpoints.save(20, small_state(20) | bad)
        with pytest.raises(ArithmeticError, match="cannot be pickled"):
            act()
        checkpoints.wait()  # told once
    # A full disk: the system refuses to write more than so many bytes, here in the last rank's files only.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == world_size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    big = {f"rank_{rank}": torch.ones(100_000)}
    checkpoints.save(20, small_state(20) | big)
    with pytest.raises(InputError, match=f"^{re.escape(str(folder))}: cannot write .*too large") as caught:
        checkpoints.wait()
    assert "\n" not in str(caught.value)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints.latest() == folder / "step_000010"
    checkpoints.load(folder / "step_000010", state := small_state(0))
    assert_equal(flat(state), flat(small_state(10)))
    checkpoints.save(20, small_state(20) | big)
    checkpoints.wait()
    nowhere = folder / "step_000020" / ".metadata"
    with pytest.raises(InputError, match=f"^{re.escape(str(nowhere))}: cannot write a checkpoint"):
        Checkpoints(nowhere, 1, IDENTITY).save(1, small_state(1))


class DeepCopied(Unwritable):
    """Survives the copy to host memory and fails when it is written."""

    def __deepcopy__(self, memo: Any) -> "DeepCopied":
        return self


def test_errors_in_the_background_are_raised_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    run(fail_in_background, 2, tmp_path / "checkpoints")
    assert os.listdir(tmp_path / "checkpoints") == ["step_000020"]


class Stuck:
    """A value whose writing never ends; tells when it has begun."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def __deepcopy__(self, memo: Any) -> "Stuck":
        return self

    def __reduce__(self) -> Any:
        self.connection.send("writing")
        self.connection.recv()
        raise AssertionError("nothing is ever sent")


def get_stuck(rank: int, world_size: int, folder: Path, connection: Connection) -> None:
    checkpoints = Checkpoints(folder, 1, IDENTITY)
    checkpoints.save(10, small_state(10))
    checkpoints.wait()
    checkpoints.save(20, small_state(20) | ({"own": Stuck(connection)} if rank == 1 else {}))
    with pytest.raises(RuntimeError):  # the peer is gone
        checkpoints.wait()
    os._exit(0)


def resume(rank: int, world_size: int, folders: list[Path]) -> None:
    """Each folder holds a whole checkpoint, step 10 or 20; the next save clears what a killed process left."""
    for folder in folders:
        checkpoints = Checkpoints(folder, 1, IDENTITY)
        latest = checkpoints.latest()
        assert latest in (folder / "step_000010", folder / "step_000020")
        checkpoints.load(latest, state := small_state(0))
        assert_equal(flat(state), flat(small_state(int(latest.name[-2:]))))
        checkpoints.save(30, small_state(30))
        checkpoints.wait()
        assert os.listdir(folder) == ["step_000030"], os.listdir(folder)


def test_a_rank_killed_while_it_writes_loses_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    ours, theirs = PROCESSES.Pipe()
    processes = start(get_stuck, 2, folder, theirs)
    assert wait([ours, processes[1].sentinel], timeout=240) == [ours]
    assert sorted(os.listdir(folder)) == [".step_000020.tmp", "step_000010"]
    processes[1].kill()
    assert finish(processes) == [0, -signal.SIGKILL]
    assert find_latest(folder) == folder / "step_000010"
    run(resume_one, 1, folder)


def resume_one(rank: int, world_size: int, folder: Path) -> None:
    resume(rank, world_size, [folder])


def save_until_killed(rank: int, world_size: int, folder: Path, num_operations: int) -> None:
    """Kill this process, -9, just before it changes something in `folder` for the given time."""
    checkpoints = Checkpoints(folder, 1, IDENTITY)
    left = num_operations

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
        changes |= event == "open" and isinstance(arguments[1], str) and "w" in arguments[1]
        if changes:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(on_event)
    checkpoints.save(20, small_state(20))
    checkpoints.wait()
    os._exit(0)


def save_first(rank: int, world_size: int, folder: Path) -> None:
    checkpoints = Checkpoints(folder, 1, IDENTITY)
    checkpoints.save(10, small_state(10))
    checkpoints.wait()
    shutil.copytree(folder / "step_000010", folder / ".step_000005.tmp")


def test_a_process_killed_at_any_point_loses_nothing(tmp_path: Path) -> None:
    first = tmp_path / "first"
    run(save_first, 1, first)
    folders: list[Path] = []
    exitcode: int | None = -signal.SIGKILL
    while exitcode == -signal.SIGKILL:
        folder = tmp_path / f"run_{len(folders)}"
        shutil.copytree(first, folder)
        (exitcode,) = finish(start(save_until_killed, 1, folder, len(folders)))
        folders.append(folder)
        for path in folder.glob("step_*"):
            assert read_state(path, "networks")["weight"][0] == int(path.name[-2:])
    assert exitcode == 0
    newest = [path.name for folder in folders if (path := find_latest(folder))]
    num_old = newest.count("step_000010")
    assert newest == ["step_000010"] * num_old + ["step_000020"] * (len(folders) - num_old)
    assert 0 < num_old < len(folders)
    run(resume_all, 1, tmp_path, [folder.name for folder in folders])


def resume_all(rank: int, world_size: int, folder: Path, names: list[str]) -> None:
    resume(rank, world_size, [folder / name for name in names])
