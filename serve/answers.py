"""What the gateway answers: results, and one line for what is refused or failed.

These functions have a file of their own because Ray pickles the gateway's class where it is defined: what
stands below it in the same file would be missing in the replicas.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable
from typing import TypeVar

import fastapi
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.serve.exceptions import BackPressureError

from . import requests as wire
from .orders import Drawn, Order, Refused

Answer = TypeVar("Answer")
NO_OBJECT = ("missing", "model_type", "model_attributes_type", "dict_type")
"""What pydantic calls a body that holds no object."""
log = logging.getLogger("ray.serve")


async def answered(response: Awaitable[Answer | Refused]) -> Answer:
    """Wait for a replica's answer; what it refuses, or cannot do, becomes a status and one line."""
    try:
        answer = await response
    except Exception as error:
        raise refusal(error) from error
    if isinstance(answer, Refused):
        raise fastapi.HTTPException(400, " ".join(answer.reason.split()))
    return answer


def refusal(error: Exception) -> fastapi.HTTPException:
    """Return the status and the line that a request gets where a replica failed or has no room."""
    if isinstance(error, BackPressureError):
        return fastapi.HTTPException(
            503, "too many requests wait for the models; try again in a few seconds", {"Retry-After": "5"}
        )
    log.error("a request failed", exc_info=error)
    return fastapi.HTTPException(500, "the models failed; the server's log tells more")


def generated_image(drawn: Drawn, order: Order) -> wire.GeneratedImage:
    """Write an image as it is sent."""
    return wire.GeneratedImage(
        png=drawn.png, seed=order.seed, ids=drawn.ids, recipe=drawn.recipe, batch=drawn.batch
    )


async def say_what_is_wrong(request: fastapi.Request, error: Exception) -> JSONResponse:
    """Answer with one line instead of pydantic's list."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid" or (first["loc"] == ("body",) and first["type"] in NO_OBJECT):
        reason = "the request is no JSON object; send one, as Content-Type: application/json (see /docs)"
        return JSONResponse({"detail": reason}, 422)
    field = ".".join(str(part) for part in first["loc"] if part != "body")
    message = " ".join(first["msg"].removeprefix("Value error, ").split())
    return JSONResponse({"detail": f"{field}: {message}" if field else message}, 422)
