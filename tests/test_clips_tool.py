"""Making clips: the ODE sampler, encoded videos and a teacher's samples, folders that go on, and training on them."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny import TINY_DIT, tiny_dit, tiny_models
from torch import Tensor

from longlive import cli
from longlive.build import load_vae
from longlive.builtin import BUILTIN_VAE, TEXT, builtin_encoder
from longlive.data.clips import ClipWriter, LatentClips, PixelClips
from longlive.data.order import Order
from longlive.flow import add_noise, flow_to_x0
from longlive.inference.video import VideoWriter
from longlive.make_clips import Make, Sampling, encoded_videos, sampled_clips, write_clips
from longlive.models.attention import sdpa
from longlive.models.dit import WanDiT
from longlive.models.kv_cache import CacheConfig
from longlive.rollout import Sampler, SamplerConfig
from longlive.training.clock import Clock
from longlive.training.draw import Draw, Pictures
from longlive.training.flow_matching import CausalInit, FlowMatchingConfig, Pretrain
from longlive.training.sampling import noise_levels, sample_clips
from longlive.training.teacher_forcing import TeacherForced
from longlive.weights.formats import read_vae

CPU = torch.device("cpu")
STUDENT = Sampler(SamplerConfig(frames_per_block=1))
SMALL = ("model_name=tiny", "height=16", "width=16", "num_training_frames=3", "device=cpu")  # one token a frame
TEACHER = (*SMALL, "source=teacher", "real_name=tiny", "num_steps=2", "trajectory=true")
PROMPTS = ["a red fox", "two boats", "rain", "a lamp"]
LATENT_CHANNELS = read_vae(BUILTIN_VAE)[0].z_dim


# --- sampling ---------------------------------------------------------------------------------------------------------


class GaussianScore:
    """The exact flow where data are normal with standard deviation `std` around a mean: the first value of the prompt.

    x_t is then normal around (1 - sigma) mean with variance (1 - sigma)² std² + sigma², and the path keeps a state at
    its quantile, so that the solution is known: `state`.
    """

    def __init__(self, std: float) -> None:
        self.std = std
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, xt: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        self.calls.append((xt, timesteps, text))
        mean, sigma = text[:, :1, :1, None, None], timesteps.double()[..., None, None, None] / 1000
        residual = (xt - (1 - sigma) * mean) / ((1 - sigma) ** 2 * self.std**2 + sigma**2)
        return sigma * residual - (mean + (1 - sigma) * self.std**2 * residual)

    def state(self, noise: Tensor, mean: Tensor | float, sigma: float) -> Tensor:
        return (1 - sigma) * mean + ((1 - sigma) ** 2 * self.std**2 + sigma**2) ** 0.5 * noise


def gaussian_case() -> tuple[Tensor, Tensor, Tensor]:
    """Noise [2, 3, 4, 2, 2] float64 and two prompts [2, 1, 1]: means 0.7 and -0.4, negative 0.1."""
    noise = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    return noise, torch.tensor([0.7, -0.4], dtype=torch.float64)[:, None, None], torch.full((2, 1, 1), 0.1).double()


@pytest.mark.parametrize("std", [0.3, 1.0])
def test_solver_converges_to_the_exact_path(std: float) -> None:
    noise, text, negative = gaussian_case()
    score = GaussianScore(std)
    # Guidance of a linear flow moves the mean.
    mean = (text + 2.0 * (text - negative))[..., None, None]
    errors = []
    for num_steps in (25, 50, 100, 200):
        x0, states = sample_clips(
            score, noise, text, negative, guidance=2.0, num_steps=num_steps, keep_sigmas=STUDENT.sigmas
        )
        assert states is not None
        exact = torch.stack([score.state(noise, mean, sigma) for sigma in STUDENT.sigmas], dim=1)
        errors.append(max((states - exact).abs().max(), (x0 - score.state(noise, mean, 0.0)).abs().max()).item())
    assert errors[-1] < 2e-3
    for error, next_error in pairwise(errors):
        assert next_error < error / 2.5  # of second order, 4 in the limit; of first it would be 2


def test_states_are_those_that_the_model_saw() -> None:
    noise, text, negative = gaussian_case()
    score = GaussianScore(0.5)
    x0, states = sample_clips(score, noise, text, negative, guidance=0.0, num_steps=6, keep_sigmas=STUDENT.sigmas)
    assert states is not None
    assert states.shape == (2, 4, 3, 4, 2, 2)
    assert states.dtype == x0.dtype == torch.float64
    assert torch.equal(states[:, 0], noise)
    for i, timestep in enumerate(STUDENT.timesteps):
        (seen,) = [xt for xt, timesteps, _ in score.calls if torch.equal(timesteps, torch.full((2, 3), timestep))]
        assert torch.equal(states[:, i], seen)


@pytest.mark.parametrize("shift", [1.0, 1.7, 5.0, 8.0])
@pytest.mark.parametrize("num_steps", [1, 4, 7, 50])
@pytest.mark.parametrize("warp", [True, False])
def test_kept_levels_are_steps(shift: float, num_steps: int, warp: bool) -> None:
    keep = Sampler(SamplerConfig(steps=(1000, 740, 500, 20, 1), warp=warp, shift=shift)).sigmas
    sigmas = noise_levels(shift, num_steps, keep)
    assert set(keep) <= set(sigmas)
    assert all(a - b > 1e-7 for a, b in pairwise(sigmas))
    assert (sigmas[0], sigmas[-1]) == (pytest.approx(1, abs=1e-6), 0.0)
    assert num_steps + 1 <= len(sigmas) <= num_steps + 1 + len(keep)
    assert len(noise_levels(shift, num_steps)) == num_steps + 1


def test_without_guidance_the_model_is_called_once_a_step() -> None:
    noise, text, negative = gaussian_case()
    score = GaussianScore(1.0)
    _, states = sample_clips(score, noise, text, negative, guidance=0.0, num_steps=8)
    assert states is None
    assert len(score.calls) == 8
    assert all(seen is text for _, _, seen in score.calls)
    sample_clips(score, noise, text, negative, guidance=1.0, num_steps=8)
    assert len(score.calls) == 8 + 16


def test_steps_of_very_different_length_do_not_magnify_rounding() -> None:
    noise, text, negative = gaussian_case()
    score = GaussianScore(1.0)

    def rounded(xt: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        return score(xt, timesteps, text).bfloat16()

    keep = [sigma + 3e-6 for sigma in noise_levels(5.0, 50)[1:40]]  # just before steps of the solver's own
    exact = score.state(noise, text[..., None, None], 0.0)
    x0, _ = sample_clips(rounded, noise, text, negative, guidance=0.0, num_steps=50, keep_sigmas=keep)
    assert (x0 - exact).abs().max() < 0.15


class Fresh:
    """Draws noise, and counts."""

    def __init__(self, noise: Tensor) -> None:
        self.noise, self.count = noise, 0
        self.generator = torch.Generator().manual_seed(1)

    def __call__(self) -> Tensor:
        self.count += 1
        return torch.randn(self.noise.shape, dtype=self.noise.dtype, generator=self.generator)


@pytest.mark.parametrize("std", [0.3, 1.0])
def test_the_random_walk_ends_in_the_data_and_forgets_where_it_began(std: float) -> None:
    _, text, negative = gaussian_case()
    noise = torch.randn(2, 3, 4, 40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = []
    for num_steps in (100, 400):
        fresh = Fresh(noise)
        x0, _ = sample_clips(
            GaussianScore(std), noise, text, negative, guidance=0.0, num_steps=num_steps, fresh_noise=fresh
        )
        assert fresh.count == num_steps - 1  # the last step ends at x0
        for i in range(2):
            assert x0[i].mean() == pytest.approx(text[i].item(), abs=0.02)
            assert torch.corrcoef(torch.stack([noise[i].flatten(), x0[i].flatten()]))[0, 1].abs() < 0.03
        errors.append(abs(x0.flatten(1).std(dim=1).mean().item() / std - 1))
    assert errors[0] < 0.06  # without extrapolation 0.13 for the narrow data
    assert errors[1] < 0.025


def test_the_random_walk_mends_what_an_early_step_did_wrong() -> None:
    """A flow that is off at high noise shifts where the path ends, and hardly the walk."""
    noise, text, negative = gaussian_case()
    score = GaussianScore(0.3)

    def wrong_early(xt: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
        return score(xt, timesteps, text) + 2.0 * (timesteps[..., None, None, None] > 900)

    def ends(fresh: bool) -> tuple[Tensor, Tensor]:
        right, wrong = (
            sample_clips(
                it, noise, text, negative, guidance=0.0, num_steps=50, fresh_noise=Fresh(noise) if fresh else None
            )[0]
            for it in (score, wrong_early)
        )
        return right, wrong

    path, walk = ((wrong - right).abs().mean() for right, wrong in (ends(False), ends(True)))
    assert walk < 0.3 * path


# --- folders that go on -----------------------------------------------------------------------------------------------


def teacher_make(seed: int = 0) -> Make:
    models = tiny_models()
    sampling = Sampling((3, 4, 4, 4), seed, "blurred", 1.5, 5.0, 2, tuple(STUDENT.sigmas))
    return sampled_clips(models.generator, models.encode_prompts, PROMPTS + PROMPTS, sampling, CPU)


def test_random_walks_follow_from_seed_and_number() -> None:
    models = tiny_models()
    path = Sampling((3, 4, 4, 4), seed=0, negative_prompt="", guidance=1.5, shift=5.0, num_steps=4)
    walk = replace(path, stochastic=True)

    def clips(sampling: Sampling, batch_size: int) -> Tensor:
        make = sampled_clips(models.generator, models.encode_prompts, PROMPTS, sampling, CPU)
        return torch.cat([make(numbers.tolist())[0] for numbers in torch.arange(4).split(batch_size)])

    torch.testing.assert_close(clips(walk, 1), clips(walk, 4), atol=1e-5, rtol=1e-5)
    assert ((clips(walk, 4) - clips(path, 4)).abs().amax(dim=(1, 2, 3, 4)) > 0.1).all()


def write(folder: Path, make: Make, num_clips: int = 5, batch_size: int = 2) -> dict[str, bytes]:
    """The files of a folder that should have this many clips then."""
    write_clips(ClipWriter(folder), range(num_clips), PROMPTS + PROMPTS, make, batch_size)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("num_done", [0, 1, 2, 3, 4])
def test_an_interruption_changes_nothing(tmp_path: Path, num_done: int) -> None:
    make = teacher_make()
    wanted = write(tmp_path / "whole", make)
    assert len(wanted) == 6
    for name in ["clips.jsonl", *sorted(wanted)[:num_done]]:
        (tmp_path / "part").mkdir(exist_ok=True)
        (tmp_path / "part" / name).write_bytes(wanted[name])
    lines = wanted["clips.jsonl"].splitlines(keepends=True)
    cut = lines[num_done][:9]  # as a kill leaves it
    (tmp_path / "part" / "clips.jsonl").write_bytes(b"".join(lines[:num_done]) + cut)
    made: list[int] = []

    def recorded(numbers: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        made.extend(numbers)
        return make(numbers)

    assert write(tmp_path / "part", recorded) == wanted
    assert made == list(range(num_done - num_done % 2, 5))
    assert write(tmp_path / "part", recorded) == wanted  # nothing is left to do
    assert len(made) == 5 - (num_done - num_done % 2)


def test_ctrl_c_in_between(tmp_path: Path) -> None:
    make = teacher_make()

    def interrupted(numbers: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        if 2 in numbers:
            raise KeyboardInterrupt
        return make(numbers)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "part", interrupted)
    assert ClipWriter(tmp_path / "part").num_clips == 2
    assert write(tmp_path / "part", make) == write(tmp_path / "whole", make)


def test_a_clip_follows_from_seed_and_number(tmp_path: Path) -> None:
    first = write(tmp_path / "a", teacher_make(), num_clips=3, batch_size=1)
    more = write(tmp_path / "b", teacher_make(), num_clips=5, batch_size=1)
    assert {**more, "clips.jsonl": b""} | {**first, "clips.jsonl": b""} == {**more, "clips.jsonl": b""}
    other = write(tmp_path / "c", teacher_make(seed=1), num_clips=3, batch_size=1)
    assert all(other[name] != content for name, content in first.items() if name != "clips.jsonl")
    latents, states = teacher_make()([0, 4])  # one prompt
    assert states is not None
    assert (latents[0] - latents[1]).abs().max() > 0.1
    write(tmp_path / "d", teacher_make(), batch_size=5)
    alone, together = (LatentClips(tmp_path / name / "clips.jsonl").batch(range(5)) for name in "bd")
    torch.testing.assert_close(alone.latents, together.latents, atol=1e-5, rtol=1e-5)


# --- training on them -------------------------------------------------------------------------------------------------


class Seen(WanDiT):
    """The transformer itself, which notes the frames that it gets."""

    def forward(self, latents: Tensor, timesteps: Tensor, *args: object, **kwargs: object) -> Tensor:  # type: ignore[override]
        self.noted, self.text = (latents, timesteps), args[0]
        return super().forward(latents, timesteps, *args, **kwargs)  # type: ignore[arg-type]


def noted_training(folder: Path) -> tuple[LatentClips, Seen]:
    """Clips of the teacher's in `folder`, and a model to train on them."""
    write(folder, teacher_make())
    generator = Seen(TINY_DIT)
    generator.load_state_dict(tiny_dit(seed=3).state_dict())
    return LatentClips(folder / "clips.jsonl"), generator


