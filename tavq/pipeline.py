"""Where tokenizer, generator and captioner meet: text to image, image to text, reconstruction, completion.

The command line, the demo and the evaluations are thin over `Pipeline`, so that what is measured is what is
shown.

Shapes: B images, h w token grid, N = h*w, M text width.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from tavq.alignment.projections import NUM_LEVELS
from tavq.base.files import file_hash
from tavq.base.seeding import mixed_seed
from tavq.captioner.decoding import Caption, DecodingConfig, decode_captions
from tavq.captioner.likelihood import log_likelihood
from tavq.captioner.model import Captioner
from tavq.data.images import to_pil, to_tensor, write_png
from tavq.data.text_encoder import TextEncoder, TokenStates
from tavq.generator.model import GeneratorModel
from tavq.generator.sampling import RENAMED_FIELDS, SamplingConfig, sample, stream
from tavq.tokenizer.heatmaps import UnitMap, check_aligned, unit_maps
from tavq.tokenizer.model import TAVQTokenizer
from tavq.tokenizer.retrieval import alignment_scores, text_encoder_of
from tavq.training.checkpoint import WEIGHTS_FILE, local_directory, shipped_checkpoint

CHECKPOINT = str(shipped_checkpoint())
RECIPE_FIELD = "tavq"  # PNG text field: the recipe as JSON
PARAMETERS_FIELD = "parameters"  # the same for people, as other programs write and show it
RankBy = Literal["likelihood", "alignment", "sum"]
UNKNOWN_GREY = 0.6  # in [-1, 1], of what a partial picture does not show yet


@dataclasses.dataclass(frozen=True)
class Generated:
    """A picture and everything that is needed to draw it again."""

    image: Image.Image
    ids: Tensor
    """(h, w) int64."""
    recipe: dict[str, Any]
    """prompt, seed, settings, checkpoint hashes, version."""

    def save(self, path: Path) -> None:
        """Write a PNG that carries its recipe in text fields."""
        fields = PngInfo()
        fields.add_itxt(RECIPE_FIELD, json.dumps(self.recipe))
        fields.add_itxt(PARAMETERS_FIELD, recipe_line(self.recipe))
        write_png(self.image, path, fields)


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """An image after encoding and decoding."""

    image: Image.Image
    ids: Tensor
    """(h, w) int64."""


class Pipeline:
    """The whole chain, from a directory that holds `tokenizer/`, `generator/` and `captioner/`.

    Generator, captioner and text encoder are loaded when they are first needed.

    Args:
        directory: of the three checkpoints; a part that is never used may be absent.
        device: of all models.
    """

    def __init__(self, directory: Path, device: str = "cpu"):
        self.directory, self.device = directory, torch.device(device)
        self.tokenizer = TAVQTokenizer.from_pretrained(directory / "tokenizer").to(self.device)

    @classmethod
    def from_pretrained(cls, source: str | Path | None = None, device: str = "cpu", **hub: Any) -> Self:
        """Load from a directory, or from the Hugging Face hub.

        Args:
            source: a directory, or `hf:OWNER/NAME[@REVISION]`; None takes the shipped weights.
            device: of all models.
            hub: options of `base.hub.directory_of`: revision, token, cache_dir, local_files_only,
                force_download.

        Raises:
            FileNotFoundError: no checkpoint lies there.
        """
        return cls(shipped_checkpoint() if source is None else local_directory(source, **hub), device)

    @functools.cached_property
    def generator(self) -> GeneratorModel:
        generator = GeneratorModel.from_pretrained(self.directory / "generator").to(self.device)
        generator.check_codebook(self.tokenizer.codebook_hash)
        return generator

    @functools.cached_property
    def captioner(self) -> Captioner:
        captioner = Captioner.from_pretrained(self.directory / "captioner").to(self.device)
        captioner.check_codebook(self.tokenizer.codebook_hash)
        return captioner

    @functools.cached_property
    def text_encoder(self) -> TextEncoder:
        """The text encoder that the generator reads."""
        config = self.generator.config
        return TextEncoder.checked(config.text_encoder, config.text_encoder_hash, self.device)

    @functools.cached_property
    def alignment_encoder(self) -> TextEncoder:
        """The text encoder that the codes are aligned with. Raises ValueError where they are not."""
        check_aligned(self.tokenizer)
        return text_encoder_of(self.tokenizer)

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """First digits of the SHA-256 of the weights of each part that is there."""
        parts = ("tokenizer", "generator", "captioner")
        files = {part: self.directory / part / WEIGHTS_FILE for part in parts}
        return {part: file_hash(path) for part, path in files.items() if path.is_file()}

    def text_states(self, prompts: Sequence[str]) -> TokenStates:
        """Token states of each prompt, encoded by itself so that no other prompt can matter.

        Raises ValueError for an empty prompt; warns, naming the words, when one is longer than the generator
        reads.
        """
        check_prompts(prompts)
        return self.text_encoder.token_states(prompts, self.generator.config.max_text_tokens, batch_size=1)

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SamplingConfig | None = None,
        *,
        best_of: int = 1,
        rank_by: RankBy = "sum",
    ) -> list[Generated]:
        """Draw one picture a prompt.

        The picture depends on its prompt, its seed and the settings alone.

        Args:
            prompts: B texts.
            seeds: B integers, at least 0.
            settings: guidance scale, temperature, top-k and top-p; the defaults if None.
            best_of: candidates a prompt, of which `rank` chooses one. Candidate 0 has the seed itself.
            rank_by: what `rank` goes by.
        """
        settings = settings or SamplingConfig()
        candidates = self.candidates(prompts, seeds, settings, best_of)
        results = []
        for prompt, seed, ids in zip(prompts, seeds, candidates, strict=True):
            chosen = int(self.rank(ids, prompt, rank_by).argmax()) if best_of > 1 else 0
            more = {"best_of": best_of} | ({"rank_by": rank_by} if best_of > 1 else {})
            results.append(self._generated(ids[chosen], prompt, seed, settings, more))
        return results

    def candidates(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingConfig, count: int
    ) -> Tensor:
        """The ids of the pictures among which `generate` chooses: (B, count, N)."""
        if count < 1:
            raise ValueError(f"best_of is {count}, expected 1 or more")
        texts = self.text_states(prompts)
        rows = [index for index in range(len(prompts)) for _ in range(count)]
        own = TokenStates(texts.states[rows], texts.mask[rows])
        drawn_seeds = [mixed_seed(seed, n) if n else seed for seed in seeds for n in range(count)]
        return sample(self.generator, own, drawn_seeds, settings).unflatten(0, (-1, count))

    def _generated(
        self, ids: Tensor, prompt: str, seed: int, settings: SamplingConfig, more: dict[str, Any]
    ) -> Generated:
        recipe = {
            "prompt": prompt,
            "seed": seed,
            "settings": dataclasses.asdict(settings),
            **more,
            "checkpoints": {part: self.hashes[part] for part in ("tokenizer", "generator")},
            "version": importlib.metadata.version("ta-vq"),
        }
        return Generated(self.decode(ids.unsqueeze(0))[0], ids.view(self.tokenizer.grid_size).cpu(), recipe)

    def stream(
        self, prompt: str, seed: int, settings: SamplingConfig | None = None, *, every_rows: int = 1
    ) -> Iterator[Generated]:
        """Draw one picture and yield it every `every_rows` rows of tokens; stop iterating to cancel.

        What is not drawn yet is grey. The last picture equals that of `generate`.
        """
        settings = settings or SamplingConfig()
        texts = self.text_states([prompt])
        for partial in stream(self.generator, texts, [seed], settings, every_rows=every_rows):
            drawn = self._generated(partial.ids[0], prompt, seed, settings, {"best_of": 1})
            known = partial.known[0].view(1, 1, *self.tokenizer.grid_size).float().cpu()
            yield dataclasses.replace(drawn, image=_blend(drawn.image, None, known))

    def rank(self, ids: Tensor, prompt: str, by: RankBy = "sum") -> Tensor:
        """Score pictures of one prompt by the chain's own parts: (B, N) -> (B,), larger fits better.

        `likelihood` is the captioner's log-likelihood of the prompt (nats); `alignment` the score of
        the prompt's vector against the codes (ValueError for a plain tokenizer); `sum` adds the two, each
        standardised over the candidates.
        """
        if by not in get_args(RankBy):
            raise ValueError(f"rank_by is {by!r}; choose {', '.join(get_args(RankBy))}")
        scores = []
        if by != "alignment":
            scores.append(log_likelihood(self.captioner, ids, [prompt] * len(ids)).float().cpu())
        if by != "likelihood":
            check_aligned(self.tokenizer, NUM_LEVELS)
            vector = self.alignment_encoder.encode([prompt])
            scores.append(alignment_scores(self.tokenizer, ids, vector)[:, 0].float().cpu())
        return fit_of(scores)

    def caption(
        self,
        images: Sequence[Image.Image],
        settings: DecodingConfig | None = None,
        *,
        with_patches: bool = False,
    ) -> list[list[Caption]]:
        """Describe pictures: for each, `settings.n_best` captions, the best first."""
        ids = self.encode(images)
        return decode_captions(
            self.captioner, ids, settings, with_patches=with_patches, alignment_score=self._alignment_score
        )

    def _alignment_score(self, ids: Tensor, texts: Sequence[Sequence[str]]) -> Tensor:
        """How well each image's codes (B, N) fit its own C texts: (B, C) in [-2, 0]."""
        check_aligned(self.tokenizer, NUM_LEVELS)
        vectors = self.alignment_encoder.encode([text for group in texts for text in group])
        groups = vectors.split(len(texts[0]))
        scores = [alignment_scores(self.tokenizer, *pair) for pair in zip(ids.split(1), groups, strict=True)]
        return torch.cat(scores).float().cpu()

    def reconstruct(self, images: Sequence[Image.Image]) -> list[Reconstruction]:
        """Encode and decode pictures; they come back square, at the tokenizer's resolution."""
        ids = self.encode(images)
        return [Reconstruction(*pair) for pair in zip(self.decode(ids), ids.cpu(), strict=True)]

    def heatmaps(self, image: Image.Image, text: str) -> list[UnitMap]:
        """Where each word, phrase and sentence of `text` lies on a picture, words first.

        A generated picture goes in as pixels, like any other. Raises ValueError for a plain tokenizer or an
        empty text.
        """
        return unit_maps(self.tokenizer, image, text, self.alignment_encoder.encode)

    def complete(
        self,
        image: Image.Image,
        mask: Tensor,
        prompt: str,
        seeds: Sequence[int],
        settings: SamplingConfig | None = None,
    ) -> list[Generated]:
        """Draw the masked part of a picture anew; the tokens and the pixels outside the mask stay.

        Args:
            image: any size; squashed to the square.
            mask: (H, W) bool, any size, True where the picture is drawn anew. A token is drawn when any of
                its pixels is.
            prompt: what the whole picture shows.
            seeds: one picture each.
        """
        settings = settings or SamplingConfig()
        size = self.tokenizer.decode_size_px
        pixels = F.interpolate(mask[None, None].float(), size=(size, size), mode="area") > 0
        drawn = F.adaptive_max_pool2d(pixels.float(), self.tokenizer.grid_size)[0, 0] > 0
        if not drawn.any():
            raise ValueError("the mask is empty: nothing is to be drawn; mark the part that shall change")
        kept = ~drawn.flatten().expand(len(seeds), -1)
        results = self._drawn_around(image, kept, prompt, seeds, settings)
        original = to_pil(to_tensor(image, size).unsqueeze(0))[0]
        return [dataclasses.replace(r, image=_blend(r.image, original, pixels.float())) for r in results]

    def vary(
        self,
        image: Image.Image,
        share: float,
        prompt: str,
        seeds: Sequence[int],
        settings: SamplingConfig | None = None,
    ) -> list[Generated]:
        """Draw variations of a picture: a random share of its tokens stays, others for each seed.

        Args:
            image: any size; squashed to the square.
            share: of the tokens that stay, above 0 and below 1.
            prompt: what the pictures show.
            seeds: one picture each.
        """
        num_tokens = self.tokenizer.grid_size[0] * self.tokenizer.grid_size[1]
        count = round(share * num_tokens)
        if not 0 < count < num_tokens:
            raise ValueError(f"the share of tokens that stay is {share}, expected above 0 and below 1")
        kept = torch.zeros(len(seeds), num_tokens, dtype=torch.bool)
        for row, seed in zip(kept, seeds, strict=True):
            row[torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed))[:count]] = True
        return self._drawn_around(image, kept, prompt, seeds, settings or SamplingConfig())

    def _drawn_around(
        self, image: Image.Image, kept: Tensor, prompt: str, seeds: Sequence[int], settings: SamplingConfig
    ) -> list[Generated]:
        """Draw the tokens of `image` anew but for those `kept` (B, N); one picture a seed."""
        texts = _repeated(self.text_states([prompt]), 0, len(seeds))
        given = self.encode([image])[0].flatten().expand(len(seeds), -1)
        ids = sample(
            self.generator, texts, seeds, settings, given_ids=given, given_mask=kept.to(given.device)
        )
        more = {"completed_tokens": int((~kept[0]).sum())}
        return [self._generated(row, prompt, s, settings, more) for row, s in zip(ids, seeds, strict=True)]

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures -> ids (B, h, w); one at a time, so that a picture's ids never depend on the others."""
        if not images:
            raise ValueError("no image given; name at least one")
        size = self.tokenizer.image_size_px
        tensors = (to_tensor(image, size).unsqueeze(0).to(self.device) for image in images)
        return torch.cat([self.tokenizer.encode(tensor) for tensor in tensors])

    def decode(self, ids: Tensor) -> list[Image.Image]:
        """ids (B, N) or (B, h, w) -> pictures; one at a time, for the same reason."""
        return [to_pil(self.tokenizer.decode(row.unsqueeze(0)))[0] for row in ids]


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise ValueError where a prompt is empty."""
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("the prompt is empty; describe the picture in a few words")


def read_recipe(path: Path) -> dict[str, Any]:
    """Read the recipe in a PNG that `Generated.save` wrote, in this version or an earlier one.

    Raises:
        ValueError: the file carries none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no picture {path}; name a PNG that tavq generate wrote")
    with Image.open(path) as image:
        text = getattr(image, "text", {}).get(RECIPE_FIELD)
    if text is None:
        raise ValueError(f"{path} carries no recipe; only PNG files that tavq generate wrote do")
    recipe = json.loads(text)
    recipe["settings"] = {RENAMED_FIELDS.get(name, name): value for name, value in recipe["settings"].items()}
    return recipe


