"""The frozen text encoder, its cache on disk, and the index of a split's units."""

import hashlib
import multiprocessing
import shutil
import warnings

import pytest
import torch

from tavq.alignment.unit_index import UnitIndex
from tavq.alignment.units import units_of
from tavq.data.dataset import Example, ImageTextDataset
from tavq.data.embedding_cache import EmbeddingCache
from tavq.data.shapes import shapes_examples
from tavq.data.text_encoder import MINILM_SHA256, TextEncoder, minilm_directory

TEXTS = ["a dog runs on the beach", "a puppy is running at the seaside", "the stock market fell", "dog"]


@pytest.fixture(scope="module")
def minilm():
    return TextEncoder()


def tiny_directory(path, kind, seed=0):
    """Save a text encoder of random weights with MiniLM's vocabulary."""
    from transformers import BertConfig, BertModel, CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    sizes = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=30522
    )
    if kind == "bert":
        model = BertModel(BertConfig(max_position_embeddings=24, **sizes))
    else:
        ends = dict(bos_token_id=101, eos_token_id=102, pad_token_id=0)
        config = CLIPTextConfig(max_position_embeddings=24, projection_dim=8, **ends, **sizes)
        model = CLIPTextModelWithProjection(config)
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copy(minilm_directory() / name, path)
    return str(path)


