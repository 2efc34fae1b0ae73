"""The messages of viewers, checked (docs/PROTOCOL.md): whatever arrives becomes a `Message` or a `ProtocolError`."""

import json
import struct
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

FORMATS = ("mp4", "webp")
INIT, FRAGMENT, PICTURE = 1, 2, 3
"""Kinds of media, in the header of binary frames."""
_MAX_ID = 2**31 - 1
_MAX_COUNT = 2**31 - 1
_MAX_SEED = 2**63 - 1
_MAX_KEY_CHARS = 64


class ProtocolError(Exception):
    """A message that is refused: `code`, and in `str` one line that says what is accepted."""

    def __init__(self, code: str, message: str, id: int | None = None) -> None:
        super().__init__(" ".join(message.split()))
        self.code = code
        self.id = id

    def describe(self) -> dict[str, Any]:
        told = {"type": "error", "code": self.code, "message": str(self)}
        return told if self.id is None else {**told, "id": self.id}


@dataclass(frozen=True)
class Message:
    """A message that is well formed. fields: those given."""

    type: str
    fields: Mapping[str, Any]
    id: int | None


Check = Callable[[str, Any], Any]


def _count(low: int, high: int) -> Check:
    def check(name: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ProtocolError("bad_value", f"{name}: must be a whole number from {low} to {high}")
        return value

    return check


def _key(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.isascii() or not 0 < len(value) <= _MAX_KEY_CHARS:
        raise ProtocolError("bad_value", f"{name}: must be a text that the server has given")
    return value


def _key_or_none(name: str, value: Any) -> str | None:
    return None if value is None else _key(name, value)


def _prompt(name: str, value: Any) -> str:
    text = " ".join(value.split()) if isinstance(value, str) else ""
    if not text or any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise ProtocolError("bad_value", f"{name}: must be a text without control characters, and not empty")
    return text


def _format(name: str, value: Any) -> str:
    if value not in FORMATS:
        raise ProtocolError("bad_value", f"{name}: must be one of {', '.join(FORMATS)}")
    return str(value)


_FRAME, _SEED = _count(0, _MAX_COUNT), _count(0, _MAX_SEED)
_SCHEMA: dict[str, dict[str, Check]] = {  # a name with ? may be left out
    "open": {"session?": _key, "prompt?": _prompt, "seed?": _SEED, "upload?": _key, "format?": _format},
    "prompt": {"text": _prompt},
    "pause": {},
    "resume": {},
    "played": {"epoch": _FRAME, "video_frame": _FRAME},
    "rewind": {"branch": _FRAME, "frame": _FRAME, "prompt?": _prompt},
    "restart": {"seed?": _SEED, "prompt?": _prompt, "upload?": _key_or_none},
    "select": {"branch": _FRAME},
    "delete": {"branch": _FRAME},
    "end": {},
    "ping": {},
}


def parse(text: str, max_prompt_chars: int) -> Message:
    """The message in a text frame. Raises ProtocolError."""
    try:
        tree = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise ProtocolError("bad_json", "a message must be a JSON object") from None
    if not isinstance(tree, dict):
        raise ProtocolError("bad_message", "a message must be a JSON object")
    id = tree.pop("id", None)
    if id is not None:
        id = _count(0, _MAX_ID)("id", id)
    try:
        kind = tree.pop("type", None)
        if not isinstance(kind, str) or kind not in _SCHEMA:
            raise ProtocolError("bad_message", f"type: must be one of {', '.join(_SCHEMA)}")
        fields = _check_fields(kind, tree)
        if len(fields.get("prompt") or fields.get("text") or "") > max_prompt_chars:
            raise ProtocolError("too_long", f"a prompt may have {max_prompt_chars} characters")
    except ProtocolError as error:
        error.id = id
        raise
    return Message(kind, fields, id)


def _check_fields(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    schema = {name.rstrip("?"): check for name, check in _SCHEMA[kind].items()}
    if any(name not in schema for name in given):
        raise ProtocolError("bad_message", f"{kind}: its fields are {', '.join(schema) or 'none'}")
    missing = [name for name in _SCHEMA[kind] if not name.endswith("?") and name not in given]
    if missing:
        raise ProtocolError("bad_message", f"{kind}: {missing[0]} is missing")
    return {name: schema[name](name, value) for name, value in given.items()}


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)  # NaN and infinities are not JSON


def media(kind: int, epoch: int, video_frame: int, num_video_frames: int, payload: bytes) -> bytes:
    """A binary frame."""
    return struct.pack(">B3xIII", kind, epoch, video_frame, num_video_frames) + payload


class Throttle:
    """A bucket of tokens: `wait_s` says how long to wait before the next message may be read."""

    def __init__(self, per_s: float, now: float) -> None:
        self._per_s, self._burst = per_s, max(1.0, 2 * per_s)
        self._tokens, self._time = self._burst, now

    def wait_s(self, now: float) -> float:
        self._tokens = min(self._burst, self._tokens + (now - self._time) * self._per_s) - 1
        self._time = now
        return max(0.0, -self._tokens / self._per_s)
