"""What is where in the Shapes world: scenes drawn from seeds, and the pose of every body at any frame.

A scene is one or two bodies on a plain background. Its caption names background, colour, shape, size and motion. What
no caption names is drawn from the seed and persists: the place of a body across its motion (its lane), the exact tint
of its colour, its phase, and a small marker of some kind in one corner.

The canvas is a torus: a body that leaves it on one side enters on the other. Two bodies keep to a half of the canvas
each, in the order in which the caption tells them: from the top or from the left. The pose at frame t is a closed
function of the scene, so a video is the same however it is cut.

Units: px, with pixel i covering [i, i + 1) and y pointing down; frames of 1/FPS s.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from longlive.data.shapes import HEIGHT, WIDTH

Rgb = tuple[int, int, int]


@dataclass(frozen=True)
class Motion:
    """How a body moves. velocity: px/frame. swing: radii of a clockwise ellipse, px. zigzag: amplitude across the
    travel, px. hop: height, px. period: frames."""

    velocity: tuple[float, float] = (0.0, 0.0)
    swing: tuple[float, float] = (0.0, 0.0)
    zigzag: float = 0.0
    hop: float = 0.0
    period: float = 32.0


SPEED = 1.25  # px/frame of every travel
COLOURS: dict[str, tuple[Rgb, Rgb]] = {  # the darkest and the lightest tint
    "red": ((180, 18, 24), (250, 72, 66)),
    "orange": ((222, 96, 8), (255, 150, 60)),
    "yellow": ((218, 180, 0), (255, 232, 84)),
    "green": ((18, 112, 44), (72, 190, 92)),
    "cyan": ((0, 158, 172), (78, 224, 232)),
    "blue": ((24, 58, 190), (78, 128, 250)),
    "purple": ((98, 30, 150), (160, 90, 216)),
    "pink": ((226, 84, 160), (255, 152, 206)),
}
SHAPES = ("circle", "ring", "square", "cross", "triangle", "star")
SIZES: dict[str, float] = {"small": 10.0, "big": 15.0}  # radius, px: of most figures their circumradius
MOTIONS: dict[str, Motion] = {
    "left": Motion(velocity=(-SPEED, 0.0)),
    "right": Motion(velocity=(SPEED, 0.0)),
    "up": Motion(velocity=(0.0, -SPEED)),
    "down": Motion(velocity=(0.0, SPEED)),
    "orbit": Motion(swing=(8.0, 8.0), period=40.0),
    "sway": Motion(swing=(10.0, 0.0), period=40.0),
    "bounce": Motion(hop=14.0),
    "zigzag": Motion(velocity=(SPEED, 0.0), zigzag=8.0),
    "still": Motion(),
}
BACKGROUNDS: dict[str, tuple[Rgb, Rgb]] = {  # and the colour of the marker on them
    "black": ((16, 16, 20), (104, 104, 108)),
    "grey": ((124, 124, 128), (52, 52, 56)),
    "white": ((240, 240, 242), (146, 146, 148)),
    "sand": ((214, 196, 164), (122, 108, 84)),
}
MARKERS = ("dot", "dash", "post")
CORNERS: dict[str, tuple[float, float]] = {  # x, y of a marker there
    "top left": (8.0, 8.0),
    "top right": (WIDTH - 8.0, 8.0),
    "bottom left": (8.0, HEIGHT - 8.0),
    "bottom right": (WIDTH - 8.0, HEIGHT - 8.0),
}
LAYOUTS: dict[str, frozenset[str]] = {  # and the motions that stay in a part of it
    "whole": frozenset(MOTIONS),
    "rows": frozenset({"left", "right", "sway", "still"}),
    "columns": frozenset({"up", "down", "orbit", "bounce", "still"}),
}

TWO_BODIES_SHARE = 0.3  # of the scenes
WORN_PX = 2.0  # standard deviation of places in a worn scene
_MARGIN = 1.0  # px kept between a body and the border of its part of the canvas
_GLIDE_SPEED = (2.0, 2.0, 0.6)  # most of x, y, radius per frame after a switch
_MARKER_REACH = 6.0  # px


@dataclass(frozen=True)
class Look:
    """What a caption says of one body: names of COLOURS, SHAPES, SIZES, MOTIONS."""

    colour: str
    shape: str
    size: str
    motion: str


@dataclass(frozen=True)
class Caption:
    """What a caption says: a name of BACKGROUNDS, and one or two looks."""

    background: str
    looks: tuple[Look, ...]


@dataclass(frozen=True)
class Track:
    """How a body got where it is. x, y at frame `start`, of the centre of what repeats; `phase` in periods.

    `glide` (x, y, radius) is added at frame `glide_start` and fades within `glide_frames`: a body whose motion
    has changed goes on from where it was.
    """

    x: float
    y: float
    phase: float
    start: int = 0
    glide: tuple[float, float, float] = (0.0, 0.0, 0.0)
    glide_start: int = 0
    glide_frames: float = 1.0


@dataclass(frozen=True)
class Body:
    """tint: 0 the darkest, 1 the lightest of its colour."""

    look: Look
    tint: float
    track: Track

    @property
    def rgb(self) -> tuple[float, float, float]:
        """The colour at this tint, 0 to 255."""
        dark, light = COLOURS[self.look.colour]
        red, green, blue = (a + self.tint * (b - a) for a, b in zip(dark, light, strict=True))
        return red, green, blue


@dataclass(frozen=True)
class Scene:
    """A scene. layout: a name of LAYOUTS. marker: names of MARKERS and CORNERS. wording: seed of its prompt."""

    background: str
    bodies: tuple[Body, ...]
    layout: str
    marker: tuple[str, str]
    wording: int

    @property
    def caption(self) -> Caption:
        return Caption(self.background, tuple(body.look for body in self.bodies))


def sample_scene(rng: random.Random, two_bodies_share: float = TWO_BODIES_SHARE) -> Scene:
    """A scene of the world."""
    return scene_of(sample_caption(rng, two_bodies_share), rng)


def sample_caption(rng: random.Random, two_bodies_share: float = TWO_BODIES_SHARE) -> Caption:
    """A caption of the world: one body, or with a chance of `two_bodies_share` two."""
    if rng.random() >= two_bodies_share:
        num_bodies, layout = 1, "whole"
    else:
        num_bodies, layout = 2, rng.choice(("rows", "columns"))
    while True:
        looks = tuple(_sample_look(rng, layout) for _ in range(num_bodies))
        caption = Caption(rng.choice(list(BACKGROUNDS)), looks)
        if not faults(caption):
            return caption


def scene_of(caption: Caption, rng: random.Random) -> Scene:
    """A scene with this caption, which has no `faults`; what it does not name is drawn."""
    assert not faults(caption), faults(caption)
    layout = _layouts(caption)[0]
    bodies = tuple(
        Body(look, rng.random(), _sample_track(look, cell, rng))
        for look, cell in zip(caption.looks, _cells(layout), strict=True)
    )
    free = [name for name, corner in CORNERS.items() if not any(_covers(body, corner) for body in bodies)]
    marker = (rng.choice(MARKERS), rng.choice(free or list(CORNERS)))
    return Scene(caption.background, bodies, layout, marker, rng.getrandbits(32))


def faults(caption: Caption) -> list[str]:
    """Why the world has no such scene; empty if it has."""
    looks, found = caption.looks, []
    if not 1 <= len(looks) <= 2:
        found.append(f"there are one or two shapes, not {len(looks)}")
    if len({look.colour for look in looks}) < len(looks):
        found.append("two shapes have two colours")
    if len(looks) == 2 and not _layouts(caption):
        found.append(f"two shapes do not move {' and '.join(look.motion for look in looks)} without meeting")
    return found


def switched(scene: Scene, frame: int, seed: int) -> Scene:
    """The scene with one or two captioned attributes changed at `frame`; everything else goes on."""
    caption, wording = switched_caption(scene, seed)
    return continued(scene, caption, frame, wording)


def switched_caption(scene: Scene, seed: int) -> tuple[Caption, int]:
    """The caption of `switched`, at whatever frame, and its wording."""
    rng = random.Random(f"switch {seed}")
    return _changed(scene, rng), rng.getrandbits(32)


def continued(scene: Scene, caption: Caption, frame: int, wording: int = 0) -> Scene:
    """The scene that `scene` becomes when its caption turns to this one, of as many bodies, at `frame`.

    It is valid from `frame` on. Colours, shapes and background change at once; place and radius go on from where they
    are. Raises AssertionError if the layout of the scene has no room for the motions.
    """
    assert _fits(caption, scene.layout), (caption, scene.layout)
    bodies = tuple(
        _continued_body(body, look, _home(body, scene.layout), frame)
        for body, look in zip(scene.bodies, caption.looks, strict=True)
    )
    return replace(scene, background=caption.background, bodies=bodies, wording=wording)


def worn(scene: Scene, share: float) -> Scene:
    """The scene as the past of a long video may have come to show it: bodies are somewhat off their place.

    It follows from the scene which way; share: how much of it. Along a travel they are not, where nothing could tell.
    """
    rng = random.Random(f"worn {scene.wording}")
    bodies = tuple(_worn_body(body, _home(body, scene.layout), share, rng) for body in scene.bodies)
    return replace(scene, bodies=bodies)


def poses(bodies: Sequence[Body], start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """x, y, radius of every body at frames start, …, stop − 1: [N, F, 3] float64, x and y on the canvas.

    Rounded to 2⁻¹⁶, so that the last bit of a sine does not depend on the machine.
    """
    x, y, radius = _unwrapped_poses(bodies, start, stop, device).unbind(-1)
    exact = torch.stack([x % WIDTH, y % HEIGHT, radius], dim=-1)
    return (exact * 2**16).round() / 2**16


def _unwrapped_poses(bodies: Sequence[Body], start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """As `poses`, as if the canvas had no end."""
    columns = torch.tensor([_numbers(body) for body in bodies], dtype=torch.float64, device=device)[:, :, None]
    x, y, radius, vx, vy, swing_x, swing_y, zigzag, hop, period, phase, *rest = columns.unbind(1)
    begin, *glide, glide_start, glide_frames = rest
    t = torch.arange(start, stop, dtype=torch.float64, device=device)
    elapsed = t - begin
    turn = (elapsed / period + phase) % 1.0
    sine, cosine = torch.sin(2 * math.pi * turn), torch.cos(2 * math.pi * turn)
    triangle = 4 * ((turn + 0.75) % 1.0 - 0.5).abs() - 1
    pose = (
        x + vx * elapsed + swing_x * sine,
        y + vy * elapsed - swing_y * cosine + zigzag * triangle - 4 * hop * turn * (1 - turn),
        radius,
    )
    left = (1 - (t - glide_start) / glide_frames).clamp(0, 1)
    return torch.stack([value + offset * left for value, offset in zip(pose, glide, strict=True)], dim=-1)


def _numbers(body: Body) -> list[float]:
    motion, track = MOTIONS[body.look.motion], body.track
    return [
        *(track.x, track.y, SIZES[body.look.size]),
        *(*motion.velocity, *motion.swing, motion.zigzag, motion.hop, motion.period),
        *(track.phase, track.start, *track.glide, track.glide_start, track.glide_frames),
    ]


def _layouts(caption: Caption) -> list[str]:
    names = ("whole",) if len(caption.looks) == 1 else ("rows", "columns")
    return [name for name in names if _fits(caption, name)]


def _fits(caption: Caption, layout: str) -> bool:
    return all(look.motion in LAYOUTS[layout] for look in caption.looks)


Cell = tuple[float, float, float, float]
"""Left, top, right, bottom, px."""


def _cells(layout: str) -> list[Cell]:
    """The parts of the canvas that bodies keep to."""
    if layout == "rows":
        return [(0.0, top, WIDTH, bottom) for top, bottom in pairwise((0.0, HEIGHT / 2, HEIGHT))]
    if layout == "columns":
        return [(left, 0.0, right, HEIGHT) for left, right in pairwise((0.0, WIDTH / 2, WIDTH))]
    return [(0.0, 0.0, WIDTH, HEIGHT)]


def _home(body: Body, layout: str) -> Cell:
    """The cell the body is in. No motion of a layout crosses its cells, so its track tells."""
    x, y = body.track.x, body.track.y
    travels_x, travels_y = (speed != 0 for speed in MOTIONS[body.look.motion].velocity)
    (home,) = [
        cell
        for cell in _cells(layout)
        if (travels_x or cell[0] <= x < cell[2]) and (travels_y or cell[1] <= y < cell[3])
    ]
    return home


def _sample_look(rng: random.Random, layout: str) -> Look:
    names = (list(COLOURS), list(SHAPES), list(SIZES), sorted(LAYOUTS[layout]))
    return Look(*(rng.choice(choices) for choices in names))


def _range(look: Look, cell: Cell) -> tuple[tuple[float, float], tuple[float, float]]:
    """Least and most x and y of a track in a cell; along a travel anything on the canvas."""
    motion, radius = MOTIONS[look.motion], SIZES[look.size] + _MARGIN
    left, top, right, bottom = cell
    reach_x, reach_y = radius + motion.swing[0], radius + motion.swing[1] + motion.zigzag
    travels_x, travels_y = (speed != 0 for speed in motion.velocity)
    return (
        (0.0, float(WIDTH)) if travels_x else (left + reach_x, right - reach_x),
        (0.0, float(HEIGHT)) if travels_y else (top + reach_y + motion.hop, bottom - reach_y),
    )


def _sample_track(look: Look, cell: Cell, rng: random.Random) -> Track:
    x, y = (rng.uniform(*span) for span in _range(look, cell))
    return Track(x, y, rng.random())


def _worn_body(body: Body, cell: Cell, share: float, rng: random.Random) -> Body:
    track, velocity, spans = body.track, MOTIONS[body.look.motion].velocity, _range(body.look, cell)
    x, y = (
        value if speed else value + share * (min(max(value + rng.gauss(0.0, WORN_PX), low), high) - value)
        for value, speed, (low, high) in zip((track.x, track.y), velocity, spans, strict=True)
    )
    return replace(body, track=replace(track, x=x, y=y))


def _covers(body: Body, corner: tuple[float, float]) -> bool:
    """Whether a body that stays about its place may always hide a marker there."""
    motion = MOTIONS[body.look.motion]
    if motion.velocity != (0.0, 0.0):
        return False
    reach = SIZES[body.look.size] + _MARKER_REACH
    dx, dy = abs(body.track.x - corner[0]), body.track.y - corner[1]
    return dx < reach + motion.swing[0] and -reach - motion.swing[1] < dy < reach + motion.swing[1] + motion.hop


def _changed(scene: Scene, rng: random.Random) -> Caption:
    """The scene's caption with one or two attributes changed."""
    choices = {"colour": list(COLOURS), "shape": list(SHAPES), "size": list(SIZES), "motion": list(MOTIONS)}
    slots = [(number, name) for number in range(len(scene.bodies)) for name in choices]
    while True:
        background, looks = scene.background, [body.look for body in scene.bodies]
        for slot in rng.sample([None, *slots], rng.choice((1, 2))):
            if slot is None:
                background = rng.choice([name for name in BACKGROUNDS if name != background])
            else:
                number, name = slot
                value = rng.choice([value for value in choices[name] if value != getattr(looks[number], name)])
                changes: dict[str, Any] = {name: value}
                looks[number] = replace(looks[number], **changes)
        caption = Caption(background, tuple(looks))
        if not faults(caption) and _fits(caption, scene.layout):
            return caption


