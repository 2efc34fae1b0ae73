"""The commands end to end on the built-in model: files, resuming, sharing out, interruptions, bad input."""

import json
import signal
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TINY_VAE, tiny_models
from torch import Tensor

from longlive import cli
from longlive.build import choose_model, shorten
from longlive.builtin import BUILTIN_MODEL_KWARGS, BUILTIN_STEPS
from longlive.config import ROOT, InferenceConfig, load_config
from longlive.data.prompts import Script
from longlive.inference.pipeline import (
    OutputConfig,
    make_videos,
    missing_jobs,
    num_video_frames,
    plan_jobs,
    prompt_starts,
)
from longlive.inference.session import Models, SessionConfig
from longlive.models.kv_cache import CacheConfig
from longlive.models.vae import StreamCache, WanVAE
from longlive.rollout import SamplerConfig

SESSION = SessionConfig(32, 48, SamplerConfig(steps=(1000, 500), frames_per_block=2), CacheConfig(6, 2))


def script(*prompts: str, num_frames: int = 8, switch_frames: tuple[int, ...] = (), **changes: Any) -> Script:
    fields = {"seed": None, "start_from": None, **changes}
    return Script(prompts, switch_frames, num_frames, **fields)


def run(
    models: Models, folder: Path, scripts: list[Script], batch_size: int = 1, animation: bool = False, **changes: Any
) -> list[str]:
    planning = {"num_samples": 1, "seed": 0, "by_index": True, "identity": {}} | changes
    jobs = plan_jobs(scripts, **planning)
    output = OutputConfig(folder, crf=0, animation=animation)
    missing = missing_jobs(jobs, output)
    make_videos(models, SESSION, output, missing, batch_size=batch_size, info={"weights": "tiny"}, progress=False)
    return [job.name for job in jobs]


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def models() -> Models:
    return tiny_models()


def test_what_a_video_leaves_behind(models: Models, tmp_path: Path) -> None:
    (name,) = run(models, tmp_path, [script("a cat", "a dog", switch_frames=(3,))])
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.json", f"{name}.mp4", f"{name}.png"]
    assert frames_of(tmp_path / f"{name}.mp4").shape == (29, 32, 48, 3)
    told = json.loads((tmp_path / f"{name}.json").read_text())
    assert told["prompts"] == ["a cat", "a dog"]
    assert told["switch_frame_indices"] == [3]
    assert told["prompt_start_seconds"] == [0.0, 13 / 16]  # the block that starts at latent 4, video frame 13
    assert (told["seed"], told["num_video_frames"], told["weights"]) == (0, 29, "tiny")
    assert told["timings"]["fps"] > 0


def test_an_animated_picture_beside_the_video(models: Models, tmp_path: Path) -> None:
    """Also of a video that is there without it."""
    run(models, tmp_path, [script("a cat")])
    (name,) = run(models, tmp_path, [script("a cat")], animation=True)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".mp4", ".png", ".webp"]
    with Image.open(tmp_path / f"{name}.webp") as picture:
        assert (picture.n_frames, picture.size) == (29, (48, 32))


def test_same_video_whatever_batch_and_order(models: Models, tmp_path: Path) -> None:
    scripts = [script("a cat"), script("a dog", seed=5), script("snow", num_frames=6), script("rain")]
    names = run(models, tmp_path / "alone", scripts)
    shuffled = [scripts[i] for i in (3, 1, 0, 2)]
    others = run(models, tmp_path / "batched", shuffled, batch_size=3)
    for name, other in zip(names, [others[2], others[1], others[3], others[0]], strict=True):
        assert name.split("-")[-1] == other.split("-")[-1]
        a, b = (
            frames_of(path).astype(int) for path in (tmp_path / f"alone/{name}.mp4", tmp_path / f"batched/{other}.mp4")
        )
        assert np.abs(a - b).max() <= 3  # one grey level of rounding, through yuv


def test_a_second_run_makes_only_what_is_missing(models: Models, tmp_path: Path) -> None:
    scripts = [script("a cat"), script("a dog"), script("a bird")]
    names = run(models, tmp_path, scripts)
    (tmp_path / f"{names[1]}.mp4").unlink()
    before = {name: (tmp_path / f"{name}.mp4").stat().st_mtime_ns for name in (names[0], names[2])}
    assert run(models, tmp_path, scripts) == names
    assert (tmp_path / f"{names[1]}.mp4").exists()
    assert before == {name: (tmp_path / f"{name}.mp4").stat().st_mtime_ns for name in before}


def test_names_tell_apart_what_differs() -> None:
    base = {"num_samples": 2, "seed": 0, "by_index": True, "identity": {"model": "a"}}
    jobs = plan_jobs([script("a cat")], **base)
    assert [job.seed for job in jobs] == [0, 1]
    assert jobs[0].name.startswith("000-0-")
    assert jobs[1].name.startswith("000-1-")
    for changed in (
        plan_jobs([script("a dog")], **base),
        plan_jobs([script("a cat", num_frames=10)], **base),
        plan_jobs([script("a cat")], **{**base, "identity": {"model": "b"}}),
        plan_jobs([script("a cat")], **{**base, "seed": 7}),
    ):
        assert changed[0].name != jobs[0].name
    assert plan_jobs([script("a cat")], **base) == jobs
    by_words = plan_jobs([script("A Cat, asleep!")], **{**base, "by_index": False})
    assert by_words[0].name.startswith("a-cat-asleep-0-")


