"""Direct preference optimisation of the generator (Rafailov et al. 2023, arXiv:2305.18290), on image ids.

The generator learns to find the better of two of its own images likelier than the worse one, compared with
what it thought before. Real images of the prompts stay in the loss, so that it does not forget them.

Shapes: B pairs, N image tokens, K codes, T text slots, M text width.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from tavq.base.journal import read_journal
from tavq.base.processes import drawn_for_rows, own_share, shares_of_all
from tavq.data.text_encoder import TextEncoder
from tavq.data.tokens import TokenSet
from tavq.training.stream import Draws
from tavq.training.task import StepOutput

from .config import GeneratorRun
from .model import GeneratorModel
from .text_states import PackedStates, pack_states
from .train import Decode, GeneratorTask, random_variant

HELD_OUT = 20  # one pair in so many is never trained on
EVALUATION_BATCH = 50


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Best and worst of some images of each prompt.

    Attributes:
        names: n ids of the images that the prompts describe.
        best: (n, N) int64 ids.
        worst: likewise.
        texts: states of the n prompts.
    """

    names: tuple[str, ...]
    best: Tensor
    worst: Tensor
    texts: PackedStates

    def __len__(self) -> int:
        return len(self.names)


def read_pairs(path: Path, codebook_hash: str, encoder: TextEncoder, max_tokens: int) -> Pairs:
    """Read what `tavq preferences` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no pair, or pairs of another tokenizer.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no preferences {path}; make them with: tavq preferences --out {path}")
    rows = read_journal(path)
    if len(rows) < HELD_OUT:
        raise ValueError(f"{path} holds {len(rows)} pairs, expected {HELD_OUT} or more; let it be finished")
    if (found := {row["codebook"] for row in rows}) != {codebook_hash}:
        raise ValueError(
            f"{path} holds ids of codebook {', '.join(sorted(found))}, the tokens have {codebook_hash}; "
            "make the preferences anew with this tokenizer"
        )
    return Pairs(
        names=tuple(row["id"] for row in rows),
        best=torch.tensor([row["best"] for row in rows]),
        worst=torch.tensor([row["worst"] for row in rows]),
        texts=pack_states(encoder, [row["prompt"] for row in rows], max_tokens),
    )


class PreferenceTask(GeneratorTask):
    """Preferences as the training loop sees them; the share of held-out pairs in order decides."""

    monitor = ("preferred", "max")

    def __init__(self, run: GeneratorRun, decode: Decode | None = None, codebook: Tensor | None = None):
        if run.start is None:
            raise ValueError("preferences need a generator to go on from; add --start DIR")
        if run.preferences is None:
            raise ValueError(
                "no preferences to learn; make some with tavq preferences, and add --preferences"
            )
        super().__init__(run, decode, codebook)
        config = self.shipped.config
        self.pairs = read_pairs(run.preferences, config.codebook_hash, self.encoder, config.max_text_tokens)
        self.held_out = list(range(0, len(self.pairs), HELD_OUT))
        self.dataset = PairExamples(self.pairs, self.train_set)
        self.model = self.preference = PreferenceTrainer(self.run, self.shipped)

    def collate(self, examples: list[Any], draws: Draws | None = None) -> dict[str, Tensor]:
        rows = [row for row, _ in examples]
        return self._batch(rows) | {"real": torch.stack([ids for _, ids in examples])}

    def _batch(self, rows: list[int]) -> dict[str, Tensor]:
        texts = self.pairs.texts.rows(rows)
        return {
            "best": self.pairs.best[rows],
            "worst": self.pairs.worst[rows],
            "states": texts.states,
            "mask": texts.mask,
        }

    @torch.inference_mode()
    def evaluate(self, model: GeneratorModel, step: int) -> dict[str, float]:
        """Measure held-out pairs beside what the generator's own evaluation measures."""
        device = model.bos_embedding.device
        margins = []
        for start in own_share(range(0, len(self.held_out), EVALUATION_BATCH)):
            batch = self._batch(self.held_out[start : start + EVALUATION_BATCH])
            moved = {name: tensor.to(device) for name, tensor in batch.items()}
            margins.append(self.preference.margins(model, moved).cpu())
        margins_B = torch.cat(shares_of_all(margins))
        return {
            "preferred": float((margins_B > 0).float().mean()),
            "margin": float(margins_B.mean()),
            **super().evaluate(model, step),
        }


class PairExamples(Dataset):
    """`self[(index, draw_seed)]` is a pair's number and a variant (N,) of the real image of its prompt."""

    def __init__(self, pairs: Pairs, tokens: TokenSet):
        rows = {name: row for row, name in enumerate(tokens.names)}
        unknown = [name for name in pairs.names if name not in rows]
        if unknown:
            raise ValueError(f"the token set has no image {unknown[0]}; take that of the same dataset")
        self.numbers = [number for number in range(len(pairs)) if number % HELD_OUT]
        self.real = [rows[pairs.names[number]] for number in self.numbers]
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, item: tuple[int, int]) -> tuple[int, Tensor]:
        index, draw_seed = item
        return self.numbers[index], random_variant(self.tokens, self.real[index], draw_seed)


class PreferenceTrainer(nn.Module):
    """The generator, a frozen copy of it as it was, and the loss between the two."""

    def __init__(self, run: GeneratorRun, generator: GeneratorModel):
        super().__init__()
        self.run = run
        self.generator = generator
        self.reference = copy.deepcopy(generator).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> PreferenceTrainer:
        super().train(mode)
        # Dropout would add noise of its own to each likelihood, much larger than what tells a pair apart.
        self.generator.eval()
        self.reference.eval()
        return self

    def forward(self, batch: dict[str, Tensor], step: int) -> StepOutput:
        margin_B = self.margins(self.generator, batch)
        preference = -F.logsigmoid(self.run.preference_beta * margin_B).mean()

        dropped_B1 = (
            drawn_for_rows(torch.rand, len(margin_B), 1, device=margin_B.device) < self.run.null_text_rate
        )
        logits_BNK = self.generator(batch["real"], batch["states"], batch["mask"] & ~dropped_B1)
        real = F.cross_entropy(logits_BNK.flatten(0, 1), batch["real"].flatten())

        report: dict[str, Any] = {"preference": preference.detach(), "nats_per_token": real.detach()}
        report["preferred"] = (margin_B.detach() > 0).float().mean()
        return StepOutput(preference + self.run.real_weight * real, report)

    def margins(self, generator: GeneratorModel, batch: dict[str, Tensor]) -> Tensor:
        """By how many nats more than the reference the generator prefers the best to the worst: (B,)."""
        with torch.no_grad():
            before_B = _preference(self.reference, batch)
        return _preference(generator, batch) - before_B


def _preference(generator: GeneratorModel, batch: dict[str, Tensor]) -> Tensor:
    """By how many nats a generator finds the best image likelier than the worst: (B,)."""

    def log_likelihood(ids_BN: Tensor) -> Tensor:
        logits_BNK = generator(ids_BN, batch["states"], batch["mask"])
        return -F.cross_entropy(logits_BNK.mT, ids_BN, reduction="none").sum(1)

    return log_likelihood(batch["best"]) - log_likelihood(batch["worst"])
