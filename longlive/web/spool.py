"""What sessions have made lies on disk, so that a server takes as much memory after an hour as after a minute."""

import os
import tempfile
import weakref
from collections import deque
from collections.abc import Sequence
from itertools import accumulate


class Spool:
    """A file without a name: gone with its last reader, or with the process, however that ends.

    It lies where `tempfile` puts files (TMPDIR). What is not referred to any more makes room for what comes.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  open for as long as something in it is referred to
        self._end = 0
        self._free: list[tuple[int, int]] = []  # offset, size
        self._returned: deque[tuple[int, int]] = deque()  # the same, from any thread

    def keep(self, parts: Sequence[bytes]) -> "Kept":
        """Write these bytes. Raises OSError where the disk is full."""
        data = b"".join(parts)
        offset = self._take(len(data))
        written = 0
        while written < len(data):
            written += os.pwrite(self._file.fileno(), data[written:], offset + written)
        kept = Kept(self, offset, tuple(accumulate(map(len, parts), initial=0)))
        weakref.finalize(kept, self._returned.append, (offset, len(data))).atexit = False
        return kept

    def read(self, offset: int, size: int) -> bytes:
        """From any thread."""
        return os.pread(self._file.fileno(), size, offset)

    def _take(self, size: int) -> int:
        """The offset of `size` bytes that are free: the first such hole, or the end."""
        while self._returned:
            self._free.append(self._returned.popleft())
        self._free = _merged(self._free)
        for index, (offset, room) in enumerate(self._free):
            if room >= size:
                self._free[index] = (offset + size, room - size)
                return offset
        self._end += size
        return self._end - size


class Kept:
    """Parts of a spool, side by side. bounds: where each begins, from `offset`, and the end of the last."""

    __slots__ = ("__weakref__", "_bounds", "_offset", "_spool")

    def __init__(self, spool: Spool, offset: int, bounds: tuple[int, ...]) -> None:
        self._spool, self._offset, self._bounds = spool, offset, bounds

    @property
    def num_bytes(self) -> int:
        return self._bounds[-1]

    def part(self, index: int) -> bytes:
        """The bytes of one part, counted as in a list; from any thread."""
        begin, end = self._bounds[:-1][index], self._bounds[1:][index]
        return self._spool.read(self._offset + begin, end - begin)


def _merged(holes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Holes (offset, size) in order, those side by side as one, without empty ones."""
    merged: list[tuple[int, int]] = []
    for offset, size in sorted(hole for hole in holes if hole[1]):
        if merged and sum(merged[-1]) == offset:
            merged[-1] = (merged[-1][0], merged[-1][1] + size)
        else:
            merged.append((offset, size))
    return merged
