"""Penn Treebank tokenisation of captions without Java, equal to what pycocoevalcap gets from CoreNLP 3.4.1.

Written from the observable behaviour of that tokenizer (`PTBTokenizer -preserveLines -lowerCase`), like which
it takes at each place the rule that reaches furthest; among equals the first. Lower-case text, punctuation
removed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from .ptb_characters import SYMBOLS, WORD_CHARACTERS, character_class

# What pycocoevalcap drops. Its list names the brackets in capitals, so the lower-case "-lrb-" stays: kept
# here too.
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

# Abbreviations keep their full stop: always; where no word follows without a space; with a capital; before a
# number.
FIRM = """
al ala apr ariz assn aug bancorp bhd bldg blvd bros calif co colo conn corp cos ct dak dec esq est etc ext
feb fla fri ga inc ind intl jan jr jul jun kan kans ky ltd mar md mich minn mo mon mont neb nev nov oct okla
penn ph.d plc rd rt sep sept seq sq sr sys tel tenn thu thurs tue tues univ va vt wed wis wisc wyo
""".split()
SOFT = """
adj adm adv alex asst atty ave brig capt cf cie cmdr col cpl dept det dr drs elec ens ft gen gov govs hon
insp invt jos lt maj mlle mme mr mrs ms mt natl pfc ph pres prof pvt rep reps rev sen sens sfc sgt spc st
ste supt vs wm lieut messrs msgr assoc profs
""".split()
CAPITAL = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash".split()
NUMBERED = "art ca fig figs no nos op pp prop".split()

L = character_class(WORD_CHARACTERS) + "a-zA-Z"
W = rf"[{L}\xad][{L}0-9\xad]*"  # starts with a letter
T = rf"[{L}0-9\xad]+"
APOS = "['\x92\u2019]"
NUM = r"(?:\d*(?:[.:,]\d+)+|\d+)"
ACRONYM = r"[A-Za-z](?:\.[A-Za-z])+"
ABBREVIATION = rf"(?:(?i:{'|'.join(FIRM + SOFT)})|[A-Za-z])\."
HYPHEN = "[-_\u058a\u2010\u2011]"
AUX = rf"{APOS}(?:[sdm]|re|ve|ll)(?![A-Za-z])"

PATH = r"[^ \"<>|()]+[^ \"<>|.!?(){},-]"
NO_HOST = r" \"'<>|.!?(){},\-_$:/"
HOST = rf"[^{NO_HOST}#&@0-9*\u2022\u2013\u2014][^{NO_HOST}]*\.(?:[^{NO_HOST}]+\.)*"

# Each rule is a pattern whose first group is the token; what follows the group is context, and counts in the
# contest.
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
        rf"((?i:[dol]){APOS}[{L}][{L}]+(?:{HYPHEN}{T})*)",
        rf"([A-HJ-XZn]{APOS}(?!(?:ll|re|ve)(?![{L}]))[{L}][{L}]+)",
        rf"((?i:[a-z]+[aeiouy]{APOS}[aeiou][a-z]*))",
        rf"((?i:c{APOS}mon|cap{APOS}n|ev{APOS}ry|nat{APOS}l|li{APOS}l|e{APOS}er|s{APOS}mores|o{APOS}o))",
        rf"((?i:ol{APOS}|dunkin{APOS}|somethin{APOS}|[dlj]{APOS}|{APOS}em|{APOS}cause|{APOS}till?|{APOS}n{APOS}))",
        rf"((?i:{APOS}n))(?![{L}])",
        rf"((?i:y{APOS}))[{L}]",
        rf"({APOS}[2-9]0s)",
        rf"({APOS}\d\d)(?![{L}0-9'\"])",
        # Words, compounds, abbreviations, addresses.
        rf"((?i:{'|'.join(FIRM)})\.)(?:..|.?$)",
        rf"((?:{'|'.join(CAPITAL + [word.upper() for word in CAPITAL])})\.)(?:..|.?$)",
        rf"({W}(?:[.!?]{W})+)",
        rf"({T}){AUX}",
        rf"((?:{NUM}|{T})(?:{HYPHEN}(?:(?i:[dol]){APOS})?{T})+)",
        rf"((?:{W}(?:\.{W})+|{ABBREVIATION}|{ACRONYM}\.?)(?:-(?:(?i:[dol]){APOS})?{T})+)",
        rf"({T}(?:-{T})*-[A-Z](?:\.[A-Z])+\.?)",
        rf"({T})",
        r"([A-Za-z0-9]+(?:-[A-Za-z]+)*(?:/[A-Za-z0-9]+(?:-[A-Za-z]+)*){1,2})",
        r"([A-Z]+(?:&[A-Z]+)+)",
        rf"({ACRONYM}\.)",
        rf"({ABBREVIATION})",
        rf"((?i:{'|'.join(NUMBERED)})\.) ?\d",
        r"((?:p?t(?:e|ys?|es)|mfg|mtg)\.)",
        rf"((?:{W}(?:\.{W})+|{T}(?:{HYPHEN}{T})*)\.)[,;:]",
        rf"((?:https?|HTTPS?|Https?)://{PATH})",
        rf"((?:www\.(?:[^ \"<>|.!?(){{}},]+\.)+[A-Za-z]{{2,4}}|{HOST}(?:com|net|org|edu))(?:/{PATH})?)",
        r"(<?[A-Za-z0-9][^ \"<>|()]*@(?!')(?:[^ \"<>|().{}]+\.)*[^ \"<>|().{}]+>?)",
        r"(@[A-Za-z_]\w*)",
        rf"(#[{L}]+)",
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
FAST = re.compile(r"([A-Za-z]+)(?:[.,]?)(?: |$)")
NOT_FAST = frozenset(["cannot", "gonna", "gotta", "lemme", "gimme", "wanna"])
WITH_STOP = frozenset(
    FIRM + SOFT + [word.lower() for word in CAPITAL] + NUMBERED + "p pte ptes pty ptys mfg mtg".split()
)


def sanitise(caption: str) -> str:
    """Return the caption on one line: any run of white space, line separators included, becomes one space."""
    return " ".join(caption.encode("utf-8", "replace").decode("utf-8").split())


def tokenize(caption: str) -> str:
    """Return the tokens of one caption, lower-case, without punctuation, joined by single spaces."""
    text = sanitise(caption).replace("&apos;", "'")
    tokens, place = [], 0
    while place < len(text):
        fast = FAST.match(text, place)
        if fast and _is_plain(fast):
            tokens.append(fast.group(1).lower())
            place = fast.end()
            continue
        token, place = _next_token(text, place)
        if token and token not in PUNCTUATION:
            tokens.append(token)
    return " ".join(tokens)


def tokenize_all(captions: Iterable[str]) -> list[str]:
    """Tokenise many captions; see `tokenize`."""
    return [tokenize(caption) for caption in captions]


def _is_plain(match: re.Match[str]) -> bool:
    word = match.group(1).lower()
    stopped = match.group().rstrip().endswith(".")
    return word not in NOT_FAST and not (stopped and (len(word) == 1 or word in WITH_STOP))


def _next_token(text: str, place: int) -> tuple[str, int]:
    """Return the token that starts at `place` ("" for what is dropped) and where to go on."""
    best, token_end, reach = None, place + 1, place
    for rule in RULES:
        match = rule.match(text, place)
        if match and match.end() > reach:
            best, token_end, reach = match.group(1), match.end(1), match.end()
    if best is None:
        character = text[place]
        known = character in REPLACED or KNOWN_SYMBOL.match(character)
        return (REPLACED.get(character, character.lower()) if known else ""), place + 1
    return _normalise(best), token_end


def _normalise(token: str) -> str:
    """Spell a token as the Java tokenizer prints it."""
    if (set(token) == {"-"} and len(token) < 5) or set(token) <= {".", " "}:
        return "-"
    if token.lower() in ENTITIES:
        return ENTITIES[token.lower()]
    token = token.replace("(", "-lrb-").replace(")", "-rrb-").replace(" ", "\xa0").replace("\xad", "")
    return token.translate(QUOTES).lower()