def test_one_video_once(models: Models, tmp_path: Path) -> None:
    twice = [script("a cat"), script("a cat")]
    assert len(set(run(models, tmp_path / "index", twice, batch_size=2))) == 2
    (name,) = run(models, tmp_path / "words", twice, batch_size=2, by_index=False)
    assert [path.name for path in (tmp_path / "words").glob("*.mp4")] == [f"{name}.mp4"]


def test_a_clip_counts_by_its_content(tmp_path: Path) -> None:
    base = {"num_samples": 1, "seed": 0, "by_index": True, "identity": {}}
    names = []
    for file, colour in (("a.png", (200, 30, 30)), ("b.png", (200, 30, 30)), ("a.png", (30, 30, 200))):
        Image.new("RGB", (48, 32), colour).save(tmp_path / file)
        (job,) = plan_jobs([script("a cat", start_from=str(tmp_path / file))], **base)
        names.append(job.name)
    assert names[0] == names[1] != names[2]


def test_an_unchanged_prompt_is_not_recached_because_of_a_neighbour(models: Models, tmp_path: Path) -> None:
    scripts = [script("a cat", "a cat", switch_frames=(4,)), script("a dog", "rain", switch_frames=(4,))]
    names = run(models, tmp_path / "alone", scripts)
    assert run(models, tmp_path / "batched", scripts, batch_size=2) == names
    for name in names:
        assert np.array_equal(*(frames_of(tmp_path / folder / f"{name}.mp4") for folder in ("alone", "batched")))


class InterruptedVAE(WanVAE):
    """Ctrl-C arrives while the third block is decoded."""

    num_calls = 0

    def decode(self, latents: Tensor, cache: StreamCache | None = None) -> Tensor:
        self.num_calls += 1
        if self.num_calls == 3:
            signal.raise_signal(signal.SIGINT)
        return super().decode(latents, cache)


def test_ctrl_c_leaves_a_playable_part_and_the_next_run_completes_it(models: Models, tmp_path: Path) -> None:
    vae = InterruptedVAE(TINY_VAE).eval()
    vae.load_state_dict(models.vae.state_dict())
    with pytest.raises(KeyboardInterrupt):
        run(Models(models.generator, vae, models.encode_prompts), tmp_path, [script("a cat")])
    (partial,) = tmp_path.glob("*.mp4")
    assert partial.name.endswith(".partial.mp4")
    part = frames_of(partial)
    assert part.shape == (13, 32, 48, 3)
    (name,) = run(models, tmp_path, [script("a cat")])
    assert [path.name for path in tmp_path.glob("*.mp4")] == [f"{name}.mp4"]
    assert np.array_equal(frames_of(tmp_path / f"{name}.mp4")[:13], part)


@pytest.mark.parametrize("kind", ["picture", "clip"])
def test_continues_a_picture_or_clip(models: Models, tmp_path: Path, kind: str) -> None:
    if kind == "picture":
        source, num_given = tmp_path / "start.png", 1
        Image.new("RGB", (60, 40), (200, 30, 30)).save(source)
    else:
        (name,) = run(models, tmp_path, [script("a cat", num_frames=4)])
        source, num_given = tmp_path / f"{name}.mp4", 13
    job = script("a dog", "a bird", switch_frames=(4,), start_from=str(source))
    (name,) = run(models, tmp_path / "out", [job])
    assert len(frames_of(tmp_path / f"out/{name}.mp4")) == num_given + 32
    told = json.loads((tmp_path / f"out/{name}.json").read_text())
    assert told["prompt_start_seconds"] == [0.0, (num_given + 16) / 16]


def test_frame_counts() -> None:
    clip = torch.zeros(1, 5, 3, 8, 8)
    job = script("a", "b", num_frames=8, switch_frames=(3,))
    assert num_video_frames(job, None, 4) == 29
    assert num_video_frames(job, clip, 4) == 37
    assert prompt_starts(job, 2, None, 4) == [0, 13]
    assert prompt_starts(job, 2, clip, 4) == [0, 21]


def test_more_processes_share_out_the_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\na bird\n")
    settings = [f"data_path={prompts}", "num_output_frames=3", "inference_iter=-1", "denoising_step_list=1000"]
    assert cli.main(["inference", *settings, f"output_folder={tmp_path / 'one'}"]) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    made: list[set[str]] = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        folder = tmp_path / f"rank{rank}"
        assert cli.main(["inference", *settings, f"output_folder={folder}"]) == 0
        made.append({path.name for path in folder.glob("*.mp4")})
    assert not made[0] & made[1]
    assert made[0] | made[1] == {path.name for path in (tmp_path / "one").glob("*.mp4")}
    for rank, names in zip(("1", "0"), made, strict=True):
        for name in names:
            assert np.array_equal(frames_of(tmp_path / f"rank{rank}" / name), frames_of(tmp_path / "one" / name))


