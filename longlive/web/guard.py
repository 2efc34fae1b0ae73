"""Who may speak with the server, and what browsers may do with its answers: an ASGI layer around everything."""

import secrets
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longlive.web.protocol import ProtocolError
from longlive.web.serve_config import ServeConfig, is_loopback

_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Guard:
    """Checks Host, Origin and token before anything else happens; adds security headers to every answer."""

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self._app, self._config = app, config
        self._hosts = {name.lower() for name in (config.host, *config.allowed_hosts)}
        self._takes_any_host = not is_loopback(config.host) and not config.allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("Cache-Control", "no-store" if scope["path"].startswith("/api/") else "no-cache")
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send_with_headers)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close"})  # before it is accepted: 403
        else:
            status, error = refusal
            await JSONResponse(error.describe(), status)(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope) -> tuple[int, ProtocolError] | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        if not self._knows(host):
            return 403, ProtocolError("forbidden", "this server is not reached under that name (see allowed_hosts)")
        if origin is not None and _netloc(origin.lower()) != host:
            return 403, ProtocolError("forbidden", "pages of other sites may not use this server")
        path = scope["path"]
        if path.startswith("/api/") and path != "/api/health" and not self._is_authorized(scope, headers):
            return 401, ProtocolError("unauthorized", "this address needs the server's token")
        return None

    def _knows(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        return name is not None and (self._takes_any_host or name in self._hosts or is_loopback(name))

    def _is_authorized(self, scope: Scope, headers: Headers) -> bool:
        if self._config.token is None:
            return True
        in_query = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[-1]
        given = headers.get("authorization", "").removeprefix("Bearer ") or in_query
        return secrets.compare_digest(given.encode(), self._config.token.encode())


def _netloc(origin: str) -> str | None:
    """Host and port of an origin; None where it is malformed."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None
