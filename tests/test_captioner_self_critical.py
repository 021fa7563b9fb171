"""Self-critical training: the loss worked out word by word, and samples that follow the policy."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tavq.captioner import self_critical
from tavq.captioner.config import PRESETS, Baseline
from tavq.captioner.model import Captioner, CaptionerConfig
from tavq.captioner.reward import CiderD, with_end
from tavq.captioner.self_critical import Rollout, sample_rollout, self_critical_loss

WORDS = tuple("a dog man the runs in on snow red grass".split())
TEMPERATURE = 0.5


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    torch.manual_seed(0)
    shape = dataclasses.replace(PRESETS["tiny"], max_words=4)
    captioner = Captioner(CaptionerConfig(shape, 32, 8, (3, 4), "abc", WORDS)).eval()
    with torch.no_grad():
        for parameter in captioner.parameters():
            parameter.mul_(3)  # sharper than at first: some words are likely, others are not
    return captioner


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(0))


# Two images, each with two samples and the greedy caption; True where the policy set the end.
GROUPS = [
    [("a dog", True), ("a man on the", False), ("the dog", True)],
    [("red snow in", True), ("snow", True), ("a red", True)],
]
IMAGES = [2, 0]  # their places among the references
REFERENCES = [
    ["red snow", "a red snow in the grass"],
    ["a man in the grass", "the man"],
    ["a dog runs on the grass", "the dog"],
]


def rollout_of(captioner: Captioner) -> Rollout:
    words = torch.full((2, 3, 4), captioner.text.pad_id)
    lengths = torch.zeros(2, 3, dtype=torch.long)
    for b, group in enumerate(GROUPS):
        for g, (text, _) in enumerate(group):
            encoded = captioner.text.encode(text)
            words[b, g, : len(encoded)] = torch.tensor(encoded)
            lengths[b, g] = len(encoded)
    ended = torch.tensor([[end for _, end in group] for group in GROUPS])
    return Rollout(words, lengths, ended)


def log_prob_of(captioner: Captioner, ids: torch.Tensor, text: str, ended: bool) -> tuple[float, int]:
    """The policy's log-probability of one caption, summed, and the number of its words and ends."""
    words = captioner.text.encode(text)
    logits = captioner(ids[None], torch.tensor([[words]]))[0, 0] / TEMPERATURE
    logits[:, captioner.text.suppressed_ids] = -torch.inf
    targets = [*words, captioner.text.end_id] if ended else words
    log_probs = logits.log_softmax(-1)
    return sum(float(log_probs[t, word]) for t, word in enumerate(targets)), len(targets)


@pytest.mark.parametrize("baseline", ["samples", "greedy"])
def test_the_loss_worked_out_word_by_word(
    captioner: Captioner, ids: torch.Tensor, baseline: Baseline, monkeypatch: pytest.MonkeyPatch
):
    calls = []

    def rollout(captioner, ids, samples, temperature):
        calls.append((samples, temperature))
        return rollout_of(captioner)

    monkeypatch.setattr(self_critical, "sample_rollout", rollout)
    reward = CiderD([[with_end(text.split()) for text in texts] for texts in REFERENCES])
    output = self_critical_loss(captioner, ids, IMAGES, reward, 2, baseline, TEMPERATURE)
    assert calls == [(2, TEMPERATURE)]

    def reward_of(text: str, ended: bool, image: int) -> float:
        words = text.split()
        return float(reward.scores([with_end(words) if ended else words], [image])[0])

    total, count, sampled, greedy = 0.0, 0, [], []
    for row, group, image in zip(ids, GROUPS, IMAGES, strict=True):
        *samples, last = [reward_of(*caption, image) for caption in group]
        sampled += samples
        greedy.append(last)
        for g, (caption, own) in enumerate(zip(group[:-1], samples, strict=True)):
            log_prob, actions = log_prob_of(captioner, row, *caption)
            total += (own - (samples[1 - g] if baseline == "samples" else last)) * log_prob
            count += actions

    assert output.loss.item() == pytest.approx(-total / count, rel=1e-4)
    assert output.report["reward"] == pytest.approx(sum(sampled) / 4)
    assert output.report["greedy"] == pytest.approx(sum(greedy) / 2)
    assert output.report["function_word_end"] == pytest.approx(1 / 5)  # one of five that are complete


def test_samples_follow_the_policy_at_its_temperature(captioner: Captioner, ids: torch.Tensor):
    torch.manual_seed(0)
    rollout = sample_rollout(captioner, ids[:1], 3000, TEMPERATURE)
    # A caption that ends at once has padding for its first word.
    first = rollout.words[0, :-1, 0].masked_fill(rollout.lengths[0, :-1] == 0, captioner.text.end_id)
    shares = torch.bincount(first, minlength=len(captioner.text)) / 3000

    logits = captioner(ids[:1], torch.zeros(1, 1, 1, dtype=torch.long))[0, 0, 0]
    logits[captioner.text.suppressed_ids] = -torch.inf
    assert (shares - (logits / TEMPERATURE).softmax(-1)).abs().max() < 0.03
    assert (shares - logits.softmax(-1)).abs().max() > 0.06, "another temperature must look different"
    assert shares[captioner.text.suppressed_ids].tolist() == [0, 0]


def test_a_caption_of_maximum_length_has_not_ended(captioner: Captioner, ids: torch.Tensor):
    torch.manual_seed(0)
    rollout = sample_rollout(captioner, ids, 40, 2.0)
    assert rollout.words.shape == (2, 41, 4)
    assert torch.equal(rollout.ended, rollout.lengths < 4)
    assert rollout.ended.any() and not rollout.ended.all()
    assert (rollout.words != captioner.text.end_id).all()
    assert torch.equal((rollout.words != captioner.text.pad_id).sum(-1), rollout.lengths)
