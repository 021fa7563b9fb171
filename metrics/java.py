"""The three Java programs that pycocoevalcap ships: its Penn Treebank tokenizer, METEOR and SPICE.

pycocoevalcap's own wrappers may wait for ever, write into site-packages and depend on the locale. Here the
same jars are called with a time limit.

Shapes: n captions.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .ptb import PUNCTUATION, sanitise

PTB_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"
METEOR_JAR = "meteor/meteor-1.5.jar"
SPICE_JAR = "spice/spice-1.0.jar"
SPICE_MODELS = ("spice/lib/stanford-corenlp-3.6.0.jar", "spice/lib/stanford-corenlp-3.6.0-models.jar")
METEOR_FIELDS = 23
METEOR_CHUNKS = 20  # the field that holds the number of chunks


class JavaError(ValueError):
    """A Java process is missing, failed, or took too long; the message says what to do."""


def java_available() -> bool:
    """Tell whether a `java` command is on the path."""
    return shutil.which("java") is not None


def spice_missing() -> str | None:
    """Return why SPICE cannot run here, None where it can."""
    lacking = [name for name in SPICE_MODELS if not (_package() / name).is_file()]
    return f"{Path(lacking[0]).name} is not beside pycocoevalcap's spice-1.0.jar" if lacking else None


def tokenize_java(captions: Sequence[str], timeout_s: float = 300.0) -> list[str]:
    """Tokenise as pycocoevalcap's PTBTokenizer does: lower-case tokens without punctuation, joined by spaces.

    Raises:
        JavaError: Java is missing, fails, or takes longer than `timeout_s`.
    """
    command = [
        "-cp",
        str(_package() / PTB_JAR),
        "edu.stanford.nlp.process.PTBTokenizer",
        "-preserveLines",
        "-lowerCase",
    ]
    # A blank line after each caption keeps it apart from the next one. Without it "no." before a caption that
    # starts with a digit is taken for an abbreviation, and an image's score would depend on its neighbour.
    text = "".join(sanitise(caption) + "\n\n" for caption in captions)
    lines = _run_java(command, text, timeout_s).split("\n")[:-1:2]
    if len(lines) != len(captions):
        raise JavaError(
            f"the PTB tokenizer gave {len(lines)} lines for {len(captions)} captions; use backend='python'"
        )
    return [
        " ".join(token for token in line.split(" ") if token and token not in PUNCTUATION) for line in lines
    ]


def meteor_statistics(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], timeout_s: float = 600.0
) -> np.ndarray:
    """Align tokenised captions with METEOR 1.5.

    Returns:
        (n, 23) float64 statistics, of which `captions.meteor_score` takes sums.

    Raises:
        JavaError: Java is missing, fails, or takes longer than `timeout_s`.
    """
    # The separator of METEOR's protocol must not occur in a caption.
    lines = [
        " ||| ".join(["SCORE", *refs, hypothesis.replace("|||", "").replace("  ", " ")])
        for hypothesis, refs in zip(hypotheses, references, strict=True)
    ]
    command = ["-Xmx2G", "-jar", str(_package() / METEOR_JAR), "-", "-", "-stdio", "-l", "en", "-norm"]
    output = _run_java(command, "".join(line + "\n" for line in lines), timeout_s)
    rows = [line.split() for line in output.splitlines()]
    if len(rows) != len(lines) or any(len(row) != METEOR_FIELDS for row in rows):
        raise JavaError(f"METEOR gave {len(rows)} usable lines for {len(lines)} captions; leave METEOR out")
    # METEOR counts no chunk in a sentence that is matched as a whole, neither alone nor in a corpus sum.
    statistics = np.array(rows, dtype=np.float64)
    all_matched = (statistics[:, :2] == statistics[:, 21:]).all(axis=1)
    statistics[all_matched & (statistics[:, METEOR_CHUNKS] == 1), METEOR_CHUNKS] = 0
    return statistics


def spice_scores(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], timeout_s: float = 1800.0
) -> np.ndarray:
    """Score tokenised captions with SPICE 1.0.

    Returns:
        (n,) float64 F scores.

    Raises:
        JavaError: Java is missing, fails, or takes longer than `timeout_s`.
    """
    items = [
        {"image_id": i, "test": hypothesis, "refs": list(refs)}
        for i, (hypothesis, refs) in enumerate(zip(hypotheses, references, strict=True))
    ]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "in.json")
        target = Path(folder, "out.json")
        source.write_text(json.dumps(items))
        command = [
            "-Xmx8G",
            "-jar",
            str(_package() / SPICE_JAR),
            str(source),
            "-out",
            str(target),
            "-subset",
            "-silent",
        ]
        _run_java(command, "", timeout_s)
        results = json.loads(target.read_text())

    # SPICE may write the images in another order.
    scores = {item["image_id"]: item["scores"]["All"]["f"] for item in results}
    return np.array([float(scores[i]) for i in range(len(items))])


def _package() -> Path:
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or spec.submodule_search_locations is None:
        raise JavaError("pycocoevalcap is not installed; pip install 'ta-vq[eval]'")
    return Path(next(iter(spec.submodule_search_locations)))


def _run_java(arguments: list[str], text: str, timeout_s: float) -> str:
    """Run java in an English UTF-8 locale, whatever the user's, and return its standard output."""
    java = shutil.which("java")
    if java is None:
        raise JavaError(
            "no java on the path; install one (apt-get install default-jre-headless) or use backend='python'"
        )

    locale = ["-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US"]
    # A session of its own, so that `_kill` also reaches what a wrapper script named java has started.
    with subprocess.Popen(
        [java, *locale, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            output, errors = process.communicate(text.encode(), timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            _kill(process)
            raise JavaError(
                f"java gave no answer in {timeout_s:g} s; repair it or use backend='python'"
            ) from error
        except BaseException:
            _kill(process)
            raise

    if process.returncode:
        last = "".join(errors.decode(errors="replace").strip().splitlines()[-1:])
        raise JavaError(f"java failed ({process.returncode}): {last}; repair it or use backend='python'")
    return output.decode()


def _kill(process: subprocess.Popen) -> None:
    """Kill java and every process of its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
