"""The judge of Shapes videos: reads captions and unnamed state back from pixels, and measures what drifts or jumps.

No part of it is learned. `observe` measures every frame of a video once and follows its bodies; `read` tells what a
window of frames shows; `judge` does both. What a reading is compared with is a caption (`score`), the scene that was
rendered (`score_unnamed`), an earlier window of the same video (`drift`), or its own next frames (`jump_px`).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longlive.data.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    CORNERS,
    HEIGHT,
    MARKERS,
    MOTIONS,
    SHAPES,
    SIZES,
    WIDTH,
    Body,
    Caption,
    Scene,
)
from longlive.errors import InputError
from longlive.eval.measure import (
    NUM_SLOTS,
    Array,
    Measures,
    marker_patches,
    measure,
    unit_areas,
    unit_outlines,
)
from longlive.eval.motion import fit_places

MOTION_FRAMES = 32  # the fewest frames in which a motion can be told
PLACE_FRAMES = 64  # the fewest in which the place it is about can
CAPTIONED = ("count", "background", "colour", "shape", "size", "motion")
UNNAMED = ("place", "tint", "marker")

_COLOUR_LIMIT = 70.0  # levels a colour may be off its name
_CLEAN_DICE = 0.86  # least overlap of a body with its shape
_CLEAN_EDGE = 2.7  # px, widest outline of a body
_CLEAN_STRAYS = 25  # most px that belong to nothing
_CLEAN_SHARE = 0.9  # of the frames
_MARKER_DICE = 0.6
_MARKER_SEEN = 0.3  # share of the marker that must have been seen
_PLACE_TOLERANCE = 2.0  # px
_TINT_TOLERANCE = 0.2


@dataclass(frozen=True)
class BodyReading:
    """What a window shows of one body: names, or None for what is like none of them.

    tint as in `Body`. rgb in levels, radius in px. place: x and y of what the body moves about, px; None along a
    travel, and where motion or window do not tell it. dice: overlap with its shape. edge_px: width of its outline, wide
    in ghosts and blurs.
    """

    colour: str | None
    shape: str
    size: str
    motion: str | None
    tint: float | None
    place: tuple[float | None, float | None]
    rgb: tuple[float, float, float]
    radius: float
    dice: float
    edge_px: float


@dataclass(frozen=True)
class Reading:
    """What a window of frames shows.

    marker: kind and corner, None if there is none or a body hides it. is_clean: bodies look like figures and nothing
    else is there, neither ghosts nor shreds. flicker: mean change of the colours of background and bodies from frame to
    frame, levels. has_motion, has_place: the window is long enough to judge them.
    """

    num_frames: int
    background: str | None
    bodies: tuple[BodyReading, ...]
    marker: tuple[str, str] | None
    is_clean: bool
    flicker: float
    background_rgb: tuple[float, float, float]
    has_motion: bool
    has_place: bool


@dataclass(frozen=True)
class Drift:
    """How far unnamed state has moved between two windows.

    place_px: the largest over bodies; None where bodies come or go, or motions leave nothing to compare. tint: the
    largest over bodies of one colour, 0 to 1. marker_kept: None where a window shows none. background: levels.
    """

    place_px: float | None
    tint: float | None
    marker_kept: bool | None
    background: float


def judge(frames: Tensor | NDArray[np.uint8]) -> Reading:
    """What a video [V, HEIGHT, WIDTH, 3] uint8 shows as a whole. Raises InputError for another size or type."""
    return read(observe(frames))


def judge_batch(videos: Tensor) -> list[Reading]:
    """`judge` of every video of [B, V, HEIGHT, WIDTH, 3] uint8, on their device."""
    return [read(video) for video in observe_batch(videos)]


def observe(frames: Tensor | NDArray[np.uint8]) -> Measures:
    """Measure every frame of a video [V, HEIGHT, WIDTH, 3] uint8 on its device, each body in a slot of its own.

    Raises InputError for another size or type.
    """
    video = torch.as_tensor(frames)
    _check(video)
    return _follow(measure(video))


def observe_batch(videos: Tensor) -> list[Measures]:
    """`observe` of every video of [B, V, HEIGHT, WIDTH, 3] uint8, on their device."""
    _check(videos[0])
    frames, length = measure(videos.flatten(0, 1)), videos.shape[1]
    return [_follow(_cut(frames, start, start + length)) for start in range(0, len(frames.present), length)]


def _check(video: Tensor) -> None:
    if video.ndim != 4 or video.shape[1:] != (HEIGHT, WIDTH, 3) or video.dtype != torch.uint8 or len(video) == 0:
        raise InputError(
            f"a Shapes video is uint8 of [frames, {HEIGHT}, {WIDTH}, 3], not {video.dtype} of {list(video.shape)}"
        )


def read(video: Measures, start: int = 0, stop: int | None = None) -> Reading:
    """What frames start, …, stop − 1 of an observed video show."""
    window = _cut(video, start, stop)
    num_frames = len(window.present)
    assert num_frames > 0, (start, stop)
    slots = [slot for slot in range(NUM_SLOTS) if window.present[:, slot].mean() > 0.5]
    bodies = tuple(_read_body(window, slot) for slot in slots)
    background_rgb = np.median(window.backgrounds, axis=0)
    return Reading(
        num_frames,
        _nearest_background(background_rgb),
        bodies,
        _read_marker(window.corners),
        _is_clean(window, slots, bodies),
        _flicker(window, slots),
        _triple(background_rgb),
        num_frames >= MOTION_FRAMES,
        num_frames >= PLACE_FRAMES,
    )


def score(reading: Reading, caption: Caption) -> dict[str, bool]:
    """Whether each attribute of CAPTIONED is right, of all bodies, and "all" at once.

    "motion" is left out when the window is too short to tell. Bodies are paired with looks as fits best.
    """
    names = [name for name in CAPTIONED[2:] if name != "motion" or reading.has_motion]
    found = {
        "count": len(reading.bodies) == len(caption.looks),
        "background": reading.background == caption.background,
    }
    found |= _best_pairing(
        [
            [{name: getattr(body, name) == getattr(look, name) for name in names} for look in caption.looks]
            for body in reading.bodies
        ],
        names,
        len(caption.looks),
    )
    return found | {"all": all(found.values())}


def score_unnamed(reading: Reading, scene: Scene) -> dict[str, bool]:
    """Whether each attribute of UNNAMED is as in the scene that was rendered, of all bodies.

    "place" is left out when the window is too short to tell.
    """
    names = [name for name in UNNAMED[:2] if name != "place" or reading.has_place]
    pairs = [
        [{name: _is_as_rendered(name, seen, body) for name in names} for body in scene.bodies]
        for seen in reading.bodies
    ]
    return _best_pairing(pairs, names, len(scene.bodies)) | {"marker": reading.marker == scene.marker}


def drift(first: Reading, later: Reading) -> Drift:
    """How far unnamed state has moved from one window of a video to another.

    Windows may show bodies in another order: they are paired such that they look most alike.
    """
    pairs = _alike(first.bodies, later.bodies) if len(first.bodies) == len(later.bodies) else []
    places = [away for a, b in pairs if (away := _place_distance(a.place, b.place)) is not None]
    tints = [
        abs(a.tint - b.tint) for a, b in pairs if a.tint is not None and b.tint is not None and a.colour == b.colour
    ]
    is_marked = first.marker is not None and later.marker is not None
    return Drift(
        max(places, default=None),
        max(tints, default=None),
        first.marker == later.marker if is_marked else None,
        float(np.abs(np.subtract(first.background_rgb, later.background_rgb)).max()),
    )


def _alike(bodies: Sequence[BodyReading], others: Sequence[BodyReading]) -> list[tuple[BodyReading, BodyReading]]:
    """Each body with one of as many others: with the most attributes in common, and of these the nearest colours."""

    def likeness(pairs: list[tuple[BodyReading, BodyReading]]) -> tuple[int, float]:
        same = sum(getattr(a, name) == getattr(b, name) for a, b in pairs for name in CAPTIONED[2:])
        return same, -sum(math.dist(a.rgb, b.rgb) for a, b in pairs)

    return max((list(zip(bodies, order, strict=True)) for order in itertools.permutations(others)), key=likeness)


def jump_px(video: Measures, frame: int, num_frames: int = 16) -> float:
    """The largest displacement of a body over 2 frames about a switch: from `frame` − 2 to `frame` + `num_frames`.

    Infinite when a body is lost, or none was there. The fastest motions of the world make 4 px themselves.
    """
    before, after = _cut(video, max(frame - 2, 0), frame), _cut(video, frame, frame + num_frames)
    window = _cut(video, max(frame - 2, 0), frame + num_frames)
    largest = 0.0 if before.present.any() else math.inf
    for slot in range(NUM_SLOTS):
        if not before.present[:, slot].any():
            continue
        if after.present[:, slot].mean() < 0.5:
            return math.inf
        places = window.places[window.present[:, slot], slot]
        away = _shortest(places[2:] - places[:-2])
        largest = max(largest, float(np.hypot(away[:, 0], away[:, 1]).max(initial=0.0)))
    return largest


def _cut(video: Measures, start: int, stop: int | None) -> Measures:
    return Measures(*(column[start:stop] for column in vars(video).values()))


def _follow(video: Measures) -> Measures:
    """Order the slots of every frame such that a body stays in its slot: bodies go where they are nearest."""
    orders = []
    known: list[Array | None] = [None] * NUM_SLOTS
    for present, places in zip(video.present, video.places, strict=True):
        order = min(itertools.permutations(range(NUM_SLOTS)), key=lambda order: _way(order, present, places, known))
        orders.append(order)
        for slot, found in enumerate(order):
            if present[found]:
                known[slot] = places[found]
    index = np.array(orders)
    slotted = ("present", "colours", "places", "areas", "halftones", "dice")
    line = np.arange(len(index))[:, None]
    return replace(video, **{name: getattr(video, name)[line, index] for name in slotted})


def _way(order: Sequence[int], present: NDArray[np.bool_], places: Array, known: list[Array | None]) -> float:
    """How far bodies would have gone, px, if slot i were found[order[i]]; a new slot costs more than any way."""
    total = 0.0
    for slot, found in enumerate(order):
        if present[found]:
            last = known[slot]
            total += 1000.0 + slot if last is None else float(np.hypot(*_shortest(places[found] - last)))
    return total


def _shortest(away: Array) -> Array:
    """Differences [..., 2] the short way round the torus."""
    size = np.array([WIDTH, HEIGHT])
    shortest: Array = (away + size / 2) % size - size / 2
    return shortest


def _read_body(window: Measures, slot: int) -> BodyReading:
    seen = window.present[:, slot]
    names, tints = _name_colours(window.colours[seen, slot])
    colour = int(np.bincount(names + 1).argmax()) - 1  # −1 for none
    shares = window.dice[seen, slot].mean(axis=0)
    number = int(shares.argmax())
    radii = np.sqrt(window.areas[seen, slot] / unit_areas()[number])
    has_motion = len(window.present) >= MOTION_FRAMES
    motion, x, y = _read_motion(np.flatnonzero(seen), window.places[seen, slot]) if has_motion else (None, None, None)
    edges = window.halftones[seen, slot] / (unit_outlines()[number] * radii)
    radius = float(np.median(radii))
    has_place = len(window.present) >= PLACE_FRAMES
    return BodyReading(
        list(COLOURS)[colour] if colour >= 0 else None,
        SHAPES[number],
        "big" if radius > math.sqrt(SIZES["small"] * SIZES["big"]) else "small",
        motion,
        float(np.median(tints[names == colour])) if colour >= 0 else None,
        (x, y) if has_place else (None, None),
        _triple(np.median(window.colours[seen, slot], axis=0)),
        radius,
        float(shares[number]),
        float(np.median(edges)),
    )


def _name_colours(colours: Array) -> tuple[NDArray[np.int64], Array]:
    """The number of the nearest colour of each of [n, 3], −1 for none, and the tint of that colour."""
    dark, light = np.array(list(COLOURS.values()), dtype=float).swapaxes(0, 1)
    away, span = colours[:, None] - dark, light - dark
    tints = (away * span).sum(-1) / (span**2).sum(-1)
    misses = np.linalg.norm(away - tints.clip(0, 1)[..., None] * span, axis=-1)
    nearest = misses.argmin(axis=1)
    line = np.arange(len(colours))
    return np.where(misses[line, nearest] < _COLOUR_LIMIT, nearest, -1), tints[line, nearest].clip(-0.5, 1.5)


def _nearest_background(rgb: Array) -> str | None:
    misses = {name: float(np.linalg.norm(rgb - plain)) for name, (plain, _) in BACKGROUNDS.items()}
    nearest = min(misses, key=misses.__getitem__)
    return nearest if misses[nearest] < _COLOUR_LIMIT else None


def _read_motion(frames: NDArray[np.intp], places: Array) -> tuple[str | None, float | None, float | None]:
    """The motion of a body at places [n, 2], None for none of the world's, and the place it is about."""
    steps = _shortest(np.diff(places, axis=0))
    x, y = np.concatenate([places[:1], places[:1] + np.cumsum(steps, axis=0)]).T
    fit = fit_places(frames, x, y)
    return fit.motion, None if fit.x is None else fit.x % WIDTH, None if fit.y is None else fit.y % HEIGHT


