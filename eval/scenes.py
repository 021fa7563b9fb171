"""tavq eval scenes [--checkpoint DIR] [--split test] [--reader FILE]

Measure a checkpoint on generated scenes, whose truth is known: where maps peak, whether own texts beat their
false twins, what captions name, and what generated images show.

Shapes: n images, h w token grid, U queries, M text width.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tavq.alignment.config import LEVEL_NAMES
from tavq.base.progress import Progress
from tavq.base.weights import CONFIG_FILE
from tavq.captioner.config import DecodingConfig, Style
from tavq.captioner.decoding import decode_captions
from tavq.captioner.likelihood import log_likelihood
from tavq.data.embedding_cache import EmbeddingCache
from tavq.data.images import to_tensor
from tavq.data.scenes import (
    COLOURS,
    EXCHANGES,
    KINDS,
    RADII,
    TEXTURES,
    Box,
    Look,
    Scene,
    caption_of,
    draw,
    exchanged,
    long_text_of,
    make_scene,
    statements_of,
)
from tavq.eval.config import SceneEvaluation
from tavq.eval.evaluation import open_evaluation, print_report, protocol_fields
from tavq.eval.results import make_protocol, with_intervals, write_results
from tavq.eval.scene_reader import SUBJECTS, SceneReader, open_reader, score_drawing
from tavq.metrics.captions import caption_metrics
from tavq.metrics.objects import compare_objects
from tavq.metrics.pointing import cells_inside, pointing_score
from tavq.pipeline import Pipeline
from tavq.tokenizer.heatmaps import text_plan
from tavq.tokenizer.model import TAVQTokenizer
from tavq.tokenizer.retrieval import alignment_scores

Rows = dict[str, np.ndarray]
"""Metric -> one value per image, (n,)."""

Encode = Callable[[Sequence[str]], Tensor]
"""Texts -> vectors (U, M) of unit length, by the encoder that the codes are aligned with."""

IMAGES_AT_ONCE = 20
ATTRIBUTES = ("kind", "colour", "texture", "size")
GRANULARITIES: dict[str, Callable[[Look], object]] = {
    "shape": lambda look: look.kind,
    "colour and shape": lambda look: (look.colour, look.kind),
    "all attributes": lambda look: look,
}
_LOOK = re.compile(
    r"\b(" + r") (".join("|".join(words) for words in (RADII, COLOURS, TEXTURES, KINDS)) + r")\b"
)


@dataclasses.dataclass(frozen=True)
class Query:
    """A text unit, and the objects that it names."""

    kind: int
    """1 a word, 2 a phrase, 3 a sentence."""
    name: str
    text: str
    boxes: tuple[Box, ...]


def evaluate_scenes(run: SceneEvaluation) -> None:
    """Measure a checkpoint on the scenes of a split, and write the result file."""
    started = time.monotonic()
    pipeline, dataset = open_evaluation(run, ("tokenizer",))
    if dataset.name != "scenes":
        raise ValueError(f"--data is {run.data}, whose truth is not known; leave it out, or write scenes")
    scenes = [make_scene(run.split, index) for index in range(len(dataset))]
    has = {part: (pipeline.directory / part / CONFIG_FILE).is_file() for part in ("captioner", "generator")}
    ids = encode_levels(pipeline, scenes)

    per_image: Rows = {}
    floors: dict[str, float] = {}
    if pipeline.tokenizer.aligned_levels:
        encode = EmbeddingCache(pipeline.alignment_encoder).encode  # every variant is asked the same texts
        hits, chances = pointing_game(pipeline.tokenizer, scenes, ids, encode)
        per_image |= hits | alignment_binding(pipeline.tokenizer, scenes, ids, encode)
        floors |= chances
    if has["captioner"]:
        per_image |= captioner_binding(pipeline, scenes, ids)
        named, of_the_next = captions_of(pipeline, scenes, ids)
        per_image |= named
        floors |= of_the_next
    if has["generator"]:
        shown, references = drawings_of(run, pipeline, scenes, ids)
        per_image |= shown
        floors |= references
    if not per_image:
        raise ValueError(f"{run.checkpoint} is neither aligned with text nor has captioner or generator")

    metrics = with_intervals(per_image)
    fields = {"sampling": dataclasses.asdict(run.sampling)} if has["generator"] else {}
    protocol = make_protocol(
        task="scenes",
        ids=dataset.ids,
        started=started,
        **protocol_fields(run, pipeline, dataset),
        **fields,
        floors=floors,
    )
    path = run.result_path("scenes")
    write_results(path, metrics, protocol, per_image=per_image, ids=dataset.ids)
    print_report(run, path, metrics, protocol)


def encode_levels(pipeline: Pipeline, scenes: Sequence[Scene]) -> Tensor:
    """Return the ids of all levels of each scene, (n, 3, h, w)."""
    size = pipeline.tokenizer.image_size_px
    images = (to_tensor(draw(scene), size)[None].to(pipeline.device) for scene in scenes)
    return torch.cat([pipeline.tokenizer.encode_levels(image) for image in images])


def queries_of(scene: Scene) -> list[Query]:
    """Return what is looked for in a scene; a word such as "red" belongs to all red objects."""
    queries: dict[tuple[int, str, str], list[Box]] = defaultdict(list)
    for thing in scene.things:
        look = thing.look
        for attribute in ATTRIBUTES:
            queries[1, attribute, getattr(look, attribute)].append(thing.box)
        queries[2, "colour and shape", f"{look.colour} {look.kind}"].append(thing.box)
        queries[2, "all attributes", look.words].append(thing.box)
        queries[3, "caption", caption_of(scene, thing)].append(thing.box)
    return [Query(*key, tuple(boxes)) for key, boxes in queries.items()]


def pointing_game(
    tokenizer: TAVQTokenizer, scenes: Sequence[Scene], ids: Tensor, encode: Encode
) -> tuple[Rows, dict[str, float]]:
    """Score the maps of each scene's words, phrases and sentences, on the levels they are aligned with.

    Returns:
        Mean score of the queries of each image, by kind of unit; and as floors the chance of each.
    """
    scores: dict[str, list[float]] = defaultdict(list)
    chances: dict[str, list[float]] = defaultdict(list)
    for scene, levels in zip(Progress(scenes, desc="pointing", unit="image"), ids, strict=True):
        queries = queries_of(scene)
        hits: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for kind, level in tokenizer.aligned_levels.items():
            asked = [query for query in queries if query.kind == kind]
            vectors = encode([query.text for query in asked])
            maps = maps_of(tokenizer, levels[level - 1], vectors, level)
            for query, heat in zip(asked, maps, strict=True):
                inside = cells_inside(query.boxes, tokenizer.grid_size)
                name = f"pointing, {LEVEL_NAMES[kind - 1].removesuffix('s')}: {query.name}"
                hits[name].append((pointing_score(heat, inside), float(inside.mean())))
        for name, pairs in hits.items():
            score, chance = np.mean(pairs, axis=0)
            scores[name].append(score)
            chances[name].append(chance)
    floors = {f"{name}, chance": float(np.mean(values)) for name, values in chances.items()}
    return {name: np.array(values) for name, values in scores.items()}, floors


@torch.inference_mode()
def maps_of(tokenizer: TAVQTokenizer, ids: Tensor, vectors: Tensor, level: int) -> np.ndarray:
    """Return where the plan lays each text (U, M) on an image: ids (h, w) of `level` -> (U, h, w)."""
    mask = torch.ones(1, len(vectors), dtype=torch.bool, device=ids.device)
    plan, _ = text_plan(tokenizer, ids.flatten()[None], vectors.to(ids.device)[None], mask, level)
    return plan[0].T.unflatten(1, ids.shape).cpu().numpy()


def won(own: float, other: float) -> float:
    """Return 1 if the own text scores higher, 0 if the other one does, and 0.5 for a tie."""
    return 0.5 + 0.5 * float(np.sign(own - other))


def alignment_binding(tokenizer: TAVQTokenizer, scenes: Sequence[Scene], ids: Tensor, encode: Encode) -> Rows:
    """Ask the codes whether a statement fits better than its false twin; with attributes, phrases, too."""
    rows: dict[str, list[float]] = defaultdict(list)

    def fit(row: int, level: int, texts: Sequence[str]) -> float:
        codes = ids[row : row + 1, level - 1]
        return float(alignment_scores(tokenizer, codes, encode(texts), level).mean())

    for row, scene in enumerate(Progress(scenes, desc="binding", unit="image")):
        for what in EXCHANGES:
            own, twin = exchanged(scene, what)
            for kind, level in tokenizer.aligned_levels.items():
                if kind == 3:
                    texts = [[own.text], [twin.text]]
                elif kind == 2 and what == "attributes":
                    texts = [[said.one.words, said.other.words] for said in (own, twin)]
                else:  # both say the same words
                    continue
                name = f"binding by {LEVEL_NAMES[kind - 1]}, {what}"
                rows[name].append(won(*(fit(row, level, side) for side in texts)))
    return {name: np.array(values) for name, values in rows.items()}


def captioner_binding(pipeline: Pipeline, scenes: Sequence[Scene], ids: Tensor) -> Rows:
    """Ask the captioner which of a statement and its false twin is likelier, as the beginning of a long text
    where it writes such."""
    rows: Rows = {}
    for what in EXCHANGES:
        pairs = [exchanged(scene, what) for scene in scenes]
        own = likelihoods(pipeline, ids, [said.text for said, _ in pairs])
        twins = likelihoods(pipeline, ids, [twin.text for _, twin in pairs])
        rows[f"binding by captioner, {what}"] = np.array(
            [won(*pair) for pair in zip(own, twins, strict=True)]
        )
    return rows


def likelihoods(pipeline: Pipeline, ids: Tensor, texts: Sequence[str]) -> list[float]:
    """Return the captioner's log-likelihood of each text given its image; ids (n, 3, h, w)."""
    style = longest_style(pipeline)
    batches = (
        log_likelihood(pipeline.captioner, ids[start:end, -1], texts[start:end], style)
        for start, end in _batches(len(texts))
    )
    return torch.cat(list(batches)).tolist()


