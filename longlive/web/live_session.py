"""One session on the server's side: what it has made, what it is doing, and how far ahead of its viewer it may go.

It keeps the branches; the engine only keeps the caches of the selected one, and only while the session has a place.
"""

import secrets
import time
from typing import Any, Literal, Protocol

from longlive.web.course import Block, Branch
from longlive.web.messages import Broken, Drop, Grant, Made, Notice, Picture, Ready, Rebuilt, SetPrompt, Start, ToEngine
from longlive.web.protocol import FRAGMENT, INIT, PICTURE, Message, ProtocolError, media
from longlive.web.serve_config import ServeConfig
from longlive.web.spool import Spool
from longlive.web.viewer import CLOSE_ENDED, Viewer

Place = Literal["none", "queued", "active"]
_MAX_CRASHES = 3  # of the engine, one after the other without a block of this session
_MAX_UNDER_WAY = 2  # blocks granted and not made: one that is computed, one that is encoded or waits
_WAKING = ("prompt", "resume", "rewind", "restart", "select")


class Surroundings(Protocol):
    """What a session asks of those around it."""

    config: ServeConfig

    @property
    def info(self) -> Ready: ...

    @property
    def engine_state(self) -> str: ...

    def send(self, message: ToEngine) -> None: ...

    def request_place(self, session: "LiveSession") -> None: ...

    def queue_position(self, session: "LiveSession") -> int: ...

    def picture(self, key: str) -> Picture: ...

    def end(self, session: "LiveSession", close_code: int) -> None: ...


