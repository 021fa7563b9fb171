"""tavq train lexicon --tokens DIR --generator DIR --out DIR: train image words for a frozen generator.

Shapes: B batch, N image tokens, W image words, K codes, M text width, T text slots.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tavq.base.files import file_hash
from tavq.base.processes import drawn_for_rows
from tavq.base.weights import WEIGHTS_FILE
from tavq.data.text_encoder import TextEncoder, TokenStates
from tavq.data.tokens import AllTexts, TokenSet, open_tokens
from tavq.training.dry_run import dry_run
from tavq.training.loop import train
from tavq.training.provenance import TokenProvenance
from tavq.training.stream import Draws
from tavq.training.task import StepOutput, Task

from .config import LexiconRun
from .lexicon import Lexicon, LexiconConfig, with_words
from .model import GeneratorModel
from .text_states import open_states
from .train import TokenExamples, nats_per_token


def train_lexicon(run: LexiconRun) -> None:
    """Train the lexicon into `run.out`."""
    task = LexiconTask(run)
    if run.dry_run:
        dry_run(task, run.training, run)
    else:
        train(task, run.training, run.out, run)


class LexiconTask(Task["LexiconTrainer", Lexicon]):
    """The lexicon as the training loop sees it; the likelihood with all words decides what is saved."""

    name = "lexicon"
    monitor = ("loss", "min")
    muon_modules = frozenset({"encoder", "pooler"})

    def __init__(self, run: LexiconRun):
        generator = GeneratorModel.from_pretrained(run.generator)
        config = generator.config
        if run.model.num_words > config.max_text_tokens:
            raise ValueError(
                f"model.num_words is {run.model.num_words}, the generator has {config.max_text_tokens} "
                "slots; take fewer"
            )
        train_set, self.val_set = (open_tokens(run.tokens, split) for split in ("train", "val"))
        generator.check_codebook(train_set.meta.codebook_hash)
        encoder = TextEncoder.checked(config.text_encoder, config.text_encoder_hash)
        self.texts = open_states(encoder, AllTexts(train_set), config.max_text_tokens, run.cache)
        firsts = [group[0] for group in self.val_set.captions]
        self.val_texts = open_states(encoder, firsts, config.max_text_tokens, run.cache)
        self.dataset = TokenExamples(train_set)

        torch.manual_seed(run.training.seed)
        self.shipped = Lexicon(_config_of(run, config, train_set))
        self.model = LexiconTrainer(run, self.shipped, generator)

    def collate(self, examples: list[tuple[Tensor, int]], draws: Draws | None = None) -> dict[str, Tensor]:
        texts = self.texts.rows([caption for _, caption in examples])
        return {"ids": torch.stack([ids for ids, _ in examples]), "states": texts.states, "mask": texts.mask}

    @torch.inference_mode()
    def evaluate(self, model: Lexicon, step: int) -> dict[str, float]:
        """Measure nats per token on the validation split: by the text, by some words, and by both."""
        num_words = model.config.num_words
        counts = sorted({min(count, num_words) for count in (1, 4, num_words)})
        metrics = {
            f"loss_{count}_words": self._nats_per_token(model, count, with_text=False) for count in counts
        }
        return metrics | {
            "loss": metrics[f"loss_{num_words}_words"],
            "loss_text": self._nats_per_token(model, 0, with_text=True),
            "loss_4_words_and_text": self._nats_per_token(model, min(4, num_words), with_text=True),
        }

    def _nats_per_token(self, model: Lexicon, count: int, *, with_text: bool) -> float:
        def given(ids_BN: Tensor, texts: TokenStates) -> TokenStates:
            said = TokenStates(texts.states, texts.mask & with_text)
            return with_words(model(ids_BN)[:, :count], said)

        return nats_per_token(self.model.generator, self.val_set, self.val_texts, given)

    def save(self, model: Lexicon, directory: Path, card: str) -> None:
        model.card = card
        model.save_pretrained(directory)


class LexiconTrainer(nn.Module):
    """The lexicon with its loss: what the frozen generator thinks of the image's own ids, given its words."""

    def __init__(self, run: LexiconRun, lexicon: Lexicon, generator: GeneratorModel):
        super().__init__()
        self.run = run
        self.lexicon = lexicon
        self.generator = generator.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> LexiconTrainer:
        super().train(mode)
        self.generator.eval()  # its dropout would only hide what the words say
        return self

    def forward(self, batch: dict[str, Tensor], step: int) -> StepOutput:
        ids_BN = batch["ids"]
        words_BWM = self.lexicon(ids_BN)
        batch_size, num_words = words_BWM.shape[:2]

        # TailDrop: 1 to W words count, the first ones most often.
        number_of_words = functools.partial(torch.randint, 1, num_words + 1)
        count_B1 = drawn_for_rows(number_of_words, batch_size, 1, device=ids_BN.device)
        seen_BW = torch.arange(num_words, device=ids_BN.device) < count_B1
        has_text_B1 = drawn_for_rows(torch.rand, batch_size, 1, device=ids_BN.device) < self.run.text_rate
        texts = TokenStates(batch["states"], batch["mask"] & has_text_B1)

        given = with_words(words_BWM, texts, seen_BW)
        logits_BNK = self.generator(ids_BN, given.states, given.mask)
        loss = F.cross_entropy(logits_BNK.flatten(0, 1), ids_BN.flatten())
        return StepOutput(loss, {"nats_per_token": loss.detach()})


def _config_of(run: LexiconRun, generator: Any, tokens: TokenSet) -> LexiconConfig:
    """Return the configuration of the model with all that tokens and generator decide."""
    return LexiconConfig(
        **vars(run.model),
        num_codes=tokens.meta.num_codes,
        num_tokens=generator.num_tokens,
        text_dim=generator.text_dim,
        codebook_hash=tokens.meta.codebook_hash,
        generator_hash=file_hash(Path(run.generator) / WEIGHTS_FILE),
        provenance=TokenProvenance(tokens.meta.data, tokens.meta.tokenizer),
    )
