"""Vision-language models that answer a prompt about an image: a local one, or a server's."""

from __future__ import annotations

import asyncio
import base64
import io
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image

from tavq.base.hub import DATA_ONLY, TRANSFORMERS_FILES, directory_of

from .config import VisionLanguageConfig

MAX_SIDE_PX = 1024  # larger images are scaled down before they are sent
FAILURES_IN_A_ROW = 10  # so many say that the server is down
FINAL_STATUS = (401, 403, 404)  # wrong key, wrong address or unknown model: no later request would succeed


class VisionLanguageModel(Protocol):
    """Answers a prompt about an image; at most `at_once` prompts are waiting for an answer."""

    at_once: int

    async def ask(self, image: Image.Image, prompt: str) -> str: ...

    async def close(self) -> None:
        """Give back connections; nothing is asked afterwards."""


def open_model(config: VisionLanguageConfig, device: str) -> VisionLanguageModel:
    """Load the local model, or connect to the server."""
    check_named(config)
    return Endpoint(config) if config.endpoint else LocalModel(config, device)


def check_named(config: VisionLanguageConfig) -> None:
    """Raise ValueError unless a model is named."""
    if not config.model:
        raise ValueError("no model is named; give --model DIR, or --endpoint URL and the --model it serves")


def model_directory(config: VisionLanguageConfig) -> Path:
    """Return the directory of a local model; one of the hub is downloaded."""
    check_named(config)
    return directory_of(config.model, (*TRANSFORMERS_FILES, "*.jinja"))


class LocalModel:
    """An image-text-to-text model of transformers. Code that comes with a model is never run."""

    at_once = 1

    def __init__(self, config: VisionLanguageConfig, device: str):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        directory = model_directory(config)
        try:
            self.processor = AutoProcessor.from_pretrained(directory, **DATA_ONLY)
            model = AutoModelForImageTextToText.from_pretrained(directory, dtype="auto", **DATA_ONLY)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"{config.model} is no image-text-to-text model of transformers "
                f"({str(error).splitlines()[0]}); name another"
            ) from error
        self.model = model.eval().to(device)
        self.max_tokens = config.max_tokens

    @torch.inference_mode()
    async def ask(self, image: Image.Image, prompt: str) -> str:
        """Return the likeliest answer (greedy decoding)."""
        content = [{"type": "image", "image": image}, {"type": "text", "text": prompt}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)
        output = self.model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False)
        answer = output[0, inputs["input_ids"].shape[1] :]
        return self.processor.decode(answer, skip_special_tokens=True)

    async def close(self) -> None:
        """Nothing to give back."""


class AnswerError(ValueError):
    """A question that a server did not answer, in all attempts.

    Attributes:
        is_final: whether it would answer no other question either.
    """

    def __init__(self, reason: str, *, is_final: bool = False):
        super().__init__(reason)
        self.is_final = is_final


class Endpoint:
    """A server that speaks the OpenAI chat protocol."""

    def __init__(self, config: VisionLanguageConfig):
        import openai

        self.config = config
        self.at_once = config.requests
        # The client itself repeats requests, after a growing pause or the one that the server asks for.
        self.client = openai.AsyncOpenAI(
            base_url=config.endpoint,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",  # local servers take any
            max_retries=config.retries,
            timeout=config.timeout_s,
        )

    async def ask(self, image: Image.Image, prompt: str) -> str:
        """Return the server's answer at temperature 0.

        Raises:
            AnswerError: the last attempt failed, too, or what came back is no answer.
        """
        import openai

        content: list[Any] = [
            {"type": "image_url", "image_url": {"url": _data_url(image)}},
            {"type": "text", "text": prompt},
        ]
        try:
            response: Any = await self.client.chat.completions.create(
                model=self.config.model,
                messages=[{"role": "user", "content": content}],
                max_tokens=self.config.max_tokens,
                temperature=0,
            )
        except openai.OpenAIError as error:
            is_final = getattr(error, "status_code", None) in FINAL_STATUS
            raise AnswerError(f"{type(error).__name__}: {error}", is_final=is_final) from error
        except ValueError as error:
            raise AnswerError(f"the server's answer is no json ({error})") from error
        try:
            return str(response.choices[0].message.content or "")
        except (AttributeError, IndexError, TypeError) as error:
            raise AnswerError(f"the server's answer is no chat completion: {response!s:.80}") from error

    async def close(self) -> None:
        await self.client.close()


def answer_all(
    model: VisionLanguageModel, questions: Iterable[tuple[str, Image.Image, str]]
) -> Iterator[tuple[str, str | AnswerError]]:
    """Ask many questions, several at a time, and yield each answer as it comes. Closes the model at the end.

    Args:
        model: see `VisionLanguageConfig.open`.
        questions: (key, image, prompt); read one by one, as places become free.

    Yields:
        (key, answer), or (key, error) where an answer could not be had.

    Raises:
        ValueError: the server refuses every request, or `FAILURES_IN_A_ROW` questions failed.
    """
    with asyncio.Runner() as runner:
        try:
            yield from _answers(runner, model, iter(questions))
        finally:
            runner.run(model.close())


def _answers(
    runner: asyncio.Runner, model: VisionLanguageModel, questions: Iterator[tuple[str, Image.Image, str]]
) -> Iterator[tuple[str, str | AnswerError]]:
    waiting: dict[asyncio.Task[str | AnswerError], str] = {}
    failures = 0
    while True:
        for key, image, prompt in itertools.islice(questions, model.at_once - len(waiting)):
            waiting[runner.get_loop().create_task(_answer_or_error(model, image, prompt))] = key
        if not waiting:
            return

        done, _ = runner.run(asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED))
        for task in done:
            answer = task.result()
            failures = failures + 1 if isinstance(answer, AnswerError) else 0
            if isinstance(answer, AnswerError) and (answer.is_final or failures >= FAILURES_IN_A_ROW):
                raise ValueError(
                    f"the server gives no answers ({answer}); check --endpoint, --model and "
                    "OPENAI_API_KEY, then run the command again: it resumes"
                )
            yield waiting.pop(task), answer


async def _answer_or_error(model: VisionLanguageModel, image: Image.Image, prompt: str) -> str | AnswerError:
    # Returned and not raised: a task whose exception nobody fetches complains when it is collected.
    try:
        return await model.ask(image, prompt)
    except AnswerError as error:
        return error


def _data_url(image: Image.Image) -> str:
    image = image.copy()
    image.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX))
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=92)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