def longest_style(pipeline: Pipeline) -> Style:
    """Return the style that names most objects, of those that the captioner writes."""
    return "long" if pipeline.captioner.config.shape.long_words else "short"


def captions_of(pipeline: Pipeline, scenes: Sequence[Scene], ids: Tensor) -> tuple[Rows, dict[str, float]]:
    """Count the objects that the long captions name, and score the short ones by CIDEr.

    References of a short caption are those of all objects of the scene. Without a long style the short
    captions are counted, which leave most objects out.

    Returns:
        Scores of each image; and as floors those of the next image's captions.
    """
    short = decode(pipeline, ids, DecodingConfig(beam=1, no_repeat_ngram=0))
    long = decode(pipeline, ids, DecodingConfig(beam=1, no_repeat_ngram=0, style=longest_style(pipeline)))
    floors = score_captions([*short[1:], short[0]], [*long[1:], long[0]], scenes)
    means = {f"{name}, captions of the next image": float(rows.mean()) for name, rows in floors.items()}
    return score_captions(short, long, scenes), means


def decode(pipeline: Pipeline, ids: Tensor, settings: DecodingConfig) -> list[str]:
    """Return the best caption of each image; ids (n, 3, h, w)."""
    bar = Progress(list(_batches(len(ids))), desc=f"{settings.style} captions")
    groups = (decode_captions(pipeline.captioner, ids[start:end, -1], settings) for start, end in bar)
    return [group[0].text for batch in groups for group in batch]


