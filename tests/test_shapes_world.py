"""The Shapes world: scenes, their pictures and captions."""

import itertools
import logging
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from longlive.data.clips import PixelSource, from_uint8
from longlive.data.shapes.captions import parse, prompt_of, understand, worded
from longlive.data.shapes.clips import HELD_OUT, TRAIN, ShapesClips, ShapesSwitches, scene_number
from longlive.data.shapes.render import coverage, render
from longlive.data.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    CORNERS,
    HEIGHT,
    LAYOUTS,
    MARKERS,
    MOTIONS,
    SHAPES,
    SIZES,
    WIDTH,
    Body,
    Caption,
    Look,
    Scene,
    Track,
    continued,
    faults,
    poses,
    sample_scene,
    scene_of,
    switched,
    worn,
)

CANVAS = torch.tensor([WIDTH, HEIGHT])
STILL = Look("red", "star", "big", "still")


def scenes(num_scenes: int, seed: int = 0) -> list[Scene]:
    return [scene_number(number, seed, TRAIN) for number in range(num_scenes)]


def shortest(away: Tensor) -> Tensor:
    """Differences of places [..., 2] the short way round the canvas."""
    return (away + CANVAS / 2) % CANVAS - CANVAS / 2


def looks() -> list[Look]:
    return [Look(*names) for names in itertools.product(COLOURS, SHAPES, SIZES, MOTIONS)]


# Scenes ----------------------------------------------------------------------------------------------------------


def test_scenes_depend_on_seed_number_and_split_alone() -> None:
    assert scene_number(3, 0, TRAIN) == scene_number(3, 0, TRAIN)
    others = {
        scene_number(3, 0, TRAIN),
        scene_number(4, 0, TRAIN),
        scene_number(3, 1, TRAIN),
        scene_number(3, 0, HELD_OUT),
    }
    assert len(others) == 4


def test_scenes_show_all_there_is() -> None:
    seen = scenes(600)
    bodies = [body for scene in seen for body in scene.bodies]
    assert {len(scene.bodies) for scene in seen} == {1, 2}
    assert {scene.background for scene in seen} == set(BACKGROUNDS)
    assert {scene.layout for scene in seen} == set(LAYOUTS)
    assert {scene.marker for scene in seen} == set(itertools.product(MARKERS, CORNERS))
    for name, values in (("colour", COLOURS), ("shape", SHAPES), ("size", SIZES), ("motion", MOTIONS)):
        assert {getattr(body.look, name) for body in bodies} == set(values)
    assert min(body.tint for body in bodies) < 0.02
    assert max(body.tint for body in bodies) > 0.98
    assert not any(faults(scene.caption) for scene in seen)


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ([], "one or two shapes, not 0"),
        ([STILL] * 3, "one or two shapes, not 3"),
        ([STILL, STILL], "two colours"),
        ([replace(STILL, motion="left"), replace(STILL, colour="blue", motion="up")], "left and up without meeting"),
        ([replace(STILL, motion="zigzag"), replace(STILL, colour="blue")], "zigzag and still without meeting"),
    ],
)
def test_impossible_captions_are_told(changed: list[Look], fault: str) -> None:
    assert fault in "; ".join(faults(Caption("white", tuple(changed))))


def test_nothing_leaps_and_two_bodies_keep_apart() -> None:
    rng = random.Random(0)
    for scene in (sample_scene(rng) for _ in range(150)):
        pose = poses(scene.bodies, 0, 300)
        steps = shortest(pose[:, 1:, :2] - pose[:, :-1, :2]).norm(dim=-1)
        assert steps.max() < 2.5
        check_apart(scene, 0)


def check_apart(scene: Scene, start: int) -> None:
    if len(scene.bodies) == 2:
        pose = poses(scene.bodies, start, start + 300)
        away = shortest(pose[0, :, :2] - pose[1, :, :2]).abs().amax(-1)
        assert (away > pose[:, :, 2].sum(0)).all()


# Pictures --------------------------------------------------------------------------------------------------------


