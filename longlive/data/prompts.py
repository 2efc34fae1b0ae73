"""Prompt files: which prompts a video shows, and from which frame on; which prompts training draws from.

`.txt` holds one prompt, and so one video, per line. `.jsonl` holds one JSON object per line:

    {"prompts": ["A red fox …", "The red fox …"], "switch_frame_indices": [120], "seed": 7}

    prompt | prompts       the text, or the texts shown one after the other
    switch_frame_indices   latent frames at which prompts 2, 3, … take over: a list, or a string "40, 80"
    durations              instead: seconds for each prompt, rounded to whole blocks; they set the video's length too
    num_output_frames      length in latent frames
    seed                   noise seed of this video
    start_from             picture or clip to continue; a relative path is relative to the prompt file

Blank lines are skipped, a key that is `null` counts as absent, and lines may differ in length. Training reads only the
prompts of such files. An index of training clips is `.jsonl` too, with one prompt and one file per line.
"""

import difflib
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from longlive.errors import InputError

VIDEO_FRAMES_PER_LATENT = 4  # of every latent frame but the first, which is one video frame

_KEYS = ("prompt", "prompts", "switch_frame_indices", "durations", "num_output_frames", "seed", "start_from")


@dataclass(frozen=True)
class Script:
    """One video to make.

    `switch_frames[i]` is the latent frame at which `prompts[i + 1]` takes over; a switch inside a block happens at
    the next block start. `num_frames` counts latent frames and is a multiple of the block. `seed` and `start_from`
    are None where the file does not give them.
    """

    prompts: tuple[str, ...]
    switch_frames: tuple[int, ...]
    num_frames: int
    seed: int | None
    start_from: str | None


def read_scripts(
    path: str | Path,
    *,
    num_frames: int,
    frames_per_block: int,
    switch_frames: Sequence[int] | None,
    fps: int,
    limit: int | None = None,
) -> list[Script]:
    """Read and check a `.txt` or `.jsonl` prompt file, or only its first `limit` videos.

    `num_frames` (latent) and `switch_frames` are the config's and serve every line that gives none of its own; without
    either the switches are spread evenly over block starts. `fps`, the frame rate of the videos, turns durations into
    frames. Raises `InputError` naming file and line.
    """
    path = Path(path)
    parse = _line_parser(path)
    scripts: list[Script] = []
    for where, text in _read_lines(path)[:limit]:
        with naming(where):
            fields = parse(text)
            prompts = _prompts(fields)
            switches, length = _timing(fields, len(prompts), num_frames, frames_per_block, switch_frames, fps)
            scripts.append(Script(prompts, switches, length, _seed(fields), _start_from(fields, path.parent)))
    return scripts


def make_script(
    prompts: Sequence[str], *, num_frames: int, frames_per_block: int, switch_frames: Sequence[int] | None, fps: int
) -> Script:
    """The script of prompts that are in no file, checked like a line of one. Raises `InputError`."""
    checked = _prompts({"prompts": list(prompts)})
    switches, length = _timing({}, len(checked), num_frames, frames_per_block, switch_frames, fps)
    return Script(checked, switches, length, seed=None, start_from=None)


def read_prompts(path: str | Path) -> list[str]:
    """The prompts to train with: one per line of a `.txt` or `.jsonl` prompt file, of several the first.

    Raises `InputError` naming file and line.
    """
    return [prompts[0] for _, prompts in _read_prompt_lines(Path(path))]


def read_pairs(path: str | Path, switch_path: str | Path | None) -> list[tuple[str, str]]:
    """The pairs (prompt, prompt after the switch) to train with one prompt switch.

    The i-th prompt of `path` goes with the i-th of `switch_path`, read as `read_prompts` does; without `switch_path`
    every line of `path`, a `.jsonl` file, holds two prompts. Raises `InputError` naming file and line.
    """
    if switch_path is None:
        return _read_own_pairs(Path(path))
    prompts, switch_prompts = read_prompts(path), read_prompts(switch_path)
    if len(prompts) != len(switch_prompts):
        raise InputError(
            f"{path} has {_count(len(prompts), 'prompt')} and {switch_path} has {len(switch_prompts)}; "
            "pairs need as many in both"
        )
    return list(zip(prompts, switch_prompts, strict=True))


@dataclass(frozen=True)
class IndexLine:
    """A line of an index: a prompt and the file that belongs to it. `where` names index and line for errors."""

    prompt: str
    file: Path
    where: str


