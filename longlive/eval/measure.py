"""What is seen in every single frame of a Shapes video: bodies and their measures, background, marker, strays.

Classical vision on tensors of any device. A pixel of a body is seen as b + α (c − b) between background b and the
body's colour c. Shapes: N or V frames, K = 2 slots for bodies, S a side.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from longlive.data.shapes.render import PATCH, coverage, marker_coverage
from longlive.data.shapes.world import BACKGROUNDS, CORNERS, HEIGHT, MARKERS, SHAPES, WIDTH

NUM_SLOTS = 2
CORNER_SIDE = 16  # px of the corner patches in which markers are sought
WINDOW = 48  # px of the window around a peak in which a body is measured: its centre may be some px off

_FRAMES_AT_ONCE = 256
_CHROMA_FLOOR = 28.0  # levels: what differs less from the background in hue is no body
_NEUTRAL = 16.0  # levels: what differs less is as bright or dark as a marker, and not the edge of a body
_CHROMA_FULL = 80.0  # levels: what differs more counts fully
_STRENGTH_FLOOR = 30.0  # levels: what differs less from the background is none at all
_RESIDUAL_LIMIT = 60.0  # levels a pixel of a body may be off the line from background to its colour
_REACH = 17.5  # px around its centre in which a body is measured: less than to another body's
_CORE_REACH = 12.0  # px around its centre in which its colour is sought
_CORE_PIXELS = 24
_PEAK_BLUR = 6.0  # px
_LEAST_AREA = 50.0  # px² of a body
_HALFTONES = (0.15, 0.85)  # α of a pixel that is neither body nor background

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Measures:
    """Of V frames; slots hold the bodies found, in no order that lasts.

    backgrounds [V, 3] in levels (0 to 255); present [V, K]; colours [V, K, 3]; places [V, K, 2]: x, y in px; areas
    [V, K] in px²; halftones [V, K]: px of an outline; dice [V, K, shapes]: best overlap with a figure of each shape, in
    [0, 1]; strays [V]: px unlike the background outside bodies and corners; corners [V, 4, S, S]: α of the marker
    there, NaN behind a body.
    """

    backgrounds: Array
    present: NDArray[np.bool_]
    colours: Array
    places: Array
    areas: Array
    halftones: Array
    dice: Array
    strays: Array
    corners: NDArray[np.float32]


def measure(frames: Tensor) -> Measures:
    """Measure frames [V, HEIGHT, WIDTH, 3] uint8, each by itself."""
    parts = [_measure(part) for part in frames.split(_FRAMES_AT_ONCE)]
    return Measures(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _measure(frames: Tensor) -> tuple[NDArray[np.generic], ...]:
    pixels = frames.float()
    backgrounds = pixels.flatten(1, 2).median(dim=1).values
    difference = pixels - backgrounds[:, None, None]
    low, high = difference.aminmax(dim=-1)
    chroma = high - low
    strength = torch.maximum(high, -low)
    is_free = torch.ones_like(chroma, dtype=torch.bool)
    slots = []
    for _ in range(NUM_SLOTS):
        slot = _find_body(chroma * is_free, difference)
        slots.append(slot)
        is_free &= ~(_is_near_on_canvas(slot["places"]) & slot["present"][:, None, None])
    bodies = {name: torch.stack([slot[name] for slot in slots], dim=1) for name in slots[0]}
    dice = _figures(bodies.pop("patches"))
    corners = _marker_alpha(torch.stack([_corner(difference, name) for name in CORNERS], dim=1), backgrounds)
    corners = corners.where(torch.stack([_corner(is_free, name) for name in CORNERS], dim=1), math.nan)
    strays = ((strength > _STRENGTH_FLOOR) & is_free & ~_corner_mask(frames.device)).sum((1, 2)).double()
    columns = (
        *(backgrounds, bodies["present"], bodies["colours"] + backgrounds[:, None], bodies["places"]),
        *(bodies["areas"], bodies["halftones"], dice, strays, corners),
    )
    return tuple(column.cpu().numpy() for column in columns)


def _find_body(chroma: Tensor, difference: Tensor) -> dict[str, Tensor]:
    """Measure the body where chroma [N, H, W] is densest; zeros in frames that have too little for one.

    What belongs to a body found before has no chroma. colours are relative to the background, patches [N, P, P] hold
    the body's α around its centre.
    """
    field = _field(chroma)
    is_busy = field.sum((1, 2)) > _LEAST_AREA / 2
    is_busy[0] |= ~is_busy.any()  # a Fourier transform of no frames is an error
    busy = is_busy.nonzero()[:, 0]
    corner = _peak(field[busy]) - WINDOW // 2
    side = torch.arange(WINDOW, device=chroma.device)
    lines, columns = (corner[:, 1:] + side) % HEIGHT, (corner[:, :1] + side) % WIDTH
    pixel = (busy[:, None, None] * HEIGHT + lines[:, :, None]) * WIDTH + columns[:, None, :]
    slot = _measure_body(chroma.flatten()[pixel], difference.flatten(0, 2)[pixel])
    slot["places"] = (slot["places"] + corner) % torch.tensor([WIDTH, HEIGHT], device=chroma.device)
    return {
        name: values.new_zeros(len(field), *values.shape[1:]).index_copy(0, busy, values)
        for name, values in slot.items()
    }


def _field(chroma: Tensor) -> Tensor:
    """How much of a body a pixel seems to be."""
    return (chroma / _CHROMA_FULL).clamp(max=1) * (chroma > _CHROMA_FLOOR)


def _peak(field: Tensor) -> Tensor:
    """Column and line [N, 2] of the densest place of a field [N, H, W]: of its circular convolution with a Gaussian."""
    device = field.device
    away_y, away_x = (
        torch.minimum(torch.arange(size, device=device), size - torch.arange(size, device=device))
        for size in (HEIGHT, WIDTH)
    )
    kernel = torch.exp(-(away_y[:, None] ** 2 + away_x**2) / (2 * _PEAK_BLUR**2))
    dense = torch.fft.irfft2(torch.fft.rfft2(field) * torch.fft.rfft2(kernel), s=(HEIGHT, WIDTH))
    index = dense.flatten(1).argmax(1)
    return torch.stack([index % WIDTH, index // WIDTH], dim=1)


def _measure_body(chroma: Tensor, difference: Tensor) -> dict[str, Tensor]:
    """Measure the body about the middle of windows: chroma [N, S, S], difference [N, S, S, 3], places in the window."""
    difference = difference * (chroma > _NEUTRAL)[..., None]
    field = _field(chroma)
    places = _centre(field, torch.full((len(field), 2), WINDOW / 2, device=field.device))
    is_core = _is_near(places, _CORE_REACH)
    core = (chroma * field * is_core).flatten(1).topk(_CORE_PIXELS).indices
    colours = difference.flatten(1, 2).gather(1, core[..., None].expand(-1, -1, 3)).mean(1)
    alpha = _alpha(difference, colours)
    solid = ((alpha > _HALFTONES[1]) & is_core).flatten(1).float()
    mean = torch.einsum("np,npc->nc", solid, difference.flatten(1, 2)) / solid.sum(1, keepdim=True).clamp(min=1)
    colours = torch.where(solid.any(1, keepdim=True), mean, colours)
    alpha = _alpha(difference, colours)
    places = _centre(alpha, places)
    alpha = alpha * _is_near(places, _REACH)
    areas = alpha.sum((1, 2))
    halftones = ((alpha > _HALFTONES[0]) & (alpha < _HALFTONES[1])).sum((1, 2)).float()
    low, high = colours.aminmax(dim=-1)
    present = (areas > _LEAST_AREA) & (high - low > 2 * _CHROMA_FLOOR)
    return {
        **{"present": present, "colours": colours, "places": places, "areas": areas, "halftones": halftones},
        "patches": _patch(alpha, places),
    }


def _is_near(places: Tensor, reach: float) -> Tensor:
    """Whether each pixel of a window [N, S, S] is within reach of places [N, 2] in it."""
    side = torch.arange(WINDOW, device=places.device) + 0.5
    return (side - places[:, :1]).square()[:, None, :] + (side - places[:, 1:]).square()[:, :, None] < reach**2


def _is_near_on_canvas(places: Tensor) -> Tensor:
    """Whether each pixel of the canvas [N, H, W] is within _REACH of places [N, 2] on the torus."""
    device = places.device
    dx = (torch.arange(WIDTH, device=device) + 0.5 - places[:, :1] + WIDTH / 2) % WIDTH - WIDTH / 2
    dy = (torch.arange(HEIGHT, device=device) + 0.5 - places[:, 1:] + HEIGHT / 2) % HEIGHT - HEIGHT / 2
    return dx.square()[:, None, :] + dy.square()[:, :, None] < _REACH**2


def _centre(weights: Tensor, places: Tensor, num_rounds: int = 3) -> Tensor:
    """The centre of mass [N, 2] of weights [N, S, S] within _REACH of itself, sought from `places`."""
    side = torch.arange(WINDOW, device=weights.device) + 0.5
    for _ in range(num_rounds):
        near = weights * _is_near(places, _REACH)
        columns, lines = near.sum(1), near.sum(2)
        mass = columns.sum(1, keepdim=True)
        moments = torch.stack([columns @ side, lines @ side], dim=1)
        places = torch.where(mass > 0, moments / mass.clamp(min=1e-6), places)
    return places


def _alpha(difference: Tensor, colours: Tensor) -> Tensor:
    """α [N, S, S] of the least residual of difference [N, S, S, 3] − α colours [N, 3]; 0 where that is large."""
    square = colours.square().sum(-1)[:, None, None]
    alpha = torch.einsum("nhwc,nc->nhw", difference, colours) / square.clamp(min=1)
    # |d − α c|² = |d|² − α² |c|² at the least.
    residual = difference.square().sum(-1) - alpha.square() * square
    return alpha.clamp(0, 1) * (residual < _RESIDUAL_LIMIT**2) * (alpha > 0.1)


def _patch(alpha: Tensor, places: Tensor) -> Tensor:
    """The part [N, P, P] of α [N, S, S] with places [N, 2] at its middle, by linear interpolation."""
    first = places - PATCH / 2
    whole = first.floor()
    index = (whole.long()[..., None] + torch.arange(PATCH + 1, device=alpha.device)).clamp(0, WINDOW - 1)
    number = torch.arange(len(alpha), device=alpha.device)[:, None, None]
    patch = alpha[number, index[:, 1, :, None], index[:, 0, None, :]]
    part_x, part_y = (first - whole)[:, :, None, None].unbind(1)
    patch = patch[:, :, :-1] * (1 - part_x) + patch[:, :, 1:] * part_x
    return patch[:, :-1] * (1 - part_y) + patch[:, 1:] * part_y


def _figures(patches: Tensor) -> Tensor:
    """The best Dice overlap of patches [N, K, P, P] with each shape: [N, K, shapes]."""
    flat, templates = patches.flatten(2), _templates().to(patches.device)
    overlap = torch.einsum("nkp,srp->nksr", flat, templates)
    squares = flat.square().sum(-1)[..., None, None] + templates.square().sum(-1)
    return (2 * overlap / squares).amax(-1)


@cache
def _templates() -> Tensor:
    """Figures of all shapes at several sizes: [shapes, sizes, P²]."""
    side = torch.arange(PATCH) + 0.5 - PATCH / 2
    radii = torch.tensor(np.geomspace(6.0, 17.0, 13), dtype=torch.float32)[:, None, None]
    return torch.stack([coverage(shape, side, side[:, None], radii).flatten(1) for shape in SHAPES])


def _marker_alpha(difference: Tensor, backgrounds: Tensor) -> Tensor:
    """α [N, corners, S, S] of the marker's colour, which follows from the nearest background, in corner patches."""
    plain, marked = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32, device=difference.device).unbind(1)
    contrast = (marked - plain)[torch.cdist(backgrounds, plain).argmin(1)]
    return torch.einsum("nkhwc,nc->nkhw", difference, contrast) / contrast.square().sum(-1)[:, None, None, None]


