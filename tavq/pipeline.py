"""Where tokenizer, generator and captioner meet: text to image, image to text, reconstruction, completion.

The command line, the demo and the evaluations all call `Pipeline`, so that what is measured is what is shown.

Shapes: B images, H W image size in px, h w token grid, N = h*w image tokens, G captions or candidates of each
image or prompt (a group).
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
RECIPE_FIELD = "tavq"  # PNG text field that holds the recipe as JSON
PARAMETERS_FIELD = "parameters"  # PNG text field that other programs write and show: the recipe for people
RankBy = Literal["likelihood", "alignment", "sum"]
UNKNOWN_GREY = 0.6  # in [-1, 1]; the part of a partial image that is not sampled yet


@dataclasses.dataclass(frozen=True)
class Generated:
    """A generated image, and the recipe that generates it again."""

    image: Image.Image
    ids: Tensor
    """(h, w) int64."""
    recipe: dict[str, Any]
    """Prompt, seed, settings, hashes of the checkpoints, and version."""

    def save(self, path: Path) -> None:
        """Write a PNG that carries its recipe in text fields."""
        fields = PngInfo()
        fields.add_itxt(RECIPE_FIELD, json.dumps(self.recipe))
        fields.add_itxt(PARAMETERS_FIELD, recipe_line(self.recipe))
        write_png(self.image, path, fields)


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """An image that was encoded and decoded."""

    image: Image.Image
    ids: Tensor
    """(h, w) int64."""


class Pipeline:
    """Tokenizer, generator and captioner, from a directory that holds a checkpoint of each.

    Generator, captioner and text encoder are loaded when they are first needed.

    Args:
        directory: holds `tokenizer/`, `generator/` and `captioner/`; a part that is never used may be absent.
        device: that all models run on.
    """

    def __init__(self, directory: Path, device: str = "cpu"):
        self.directory = directory
        self.device = torch.device(device)
        self.tokenizer = TAVQTokenizer.from_pretrained(directory / "tokenizer").to(self.device)

    @classmethod
    def from_pretrained(cls, source: str | Path | None = None, device: str = "cpu", **hub: Any) -> Self:
        """Load from a directory, or from the Hugging Face hub.

        Args:
            source: a directory, or `hf:OWNER/NAME[@REVISION]`; None takes the shipped weights.
            device: that all models run on.
            hub: options of `base.hub.directory_of`: revision, token, cache_dir, local_files_only,
                force_download.

        Raises:
            FileNotFoundError: no checkpoint lies there.
        """
        return cls(shipped_checkpoint() if source is None else local_directory(source, **hub), device)

    @functools.cached_property
    def generator(self) -> GeneratorModel:
        """The generator. Raises ValueError if it was trained on ids of another codebook."""
        generator = GeneratorModel.from_pretrained(self.directory / "generator").to(self.device)
        generator.check_codebook(self.tokenizer.codebook_hash)
        return generator

    @functools.cached_property
    def captioner(self) -> Captioner:
        """The captioner. Raises ValueError if it was trained on ids of another codebook."""
        captioner = Captioner.from_pretrained(self.directory / "captioner").to(self.device)
        captioner.check_codebook(self.tokenizer.codebook_hash)
        return captioner

    @functools.cached_property
    def text_encoder(self) -> TextEncoder:
        """The text encoder that the generator was trained with."""
        config = self.generator.config
        return TextEncoder.checked(config.text_encoder, config.text_encoder_hash, self.device)

    @functools.cached_property
    def alignment_encoder(self) -> TextEncoder:
        """The text encoder that the codes are aligned with. Raises ValueError for a plain tokenizer."""
        check_aligned(self.tokenizer)
        return text_encoder_of(self.tokenizer)

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """First digits of the SHA-256 of the weights of each part that the directory holds."""
        parts = ("tokenizer", "generator", "captioner")
        files = {part: self.directory / part / WEIGHTS_FILE for part in parts}
        return {part: file_hash(path) for part, path in files.items() if path.is_file()}

    def text_states(self, prompts: Sequence[str]) -> TokenStates:
        """Encode prompts for the generator.

        Warns, naming the words, where a prompt is longer than the generator takes.

        Raises:
            ValueError: a prompt is empty.
        """
        check_prompts(prompts)
        # One by one: kernels round differently by batch, and no other prompt may change an image.
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
        """Generate one image per prompt.

        An image depends on its prompt, its seed and the settings alone.

        Args:
            prompts: B texts.
            seeds: B integers, at least 0.
            settings: guidance scale, temperature, top-k and top-p; the defaults if None.
            best_of: candidates per prompt, of which the one that `rank` scores highest is returned.
            rank_by: score that `rank` uses.
        """
        settings = settings or SamplingConfig()
        candidates = self.candidates(prompts, seeds, settings, best_of)

        results = []
        for prompt, seed, ids in zip(prompts, seeds, candidates, strict=True):
            best = 0
            choice: dict[str, Any] = {"best_of": best_of}
            if best_of > 1:
                best = int(self.rank(ids, prompt, rank_by).argmax())
                choice["rank_by"] = rank_by
            results.append(self._generated(ids[best], prompt, seed, settings, choice))
        return results

    def candidates(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingConfig, count: int
    ) -> Tensor:
        """Sample the ids of `count` candidates per prompt: (B, count, N)."""
        if count < 1:
            raise ValueError(f"best_of is {count}, expected 1 or more")

        texts = self.text_states(prompts)
        rows = [index for index in range(len(prompts)) for _ in range(count)]
        repeated = TokenStates(texts.states[rows], texts.mask[rows])

        # Candidate 0 has the seed itself: it is the image that `generate` returns with best_of=1.
        sample_seeds = [mixed_seed(seed, n) if n else seed for seed in seeds for n in range(count)]
        return sample(self.generator, repeated, sample_seeds, settings).unflatten(0, (-1, count))

    def _generated(
        self, ids: Tensor, prompt: str, seed: int, settings: SamplingConfig, more: dict[str, Any]
    ) -> Generated:
        """Decode ids (N,), and write the recipe; `more` holds its fields that `settings` does not have."""
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
        """Generate one image and yield it every `every_rows` rows of tokens; stop iterating to cancel.

        The part that is not sampled yet is grey. The last image equals that of `generate`.
        """
        settings = settings or SamplingConfig()
        texts = self.text_states([prompt])
        for partial in stream(self.generator, texts, [seed], settings, every_rows=every_rows):
            generated = self._generated(partial.ids[0], prompt, seed, settings, {"best_of": 1})
            known = partial.known[0].view(1, 1, *self.tokenizer.grid_size).float().cpu()
            yield dataclasses.replace(generated, image=_blend(generated.image, None, known))

    def rank(self, ids: Tensor, prompt: str, by: RankBy = "sum") -> Tensor:
        """Score candidates of one prompt by how well they match it, with the models of this pipeline alone.

        Args:
            ids: (G, N), the candidates.
            prompt: their prompt.
            by: `likelihood` is the captioner's log-likelihood of the prompt, in nats; `alignment` is the
                alignment score of prompt and codes; `sum` adds both, each standardised over the candidates.

        Returns:
            (G,) float32, larger is better.

        Raises:
            ValueError: alignment is asked for, but the tokenizer is plain.
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
        return combine_scores(scores)

    def caption(
        self,
        images: Sequence[Image.Image],
        settings: DecodingConfig | None = None,
        *,
        with_patches: bool = False,
    ) -> list[list[Caption]]:
        """Caption images.

        Args:
            images: B images of any size.
            settings: options for decoding; the defaults if None.
            with_patches: give each word its attention over the image tokens (slower).

        Returns:
            For each image `settings.n_best` captions, best first.
        """
        ids = self.encode(images)
        return decode_captions(
            self.captioner, ids, settings, with_patches=with_patches, alignment_score=self._alignment_score
        )

    def _alignment_score(self, ids: Tensor, texts: Sequence[Sequence[str]]) -> Tensor:
        """Score each image's ids (B, N) against its G texts: (B, G) in [-2, 0]."""
        check_aligned(self.tokenizer, NUM_LEVELS)
        vectors = self.alignment_encoder.encode([text for group in texts for text in group])
        groups = vectors.split(len(texts[0]))

        # Image by image: `alignment_scores` compares all images it is given with all texts.
        scores = [
            alignment_scores(self.tokenizer, image_ids, group)
            for image_ids, group in zip(ids.split(1), groups, strict=True)
        ]
        return torch.cat(scores).float().cpu()

    def reconstruct(self, images: Sequence[Image.Image]) -> list[Reconstruction]:
        """Encode and decode images. The reconstructions are square."""
        ids = self.encode(images)
        decoded = self.decode(ids)
        return [Reconstruction(image, grid) for image, grid in zip(decoded, ids.cpu(), strict=True)]

    def heatmaps(self, image: Image.Image, text: str) -> list[UnitMap]:
        """Map each word, phrase and sentence of `text` to its place on the image, words first.

        Raises:
            ValueError: the tokenizer is plain, or the text is empty.
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
        """Generate the masked part of an image anew (inpainting); tokens and pixels outside the mask stay.

        Args:
            image: any size; resized to a square.
            mask: (H, W) bool, any size, True where the image is generated anew. A token is sampled if any of
                its pixels is masked.
            prompt: text for the whole image.
            seeds: one per completed image.
            settings: options for sampling; the defaults if None.

        Raises:
            ValueError: the mask is empty.
        """
        size = self.tokenizer.decode_size_px
        # "area" and not "nearest": a masked stripe thinner than a pixel of the square must not get lost.
        pixels = F.interpolate(mask[None, None].float(), size=(size, size), mode="area") > 0
        masked = F.adaptive_max_pool2d(pixels.float(), self.tokenizer.grid_size)[0, 0] > 0
        if not masked.any():
            raise ValueError("the mask is empty: nothing is to be generated; mark the part that shall change")

        given = ~masked.flatten().expand(len(seeds), -1)
        results = self._sample_around(image, given, prompt, seeds, settings or SamplingConfig())

        # The given tokens come back as a reconstruction; the original's own pixels are laid over it.
        return [dataclasses.replace(r, image=_blend(r.image, image, pixels.float())) for r in results]

    def vary(
        self,
        image: Image.Image,
        share: float,
        prompt: str,
        seeds: Sequence[int],
        settings: SamplingConfig | None = None,
    ) -> list[Generated]:
        """Generate variations of an image: a random fraction of its tokens stays, the others are sampled.

        Args:
            image: any size; resized to a square.
            share: fraction of the tokens that stay, above 0 and below 1.
            prompt: text for the variations.
            seeds: one per variation; it also decides which tokens stay.
            settings: options for sampling; the defaults if None.
        """
        h, w = self.tokenizer.grid_size
        num_tokens = h * w
        count = round(share * num_tokens)
        if not 0 < count < num_tokens:
            raise ValueError(f"the share of tokens that stay is {share}, expected above 0 and below 1")

        given = torch.zeros(len(seeds), num_tokens, dtype=torch.bool)
        for row, seed in zip(given, seeds, strict=True):
            rng = torch.Generator().manual_seed(seed)
            row[torch.randperm(num_tokens, generator=rng)[:count]] = True
        return self._sample_around(image, given, prompt, seeds, settings or SamplingConfig())

    def _sample_around(
        self, image: Image.Image, given: Tensor, prompt: str, seeds: Sequence[int], settings: SamplingConfig
    ) -> list[Generated]:
        """Keep the tokens of `image` where `given` (B, N) is True, and sample the others, B times."""
        text = self.text_states([prompt])
        texts = TokenStates(
            text.states.expand(len(seeds), -1, -1),
            text.mask.expand(len(seeds), -1),
        )
        image_ids = self.encode([image])[0].flatten().expand(len(seeds), -1)
        ids = sample(
            self.generator,
            texts,
            seeds,
            settings,
            given_ids=image_ids,
            given_mask=given.to(image_ids.device),
        )
        more = {"completed_tokens": int((~given[0]).sum())}
        return [
            self._generated(row, prompt, seed, settings, more) for row, seed in zip(ids, seeds, strict=True)
        ]

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Encode B images of any size: -> (B, h, w) int64."""
        if not images:
            raise ValueError("no image given; name at least one")
        size = self.tokenizer.image_size_px
        tensors = (to_tensor(image, size).unsqueeze(0).to(self.device) for image in images)
        # One by one: kernels round differently by batch, and no image may change the ids of another.
        return torch.cat([self.tokenizer.encode(tensor) for tensor in tensors])

    def decode(self, ids: Tensor) -> list[Image.Image]:
        """Decode ids (B, N) or (B, h, w), one by one as in `encode`."""
        return [to_pil(self.tokenizer.decode(row.unsqueeze(0)))[0] for row in ids]


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise ValueError if a prompt is empty."""
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("the prompt is empty; describe the image in a few words")


def read_recipe(path: Path) -> dict[str, Any]:
    """Read the recipe from a PNG that `Generated.save` wrote, in this version or an earlier one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file carries no recipe.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no image {path}; name a PNG that tavq generate wrote")
    with Image.open(path) as image:
        text = getattr(image, "text", {}).get(RECIPE_FIELD)
    if text is None:
        raise ValueError(f"{path} carries no recipe; only PNG files that tavq generate wrote do")
    recipe = json.loads(text)
    recipe["settings"] = {RENAMED_FIELDS.get(name, name): value for name, value in recipe["settings"].items()}
    return recipe


