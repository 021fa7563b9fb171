"""python eval/caption_baselines.py --data DIR [--features NETWORK.pt] --out results/baselines.json

CIDEr of captions that need no captioner: the reference points beside which a captioner is read. Every caption
comes from the training split:

- a random one;
- the constant one that scores best on the validation split, of some that are tried;
- one of the nearest training image, by the features of a frozen network;
- the consensus of the captions of the nearest images: the caption with the highest mean CIDEr-D to the others
  (Devlin et al. 2015, arXiv:1505.04467).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tavq.base.arguments import parse, run_main
from tavq.base.cache import cache_directory
from tavq.base.device import Device, choose_device
from tavq.base.progress import Progress
from tavq.captioner.reward import CiderD, DocumentFrequencies
from tavq.data.config import default_data
from tavq.data.dataset import ImageTextDataset
from tavq.data.layouts import open_dataset
from tavq.eval.evaluation import RESIZE, print_metrics, reference_set
from tavq.eval.results import caption_fields, make_protocol, with_intervals, write_results
from tavq.metrics.captions import caption_metrics
from tavq.metrics.features import FeatureNetwork, extract_features, load_network
from tavq.metrics.ptb import tokenize


@dataclasses.dataclass(frozen=True)
class CaptionBaselines:
    """Score captions that need no captioner.

    Example: python eval/caption_baselines.py --data flickr8k/ --features mobilenet_v2_features.pt
    """

    data: str = dataclasses.field(default_factory=default_data)
    """Dataset: a directory in any known layout, hf:OWNER/NAME, `shapes` or `scenes`. By default that of
    TAVQ_DATA."""
    split: str = "test"
    """Split whose images are captioned."""
    limit: int | None = None
    """Only the first so many images of each split."""
    features: Path | None = None
    """TorchScript feature network (uint8 B,3,H,W -> B,D). Without it, Inception v3.
    A program: it runs only if networks.lock or TAVQ_TRUST holds its SHA-256."""
    neighbours: int = 25
    """Nearest training images whose captions vote."""
    constants: int = 200
    """Training captions that are tried as the constant one."""
    seed: int = 0
    """Seed of the random captions and of the constants that are tried."""
    out: Path = Path("baselines.json")
    """JSON to write."""
    label: str = "baselines"
    """What tables call this row."""
    device: Device = "auto"
    """Device of the feature network."""


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(CaptionBaselines, argv, prog="python eval/caption_baselines.py")
    started = time.monotonic()
    train, val, test = (
        open_dataset(run.data, split).take(run.limit) for split in ("train", "val", run.split)
    )
    network = load_network(run.features)
    device = choose_device(run.device)

    gallery, queries = (features_of(dataset, network, device) for dataset in (train, test))
    nearest = nearest_rows(gallery, queries, run.neighbours)

    rng = torch.Generator().manual_seed(run.seed)
    captions = {
        "a random training caption": random_captions(train, len(test), rng),
        "the best constant caption": [best_constant(train, val, run.constants, rng)] * len(test),
        "a caption of the nearest training image": [train[int(row[0])].captions[0] for row in nearest],
        f"the consensus of the captions of the {run.neighbours} nearest training images": consensus(
            train, nearest
        ),
    }
    references = {example.id: list(example.captions) for example in test.examples}
    per_image = {}
    for name, texts in captions.items():
        hypotheses = dict(zip(test.ids, texts, strict=True))
        scores = caption_metrics(hypotheses, references, metrics=("CIDEr",), backend="python")
        per_image[f"CIDEr of {name}"] = scores.statistics["CIDEr"]

    metrics = with_intervals(per_image)
    protocol = make_protocol(
        task="baselines",
        ids=scores.ids,
        started=started,
        label=run.label,
        data=test.name,
        split=run.split,
        limit=run.limit,
        **caption_fields(references),
        feature_network={"name": network.name, "sha256": network.sha256},
        resize=RESIZE,
        neighbours=run.neighbours,
        constants=run.constants,
        seed=run.seed,
        constant=captions["the best constant caption"][0],
    )
    write_results(run.out, metrics, protocol)
    print_metrics(metrics, run.out)


def features_of(dataset: ImageTextDataset, network: FeatureNetwork, device: str) -> Tensor:
    """Return the features (n, D) of the images of a split, all of which must be readable."""
    images, readable = reference_set(dataset)
    if len(readable) < len(dataset):
        raise ValueError(f"{len(dataset) - len(readable)} images cannot be read; remove them")
    layers = extract_features(images, network, device=device, cache_dir=cache_directory("image_features"))
    return layers[network.layers["fid"]]


def nearest_rows(gallery: Tensor, queries: Tensor, count: int) -> Tensor:
    """Return the rows of `gallery` that are nearest to each query by cosine, the nearest first.

    Args:
        gallery: (m, D) features.
        queries: (n, D) features.
        count: rows for each query.

    Returns:
        (n, count) int64.
    """
    if not 1 <= count <= len(gallery):
        raise ValueError(
            f"neighbours is {count}, expected 1 to {len(gallery)}, the number of training images"
        )
    similarity = F.normalize(queries.float(), dim=1) @ F.normalize(gallery.float(), dim=1).T
    return similarity.topk(count, dim=1).indices


def random_captions(train: ImageTextDataset, count: int, rng: torch.Generator) -> list[str]:
    """Return so many captions of the training split, sampled with replacement."""
    captions = [caption for example in train.examples for caption in example.captions]
    return [captions[row] for row in torch.randint(len(captions), (count,), generator=rng).tolist()]


def best_constant(train: ImageTextDataset, val: ImageTextDataset, tried: int, rng: torch.Generator) -> str:
    """Return the training caption, of `tried` that are sampled, with the best CIDEr on the val split."""
    candidates = random_captions(train, tried, rng)
    cider = CiderD([words_of(example.captions) for example in val.examples])
    images = range(len(val))
    scores = [
        cider.scores([words] * len(val), images).mean()
        for words in Progress(words_of(candidates), desc="constant captions")
    ]
    return candidates[scores.index(max(scores))]


def consensus(train: ImageTextDataset, nearest: Tensor) -> list[str]:
    """Return for each row of `nearest` (n, k) the caption most like the others of these training images."""
    words = [words_of(example.captions) for example in train.examples]
    frequencies = DocumentFrequencies.of(words)
    chosen = []
    for rows in Progress(nearest.tolist(), desc="consensus"):
        captions = [caption for row in rows for caption in train[row].captions]
        votes = [caption for row in rows for caption in words[row]]
        # Each caption also votes for itself, which adds the same to all of them.
        scores = CiderD([votes], frequencies).scores(votes, [0] * len(votes))
        chosen.append(captions[int(scores.argmax())])
    return chosen


def words_of(captions: Sequence[str]) -> list[list[str]]:
    """Split captions into words as the metric does."""
    return [tokenize(caption).split() for caption in captions]


if __name__ == "__main__":
    main()
