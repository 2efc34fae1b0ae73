"""From readings of many videos to figures: accuracy, drift of what no prompt names, continuity at a switch."""

import math
from collections.abc import Sequence
from statistics import fmean

from longlive.data.shapes.world import Caption, Scene
from longlive.eval.judge import CAPTIONED, UNNAMED, Drift, Reading, drift, score, score_unnamed
from longlive.eval.statistics import Figure, average, share, spread

Figures = dict[str, Figure]

JUMP_LIMIT_PX = 8.0
BODY_COUNTS = ("one body", "two bodies")


def accuracy(readings: Sequence[Reading], captions: Sequence[Caption]) -> Figures:
    """What is right. attributes: the share of CAPTIONED that is, averaged over videos; all: videos in which everything
    is, also of those with one and with two bodies; and each attribute, clean pictures, and flicker in levels."""
    scores = [score(reading, caption) for reading, caption in zip(readings, captions, strict=True)]
    told = ["all", *(name for name in CAPTIONED if all(name in found for found in scores))]
    return {
        "attributes": average(attribute_rates(readings, captions), 0, 1),
        **{name: share([found[name] for found in scores]) for name in told},
        **{
            name: share(
                [found["all"] for found, caption in zip(scores, captions, strict=True) if len(caption.looks) == num]
            )
            for num, name in enumerate(BODY_COUNTS, 1)
        },
        "clean": share([reading.is_clean for reading in readings]),
        "flicker": average([reading.flicker for reading in readings], 0),
    }


def scene_accuracy(readings: Sequence[Reading], scenes: Sequence[Scene]) -> Figures:
    """`accuracy` of pictures of known scenes, and whether what no caption names is as it was drawn."""
    unnamed = [score_unnamed(reading, scene) for reading, scene in zip(readings, scenes, strict=True)]
    return accuracy(readings, [scene.caption for scene in scenes]) | {
        name: share([found[name] for found in unnamed]) for name in UNNAMED
    }


def attribute_rates(
    readings: Sequence[Reading], captions: Sequence[Caption], names: Sequence[Sequence[str]] | None = None
) -> list[float]:
    """The share of attributes right in each video: of all CAPTIONED, or of those in `names`, of videos with any."""
    rates = []
    for number, (reading, caption) in enumerate(zip(readings, captions, strict=True)):
        found = score(reading, caption)
        wanted = [name for name in (CAPTIONED if names is None else names[number]) if name in found]
        if wanted:
            rates.append(fmean(found[name] for name in wanted))
    return rates


def changed_attributes(before: Caption, after: Caption) -> list[str]:
    """The attributes of CAPTIONED, of any body, that a switch changes."""
    names = [
        name
        for name in CAPTIONED[2:]
        if [getattr(look, name) for look in before.looks] != [getattr(look, name) for look in after.looks]
    ]
    return names + (["background"] if before.background != after.background else [])


def switch_accuracy(readings: Sequence[Reading], pairs: Sequence[tuple[Caption, Caption]]) -> Figures:
    """`accuracy` by the captions after the switch, and that of what the switch changed and what it did not."""
    afters = [after for _, after in pairs]
    changed = [changed_attributes(*pair) for pair in pairs]
    unchanged = [[name for name in CAPTIONED if name not in names] for names in changed]
    return accuracy(readings, afters) | {
        "changed": average(attribute_rates(readings, afters, changed), 0, 1),
        "unchanged": average(attribute_rates(readings, afters, unchanged), 0, 1),
    }


def drifts(firsts: Sequence[Reading], laters: Sequence[Reading]) -> Figures:
    """How far unnamed state has moved in each video: place in px, tint from 0 to 1, marker, background in levels."""
    return _drift_figures([drift(first, later) for first, later in zip(firsts, laters, strict=True)])


def switch_drifts(
    firsts: Sequence[Reading], laters: Sequence[Reading], pairs: Sequence[tuple[Caption, Caption]]
) -> Figures:
    """`drifts` of what goes on across a switch: places where no body's motion or size was changed; no background."""
    found = [drift(first, later) for first, later in zip(firsts, laters, strict=True)]
    stays = [not {"motion", "size"} & {*changed_attributes(*pair)} for pair in pairs]
    figures = _drift_figures(found)
    del figures["background"]
    return figures | {"place_px": _places([one for one, is_same in zip(found, stays, strict=True) if is_same])}


def jumps(displacements_px: Sequence[float]) -> Figures:
    """Displacements at a switch: of bodies that go on, the share of all that is small, and bodies that are lost."""
    return {
        "jump_px": spread([value for value in displacements_px if math.isfinite(value)]),
        "small_jump": share([value <= JUMP_LIMIT_PX for value in displacements_px]),
        "lost": share([math.isinf(value) for value in displacements_px]),
    }


def _drift_figures(found: Sequence[Drift]) -> Figures:
    return {
        "place_px": _places(found),
        "tint": average([one.tint for one in found if one.tint is not None], 0),
        "marker_kept": share([one.marker_kept for one in found if one.marker_kept is not None]),
        "background": average([one.background for one in found], 0),
    }


def _places(found: Sequence[Drift]) -> Figure:
    return spread([one.place_px for one in found if one.place_px is not None])
