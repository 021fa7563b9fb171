"""The captioner's numbers: packed captions, likelihoods, attention, checkpoints and over-fitting."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tavq.captioner.config import GREEDY, PRESETS
from tavq.captioner.dataset import caption_targets
from tavq.captioner.decoding import decode_captions
from tavq.captioner.likelihood import log_likelihood, word_log_probs
from tavq.captioner.model import Captioner, CaptionerConfig, create_captioner
from tavq.captioner.vocabulary import PretrainedVocabulary, WordVocabulary, detokenize, metric_words

WORDS = tuple(
    "a dog man the runs in on grass snow red brown jumps sits girl two over bench bike ball little".split()
)


def captioner_of(**shape: object) -> Captioner:
    torch.manual_seed(0)
    config = CaptionerConfig(
        shape=dataclasses.replace(PRESETS["tiny"], **shape),
        num_codes=32,
        code_dim=8,
        grid_size=(3, 4),
        codebook_hash="abc",
        words=WORDS,
    )
    captioner = Captioner(config).eval()
    with torch.no_grad():
        for parameter in captioner.parameters():
            parameter.mul_(3)  # sharper than at first, so that captions differ from image to image
    return captioner


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    return captioner_of()


def random_ids(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 32, (count, 12), generator=torch.Generator().manual_seed(seed))


def test_packed_captions_equal_each_alone(captioner: Captioner):
    ids, words = random_ids(2), torch.randint(3, 23, (2, 3, 5))
    packed = captioner(ids, words)
    for c in range(3):
        alone = captioner(ids, words[:, c : c + 1])
        torch.testing.assert_close(packed[:, c : c + 1], alone, rtol=1e-4, atol=1e-4)


def test_packed_logits_equal_plain_decoding_with_a_cache(captioner: Captioner):
    ids, words = random_ids(1), torch.tensor([[[5, 9, 7, 4]]])
    language = captioner.language_model
    step = language(inputs_embeds=captioner.prefix_embeddings(ids), use_cache=True)
    expected = [step.logits[:, -1]]
    for word in words[0, 0]:
        embedded = language.get_input_embeddings()(word.view(1, 1))
        step = language(inputs_embeds=embedded, past_key_values=step.past_key_values, use_cache=True)
        expected.append(step.logits[:, -1])
    torch.testing.assert_close(captioner(ids, words)[0, 0], torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_no_logit_depends_on_a_later_word(captioner: Captioner):
    words = torch.tensor([[[5, 9, 7, 4]]])
    embedded = captioner.language_model.get_input_embeddings()(words).detach().requires_grad_()
    captioner.language_model.get_input_embeddings().forward = lambda _: embedded
    try:
        captioner(random_ids(1), words)[0, 0, 2].sum().backward()
    finally:
        del captioner.language_model.get_input_embeddings().forward
    seen = embedded.grad[0, 0].abs().sum(-1)
    assert (seen[:2] > 0).all() and (seen[2:] == 0).all()


def test_targets_end_behind_the_last_word_and_skip_what_is_empty():
    words = torch.tensor([[[5, 6, 0], [7, 8, 9], [7, 8, 9], [0, 0, 0]]])
    targets = caption_targets(words, torch.tensor([[2, 3, 5, -1]]), end_id=1)
    assert targets.tolist() == [[[5, 6, 1, -1], [7, 8, 9, 1], [7, 8, 9, -1], [-1, -1, -1, -1]]]


def test_word_log_probs_match_cross_entropy(captioner: Captioner):
    ids, words = random_ids(2), torch.tensor([[[5, 9, 0]], [[4, 6, 8]]])
    logits = captioner(ids, words)
    targets = torch.tensor([[[5, 9, 1, 1]], [[4, 6, 8, 1]]])
    expected = -F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none").view(2, 1, 4)
    torch.testing.assert_close(word_log_probs(captioner, ids, words), expected)
    logits[..., [2, 7]] = -torch.inf
    expected = -F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none").view(2, 1, 4)
    torch.testing.assert_close(word_log_probs(captioner, ids, words, without=[2, 7]), expected)
    cold = -F.cross_entropy(logits.flatten(0, 2) / 0.5, targets.flatten(), reduction="none").view(2, 1, 4)
    found = word_log_probs(captioner, ids, words, without=[2, 7], temperature=0.5)
    torch.testing.assert_close(found, cold)


def test_log_likelihood_sums_the_words_and_the_end_and_ignores_the_batch(captioner: Captioner):
    ids = random_ids(4)
    texts = ["a dog runs", "the man", "snow", "a little girl jumps over the red ball"]
    together = log_likelihood(captioner, ids, texts)
    alone = torch.cat([log_likelihood(captioner, ids[i : i + 1], texts[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    log_probs = word_log_probs(captioner, ids, torch.tensor([[captioner.text.encode(texts[0])]] * 4))
    assert together[0].item() == pytest.approx(log_probs[0].sum().item(), rel=1e-4)


def test_log_likelihood_in_the_long_style_starts_from_its_token():
    captioner = captioner_of(long_words=30)
    ids, text = random_ids(1), "a dog runs"
    words = torch.tensor([[captioner.text.encode(text)]])
    starts = torch.tensor([[captioner.start_id("long")]])
    expected = word_log_probs(captioner, ids, words, starts).sum().item()
    assert log_likelihood(captioner, ids, [text], "long").item() == pytest.approx(expected, rel=1e-4)
    assert log_likelihood(captioner, ids, [text]).item() != pytest.approx(expected, rel=1e-4)
    log_likelihood(captioner, ids, ["a dog " * 10], "long")  # 20 words are not cut there


def test_log_likelihood_says_when_a_text_is_cut(captioner: Captioner):
    with pytest.warns(UserWarning, match="only the first 16"):
        log_likelihood(captioner, random_ids(1), ["a dog " * 10])
    with pytest.raises(ValueError, match="got 2 images and 1 texts"):
        log_likelihood(captioner, random_ids(2), ["a dog"])


def test_attention_maps_are_distributions_and_leave_the_logits_alone(captioner: Captioner):
    ids, words = random_ids(2), torch.randint(3, 23, (2, 3, 5))
    before = captioner(ids, words)
    maps = captioner.attention_maps(ids, words)
    assert maps.shape == (2, 3, 6, 12) and (maps >= 0).all()
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 3, 6))
    assert torch.equal(captioner(ids, words), before)


def test_codebook_starts_the_embeddings_and_must_fit(captioner: Captioner):
    fresh, codebook = captioner_of(), F.normalize(torch.randn(32, 8), dim=-1)
    fresh.image_encoder.initialize_from(codebook)
    torch.testing.assert_close(fresh.image_encoder.code_embedding.weight, codebook * 8**0.5)
    with pytest.raises(ValueError, match=r"\(16, 8\), expected \(32, 8\)"):
        fresh.image_encoder.initialize_from(codebook[:16])


def test_other_codebook_and_shape_are_refused(captioner: Captioner):
    captioner.check_codebook("abc")
    with pytest.raises(
        ValueError, match="of codebook xyz, the captioner was trained on abc; use its tokenizer"
    ):
        captioner.check_codebook("xyz")
    with pytest.raises(ValueError, match=r"\(1, 5\), expected \(B, 12\)"):
        captioner.prefix_embeddings(torch.zeros(1, 5, dtype=torch.long))


def test_checkpoint_gives_the_same_logits_bit_for_bit(captioner: Captioner, tmp_path: Path):
    captioner.save_pretrained(tmp_path)
    loaded = Captioner.from_pretrained(tmp_path)
    ids, words = random_ids(2), torch.randint(3, 23, (2, 2, 4))
    assert torch.equal(loaded(ids, words), captioner(ids, words))
    assert loaded.config == captioner.config
    tied = loaded.language_model
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight


def test_quality_is_asked_for_at_its_best():
    captioner = captioner_of(quality_buckets=3)
    assert captioner.start_id() == 2
    ids, words = random_ids(2), torch.randint(3, 23, (2, 1, 4))
    best = captioner(ids, words, torch.full((2, 1), 2))
    assert torch.equal(captioner(ids, words), best)
    assert not torch.equal(captioner(ids, words, torch.zeros(2, 1, dtype=torch.long)), best)


def test_long_style_has_its_own_start_and_length():
    captioner, ids = captioner_of(long_words=30), random_ids(2)
    assert (captioner.start_id("short"), captioner.start_id("long")) == (0, 1)
    short, long = (captioner.prefix_embeddings(ids, style) for style in ("short", "long"))
    assert not torch.equal(short, long)
    with pytest.raises(ValueError, match="trained on captions alone"):
        captioner_of().prefix_embeddings(ids, "long")


@pytest.mark.slow
def test_ten_images_are_learned_by_heart():
    captioner = captioner_of(dropout=0.0, token_dropout=0.0, width=64, decoder_layers=2)
    captioner = Captioner(captioner.config).train()  # without the sharpening
    ids, words = random_ids(10), torch.randint(3, 23, (10, 1, 6), generator=torch.Generator().manual_seed(1))
    targets = caption_targets(words, torch.full((10, 1), 6), captioner.text.end_id)
    optimizer = torch.optim.Adam(captioner.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss = F.cross_entropy(captioner(ids, words).flatten(0, 2), targets.flatten())
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    found = decode_captions(captioner.eval(), ids, GREEDY)
    assert [c[0].text for c in found] == [captioner.text.decode(row[0].tolist()) for row in words]
    assert found[0][0].score > -0.1 and min(word.probability for word in found[0][0].words) > 0.8


def test_people_and_metric_read_the_same_words():
    captions = [
        "A man's dog doesn't run .",
        'Two "wet" dogs, in St. Louis!',
        "The dogs' t-shirt is 3/4 white",
        "I'm",
    ]
    for caption in captions:
        words = metric_words(caption)
        assert metric_words(detokenize(words)) == words
    assert detokenize(metric_words(captions[0])) == "a man's dog doesn't run"


def test_vocabulary_keeps_what_is_frequent():
    vocabulary = WordVocabulary.build(["A dog runs.", "A dog sits.", "The dog"], min_count=2)
    assert vocabulary.names == ("dog", "a")
    assert vocabulary.encode("a dog barks") == [4, 3, vocabulary.unknown_id]
    assert vocabulary.decode([4, 3]) == "a dog"
    with pytest.raises(ValueError, match="no word occurs 9 times"):
        WordVocabulary.build(["a"], min_count=9)


@pytest.fixture(scope="module")
def pretrained_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny causal language model of another family, with its own tokenizer, as a directory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("language")
    letters = {letter: i for i, letter in enumerate(["<end>", *"abcdefghijklmnopqrstuvwxyz' ▁"])}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(letters),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=0,
        bos_token_id=0,
    )
    language = LlamaForCausalLM(config)
    language.generation_config.repetition_penalty = 5.0  # which no checkpoint of ours keeps
    language.save_pretrained(folder)
    return folder


def test_pretrained_decoder_loads_without_its_source(pretrained_dir: Path, tmp_path: Path):
    shape = dataclasses.replace(PRESETS["tiny"], decoder=str(pretrained_dir))
    config = CaptionerConfig(shape, num_codes=32, code_dim=8, grid_size=(3, 4), codebook_hash="abc")
    captioner = create_captioner(config).eval()
    assert isinstance(captioner.text, PretrainedVocabulary)
    assert captioner.text.decode(captioner.text.encode("A man's dog.")) == "a man's dog"
    captioner.save_pretrained(tmp_path)
    for file in pretrained_dir.iterdir():
        file.rename(file.with_suffix(".gone"))
    loaded = Captioner.from_pretrained(tmp_path)
    ids = random_ids(3)
    texts = ["a dog", "the man runs", "snow"]
    assert torch.equal(log_likelihood(loaded, ids, texts), log_likelihood(captioner, ids, texts))
    before, after = (decode_captions(model, ids) for model in (captioner, loaded))
    assert [group[0].text for group in after] == [group[0].text for group in before]


def test_missing_pretrained_decoder_is_named():
    shape = dataclasses.replace(PRESETS["tiny"], decoder="./nowhere")
    with pytest.raises(FileNotFoundError, match=r"\./nowhere"):
        create_captioner(CaptionerConfig(shape, 32, 8, (3, 4), "abc"))
