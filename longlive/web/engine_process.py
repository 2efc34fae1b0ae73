"""The engine as the server sees it: a process to send messages to, started again whenever it dies.

Methods and callbacks run in the event loop's thread; two threads for each process keep its pipe from blocking it.
"""

import asyncio
import logging
import multiprocessing
import queue
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Literal

from longlive.web.messages import Failed, FromEngine, Ready, ToEngine
from longlive.web.serve_config import ServeConfig

log = logging.getLogger(__name__)

EngineState = Literal["loading", "ready", "restarting"]
_LONGEST_WAIT_S = 30.0


def run_engine(connection: Connection, config: ServeConfig, explicit: frozenset[str]) -> None:
    """The process's main function. Its module is imported here alone: the server does without torch."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which then closes the connection
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("longlive").setLevel(logging.INFO)

    from longlive.web.engine import run

    run(connection, config, explicit)


class EngineProcess:
    """Starts the engine and keeps it running. on_message: what it says; on_state: `state` has changed; on_failed: it
    could not load the models at all, and why."""

    def __init__(
        self,
        config: ServeConfig,
        explicit: frozenset[str],
        on_message: Callable[[FromEngine], None],
        on_state: Callable[[], None],
        on_failed: Callable[[str], None],
    ) -> None:
        self.state: EngineState = "loading"
        self.info: Ready | None = None
        self._arguments = config, explicit
        self._on_message, self._on_state, self._on_failed = on_message, on_state, on_failed
        self._process: SpawnProcess | None = None
        self._outbox: queue.SimpleQueue[ToEngine | None] = queue.SimpleQueue()
        self._wait_s = 0.0
        self._is_stopped = False

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start a process, unless stopped in the meantime. Called in the event loop."""
        if self._is_stopped:
            return
        loop, context = asyncio.get_running_loop(), multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=run_engine, args=(theirs, *self._arguments), name="engine", daemon=True)
        process.start()
        theirs.close()
        self._process, self._outbox = process, queue.SimpleQueue()
        threading.Thread(target=_write, args=(ours, self._outbox), daemon=True).start()
        threading.Thread(target=self._read, args=(loop, ours, process), daemon=True).start()

    def send(self, message: ToEngine) -> None:
        self._outbox.put(message)

    def stop(self) -> None:
        """Kill the process: there is nothing in it to be saved."""
        self._is_stopped = True
        self._outbox.put(None)
        if self._process is not None:
            self._process.kill()
            self._process.join(5)

    def _read(self, loop: asyncio.AbstractEventLoop, connection: Connection, process: SpawnProcess) -> None:
        try:
            while True:
                _call(loop, self._take, connection.recv(), process)
        except (EOFError, OSError):  # the process has ended
            process.join()
            _call(loop, self._ended, process)

    def _take(self, message: FromEngine, process: SpawnProcess) -> None:
        if process is not self._process:
            return
        match message:
            case Ready():
                self.info, self.state, self._wait_s = message, "ready", 0.0
                self._on_state()
            case Failed():
                log.error("the engine cannot load its models: %s", message.message)
                if self.info is None:
                    self._is_stopped = True
                    self._on_failed(message.message)
            case _:
                self._on_message(message)

    def _ended(self, process: SpawnProcess) -> None:
        """The process has died: tell, and start the next, after a while if this one had not even loaded."""
        self._outbox.put(None)
        if self._is_stopped or process is not self._process:
            return
        log.error("the engine has ended with exit code %s; it is started again", process.exitcode)
        if self.info is None:
            self._is_stopped = True
            self._on_failed("the engine ended while it loaded the models")
            return
        self.state = "restarting"
        self._on_state()
        asyncio.get_running_loop().call_later(self._wait_s, self.start)
        self._wait_s = min(2 * self._wait_s + 1, _LONGEST_WAIT_S)


def _write(connection: Connection, outbox: "queue.SimpleQueue[ToEngine | None]") -> None:
    """Send what is put into the outbox, up to None or the end of the process."""
    try:
        while (message := outbox.get()) is not None:
            connection.send(message)
    except OSError:
        return  # the reading thread tells


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *arguments: object) -> None:
    """Have the loop call a function, unless the loop has ended."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *arguments)
