"""Gradio's page with a guard: every value is checked before Gradio touches it, and jobs take turns.

Gradio calls `preprocess_data` before each endpoint's function, and `call_function` for each step, whether the
page, its API or an assistant (MCP) asks. Both are wrapped here, so that no endpoint can forget a check.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import gradio as gr
import httpx
import safehttpx
from gradio.block_function import BlockFunction
from gradio.utils import get_function_params, get_upload_folder

from .components import only_failed
from .jobs import MODEL, FairQueue, Turns
from .limits import (
    Limits,
    RefusedError,
    check_choice,
    check_flag,
    check_image_file,
    check_number,
    check_text,
    shown,
    too_large,
)

DOWNLOAD_SECONDS = 20
IMAGE_INPUTS = (gr.Image, gr.ImageEditor, gr.ImageSlider)

log = logging.getLogger(__name__)


class GuardedBlocks(gr.Blocks):
    """A page whose endpoints refuse what `limits` do not allow, each time with a reason.

    Args:
        limits: what clients, jobs and uploads may take.
        options: of `gradio.Blocks`.
    """

    def __init__(self, limits: Limits, **options: Any):
        self.limits = limits
        self.turns = Turns()
        self.stoppable: list[Callable[..., Any]] = []
        """Handlers that look whether their browser tab pressed Stop, before they do anything."""
        super().__init__(**options)

    def queue(self, *args: Any, **options: Any) -> GuardedBlocks:
        """Take jobs by `FairQueue`; no endpoint that is queued can be called past it."""
        super().queue(*args, api_open=False, max_size=self.limits.max_queue, **options)
        self._queue = FairQueue.in_place_of(self._queue, self)
        return self

    async def preprocess_data(
        self, block_fn: BlockFunction, inputs: list[Any], state: Any, explicit_call: bool = False
    ) -> list[Any]:
        """Check the inputs, then let Gradio convert them. Raises gr.Error with one line."""
        inputs = await self.checked(block_fn, inputs, state)
        try:
            return await super().preprocess_data(block_fn, inputs, state, explicit_call)
        except Exception as error:  # what a user sent is no error of ours, so no traceback
            lines = str(getattr(error, "message", error)).strip().splitlines() or [type(error).__name__]
            raise one_line(f"the input could not be read: {lines[0]}") from error

    async def checked(self, block_fn: BlockFunction, inputs: list[Any], state: Any) -> list[Any]:
        try:
            if not isinstance(inputs, list):
                raise RefusedError(f"data is {shown(inputs)}, expected a list of the endpoint's values")
            fields = self._field_names(block_fn)
            if len(inputs) != len(fields):
                names = ", ".join(fields) or "none"
                raise RefusedError(f"data holds {len(inputs)} values, expected {len(fields)}: {names}")

            checked = []
            for name, block, value in zip(fields, block_fn.inputs, inputs, strict=True):
                # A session may have changed the bounds or choices of a component.
                current = state[block._id] if state is not None and block._id in state else block
                if value is None and isinstance(block, gr.Textbox):
                    value = ""
                elif value is None and isinstance(block, gr.Number) and block_fn.concurrency_id == MODEL:
                    raise RefusedError(f"{name} is empty, expected a number")
                checked.append(await self._checked_value(name, current, value))
            return checked
        except RefusedError as refusal:
            raise one_line(str(refusal)) from None

    def candidates_of(self, block_fn: BlockFunction, inputs: list[Any]) -> int:
        values = dict(zip(self._field_names(block_fn), inputs, strict=True))
        return int(values.get("num_images") or 1) * int(values.get("best_of") or 1)

    def can_be_stopped(self, block_fn: BlockFunction) -> bool:
        return block_fn.fn in self.stoppable

    def stop_waiting(self, session_hash: str | None) -> None:
        """End the jobs of a browser tab that wait in the queue, of those in `stoppable`."""
        if isinstance(self._queue, FairQueue):
            self._queue.stop_waiting(session_hash)

    @staticmethod
    def _field_names(block_fn: BlockFunction) -> list[str]:
        """Return the name of each input: that of the function's parameter, as the API calls it."""
        if block_fn.inputs_as_dict or block_fn.fn is None:
            return [getattr(block, "label", None) or "input" for block in block_fn.inputs]
        parameters = [parameter[0] for parameter in get_function_params(block_fn.fn)]
        parameters += [f"input_{number}" for number in range(len(parameters), len(block_fn.inputs))]
        return parameters[: len(block_fn.inputs)]

    async def _checked_value(self, field: str, block: Any, value: Any) -> Any:
        if getattr(block, "stateful", False):
            return value  # kept by the server, not sent
        match block:
            case gr.Slider():
                whole = float(block.step or 0.5).is_integer()
                check_number(field, value, block.minimum, block.maximum, whole=whole)
            case gr.Number() if value is not None:
                check_number(field, value, block.minimum, block.maximum, whole=block.precision == 0)
            case gr.Textbox():
                most = self.limits.max_text_characters
                check_text(field, value, min(block.max_length or most, most))
            case gr.Checkbox() if value is not None:
                check_flag(field, value)
            case gr.Radio() if value is not None:
                check_choice(field, value, [choice for _, choice in block.choices])
            case gr.Dropdown() if value is not None and not block.allow_custom_value:
                for chosen in value if block.multiselect and isinstance(value, list) else [value]:
                    check_choice(field, chosen, [choice for _, choice in block.choices])
            case gr.Image() | gr.ImageEditor() | gr.ImageSlider() if value is not None:
                is_file = isinstance(value, dict) and "path" in value
                if not is_file and (isinstance(block, gr.Image) or not isinstance(value, dict | list)):
                    raise RefusedError(f"{field} is {shown(value)}, expected an uploaded file")
                return await self._checked_files(field, value, image=True)
            case _:
                return await self._checked_files(field, value, image=isinstance(block, gr.Gallery))
        return value

    async def _checked_files(self, field: str, value: Any, *, image: bool) -> Any:
        """Check every file in a value, however deep, and fetch those that are addresses."""
        if isinstance(value, list):
            return [await self._checked_files(field, item, image=image) for item in value]
        if not isinstance(value, dict):
            return value
        if "path" not in value or not (image or "meta" in value):
            return {key: await self._checked_files(field, item, image=image) for key, item in value.items()}

        path = value["path"]
        if not isinstance(path, str) or not path:
            raise RefusedError(f"{field} is a file with the path {shown(path)}, expected an uploaded file")
        if str(value.get("url") or "").startswith("data:") or path.startswith("data:"):
            raise RefusedError(f"{field} is sent inside the text (data:...), expected an uploaded file")
        if path.startswith(("http://", "https://")):
            path = str(await self._fetched(field, path))
            value = {**value, "path": path, "url": None}
        elif not self._is_served(path):
            raise RefusedError(
                f"{field} was not uploaded to this server; upload it, then name the path it returns"
            )
        if image:
            await anyio.to_thread.run_sync(check_image_file, field, Path(path), self.limits)
        return value

    def _is_served(self, path: str) -> bool:
        try:
            resolved = Path(path).resolve()
            folders = (Path(get_upload_folder()), Path(self.GRADIO_CACHE))
            return resolved.is_file() and any(resolved.is_relative_to(f.resolve()) for f in folders)
        except (OSError, ValueError):  # too long, or with a NUL in it
            return False

    async def _fetched(self, field: str, address: str) -> Path:
        """Download an image from a public address; addresses inside this network are refused."""
        folder = Path(tempfile.mkdtemp(dir=get_upload_folder(), prefix="fetched-"))
        path = folder / f"{uuid.uuid4().hex}.img"
        try:
            host = httpx.URL(address).host
            public = await safehttpx.async_validate_url(host)
            transport = safehttpx.AsyncSecureTransport(public)
            async with httpx.AsyncClient(transport=transport, timeout=DOWNLOAD_SECONDS) as client:
                async with client.stream("GET", address) as response:
                    if response.status_code != 200:  # a redirect could lead inside this network
                        raise RefusedError(f"{field}: the address answers with status {response.status_code}")
                    await self._save(field, response, path)
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, OSError) as error:
            if isinstance(error, RefusedError):
                raise
            raise RefusedError(
                f"{field} could not be fetched from {shown(address)}; upload the file instead"
            ) from error
        return path

    async def _save(self, field: str, response: httpx.Response, path: Path) -> None:
        size = 0
        with path.open("wb") as file:
            async for chunk in response.aiter_bytes():
                size += len(chunk)
                if size > self.limits.upload_bytes:
                    raise RefusedError(too_large(field, size, self.limits))
                file.write(chunk)

    async def call_function(
        self,
        block_fn: BlockFunction | int,
        processed_input: list[Any],
        iterator: Any = None,
        requests: Any = None,
        event_id: str | None = None,
        *more: Any,
        **options: Any,
    ) -> dict[str, Any]:
        """Run one step of an endpoint, in its client's turn where it needs the model.

        An error that no user caused is logged with its traceback, and shown by a number only.
        """
        function = self.fns[block_fn] if isinstance(block_fn, int) else block_fn
        step = super().call_function
        arguments = (function, processed_input, iterator, requests, event_id, *more)
        if not isinstance(self._queue, FairQueue):
            raise TypeError("the page is served without its queue; call queue()")

        job = self._queue.job(event_id)
        if job.ended:  # and its last step has said why
            return _step_of([gr.skip()] * len(function.outputs), None)
        turn = self.turns.of(job) if function.concurrency_id == MODEL else contextlib.nullcontext()
        failure: Exception
        try:
            async with turn:
                return await step(*arguments, **options)
        except gr.Error as error:
            error.print_exception = False
            raise
        except RefusedError as error:
            failure = error
            reason = str(error)
        except Exception as error:
            failure = error
            number = uuid.uuid4().hex[:8]
            log.exception("internal error %s in %s", number, function.api_name)
            reason = f"internal error {number}; the server's log tells more"

        prediction = only_failed(function.outputs, reason)
        if prediction is None:
            raise one_line(reason) from failure
        job.ended = True
        return _step_of(prediction, iterator)


def _step_of(prediction: list[Any], iterator: Any) -> dict[str, Any]:
    """Return a step as Gradio does: the values of the outputs, and the iterator of further steps, if any.

    Gradio shows what a running endpoint yields, but not what it ends with, so an error is not the last step.
    """
    is_generating = iterator is not None
    return {"prediction": prediction, "duration": 0.0, "is_generating": is_generating, "iterator": iterator}


def one_line(reason: str) -> gr.Error:
    """An error that the page and the API show, and that leaves no traceback in the log."""
    return gr.Error(" ".join(reason.split()), print_exception=False)