def read_index(path: str | Path, key: str) -> list[IndexLine]:
    """Read a `.jsonl` index of lines `{"prompt": "…", key: "file"}`; a relative file is relative to the index.

    Every file exists. Raises `InputError` naming index and line.
    """
    path = Path(path)
    if path.suffix.lower() != ".jsonl":
        raise InputError(f'{path}: an index ends in .jsonl and holds {{"prompt": "…", "{key}": "…"}} in every line')
    lines = []
    for where, text in _read_lines(path):
        with naming(where):
            fields = _parse_json(text, ("prompt", key))
            for name in ("prompt", key):
                if name not in fields:
                    raise InputError(f"has no '{name}'")
            (prompt,) = _prompts(fields)
            lines.append(IndexLine(prompt, _existing_file(fields, key, "a file", path.parent), where))
    return lines


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Put `where`, such as file and line, before the message of every `InputError`."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _read_own_pairs(path: Path) -> list[tuple[str, str]]:
    if path.suffix.lower() != ".jsonl":
        raise InputError(f"{path}: pairs need a second file, or a .jsonl file with two 'prompts' in every line")
    pairs = []
    for where, prompts in _read_prompt_lines(path):
        if len(prompts) != 2:
            raise InputError(f"{where}: has {_count(len(prompts), 'prompt')}, a pair needs 2")
        pairs.append((prompts[0], prompts[1]))
    return pairs


def _read_prompt_lines(path: Path) -> list[tuple[str, tuple[str, ...]]]:
    """Every line's place and prompts."""
    parse = _line_parser(path)
    lines = []
    for where, text in _read_lines(path):
        with naming(where):
            lines.append((where, _prompts(parse(text))))
    return lines


def _line_parser(path: Path) -> Callable[[str], dict[str, Any]]:
    parse = {".txt": _parse_text, ".jsonl": _parse_json}.get(path.suffix.lower())
    if parse is None:
        raise InputError(f"{path}: prompt files end in .txt (one prompt per line) or .jsonl (one JSON object per line)")
    return parse


