"""The engine: the process that owns models and caches and makes the blocks of all sessions, each in its turn.

It keeps nothing that the server could not send again, so it may die at any time. One thread computes; a second brings
finished blocks to the host and encodes them, so that a GPU is never kept waiting; a third listens.
"""

import os
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longlive.build import choose_device, choose_model, load_models, make_session_config
from longlive.builtin import BUILTIN
from longlive.config import ROOT, InferenceConfig, config_keys, to_dict
from longlive.data.clips import from_uint8
from longlive.data.shapes.captions import understand
from longlive.errors import OUT_OF_MEMORY, InputError, is_out_of_memory
from longlive.inference.pipeline import download
from longlive.inference.session import Chunk, Models, Past, Session, SessionConfig
from longlive.web.messages import (
    Broken,
    Drop,
    Failed,
    FromEngine,
    Grant,
    Latents,
    Made,
    Notice,
    Picture,
    Ready,
    Rebuilt,
    SetPrompt,
    Start,
    ToEngine,
)
from longlive.web.serve_config import UNUSED, ServeConfig
from longlive.web.stream import Mp4Stream, thumbnail, webp

Send = Callable[[FromEngine], None]


def run(connection: Connection, config: ServeConfig, explicit: frozenset[str]) -> None:
    """The process: load the models, then serve until the other end of the connection is closed."""
    sending = threading.Lock()

    def send(message: FromEngine) -> None:
        with sending:
            connection.send(message)

    try:
        # The sizes of the built-in model are those of a configuration of inference.
        chosen = choose_model(config, explicit)
        models = load_models(chosen, choose_device(chosen.device))
        if chosen.compile:
            warm_up(models, make_session_config(chosen))
        engine = Engine(models, chosen, send)
        mime = Mp4Stream(chosen.fps, chosen.height, chosen.width, chosen.crf).mime
    except (InputError, RuntimeError) as error:
        send(Failed(in_words(error, OUT_OF_MEMORY)))
        return
    block, factor = chosen.num_frame_per_block, models.vae.config.temporal_factor
    size = chosen.model_name, chosen.height, chosen.width, chosen.fps
    send(Ready(*size, block, factor, mime, picture_settings(chosen)))
    engine.serve(connection)


def in_words(error: InputError | RuntimeError, out_of_memory: str) -> str:
    """What to tell people of an error; raises it where it is a bug."""
    if isinstance(error, InputError):
        return str(error)
    if not is_out_of_memory(error):
        raise error
    return out_of_memory


def warm_up(models: Models, config: SessionConfig) -> None:
    """Have compiled what sessions run before a viewer waits for it: blocks and switches until the window is full."""
    session = Session(models, config, [0])
    for number in range(max(config.cache.window_frames, 0) // config.sampler.frames_per_block + 2):
        session.set_prompt(str(number))
        session.next_chunk()
    session.close()


def picture_settings(config: InferenceConfig) -> dict[str, Any]:
    """The settings that determine the picture, for another run of inference.

    Weights are told where they lie in the repository, as in its own configurations, and by their names alone where they
    lie elsewhere: where they are on this machine is nobody's business, and without them a run says what it lacks.
    """
    left_out = UNUSED | {"device", "compile", "low_memory", "attention"}
    values = to_dict(config)
    for name, key in config_keys(InferenceConfig).items():
        if key.path and values[name] is not None:
            path = Path(os.path.normpath(values[name]))
            values[name] = str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name)
    return {item.name: values[item.name] for item in fields(InferenceConfig) if item.name not in left_out}


class Live:
    """One session in the engine."""

    def __init__(self, models: Models, config: SessionConfig, stream: Mp4Stream, start: Start) -> None:
        self.start = start
        self.stream = stream
        self.session = Session(models, config, [start.seed])
        self.granted_frames = 0
        past = [Past((prompt,), to_tensor(latents)) for prompt, latents in start.past]
        self.rebuilding: Iterator[None] | None = self.session.resume(past) if past else iter(())
        self.prompt = start.prompt

    @property
    def wants_turn(self) -> bool:
        return self.rebuilding is not None or self.session.num_frames < self.granted_frames

    def next_block(self) -> list[Chunk]:
        """The next block; before the first one the picture that it begins with."""
        self.session.set_prompt(self.prompt)
        chunks = []
        if self.session.num_frames == 0 and self.start.picture is not None:
            chunks.append(self.session.start_from(to_pixels(self.start.picture)))
        return [*chunks, self.session.next_chunk()]