def causal_init(generator: WanDiT, clips: LatentClips, encode_prompts: Callable[[Sequence[str]], Tensor]) -> CausalInit:
    generator.requires_grad_(True)
    return CausalInit(
        TeacherForced(
            generator, CacheConfig(window_frames=2, sink_frames=1), STUDENT.config.frames_per_block, 0.0, sdpa
        ),
        clips,
        Order(len(clips), seed=0),
        encode_prompts,
        "",
        FlowMatchingConfig(prompt_dropout=0.0),
        Clock(CPU),
        STUDENT,
    )


def draw(step: int = 0) -> Draw:
    return Draw(seed=0, position=2 * step, num_samples=2, offset=0, batch_size=2, device=CPU)


def losses(stage: CausalInit, num_steps: int) -> list[float]:
    """Of training on one micro-batch again and again."""
    assert isinstance(stage.generator, TeacherForced)
    optimizer = torch.optim.Adam(stage.generator.parameters(), lr=3e-3)
    values = []
    for _ in range(num_steps):
        loss = stage.loss("generator", draw()).value
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values


def test_pictures_are_the_first_frames_of_more_clips(tmp_path: Path) -> None:
    clips, generator = noted_training(tmp_path)
    encode_prompts, order = tiny_models().encode_prompts, Order(len(clips), seed=0)
    config = FlowMatchingConfig(prompt_dropout=0.5, pictures=Pictures(0.5, per_clip=3))
    stage = Pretrain(generator, clips, order, encode_prompts, "nothing", config, Clock(CPU))
    met = set()
    for step in range(8):
        loss = stage.loss("generator", draw(step))
        latents, timesteps = generator.noted
        met.add(len(latents))
        assert loss.num_frames == 6
        if len(latents) == 6:
            assert latents.shape[1] == 1
            batch = clips.batch([order[sample] for sample in range(6 * step, 6 * step + 6)])
            numbers = draw(step).split(3)
            noise = numbers.of("noise").normal(*latents.shape[1:])
            sigma = stage.schedule.sigma_at(timesteps)[..., None, None, None]
            torch.testing.assert_close(latents, add_noise(batch.latents[:, :1], noise, sigma))
            dropped = numbers.of("dropout").uniform(1) < 0.5
            prompts = [
                "nothing" if is_dropped else prompt for prompt, is_dropped in zip(batch.prompts, dropped, strict=True)
            ]
            torch.testing.assert_close(generator.text, encode_prompts(prompts))
    assert met == {2, 6}


