"""Pictures of scenes: anti-aliased bodies from signed distances, on plain backgrounds with a marker.

A body is drawn in a square patch around its centre, so that drawing costs what the body covers.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from longlive.data.shapes.world import BACKGROUNDS, CORNERS, HEIGHT, SHAPES, WIDTH, Scene, poses

PATCH = 36  # px, of more than the widest figure, a big star

_RING_WIDTH = 0.42  # of the radius
_ARM_WIDTH = 0.32  # half the width of a cross's arm, of the radius
_ROUND_RADIUS = 0.9  # of circle and ring, which look larger than what has corners
_STAR_RADIUS = 1.1  # of a star, which looks smaller than what is broad
_STAR_INNER = 0.4  # radius of a star's inner corners, of that of its tips
_MARKER_SIZES = {"dot": (3.6, 3.6), "dash": (5.5, 2.0), "post": (2.0, 5.5)}  # half width and height, px


def render(scenes: Sequence[Scene], start: int, stop: int, device: torch.device | str = "cpu") -> Tensor:
    """Frames start, …, stop − 1 of every scene: [B, F, HEIGHT, WIDTH, 3] uint8 on the device."""
    num_frames = stop - start
    stills = torch.stack([_background(scene.background, scene.marker) for scene in scenes]).to(device)
    video = stills[:, None].expand(-1, num_frames, -1, -1, -1).contiguous()
    for number in range(max(len(scene.bodies) for scene in scenes)):
        for shape in SHAPES:
            rows = [
                row
                for row, scene in enumerate(scenes)
                if len(scene.bodies) > number and scene.bodies[number].look.shape == shape
            ]
            if rows:
                _draw(video, [scenes[row] for row in rows], rows, number, shape, start)
    return video


def coverage(shape: str, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """How much of each pixel a figure covers, in [0, 1]: its centre dx, dy px from the figure's, y down.

    Arguments broadcast; radius in px.
    """
    return (0.5 - _distance(shape, dx / radius, dy / radius) * radius).clamp(0, 1)


def _draw(video: Tensor, scenes: Sequence[Scene], rows: list[int], number: int, shape: str, start: int) -> None:
    """Draw body `number` of the scenes, all of one shape, onto the videos of these rows."""
    num_frames, device = video.shape[1], video.device
    bodies = [scene.bodies[number] for scene in scenes]
    x, y, radius = poses(bodies, start, start + num_frames, device).unbind(-1)  # [N, F]
    side = torch.arange(PATCH, device=device)
    columns = x.floor().long()[..., None] + side - PATCH // 2  # [N, F, PATCH]
    lines = y.floor().long()[..., None] + side - PATCH // 2
    dx = (columns + 0.5 - x[..., None]).float()[..., None, :]
    dy = (lines + 0.5 - y[..., None]).float()[..., :, None]
    alpha = coverage(shape, dx, dy, radius.float()[..., None, None])[..., None]
    frame = torch.tensor(rows, device=device)[:, None] * num_frames + torch.arange(num_frames, device=device)
    line = frame[..., None] * HEIGHT + lines % HEIGHT
    pixel = (line[..., :, None] * WIDTH + (columns % WIDTH)[..., None, :]).flatten()
    pixels = video.view(-1, 3)
    behind = pixels[pixel].float().view(*alpha.shape[:-1], 3)
    colour = torch.tensor([body.rgb for body in bodies], device=device)[:, None, None, None]
    pixels[pixel] = (behind + alpha * (colour - behind)).round().to(torch.uint8).view(-1, 3)


@cache
def _background(name: str, marker: tuple[str, str]) -> Tensor:
    """A background with its marker and no bodies: [HEIGHT, WIDTH, 3] uint8."""
    colours = torch.tensor(BACKGROUNDS[name], dtype=torch.float32)
    alpha = marker_coverage(*marker)[..., None]
    return (colours[0] + alpha * (colours[1] - colours[0])).round().to(torch.uint8)


def marker_coverage(kind: str, corner: str) -> Tensor:
    """How much of each pixel a marker covers: [HEIGHT, WIDTH] in [0, 1]."""
    x, y = CORNERS[corner]
    dx = (torch.arange(WIDTH) + 0.5 - x)[None, :]
    dy = (torch.arange(HEIGHT) + 0.5 - y)[:, None]
    half_width, half_height = _MARKER_SIZES[kind]
    if kind == "dot":
        return (0.5 - (torch.hypot(dx, dy) - half_width)).clamp(0, 1)
    return (0.5 - torch.maximum(dx.abs() - half_width, dy.abs() - half_height)).clamp(0, 1)


def _distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance to the outline of a figure of radius 1, negative inside."""
    if shape == "circle":
        return torch.hypot(x, y) - _ROUND_RADIUS
    if shape == "ring":
        return (torch.hypot(x, y) - (_ROUND_RADIUS - _RING_WIDTH / 2)).abs() - _RING_WIDTH / 2
    if shape == "square":
        half = math.sqrt(0.5)
        return torch.maximum(x.abs() - half, y.abs() - half)
    if shape == "cross":
        x, y = x.abs(), y.abs()
        return torch.maximum(torch.maximum(x, y) - 1, torch.minimum(x, y) - _ARM_WIDTH)
    if shape == "triangle":
        return torch.maximum(y - 0.5, math.sqrt(0.75) * x.abs() - 0.5 * y - 0.5)
    assert shape == "star", shape
    return _star_distance(x.abs() / _STAR_RADIUS, -y / _STAR_RADIUS) * _STAR_RADIUS


def _star_distance(x: Tensor, y: Tensor) -> Tensor:
    """Of a star of five points, its top at (0, 1), from x ≥ 0, y up: the plane is folded to half of the top point."""
    for turns in (2, 1):  # across the line of a tip at 72° from the top, then across that of an inner corner at 36°
        tilt = math.radians(36 * turns)
        # How far a point is beyond the line through the centre at this angle from the top.
        beyond = (x * math.cos(tilt) - y * math.sin(tilt)).clamp(min=0)
        x, y = x - 2 * beyond * math.cos(tilt), y + 2 * beyond * math.sin(tilt)
        x = x.abs()
    # The edge runs from the tip (0, 1) to the inner corner.
    corner_x, corner_y = _STAR_INNER * math.sin(math.pi / 5), _STAR_INNER * math.cos(math.pi / 5)
    length = math.hypot(corner_x, 1 - corner_y)
    return torch.maximum((x * (1 - corner_y) + (y - 1) * corner_x) / length, y - 1)  # no longer than its tip
