"""A text split into words, phrases and sentences, without any download.

Tags come from the lexicon inside the textblob wheel (pattern's tagger), phrases from an NLTK chunk grammar
over them. The tagger errs on some 4 of 85 phrases of ordinary captions ("grated cheese" loses "grated").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

_GRAMMAR = r"""
NP: {<DT|PRP\$|CD>?<RB>?<JJ.*|VBN|VBG|CD>*<NN.*>+}
VO: {<VB.*><RP>?<IN|TO>?<NP>}
"""
_CONTENT_TAGS = ("NN", "JJ", "VB", "CD")
_EMPTY_NOUNS = frozenset({"image", "photo", "picture", "photograph", "foreground", "background", "front"})
_EMPTY_VERBS = frozenset(
    {"be", "have", "do", "can", "could", "may", "might", "must", "shall", "should", "will", "would"}
)
_STOP_WORDS = frozenset(
    "such other another same own more most many much several few some all both each every any only one "
    "there here this that these those it its he she they them his her their who which what etc".split()
)
_PLURAL_ONLY = frozenset(
    "shorts pants jeans clothes glasses sunglasses trousers goggles tights headphones".split()
)
_SINGULAR_IN_S = ("ss", "us", "is")
_IRREGULAR_PLURALS = {
    "men": "man", "women": "woman", "children": "child", "feet": "foot", "teeth": "tooth", "mice": "mouse",
    "geese": "goose",
}  # fmt: skip
_FORMS_OF = {
    "be": "is are was were be been being am 's 're", "have": "has have had having 've",
    "do": "does did done doing", "sit": "sat", "stand": "stood", "run": "ran", "hold": "held",
    "wear": "wore worn", "ride": "rode ridden", "throw": "threw thrown", "catch": "caught",
    "swim": "swam swum", "eat": "ate eaten", "lie": "lying lay lain", "lay": "laid", "tie": "tying tied",
    "take": "took taken", "make": "made", "go": "went gone goes", "come": "came", "get": "got gotten",
    "give": "gave given", "see": "saw seen", "fly": "flew flown", "fall": "fell fallen",
    "drive": "drove driven", "write": "wrote written", "draw": "drew drawn", "break": "broke broken",
    "hide": "hid hidden", "lead": "led", "build": "built", "bend": "bent", "hang": "hung", "keep": "kept",
    "sleep": "slept", "leap": "leapt", "shoot": "shot", "bite": "bit bitten", "blow": "blew blown",
    "grow": "grew grown", "fight": "fought", "buy": "bought", "teach": "taught", "feed": "fed",
    "slide": "slid", "shake": "shook shaken", "speak": "spoke spoken", "sing": "sang sung",
    "drink": "drank drunk", "die": "dying", "wind": "wound", "strike": "struck", "stick": "stuck",
    "dig": "dug", "spin": "spun", "swing": "swung", "find": "found", "meet": "met", "say": "said",
    "tell": "told", "know": "knew known", "show": "shown",
}  # fmt: skip
_IRREGULAR = {form: base for base, forms in _FORMS_OF.items() for form in forms.split()}


@dataclass(frozen=True)
class Units:
    """What a text names, at three granularities; each tuple in order of appearance, without repeats.

    Attributes:
        words: content words (nouns, adjectives, verbs, numerals), lower case, lemmatised, no stop words.
        phrases: noun chunks and verb-object chunks, lower case, without a leading article.
        sentences: as written, white space collapsed.
    """

    words: tuple[str, ...]
    phrases: tuple[str, ...]
    sentences: tuple[str, ...]


@lru_cache(maxsize=100_000)
def split_units(text: str) -> Units:
    """Split a text into words, phrases and sentences (about 1,000 captions a second; remembered).

    Raises:
        ValueError: the text is empty.
    """
    if not text.strip():
        raise ValueError("got an empty text, expected at least one word; write what the image shows")
    parsed = [pair for line in text.splitlines() if line.strip() for pair in _tagged_sentences(line)]
    return Units(
        words=_unique(word for _, tagged in parsed for word in _content_words(tagged)),
        phrases=_unique(phrase for _, tagged in parsed for phrase in _phrases(tagged)),
        sentences=_unique(sentence for sentence, _ in parsed),
    )


def units_of(captions: Sequence[str], long_text: str | None = None) -> tuple[tuple[str, ...], ...]:
    """Captions, words, phrases and sentences of one image's texts, each without repeats."""
    captions = tuple(dict.fromkeys(captions))
    parts = [split_units(caption) for caption in captions]
    if long_text:
        parts.append(split_units(long_text))

    words = tuple(dict.fromkeys(word for part in parts for word in part.words))
    phrases = tuple(dict.fromkeys(phrase for part in parts for phrase in part.phrases))
    # A caption counts as one sentence, whatever its full stops; the long text as several.
    sentences = captions + (parts[-1].sentences if long_text else ())
    return captions, words, phrases, tuple(dict.fromkeys(sentences))