def _read_marker(corners: NDArray[np.float32]) -> tuple[str, str] | None:
    """Kind and corner of the marker in α [V, corners, S, S], each pixel averaged over the frames that show it."""
    is_seen = ~np.isnan(corners)
    num_seen = is_seen.sum(axis=0)
    mean = np.where(is_seen, corners, 0).sum(axis=0) / num_seen.clip(1)
    best, found = _MARKER_DICE, None
    for (kind, patch), (number, corner) in itertools.product(
        zip(MARKERS, marker_patches(), strict=True), enumerate(CORNERS)
    ):
        part = num_seen[number] > 0
        if patch[part].sum() < _MARKER_SEEN * patch.sum():
            continue
        alpha = mean[number][part].clip(0, 1.5)
        dice = 2 * (alpha * patch[part]).sum() / ((alpha**2).sum() + (patch[part] ** 2).sum())
        if dice > best:
            best, found = float(dice), (kind, corner)
    return found


def _is_clean(window: Measures, slots: list[int], bodies: tuple[BodyReading, ...]) -> bool:
    clean = window.strays <= _CLEAN_STRAYS
    for slot, body in zip(slots, bodies, strict=True):
        clean &= window.dice[:, slot, SHAPES.index(body.shape)] > _CLEAN_DICE
    return bool(clean.mean() >= _CLEAN_SHARE) and all(body.edge_px < _CLEAN_EDGE for body in bodies)


