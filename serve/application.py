"""The Ray Serve application: `Gateway` checks requests and answers them, `Models` does the work in batches.

`tavq serve` runs it on this machine or on a Ray cluster. A Serve config file, such as that of a RayService on
Kubernetes, names it as `tavq.serve.application:build`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

import fastapi
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from ray import serve
from ray.serve.handle import DeploymentHandle

from . import requests as wire
from .answers import answered, generated_image, refusal, say_what_is_wrong
from .config import ServerConfig
from .limits import BodyLimit
from .orders import Drawn, Order, Refused

HEALTH_SECONDS = 10.0
"""Seconds that the models have to say that they live; a batch may run meanwhile."""
GOODBYE_SECONDS = 5.0
"""Seconds that running requests have to end when the server is stopped."""
QUIET = {"log_level": "WARNING", "enable_access_log": False}
"""What a replica logs."""
batch: Any = serve.batch  # Ray's types do not cover methods, and know no class that a decorator replaced
deployment: Any = serve.deployment
log = logging.getLogger("ray.serve")


@deployment(logging_config=QUIET)
class Models:
    """A replica: tokenizer, generator and captioner, one computation at a time.

    The methods compute on the event loop itself and block it. Requests that come meanwhile wait in front of
    it and form the next batch together; from a thread of its own, Ray would cut them into small batches
    while the first one still runs.

    What a request gets wrong is returned as `Refused`, since an exception would end the whole batch.
    """

    def __init__(self, options: Mapping[str, Any]):
        from tavq.base.device import choose_device
        from tavq.pipeline import Pipeline

        from .batching import batch_sizes

        config = ServerConfig(**options)
        self.pipeline = Pipeline.from_pretrained(config.checkpoint, choose_device(config.device))
        # All parts are loaded now, so that a bad checkpoint fails before the first request.
        _ = self.pipeline.generator, self.pipeline.captioner, self.pipeline.text_encoder

        self.sizes = batch_sizes(self.pipeline.generator, config.precision, config.max_batch)
        log.info("batches of %s images with guidance, %s without", self.sizes[True], self.sizes[False])
        for batched in (self.generate, self.preview):
            batched.set_max_batch_size(config.max_batch)
            batched.set_batch_wait_timeout_s(config.batch_wait_ms / 1000)

    @batch
    async def generate(self, orders: list[Order]) -> list[Drawn] | list[Refused]:
        from .batching import draw

        try:
            return draw(self.pipeline, orders, self.sizes)
        except ValueError as error:  # of the checkpoint, such as ranking by a plain tokenizer's alignment
            return [Refused(str(error))] * len(orders)

    @batch(max_batch_size=16)  # set anew in __init__; without an argument Ray takes no generator
    async def preview(self, orders: list[Order]) -> AsyncIterator[list[Drawn | None]]:
        from .batching import draw_in_steps

        for step in draw_in_steps(self.pipeline, orders, self.sizes):
            yield step
            await asyncio.sleep(0.001)  # so that it leaves before the next rows are computed

    async def stream(self, order: Order) -> AsyncIterator[Drawn]:
        """Yield the previews of one order, the finished image last."""
        async for drawn in self.preview(order):
            if drawn is not None:
                yield drawn

    async def caption(self, image: bytes, settings: Any) -> Any:
        # Not batched: beam search of 32 images takes as long as 32 beam searches (docs/speed.md).
        from tavq.data.images import UnreadableImageError, load_image

        try:
            return self.pipeline.caption(load_image(io.BytesIO(image)), settings)[0].to_json()
        except UnreadableImageError as error:
            return Refused(_unreadable(error))
        except ValueError as error:
            return Refused(str(error))

    async def encode(self, image: bytes) -> Any:
        from tavq.data.images import UnreadableImageError, load_image

        try:
            ids = self.pipeline.encode(load_image(io.BytesIO(image)))[0].tolist()
        except UnreadableImageError as error:
            return Refused(_unreadable(error))
        return wire.Tokens(ids=ids, num_codes=self.pipeline.tokenizer.num_codes)

    async def decode(self, ids: list[list[int]]) -> Any:
        import torch

        rows, columns = self.pipeline.tokenizer.grid_size
        if len(ids) != rows or any(len(row) != columns for row in ids):
            return Refused(f"ids have another shape than {rows} rows of {columns} tokens; send such a grid")
        num_codes = self.pipeline.tokenizer.num_codes
        if not all(0 <= code < num_codes for row in ids for code in row):
            return Refused(f"ids reach beyond 0 to {num_codes - 1}, the codes of this tokenizer")
        file = io.BytesIO()
        self.pipeline.decode(torch.tensor([ids]))[0].save(file, format="PNG")
        return file.getvalue()

    async def ready(self) -> bool:
        return True


def _unreadable(error: Exception) -> str:
    return str(error).removeprefix("image: ")


api = fastapi.FastAPI(
    title="TA-VQ",
    description="Text to image and image to text through one vocabulary of image tokens.",
    docs_url="/docs",
)
api.add_middleware(BodyLimit)


api.add_exception_handler(RequestValidationError, say_what_is_wrong)


@deployment(logging_config=QUIET)
@serve.ingress(api)
class Gateway:
    """Checks requests, hands them to a replica of `Models`, and writes the answers."""

    def __init__(self, models: DeploymentHandle, options: Mapping[str, Any]):
        self.models = models
        self.streams: Any = models.options(stream=True)
        self.config = ServerConfig(**options)
        # The middleware belongs to the module's `api`, of which every Gateway process has its own.
        BodyLimit.most_bytes = int(self.config.request_mib * 2**20)

    @api.post("/generate", response_model=wire.Generation)
    async def generate(self, request: wire.GenerateRequest) -> Any:
        """Generate images from text. The same request gives the same images, whoever else asks."""
        orders = self._orders(request)
        if request.stream:
            return StreamingResponse(self._lines(orders), media_type="application/x-ndjson")
        drawn = await asyncio.gather(*(answered(self.models.generate.remote(order)) for order in orders))
        return wire.Generation(
            images=[generated_image(one, order) for one, order in zip(drawn, orders, strict=True)]
        )

    def _orders(self, request: wire.GenerateRequest) -> list[Order]:
        asked = request.num_images * request.best_of
        if asked > self.config.max_images:
            raise fastapi.HTTPException(
                422,
                f"num_images times best_of is {asked}, and at most {self.config.max_images} are allowed; ask "
                "for fewer",
            )
        settings = request.settings(self.config.precision)
        options = request.model_dump(include={"negative_prompt", "best_of", "rank_by"})
        # Orders that are not streamed may share a batch whatever they say of previews.
        every_rows = request.every_rows if request.stream else 1
        return [
            Order(request.prompt, seed, settings, every_rows=every_rows, **options)
            for seed in request.seeds()
        ]

    async def _lines(self, orders: list[Order]) -> AsyncIterator[str]:
        """Yield the lines of a streamed answer as they come, those of several images in turn."""
        lines: asyncio.Queue[str | None] = asyncio.Queue()
        tasks = [asyncio.create_task(self._follow(i, order, lines)) for i, order in enumerate(orders)]
        try:
            for _ in tasks:
                while (line := await lines.get()) is not None:
                    yield line
        finally:
            for task in tasks:  # the client may have gone
                task.cancel()

    async def _follow(self, number: int, order: Order, lines: asyncio.Queue[str | None]) -> None:
        """Put the previews of one image into `lines`, then None."""
        try:
            async for drawn in self.streams.stream.remote(order):
                line: BaseModel
                if drawn.rows < len(drawn.ids):
                    line = wire.Preview(image=number, rows=drawn.rows, png=drawn.png)
                else:
                    line = wire.FinishedImage(image=number, **dict(generated_image(drawn, order)))
                await lines.put(line.model_dump_json() + "\n")
        except Exception as error:  # the status is sent already, so the reason becomes a line
            detail = refusal(error).detail
            await lines.put(json.dumps({"image": number, "error": detail}) + "\n")
        await lines.put(None)

    @api.post("/caption", response_model=wire.Description)
    async def caption(self, request: wire.CaptionRequest) -> Any:
        """Describe an image: captions, best first, with the probability of each word."""
        captions = await answered(self.models.caption.remote(request.image, request.settings()))
        return {"captions": captions}

    @api.post("/encode", response_model=wire.Tokens)
    async def encode(self, request: wire.EncodeRequest) -> Any:
        """Encode an image into tokens. It is squashed to a square."""
        return await answered(self.models.encode.remote(request.image))

    @api.post("/decode", response_model=wire.Decoded)
    async def decode(self, request: wire.DecodeRequest) -> Any:
        """Decode tokens into an image."""
        return wire.Decoded(png=await answered(self.models.decode.remote(request.ids)))

    @api.get("/healthz", response_model=wire.Health)
    async def healthz(self) -> Any:
        """Say whether a replica of the models answers."""
        try:
            await asyncio.wait_for(answered(self.models.ready.remote()), HEALTH_SECONDS)
        except (TimeoutError, fastapi.HTTPException):
            return JSONResponse({"status": "no replica of the models answers"}, 503)
        return wire.Health(status="ok")


def build(options: Mapping[str, Any]) -> serve.Application:
    """Return the application; `options` are fields of `ServerConfig`."""
    config = ServerConfig(**options)
    scaling: dict[str, Any] = {"num_replicas": config.replicas}
    if config.max_replicas:
        scaling = {
            "autoscaling_config": {
                "min_replicas": config.replicas,
                "max_replicas": config.max_replicas,
                "target_ongoing_requests": config.max_batch,
            }
        }
    ending: dict[str, Any] = {
        "graceful_shutdown_timeout_s": GOODBYE_SECONDS,
        "graceful_shutdown_wait_loop_s": 0.2,
    }
    # Typed as the classes that they were before Ray's decorators.
    replicas: Any = Models
    gateways: Any = Gateway
    models = replicas.options(
        **scaling,
        **ending,
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
        # One batch is computed and one waits; what goes beyond waits in the gateway, for any replica.
        max_ongoing_requests=2 * config.max_batch,
        max_queued_requests=config.max_waiting,
    )
    gateway = gateways.options(
        **ending, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=config.max_waiting + 1000
    )
    values = dataclasses.asdict(config)
    return gateway.bind(models.bind(values), values)