def test_interactive_on_the_built_in_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = ["prompt=a cat | a dog", "num_output_frames=6", "low_memory=true", f"output_folder={tmp_path}"]
    assert cli.main(["interactive", *settings]) == 0
    (sidecar,) = tmp_path.glob("*.json")
    told = json.loads(sidecar.read_text())
    assert (told["prompts"], told["switch_frame_indices"]) == (["a cat", "a dog"], [3])
    assert "tiny built-in model" in capfd.readouterr().err


def test_built_in_model_stands_in_for_weights_that_are_not_there(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Only where prompts are read from a file does it mean the first video alone."""
    for settings, is_short in (([], True), (["inference_iter=-1"], False), (["prompt=a cat"], False)):
        asked, explicit = load_config(InferenceConfig, ROOT / "configs/longlive_inference.yaml", settings)
        caplog.clear()
        chosen = choose_model(asked, explicit)
        assert chosen.model_name == "tiny"
        assert "No weights found" in caplog.text
        assert "first video" not in caplog.text
        chosen = shorten(chosen, asked, explicit)
        assert (chosen.inference_iter == 1) == ("first video" in caplog.text) == is_short
        assert chosen.num_output_frames == 81
        assert {key: getattr(chosen.model_kwargs, key) for key in BUILTIN_MODEL_KWARGS} == BUILTIN_MODEL_KWARGS
        assert chosen.denoising_step_list == BUILTIN_STEPS
    for typed in ("num_output_frames=120", "num_frame_per_block=5"):
        asked, explicit = load_config(InferenceConfig, ROOT / "configs/longlive_inference.yaml", [typed])
        assert shorten(choose_model(asked, explicit), asked, explicit).num_output_frames == 120
    asked, explicit = load_config(
        InferenceConfig, ROOT / "configs/longlive_inference.yaml", ["model_kwargs.timestep_shift=5"]
    )
    assert choose_model(asked, explicit).model_kwargs.timestep_shift == 5
    typed_steps = ["denoising_step_list=[1000,750,500,250]"]  # the shipped ones, but asked for
    asked, explicit = load_config(InferenceConfig, ROOT / "configs/longlive_inference.yaml", typed_steps)
    assert choose_model(asked, explicit).denoising_step_list == (1000, 750, 500, 250)
    assert shorten(asked, asked, frozenset()) is asked


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["num_output_frames=7"], "multiple of num_frame_per_block"),
        (["height=100"], "multiple of 16"),
        (["num_ouput_frames=6"], "did you mean 'num_output_frames'"),
        (["data_path={tmp}/none.txt"], "cannot be read"),
        (["data_path={tmp}/empty.txt"], "holds no prompt"),
        (["data_path={tmp}/latin.txt"], "not UTF-8"),
        (["data_path={tmp}/bad.jsonl", "inference_iter=-1"], "line 2"),
        (["prompt=a | b", "switch_frame_indices=300"], "outside the video"),
        (["prompt=a | b", "switch_frame_indices=3,6"], "needs 1 switch frame"),
        (["generator_ckpt={tmp}/none.pt"], "does not exist"),
        (["output_folder=/dev/null/videos"], "cannot be written"),
        (["device=cuda:99"], "CUDA device"),
        (["start_from={tmp}/none.png", "prompt=a"], "none.png"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    settings: list[str], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "bad.jsonl").write_text('{"prompts": ["a"]}\n{"prompts": \n')
    out = tmp_path / "out"
    arguments = [f"output_folder={out}", *(setting.format(tmp=tmp_path) for setting in settings)]
    assert cli.main(["inference", *arguments]) == 2
    error = capfd.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ")
    assert message in error[-1]
    assert not any(line.startswith(("Traceback", "error")) for line in error[:-1])
    assert not out.exists() or not any(out.iterdir())


def test_own_weights_that_are_missing_are_no_reason_for_the_built_in_model(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.yaml").write_text("generator_ckpt: nowhere/own.pt\n")
    assert cli.main(["inference", f"--config_path={tmp_path / 'own.yaml'}", f"output_folder={tmp_path}"]) == 2
    assert "does not exist" in capfd.readouterr().err


def test_nothing_is_loaded_when_nothing_is_missing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = ["prompt=a cat", "num_output_frames=3", f"output_folder={tmp_path}"]
    assert cli.main(["inference", *settings]) == 0
    (video,) = tmp_path.glob("*.mp4")
    made = video.stat().st_mtime_ns
    capfd.readouterr()
    assert cli.main(["inference", *settings]) == 0
    assert "1 of 1 videos are there already" in capfd.readouterr().err
    assert video.stat().st_mtime_ns == made