def test_minilm_is_the_file_that_was_tested():
    weights = (minilm_directory() / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == MINILM_SHA256


def test_minilm_vectors(minilm):
    vectors = minilm.encode(TEXTS)
    assert vectors.shape == (4, 384) and vectors.dtype == torch.float32
    assert torch.allclose(vectors.norm(dim=1), torch.ones(4))
    near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert near > 0.6 and far < 0.2
    assert minilm.dim == 384 and minilm.max_tokens == 256


def test_order_and_padding_do_not_matter(minilm):
    together = minilm.encode(TEXTS, batch_size=3)
    alone = torch.cat([minilm.encode([text]) for text in TEXTS])
    assert torch.allclose(together, alone, atol=1e-6)


def test_encoding_equals_sentence_transformers_formula(minilm):
    tokens = minilm._tokenizer(TEXTS[:1], return_tensors="pt")
    with torch.inference_mode():
        hidden = minilm._model(**tokens).last_hidden_state[0]
    mean = hidden.mean(0)
    assert torch.allclose(minilm.encode(TEXTS[:1])[0], mean / mean.norm(), atol=1e-6)


def test_token_states_are_padded_masked_and_independent_of_the_batch(minilm):
    result = minilm.token_states(TEXTS, max_tokens=12, batch_size=1)
    assert result.states.shape == (4, 12, 384) and result.mask.shape == (4, 12)
    assert result.mask.sum(1).tolist() == [8, 9, 6, 3]  # start and end tokens included
    assert result.states[~result.mask].abs().max() == 0
    again = minilm.token_states(TEXTS[::-1], max_tokens=12, batch_size=1)
    assert torch.equal(result.states, again.states.flip(0))
    batched = minilm.token_states(TEXTS, max_tokens=12)
    assert torch.allclose(result.states, batched.states, atol=1e-5) and torch.equal(result.mask, batched.mask)


def test_long_text_is_cut_with_a_warning_that_quotes_the_rest(minilm):
    with pytest.warns(UserWarning, match=r"1 of 2 texts are longer than 6 tokens; cut off: 'the beach'"):
        states = minilm.token_states([TEXTS[0], "dog"], max_tokens=6)
    assert states.mask.sum(1).tolist() == [6, 3]
    with pytest.warns(UserWarning, match="longer than 256 tokens"):
        minilm.encode(["word " * 300])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        minilm.token_states([TEXTS[0]], max_tokens=8)


def test_bad_input_is_named(minilm):
    with pytest.raises(ValueError, match=r"1 of 2 texts are empty \(first: number 1\)"):
        minilm.encode(["a", "  "])
    with pytest.raises(ValueError, match="expected a list"):
        minilm.encode("a dog")
    with pytest.raises(ValueError, match="max_tokens is 300, minilm reads 3 to 256"):
        minilm.token_states(["a"], max_tokens=300)
    with pytest.raises(
        FileNotFoundError, match="no directory /nowhere; a repository of the hub is written hf:"
    ):
        TextEncoder("/nowhere")


def test_encoder_is_frozen(minilm):
    assert not minilm._model.training and not any(p.requires_grad for p in minilm._model.parameters())


@pytest.mark.slow
def test_any_transformers_encoder(tmp_path):
    encoder = TextEncoder(tiny_directory(tmp_path, "bert"))
    assert encoder.dim == encoder.token_dim == 16 and encoder.max_tokens == 24
    other = TextEncoder(tiny_directory(tmp_path / "other", "bert", seed=1))
    assert encoder.hash == TextEncoder(str(tmp_path)).hash != other.hash


def test_clip_gives_its_projected_embedding(tmp_path):
    encoder = TextEncoder(tiny_directory(tmp_path, "clip"))
    assert encoder.dim == 8 and encoder.token_dim == 16
    tokens = encoder._tokenizer(TEXTS[:1], return_tensors="pt")
    with torch.inference_mode():
        embedding = encoder._model(**tokens).text_embeds[0]
    assert torch.allclose(encoder.encode(TEXTS[:1])[0], embedding / embedding.norm(), atol=1e-6)


class CountingEncoder:
    """Vectors from a hash of the text, and a record of what was encoded."""

    dim = 4

    def __init__(self, name="one"):
        self.hash = name
        self.seen = []

    def encode(self, texts):
        self.seen += texts
        digests = [hashlib.sha256((self.hash + text).encode()).digest()[:4] for text in texts]
        return torch.nn.functional.normalize(torch.tensor([list(d) for d in digests]).float(), dim=1)


def test_cache_encodes_each_text_once_and_gives_equal_bits(tmp_path):
    encoder = CountingEncoder()
    first = EmbeddingCache(encoder, tmp_path).encode(["b", "a", "b"])
    again = EmbeddingCache(encoder, tmp_path).encode(["a", "b", "c"])
    assert sorted(encoder.seen) == ["a", "b", "c"]
    assert torch.equal(first[0], first[2]) and torch.equal(first[:2], again[:2].flip(0))
    assert torch.allclose(first, encoder.encode(["b", "a", "b"]), atol=1e-3)
    assert torch.allclose(first.norm(dim=1), torch.ones(3))


def test_cache_tells_encoders_apart(tmp_path):
    one, two = CountingEncoder("one"), CountingEncoder("two")
    EmbeddingCache(one, tmp_path).encode(["a"])
    assert torch.allclose(EmbeddingCache(two, tmp_path).encode(["a"]), two.encode(["a"]), atol=1e-3)


def fill(directory, start):
    cache = EmbeddingCache(CountingEncoder(), directory)
    for number in range(start, start + 60, 3):
        cache.encode([f"text {place}" for place in range(number, number + 6)])


def test_processes_share_the_cache(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=fill, args=(tmp_path, start)) for start in (0, 30)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    encoder = CountingEncoder()
    vectors = EmbeddingCache(encoder, tmp_path).encode([f"text {place}" for place in range(90)])
    assert encoder.seen == []
    assert torch.allclose(vectors, encoder.encode([f"text {place}" for place in range(90)]), atol=1e-3)


@pytest.fixture
def index():
    dataset = ImageTextDataset("shapes", shapes_examples("train", count=12))
    return UnitIndex.build(dataset, CountingEncoder()), dataset


def test_index_holds_the_units_of_its_split_and_no_other(index):
    index, dataset = index
    assert index.ids == dataset.ids
    for place, example in enumerate(dataset.examples):
        assert tuple(index.units(place, level) for level in range(4)) == units_of(
            example.captions, example.long_text
        )
    assert len(set(index.texts)) == len(index.texts) == len(index.vectors)


def test_batch_draws_without_replacement_from_the_own_units(index):
    index, _ = index
    generator = torch.Generator().manual_seed(0)
    places = [3, 0, 7, 3]
    for level in (1, 2, 3):
        rows, mask = index.sample_rows(places, level, generator, max_units=4)
        for row, kept, place in zip(rows, mask, places, strict=True):
            drawn = [index.texts[number] for number in row[kept].tolist()]
            own = index.units(place, level)
            assert len(drawn) == min(len(own), 4) == len(set(drawn)) and set(drawn) <= set(own)


def test_batch_looks_the_vectors_up_and_masks_the_rest(index):
    index, _ = index
    units, mask = index.batch([1, 2], 1, torch.Generator().manual_seed(1), max_units=30)
    assert units.shape == (2, 30, 4) and units.dtype == torch.float32
    assert mask.sum(1).tolist() == index.count(1)[[1, 2]].tolist()
    assert units[~mask].abs().max() == 0
    own = {tuple(CountingEncoder().encode([text])[0].half().tolist()) for text in index.units(1, 1)}
    assert {tuple(vector.half().tolist()) for vector in units[0][mask[0]]} == own


def test_bank_marks_the_units_that_an_example_owns(index):
    index, _ = index
    units, own = index.bank([1, 4], 1, torch.Generator().manual_seed(3), size=50)
    assert units.shape == (50, 4) and own.shape == (2, 50) and own.any() and not own.all()
    vectors = {text: index.vectors_of(torch.tensor(row)) for row, text in enumerate(index.texts)}
    for place, marks in zip([1, 4], own, strict=True):
        mine = [vectors[text] for text in index.units(place, 1)]
        assert marks.tolist() == [any(torch.equal(unit, vector) for vector in mine) for unit in units]


def test_every_unit_is_drawn_in_the_long_run(index):
    index, _ = index
    generator = torch.Generator().manual_seed(2)
    rows, _ = index.sample_rows([5] * 400, 1, generator, max_units=1)
    counts = torch.bincount(rows[:, 0])
    share = counts[counts > 0] / 400
    own = index.units(5, 1)
    assert len(share) == len(own) and (share - 1 / len(own)).abs().max() < 0.5 / len(own)


def test_long_text_joins_the_captions(tmp_path):
    example = Example("a", tmp_path, ("A dog runs.",), "A cat sleeps. A dog runs.", "train")
    captions, words, phrases, sentences = units_of(example.captions, example.long_text)
    assert captions == ("A dog runs.",) and words == ("dog", "run", "cat", "sleep")
    assert sentences == ("A dog runs.", "A cat sleeps.")
    assert "cat" in " ".join(phrases)
