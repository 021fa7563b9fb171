"""Change one thing in the source at a time, and see whether a test notices: make mutants

`mutants.yaml` names the modules, the tests that cover each, and the survivors that are accepted, with the
reason. Works on a copy of the last commit, so that the working tree is never touched, and goes on where it
was stopped: what was killed stays killed until its module changes; what survived is tried again when its
tests change. Writes docs/mutants.md.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cosmic_ray.plugins
import parso
import yaml
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import MutationVisitor
from cosmic_ray.operators.operator import Operator
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "runs" / "mutants"
SOURCE = RUN / "source"  # the copy that is mutated
TABLE = ROOT / "docs" / "mutants.md"
AXIS = re.compile(r"(dims?=[(\[]?|squeeze\(|transpose\(|flatten\(|movedim\(|(dims?=.|transpose\()-?\d, )-?$")
PRELOADED = (
    "torch",
    "transformers",
    "accelerate",
    "safetensors.torch",
    "scipy.optimize",
    "webdataset",
    "pytest",
)
SLOWER = (
    4.0  # times what the tests take without a mutation, and they are stopped: an endless loop is noticed, too
)
FEWEST_SECONDS = 30.0
NO_TESTS = 5  # pytest's exit code where none has the mark

CHOSEN = """
    ReplaceBinaryOperator_Add_Sub ReplaceBinaryOperator_Sub_Add ReplaceBinaryOperator_Mul_Div
    ReplaceBinaryOperator_Div_Mul ReplaceBinaryOperator_FloorDiv_Mul ReplaceBinaryOperator_Mod_Add
    ReplaceBinaryOperator_Pow_Mul ReplaceBinaryOperator_BitAnd_BitOr ReplaceBinaryOperator_BitOr_BitAnd
    ReplaceComparisonOperator_Eq_NotEq ReplaceComparisonOperator_NotEq_Eq ReplaceComparisonOperator_Lt_LtE
    ReplaceComparisonOperator_LtE_Lt ReplaceComparisonOperator_Gt_GtE ReplaceComparisonOperator_GtE_Gt
    ReplaceComparisonOperator_Is_IsNot ReplaceComparisonOperator_IsNot_Is ReplaceUnaryOperator_USub_UAdd
    ReplaceUnaryOperator_Delete_Not ReplaceUnaryOperator_Delete_Invert AddNot ReplaceTrueWithFalse
    ReplaceFalseWithTrue ReplaceAndWithOr ReplaceOrWithAnd ReplaceBreakWithContinue ReplaceContinueWithBreak
    NumberReplacer ZeroIterationForLoop
"""  # of Cosmic Ray's operators. Its others, such as + by >>, mostly end in an error at once


INTRODUCTION = """\
`make mutants` changes one thing in the source at a time (`+` to `-`, `<` to `<=`, a number by one,
`x.detach()` to `x`, a statement to nothing, ...) and runs the tests that cover the module. A mutant is
killed when a test fails. Of the {judged:,} mutants that were tried and are not accepted, {share} are killed.
Where not all were tried, those that were are a random sample. The command writes this page.
"""


class LetGradientThrough(Operator):
    """Replace `x.detach()` by `x.clone()`."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.type == "trailer" and node.get_code() == ".detach":
            yield node.start_pos, node.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        node.children[1].value = "clone"
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


class DeleteStatement(Operator):
    """Replace a call whose result is not used, an addition to a variable, or a raise by `pass`."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Any, Any]]:
        if node.type != "simple_stmt":
            return
        statement = node.children[0]
        adds = statement.type == "expr_stmt" and str(statement.children[1].get_code()).strip() in (
            "+=",
            "-=",
            "*=",
        )
        if statement.type in ("atom_expr", "raise_stmt") or adds:
            yield statement.start_pos, statement.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        indentation = node.get_first_leaf().prefix
        return parso.parse(f"{indentation}pass\n").children[0]

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


@dataclass(frozen=True)
class Mutant:
    """A module with one change: its only differing line, before and after."""

    module: str
    line: int
    operator: str
    before: str
    after: str
    occurrence: int
    """Number among the places where the operator can change the module."""

    @property
    def key(self) -> tuple[str, ...]:
        return (self.operator, self.before, self.after, str(self.occurrence))


@dataclass(frozen=True)
class Result:
    mutant: Mutant
    outcome: str
    """killed, or survived."""
    tests: str
    """Hash of the tests that were run."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("modules", nargs="*", help="such as alignment/transport.py; all by default")
    parser.add_argument(
        "--per-module",
        type=int,
        metavar="N",
        help="try N mutants of each module, the same random ones each time; all by default",
    )
    parser.add_argument(
        "--table", action="store_true", help="write the table of what was run, and run nothing"
    )
    parser.add_argument("--list", action="store_true", help="print what survived so far, and run nothing")
    options = parser.parse_args(argv)

    config = yaml.safe_load((ROOT / ".ci" / "mutants.yaml").read_text())
    modules = options.modules or list(config["modules"])
    if unknown := [module for module in modules if module not in config["modules"]]:
        sys.exit(f"error: .ci/mutants.yaml does not name {', '.join(unknown)}")
    if options.list:
        print_survivors(modules, config["accepted"])
        return

    if not options.table:
        copy_commit()
        for name in PRELOADED:
            importlib.import_module(name)
        for module in modules:
            run_module(module, config["modules"][module], options.per_module)
    TABLE.write_text(table(config))


