"""Everything the serve command can be told: how the models are loaded, as at inference, and what viewers may do."""

import ipaddress
from dataclasses import dataclass

from longlive.config import POSITIVE, InferenceConfig, at_least, between, setting
from longlive.errors import InputError

UNUSED = frozenset(
    {
        *("data_path", "prompt", "start_from", "output_folder", "overwrite", "save_with_index", "contact_sheet"),
        *("animation", "inference_iter", "num_samples", "num_output_frames"),
        *("batch_size", "switch_frame_indices", "seed"),
    }
)
"""Keys of inference that mean nothing here. Its configuration files may hold them."""

_PERIOD = between(0.1, 31_536_000)  # sessions are looked after several times in each


@dataclass(frozen=True)
class ServeConfig(InferenceConfig):
    """The keys of inference, and those of the server (docs/PROTOCOL.md)."""

    host: str = setting("127.0.0.1", "address to listen on; other than this computer's own it needs a token")
    port: int = setting(8000, "port to listen on; 0 = any that is free", between(0, 65535))
    token: str | None = setting(None, "secret that viewers must know")
    allowed_hosts: tuple[str, ...] = setting((), "names, besides host, under which browsers may reach the server")

    ahead_s: float = setting(1.0, "seconds of video made ahead of what is being watched", POSITIVE)
    max_sessions: int = setting(2, "sessions that make video at the same time; more wait in a queue", at_least(1))
    max_queue: int = setting(8, "sessions that wait; more are refused", at_least(0))
    max_kept: int = setting(16, "sessions in all, those included that nobody watches", at_least(1))
    idle_s: float = setting(60.0, "seconds after which an idle session gives up its caches and its place", _PERIOD)
    forget_s: float = setting(600.0, "seconds after which a session that nobody watches is forgotten", _PERIOD)
    max_message_bytes: int = setting(65536, "size of a message", at_least(1024))
    max_messages_per_s: float = setting(50.0, "messages read from a viewer, in bursts of twice as many", POSITIVE)
    max_prompt_chars: int = setting(2000, "length of a prompt", at_least(1))
    max_upload_bytes: int = setting(10_000_000, "size of an uploaded picture's file", at_least(1))
    max_upload_px: int = setting(25_000_000, "height x width of an uploaded picture", at_least(1))
    max_uploads: int = setting(16, "uploaded pictures kept; the oldest goes first", at_least(1))
    upload_s: float = setting(600.0, "seconds for which an uploaded picture is kept", POSITIVE)
    max_branches: int = setting(32, "branches of a session", at_least(1))
    max_video_s: float = setting(600.0, "seconds of video in a branch", POSITIVE)
    max_session_mb: int = setting(2048, "megabytes of latents and video that a session keeps", at_least(1))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.token is None and not is_loopback(self.host):
            raise InputError(f"host={self.host}: others can reach this address, so viewers need token=SECRET")


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this computer alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"
