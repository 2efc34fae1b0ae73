"""The judge of Shapes videos: right about what was rendered, and not fooled by planted faults."""

import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from longlive.data.shapes.clips import HELD_OUT, scene_number
from longlive.data.shapes.render import render
from longlive.data.shapes.world import Body, Caption, Look, Scene, Track, continued, scene_of, switched
from longlive.errors import InputError
from longlive.eval.judge import (
    CAPTIONED,
    MOTION_FRAMES,
    PLACE_FRAMES,
    UNNAMED,
    drift,
    judge,
    judge_batch,
    jump_px,
    observe,
    read,
    score,
    score_unnamed,
)

NUM_SCENES = 200
STAR = Caption("white", (Look("red", "star", "big", "still"),))
PAIR = Caption("grey", (Look("red", "circle", "big", "left"), Look("cyan", "cross", "small", "still")))


def video(caption: Caption, num_frames: int = PLACE_FRAMES, seed: int = 0) -> Tensor:
    return render([scene_of(caption, random.Random(seed))], 0, num_frames)[0]


def degraded(frames: Tensor, seed: int) -> Tensor:
    """Blurred, noisy and a little off in colour, as after lossy compression."""
    generator = torch.Generator().manual_seed(seed)
    line = torch.tensor([0.25, 0.5, 0.25])
    planes = pad(frames.permute(0, 3, 1, 2).float(), (1, 1, 1, 1), mode="replicate")
    planes = conv2d(planes.flatten(0, 1)[:, None], (line[:, None] * line)[None, None]).unflatten(0, (-1, 3))[:, :, 0]
    planes += 2 * torch.randn(planes.shape, generator=generator) + 6 * torch.rand(3, 1, 1, generator=generator) - 3
    return planes.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


# Right about what is there ---------------------------------------------------------------------------------------


def test_ground_truth_is_read_back() -> None:
    """Of all scenes at least 99 % of every attribute, every second one degraded."""
    wrong: Counter[str] = Counter()
    for number in range(NUM_SCENES):
        scene = scene_number(number, 0, HELD_OUT)
        frames = render([scene], 0, PLACE_FRAMES)[0]
        reading = judge(degraded(frames, number) if number % 2 else frames)
        found = score(reading, scene.caption) | score_unnamed(reading, scene) | {"clean": reading.is_clean}
        assert set(found) == {*CAPTIONED, *UNNAMED, "all", "clean"}
        wrong.update(name for name, is_right in found.items() if not is_right)
    assert all(count <= 0.01 * NUM_SCENES for count in wrong.values()), wrong


def test_switched_scenes_are_read_and_do_not_jump() -> None:
    frame, length = 32, 2 * MOTION_FRAMES
    rights, jumps, cuts = [], [], []
    for number in range(24):
        scene = scene_number(number, 1, HELD_OUT)
        after = switched(scene, frame, number)
        frames = render([scene], 0, frame)[0], render([after], frame, frame + length)[0]
        seen = observe(torch.cat(frames))
        found = score(read(seen, frame + MOTION_FRAMES, frame + length), after.caption)
        rights += list(found.values())
        jumps.append(jump_px(seen, frame))
        cuts.append(jump_px(observe(torch.cat([frames[0], video(after.caption, 32, number)])), frame))
    assert sum(rights) >= 0.99 * len(rights)
    assert max(jumps) < 8
    assert sorted(cuts)[6] > 8


def test_a_batch_is_judged_like_its_videos() -> None:
    videos = torch.stack([video(STAR), video(PAIR)])
    assert judge_batch(videos) == [judge(frames) for frames in videos]
    assert judge(videos[0].numpy()) == judge(videos[0])


def test_windows_of_an_observed_video_are_judged_by_themselves() -> None:
    scene = scene_of(PAIR, random.Random(0))
    after = continued(scene, replace(PAIR, background="black"), 70)
    seen = observe(torch.cat([render([scene], 0, 70)[0], render([after], 70, 140)[0]]))
    assert all(score(read(seen, 0, 70), PAIR).values())
    assert all(score(read(seen, 70, 140), after.caption).values())
    assert not score(read(seen, 70), PAIR)["background"]