def score_captions(short: Sequence[str], long: Sequence[str], scenes: Sequence[Scene]) -> Rows:
    """Score one short and one long caption of each scene."""
    rows: dict[str, list[float]] = defaultdict(list)
    for text, scene in zip(long, scenes, strict=True):
        named, present = looks_in(text), [thing.look for thing in scene.things]
        for granularity, part in GRANULARITIES.items():
            counts = compare_objects([part(look) for look in named], [part(look) for look in present])
            rows[f"captions, {granularity}: right"].append(counts.precision)
            rows[f"captions, {granularity}: left out"].append(1 - counts.recall)
    names = [f"{row:06d}" for row in range(len(scenes))]
    references = {
        name: [caption_of(scene, thing) for thing in scene.things]
        for name, scene in zip(names, scenes, strict=True)
    }
    cider = caption_metrics(
        dict(zip(names, short, strict=True)), references, backend="python", metrics=("CIDEr",)
    )
    return {name: np.array(values) for name, values in rows.items()} | {
        "CIDEr": cider.statistics["CIDEr"][:, 0]
    }


def looks_in(text: str) -> list[Look]:
    """Return the objects that a text names by all their attributes, each once."""
    return list(dict.fromkeys(Look(*words) for words in _LOOK.findall(text.lower())))


def drawings_of(
    run: SceneEvaluation, pipeline: Pipeline, scenes: Sequence[Scene], ids: Tensor
) -> tuple[Rows, dict[str, float]]:
    """Generate an image from the short and one from the long text of each scene, and read what it shows.

    Returns:
        Scores of each image, those of the reconstructions and of the next prompt's images among them; and as
        reference points those of the drawn scenes, which are the reader's own accuracy.
    """
    reader = open_reader(run.reader)
    rows = read_images(reader, pipeline.decode(ids[:, -1]), scenes, "reconstructions")
    truth = read_images(reader, [draw(scene) for scene in scenes], scenes, "reconstructions")
    floors = {f"{name}, drawn scenes": float(values.mean()) for name, values in truth.items()}

    prompts = {
        "drawing, short": [caption_of(scene, scene.things[0]) for scene in scenes],
        "drawing, long": [long_text_of(scene) for scene in scenes],
    }
    for name, texts in prompts.items():
        results = pipeline.generate_each(texts, range(len(texts)), run.sampling)
        generated = [result.image for result in Progress(results, total=len(texts), desc=name)]
        rows |= read_images(reader, generated, scenes, name)
        # Whoever draws many objects shows some of any prompt: the floor belongs to the generator.
        rows |= read_images(reader, [*generated[1:], generated[0]], scenes, f"{name}, shuffled")
    return rows, floors


def read_images(
    reader: SceneReader, images: Iterable[Image.Image], scenes: Sequence[Scene], name: str
) -> Rows:
    """Score each image against its scene; those of short prompts against the one object that these name."""
    is_short = "short" in name
    scores = []
    for image, scene in zip(images, scenes, strict=True):
        things = scene.things[:1] if is_short else scene.things
        statements = [] if is_short else statements_of(scene)
        scores.append(score_drawing(reader.read(image), [thing.look for thing in things], statements))
    columns = np.array(scores).T
    names = [f"{name}: {subject}" for subject in SUBJECTS[: len(columns)]]
    return dict(zip(names, columns, strict=True))


def _batches(count: int) -> Iterable[tuple[int, int]]:
    return ((start, start + IMAGES_AT_ONCE) for start in range(0, count, IMAGES_AT_ONCE))
