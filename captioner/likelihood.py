"""Log-probability of given words: the score of a caption, and the likelihood of a text.

Shapes: B images, N image tokens, G captions of each image (a group), T words of a caption, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .config import Style
from .model import Captioner


def word_log_probs(
    captioner: Captioner,
    ids: Tensor,
    words: Tensor,
    starts: Tensor | None = None,
    *,
    without: Sequence[int] = (),
    temperature: float = 1.0,
) -> Tensor:
    """Compute the log-probability of each word and of the end token, by teacher forcing.

    Args:
        captioner: gives the logits.
        ids: (B, N) image tokens.
        words: (B, G, T) word ids, padded at the right.
        starts: (B, G) start tokens; those of the short style by default.
        without: word ids that get no probability; none of `words` may be among them.
        temperature: the logits are divided by it.

    Returns:
        (B, G, T + 1) float32. Of a caption of length l, entries 0 to l - 1 belong to its words and entry l to
        its end token; the entries behind it have no meaning.
    """
    logits = captioner(ids, words, starts).float() / temperature
    if without:
        logits[..., list(without)] = -torch.inf

    # Padding is scored as the end token, so that entry l holds the end of each caption, short or long.
    ends = torch.full_like(words[..., :1], captioner.text.end_id)
    targets = torch.cat([words, ends], dim=-1)
    targets = targets.masked_fill(targets == captioner.text.pad_id, captioner.text.end_id)

    return logits.log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)


@torch.inference_mode()
def log_likelihood(captioner: Captioner, ids: Tensor, texts: Sequence[str], style: Style = "short") -> Tensor:
    """Compute the log-probability of each text given its image, summed over its words and its end token.

    Args:
        captioner: in eval mode.
        ids: (B, N) or (B, h, w) int64.
        texts: B sentences; words outside the vocabulary count as the unknown word.
        style: captions, or long descriptions.

    Returns:
        (B,) float32, in nats. Warns where a text is longer than the captioner was trained for.

    Raises:
        ValueError: as many texts as images are expected.
    """
    if len(texts) != len(ids):
        raise ValueError(f"got {len(ids)} images and {len(texts)} texts, expected one text an image")

    limit = captioner.max_words(style)
    encoded = [captioner.text.encode(text) for text in texts]
    longest = max(map(len, encoded))
    if longest > limit:
        warnings.warn(f"a text has {longest} words; only the first {limit} are scored", stacklevel=2)
    encoded = [words[:limit] for words in encoded]

    words = pad_captions(captioner, [[words] for words in encoded])
    starts = torch.full((len(ids), 1), captioner.start_id(style), device=ids.device)
    log_probs = word_log_probs(captioner, ids.flatten(1), words, starts)

    # The end token counts, too: else a text that breaks off would be as likely as the whole one.
    lengths = torch.tensor([len(words) for words in encoded], device=ids.device)
    counted = torch.arange(log_probs.shape[-1], device=ids.device) <= lengths[:, None]
    return (log_probs[:, 0] * counted).sum(-1)


def pad_captions(captioner: Captioner, captions: Iterable[Sequence[Sequence[int]]]) -> Tensor:
    """Pad the word ids of B groups of G captions to (B, G, T), where T is at least 1."""
    captions = list(captions)
    rows = [torch.tensor(words, dtype=torch.long) for group in captions for words in group]
    # One word more than none, so that T is 1 where all captions are empty.
    rows.append(torch.zeros(1, dtype=torch.long))
    padded = pad_sequence(rows, batch_first=True, padding_value=captioner.text.pad_id)[:-1]
    return padded.unflatten(0, (len(captions), -1)).to(captioner.start_embedding.weight.device)