def test_short_windows_leave_out_what_they_cannot_tell() -> None:
    seen = observe(video(PAIR))
    short, medium = read(seen, 0, MOTION_FRAMES - 1), read(seen, 0, MOTION_FRAMES)
    assert set(score(short, PAIR)) == {*CAPTIONED, "all"} - {"motion"}
    assert set(score(medium, PAIR)) == {*CAPTIONED, "all"}
    scene = scene_of(PAIR, random.Random(0))
    assert set(score_unnamed(medium, scene)) == {"tint", "marker"}
    assert all((score(short, PAIR) | score(medium, PAIR) | score_unnamed(medium, scene)).values())
    assert drift(medium, read(seen)).place_px is None


@pytest.mark.parametrize("frames", [torch.zeros(5, 64, 96), torch.zeros(5, 32, 96, 3, dtype=torch.uint8)])
def test_other_videos_are_refused(frames: Tensor) -> None:
    with pytest.raises(InputError, match=r"a Shapes video is uint8 of \[frames, 64, 96, 3\], not torch"):
        judge(frames)


# Not fooled ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "value"),
    [("colour", "pink"), ("shape", "triangle"), ("size", "small"), ("motion", "bounce")],
)
def test_a_wrong_attribute_is_the_only_one_wrong(name: str, value: str, seed: int) -> None:
    look = replace(STAR.looks[0], **{name: value})
    found = score(judge(video(Caption("white", (look,)), seed=seed)), STAR)
    assert {attribute for attribute, is_right in found.items() if not is_right} == {name, "all"}


def test_a_radius_that_changes_is_no_motion() -> None:
    scene = scene_of(STAR, random.Random(0))
    growing = replace(scene.bodies[0].track, glide=(0.0, 0.0, -5.0), glide_frames=PLACE_FRAMES)
    scene = replace(scene, bodies=(replace(scene.bodies[0], track=growing),))
    reading = judge(render([scene], 0, PLACE_FRAMES)[0])
    assert (reading.bodies[0].motion, reading.is_clean) == ("still", True)


def test_missing_and_additional_bodies_are_told() -> None:
    alone = Caption("grey", PAIR.looks[:1])
    assert not score(judge(video(alone)), PAIR)["count"]
    assert not score(judge(video(alone)), PAIR)["shape"]
    found = score(judge(video(PAIR)), alone)
    assert (found["count"], found["all"]) == (False, False)
    empty = judge(video(alone).float().median(0).values.to(torch.uint8).expand(40, -1, -1, -1))
    assert empty.bodies == ()
    assert not any(value for name, value in score(empty, PAIR).items() if name != "background")


def test_a_third_body_is_not_clean() -> None:
    frames = video(PAIR)
    assert judge(frames).is_clean
    third = render([scene_of(Caption("grey", (replace(STAR.looks[0], size="small"),)), random.Random(3))], 0, 1)[0, 0]
    is_third = (third.int() - 126).abs().amax(-1, keepdim=True) > 60
    is_background = (frames.int() - 126).abs().amax(-1, keepdim=True) < 10
    frames = torch.where(is_third & is_background, third, frames)
    assert not judge(frames).is_clean


@pytest.mark.parametrize("shift", [6, 10, 30])
def test_ghosts_are_not_clean(shift: int) -> None:
    frames = video(STAR).float()
    ghost = frames + 0.35 * (frames.roll(shift, dims=2) - frames)
    reading = judge(ghost.round().to(torch.uint8))
    assert judge(video(STAR)).is_clean
    assert not reading.is_clean


def test_a_smear_is_no_figure() -> None:
    frames = video(Caption("white", (Look("red", "cross", "big", "left"),))).float()
    smeared = sum(frames.roll(shift, dims=0) for shift in range(12)) / 12
    assert not judge(smeared[12:].round().to(torch.uint8)).is_clean


