"""The training command as users meet it: what it says of wrong input, and how its processes live and end together."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from test_scripts import stand_in

from longlive import cli
from longlive.builtin import BUILTIN_GENERATOR
from longlive.errors import InputError
from longlive.models.dit import DiTConfig, WanDiT
from longlive.train import check_processes
from longlive.train_config import TrainConfig, load_train_config
from longlive.train_inputs import read_critic
from longlive.training.checkpoint import find_latest
from longlive.weights.files import read_checkpoint, write_safetensors
from longlive.weights.formats import read_dit, select_network

ROOT = Path(__file__).parents[1]
SIZES = {
    "model_name": "tiny",
    "real_name": "tiny",
    "height": 16,
    "width": 16,
    "num_training_frames": 3,
    "denoising_step_list": [1000],
    "max_iters": 1,
    "device": "cpu",
}
LORA = ("adapter.type=lora", "adapter.rank=4", "adapter.alpha=4")
STREAMING = (
    *("stage=streaming", "streaming_chunk_size=6", "streaming_max_length=9", "streaming_min_new_frame=3"),
    "switch_choices=3",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration, prompts, and a run of one step with LoRA."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "one.txt").write_text("a cat\n")
    (folder / "two.txt").write_text("a cat\na dog\n")
    (folder / "empty.txt").write_text("\n")
    (folder / "latin.txt").write_bytes("Füchse".encode("latin-1"))
    config = SIZES | {"stage": "self_forcing", "data_path": str(folder / "two.txt")}
    (folder / "tiny.yaml").write_text(json.dumps(config))
    assert cli.main(train(folder, *LORA, f"logdir={folder / 'run'}")) == 0
    return folder


def train(folder: Path, *settings: str) -> list[str]:
    return ["train", "--config_path", str(folder / "tiny.yaml"), *settings]


def failure(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that must exit with 2 and print nothing else."""
    capsys.readouterr()
    assert cli.main(argv) == 2
    captured = capsys.readouterr()
    assert re.fullmatch(r"error: [^\n]+\n", captured.err)
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["num_training_frame=6"], "did you mean 'num_training_frames'?"),
        (["adapter.rnk=6"], "did you mean 'adapter.rank'?"),
        (["num_training_frames=4"], "must be a multiple of num_frame_per_block=3"),
        (["real_name=Wan2.1-T2V-14B", "wan_folder={}"], "real_name: {}/Wan2.1-T2V-14B does not exist"),
        (["model_name=Wan2.1-T2V-1.3B", "wan_folder={}"], "model_name: {}/Wan2.1-T2V-1.3B does not exist"),
        (["fake_name=Wan2.1-T2V-1.3B", "wan_folder={}"], "fake_name: {}/Wan2.1-T2V-1.3B does not exist"),
        (["real_ckpt={}/none.pt"], "{}/none.pt: cannot read"),
        (["critic_ckpt={}/none.pt"], "{}/none.pt: cannot read"),
        (["generator_ckpt={}/none.pt"], "{}/none.pt: cannot read"),
        (["generator_ckpt={}/run"], "{}/run: no dit weights there"),
        (["generator_ckpt={}/one.txt"], "{}/one.txt: not a checkpoint file"),
        (["generator_ckpt={}/run/lora.pt"], "lora.pt: has no generator"),
        (["init_logdir={}/none"], "{}/none/generator.safetensors does not exist; train the stage before first"),
        (["lora_ckpt={}/run/lora.pt"], "needs adapter.type=lora"),
        ([*LORA, "adapter.rank=8", "lora_ckpt={}/run/lora.pt"], "lora.pt: LoRA of rank 4, not adapter.rank=8"),
        ([*LORA, "lora_ckpt={}/none.pt"], "{}/none.pt: cannot read"),
        (["data_path={}/none.txt"], "{}/none.txt: cannot be read"),
        (["data_path={}/empty.txt"], "{}/empty.txt: holds no prompt"),
        (["data_path={}/latin.txt"], "{}/latin.txt, line 1: not UTF-8"),
        ([*STREAMING, "switch_prompt_path={}/one.txt"], "{}/two.txt has 2 prompts and {}/one.txt has 1"),
        ([*STREAMING], "{}/two.txt: pairs need a second file"),
        (["total_batch_size=3", "batch_size=2"], "total_batch_size=3: must be a multiple of batch_size 2"),
        (["teacher_sequence_parallel=2"], "teacher_sequence_parallel=2: does not divide the 1 processes"),
        (["stage=pretrain"], "clips_path is not given, and stage=pretrain trains on clips"),
        (["stage=pretrain", "clips_path={}/none.jsonl"], "{}/none.jsonl: cannot be read"),
        (["stage=vae", "clips_path={}/none.jsonl"], "{}/none.jsonl: cannot be read"),
        (["logdir={}/one.txt"], "{}/one.txt: cannot be written"),
        (["logdir={}/one.txt/run"], "{}/one.txt/run: cannot be written"),
        ([*LORA, "adapter.rank=8", "logdir={}/run"], "adapter.rank is 4 there and 8 here"),
        (
            [*LORA, "height=32", "logdir={}/run"],
            "step_000001: belongs to a run with other settings: height is 16 there",
        ),
        (["logdir={}/run"], "adapter.type is lora there and none here"),
    ],
)
def test_wrong_settings(settings: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logdir = f"logdir={folder / 'unused'}"
    argv = train(folder, logdir, *(setting.replace("{}", str(folder)) for setting in settings))
    assert words.replace("{}", str(folder)) in failure(argv, capsys)
    assert not list((folder / "unused").glob("*"))


def test_another_start_is_another_run(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights to begin with are named in vain where a run goes on; a LoRA fits what it was trained beside."""
    base = shutil.copy(folder / "run" / "generator.safetensors", tmp_path / "base.safetensors")
    start = f"generator_ckpt={base}"
    full, lora = (f"logdir={tmp_path / name}" for name in ("full", "lora"))
    assert cli.main(train(folder, start, full)) == cli.main(train(folder, start, *LORA, lora)) == 0
    published = tmp_path / "full" / "longlive_base.pt"
    critic = read_critic(load_train_config(folder / "tiny.yaml", [f"critic_ckpt={published}"])).state
    networks = [select_network(read_checkpoint(published), published, name) for name in ("critic", "generator")]
    assert [all(torch.equal(critic[k], w) for k, w in network.items()) for network in networks] == [True, False]

    shutil.copy(tmp_path / "full" / "generator.safetensors", base)  # the stage before has gone on
    assert "belongs to a run with other settings: begun_with is" in failure(train(folder, start, full), capsys)
    assert "is not what the LoRA in " in failure(["export", str(tmp_path / "lora")], capsys)


@pytest.mark.parametrize("key", ["generator_ckpt", "critic_ckpt", "real_ckpt"])
@pytest.mark.parametrize("size", ["in_channels", "text_dim"])
def test_transformer_of_another_kind(
    key: str, size: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config: DiTConfig = replace(read_dit(BUILTIN_GENERATOR)[0], num_layers=1, **{size: 24})
    weights = tmp_path / "other.safetensors"
    write_safetensors(weights, WanDiT(config).state_dict(), {"part": "dit", "config": json.dumps(asdict(config))})
    line = failure(train(folder, f"{key}={weights}", f"logdir={tmp_path}"), capsys)
    assert f"other.safetensors: does not fit VAE and text encoder: {size} is 24, not" in line


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ("blocks.0.", "LoRA of another model: has none for blocks.1."),
        ("blocks.99.", "the model has no such modules to apply LoRA to: blocks.99."),
    ],
)
def test_lora_of_another_model(
    others: str, words: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With fewer blocks, or with more."""
    lora = read_checkpoint(folder / "run" / "lora.pt")["generator_lora"]
    other = {name.replace("blocks.0.", others): w for name, w in lora.items() if "blocks.0." in name}
    torch.save({"generator_lora": other}, tmp_path / "other.pt")
    assert words in failure(train(folder, *LORA, f"lora_ckpt={tmp_path / 'other.pt'}", f"logdir={tmp_path}"), capsys)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sharding_strategy": "hybrid_full"}, "6 processes are not whole nodes of 4"),
        ({"total_batch_size": 8}, "must be a multiple of batch_size 1 times 6 processes"),
        ({"teacher_sequence_parallel": 4}, "does not divide the 6 processes"),
    ],
)
def test_processes_that_do_not_divide(settings: dict[str, int], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"RANK": "1", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "host0", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    check_processes(TrainConfig())
    with pytest.raises(InputError, match=words):
        check_processes(replace(TrainConfig(), **settings))
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(InputError, match="WORLD_SIZE=6, but MASTER_PORT not set"):
        check_processes(TrainConfig())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["export"], "required: RUN"),
        (["export", "{}/none"], "{}/none/train_config.json: cannot read"),
        (["export", "{}/run", "--checkpoint", "{}/none"], "{}/none: no such checkpoint"),
        (["export", "{}/young"], "{}/young: holds no checkpoint yet"),
        (["plot"], "required: RUN"),
        (["plot", "{}/none"], "{}/none/metrics.jsonl: cannot read"),
        (["plot", "{}/young"], "{}/young/metrics.jsonl: holds no metrics yet"),
        (["plot", "{}/run", "--out", "{}/x.gif"], "{}/x.gif: cannot draw such a file"),
    ],
)
def test_export_and_plot(argv: list[str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    young = folder / "young"
    young.mkdir(exist_ok=True)
    (young / "train_config.json").write_bytes((folder / "run" / "train_config.json").read_bytes())
    (young / "metrics.jsonl").write_text("")
    assert words.replace("{}", str(folder)) in failure([part.replace("{}", str(folder)) for part in argv], capsys)


def test_a_run_that_breaks(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A learning rate beyond float32 ruins the weights in the first step, so that the second has no loss."""
    settings = ("lr=1e30", "lr_critic=1e30", "max_iters=3", "log_iters=1", f"logdir={tmp_path}")
    assert cli.main(train(folder, *settings)) == 1
    (line,) = re.findall("^error: .*$", capsys.readouterr().err, flags=re.MULTILINE)
    assert "is NaN or infinite; the last good checkpoint is" in line


def test_a_run_beyond_memory(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Latents of more bytes than can be addressed."""
    settings = ("num_training_frames=3000000000000", f"logdir={tmp_path}")
    assert cli.main(train(folder, *settings)) == 2
    assert capsys.readouterr().err.endswith(f"error: {cli.TRAINING_OUT_OF_MEMORY}\n")


SCRIPT = ("bash", str(ROOT / "train_init.sh"))
TORCHRUN = (
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    *("-m", "longlive", "train"),
)


def start(
    folder: Path, *settings: str, launcher: tuple[str, ...] = SCRIPT, **variables: str
) -> "subprocess.Popen[bytes]":
    """Training on two processes."""
    environment = {"LONGLIVE_PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NUM_GPUS": "2"}
    return subprocess.Popen(
        [*launcher, *train(folder, *settings)[1:]],
        cwd=folder,
        env={**os.environ, **environment, **variables},
        stderr=subprocess.PIPE,
        bufsize=0,
    )


def read_to(process: "subprocess.Popen[bytes]", words: bytes) -> None:
    """Wait until a process has said these words on stderr."""
    said = b""
    assert process.stderr is not None
    while not said.endswith(words):
        byte = process.stderr.read(1)
        assert byte, said.decode()
        said += byte


def finish(process: "subprocess.Popen[bytes]") -> tuple[int, str]:
    """The exit status and the rest of stderr, which a process that is left over would hold open."""
    told = process.communicate(timeout=240)[1].decode()
    return process.returncode, told


@pytest.mark.slow
def test_torchrun_and_the_script_take_turns(folder: Path, tmp_path: Path) -> None:
    """Any starter goes on from what another has saved; SIGTERM saves and is a success."""
    code, told = finish(start(folder, f"logdir={tmp_path}", launcher=TORCHRUN))
    assert code == 0, told
    script = start(folder, f"logdir={tmp_path}", "max_iters=1000")
    read_to(script, b"going on after step 1 of 1000")
    read_to(script, b"critic=")  # the progress bar after a step
    script.send_signal(signal.SIGTERM)
    code, told = finish(script)
    assert code == 0, told
    assert "stopped as asked" in told
    latest = find_latest(tmp_path / "checkpoints")
    assert latest is not None
    assert latest.name > "step_000001"


@pytest.mark.slow
def test_a_killed_process_ends_the_others(folder: Path, tmp_path: Path) -> None:
    noting = stand_in(tmp_path, f'echo $$ >"{tmp_path}/$RANK"; exec {sys.executable} "$@"')
    script = start(folder, f"logdir={tmp_path / 'run'}", "max_iters=1000", **noting)
    read_to(script, b"critic=")
    os.kill(int((tmp_path / "1").read_text()), signal.SIGKILL)
    code, told = finish(script)
    assert code == 128 + signal.SIGKILL
    assert told.endswith("error: process 1 was ended by SIGKILL\n")
    assert "Traceback" not in told


def test_a_process_that_fails_alone_speaks(folder: Path, tmp_path: Path) -> None:
    """The main process waits for it to join, and is ended."""
    wrong = stand_in(tmp_path, f'((RANK == 0)) || set -- "$@" data_path=none.txt; exec {sys.executable} "$@"')
    code, told = finish(start(folder, f"logdir={tmp_path / 'run'}", **wrong))
    assert (code, told) == (2, f"error: {folder / 'none.txt'}: cannot be read (No such file or directory)\n")


@pytest.mark.parametrize("launcher", [SCRIPT, TORCHRUN])
def test_processes_that_fail_alike_speak_once(launcher: tuple[str, ...], folder: Path) -> None:
    code, told = finish(start(folder, "heigth=17", launcher=launcher))
    assert code != 0
    assert told.count("error: command line: unknown key 'heigth'") == 1