def recipe_line(recipe: dict[str, Any]) -> str:
    """The recipe as one prompt line and one line of settings."""
    settings = {"Seed": recipe["seed"], **recipe["settings"], "Version": f"ta-vq {recipe['version']}"}
    return recipe["prompt"] + "\n" + ", ".join(f"{name}: {value}" for name, value in settings.items())


def _repeated(texts: TokenStates, index: int, count: int) -> TokenStates:
    return TokenStates(
        texts.states[index : index + 1].expand(count, -1, -1), texts.mask[index : index + 1].expand(count, -1)
    )


def fit_of(scores: Sequence[Tensor]) -> Tensor:
    """What candidates are ranked by: one kind of score (..., C), or the sum of several, each standardised
    over the C candidates."""
    if len(scores) == 1:
        return scores[0]
    deviations = (s.std(-1, keepdim=True).clamp_min(1e-6) for s in scores)
    total = torch.zeros_like(scores[0])
    for s, d in zip(scores, deviations, strict=True):
        total = total + (s - s.mean(-1, keepdim=True)) / d
    return total


def _blend(image: Image.Image, under: Image.Image | None, share: Tensor) -> Image.Image:
    """`image` where `share` (1, 1, h, w) is 1, `under` (grey if None) where it is 0."""
    size = image.width
    alpha = F.interpolate(share, size=(size, size), mode="nearest")
    below = torch.full((1, 3, size, size), UNKNOWN_GREY) if under is None else to_tensor(under, size)[None]
    return to_pil(alpha * to_tensor(image, size)[None] + (1 - alpha) * below)[0]