def _read_lines(path: Path) -> list[tuple[str, str]]:
    """The place ("file, line n") and the text of every line that is not blank, at least one."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{path}, line {line}: not UTF-8 text (byte 0x{data[error.start]:02x})") from None
    # Not str.splitlines, which also breaks at U+2028, form feeds and others that may stand inside a prompt.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    found = [(f"{path}, line {number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise InputError(f"{path}: holds no prompt")
    return found


def _parse_text(text: str) -> dict[str, Any]:
    return {"prompt": text}


def _parse_json(text: str, keys: Sequence[str] = _KEYS) -> dict[str, Any]:
    """Parse one JSON object of known keys; keys that are null are dropped."""
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"malformed JSON at column {error.colno} ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise InputError(f"malformed JSON ({error})") from None
    if not isinstance(fields, dict):
        raise InputError(f'needs a JSON object such as {{"{keys[0]}": "…"}}, found {_shown(fields)}')
    for key in fields:
        if key not in keys:
            nearest = difflib.get_close_matches(key, keys, n=1, cutoff=0)[0]
            raise InputError(f"unknown key {_shown(key)}, nearest is {nearest!r}")
    return {key: value for key, value in fields.items() if value is not None}


def _prompts(fields: dict[str, Any]) -> tuple[str, ...]:
    if "prompt" in fields and "prompts" in fields:
        raise InputError("gives both 'prompt' and 'prompts', needs one of them")
    if "prompt" not in fields and "prompts" not in fields:
        raise InputError("has no 'prompts'")
    prompts = [fields["prompt"]] if "prompt" in fields else fields["prompts"]
    if not isinstance(prompts, list) or not prompts:
        raise InputError(f"'prompts' must be a list of strings, found {_shown(prompts)}")
    for number, prompt in enumerate(prompts, start=1):
        if not isinstance(prompt, str):
            raise InputError(f"prompt {number} must be a string, found {_shown(prompt)}")
        if not prompt.strip():
            raise InputError(f"prompt {number} is empty")
        if any("\ud800" <= character <= "\udfff" for character in prompt):  # JSON can spell them, UTF-8 cannot
            raise InputError(f"prompt {number} holds a lone surrogate, which is not a character")
    return tuple(prompt.strip() for prompt in prompts)


def _timing(
    fields: dict[str, Any],
    num_prompts: int,
    num_frames: int,
    block: int,
    config_switches: Sequence[int] | None,
    fps: int,
) -> tuple[tuple[int, ...], int]:
    """Switch frames and length of a line, both in latent frames."""
    if "durations" in fields:
        for other in ("switch_frame_indices", "num_output_frames"):
            if other in fields:
                raise InputError(f"gives both 'durations' and '{other}', needs one of them")
        *starts, num_frames = _frames_of_durations(fields["durations"], num_prompts, block, fps)
        return tuple(starts), num_frames

    num_frames = _integer("'num_output_frames'", fields.get("num_output_frames", num_frames))
    if num_frames < 1 or num_frames % block:
        raise InputError(f"num_output_frames {num_frames} is not a positive multiple of the {block} frames of a block")
    if "switch_frame_indices" in fields:
        switches = _switch_list(fields["switch_frame_indices"])
    elif config_switches is not None:
        switches = tuple(config_switches)
    else:
        switches = _even_switches(num_prompts, num_frames, block)
    if len(switches) != num_prompts - 1:
        source = "gives" if "switch_frame_indices" in fields else "the config gives"
        raise InputError(
            f"has {_count(num_prompts, 'prompt')} and needs {_count(num_prompts - 1, 'switch frame')}, "
            f"{source} {len(switches)}"
        )
    _check_switches(switches, num_frames, block)
    return switches, num_frames


def _frames_of_durations(durations: Any, num_prompts: int, block: int, fps: int) -> list[int]:
    """End of every prompt in latent frames, each rounded to a whole block and at least one block after the last.

    L latent frames are 1 + 4 (L - 1) video frames. Ends are rounded, not durations, so that errors do not add up.
    """
    if not isinstance(durations, list) or len(durations) != num_prompts:
        raise InputError(
            f"'durations' must list seconds for {_count(num_prompts, 'prompt')}, found {_shown(durations)}"
        )
    ends, end, elapsed = [], 0, Fraction(0)
    for seconds in durations:
        number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if not number or not 0 < seconds < math.inf:
            raise InputError(f"'durations' must be positive numbers of seconds, found {_shown(seconds)}")
        elapsed += Fraction(seconds)
        latents = (elapsed * fps - 1) / VIDEO_FRAMES_PER_LATENT + 1
        end = max(block * round(latents / block), end + block)
        ends.append(end)
    return ends


def _switch_list(value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        parts: list[Any] = [part.strip() for part in value.split(",")] if value.strip() else []
        value = [int(part) if re.fullmatch(r"\d{1,9}", part) else part for part in parts]
    if not isinstance(value, list):
        raise InputError(f"'switch_frame_indices' must be a list such as [40, 80] or \"40, 80\", found {_shown(value)}")
    return tuple(_integer("a switch frame", frame) for frame in value)


def _even_switches(num_prompts: int, num_frames: int, block: int) -> tuple[int, ...]:
    num_blocks = num_frames // block
    if num_prompts > num_blocks:
        raise InputError(f"has {num_prompts} prompts, but {num_frames} frames are only {_count(num_blocks, 'block')}")
    return tuple(block * round(Fraction(i * num_blocks, num_prompts)) for i in range(1, num_prompts))


def _check_switches(switches: tuple[int, ...], num_frames: int, block: int) -> None:
    previous = 0
    for frame in switches:
        if not 1 <= frame <= num_frames - 1:
            raise InputError(f"switch frame {frame} is outside the video, accepted are 1 to {num_frames - 1}")
        if frame <= previous:
            raise InputError(f"switch frames must increase, found {frame} after {previous}")
        previous = frame
    # A prompt needs a block of its own: two switches that reach the same block start would skip the one between.
    starts = [0, *(math.ceil(frame / block) * block for frame in switches), num_frames]
    for number, (start, end) in enumerate(itertools.pairwise(starts), start=1):
        if start == end:
            raise InputError(f"prompt {number} would never be shown: no block of {block} frames begins during it")


def _seed(fields: dict[str, Any]) -> int | None:
    if "seed" not in fields:
        return None
    seed = _integer("'seed'", fields["seed"])
    if not 0 <= seed < 2**63:
        raise InputError(f"'seed' must be from 0 to 2^63 - 1, found {seed}")
    return seed


def _start_from(fields: dict[str, Any], folder: Path) -> str | None:
    if "start_from" not in fields:
        return None
    return str(_existing_file(fields, "start_from", "a picture or clip", folder))


def _existing_file(fields: dict[str, Any], key: str, what: str, folder: Path) -> Path:
    if not isinstance(fields[key], str):
        raise InputError(f"'{key}' must be the path of {what}, found {_shown(fields[key])}")
    path = folder / fields[key]
    if not path.is_file():
        raise InputError(f"'{key}' is not a file: {path}")
    return path


def _integer(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{name} must be a whole number, found {_shown(value)}")
    return value


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _shown(value: Any) -> str:
    """Show `value` on one short line."""
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