def _flicker(window: Measures, slots: list[int]) -> float:
    changes = [np.abs(np.diff(window.backgrounds, axis=0))]
    changes += [np.abs(np.diff(window.colours[window.present[:, slot], slot], axis=0)) for slot in slots]
    return max((float(change.mean()) for change in changes if len(change)), default=0.0)


def _best_pairing(pairs: list[list[dict[str, bool]]], names: list[str], num_wanted: int) -> dict[str, bool]:
    """For each name whether all of the wanted bodies have it right, bodies seen and wanted paired as fits best.

    pairs[i][j]: what is right if body i seen is body j wanted.
    """
    best: dict[str, bool] = dict.fromkeys(names, False)
    for order in itertools.permutations(range(len(pairs)), num_wanted):
        rights = [pairs[seen][wanted] for wanted, seen in enumerate(order)]
        found = {name: all(right[name] for right in rights) for name in names}
        best = max(best, found, key=lambda scores: sum(scores.values()))
    return best


def _is_as_rendered(name: str, seen: BodyReading, body: Body) -> bool:
    if name == "tint":
        return seen.tint is not None and abs(seen.tint - body.tint) < _TINT_TOLERANCE
    travels_x, travels_y = (speed != 0 for speed in MOTIONS[body.look.motion].velocity)
    away = _place_distance(seen.place, (None if travels_x else body.track.x, None if travels_y else body.track.y))
    return away is not None and away < _PLACE_TOLERANCE


def _place_distance(
    first: tuple[float | None, float | None], second: tuple[float | None, float | None]
) -> float | None:
    """The distance along the axes that both places have, None if there is none."""
    away = [
        abs((a - b + size / 2) % size - size / 2)
        for a, b, size in zip(first, second, (WIDTH, HEIGHT), strict=True)
        if a is not None and b is not None
    ]
    return math.hypot(*away) if away else None


def _triple(values: Array) -> tuple[float, float, float]:
    red, green, blue = values.tolist()
    return red, green, blue