def lemma(word: str, tag: str) -> str:
    """Reduce a lower-case word to its base by its Penn tag: plural nouns and inflected verbs change."""
    if tag.startswith("NN"):
        return _singular(word) if word.endswith("s") else _IRREGULAR_PLURALS.get(word, word)
    if tag.startswith("VB") or tag == "MD":
        return _verb_base(word)
    return word


def _tagged_sentences(line: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return (sentence as written, its [(lower-case token, tag)]) of one line."""
    from textblob.en import parse, parser

    line = " ".join(line.split())
    sentences = parser.find_tokens(line)  # as written: "Dr." ends no sentence, "dr." does
    lower = "\n".join(sentences).lower()  # in lower case no first word is taken for a name
    found = []
    for tokens, tagged in zip(sentences, parse(lower, tokenize=False, chunks=False, split=True), strict=True):
        sentence, line = _cut(line, len(tokens.replace(" ", "")))
        if any(character.isalnum() for character in sentence):
            found.append((sentence, [(token[0], token[1]) for token in tagged]))
        elif found:  # a closing quotation mark belongs to what it closes
            found[-1] = (f"{found[-1][0]} {sentence}", found[-1][1])
    return found


def _cut(line: str, visible: int) -> tuple[str, str]:
    """Cut a line after so many visible characters: the tokeniser inserts spaces and changes nothing else."""
    end = 0
    while visible > 0:
        visible -= not line[end].isspace()
        end += 1
    return line[:end].strip(), line[end:]


def _content_words(tagged: list[tuple[str, str]]) -> Iterable[str]:
    for word, tag in tagged:
        if not tag.startswith(_CONTENT_TAGS) or word in _STOP_WORDS:
            continue
        base = lemma(word, tag)
        if base in _EMPTY_NOUNS or base in _EMPTY_VERBS:
            continue
        if (len(base) > 1 or base.isdigit()) and any(character.isalnum() for character in base):
            yield base


def _phrases(tagged: list[tuple[str, str]]) -> Iterable[str]:
    for chunk in _chunker().parse(tagged).subtrees(lambda tree: tree.label() in ("NP", "VO")):
        leaves = chunk.leaves()
        if leaves[0][1] in ("DT", "PRP$"):
            leaves = leaves[1:]
        head, first = lemma(*leaves[-1]), lemma(*leaves[0])
        if len(head) < 2 or head in _EMPTY_NOUNS or (chunk.label() == "VO" and first in _EMPTY_VERBS):
            continue
        yield " ".join(word for word, _ in leaves)


@cache
def _chunker():
    from nltk.chunk.regexp import RegexpParser

    return RegexpParser(_GRAMMAR)


def _unique(items: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(items))


@cache
def _singular(word: str) -> str:
    from textblob.en.inflect import singularize

    if word in _PLURAL_ONLY or word.endswith(_SINGULAR_IN_S):
        return word
    return singularize(word)


@cache
def _verb_base(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    for ending in ("ing", "ed"):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return _without_suffix(word, word[: -len(ending)])
    if word.endswith(("ies", "ied")):
        return word[:-3] + "y"
    if word.endswith("es") and (word[:-2].endswith(("sh", "ch", "ss", "x", "zz", "o"))):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _without_suffix(word: str, stem: str) -> str:
    """Undo the spelling rules of -ing and -ed (running -> run, riding -> ride); unknown words stay."""
    from textblob.en import lexicon

    if word.endswith("ied"):
        return stem[:-1] + "y"
    candidates = [stem, stem + "e"]
    if re.fullmatch("[^aeiou]*[aeiou][^aeiouwxy]", stem):  # riding: "rid" would have doubled its d
        candidates.reverse()
    if len(stem) > 2 and stem[-1] == stem[-2] and stem[-1] not in "aeiou":
        candidates = [stem, stem[:-1]] if stem[-1] in "lsfz" else [stem[:-1], stem]
    return next((base for base in candidates if base in lexicon), word)
