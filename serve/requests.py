"""What clients send and get, as JSON. FastAPI derives the checks and the OpenAPI description from it.

Images travel as base64, never as a path or an address: a server reads no file for a stranger.
"""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, model_validator
from pydantic.functional_validators import BeforeValidator

from tavq.base.seeding import RANDOM, image_seeds
from tavq.captioner.config import DecodingConfig, Style
from tavq.generator.config import SamplingConfig, check_negative_prompt
from tavq.prompts import check_prompts
from tavq.ranking import RankBy

MAX_CHARACTERS = 10_000
MAX_SEED = 2**53 - 1  # the largest whole number that JSON readers of all languages keep exactly
MAX_CANDIDATES = 64
MAX_BEAM = 16


def _from_base64(value: Any) -> bytes:
    if not isinstance(value, str):
        raise ValueError("expected the bytes of an image file as base64")
    # Browsers write data:image/png;base64,...
    text = value.partition(",")[2] if value.startswith("data:") else value
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"is no base64 ({error}); encode the bytes of the image file") from None


ImageBytes = Annotated[
    bytes,
    BeforeValidator(_from_base64, json_schema_input_type=str),
    Field(description="Bytes of a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF file, in base64, or a data: URL."),
]
Png = Annotated[
    bytes,
    PlainSerializer(lambda png: base64.b64encode(png).decode(), return_type=str),
    Field(description="PNG file as base64."),
]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class GenerateRequest(_Request):
    """Generate images from text."""

    prompt: str = Field(max_length=MAX_CHARACTERS, description="What the images show, in English.")
    negative_prompt: str = Field("", max_length=MAX_CHARACTERS, description="What they shall not show.")
    seed: int = Field(0, ge=RANDOM, le=MAX_SEED, description="Image i has seed + i; -1 takes a random seed.")
    num_images: int = Field(1, ge=1, le=MAX_CANDIDATES)
    guidance_scale: float = Field(
        SamplingConfig.guidance_scale, ge=0, le=100, description="1 turns guidance off."
    )
    temperature: float = Field(
        SamplingConfig.temperature, ge=0, le=100, description="0 takes the likeliest code each time."
    )
    top_k: int = Field(SamplingConfig.top_k, ge=0, le=2**20, description="0 means all codes.")
    top_p: float = Field(SamplingConfig.top_p, gt=0, le=1)
    best_of: int = Field(1, ge=1, le=MAX_CANDIDATES, description="Candidates an image; the best is returned.")
    rank_by: RankBy = "sum"
    stream: bool = Field(False, description="Answer with JSON lines: previews, then each finished image.")
    every_rows: int = Field(4, ge=1, le=1024, description="Rows of tokens from one preview to the next.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        check_prompts([self.prompt])
        check_negative_prompt(self.negative_prompt, self.settings("float32"))
        if self.stream and self.best_of > 1:
            raise ValueError("stream shows one candidate only; leave best_of out, or stream")
        return self

    def settings(self, precision: Any) -> SamplingConfig:
        """Return the settings that decide the images, in the precision of the server."""
        return SamplingConfig(
            guidance_scale=self.guidance_scale,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            precision=precision,
            draft_tokens=1,
        )

    def seeds(self) -> list[int]:
        """Return the seed of each image; a random one is drawn here."""
        return image_seeds(self.seed, self.num_images)


class GeneratedImage(BaseModel):
    """A generated image."""

    png: Png
    seed: int
    ids: list[list[int]] = Field(description="Its tokens, row by row.")
    recipe: dict[str, Any] = Field(description="What generates it again; the PNG carries it, too.")
    batch: int = Field(description="Images that were decoded together with it, itself included.")


class Generation(BaseModel):
    """The answer to `GenerateRequest`."""

    images: list[GeneratedImage]


class Preview(BaseModel):
    """A line of a streamed answer, before the image is finished. What is not sampled yet is grey."""

    image: int = Field(description="Number of the image, from 0.")
    rows: int = Field(description="Rows of tokens that are sampled.")
    png: Png


class FinishedImage(GeneratedImage):
    """A line of a streamed answer: a finished image."""

    image: int = Field(description="Number of the image, from 0.")


class CaptionRequest(_Request):
    """Describe an image."""

    image: ImageBytes
    beam: int = Field(DecodingConfig.beam, ge=1, le=MAX_BEAM, description="1 is greedy decoding.")
    n_best: int = Field(1, ge=1, le=MAX_BEAM, description="Captions, best first.")
    length_penalty: float = Field(1.0, ge=-10, le=10)
    style: Style = "short"
    temperature: float = Field(0.0, ge=0, le=100, description="0 searches, a value above 0 samples.")
    seed: int = Field(0, ge=0, le=MAX_SEED, description="Seed of the samples.")
    top_p: float = Field(1.0, gt=0, le=1)
    alignment: float = Field(0.0, ge=0, le=1000, description="Weight of the alignment score in the ranking.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self.settings()
        return self

    def settings(self) -> DecodingConfig:
        """Return the options for decoding."""
        return DecodingConfig(**self.model_dump(exclude={"image"}))


class CaptionedWord(BaseModel):
    """A word of a caption."""

    text: str
    probability: float


class CaptionText(BaseModel):
    """A caption with its score and the probability of each of its words."""

    text: str
    score: float
    words: list[CaptionedWord]


class Description(BaseModel):
    """The answer to `CaptionRequest`: captions, best first."""

    captions: list[CaptionText]


class EncodeRequest(_Request):
    """Encode an image into tokens."""

    image: ImageBytes


class Tokens(BaseModel):
    """The tokens of an image."""

    ids: list[list[int]] = Field(description="Row by row.")
    num_codes: int = Field(description="Size of the codebook.")


class DecodeRequest(_Request):
    """Decode tokens into an image."""

    ids: list[list[int]] = Field(max_length=1024, description="Row by row, as /encode returns them.")


class Decoded(BaseModel):
    """The answer to `DecodeRequest`."""

    png: Png


class Health(BaseModel):
    """Whether the models answer."""

    status: str