class Engine:
    """All sessions; `take` messages, `turn` by turn make their blocks."""

    def __init__(self, models: Models, config: InferenceConfig, send: Send) -> None:
        self._models, self._config, self._send = models, config, send
        self._session_config = make_session_config(config)
        self._sessions: dict[str, Live] = {}  # the next in turn first
        self._inbox: queue.SimpleQueue[ToEngine | Future[None] | None] = queue.SimpleQueue()
        self._encoder = ThreadPoolExecutor(max_workers=1)

    def serve(self, connection: Connection) -> None:
        """Work until the other end of the connection is closed."""
        threading.Thread(target=self._listen, args=(connection,), daemon=True).start()
        while True:
            while not self._inbox.empty() or not any(live.wants_turn for live in self._sessions.values()):
                message = self._inbox.get()
                if message is None:
                    return
                if isinstance(message, Future):
                    message.result()  # raises: encoding has failed
                else:
                    self.take(message)
            self.turn()

    def take(self, message: ToEngine) -> None:
        """Obey at once, or remember for the session's next turn."""
        live = self._sessions.get(message.session)
        match message:
            case Start():
                self._drop(message.session)
                config = self._config
                stream = Mp4Stream(config.fps, config.height, config.width, config.crf)
                try:
                    live = Live(self._models, self._session_config, stream, message)
                except (InputError, RuntimeError) as error:
                    self._break(message.session, message.epoch, error)
                else:
                    self._sessions[message.session] = live
                    self._check_prompt(message.session, message.epoch, message.prompt)
            case SetPrompt() if live is not None and live.start.epoch == message.epoch:
                live.prompt = message.text
                self._check_prompt(message.session, message.epoch, message.text)
            case Grant() if live is not None and live.start.epoch == message.epoch:
                live.granted_frames = message.num_frames
            case Drop():
                self._drop(message.session)

    def turn(self) -> None:
        """One pass or block of the session whose turn it is."""
        name = next(name for name, live in self._sessions.items() if live.wants_turn)
        live = self._sessions[name] = self._sessions.pop(name)  # now the last in turn
        epoch = live.start.epoch
        try:
            if live.rebuilding is not None:
                if next(live.rebuilding, "end") == "end":
                    live.rebuilding = None
                    self._send(Rebuilt(name, epoch, live.stream.init))
            else:
                prompt, frame = live.prompt, live.session.num_frames
                first_video_frame = self._models.vae.config.num_video_frames(frame)
                self._deliver(live, prompt, first_video_frame, live.next_block())
        except (InputError, RuntimeError) as error:
            self._break(name, epoch, error)

    def _break(self, name: str, epoch: int, error: InputError | RuntimeError) -> None:
        """End a session that cannot go on; what is no fault of its own, nor of too little memory, ends the engine."""
        message = in_words(error, "out of memory")
        self._drop(name)
        self._send(Broken(name, epoch, message))

    def _deliver(self, live: Live, prompt: str, first_video_frame: int, chunks: list[Chunk]) -> None:
        """Encode and send a block, behind the back of the thread that computes."""
        dtype = self._models.generator.patch_embedding.weight.dtype
        latents = [download(chunk.latents.to(dtype)) for chunk in chunks]
        pixels = [download(chunk.pixels[0]) for chunk in chunks]

        def encode() -> None:
            frames = torch.cat([arrived() for arrived in pixels]).numpy()
            self._send(
                Made(
                    live.start.session,
                    live.start.epoch,
                    prompt,
                    chunks=tuple(to_latents(arrived()) for arrived in latents),
                    fragment=live.stream.fragment(frames, first_video_frame),
                    thumbnail=thumbnail(frames[0]),
                    pictures=tuple(map(webp, frames)) if live.start.as_pictures else (),
                )
            )

        self._encoder.submit(encode).add_done_callback(self._report_failure)

    def _report_failure(self, done: "Future[None]") -> None:
        if done.exception() is not None:
            self._inbox.put(done)

    def _check_prompt(self, session: str, epoch: int, text: str) -> None:
        """Tell the viewer what the built-in model does not know."""
        if self._config.model_name == BUILTIN and (problems := understand(text)[1]):
            self._send(Notice(session, epoch, f"This small model does not know this prompt: {'; '.join(problems)}"))

    def _drop(self, name: str) -> None:
        live = self._sessions.pop(name, None)
        if live is not None:
            live.session.close()

    def _listen(self, connection: Connection) -> None:
        try:
            while True:
                self._inbox.put(connection.recv())
        except (EOFError, OSError):  # the server is gone
            self._inbox.put(None)
            last_resort = threading.Timer(5, os._exit, (1,))  # in case the other threads hang
            last_resort.daemon = True
            last_resort.start()


def to_latents(tensor: Tensor) -> Latents:
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return Latents(data, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def to_tensor(latents: Latents) -> Tensor:
    flat = torch.frombuffer(bytearray(latents.data), dtype=getattr(torch, latents.dtype))
    return flat.view(latents.shape)


def to_pixels(picture: Picture) -> Tensor:
    """[1, 1, 3, height, width] in [-1, 1], as `load_clip` gives it."""
    pixels = np.frombuffer(picture.data, np.uint8).reshape(picture.height, picture.width, 3).copy()
    return from_uint8(torch.from_numpy(pixels))[None, None]