def test_a_video_is_the_same_however_it_is_cut() -> None:
    some = [scene for scene in scenes(40) if len(scene.bodies) == 2][:2] + scenes(4)
    video = render(some, 0, 200)
    assert video.shape == (6, 200, HEIGHT, WIDTH, 3)
    assert video.dtype == torch.uint8
    torch.testing.assert_close(render(some, 0, 81), video[:, :81], rtol=0, atol=0)
    torch.testing.assert_close(render(some[1:3], 57, 130), video[1:3, 57:130], rtol=0, atol=0)
    assert not torch.equal(video[:, 0], video[:, 100])


def test_far_frames_are_as_exact_as_near_ones() -> None:
    """A travel comes round after a whole number of frames: the picture is the same hours later."""
    scene = next(scene for scene in scenes(100) if [body.look.motion for body in scene.bodies] == ["right"])
    rounds = 384 * 1000  # of 96 px / (1.25 px/frame) = 76.8 frames, 5 of which are whole
    torch.testing.assert_close(render([scene], rounds, rounds + 2), render([scene], 0, 2), rtol=0, atol=0)


def test_pictures_hold_the_colours_of_background_and_body() -> None:
    caption = Caption("sand", (Look("blue", "square", "big", "still"),))
    scene = scene_of(caption, random.Random(0))
    (frame,) = render([scene], 0, 1)[0]
    assert frame.flatten(0, 1).median(0).values.tolist() == list(BACKGROUNDS["sand"][0])
    x, y = (int(value) for value in poses(scene.bodies, 0, 1)[0, 0, :2])
    assert frame[y, x].tolist() == [round(value) for value in scene.bodies[0].rgb]
    values = frame.flatten(0, 1).unique(dim=0)
    assert len(values) > 6  # edges are smooth


@pytest.mark.parametrize("shape", ["star", "cross"])
@pytest.mark.parametrize(
    ("layout", "motions", "places", "phases"),
    [
        ("rows", ("left", "still"), ((50.0, 16.0), (40.3, 48.0)), (0.0, 0.0)),
        ("rows", ("still", "left"), ((40.3, 16.0), (50.0, 48.0)), (0.0, 0.0)),
        ("columns", ("orbit", "orbit"), ((24.0, 32.2), (72.0, 32.5)), (0.3, 0.8)),
    ],
)
def test_the_widest_figures_share_no_pixel(
    shape: str,
    layout: str,
    motions: tuple[str, str],
    places: tuple[tuple[float, float], tuple[float, float]],
    phases: tuple[float, float],
) -> None:
    """As near to each other as cells let them come, in both directions of the torus."""
    looks = Look("red", "star", "big", motions[0]), Look("cyan", shape, "big", motions[1])
    pairs = zip(looks, places, phases, strict=True)
    bodies = [Body(look, 1.0, Track(*place, phase)) for look, place, phase in pairs]
    scenes = [Scene("black", (body,), layout, ("dot", "top left"), 0) for body in bodies]
    plain = render([replace(scenes[0], bodies=())], 0, 1)[0]
    is_drawn = (render(scenes, 0, 80) != plain).any(-1)
    assert is_drawn.flatten(2).any(2).all()
    assert not is_drawn.all(0).any()


def test_a_patch_holds_the_whole_figure() -> None:
    """A star as wide as it is above its centre is nowhere cut off."""
    body = Body(STILL, 0.5, Track(48.4, 32.4, 0.0))
    scene = Scene("black", (body,), "whole", ("dot", "top left"), 0)
    drawn = (render([scene], 0, 1)[0, 0] != render([replace(scene, bodies=())], 0, 1)[0, 0]).any(-1)
    side = torch.arange(WIDTH) + 0.5
    whole = coverage("star", side - 48.4, (side[:HEIGHT] - 32.4)[:, None], torch.tensor(SIZES["big"])) > 0.01
    assert torch.equal(drawn & whole, whole)


@pytest.mark.gpu
def test_device_draws_the_same() -> None:
    some = scenes(32)
    difference = render(some, 0, 81).int() - render(some, 0, 81, "cuda").cpu().int()
    assert difference.abs().max() <= 1


