"""Captions of the Shapes world in words, and back: a small grammar with several wordings."""

import difflib
import logging
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from longlive.data.shapes.world import BACKGROUNDS, COLOURS, SHAPES, Caption, Look, Scene, faults

logger = logging.getLogger(__name__)

_Wordings = dict[str, tuple[str, ...]]

_SIZES: _Wordings = {"small": ("small", "little"), "big": ("big", "large")}
_MOTIONS: _Wordings = {
    "left": ("moves left", "drifts to the left", "glides left"),
    "right": ("moves right", "drifts to the right", "glides right"),
    "up": ("moves up", "rises", "floats upwards"),
    "down": ("moves down", "sinks", "drifts downwards"),
    "orbit": ("orbits", "runs in loops"),
    "sway": ("sways", "swings from side to side"),
    "bounce": ("bounces", "hops", "jumps up and down"),
    "zigzag": ("zigzags", "moves in a zigzag"),
    "still": ("stands still", "rests", "stays in place"),
}
_BACKGROUNDS: _Wordings = {
    "black": ("black",),
    "grey": ("grey", "gray"),
    "white": ("white",),
    "sand": ("sand", "sandy"),
}
_SENTENCES = (
    "{what} on a {background} background",
    "on a {background} background, {what}",
    "{what} in front of a {background} background",
    "{what}, the background is {background}",
    "{background} background: {what}",
)
_LINKS = (" and ", " while ", ", ")
_FILLER_TEXT = "a an the on of in front background is are and while with against there that which it its over before"
_FILLERS = frozenset(_FILLER_TEXT.split())
_WORDINGS: dict[str, _Wordings] = {  # of every slot and value
    "colour": {name: (name,) for name in COLOURS},
    "shape": {name: (name,) for name in SHAPES},
    "size": _SIZES,
    "motion": _MOTIONS,
    "background": _BACKGROUNDS,
}
_PHRASES = {  # words to slot and value
    tuple(phrase.split()): (slot, value)
    for slot, values in _WORDINGS.items()
    for value, wordings in values.items()
    for phrase in wordings
}
_LONGEST_PHRASE = max(map(len, _PHRASES))
_SLOTS = ("colour", "shape", "size", "motion")


_VOCABULARY = {word: number for number, word in enumerate(sorted(_FILLERS.union(*_PHRASES)), 3)}
_EOS, _UNKNOWN = 1, 2  # as UMT5 numbers them; 0 is padding


def word_tokens(text: str) -> list[int]:
    """Tokens of a text, one for each word, then EOS: what a text encoder of this world is given."""
    return [_VOCABULARY.get(word, _UNKNOWN) for word in _words(text)] + [_EOS]


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def prompt_of(scene: Scene) -> str:
    """The scene's caption in the wording of the scene."""
    return worded(scene.caption, scene.wording)


def worded(caption: Caption, wording: int) -> str:
    """The caption as a sentence. `wording` is a seed that chooses among the ways to say it."""
    rng = random.Random(f"wording {wording}")
    parts = [
        f"a {rng.choice(_SIZES[look.size])} {look.colour} {look.shape} {rng.choice(_MOTIONS[look.motion])}"
        for look in caption.looks
    ]
    sentence = rng.choice(_SENTENCES).format(
        what=rng.choice(_LINKS).join(parts), background=rng.choice(_BACKGROUNDS[caption.background])
    )
    return sentence[0].upper() + sentence[1:] + "."


def parse(prompt: str) -> Caption | None:
    """What a prompt says, in any wording of the grammar; None with a warning naming what the world does not know."""
    caption, problems = understand(prompt)
    if problems:
        logger.warning("Shapes does not know this prompt: %s (%s)", "; ".join(problems), prompt)
    return caption


def understand(prompt: str) -> tuple[Caption | None, list[str]]:
    """What a prompt says, or None and what is unknown, missing or impossible about it."""
    reader = _Reader()
    words = _words(prompt)
    unknown: list[str] = []  # words one after the other that are in no phrase
    while words:
        lengths = range(min(_LONGEST_PHRASE, len(words)), 0, -1)
        length = next((length for length in lengths if tuple(words[:length]) in _PHRASES), 0)
        if not length and words[0] not in _FILLERS:
            unknown.append(words[0])
        elif unknown:
            reader.problems.append(_unknown(unknown))
            unknown = []
        if length:
            reader.take(*_PHRASES[tuple(words[:length])])
        words = words[length or 1 :]
    if unknown:
        reader.problems.append(_unknown(unknown))
    return reader.result()


@dataclass
class _Reader:
    """Gathers what the phrases of a prompt say, in their order."""

    backgrounds: list[str] = field(default_factory=list)
    looks: list[dict[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def take(self, slot: str, value: str) -> None:
        if slot == "background":
            self.backgrounds.append(value)
            return
        # A body is told as size, colour, shape and then motion: what it already has begins the next one.
        if not self.looks or slot in self.looks[-1] or (slot != "motion" and "motion" in self.looks[-1]):
            self.looks.append({})
        self.looks[-1][slot] = value

    def result(self) -> tuple[Caption | None, list[str]]:
        if len(set(self.backgrounds)) != 1:
            said = " and ".join(self.backgrounds) or "none"
            self.problems.append(f"one background is needed, {_choices(BACKGROUNDS)}, not {said}")
        for number, look in enumerate(self.looks, 1):
            missing = [slot for slot in _SLOTS if slot not in look]
            if missing:
                self.problems.append(f"shape {number} has no {', no '.join(missing)}")
        if self.problems:
            return None, self.problems
        caption = Caption(self.backgrounds[0], tuple(Look(**look) for look in self.looks))
        problems = faults(caption)
        return (None if problems else caption), problems


def _unknown(words: list[str]) -> str:
    said, known = " ".join(words), sorted(map(" ".join, _PHRASES))
    nearest = difflib.get_close_matches(said, known, n=2, cutoff=0.5)
    return f"'{said}' is unknown" + (f", nearest is {' or '.join(nearest)}" if nearest else "")


def _choices(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}"
