"""What waits to be sent to one viewer: bounded, and without media that has become stale."""

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Any

_MAX_WAITING = 256  # messages; how much media waits is bounded by what the session may make ahead

Item = Mapping[str, Any] | bytes
CLOSE_ENDED, CLOSE_SHUTDOWN, CLOSE_BUSY = 1000, 1012, 1013
CLOSE_REPLACED, CLOSE_SLOW, CLOSE_FORGOTTEN = 4001, 4002, 4003


class Viewer:
    """The outgoing side of a connection: a session puts in, the connection's task takes out with `next`."""

    def __init__(self) -> None:
        self.close_code: int | None = None
        self._waiting: deque[Item] = deque()
        self._changed = asyncio.Event()

    def send(self, message: Mapping[str, Any]) -> None:
        if len(self._waiting) >= _MAX_WAITING:
            self._waiting.clear()
            self.close(CLOSE_SLOW)
        self._put(message)

    def send_media(self, data: bytes) -> None:
        self._put(data)

    def drop_media(self) -> None:
        """What waits belongs to an older epoch."""
        self._waiting = deque(item for item in self._waiting if not isinstance(item, bytes))

    def close(self, code: int) -> None:
        """Close once everything is sent; what comes after this is not."""
        if self.close_code is None:
            self.close_code = code
        self._changed.set()

    @property
    def is_slow(self) -> bool:
        """It does not read: there is no use in waiting until everything is sent."""
        return self.close_code == CLOSE_SLOW

    async def next(self) -> Item | None:
        """The next to be sent; None when the connection is to be closed."""
        while not self._waiting and self.close_code is None:
            self._changed.clear()
            await self._changed.wait()
        return self._waiting.popleft() if self._waiting else None

    def _put(self, item: Item) -> None:
        if self.close_code is None:
            self._waiting.append(item)
            self._changed.set()