def _continued_body(body: Body, look: Look, cell: Cell, frame: int) -> Body:
    """The body with another look from `frame` on, in the same cell: in the phase that it reaches soonest."""
    before, track = body.look, body.track
    if (look.motion, look.size) == (before.motion, before.size):
        return replace(body, look=look)
    clocks = (
        [(frame, phase / 8) for phase in range(8)] if look.motion != before.motion else [(track.start, track.phase)]
    )
    tracks = [_continued_track(body, look, cell, frame, start, phase) for start, phase in clocks]
    return replace(body, look=look, track=min(tracks, key=lambda track: track.glide_frames))


def _continued_track(body: Body, look: Look, cell: Cell, frame: int, start: int, phase: float) -> Track:
    """The track of a new look whose clock shows `phase` at frame `start`, which glides there from the old one."""
    x, y, radius = _unwrapped_poses([body], frame, frame + 1)[0, 0].tolist()
    # Where a track that starts at the origin would be by now: what is left is the place of this one.
    origin = Body(look, 0.0, Track(0.0, 0.0, phase, start))
    moved_x, moved_y, moved_radius = _unwrapped_poses([origin], frame, frame + 1)[0, 0].tolist()
    place = (x % WIDTH - moved_x, y % HEIGHT - moved_y)
    is_free = [speed != 0 for speed in MOTIONS[look.motion].velocity]
    kept = [
        value if free else min(max(value, low), high)
        for value, free, (low, high) in zip(place, is_free, _range(look, cell), strict=True)
    ]
    glide = (place[0] - kept[0], place[1] - kept[1], radius - moved_radius)
    num_frames = max(1.0, *(abs(offset) / speed for offset, speed in zip(glide, _GLIDE_SPEED, strict=True)))
    return Track(kept[0], kept[1], phase, start, glide, frame, num_frames)
