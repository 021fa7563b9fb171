"""The LG-VQ baseline: its three losses, worked by hand, and no leak of the hidden words."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tavq.alignment.config import LGVQConfig
from tavq.alignment.lgvq import CaptionMasker, LanguageGuidance, MaskedCaptions, mask_words
from tavq.commands import train_tokenizer
from tavq.data.text_encoder import TextEncoder
from tavq.tokenizer.config import PRESETS, RUN_PRESETS
from tavq.tokenizer.model import TAVQTokenizer
from tavq.tokenizer.train import TokenizerTrainer
from tavq.training.run_folder import read_log

CONFIG = LGVQConfig(width=8, max_text_tokens=4)
VOCABULARY = 11


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder()


@pytest.fixture
def guidance() -> LanguageGuidance:
    """Codes and text are both 4 wide, so that the relation loss can be worked by hand."""
    torch.manual_seed(0)
    return LanguageGuidance(CONFIG, 4, 9, torch.randn(VOCABULARY, 4)).eval()


def made_up(batch: int = 2) -> MaskedCaptions:
    """Captions of start, two words, end; the first word hidden; orthogonal word states."""
    words = torch.tensor([False, True, True, False]).repeat(batch, 1)
    hidden = torch.tensor([False, True, False, False]).repeat(batch, 1)
    states = torch.eye(4).repeat(batch, 1, 1)
    ids = torch.tensor([0, 5, 6, 1]).repeat(batch, 1)
    visible = states * ~hidden.unsqueeze(-1)
    return MaskedCaptions(ids, words, hidden, torch.ones_like(words), states, visible, torch.eye(4)[:batch])


def test_the_defaults_are_the_published_weights_and_the_loss_is_their_sum(guidance):
    defaults = LGVQConfig()
    weights = (defaults.global_weight, defaults.word_weight, defaults.relation_weight)
    assert weights == (1e-3, 1e-2, 1e-4)
    loss, report = guidance(torch.randn(2, 4, 3, 3), made_up())
    parts = [report[f"lgvq/{name}"] for name in ("global", "words", "relation")]
    assert float(loss.detach()) == pytest.approx(
        sum(w * float(p) for w, p in zip(weights, parts, strict=True))
    )


def test_the_global_loss_is_cross_entropy_over_cosines_without_temperature(guidance):
    sentences = torch.eye(4)[:2]
    assert float(guidance.global_loss(5 * sentences, sentences)) == pytest.approx(math.log(1 + math.exp(-1)))
    swapped = float(guidance.global_loss(sentences.flip(0), sentences))
    assert swapped == pytest.approx(math.log(1 + math.exp(1)))


def test_the_relation_loss_takes_codes_of_the_quantised_map_at_the_places_the_reread_tokens_tell(guidance):
    guidance.relation_head = nn.Identity()
    captions = made_up(1)
    read = torch.eye(4)[[1, 2, 0, 3]].unsqueeze(0)  # word 1 falls on place 0, word 2 on place 1
    apart = torch.tensor([[[1.0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]])
    assert float(guidance.relation_loss(apart, read, captions)) == 0
    alike = apart.clone()
    alike[0, 1] = alike[0, 0]  # cosine 1 where the words have 0: two of the 16 pairs
    assert float(guidance.relation_loss(alike, read, captions)) == pytest.approx(2 / 16)


def test_hidden_words_alone_are_guessed_and_a_clueless_guess_costs_the_log_of_the_vocabulary(guidance):
    captions, memory = made_up(), torch.randn(2, 10, 4)
    before, _ = guidance.word_loss(memory, captions)
    elsewhere = dataclasses.replace(captions, ids=torch.where(captions.masked, captions.ids, 9))
    assert guidance.word_loss(memory, elsewhere)[0] == before
    other = dataclasses.replace(captions, ids=torch.where(captions.masked, 9, captions.ids))
    assert guidance.word_loss(memory, other)[0] != before
    assert guidance.word_loss(torch.randn(2, 10, 4), captions)[0] != before, "the image is read"
    nn.init.zeros_(guidance.word_head[2].weight)
    assert float(guidance.word_loss(memory, captions)[0]) == pytest.approx(math.log(VOCABULARY))


def test_a_hidden_word_cannot_be_read_from_what_the_encoder_gives(encoder):
    texts = [["a dog runs on the beach"], ["a cat runs on the beach"]]
    reader = CaptionMasker(encoder, texts, LGVQConfig())
    for seed in range(20):  # until the draw hides the word that differs, place 2 behind start and "a"
        dog, cat = (reader.sample([row], torch.Generator().manual_seed(seed)) for row in (0, 1))
        assert torch.equal(dog.masked, cat.masked)
        if dog.masked[0, 2]:
            break
    assert dog.masked[0, 2], "no draw hid it"
    assert not torch.equal(dog.ids, cat.ids)
    assert torch.allclose(dog.masked_states, cat.masked_states, atol=1e-6)
    assert not dog.masked_states[dog.masked].any()
    visible = dog.words & ~dog.masked
    assert (dog.states - cat.states)[visible].abs().max() > 0.05, "unhidden, its neighbours tell of it"


def test_the_share_of_hidden_words_is_the_published_one():
    words = torch.ones(4000, 200, dtype=torch.bool)
    words[:, 150:] = False
    hidden = mask_words(words, LGVQConfig(), torch.Generator().manual_seed(0))
    share = hidden.sum(dim=1) / 150
    assert not hidden[:, 150:].any()
    assert 0.1 <= share.min() and share.max() <= 0.3 + 1 / 150
    assert float(share.mean()) == pytest.approx(0.263 + 0.5 / 150, abs=0.003)  # rounded up
    one = torch.zeros(5, 8, dtype=torch.bool)
    one[:, 3] = True
    assert mask_words(one, LGVQConfig(), torch.Generator()).sum() == 5, "at least one word"


def test_captions_that_are_too_long_are_left_out_and_an_image_without_any_is_named(encoder):
    reader = CaptionMasker(encoder, [["a dog", "word " * 40]], LGVQConfig())
    assert len(reader.tokens[0]) == 1
    with pytest.raises(ValueError, match=r"number 1.*max-text-tokens"):
        CaptionMasker(encoder, [["a dog"], ["word " * 40]], LGVQConfig())


def test_the_gradient_goes_to_the_encoder_and_not_to_the_codebook():
    torch.manual_seed(0)
    run = dataclasses.replace(RUN_PRESETS["tiny"], align="lgvq", lgvq=CONFIG)
    trainee = TokenizerTrainer(run, TAVQTokenizer(PRESETS["tiny"]), None, torch.randn(VOCABULARY, 4))
    encoded = trainee.tokenizer(torch.randn(2, 3, 32, 32))
    codes = trainee._straight_through(encoded)
    rows = codes.movedim(1, -1).flatten(0, 2)
    assert torch.allclose(rows, trainee.tokenizer.codebook[encoded.ids.flatten()], atol=1e-6)
    trainee.guidance(codes, made_up())[0].backward()
    assert trainee.tokenizer.quantizer.weight.grad is None
    assert trainee.tokenizer.encoder.positions.grad.norm() > 0


@pytest.mark.slow
def test_guidance_learns_to_find_images_and_hidden_words():
    torch.manual_seed(0)
    guidance = LanguageGuidance(CONFIG, 4, 9, 3 * torch.randn(VOCABULARY, 4))
    codes, captions = F.normalize(torch.randn(2, 4, 3, 3), dim=1), made_up()
    ids = captions.ids.clone()
    ids[1, 1] = 8  # only the image tells the hidden word
    captions = dataclasses.replace(captions, ids=ids)
    optimizer = torch.optim.Adam(guidance.parameters(), lr=3e-3)
    first = guidance(codes, captions)[1]
    for _ in range(400):
        optimizer.zero_grad()
        loss, report = guidance(codes, captions)
        (100 * loss).backward()
        optimizer.step()
    _, report = guidance.eval()(codes, captions)  # without dropout
    assert report["lgvq/word_accuracy"] == 1 and report["lgvq/global"] < first["lgvq/global"] - 0.1
    scores = guidance.scores(codes, captions.sentences)
    assert scores.argmax(dim=1).tolist() == [0, 1]


@pytest.mark.slow
def test_the_command_trains_it_and_its_heads_stay_out_of_the_checkpoint(tmp_path):
    flags = ["--preset", "tiny", "--align", "lgvq", "--lgvq.width", "16", "--lgvq.layers", "1"]
    flags += ["--training.steps", "4", "--training.log-every", "1", "--out", str(tmp_path)]
    train_tokenizer.main(flags)
    lines = read_log(tmp_path / "training" / "log.jsonl")
    assert all(math.isfinite(line["lgvq/words"]) for line in lines if "lgvq/words" in line)
    assert "val/t2i_R@10" in lines[-1] and "weight/align" not in lines[0]
    tokenizer = TAVQTokenizer.from_pretrained(tmp_path)
    assert tokenizer.config.provenance.align == "lgvq"
    plain = TokenizerTrainer(RUN_PRESETS["tiny"], TAVQTokenizer(PRESETS["tiny"]))
    assert not [name for name in plain.state_dict() if name.startswith("guidance")]