def test_clips_are_a_source_of_pixels_and_prompts() -> None:
    clips: PixelSource = ShapesClips(10, seed=0, num_video_frames=9)
    assert len(clips) == 10
    pixels = clips.pixels([7, 2])
    assert pixels.shape == (2, 9, 3, HEIGHT, WIDTH)
    assert pixels.dtype == torch.float32
    some = ShapesClips(10, seed=0, num_video_frames=9).scenes([7, 2])
    frames = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 1, 3, 4, 2)
    torch.testing.assert_close(frames, render(some, 0, 9), rtol=0, atol=0)
    assert ShapesClips(10, seed=0).prompts([7, 2]) == [prompt_of(scene) for scene in some]
    assert ShapesClips(10, seed=0, split=HELD_OUT).prompts([7, 2]) != [prompt_of(scene) for scene in some]


# Switches --------------------------------------------------------------------------------------------------------


def changes(before: Scene, after: Scene) -> list[str]:
    names = ["background"] if before.background != after.background else []
    for a, b in zip(before.bodies, after.bodies, strict=True):
        names += [name for name in vars(a.look) if getattr(a.look, name) != getattr(b.look, name)]
    return names


def test_a_switch_changes_one_or_two_attributes_and_goes_on() -> None:
    seen = set()
    for number, scene in enumerate(scenes(150)):
        frame = 81 + number
        for _ in range(3):
            after = switched(scene, frame, seed=number)
            names = changes(scene, after)
            seen |= {(name, len(names)) for name in names}
            assert 1 <= len(names) <= 2
            assert not faults(after.caption)
            assert (after.layout, after.marker) == (scene.layout, scene.marker)
            assert [body.tint for body in after.bodies] == [body.tint for body in scene.bodies]
            check_continuous(scene.bodies, after.bodies, frame)
            check_apart(after, frame)
            scene, frame = after, frame + 7 + number  # the next one may come while bodies still glide
    assert seen == set(itertools.product(("background", "colour", "shape", "size", "motion"), (1, 2)))


def check_continuous(before: tuple[Body, ...], after: tuple[Body, ...], frame: int) -> None:
    old, new = poses(before, frame, frame + 1)[:, 0], poses(after, frame, frame + 1)[:, 0]
    assert shortest(old[:, :2] - new[:, :2]).abs().max() < 1e-3
    assert (old[:, 2] - new[:, 2]).abs().max() < 1e-3
    travelled = shortest(torch.diff(poses(after, frame, frame + 40)[..., :2], dim=1)).norm(dim=-1)
    assert travelled.max() < 6


def test_what_a_switch_does_not_name_stays() -> None:
    scene = scene_of(Caption("white", (Look("red", "star", "big", "orbit"),)), random.Random(1))
    after = continued(scene, Caption("black", (Look("blue", "star", "big", "orbit"),)), 50)
    assert after.bodies[0].track == scene.bodies[0].track
    calm = continued(after, Caption("black", (STILL,)), 90)
    back = continued(calm, Caption("black", (replace(STILL, size="small"),)), 200)
    torch.testing.assert_close(poses(back.bodies, 230, 231)[0, 0, :2], poses(calm.bodies, 230, 231)[0, 0, :2])


def test_a_worn_scene_is_off_its_place() -> None:
    seen = scenes(300)
    offs = []
    for scene in seen:
        full, half = worn(scene, 1.0), worn(scene, 0.5)
        assert worn(scene, 0.0) == scene
        assert (full.caption, full.marker, full.wording) == (scene.caption, scene.marker, scene.wording)
        check_apart(full, 0)
        away = shortest(poses(full.bodies, 0, 50)[..., :2] - poses(scene.bodies, 0, 50)[..., :2])
        part = shortest(poses(half.bodies, 0, 50)[..., :2] - poses(scene.bodies, 0, 50)[..., :2])
        torch.testing.assert_close(part, away / 2, rtol=0, atol=1e-4)
        torch.testing.assert_close(away, away[:, :1].expand_as(away), rtol=0, atol=1e-4)
        for body, (x, y) in zip(scene.bodies, away[:, 0].tolist(), strict=True):
            velocity = MOTIONS[body.look.motion].velocity
            assert all(off == 0 for off, speed in zip((x, y), velocity, strict=True) if speed), "no one can tell it"
            offs += [off for off, speed in zip((x, y), velocity, strict=True) if not speed]
    assert 1.2 < torch.tensor(offs).std() < 2.0, "2 px, less where the border is near"