def test_hints_are_single_frames_with_less_noise(tmp_path: Path) -> None:
    clips, generator = noted_training(tmp_path)
    encode_prompts, order = tiny_models().encode_prompts, Order(len(clips), seed=0)
    configs = (FlowMatchingConfig(hint_share=share, pictures=Pictures(0.3, per_clip=3)) for share in (0.0, 0.75))
    plain, hinted = (Pretrain(generator, clips, order, encode_prompts, "", config, Clock(CPU)) for config in configs)
    levels, hint_frames, num_clips = [], set(), 0
    for step in range(40):
        plain.loss("generator", draw(step))
        noisy, common = generator.noted
        hinted.loss("generator", draw(step))
        latents, timesteps = generator.noted
        assert common.shape == (len(noisy), 1)
        if len(latents) == 6:
            assert torch.equal(timesteps, common)
            assert torch.equal(latents, noisy)
            continue
        num_clips += 2
        assert timesteps.shape == (2, 3)
        is_hint = timesteps < common
        assert torch.equal(timesteps[~is_hint], common.expand(2, 3)[~is_hint])
        assert is_hint.sum(1).max() <= 1
        levels += timesteps[is_hint].tolist()
        hint_frames |= set(is_hint.nonzero()[:, 1].tolist())
        batch = clips.batch([order[sample] for sample in draw(step).samples])
        noise = draw(step).of("noise").normal(*latents.shape[1:])
        expected = add_noise(batch.latents, noise, timesteps[..., None, None, None] / 1000)
        torch.testing.assert_close(latents, expected)
    assert 0.55 < len(levels) / num_clips < 0.85  # 0.75, but for clips with less noise than the hint
    assert 0 < min(levels) < 100
    assert 400 < max(levels) < 500
    assert hint_frames == {0, 1, 2}


