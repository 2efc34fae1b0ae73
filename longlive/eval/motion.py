"""Which motion a track of places is, and about which place: least squares against every motion of the world."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longlive.data.shapes.world import MOTIONS

Array = NDArray[np.float64]

_PERIOD_FACTORS = (0.85, 0.92, 1.0, 1.08, 1.17)  # of the world's: what is generated is not exact
_PHASES = np.arange(24) / 24
_LEAST_SPEED = 0.55  # px/frame of a travel
_LEAST_SHARE = 0.5  # of the world's swing, hop or zigzag
_NOISE = 0.4  # px, of places
_MOST_ERROR = 3.0  # px (root mean square) that a track may be off its motion


@dataclass(frozen=True)
class Fit:
    """A motion (None when the track is like none) and the place it is about, px; None along a travel."""

    motion: str | None
    x: float | None
    y: float | None


def fit_places(frames: NDArray[np.intp], x: Array, y: Array) -> Fit:
    """The travel, swing, hop or rest that explains places x, y [n] (unwrapped, px) at these frames best.

    Every motion is fitted with its period and phase free; more parameters must pay by the Bayesian information
    criterion n log(σ²) + k log(n).
    """
    t = frames - frames.mean()
    fits = [_rest(x, y), *_travels(t, x, y), *_swings(t, x, y), *_hops(t, x, y), *_zigzags(t, x, y)]
    num_numbers = 2 * len(t)
    costs = [
        num_numbers * np.log(error / num_numbers + _NOISE**2) + num_parameters * np.log(num_numbers)
        for _, error, num_parameters in fits
    ]
    fit, error, _ = fits[int(np.argmin(costs))]
    return fit if error / num_numbers < _MOST_ERROR**2 else Fit(None, None, None)


Candidate = tuple[Fit, float, int]
"""A fit, the sum of its squared errors, and its number of parameters."""


def _rest(x: Array, y: Array) -> Candidate:
    return Fit("still", float(x.mean()), float(y.mean())), _spread(x) + _spread(y), 2


def _travels(t: Array, x: Array, y: Array) -> list[Candidate]:
    found: list[Candidate] = []
    (_, speed_x), error_x = _solve([np.ones_like(t), t], x)
    (_, speed_y), error_y = _solve([np.ones_like(t), t], y)
    if abs(speed_x) > _LEAST_SPEED:
        name = "right" if speed_x > 0 else "left"
        found.append((Fit(name, None, float(y.mean())), error_x + _spread(y), 3))
    if abs(speed_y) > _LEAST_SPEED:
        name = "down" if speed_y > 0 else "up"
        found.append((Fit(name, float(x.mean()), None), error_y + _spread(x), 3))
    return found


def _swings(t: Array, x: Array, y: Array) -> list[Candidate]:
    found: list[Candidate] = []
    one, none = np.ones_like(t), np.zeros_like(t)
    for factor in _PERIOD_FACTORS:
        angle = 2 * np.pi * t / (MOTIONS["sway"].period * factor)
        (centre, a, b), error = _solve([one, np.sin(angle), np.cos(angle)], x)
        if np.hypot(a, b) > _LEAST_SHARE * MOTIONS["sway"].swing[0]:
            found.append((Fit("sway", centre, float(y.mean())), error + _spread(y), 5))
        angle = 2 * np.pi * t / (MOTIONS["orbit"].period * factor)
        sine, cosine = np.sin(angle), np.cos(angle)
        # x = r sin(ωt + φ), y = −r cos(ωt + φ), as both of r cos φ and r sin φ
        both = [np.r_[one, none], np.r_[none, one], np.r_[sine, -cosine], np.r_[cosine, sine]]
        (centre_x, centre_y, a, b), error = _solve(both, np.r_[x, y])
        if np.hypot(a, b) > _LEAST_SHARE * MOTIONS["orbit"].swing[0]:
            found.append((Fit("orbit", centre_x, centre_y), error, 5))
    return found


def _hops(t: Array, x: Array, y: Array) -> list[Candidate]:
    turns = _turns(t, MOTIONS["bounce"].period)
    floors, heights, errors = _solve_each(-4 * turns * (1 - turns), y)
    errors[heights < _LEAST_SHARE * MOTIONS["bounce"].hop] = np.inf
    best = int(errors.argmin())
    return [(Fit("bounce", float(x.mean()), float(floors[best])), float(errors[best]) + _spread(x), 5)]


def _zigzags(t: Array, x: Array, y: Array) -> list[Candidate]:
    (_, speed), error_x = _solve([np.ones_like(t), t], x)
    if speed < _LEAST_SPEED:
        return []
    turns = _turns(t, MOTIONS["zigzag"].period)
    centres, heights, errors = _solve_each(4 * np.abs(turns - 0.5) - 1, y)
    errors[np.abs(heights) < _LEAST_SHARE * MOTIONS["zigzag"].zigzag] = np.inf
    best = int(errors.argmin())
    return [(Fit("zigzag", None, float(centres[best])), float(errors[best]) + error_x, 6)]


def _turns(t: Array, period: float) -> Array:
    """The phase, in [0, 1), of every period and phase tried: [candidates, n]."""
    periods = period * np.array(_PERIOD_FACTORS)
    return (t / periods[:, None, None] + _PHASES[:, None]).reshape(-1, len(t)) % 1.0


def _spread(values: Array) -> float:
    """The sum of squares about the mean."""
    return float(((values - values.mean()) ** 2).sum())


def _solve(basis: list[Array], values: Array) -> tuple[list[float], float]:
    """Coefficients and squared error of values [n] in a basis of functions [n]."""
    columns = np.stack(basis, axis=1)
    solution = np.linalg.lstsq(columns, values, rcond=None)[0]
    return solution.tolist(), float(((values - columns @ solution) ** 2).sum())


def _solve_each(waves: Array, values: Array) -> tuple[Array, Array, Array]:
    """values ≈ offset + height · wave for each wave [candidates, n]: offsets, heights, squared errors."""
    centred, rest = waves - waves.mean(1, keepdims=True), values - values.mean()
    heights = centred @ rest / (centred**2).sum(1)
    errors = ((rest - heights[:, None] * centred) ** 2).sum(1)
    return values.mean() - heights * waves.mean(1), heights, errors