def _corner(pictures: Tensor, corner: str) -> Tensor:
    """The part [N, S, S, …] of pictures [N, H, W, …] about a corner's marker."""
    x, y = (round(value) - CORNER_SIDE // 2 for value in CORNERS[corner])
    return pictures[:, y : y + CORNER_SIDE, x : x + CORNER_SIDE]


def _corner_mask(device: torch.device) -> Tensor:
    """[H, W]: where markers are sought."""
    mask = torch.zeros(1, HEIGHT, WIDTH, dtype=torch.bool, device=device)
    for name in CORNERS:
        _corner(mask, name).fill_(True)
    return mask[0]


@cache
def marker_patches() -> NDArray[np.float32]:
    """What a marker of each kind looks like in its corner patch: [kinds, S, S]. All corners are alike."""
    corner = next(iter(CORNERS))
    pictures = torch.stack([marker_coverage(kind, corner) for kind in MARKERS])
    patches: NDArray[np.float32] = _corner(pictures, corner).numpy()
    return patches


@cache
def unit_areas() -> Array:
    """The area of each shape at radius 1, in units of its square: [shapes]."""
    return np.array([float(picture.sum()) for picture in _unit_pictures()]) / _UNIT**2


@cache
def unit_outlines() -> Array:
    """The length of each shape's outline at radius 1: [shapes]."""
    # Across an outline α rises from 0 to 1 within 1 px, and the integral of 6 α (1 − α) is 1.
    return np.array([float((6 * picture * (1 - picture)).sum()) for picture in _unit_pictures()]) / _UNIT


_UNIT = 200.0  # px, a radius at which pixels hardly matter


def _unit_pictures() -> list[Tensor]:
    side = torch.arange(-_UNIT - 30, _UNIT + 30) + 0.5
    column, line = side, side[:, None]
    # A little turned: edges along the grid would have no halftones.
    dx, dy = 0.9 * column + math.sqrt(0.19) * line, 0.9 * line - math.sqrt(0.19) * column
    return [coverage(shape, dx, dy, torch.tensor(_UNIT)).double() for shape in SHAPES]
