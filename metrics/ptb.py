"""Penn Treebank tokenizer for captions without Java, equal to what pycocoevalcap gets from CoreNLP 3.4.1.

It follows the observed behaviour of that tokenizer (`PTBTokenizer -preserveLines -lowerCase`): at each
position the rule with the longest match wins, among equals the first one. Tokens are lower-case, punctuation
is removed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from .ptb_characters import SYMBOLS, WORD_CHARACTERS, character_class

# Tokens that pycocoevalcap drops. Its list names the brackets in capitals ("-LRB-"), so that those of a
# lower-case text stay; they stay here, too.
PUNCTUATION = frozenset(["''", "'", "``", "`", '"', ".", "?", "!", ",", ":", "-", "--", "...", ";"])
BRACKETS = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    "\x7f": "-rcb-",
}
REPLACED = BRACKETS | {
    **dict.fromkeys("\x80\xa4\u20a0\u20ac", "$"),
    "\xa3": "#",
    "\xa2": "cents",
    "\xbc": "1/4",
    "\xbd": "1/2",
    "\xbe": "3/4",
    "\u2153": "1/3",
    "\u2154": "2/3",
    "\xad": "-",
}
KNOWN_SYMBOL = re.compile(f"[!-/:-@[-`{{-~{character_class(SYMBOLS)}]")
QUOTES = str.maketrans(
    {
        **dict.fromkeys("\x91\u2018\u2039", "`"),
        **dict.fromkeys("\x92\u2019\u203a", "'"),
        **dict.fromkeys("\x93\u201c\xab", "``"),
        **dict.fromkeys("\x94\u201d\xbb", "''"),
    }
)
ENTITIES = {
    "&amp;": "&",
    "&lt;": "<",
    "&gt;": ">",
    "&quot;": "-",
    "&nbsp;": "-",
    "&mdash;": "-",
    "&ndash;": "-",
    "&md;": "-",
}

# Abbreviations that always keep their full stop.
FIRM = """
al ala apr ariz assn aug bancorp bhd bldg blvd bros calif co colo conn corp cos ct dak dec esq est etc ext
feb fla fri ga inc ind intl jan jr jul jun kan kans ky ltd mar md mich minn mo mon mont neb nev nov oct okla
penn ph.d plc rd rt sep sept seq sq sr sys tel tenn thu thurs tue tues univ va vt wed wis wisc wyo
""".split()
# Abbreviations that keep it unless a word follows without a space.
SOFT = """
adj adm adv alex asst atty ave brig capt cf cie cmdr col cpl dept det dr drs elec ens ft gen gov govs hon
insp invt jos lt maj mlle mme mr mrs ms mt natl pfc ph pres prof pvt rep reps rev sen sens sfc sgt spc st
ste supt vs wm lieut messrs msgr assoc profs
""".split()
# Abbreviations that keep it only if they begin with a capital.
CAPITAL = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash".split()
# Abbreviations that keep it only before a number.
NUMBERED = "art ca fig figs no nos op pp prop".split()

# Parts of the rules below. \xad is the soft hyphen, which words may hold.
LETTER = character_class(WORD_CHARACTERS) + "a-zA-Z"  # inside of a character class
WORD = rf"[{LETTER}\xad][{LETTER}0-9\xad]*"  # begins with a letter
TERM = rf"[{LETTER}0-9\xad]+"
APOS = "['\x92\u2019]"
NUM = r"(?:\d*(?:[.:,]\d+)+|\d+)"
ACRONYM = r"[A-Za-z](?:\.[A-Za-z])+"
ABBREVIATION = rf"(?:(?i:{'|'.join(FIRM + SOFT)})|[A-Za-z])\."
HYPHEN = "[-_\u058a\u2010\u2011]"
AUX = rf"{APOS}(?:[sdm]|re|ve|ll)(?![A-Za-z])"

PATH = r"[^ \"<>|()]+[^ \"<>|.!?(){},-]"
NO_HOST = r" \"'<>|.!?(){},\-_$:/"
HOST = rf"[^{NO_HOST}#&@0-9*\u2022\u2013\u2014][^{NO_HOST}]*\.(?:[^{NO_HOST}]+\.)*"

# The first group of a rule is the token. What a rule matches behind it is context: it stays for the next
# token, but counts when the longest match is sought.
RULES = tuple(
    re.compile(rule)
    for rule in (
        r"(<(?:[!?][A-Za-z-][^>]*|/[A-Za-z][\w:.-]* *|[A-Za-z][\w:.-]*"
        r"(?: +[A-Za-z][\w:.-]*(?: *= *(?:'[^']*'|\"[^\"]*\"))?)* */? *)>)",
        r"((?i:can))(?i:not)",
        r"((?i:gon|wan))(?i:na)",
        r"((?i:got))(?i:ta)",
        r"((?i:lem|gim))(?i:me)",
        rf"((?i:{APOS}t))(?i:is|was)",
        r"([A-Za-z]+?)(?i:n['\u2019`\x92]t)",
        r"((?i:n['\u2019`\x92]t))",
        rf"((?i:{AUX}))",
        # Words that hold or start with an apostrophe.
        rf"((?i:[dol]){APOS}[{LETTER}][{LETTER}]+(?:{HYPHEN}{TERM})*)",
        rf"([A-HJ-XZn]{APOS}(?!(?:ll|re|ve)(?![{LETTER}]))[{LETTER}][{LETTER}]+)",
        rf"((?i:[a-z]+[aeiouy]{APOS}[aeiou][a-z]*))",
        rf"((?i:c{APOS}mon|cap{APOS}n|ev{APOS}ry|nat{APOS}l|li{APOS}l|e{APOS}er|s{APOS}mores|o{APOS}o))",
        rf"((?i:ol{APOS}|dunkin{APOS}|somethin{APOS}|[dlj]{APOS}|{APOS}em|{APOS}cause|{APOS}till?|{APOS}n{APOS}))",
        rf"((?i:{APOS}n))(?![{LETTER}])",
        rf"((?i:y{APOS}))[{LETTER}]",
        rf"({APOS}[2-9]0s)",
        rf"({APOS}\d\d)(?![{LETTER}0-9'\"])",
        # Words, compounds, abbreviations, addresses.
        rf"((?i:{'|'.join(FIRM)})\.)(?:..|.?$)",
        rf"((?:{'|'.join(CAPITAL + [word.upper() for word in CAPITAL])})\.)(?:..|.?$)",
        rf"({WORD}(?:[.!?]{WORD})+)",
        rf"({TERM}){AUX}",
        rf"((?:{NUM}|{TERM})(?:{HYPHEN}(?:(?i:[dol]){APOS})?{TERM})+)",
        rf"((?:{WORD}(?:\.{WORD})+|{ABBREVIATION}|{ACRONYM}\.?)(?:-(?:(?i:[dol]){APOS})?{TERM})+)",
        rf"({TERM}(?:-{TERM})*-[A-Z](?:\.[A-Z])+\.?)",
        rf"({TERM})",
        r"([A-Za-z0-9]+(?:-[A-Za-z]+)*(?:/[A-Za-z0-9]+(?:-[A-Za-z]+)*){1,2})",
        r"([A-Z]+(?:&[A-Z]+)+)",
        rf"({ACRONYM}\.)",
        rf"({ABBREVIATION})",
        rf"((?i:{'|'.join(NUMBERED)})\.) ?\d",
        r"((?:p?t(?:e|ys?|es)|mfg|mtg)\.)",
        rf"((?:{WORD}(?:\.{WORD})+|{TERM}(?:{HYPHEN}{TERM})*)\.)[,;:]",
        rf"((?:https?|HTTPS?|Https?)://{PATH})",
        rf"((?:www\.(?:[^ \"<>|.!?(){{}},]+\.)+[A-Za-z]{{2,4}}|{HOST}(?:com|net|org|edu))(?:/{PATH})?)",
        r"(<?[A-Za-z0-9][^ \"<>|()]*@(?!')(?:[^ \"<>|().{}]+\.)*[^ \"<>|().{}]+>?)",
        r"(@[A-Za-z_]\w*)",
        rf"(#[{LETTER}]+)",
        # Numbers.
        rf"([-+]?{NUM})",
        r"(\d{1,4}[- ]\d{1,4}/\d{1,4}|\d{1,4}/\d{1,4})",
        r"(\d{1,2}[-/]\d{1,2}[-/]\d{2,4})",
        r"((?:\(\d{2,3}\) ?|\+{0,2}(?:\d{2,4}[- ])?\d{2,4}[- ])\d{3,4}[- ]?\d{3,5})",
        r"(\d{3,4}[- ]\d{3,4}-\d{3,5})",
        r"([A-Z]+\$|[cC]\+\+|[cCfF]#)",
        # Faces and runs of punctuation.
        r"(>?[:;=](?:'|-)?[()DPpO\]\[|@3])(?![A-Za-z0-9])",
        r"(\^_\^|>_<|-_-|[Tt]_[Tt]|[oO]_[oO]|\(\^_\^\))",
        r"(-{5,}|_{2,}|\*{2,}|#{2,}|@{2,}|<<|>>|[?!]+)",
        r"(''|[`\x91-\x94\u2018\u2019\u201c\u201d\xab\xbb\u2039\u203a]{2})",
        r"(&(?:(?i:amp|lt|gt|quot|nbsp)|[mn]dash|MD|HT|TL|UR|LR|QC|QL|QR|odq|cdq|#\d+);)",
        r"(-{2,4}|\.\.\.|\. \. \.)",
    )
)

# Most words of a caption are plain letters before a space, a comma or a full stop. Unless `_is_plain` denies
# it, they are tokens as they are, and need not try all rules.
PLAIN = re.compile(r"([A-Za-z]+)(?:[.,]?)(?: |$)")
SPLIT_WORDS = frozenset(["cannot", "gonna", "gotta", "lemme", "gimme", "wanna"])
ABBREVIATIONS = frozenset(
    FIRM + SOFT + [word.lower() for word in CAPITAL] + NUMBERED + "p pte ptes pty ptys mfg mtg".split()
)


def tokenize(caption: str) -> str:
    """Return the tokens of one caption, lower-case, without punctuation, joined by single spaces."""
    text = sanitise(caption).replace("&apos;", "'")
    tokens = []
    position = 0
    while position < len(text):
        plain = PLAIN.match(text, position)
        if plain and _is_plain(plain):
            tokens.append(plain.group(1).lower())
            position = plain.end()
            continue

        token, position = _next_token(text, position)
        if token and token not in PUNCTUATION:
            tokens.append(token)
    return " ".join(tokens)


def tokenize_all(captions: Iterable[str]) -> list[str]:
    """Tokenise many captions; see `tokenize`."""
    return [tokenize(caption) for caption in captions]


def sanitise(caption: str) -> str:
    """Return the caption on one line: any run of white space becomes one space.

    A line separator such as U+2028 within a caption would make two captions of one for the Java tokenizer,
    and shift all captions behind it.
    """
    return " ".join(caption.encode("utf-8", "replace").decode("utf-8").split())


def _is_plain(match: re.Match[str]) -> bool:
    """Tell whether a match of PLAIN is one token, without its full stop."""
    word = match.group(1).lower()
    if word in SPLIT_WORDS:
        return False
    has_full_stop = match.group().rstrip().endswith(".")
    return not (has_full_stop and (len(word) == 1 or word in ABBREVIATIONS))


def _next_token(text: str, position: int) -> tuple[str, int]:
    """Return the token at `position`, "" for what is dropped, and the position behind it."""
    best = None
    token_end = position + 1
    reach = position
    for rule in RULES:
        match = rule.match(text, position)
        if match and match.end() > reach:
            best = match.group(1)
            token_end = match.end(1)
            reach = match.end()

    if best is None:
        character = text[position]
        known = character in REPLACED or KNOWN_SYMBOL.match(character)
        return (REPLACED.get(character, character.lower()) if known else ""), position + 1
    return _normalise(best), token_end


def _normalise(token: str) -> str:
    """Spell a token as the Java tokenizer prints it."""
    # Dashes and ellipses all become one dash, which is dropped as punctuation.
    if (set(token) == {"-"} and len(token) < 5) or set(token) <= {".", " "}:
        return "-"
    if token.lower() in ENTITIES:
        return ENTITIES[token.lower()]
    # A space inside a token, as in a phone number, becomes a no-break space, so that it does not split it.
    token = token.replace("(", "-lrb-").replace(")", "-rrb-").replace(" ", "\xa0").replace("\xad", "")
    return token.translate(QUOTES).lower()