def test_causal_init_learns_from_trajectories(tmp_path: Path) -> None:
    clips, generator = noted_training(tmp_path)
    assert (clips.shape, clips.num_steps) == ((3, 4, 4, 4), 4)
    stage = causal_init(generator, clips, tiny_models().encode_prompts)
    met = set()
    for step in range(4):
        stage.loss("generator", draw(step))
        (latents, timesteps), batch = (
            generator.noted,
            clips.batch([stage.order[sample] for sample in draw(step).samples]),
        )
        assert batch.trajectory is not None
        assert torch.equal(latents[:, :3], batch.latents)
        for sample in range(2):
            for frame in range(3):
                i = STUDENT.timesteps.index(timesteps[sample, 3 + frame].item())
                assert torch.equal(latents[sample, 3 + frame], batch.trajectory[sample, i, frame])
                met.add(i)
    assert met == {0, 1, 2, 3}
    values = losses(stage, 20)
    assert values[-1] < 0.7 * values[0]


def test_a_trajectory_leads_to_its_latents() -> None:
    """From the last state of a teacher of one straight step to go, its own x0 is the clip."""
    models = tiny_models()
    noise, text = torch.randn(1, 3, 4, 4, 4), models.encode_prompts(["a"])
    x0, states = sample_clips(models.generator, noise, text, text, guidance=0.0, num_steps=200, keep_sigmas=[0.005])
    assert states is not None
    flow = models.generator(states[:, 0], torch.full((1, 3), 5.0), text)
    torch.testing.assert_close(flow_to_x0(flow, states[:, 0], 0.005), x0, atol=1e-3, rtol=1e-3)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{prompt}\n" for prompt in PROMPTS[:3]))
    return path


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Two grey videos of 9 frames that grow brighter, and their index."""
    for name, start in (("a", 0), ("b", 100)):
        levels = torch.arange(start, start + 90, 10, dtype=torch.uint8)
        with VideoWriter(tmp_path / f"{name}.mp4", 16, 16, 16) as writer:
            writer.write(levels[:, None, None, None].expand(-1, 16, 16, 3))
    index = tmp_path / "videos.jsonl"
    lines = [{"prompt": f"grey {name}", "video": f"{name}.mp4"} for name in "ab"]
    index.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return index


def clips(*settings: str | Path) -> int:
    return cli.main(["clips", *map(str, settings)])


def test_videos_become_latents_to_train_on(tmp_path: Path, videos: Path) -> None:
    assert clips(*SMALL, "source=videos", f"data_path={videos}", f"output_folder={tmp_path}/out") == 0
    made = LatentClips(tmp_path / "out" / "clips.jsonl")
    assert (len(made), made.shape, made.num_steps) == (2, (3, LATENT_CHANNELS, 2, 2), 0)
    batch = made.batch([1, 0])
    assert batch.prompts == ["grey b", "grey a"]
    vae, encoder = load_vae(None, torch.float32), builtin_encoder()
    with torch.no_grad():
        pixels = PixelClips(videos, 16, 16, 9, 16).pixels([1, 0])
        torch.testing.assert_close(batch.latents, vae.eval().encode(pixels), atol=1e-5, rtol=1e-5)
    together, _ = encoded_videos(vae, PixelClips(videos, 16, 16, 9, 16), CPU)([1, 0])
    torch.testing.assert_close(batch.latents, together, atol=1e-5, rtol=1e-5)
    generator = tiny_dit(
        replace(TINY_DIT, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, text_dim=TEXT.dim)
    )
    values = losses(causal_init(generator, made, encoder.eval()), 20)
    assert values[-1] < 0.9 * values[0]


def test_teacher_by_command(tmp_path: Path, prompts: Path) -> None:
    out = tmp_path / "out"
    command = (*TEACHER, f"data_path={prompts}", f"output_folder={out}", "clip_dtype=float16")
    assert clips(*command) == 0
    made = LatentClips(out / "clips.jsonl")
    assert (len(made), made.shape, made.num_steps) == (3, (3, LATENT_CHANNELS, 2, 2), 4)
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert clips(*command) == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.safetensors")} == before
    assert clips(*command, "num_samples=2", "batch_size=2") == 0
    batch = LatentClips(out / "clips.jsonl").batch(range(6))
    assert batch.prompts == PROMPTS[:3] + PROMPTS[:3]
    assert batch.trajectory is not None
    assert len({tuple(noise.flatten()[:3].tolist()) for noise in batch.trajectory[:, 0]}) == 6


def test_processes_share_the_clips(tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = (*TEACHER, f"data_path={prompts}")
    assert clips(*command, f"output_folder={tmp_path}/one") == 0
    monkeypatch.setenv("WORLD_SIZE", "4")  # one more than clips
    index = tmp_path / "many" / "clips.jsonl"
    for rank in ("1", "3", "2", "0"):
        assert not index.exists()
        monkeypatch.setenv("RANK", rank)
        assert clips(*command, f"output_folder={tmp_path}/many") == 0
    one, many = (LatentClips(tmp_path / name / "clips.jsonl").batch(range(3)) for name in ("one", "many"))
    assert one.prompts == many.prompts
    assert torch.equal(one.latents, many.latents)
    assert one.trajectory is not None
    assert many.trajectory is not None
    assert torch.equal(one.trajectory, many.trajectory)
    content = index.read_bytes()
    index.unlink()
    assert clips(*command, f"output_folder={tmp_path}/many") == 0
    assert index.read_bytes() == content


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["source=video"], "source=video: must be one of videos, teacher"),
        (["source=videos", "trajectory=true"], "trajectory=true: needs source=teacher"),
        (["trajectory=true", "stochastic=true"], "trajectory=true stochastic=true: a student learns from the determ"),
        (["source=videos"], "prompts.txt: an index ends in .jsonl"),
        (["data_path=none.txt"], "none.txt: cannot be read"),
        (["real_name=Wan9", "model_name=tiny"], "real_name: FOLDER/wan/Wan9 does not exist"),
        (["real_name=tiny", "model_name=Wan9"], "model_name: FOLDER/wan/Wan9 does not exist"),
        (["real_name=tiny", "model_name=tiny", "real_ckpt=none.pt"], "none.pt: cannot read"),
        (["real_name=tiny", "model_name=tiny", "vae_ckpt=none.pt"], "none.pt: cannot read"),
        (["denoising_step_list=1000,0"], "denoising_step_list=[1000, 0]: must be decreasing"),
        (["num_step=3"], "did you mean 'num_steps'?"),
        (["height=17"], "height=17: must be a positive multiple of 16"),
        (["real_name=tiny", "model_name=tiny", "device=cuda:99"], "device=cuda:99"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, prompts: Path, settings: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    defaults = (f"data_path={prompts}", f"output_folder={tmp_path}/out", f"wan_folder={tmp_path}/wan")
    assert clips(*defaults, *settings) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words in error.replace(str(tmp_path), "FOLDER")


def test_a_folder_of_other_clips_is_left_alone(
    tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (*TEACHER, f"data_path={prompts}", f"output_folder={tmp_path}/out")
    assert clips(*command) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert clips(*command, "seed=1", "guidance_scale=2") == 2
    message = f"error: {tmp_path}/out: was begun with other settings: guidance_scale was 3.0 and is 2.0, seed was 0 and"
    assert capsys.readouterr().err.startswith(message)
    prompts.write_text("a red fox\nanother\n")
    assert clips(*command) == 2
    assert "clips.jsonl, line 2: has another prompt than data_path gives it" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert clips(*command) == 2
    assert "processes was 1 and is 2" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_a_mistake_in_the_first_run_is_not_remembered(tmp_path: Path, prompts: Path) -> None:
    command = (*TEACHER, f"data_path={prompts}", f"output_folder={tmp_path}/out", f"wan_folder={tmp_path}")
    assert clips(*command, "real_name=Wan9") == 2
    assert clips(*command) == 0
