"""The shell scripts and the two lists of requirements."""

import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.sh"), *ROOT.glob("scripts/*.sh")])


def run(script: str, *arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script's result when called from `cwd` with this interpreter, the given variables set, and no input."""
    environment = {**os.environ, "LONGLIVE_PYTHON": sys.executable, **variables}
    return subprocess.run(
        ["bash", str(ROOT / script), *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
    )


def assert_one_line_error(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2
    assert result.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr)
    assert all(word in result.stderr for word in words)


@pytest.mark.parametrize("script", [*SCRIPTS, ".ci/run"])
def test_script_is_executable_and_parses(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_in_readme(script: str) -> None:
    assert script in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", ["inference.sh", "interactive_inference.sh"])
def test_help_from_elsewhere(script: str, tmp_path: Path) -> None:
    (tmp_path / "longlive").mkdir()  # as beside a clone: must not hide the package
    result = run(script, "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "usage: " in result.stdout
    assert [path.name for path in tmp_path.rglob("*")] == ["longlive"]


@pytest.mark.parametrize("num_gpus", ["0", "two", "-1"])
def test_bad_num_gpus(num_gpus: str, tmp_path: Path) -> None:
    assert_one_line_error(run("inference.sh", cwd=tmp_path, NUM_GPUS=num_gpus), f"NUM_GPUS={num_gpus}")


@pytest.mark.parametrize(
    ("words", "variables"),
    [
        ("NUM_NODES=0 is not a number", {"NUM_NODES": "0"}),
        ("NODE_RANK= is not the number of this machine, 0 to 1", {"NUM_NODES": "2", "MASTER_ADDR": "host0"}),
        ("NODE_RANK=2 is not the", {"NUM_NODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "host0"}),
        ("MASTER_ADDR must name", {"NUM_NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": ""}),
    ],
)
def test_bad_machines(words: str, variables: dict[str, str], tmp_path: Path) -> None:
    assert_one_line_error(run("train_init.sh", cwd=tmp_path, **variables), words)


def test_setup_uses_the_given_interpreter(tmp_path: Path) -> None:
    assert run("scripts/setup.sh", cwd=tmp_path).stdout == f"{sys.executable}\n"


def test_setup_refuses_a_wrong_interpreter(tmp_path: Path) -> None:
    assert_one_line_error(run("inference.sh", cwd=tmp_path, LONGLIVE_PYTHON="/no/python"), "/no/python", "3.11")


def test_failed_setup_is_not_taken_for_complete(tmp_path: Path) -> None:
    """Without a package index the first call cannot install torch; a second one tries again instead of going on."""
    for name in ("scripts/setup.sh", "requirements.txt", "requirements-dev.txt", "pyproject.toml"):
        copy = tmp_path / "clone" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull, "LONGLIVE_PYTHON": ""}
    script = str(tmp_path / "clone" / "scripts" / "setup.sh")
    for _ in range(2):
        result = run(script, cwd=tmp_path, **offline)
        assert result.returncode == 2
        assert result.stdout == ""
        assert result.stderr.splitlines()[-1].startswith("error: could not install torch")


def pinned() -> dict[str, Requirement]:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def test_requirements_are_the_declared_dependencies_pinned() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    ranges = {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, declared)}
    assert pinned().keys() == ranges.keys()
    for name, requirement in pinned().items():
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        assert pin.version in ranges[name].specifier, name


@pytest.mark.parametrize(("version", "is_supported"), [("2.8.0", True), ("2.9.1", False), ("2.11.0", True)])
def test_supported_torch(version: str, is_supported: bool) -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    torch = next(requirement for requirement in map(Requirement, declared) if requirement.name == "torch")
    assert (version in torch.specifier) is is_supported


def test_several_processes_make_every_video_once(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\na bird\n")
    settings = [f"data_path={prompts}", "num_output_frames=3", "inference_iter=-1", f"output_folder={tmp_path / 'out'}"]
    done = run("inference.sh", *settings, cwd=tmp_path, NUM_GPUS="2", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name[:5] for path in (tmp_path / "out").glob("*.mp4")) == ["000-0", "001-0", "002-0"]


def test_several_processes_complain_once(tmp_path: Path) -> None:
    failed = run("inference.sh", "num_ouput_frames=3", cwd=tmp_path, NUM_GPUS="3")
    assert failed.returncode == 2
    assert failed.stderr.count("error:") == 1
    assert "did you mean 'num_output_frames'" in failed.stderr


def stand_in(folder: Path, body: str) -> dict[str, str]:
    """Variables by which the scripts run the bash lines `body` where they would run longlive."""
    path = folder / "python"
    path.write_text(f'#!/usr/bin/env bash\n[[ "$1" != -c ]] || exec {sys.executable} "$@"\n{body}\n')
    path.chmod(0o755)
    return {"LONGLIVE_PYTHON": str(path)}


PRINT_ALL = 'printf "%s\\n" "$@"'


@pytest.mark.parametrize("stage", ["init", "long"])
def test_training_scripts_pass_on_their_arguments(stage: str, tmp_path: Path) -> None:
    done = run(f"train_{stage}.sh", "a=b c", "--x", cwd=tmp_path, **stand_in(tmp_path, PRINT_ALL))
    config = str(ROOT / f"configs/longlive_train_{stage}.yaml")
    assert done.stdout.splitlines() == ["-m", "longlive", "train", "--config_path", config, "a=b c", "--x"]


TRAINED = """
for word in "$@"; do [[ $word != logdir=* ]] || logdir="${word#logdir=}"; done
echo "${logdir#"$PWD"/} ${*: -1}" >>told
mkdir -p "$logdir/checkpoints"
echo '{"max_iters": 7}' >"$logdir/train_config.json"
[[ $logdir != */"${STOPS:-}" ]] || { mkdir "$logdir/checkpoints/step_000003"; exit 0; }
mkdir -p "$logdir/checkpoints/step_000007"
touch "$logdir/generator.safetensors" "$logdir/vae.safetensors"
"""  # every stage trains in no time; one may be stopped


def test_a_world_is_trained_stage_by_stage_once(tmp_path: Path) -> None:
    variables = stand_in(tmp_path, TRAINED)
    stages = ["vae", "teacher", "causal_init", "train_init", "train_long"]
    (tmp_path / "shapes" / "teacher").mkdir(parents=True)
    (tmp_path / "shapes" / "teacher" / "generator.safetensors").touch()  # exported on the way
    stopped = run("scripts/train_shapes.sh", "shapes", "seed=3", cwd=tmp_path, STOPS="teacher", **variables)
    assert stopped.returncode == 1
    assert (tmp_path / "told").read_text() == "shapes/vae seed=3\nshapes/teacher seed=3\n"
    done = run("scripts/train_shapes.sh", "shapes", "seed=3", cwd=tmp_path, **variables)
    assert done.returncode == 0, done.stderr
    told = (tmp_path / "told").read_text().splitlines()
    assert told == [f"shapes/{stage} seed=3" for stage in ("vae", "teacher", *stages[1:])]
    again = run("scripts/train_shapes.sh", "shapes", "device=cpu", "seed=3", cwd=tmp_path, **variables)
    assert again.returncode == 0
    assert (tmp_path / "told").read_text().splitlines() == told
    other = run("scripts/train_shapes.sh", "shapes", "seed=4", cwd=tmp_path, **variables)
    assert other.returncode == 2
    assert other.stderr.endswith("shapes/vae: was trained with seed=3, not with seed=4; name another FOLDER\n")
    (tmp_path / "shapes" / "train_init" / "done").unlink()
    other = run("scripts/train_shapes.sh", "shapes", "seed=3", cwd=tmp_path, CAUSAL_INIT="ode", **variables)
    assert other.returncode == 2
    assert "shapes/causal_init: was trained with " in other.stderr


TOLD = "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT"


def test_processes_of_one_machine(tmp_path: Path) -> None:
    done = run("train_init.sh", cwd=tmp_path, **stand_in(tmp_path, f'echo "{TOLD}" >"$RANK"'), NUM_GPUS="2")
    assert done.returncode == 0, done.stderr
    *first, port = (tmp_path / "0").read_text().split()
    assert first == ["0", "0", "2", "2", "127.0.0.1"]
    assert int(port) > 1023
    assert (tmp_path / "1").read_text().split() == ["1", "1", "2", "2", "127.0.0.1", port]


@pytest.mark.parametrize("num_gpus", [1, 3])
def test_processes_of_the_second_machine(num_gpus: int, tmp_path: Path) -> None:
    variables = {"NUM_NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "host0", "NUM_GPUS": str(num_gpus)}
    run("train_long.sh", cwd=tmp_path, **stand_in(tmp_path, f'echo "{TOLD}" >"$RANK"'), **variables)
    for i in range(num_gpus):
        told = (tmp_path / str(num_gpus + i)).read_text()
        assert told == f"{num_gpus + i} {i} {2 * num_gpus} {num_gpus} host0 29500\n"


@pytest.mark.parametrize(
    ("death", "code", "reason"),
    [
        ("echo why >&2; exit 7", 7, "why\n"),
        ("kill -KILL $$", 137, "error: process 1 was ended by SIGKILL\n"),
        ("echo why >&2; kill -ABRT $$", 134, "why\nerror: process 1 was ended by SIGABRT\n"),
    ],
)
def test_a_process_that_fails_ends_training(death: str, code: int, reason: str, tmp_path: Path) -> None:
    """The others, and what they have started, would hold the captured streams open for ten minutes: they are killed."""
    body = f"ulimit -c 0\nif ((RANK == 1)); then {death}; fi\necho stays >&2\nsleep 600"
    failed = run("train_init.sh", cwd=tmp_path, **stand_in(tmp_path, body), NUM_GPUS="3")
    assert failed.returncode == code
    assert failed.stderr.replace("stays\n", "", 1) == reason


def test_a_process_that_fails_leaves_other_videos_alone(tmp_path: Path) -> None:
    fails = "if ((RANK == 1)); then touch failed; echo why >&2; exit 7; fi"
    body = f"{fails}\nuntil [[ -e failed ]]; do sleep 0.01; done\necho made"
    done = run("inference.sh", cwd=tmp_path, **stand_in(tmp_path, body), NUM_GPUS="2")
    assert (done.returncode, done.stdout, done.stderr) == (7, "made\n", "why\n")


@pytest.mark.parametrize(
    ("script", "sent", "received"),
    [
        ("train_init.sh", signal.SIGTERM, "TERM"),
        ("train_init.sh", signal.SIGHUP, "TERM"),
        ("train_init.sh", signal.SIGINT, "INT"),
        ("inference.sh", signal.SIGTERM, "INT"),
    ],
)
def test_each_process_gets_a_signal_once(script: str, sent: signal.Signals, received: str, tmp_path: Path) -> None:
    """Ctrl-C goes to the whole group of the script; what a process does about a signal decides how the script ends."""
    body = """
        exec {never}<> <(:)
        received=0 # not read from the file: bash 5.2 can fail to parse $(...) when a trap comes in between
        note() { echo "$1" >>"$RANK"; }
        trap 'note TERM; received=1' TERM
        trap 'note INT; received=1' INT
        note ready
        if ((RANK == 0)); then until [[ -e 1 ]]; do sleep 0.01; done; echo ready; fi
        for ((i = 0; i < 6000 && !received; i++)); do read -rt 0.01 -u "$never" || true; done # a minute at most
    """
    environment = {**os.environ, **stand_in(tmp_path, body), "NUM_GPUS": "2"}
    started = subprocess.Popen(
        ["bash", str(ROOT / script)], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, start_new_session=True
    )
    assert started.stdout is not None
    assert started.stdout.readline() == b"ready\n"
    os.killpg(started.pid, sent)
    assert started.communicate(timeout=60) == (b"", None)
    assert started.returncode == 0
    assert [(tmp_path / rank).read_text() for rank in "01"] == [f"ready\n{received}\n"] * 2