def test_clips_of_worn_scenes() -> None:
    clips = ShapesClips(4, seed=0, num_video_frames=9)
    assert torch.equal(
        ShapesClips(4, seed=0, num_video_frames=9, worn_share=0.0).pixels(range(4)), clips.pixels(range(4))
    )
    some = [worn(scene, 0.5) for scene in clips.scenes(range(4))]
    half = ShapesClips(4, seed=0, num_video_frames=9, worn_share=0.5)
    assert torch.equal(half.pixels(range(4)), from_uint8(render(some, 0, 9)))


def test_switch_pairs_have_prompts_and_clips_of_their_scenes() -> None:
    pairs = ShapesSwitches(5, seed=0, switch_video_frame=81)
    assert len(pairs) == 5
    for (before, after), (scene, next_scene) in zip(pairs.prompts([0, 3]), pairs.scenes([0, 3]), strict=True):
        assert (parse(before), parse(after)) == (scene.caption, next_scene.caption)
        assert scene.caption != next_scene.caption
    clips = ShapesSwitches(5, seed=0, switch_video_frame=9, num_video_frames=13)
    ((before, after),) = clips.scenes([3])
    expected = from_uint8(torch.cat([render([before], 0, 9), render([after], 9, 13)], dim=1))
    assert torch.equal(clips.pixels([3]), expected)
    assert pairs.prompts([3]) == ShapesSwitches(9, seed=0, switch_video_frame=81).prompts([3])
    assert pairs.prompts([3]) != ShapesSwitches(5, seed=0, switch_video_frame=81, split=HELD_OUT).prompts([3])


# Captions --------------------------------------------------------------------------------------------------------


def test_captions_parse_back_in_every_wording() -> None:
    for number, (look, background) in enumerate(itertools.product(looks(), BACKGROUNDS)):
        caption = Caption(background, (look,))
        if not faults(caption):
            assert understand(worded(caption, number)) == (caption, [])
    for scene in scenes(300):
        assert parse(prompt_of(scene)) == scene.caption


def test_wordings_vary() -> None:
    caption = Caption("grey", (Look("red", "star", "big", "bounce"), Look("blue", "ring", "small", "still")))
    sentences = {worded(caption, wording) for wording in range(400)}
    assert len(sentences) > 200
    assert {parse(sentence) for sentence in sentences} == {caption}
    assert worded(caption, 5) == worded(caption, 5)
    assert parse("  a BIG red star, bounces - while: a little blue ring rests; on gray") == caption


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ("A big red stair moves left on a white background.", "'stair' is unknown, nearest is star"),
        ("A big red star moves left on a white background, cinematic.", "'cinematic' is unknown"),
        ("A big red star glides to the left on white.", "'glides to' is unknown, nearest is glides left or"),
        ("A big red star stays still on white.", "'stays still' is unknown, nearest is stands still or stays in place"),
        ("A red fox in the snow.", "shape 1 has no shape, no size, no motion"),
        ("A big red star moves left.", "one background is needed, black, grey, white or sand, not none"),
        ("A big red star moves left on a white background on black.", "not white and black"),
        ("A big red star moves left and a big blue star moves up, white background", "without meeting"),
        ("A big red star rests, a big blue star rests, a big pink star rests, white background", "not 3"),
        ("", "one background is needed"),
    ],
)
def test_unknown_prompts_are_told(prompt: str, problem: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert parse(prompt) is None
    (record,) = caplog.records
    assert problem in record.getMessage()
