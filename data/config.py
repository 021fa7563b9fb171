"""Which dataset, which split, and which model describes images.

Nothing here imports torch: help and mistakes on the command line are answered without it.
"""

from __future__ import annotations

import dataclasses
import os

SPLITS = ("train", "val", "test")


def default_data() -> str:
    """Return the dataset that the environment variable TAVQ_DATA names, "" without it."""
    return os.environ.get("TAVQ_DATA", "")


@dataclasses.dataclass(frozen=True)
class VisionLanguageConfig:
    """The model that looks at the images."""

    model: str = ""
    """Directory or hf:OWNER/NAME of a transformers image-text-to-text model. With --endpoint, the name that
    the server gives its model."""
    endpoint: str = ""
    """Address of a server that speaks the OpenAI chat protocol, such as http://127.0.0.1:8000/v1 (vLLM,
    Ollama, llama.cpp, SGLang). Its key is read from the environment variable OPENAI_API_KEY."""
    requests: int = 8
    """Requests that a server is sent at once."""
    retries: int = 5
    """Further attempts after an error or a timeout, with growing pauses between them."""
    timeout_s: float = 120.0
    """Time limit of one request, in seconds."""
    max_tokens: int = 300
    """Longest answer, in the model's tokens."""

    def __post_init__(self) -> None:
        for name, least in {"requests": 1, "retries": 0, "max_tokens": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {least} or more")
