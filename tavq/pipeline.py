"""Where tokenizer, generator and captioner meet: text to image, image to text, reconstruction, completion.

The command line, the demo and the evaluations all call `Pipeline`, so that what is measured is what is shown.

Shapes: B images, H W image size in px, h w token grid, N = h*w image tokens, G captions or candidates of each
image or prompt (a group).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self, get_args

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tavq.alignment.config import NUM_LEVELS
from tavq.base.seeding import mixed_seed
from tavq.base.weights import CHECKPOINT, local_directory, part_hashes, shipped_checkpoint
from tavq.captioner.config import DecodingConfig
from tavq.captioner.decoding import decode_captions
from tavq.captioner.likelihood import log_likelihood
from tavq.captioner.model import Captioner
from tavq.conditions import Conditions
from tavq.data.images import ImageSource, blend, open_image, open_images, to_pil, to_tensor
from tavq.data.text_encoder import TextEncoder
from tavq.generator.config import SamplingConfig
from tavq.generator.sampling import sample, stream
from tavq.inputs import Job, jobs_of, mask_of, with_options
from tavq.prompts import check_prompts
from tavq.ranking import RankBy, combine_scores
from tavq.results import Captions, Generated, Reconstruction, read_recipe, recipe_line
from tavq.tokenizer.foreign import open_tokenizer
from tavq.tokenizer.heatmaps import UnitMap, check_aligned, unit_maps
from tavq.tokenizer.retrieval import alignment_scores, text_encoder_of

__all__ = [
    "CHECKPOINT",
    "Captions",
    "Generated",
    "Pipeline",
    "Reconstruction",
    "check_prompts",
    "read_recipe",
    "recipe_line",
]


class Pipeline(Conditions):
    """Tokenizer, generator and captioner, from a directory that holds a checkpoint of each.

    Generator, captioner, lexicon and text encoder are loaded when they are first needed.

    Args:
        directory: holds `tokenizer/`, `generator/`, `captioner/` and `lexicon/`. A part that is never used
            may be absent.
        device: that all models run on.
    """

    def __init__(self, directory: Path, device: str = "cpu"):
        self.directory = directory
        self.device = torch.device(device)
        self.tokenizer = open_tokenizer(directory / "tokenizer").to(self.device)

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
    def captioner(self) -> Captioner:
        """The captioner. Raises ValueError if it was trained on ids of another codebook."""
        captioner = Captioner.from_pretrained(self.directory / "captioner").to(self.device)
        captioner.check_codebook(self.tokenizer.codebook_hash)
        return captioner

    @functools.cached_property
    def alignment_encoder(self) -> TextEncoder:
        """The text encoder that the codes are aligned with. Raises ValueError for a plain tokenizer."""
        check_aligned(self.tokenizer)
        return text_encoder_of(self.tokenizer)

    @functools.cached_property
    def hashes(self) -> dict[str, str]:
        """First digits of the SHA-256 of the weights of each part that the directory holds."""
        return part_hashes(self.directory)

    def generate(
        self,
        prompt: str | Sequence[str] | None,
        seed: int | Sequence[int] = 0,
        settings: SamplingConfig | None = None,
        *,
        num_images: int = 1,
        num_images_per_prompt: int | None = None,
        images: ImageSource | Sequence[ImageSource] | None = None,
        image_words: int = 4,
        negative_prompt: str | Sequence[str] | None = None,
        best_of: int = 1,
        rank_by: RankBy = "sum",
        **sampling: Any,
    ) -> list[Generated]:
        """Generate images from text, from other images, or from both.

        An image depends on its prompt, its seed, the other images and the settings alone.

        Args:
            prompt: one text or several. None takes the learned null text, without guidance: unconditional
                generation, or generation from `images` alone.
            seed: image i of each prompt has seed + i; -1 chooses a seed at random. Several seeds are one per
                prompt; with a single prompt, one per image.
            settings: guidance scale, temperature, top-k and top-p; the defaults if None.
            num_images: images per prompt.
            num_images_per_prompt: the name of `num_images` in diffusers.
            images: what the generated ones shall be like, one image or several: a subject, or scenes to mix.
                With a prompt, guidance leads from the images alone to images and prompt.
            image_words: words that each of `images` is written in (see `Lexicon`): few keep the gist, many
                the lay-out. They share the generator's slots with the prompt.
            negative_prompt: text that guidance leads away from, in place of the learned null text; one for
                all prompts, or one per prompt. A blank one counts as none.
            best_of: candidates per image, of which the one that `rank` scores highest is returned.
            rank_by: score that `rank` uses.
            sampling: fields of `SamplingConfig` that replace those of `settings`, such as guidance_scale=3.

        Returns:
            All images of the first prompt, then those of the next one.
        """
        count = num_images if num_images_per_prompt is None else num_images_per_prompt
        return list(
            self.generate_each(
                prompt,
                seed,
                settings,
                num_images=count,
                images=images,
                image_words=image_words,
                negative_prompt=negative_prompt,
                best_of=best_of,
                rank_by=rank_by,
                **sampling,
            )
        )

    def generate_each(
        self,
        prompt: str | Sequence[str] | None,
        seed: int | Sequence[int] = 0,
        settings: SamplingConfig | None = None,
        *,
        num_images: int = 1,
        images: ImageSource | Sequence[ImageSource] | None = None,
        image_words: int = 4,
        negative_prompt: str | Sequence[str] | None = None,
        best_of: int = 1,
        rank_by: RankBy = "sum",
        **sampling: Any,
    ) -> Iterator[Generated]:
        """Like `generate`, but yield each image as soon as its micro-batch is sampled."""
        settings = with_options(settings or SamplingConfig(), sampling)
        if best_of < 1:
            raise ValueError(f"best_of is {best_of}, expected 1 or more")
        if prompt is None:
            if best_of > 1 or negative_prompt:
                raise ValueError("best_of and negative_prompt need a prompt; leave them out, or give one")
            if images is None:
                settings = dataclasses.replace(settings, guidance_scale=1.0)  # there is nothing to be led to
        words = None if images is None else self.image_words(self.encode(images), image_words)
        jobs = jobs_of(prompt, seed, num_images, negative_prompt)
        candidates = self._sample_candidates(jobs, settings, best_of, words)
        for job, ids in zip(jobs, candidates, strict=True):
            best = 0
            more: dict[str, Any] = {"best_of": best_of}
            if words is not None:
                more["image_words"] = len(words)
            if best_of > 1:
                best = int(self.rank(ids, job.prompt, rank_by).argmax())
                more["rank_by"] = rank_by
            yield self._generated(ids[best], job, settings, more)

    def candidates(
        self, prompts: Sequence[str], seeds: Sequence[int], settings: SamplingConfig, count: int
    ) -> Tensor:
        """Sample the ids of `count` candidates per prompt: (B, count, N)."""
        jobs = jobs_of(prompts, seeds)
        return torch.stack(list(self._sample_candidates(jobs, settings, count)))

    def _sample_candidates(
        self, jobs: Sequence[Job], settings: SamplingConfig, count: int, words: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yield the ids (count, N) of the candidates of each image."""
        # Candidate 0 has the seed itself: it is the image that `generate` returns with best_of=1.
        seeds = [mixed_seed(job.seed, n) if n else job.seed for job in jobs for n in range(count)]
        texts, negative = self.conditions([job for job in jobs for _ in range(count)], words)

        done = 0
        for partial in stream(self.generator, texts, seeds, settings, negative=negative):
            sampled = int(partial.known.all(1).sum())  # micro-batches are sampled in order
            while (done + 1) * count <= sampled:
                yield partial.ids[done * count : (done + 1) * count]
                done += 1

    def _generated(self, ids: Tensor, job: Job, settings: SamplingConfig, more: dict[str, Any]) -> Generated:
        """Decode ids (N,), and write the recipe; `more` holds its fields that `settings` does not have."""
        negative = {} if job.negative is None else {"negative_prompt": job.negative}
        recipe = {
            "prompt": job.prompt,
            **negative,
            "seed": job.seed,
            "settings": dataclasses.asdict(settings),
            **more,
            "checkpoints": {part: self.hashes[part] for part in ("tokenizer", "generator")},
            "version": importlib.metadata.version("ta-vq"),
        }
        return Generated(self.decode(ids.unsqueeze(0))[0], ids.view(self.tokenizer.grid_size).cpu(), recipe)

    def stream(
        self,
        prompt: str,
        seed: int = 0,
        settings: SamplingConfig | None = None,
        *,
        negative_prompt: str | None = None,
        every_rows: int = 1,
        **sampling: Any,
    ) -> Iterator[Generated]:
        """Generate one image and yield it every `every_rows` rows of tokens; stop iterating to cancel.

        The part that is not sampled yet is grey. The last image equals that of `generate`, whose arguments
        these are.
        """
        settings = with_options(settings or SamplingConfig(), sampling)
        for (generated,) in self.stream_together(
            [prompt], [seed], settings, [negative_prompt or ""], every_rows=every_rows
        ):
            yield generated

    def stream_together(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SamplingConfig,
        negative_prompts: Sequence[str],
        *,
        every_rows: int = 1,
    ) -> Iterator[list[Generated]]:
        """Like `stream`, with several images that grow together; at most `settings.micro_batch` of them.

        Raises:
            ValueError: there are more.
        """
        jobs = jobs_of(prompts, seeds, 1, negative_prompts)
        if len(jobs) > settings.micro_batch:
            raise ValueError(
                f"got {len(jobs)} images to stream with micro_batch {settings.micro_batch}; raise it"
            )
        texts, away = self.conditions(jobs)
        grid = (1, 1, *self.tokenizer.grid_size)
        for partial in stream(
            self.generator, texts, [job.seed for job in jobs], settings, negative=away, every_rows=every_rows
        ):
            shown = []
            for job, ids, known in zip(jobs, partial.ids, partial.known, strict=True):
                generated = self._generated(ids, job, settings, {"best_of": 1})
                seen = known.view(grid).float().cpu()
                shown.append(dataclasses.replace(generated, image=blend(generated.image, None, seen)))
            yield shown

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
        images: ImageSource | Sequence[ImageSource],
        settings: DecodingConfig | None = None,
        *,
        with_patches: bool = False,
        **decoding: Any,
    ) -> list[Captions]:
        """Caption images.

        Args:
            images: one image or several, of any size: paths, PIL images or arrays (see `open_image`).
            settings: options for decoding; the defaults if None.
            with_patches: give each word its attention over the image tokens (slower).
            decoding: fields of `DecodingConfig` that replace those of `settings`, such as n_best=3.

        Returns:
            For each image its captions: `.text` is the best one, and all `n_best` are the items.
        """
        settings = with_options(settings or DecodingConfig(), decoding)
        opened = open_images(images)
        groups = decode_captions(
            self.captioner,
            self.encode(opened),
            settings,
            with_patches=with_patches,
            alignment_score=self._alignment_score,
        )
        return [Captions(image, group) for image, group in zip(opened, groups, strict=True)]

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

    def reconstruct(self, images: ImageSource | Sequence[ImageSource]) -> list[Reconstruction]:
        """Encode and decode one image or several. The reconstructions are square."""
        ids = self.encode(images)
        decoded = self.decode(ids)
        return [Reconstruction(image, grid) for image, grid in zip(decoded, ids.cpu(), strict=True)]

    def heatmaps(self, image: ImageSource, text: str) -> list[UnitMap]:
        """Map each word, phrase and sentence of `text` to its place on the image, words first.

        Raises:
            ValueError: the tokenizer is plain, or the text is empty.
        """
        return unit_maps(self.tokenizer, open_image(image), text, self.alignment_encoder.encode)

    def complete(
        self,
        image: ImageSource,
        mask: Tensor | ImageSource,
        prompt: str,
        seed: int | Sequence[int] = 0,
        settings: SamplingConfig | None = None,
        *,
        num_images: int = 1,
        negative_prompt: str | None = None,
        **sampling: Any,
    ) -> list[Generated]:
        """Generate the masked part of an image anew (inpainting); tokens and pixels outside the mask stay.

        Args:
            image: any size; resized to a square.
            mask: (H, W) bool, any size, True where the image is generated anew; or an image that is white
                there. A token is sampled if any of its pixels is masked.
            prompt: text for the whole image.
            seed: image i has seed + i; -1 chooses a seed at random. Several seeds are one per image.
            settings: options for sampling; the defaults if None.
            num_images: images to generate.
            negative_prompt: text that guidance leads away from.
            sampling: fields of `SamplingConfig` that replace those of `settings`.

        Raises:
            ValueError: the mask is empty.
        """
        image = open_image(image)
        size = self.tokenizer.decode_size_px
        # "area" and not "nearest": a masked stripe thinner than a pixel of the square must not get lost.
        pixels = F.interpolate(mask_of(mask)[None, None].float(), size=(size, size), mode="area") > 0
        masked = F.adaptive_max_pool2d(pixels.float(), self.tokenizer.grid_size)[0, 0] > 0
        if not masked.any():
            raise ValueError("the mask is empty: nothing is to be generated; mark the part that shall change")

        jobs = jobs_of(prompt, seed, num_images, negative_prompt)
        settings = with_options(settings or SamplingConfig(), sampling)
        given = ~masked.flatten().expand(len(jobs), -1)
        results = self._sample_around(image, given, jobs, settings)

        # The given tokens come back as a reconstruction; the original's own pixels are laid over it.
        return [dataclasses.replace(r, image=blend(r.image, image, pixels.float())) for r in results]

    def vary(
        self,
        image: ImageSource,
        share: float,
        prompt: str,
        seed: int | Sequence[int] = 0,
        settings: SamplingConfig | None = None,
        *,
        num_images: int = 1,
        negative_prompt: str | None = None,
        **sampling: Any,
    ) -> list[Generated]:
        """Generate variations of an image: a random fraction of its tokens stays, the others are sampled.

        Args:
            image: any size; resized to a square.
            share: fraction of the tokens that stay, above 0 and below 1.
            prompt: text for the variations.
            seed: as `complete` takes it. The seed of a variation also decides which tokens stay.
            settings: options for sampling; the defaults if None.
            num_images: variations to generate.
            negative_prompt: text that guidance leads away from.
            sampling: fields of `SamplingConfig` that replace those of `settings`.
        """
        h, w = self.tokenizer.grid_size
        num_tokens = h * w
        count = round(share * num_tokens)
        if not 0 < count < num_tokens:
            raise ValueError(f"the share of tokens that stay is {share}, expected above 0 and below 1")

        jobs = jobs_of(prompt, seed, num_images, negative_prompt)
        settings = with_options(settings or SamplingConfig(), sampling)
        given = torch.zeros(len(jobs), num_tokens, dtype=torch.bool)
        for row, job in zip(given, jobs, strict=True):
            rng = torch.Generator().manual_seed(job.seed)
            row[torch.randperm(num_tokens, generator=rng)[:count]] = True
        return self._sample_around(open_image(image), given, jobs, settings)

    def _sample_around(
        self, image: Image.Image, given: Tensor, jobs: Sequence[Job], settings: SamplingConfig
    ) -> list[Generated]:
        """Keep the tokens of `image` where `given` (B, N) is True, and sample the others, for each job."""
        image_ids = self.encode(image)[0].flatten().expand(len(jobs), -1)
        texts, negative = self.conditions(jobs)
        ids = sample(
            self.generator,
            texts,
            [job.seed for job in jobs],
            settings,
            negative=negative,
            given_ids=image_ids,
            given_mask=given.to(image_ids.device),
        )
        more = {"completed_tokens": int((~given[0]).sum())}
        return [self._generated(row, job, settings, more) for row, job in zip(ids, jobs, strict=True)]

    def encode(self, images: ImageSource | Sequence[ImageSource]) -> Tensor:
        """Encode one image or several, of any size: -> (B, h, w) int64."""
        opened = open_images(images)
        if not opened:
            raise ValueError("no image given; name at least one")
        size = self.tokenizer.image_size_px
        tensors = (to_tensor(image, size).unsqueeze(0).to(self.device) for image in opened)
        # One by one: kernels round differently by batch, and no image may change the ids of another.
        return torch.cat([self.tokenizer.encode(tensor) for tensor in tensors])

    def decode(self, ids: Tensor) -> list[Image.Image]:
        """Decode ids (B, N) or (B, h, w), one by one as in `encode`."""
        return [to_pil(self.tokenizer.decode(row.unsqueeze(0)))[0] for row in ids]