def test_a_marker_beside_a_body_is_told() -> None:
    """Of the post only its lower part is far enough from the body to be looked at."""
    look = replace(STAR.looks[0], shape="cross", size="small")
    body = Body(look, 0.5, Track(13.8, 37.9, 0.0))
    scene = Scene("white", (body,), "whole", ("post", "bottom left"), 0)
    assert judge(render([scene], 0, 1)[0]).marker == scene.marker


def moved(scene: Scene, dx: float = 0.0, tint: float = 0.0, marker: tuple[str, str] | None = None) -> Scene:
    body = scene.bodies[0]
    track = replace(body.track, x=body.track.x + dx)
    return replace(
        scene,
        bodies=(replace(body, track=track, tint=body.tint + tint), *scene.bodies[1:]),
        marker=marker or scene.marker,
    )


@pytest.mark.parametrize("motion", ["still", "orbit", "sway", "bounce", "down"])
def test_drift_of_unnamed_state_is_measured(motion: str) -> None:
    caption = Caption("black", (Look("green", "square", "small", motion),))
    scene = scene_of(caption, random.Random(2))
    scene = moved(scene, dx=48 - scene.bodies[0].track.x, tint=0.3 - scene.bodies[0].tint)
    later = moved(scene, dx=4.0, tint=0.4, marker=("dot", "top left"))
    scene = replace(scene, marker=("dash", "bottom right"))
    first, same, last = (judge(render([it], 0, PLACE_FRAMES)[0]) for it in (scene, scene, later))
    none, some = drift(first, same), drift(first, last)
    assert (none.place_px, none.tint, none.marker_kept, none.background) == (0, 0, True, 0)
    assert some.place_px == pytest.approx(4, abs=0.3)
    assert some.tint == pytest.approx(0.4, abs=0.05)
    assert some.marker_kept is False
    assert score(last, caption)["all"]  # the caption does not tell
    assert score_unnamed(last, scene) == {"place": False, "tint": False, "marker": False}


@pytest.mark.parametrize("looks", [PAIR.looks, tuple(replace(look, motion="still") for look in PAIR.looks)])
def test_bodies_seen_in_another_order_have_not_drifted(looks: tuple[Look, ...]) -> None:
    """Which of two bodies a window finds first depends on its first frame."""
    first = judge(video(Caption("grey", looks)))
    later = replace(first, bodies=first.bodies[::-1])
    assert (drift(first, later).place_px, drift(first, later).tint) == (0, 0)
    unnamed = [replace(body, colour=None, shape="circle", size="big", motion=None) for body in first.bodies]
    first, later = replace(first, bodies=tuple(unnamed)), replace(first, bodies=tuple(unnamed[::-1]))
    assert drift(first, later).place_px == 0  # by their colours, whatever these are called


def test_place_along_a_travel_is_no_drift() -> None:
    scene = scene_of(Caption("black", (Look("green", "square", "small", "right"),)), random.Random(2))
    first, last = (judge(render([it], 0, PLACE_FRAMES)[0]) for it in (scene, moved(scene, dx=20)))
    assert drift(first, last).place_px == pytest.approx(0, abs=0.1)


def test_flicker_is_measured() -> None:
    frames = video(STAR)
    flickering = frames.clone()
    flickering[::2] -= 10
    assert judge(frames).flicker < 0.1
    assert judge(flickering).flicker == pytest.approx(10, abs=1)


@pytest.mark.parametrize("caption", [STAR, PAIR])
def test_a_jump_is_measured(caption: Caption) -> None:
    frames = video(caption, 40)
    jumped = torch.cat([frames[:20], frames[20:].roll(9, dims=1)])
    assert jump_px(observe(frames), 20) < 3
    assert jump_px(observe(jumped), 20) == pytest.approx(9, abs=1)
    assert jump_px(observe(jumped), 4, num_frames=8) < 3
    lost = torch.cat([frames[:20], frames[20:].flatten(1, 2).median(1).values[:, None, None].expand(-1, 64, 96, -1)])
    assert jump_px(observe(lost), 20) == math.inf
