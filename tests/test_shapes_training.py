"""All stages of the Shapes world through the training command, a few steps each."""

import re
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from longlive import cli
from longlive.builtin import BUILTIN_MODEL_KWARGS, BUILTIN_STEPS
from longlive.config import ROOT
from longlive.data.clips import LatentClips
from longlive.data.shapes.clips import ShapesSwitches
from longlive.train_config import load_train_config
from longlive.train_inputs import read_inputs
from longlive.train_world import encode_batch, encode_world, switch_frames
from longlive.training.metrics import read_metrics

SMALL = (
    *("num_scenes=4", "max_iters=2", "log_iters=0", "batch_size=1", "compile=false", "device=cpu"),
    *("num_training_frames=3", "model_kwargs.local_attn_size=6", "dfake_gen_update_ratio=2"),
    *("streaming_chunk_size=6", "streaming_min_new_frame=3", "streaming_max_length=12", "switch_choices=[3]"),
)


def train(stage: str, runs: Path, *settings: str) -> int:
    config = f"--config_path={ROOT}/configs/shapes_{stage}.yaml"
    return cli.main(["train", config, f"logdir={runs}/{stage}", *SMALL, *settings])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of all stages, as scripts/train_shapes.sh chains them."""
    runs = tmp_path_factory.mktemp("shapes")
    vae, teacher = f"vae_ckpt={runs}/vae/vae.safetensors", f"{runs}/teacher/generator.safetensors"
    assert train("vae", runs) == 0
    assert train("teacher", runs, vae) == 0
    longer = "num_training_frames=9"  # the sink and two more blocks
    assert train("causal_init", runs, vae, f"init_logdir={runs}/teacher", longer) == 0
    start = (f"init_logdir={runs}/causal_init", f"real_ckpt={teacher}", f"critic_ckpt={teacher}")
    assert train("train_init", runs, vae, *start) == 0
    assert train("train_long", runs, vae, f"init_logdir={runs}/train_init", f"real_ckpt={teacher}") == 0
    return runs


@pytest.mark.parametrize(
    ("stage", "losses"),
    [
        ("vae", {"vae"}),
        ("teacher", {"generator"}),
        ("causal_init", {"generator"}),
        ("train_init", {"generator", "critic"}),
        ("train_long", {"generator", "critic"}),
    ],
)
def test_every_stage_trains(stage: str, losses: set[str], runs: Path) -> None:
    rows = read_metrics(runs / stage)
    assert [row["step"] for row in rows] == [1, 2]
    assert {name.removesuffix("/loss") for row in rows for name in row if name.endswith("/loss")} == losses


def test_what_comes_out_makes_videos(runs: Path, tmp_path: Path) -> None:
    config = f"--config_path={runs}/train_long/inference.yaml"
    prompt = "prompt=A big red star bounces on a white background."
    assert cli.main(["inference", config, prompt, "num_output_frames=6", f"output_folder={tmp_path}"]) == 0
    assert len(list(tmp_path.glob("*.mp4"))) == 1


def test_a_finished_stage_is_not_trained_again(runs: Path) -> None:
    vae = runs / "vae"
    before = (vae / "metrics.jsonl").read_bytes()
    assert train("vae", runs) == 0
    assert (vae / "metrics.jsonl").read_bytes() == before


def test_hints_reach_the_teacher(runs: Path, tmp_path: Path) -> None:
    """With them the mean timestep of a step is lower; without, it is that of the clip."""
    settings = (f"vae_ckpt={runs}/vae/vae.safetensors", "picture_share=0")
    for share in (0, 1):
        assert train("teacher", tmp_path / str(share), *settings, f"hint_share={share}") == 0
    plain, hinted = (
        [row["generator/timestep"] for row in read_metrics(tmp_path / str(share) / "teacher")] for share in (0, 1)
    )
    assert all(less < common for less, common in zip(hinted, plain, strict=True))


PLAIN_PAST = ("worn_past=false", "switch_share=0")
RELATIVE = "model_kwargs.use_infinite_attention=true"


def test_positions_within_the_window(runs: Path, tmp_path: Path) -> None:
    """Three blocks of a sequence, the window full, the sink on its way: not the same as positions within the video."""
    start = (f"vae_ckpt={runs}/vae/vae.safetensors", f"init_logdir={runs}/train_init")
    teacher, longer = f"real_ckpt={runs}/teacher/generator.safetensors", "streaming_chunk_size=9"
    assert train("train_long", tmp_path, *start, teacher, longer, RELATIVE) == 0
    assert "use_infinite_attention: true" in (tmp_path / "train_long" / "inference.yaml").read_text()
    absolute = RELATIVE.replace("true", "false")
    assert train("train_long", tmp_path / "absolute", *start, teacher, longer, absolute) == 0
    rows, others = read_metrics(tmp_path / "train_long"), read_metrics(tmp_path / "absolute" / "train_long")
    assert rows[0]["generator/loss"] != others[0]["generator/loss"]


def test_causal_init_by_regression(runs: Path, tmp_path: Path) -> None:
    vae, teacher = f"vae_ckpt={runs}/vae/vae.safetensors", f"{runs}/teacher/generator.safetensors"
    config = f"--config_path={ROOT}/configs/shapes_clips.yaml"
    sizes = ("num_scenes=2", "num_training_frames=3", "num_steps=5", "batch_size=2", "device=cpu")
    assert cli.main(["clips", config, vae, f"real_ckpt={teacher}", f"output_folder={tmp_path}/clips", *sizes]) == 0
    index = tmp_path / "clips" / "clips.jsonl"
    assert LatentClips(index).num_steps == 4
    start = (vae, f"init_logdir={runs}/teacher", "world=null", f"clips_path={index}", *PLAIN_PAST)
    assert train("causal_init", tmp_path, *start) == 0


def test_a_worn_past(runs: Path, tmp_path: Path) -> None:
    """Worn behind the sink, what is to be learnt from a block later on and by less; and the stage trains on it."""
    start = (f"vae_ckpt={runs}/vae/vae.safetensors", f"init_logdir={runs}/teacher", "num_training_frames=12")
    settings = (*SMALL, *start, "worn_past=true", "switch_share=0", f"logdir={tmp_path}")
    config = load_train_config(ROOT / "configs" / "shapes_causal_init.yaml", settings)
    inputs = read_inputs(config)
    batch = encode_world(config, inputs, torch.device("cpu")).batch(range(4))
    plain = encode_world(replace(config, worn_past=False), inputs, torch.device("cpu")).batch(range(4)).latents
    assert batch.past is not None
    torch.testing.assert_close(batch.past[:, :3], plain[:, :3])
    torch.testing.assert_close(batch.latents[:, :6], plain[:, :6])
    assert not torch.allclose(batch.past[:, 3:6], plain[:, 3:6], atol=1e-3)
    off, less = (batch.past[:, 6:] - plain[:, 6:]).norm(), (batch.latents[:, 6:] - plain[:, 6:]).norm()
    between = (batch.latents[:, 6:] - batch.past[:, 6:]).norm()
    assert 0 < between < less < off
    assert train("causal_init", tmp_path, *start, "worn_past=true") == 0


def test_clips_through_a_switch(runs: Path, tmp_path: Path) -> None:
    """The scene before it, then that after it, which its prompt tells and which alone is to be learnt."""
    start = (f"vae_ckpt={runs}/vae/vae.safetensors", f"init_logdir={runs}/teacher", "num_training_frames=12")
    settings = (*SMALL, *start, "num_scenes=8", "worn_past=false", f"logdir={tmp_path}")
    config = load_train_config(ROOT / "configs" / "shapes_causal_init.yaml", (*settings, "switch_share=0.5"))
    inputs = read_inputs(config)
    vae, frames = inputs.vae, switch_frames(config)
    batch = encode_world(config, inputs, torch.device("cpu")).batch(range(8))
    plain = encode_world(replace(config, switch_share=0.0), inputs, torch.device("cpu")).batch(range(8))
    both = encode_world(replace(config, worn_past=True), inputs, torch.device("cpu")).batch(range(8))
    assert batch.learnt_from is not None
    assert batch.learnt_from.tolist() == frames
    assert {0} < set(frames) <= {0, 6, 9}
    assert {*batch.prompts} <= {prompt for prompts in inputs.prompts for prompt in prompts}, "which are encoded before"
    assert both.past is not None
    for number, frame in enumerate(frames):
        expected, prompt = plain.latents[number], plain.prompts[number]
        if frame:
            pairs = ShapesSwitches(8, config.seed, 1 + 4 * (frame - 1), num_video_frames=45)
            ((_, prompt),) = pairs.prompts([number])
            expected = encode_batch(vae, pairs.pixels([number]))[0].detach()
        torch.testing.assert_close(batch.latents[number], expected, rtol=1e-4, atol=1e-4)
        assert batch.prompts[number] == both.prompts[number] == prompt
        is_worn = not torch.equal(both.past[number], both.latents[number])
        assert is_worn == (frame == 0), "scenes that switch are not worn"
    assert train("causal_init", tmp_path, *start, "switch_share=1.0", "worn_past=true") == 0


def test_clips_for_regression_are_as_long_as_the_script_says() -> None:
    script = (ROOT / "scripts" / "train_shapes.sh").read_text()
    (length,) = re.findall(r"num_training_frames=(\d+)", script)
    assert f"num_training_frames: {length}\n" in (ROOT / "configs" / "shapes_clips.yaml").read_text()


@pytest.mark.parametrize("name", ["causal_init", "train_init", "train_long", "evaluate", "clips"])
def test_the_built_in_model_runs_as_it_was_trained(name: str) -> None:
    settings = OmegaConf.load(ROOT / "configs" / f"shapes_{name}.yaml")
    assert tuple(settings["denoising_step_list"]) == BUILTIN_STEPS
    if name != "clips":
        assert BUILTIN_MODEL_KWARGS.items() <= settings["model_kwargs"].items()


def test_every_ablation_has_its_settings() -> None:
    script = (ROOT / "scripts" / "ablate_shapes.sh").read_text()
    names = [name for line in re.findall(r"^all\+?=\((.*)\)$", script, re.M) for name in line.split()]
    arms = re.findall(r"^        ([\w*]+)\)", script, re.M)
    assert {name: [arm for arm in arms if fnmatch(name, arm)] for name in names} == {
        name: [re.sub(r"\d+$", "*", name) if name.startswith(("lora", "window")) else name] for name in names
    }


@pytest.mark.parametrize(
    ("stage", "settings", "message"),
    [
        ("teacher", ("worn_past=true",), "worn_past=true: needs stage=causal_init, a world, and a sink"),
        ("causal_init", ("worn_past=true", "model_kwargs.sink_size=0"), "worn_past=true: needs stage=causal_init, a"),
        ("causal_init", ("worn_past=true", "model_kwargs.sink_size=2"), "worn_past or switch_share, at least 9"),
        ("train_init", ("switch_share=0.5",), "switch_share=0.5: needs stage=causal_init and a world"),
        ("causal_init", ("hint_share=0.5",), "hint_share=0.5: not available with stage=causal_init"),
        ("teacher", (RELATIVE,), "use_infinite_attention=true: not available with stage=pretrain"),
        (
            "train_init",
            (RELATIVE, "cuda_graphs=false", "activation_checkpointing=full", "one_gradient_pass=false"),
            "use_infinite_attention=true: needs one_gradient_pass=true or activation_checkpointing=none",
        ),
        ("train_long", (RELATIVE, "recache_policy=published"), "not available with recache_policy=published"),
        ("vae", ("height=80",), "world=shapes: its pictures are of height=64, width=96, fps=16"),
        ("vae", ("clips_path=clips.jsonl",), "there can be only one of them"),
        ("vae", ("world=cubes",), "world=cubes: must be one of shapes"),
        ("train_long", ("adapter.type=lora", "adapter.dropout=0.1"), "adapter.dropout=0.1: must be 0"),
    ],
)
def test_wrong_settings(
    stage: str, settings: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(stage, tmp_path, *settings) == 2
    assert message in capsys.readouterr().err