def copy_commit() -> None:
    """Write the files of the last commit to `SOURCE`."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    SOURCE.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(SOURCE)], input=archive, check=True)
    if (data := ROOT.parent / "shared").exists():
        (SOURCE.parent / "shared").unlink(missing_ok=True)
        (SOURCE.parent / "shared").symlink_to(data)


def run_module(module: str, tests: list[str], count: int | None) -> None:
    """Run the tests of a module on each of its first `count` mutants that has no result yet."""
    known = {result.mutant.key: result for result in results_of(module)}
    tests_hash = hash_of(*(SOURCE / test.split("::")[0] for test in tests))
    pending = []
    for mutant in mutants_of(module, SOURCE / module)[:count]:
        result = known.get(mutant.key)
        if result is None or (result.outcome == "survived" and result.tests != tests_hash):
            pending.append(mutant)
    if not pending:
        return

    start = time.monotonic()
    if not passes(tests, seconds=1e6, mark=""):
        sys.exit(f"error: {' '.join(tests)} fail without a mutation")
    seconds = max(FEWEST_SECONDS, SLOWER * (time.monotonic() - start))

    source = (SOURCE / module).read_text()
    for mutant in tqdm(pending, desc=module, unit="mutant"):
        try:
            (SOURCE / module).write_text(mutated(source, operators()[mutant.operator], mutant.occurrence))
            survived = passes(tests, seconds, "not slow") and passes(tests, seconds, "slow")
        finally:
            (SOURCE / module).write_text(source)
        record(Result(mutant, "survived" if survived else "killed", tests_hash))


def operators() -> dict[str, Operator]:
    """Return the mutations that are tried, by name."""
    named: dict[str, Operator] = {
        name: cosmic_ray.plugins.get_operator(f"core/{name}")() for name in CHOSEN.split()
    }
    return named | {"LetGradientThrough": LetGradientThrough(), "DeleteStatement": DeleteStatement()}


def mutants_of(module: str, path: Path) -> list[Mutant]:
    """List the mutants of a module in an order that is random and always the same: the first are a sample."""
    source = path.read_text()
    lines = source.splitlines()
    harmless = Harmless(source)
    found = []
    for name, operator in operators().items():
        places = [place for node in ast_nodes(get_ast(source)) for place in operator.mutation_positions(node)]
        for occurrence, ((line, column), _) in enumerate(places):
            if harmless.holds(line, column) or (name == "NumberReplacer" and occurrence % 2):  # +1 is enough
                continue
            before = lines[line - 1].strip()
            after = "pass"  # for a statement of several lines the lines below it move
            if name != "DeleteStatement":
                after = mutated(source, operator, occurrence).splitlines()[line - 1].strip()
            if after != before:
                found.append(Mutant(module, line, name, before, after, occurrence))
    return sorted(found, key=lambda mutant: hashlib.sha256(repr(mutant.key).encode()).digest())


def mutated(source: str, operator: Operator, occurrence: int) -> str:
    """Return the source with one change."""
    return str(MutationVisitor.mutate_code(source, operator, occurrence))


class Harmless:
    """Places where a change says nothing about the tests: signatures, types, messages, and numbers of axes.

    A wrong axis ends in an error of shapes nearly always, and there are more axes than other numbers.
    """

    def __init__(self, source: str):
        self.lines = source.splitlines()
        self.spans: list[tuple[tuple[int, int], tuple[int, int]]] = []
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                self.spans.append(((node.lineno, 0), (node.body[0].lineno, 0)))
            elif isinstance(node, ast.AnnAssign):
                self._add(node.annotation)
            elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                for argument in node.exc.args:
                    self._add(argument)

    def _add(self, node: ast.expr) -> None:
        end = (node.end_lineno or node.lineno, node.end_col_offset or node.col_offset)
        self.spans.append(((node.lineno, node.col_offset), end))

    def holds(self, line: int, column: int) -> bool:
        if AXIS.search(self.lines[line - 1][:column]):
            return True
        return any(start <= (line, column) < end for start, end in self.spans)


def passes(tests: list[str], seconds: float, mark: str) -> bool:
    """Whether the tests with the mark pass within the time, in a process that has the libraries loaded."""
    child = os.fork()
    if child == 0:
        os.setsid()
        _run_tests(tests, mark)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status) in (0, NO_TESTS)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def _run_tests(tests: list[str], mark: str) -> None:
    import pytest

    code = 1
    try:
        os.chdir(SOURCE)
        os.environ |= {"PYTHONPATH": str(SOURCE), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        sys.dont_write_bytecode = True
        sys.path.insert(0, str(SOURCE))
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", mark, *tests])
    finally:
        os._exit(int(code))


def results_of(module: str) -> list[Result]:
    """Read the results of a module as it is in the last commit; those of an earlier one do not count."""
    file = results_file(module)
    if not file.exists():
        return []
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [Result(Mutant(**row["mutant"]), row["outcome"], row["tests"]) for row in rows]


def record(result: Result) -> None:
    file = results_file(result.mutant.module)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.write(json.dumps(asdict(result)) + "\n")


def results_file(module: str) -> Path:
    return RUN / "results" / f"{module.replace('/', '.')}.{hash_of(ROOT / module)[:12]}.jsonl"


def hash_of(*files: Path) -> str:
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def survivors_of(module: str) -> tuple[list[Mutant], int]:
    """Return the mutants that survived their last run, and how many were run."""
    last = {result.mutant.key: result for result in results_of(module)}
    return [result.mutant for result in last.values() if result.outcome == "survived"], len(last)


def is_accepted(mutant: Mutant, accepted: list[dict[str, str]]) -> bool:
    return any(
        row["module"] == mutant.module
        and row["before"] == mutant.before
        and row.get("after", mutant.after) == mutant.after
        for row in accepted
    )


def print_survivors(modules: Sequence[str], accepted: list[dict[str, str]]) -> None:
    for module in modules:
        survivors, run = survivors_of(module)
        open_ones = [mutant for mutant in survivors if not is_accepted(mutant, accepted)]
        print(f"{module}: {run} run, {len(survivors)} survived, {len(open_ones)} not accepted")
        for mutant in open_ones:
            print(f"  {mutant.line}: {mutant.before}\n      -> {mutant.after}")


def table(config: dict[str, Any]) -> str:
    """Write the page of results, in Markdown."""
    rows = ["| module | mutants | tried | killed | accepted | survived |"]
    rows.append("| --- |" + " ---: |" * 5)
    totals = [0, 0, 0, 0, 0]
    open_ones: list[Mutant] = []
    for module in config["modules"]:
        survivors, run = survivors_of(module)
        if not run:
            continue
        unaccepted = [mutant for mutant in survivors if not is_accepted(mutant, config["accepted"])]
        open_ones += unaccepted
        everything = len(mutants_of(module, ROOT / module))
        counts = (everything, run, run - len(survivors), len(survivors) - len(unaccepted), len(unaccepted))
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        rows.append(f"| `{module}` | " + " | ".join(f"{count:,}" for count in counts) + " |")
    rows.append("| **all** | " + " | ".join(f"**{total:,}**" for total in totals) + " |")

    judged = totals[1] - totals[3]
    share = f"{totals[2] / judged:.1%}" if judged else "none"
    accepted = ["| module | line | reason |", "| --- | --- | --- |"]
    accepted += [
        f"| `{row['module']}` | `{_cell(row['before'])}` | {row['reason']} |" for row in config["accepted"]
    ]
    left = [
        f"- `{mutant.module}`: `{_code(mutant.before)}` -> `{_code(mutant.after)}`" for mutant in open_ones
    ]
    return "\n".join(
        [
            "# Mutants",
            "",
            *INTRODUCTION.format(judged=judged, share=share).splitlines(),
            "",
            *rows,
            "",
            "## Accepted survivors",
            "",
            *accepted,
            "",
            "## Survivors that no test notices yet",
            "",
            *(left or ["None."]),
            "",
        ]
    )


def _code(text: str) -> str:
    return text.replace("`", "'")


def _cell(text: str) -> str:
    return _code(text).replace("|", "\\|")


if __name__ == "__main__":
    main()
