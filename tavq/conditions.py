"""What the generator is given: texts, words of images, and what guidance leads away from.

Shapes: B images to generate, W image words, T slots, M text width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tavq.base.files import file_hash
from tavq.base.weights import WEIGHTS_FILE
from tavq.data.text_encoder import TextEncoder, TokenStates
from tavq.generator.lexicon import Lexicon, with_words
from tavq.generator.model import GeneratorModel
from tavq.inputs import Job
from tavq.prompts import check_prompts
from tavq.tokenizer.model import TAVQTokenizer


class Conditions:
    """The part of `Pipeline` that turns prompts and images into what the generator reads."""

    directory: Path
    device: torch.device
    tokenizer: TAVQTokenizer

    @functools.cached_property
    def generator(self) -> GeneratorModel:
        """The generator. Raises ValueError if it was trained on ids of another codebook."""
        generator = GeneratorModel.from_pretrained(self.directory / "generator").to(self.device)
        generator.check_codebook(self.tokenizer.codebook_hash)
        return generator

    @functools.cached_property
    def text_encoder(self) -> TextEncoder:
        """The text encoder that the generator was trained with."""
        config = self.generator.config
        return TextEncoder.checked(config.text_encoder, config.text_encoder_hash, self.device)

    @functools.cached_property
    def lexicon(self) -> Lexicon:
        """The lexicon. Raises ValueError if it was trained for another generator."""
        folder = self.directory / "lexicon"
        if not (folder / WEIGHTS_FILE).is_file():
            raise FileNotFoundError(
                f"{self.directory} has no lexicon, which images as prompts need; train one with tavq train "
                "lexicon"
            )
        lexicon = Lexicon.from_pretrained(folder).to(self.device)
        lexicon.check_generator(file_hash(self.directory / "generator" / WEIGHTS_FILE))
        return lexicon

    def text_states(self, prompts: Sequence[str]) -> TokenStates:
        """Encode prompts for the generator.

        Warns, naming the words, where a prompt is longer than the generator takes.

        Raises:
            ValueError: a prompt is empty.
        """
        check_prompts(prompts)
        different = list(dict.fromkeys(prompts))
        # One by one: kernels round differently by batch, and no other prompt may change an image.
        states = self.text_encoder.token_states(
            different, self.generator.config.max_text_tokens, batch_size=1
        )
        return states.rows([different.index(prompt) for prompt in prompts])

    @torch.inference_mode()
    def image_words(self, ids: Tensor, count: int) -> Tensor:
        """Write images in `count` words each: ids (n, h, w) -> (W, M), those of the first image first.

        Raises:
            ValueError: there are more words than the lexicon or the generator has room for.
        """
        if not 1 <= count <= self.lexicon.config.num_words:
            raise ValueError(f"image_words is {count}, expected 1 to {self.lexicon.config.num_words}")
        # One by one: kernels round differently by batch, and no other image may change the words of one.
        return torch.cat([self.lexicon(row)[0, :count] for row in ids.flatten(1).split(1)])

    def conditions(
        self, jobs: Sequence[Job], words: Tensor | None = None
    ) -> tuple[TokenStates, TokenStates | None]:
        """Return what B images are led to, and what they are led away from; None is the learned null text.

        Args:
            jobs: prompts and negative prompts.
            words: (W, M), words of images that stand before every prompt.
        """
        texts = self._states_or_null([job.prompt for job in jobs])
        has_negative = any(job.negative for job in jobs)
        if words is None:
            return texts, self._states_or_null([job.negative for job in jobs]) if has_negative else None

        words_BWM = words.cpu().expand(len(jobs), -1, -1)
        led_to = with_words(words_BWM, texts)
        if not has_negative and not any(job.prompt for job in jobs):
            return led_to, None
        # From the images alone to images and prompt ("text-free guidance" of ViLex).
        return led_to, with_words(words_BWM, self._states_or_null([job.negative for job in jobs]))

    def _states_or_null(self, texts: Sequence[str | None]) -> TokenStates:
        """Encode texts; an empty one, or None, gives a mask of False, the learned null text."""
        config = self.generator.config
        states = torch.zeros(len(texts), config.max_text_tokens, config.text_dim)
        mask = torch.zeros(len(texts), config.max_text_tokens, dtype=torch.bool)
        rows = [row for row, text in enumerate(texts) if text]
        if rows:
            known = self.text_states([text for text in texts if text])
            states[rows] = known.states
            mask[rows] = known.mask
        return TokenStates(states, mask)