def recipe_line(recipe: dict[str, Any]) -> str:
    """Write a recipe as one line with the prompt and one line with the settings."""
    settings = {"Seed": recipe["seed"], **recipe["settings"], "Version": f"ta-vq {recipe['version']}"}
    return recipe["prompt"] + "\n" + ", ".join(f"{name}: {value}" for name, value in settings.items())


def combine_scores(scores: Sequence[Tensor]) -> Tensor:
    """Add up several kinds of scores of the same candidates.

    Args:
        scores: one or more kinds of scores (..., G).

    Returns:
        (..., G). One kind is returned as it is. Several are standardised over the candidates first, since
        nats and alignment scores have no common unit.
    """
    if len(scores) == 1:
        return scores[0]
    total = torch.zeros_like(scores[0])
    for score in scores:
        deviation = score.std(-1, keepdim=True).clamp_min(1e-6)
        total = total + (score - score.mean(-1, keepdim=True)) / deviation
    return total


def _blend(image: Image.Image, background: Image.Image | None, weight: Tensor) -> Image.Image:
    """Show `image` where `weight` (1, 1, h, w) is 1, and `background` (grey if None) where it is 0."""
    size = image.width
    alpha = F.interpolate(weight, size=(size, size), mode="nearest")
    if background is None:
        behind = torch.full((1, 3, size, size), UNKNOWN_GREY)
    else:
        behind = to_tensor(background, size)[None]
    return to_pil(alpha * to_tensor(image, size)[None] + (1 - alpha) * behind)[0]
