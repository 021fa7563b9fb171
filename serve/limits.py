"""The size of a request, limited before it is kept."""

from __future__ import annotations

import fastapi
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MIB = 2**20


class BodyLimit:
    """ASGI middleware: answers a request whose body is too large with status 413."""

    most_bytes = 20 * MIB

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def bounded() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.most_bytes:
                # FastAPI, which reads the body, answers with it.
                allowed = f"{self.most_bytes / MIB:g} MiB"
                raise fastapi.HTTPException(413, f"the request has more than {allowed}; send a smaller image")
            return message

        await self.app(scope, bounded if scope["type"] == "http" else receive, send)
