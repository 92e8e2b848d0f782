"""The page for people: files that are kept in memory, and pictures to try."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from aiohttp import web

_FOLDER = Path(__file__).with_name("static")
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_PICTURES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png", ".webp": "image/webp"}
# Nothing from elsewhere, nothing inline, and nobody else's frame.
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Page:
    """Answers the page's own paths.

    Args:
        examples: pictures that it offers.

    Attributes:
        examples: their paths for clients.
    """

    def __init__(self, examples: Sequence[Path] = ()) -> None:
        self._files = {f"/page/{file.name}": (file.read_bytes(), _TYPES[file.suffix]) for file in _FOLDER.iterdir()}
        pictures = [file for file in examples if file.suffix.lower() in _PICTURES]
        self._pictures = {f"/examples/{quote(file.name)}": file for file in pictures}
        self.examples = sorted(self._pictures)

    async def answer(self, path: str) -> web.Response | None:
        """The answer to a GET; None for a path that isn't the page's."""
        if path == "/":
            path = "/page/index.html"
        if path in self._files:
            body, kind = self._files[path]
        elif path in self._pictures:
            file = self._pictures[path]
            body, kind = await asyncio.to_thread(file.read_bytes), _PICTURES[file.suffix.lower()]
        else:
            return None
        return web.Response(body=body, headers={**HEADERS, "Content-Type": kind})
