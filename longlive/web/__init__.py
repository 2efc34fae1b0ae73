"""Live: a server with a page where prompts are typed while the video plays (docs/PROTOCOL.md). Layer 5.

Two processes. The server (`server`, `hall`, `live_session`, `course`) speaks with viewers and keeps what sessions have
made; it never imports torch. The engine (`engine`, reached through `engine_process`) owns the models and the caches and
keeps nothing that could not be rebuilt, so it may be killed at any time.
"""