class LiveSession:
    """A state machine without threads: the hall and the viewer's messages drive it."""

    def __init__(self, hall: Surroundings, format: str, seed: int, prompt: str | None, picture: Picture | None) -> None:
        self.key = secrets.token_urlsafe(18)
        self.format = format
        self.place: Place = "none"
        self.viewer: Viewer | None = None
        self.last_active = self.last_seen = time.monotonic()
        self._hall = hall
        self._branches = {0: Branch(0, None, 0, seed, prompt, picture)}
        self._selected = 0
        self._num_branches = 1  # ever made
        self._spool = Spool()
        self.num_bytes = 0  # of all blocks
        self._epoch = 0
        self._is_paused = self._is_started = self._is_rebuilding = self._is_ended = False
        self._granted_frames = self._played = 0
        self._last_time = self._block_s = 0.0  # when the engine last turned to this session; how long a block takes
        self._num_crashes = 0
        self._prompt_time: float | None = None
        self._told: dict[str, Any] = {}

    @property
    def branch(self) -> Branch:
        """The selected one."""
        return self._branches[self._selected]

    def find_branch(self, number: int) -> Branch:
        """Raises ProtocolError."""
        if number not in self._branches:
            raise ProtocolError("no_branch", f"branch {number}: this session has {', '.join(map(str, self._branches))}")
        return self._branches[number]

    @property
    def state(self) -> str:
        if self._is_ended:
            return "ended"
        if self._hall.engine_state != "ready":
            return self._hall.engine_state
        if self.place != "active":
            return "queued" if self.place == "queued" else "parked"
        if self._is_full():
            return "full"
        if self._is_paused:
            return "paused"
        if self.branch.prompt is None:
            return "ready"
        return "rebuilding" if self._is_rebuilding else "playing"

    # What the hall does with it

    def attach(self, viewer: Viewer) -> None:
        """Begin to serve a viewer."""
        self.viewer, self._told = viewer, {}
        self.last_active = time.monotonic()
        viewer.send({"type": "session", "session": self.key, "format": self.format})
        self._send_branches()
        if self.place == "none":
            self._hall.request_place(self)
        else:
            self.begin()
        self.announce()

    def detach(self) -> None:
        """The viewer has gone; nothing more is made."""
        self.viewer = None
        self.last_seen = time.monotonic()

    def begin(self) -> None:
        """Have the engine take up the selected branch where it ends, in a new epoch, if all is there that it takes."""
        branch = self.branch
        self._is_started = self._is_rebuilding = False
        if self.place != "active" or self._hall.engine_state != "ready" or branch.prompt is None or self._is_full():
            self.announce()
            return
        self._epoch += 1
        self._is_started = self._is_rebuilding = True
        self.last_active = time.monotonic()
        self._granted_frames, self._played = branch.num_frames, branch.num_video_frames
        if self.viewer is not None:
            self.viewer.drop_media()
        picture, as_pictures = None if branch.blocks else branch.picture, self.format == "webp"
        self._send(Start(self.key, self._epoch, branch.seed, branch.past(), branch.prompt, picture, as_pictures))
        self.announce()

    def idle_s(self, now: float) -> float:
        """How long it has had a place without any use: nobody watches, a pause, a viewer that stands still."""
        is_making = self._is_rebuilding or (self._is_started and self._granted_frames > self.branch.num_frames)
        is_busy = self.place != "active" or is_making or self._hall.engine_state != "ready"
        return 0.0 if is_busy else now - self.last_active

    def park(self) -> None:
        """Give up caches and place, keep latents."""
        self._send(Drop(self.key))
        self.place = "none"
        self._is_started = self._is_rebuilding = False
        self._epoch += 1  # what is still on its way from the engine is stale
        self.announce()

    def close(self, close_code: int) -> None:
        """The session is forgotten."""
        self._send(Drop(self.key))
        self.place, self._is_ended = "none", True
        self.announce()
        if self.viewer is not None:
            self.viewer.close(close_code)

    def engine_died(self) -> None:
        """Whatever was on its way is lost."""
        self._is_started = self._is_rebuilding = False
        self._epoch += 1
        self._num_crashes += self.place == "active"
        self.announce()

    @property
    def keeps_crashing(self) -> bool:
        return self._num_crashes >= _MAX_CRASHES

    def announce(self) -> None:
        """Tell the viewer the state, where it has changed."""
        told: dict[str, Any] = {"type": "state", "state": self.state}
        if self.state == "queued":
            told["position"] = self._hall.queue_position(self)
        if self.viewer is not None and told != self._told:
            self.viewer.send(told)
            self._told = told

    # What the engine says

    def take(self, message: Rebuilt | Made | Notice | Broken) -> None:
        if message.epoch != self._epoch or not self._is_started:
            return
        self.last_active = time.monotonic()
        match message:
            case Rebuilt():
                self._rebuilt(message)
            case Made():
                self._made(message)
            case Notice():
                self._tell({"type": "notice", "message": message.message})
            case Broken():
                self._tell(ProtocolError("engine", message.message).describe())
                self._hall.end(self, CLOSE_ENDED)

    def _rebuilt(self, message: Rebuilt) -> None:
        info, branch = self._hall.info, self.branch
        self._is_rebuilding = False
        self._last_time = time.monotonic()
        branch.init = message.init
        told = {"type": "stream", "epoch": self._epoch, "branch": branch.number, "frame": branch.num_frames}
        told |= {"video_frame": branch.num_video_frames, "format": self.format, "mime": info.mime, "fps": info.fps}
        self._tell(told)
        if self.viewer is not None and self.format == "mp4":
            self.viewer.send_media(media(INIT, self._epoch, branch.num_video_frames, 0, message.init))
        self.announce()
        self._grant()

    def _made(self, message: Made) -> None:
        branch, now = self.branch, time.monotonic()
        self._num_crashes = 0
        seconds = now - self._last_time
        self._block_s, self._last_time = 0.5 * (self._block_s + seconds) if self._block_s else seconds, now
        try:
            block = self._block(message)
        except OSError as error:
            self._tell(ProtocolError("engine", f"what is made cannot be kept: {error.strerror}").describe())
            self._hall.end(self, CLOSE_ENDED)
            return
        is_switch = not branch.blocks or branch.blocks[-1].prompt != block.prompt
        branch.blocks.append(block)
        self.num_bytes += block.num_bytes
        if is_switch:
            self._tell_switch(block, now)
        self._tell_block(block, seconds)
        self._send_media(block, message)
        self.announce()  # it may be full now
        self._grant()

    def _block(self, message: Made) -> Block:
        """What was made, kept. Raises OSError where the disk is full."""
        info, frame = self._hall.info, self.branch.num_frames
        num_frames = sum(chunk.num_frames for chunk in message.chunks)
        first, end = info.num_video_frames(frame), info.num_video_frames(frame + num_frames)
        parts = *(chunk.data for chunk in message.chunks), message.fragment, message.thumbnail
        shapes, dtype = tuple(chunk.shape for chunk in message.chunks), message.chunks[0].dtype
        return Block(frame, num_frames, first, end - first, message.prompt, shapes, dtype, self._spool.keep(parts))

    def _tell_switch(self, block: Block, now: float) -> None:
        told: dict[str, Any] = {"type": "switch", "branch": self._selected, "frame": block.frame}
        told |= {"video_frame": block.video_frame, "text": block.prompt}
        if self._prompt_time is not None and block.prompt == self.branch.prompt:
            told["seconds"] = round(now - self._prompt_time, 3)
            self._prompt_time = None
        self._tell(told)

    def _tell_block(self, block: Block, seconds: float) -> None:
        told = {"type": "block", "epoch": self._epoch, "branch": self._selected, "seconds": round(seconds, 3)}
        names = ("frame", "num_frames", "video_frame", "num_video_frames")
        self._tell(told | {name: getattr(block, name) for name in names})

    def _send_media(self, block: Block, message: Made) -> None:
        if self.viewer is None:
            return
        if self.format == "mp4":
            place = block.video_frame, block.num_video_frames
            self.viewer.send_media(media(FRAGMENT, self._epoch, *place, message.fragment))
        for number, picture in enumerate(message.pictures, start=block.video_frame):
            self.viewer.send_media(media(PICTURE, self._epoch, number, 1, picture))

    def _grant(self) -> None:
        """Let the engine make further blocks, up to `_MAX_UNDER_WAY`, if they would not be too far ahead of the viewer.

        A block takes `_block_s`, those under way come first, and meanwhile the viewer goes on: where blocks take longer
        than they last, the viewer gains on them, and only the number of those under way is a bound.
        """
        if not self._is_started or self._is_rebuilding or self.viewer is None or self.state != "playing":
            return
        info, block = self._hall.info, self._hall.info.frames_per_block
        made = max(self.branch.num_frames, self._first_frames())
        num_under_way = max(0, self._granted_frames - made) // block
        for number in range(num_under_way + 1, _MAX_UNDER_WAY + 1):
            wanted = made + number * block
            ahead_s = (info.num_video_frames(wanted) - self._played) / info.fps - number * self._block_s
            is_needed = number == 1 and self.branch.num_video_frames <= self._played  # the viewer has nothing left
            if ahead_s > self._hall.config.ahead_s and not is_needed:
                return
            if number == 1:
                self._last_time = time.monotonic()
            self._granted_frames = wanted
            self._send(Grant(self.key, self._epoch, wanted))

    def _first_frames(self) -> int:
        """The frame of a picture that the branch begins with, before the first block."""
        return 0 if self.branch.picture is None else 1

    def _is_full(self) -> bool:
        config, branch = self._hall.config, self.branch
        is_long = branch.num_video_frames >= config.max_video_s * self._hall.info.fps
        return is_long or self.num_bytes >= config.max_session_mb * 1e6

    # What the viewer says

    def obey(self, message: Message) -> None:
        """Raises ProtocolError; the message has then changed nothing, except that it may have woken the session."""
        fields = message.fields
        if message.type in _WAKING and self.place == "none":
            self._hall.request_place(self)
        match message.type:
            case "played":
                self._report_played(fields["epoch"], fields["video_frame"])
            case "prompt":
                self._set_prompt(fields["text"])
            case "pause":
                self._is_paused = True
            case "resume":
                self._is_paused = False
            case "rewind":
                self._rewind(fields["branch"], fields["frame"], fields.get("prompt"))
            case "restart":
                self._restart(dict(fields))
            case "select":
                self._select(self.find_branch(fields["branch"]))
            case "delete":
                self._delete(self.find_branch(fields["branch"]))
        if message.type != "played":
            self.last_active = time.monotonic()
        self.announce()
        self._grant()

    def _report_played(self, epoch: int, video_frame: int) -> None:
        if epoch == self._epoch:
            self._played = max(self._played, min(video_frame, self.branch.num_video_frames))

    def _set_prompt(self, text: str) -> None:
        self.branch.prompt = text
        self._prompt_time = time.monotonic()
        if self._is_started:
            self._send(SetPrompt(self.key, self._epoch, text))
        else:
            self.begin()

    def _rewind(self, number: int, frame: int, prompt: str | None) -> None:
        branch = self.find_branch(number)
        if frame > branch.num_frames:
            raise ProtocolError("bad_value", f"frame {frame}: branch {number} has {branch.num_frames} frames")
        self._add(branch.fork(self._new_number(), frame, prompt))

    def _restart(self, fields: dict[str, Any]) -> None:
        old = self.branch
        picture = old.picture
        if "upload" in fields:
            picture = None if fields["upload"] is None else self._hall.picture(fields["upload"])
        seed, prompt = fields.get("seed", old.seed), fields.get("prompt", old.first_prompt)
        self._add(Branch(self._new_number(), None, 0, seed, prompt, picture))

    def _new_number(self) -> int:
        limit = self._hall.config.max_branches
        if len(self._branches) >= limit:
            raise ProtocolError("limit", f"a session may have {limit} branches: delete one")
        return self._num_branches

    def _add(self, branch: Branch) -> None:
        self._num_branches += 1
        self._branches[branch.number] = branch
        self._select(branch)

    def _select(self, branch: Branch) -> None:
        self._selected = branch.number
        self._is_paused = False
        self._prompt_time = time.monotonic()
        self._send_branches()
        self.begin()

    def _delete(self, branch: Branch) -> None:
        if branch.number == self._selected:
            raise ProtocolError("bad_value", f"branch {branch.number}: select another one first")
        del self._branches[branch.number]
        blocks = {id(block): block for branch in self._branches.values() for block in branch.blocks}
        self.num_bytes = sum(block.num_bytes for block in blocks.values())
        self._send_branches()
        if not self._is_started:  # it may have been full
            self.begin()

    def _send_branches(self) -> None:
        branches = [branch.describe() for branch in self._branches.values()]
        self._tell({"type": "branches", "selected": self._selected, "branches": branches})

    def _tell(self, message: dict[str, Any]) -> None:
        if self.viewer is not None:
            self.viewer.send(message)

    def _send(self, message: ToEngine) -> None:
        if self._hall.engine_state == "ready":
            self._hall.send(message)
