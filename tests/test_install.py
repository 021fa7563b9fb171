"""`make demo` and `make test` install once, and never a CUDA build on a machine without a GPU."""

import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PIN = "2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
VISION_PIN = "0.28.0"
STUB_PYTHON = """#!/bin/sh
echo "$@" >> {log}
case "$*" in
    *"index versions torchvision"*"--index-url {index}"*) cat {answers}/torchvision_on_cpu_index ;;
    *"index versions torchvision"*) cat {answers}/torchvision_configured ;;
    *"index versions torch"*"--index-url {index}"*) cat {answers}/on_cpu_index ;;
    *"index versions torch"*) cat {answers}/configured ;;
    *"version('torchvision')"*) cat {answers}/torchvision_in_venv ;;
    *"version('torch')"*) cat {answers}/in_venv ;;
    *sysconfig*) echo {answers} ;;
    *"import torchvision")
        [ -e {answers}/torchvision_operators.pth ] || {{ cat {answers}/fault >&2; exit 1; }} ;;
esac
"""
FAULT = "Traceback ...\nRuntimeError: operator torchvision::nms does not exist\n"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux wheels of torch carry CUDA")


class Clone:
    """A copy of the install files whose .venv/bin/python records its arguments instead of installing."""

    def __init__(self, root: Path):
        self.root, self.log, self.answers = root / "clone", root / "calls.txt", root / "answers"
        self.commands = root / "commands"
        for folder in (self.root / "app", self.root / ".venv" / "bin", self.answers, self.commands):
            folder.mkdir(parents=True)
        for name in ("install.py", "Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.root / name)
        shutil.copytree(ROOT / ".ci", self.root / ".ci")
        self.log.touch()
        self.answer(configured=f"2.15.0, {PIN}", on_cpu_index="", in_venv="")
        self.answer(torchvision_configured=f"0.30.0, {VISION_PIN}", torchvision_on_cpu_index="")
        self.answer(torchvision_in_venv="")
        script = STUB_PYTHON.format(log=self.log, index=CPU_INDEX, answers=self.answers)
        self.executable(self.root / ".venv" / "bin" / "python", script)
        self.gpu(present=False)

    def executable(self, path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def answer(self, **answers: str) -> None:
        """Set what the stub says: a version for `*in_venv`, else the versions that pip's listing shows."""
        for name, answer in answers.items():
            listing = f"torch\nAvailable versions: {answer}\n  INSTALLED: {PIN}+cpu\n"
            text = answer if name.endswith("in_venv") or not answer else listing
            (self.answers / name).write_text(text)

    def gpu(self, *, present: bool) -> None:
        reply = "echo 'GPU 0: Some Card'" if present else "echo 'NVIDIA-SMI has failed'; exit 9"
        self.executable(self.commands / "nvidia-smi", f"#!/bin/sh\n{reply}\n")

    def run(self, *command: str) -> subprocess.CompletedProcess:
        path = f"{self.commands}{os.pathsep}{os.environ['PATH']}"
        outer_make = {"MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS", "ARGS", "PYTHON"}
        environment = {k: v for k, v in os.environ.items() if k not in outer_make} | {"PATH": path}
        return subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True)

    def install(self, extras: str = "app") -> subprocess.CompletedProcess:
        return self.run(sys.executable, "install.py", extras)

    def make(self, target: str) -> subprocess.CompletedProcess:
        return self.run("make", target, f"PYTHON={sys.executable}")

    def installs(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith("-m pip install")]


@pytest.fixture
def clone(tmp_path) -> Clone:
    return Clone(tmp_path)


def test_the_cpu_build_of_pips_own_sources_comes_first(clone):
    clone.answer(configured=f"2.15.0, {PIN}+cpu, {PIN}", on_cpu_index=f"{PIN}+cpu")
    assert clone.install().returncode == 0
    (command,) = clone.installs()
    assert f" torch=={PIN}+cpu -e " in command and "index" not in command
    assert "whl/cpu" not in clone.log.read_text()


def test_pytorchs_cpu_index_comes_second(clone):
    clone.answer(on_cpu_index=f"{PIN}+cpu")
    assert clone.install().returncode == 0
    assert f" torch=={PIN}+cpu --extra-index-url {CPU_INDEX} -e " in clone.installs()[0]


@pytest.mark.parametrize("configured", ["", f"2.15.0, {PIN}", f"{PIN}+cpu.cxx11", "2.12.0+cpu"])
def test_without_a_cpu_build_it_stops_with_the_command_to_type(clone, configured):
    clone.answer(configured=configured)
    stopped = clone.make("demo")
    assert stopped.returncode == 2 and stopped.stderr.startswith("error: no GPU answers here")
    assert f".venv/bin/python -m pip install torch=={PIN}\n" in stopped.stderr
    assert clone.installs() == [] and not list((clone.root / ".venv").glob("installed-*"))


def test_with_a_gpu_pip_decides(clone):
    clone.gpu(present=True)
    assert clone.install().returncode == 0
    assert f"torch=={PIN}" not in clone.installs()[0]
    assert "index versions" not in clone.log.read_text()


@pytest.mark.parametrize("installed", [PIN, f"{PIN}+cpu"])
def test_a_torch_that_someone_installed_by_hand_stays(clone, installed):
    clone.answer(in_venv=installed)
    assert clone.install().returncode == 0
    assert f"torch=={PIN}" not in clone.installs()[0]


def test_torch_and_torchvision_come_from_the_one_source_that_has_both(clone):
    clone.answer(configured=f"{PIN}+cpu", on_cpu_index=f"{PIN}+cpu")
    clone.answer(torchvision_on_cpu_index=f"{VISION_PIN}+cpu")
    assert clone.install("eval,dev").returncode == 0
    builds = f" torch=={PIN}+cpu torchvision=={VISION_PIN}+cpu --extra-index-url {CPU_INDEX} -e "
    assert builds in clone.installs()[0]


def test_torchvision_follows_a_cpu_build_of_torch_that_is_there_already(clone):
    clone.answer(in_venv=f"{PIN}+cpu", torchvision_on_cpu_index=f"{VISION_PIN}+cpu")
    assert clone.install("all").returncode == 0
    assert f" torchvision=={VISION_PIN}+cpu --extra-index-url {CPU_INDEX} -e " in clone.installs()[0]
    clone.answer(torchvision_on_cpu_index="")
    assert clone.install("all").returncode == 0
    assert " torchvision==" not in clone.installs()[1] and "index-url" not in clone.installs()[1]


def test_a_demo_alone_needs_no_torchvision(clone):
    clone.answer(configured=f"{PIN}+cpu")
    assert clone.install("app").returncode == 0
    assert "index versions torchvision" not in clone.log.read_text()


def test_a_torchvision_that_does_not_fit_is_mended_once(clone):
    clone.answer(configured=f"{PIN}+cpu", torchvision_in_venv=VISION_PIN)
    (clone.answers / "fault").write_text(FAULT)
    mended = clone.install("eval")
    assert mended.returncode == 0 and "torchvision_operators.pth lets `import" in mended.stdout
    assert (clone.answers / "torchvision_operators.pth").read_text() == "import torchvision_operators\n"
    assert (clone.answers / "torchvision_operators.py").is_file()
    assert "import torchvision" not in clone.install("eval").stdout


def test_another_fault_of_torchvision_is_left_alone(clone):
    clone.answer(configured=f"{PIN}+cpu", torchvision_in_venv=VISION_PIN)
    (clone.answers / "fault").write_text("ImportError: libjpeg.so\n")
    assert clone.install("eval").returncode == 0
    assert not (clone.answers / "torchvision_operators.pth").exists()


@pytest.mark.slow
@pytest.mark.parametrize("hooked", [False, True])
def test_the_hook_declares_the_operators_before_torchvision_is_imported(tmp_path, hooked):
    """A stand-in asks for the operator as torchvision does, beside a library that cannot be loaded."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "_C.so").write_bytes(b"built for CUDA")
    register = "torch.library.register_fake('torchvision::nms')(lambda dets, scores, threshold: dets)"
    (tmp_path / "torchvision" / "__init__.py").write_text(f"import torch\n{register}\n")
    code = f"""
import sys
sys.meta_path = [f for f in sys.meta_path if getattr(f, "__name__", "") != "TorchvisionFinder"]
sys.modules.pop("torchvision_operators", None)  # that of this very environment
if {hooked}:
    import torchvision_operators
import importlib.util
assert importlib.util.find_spec("torchvision").origin.startswith({str(tmp_path)!r})
assert "torch" not in sys.modules and "torchvision" not in sys.modules
import torchvision
"""
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT / '.ci'}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) is hooked, done.stderr
    assert hooked or "torchvision::nms" in done.stderr


def test_a_torch_of_another_version_does_not_count_as_installed(clone):
    clone.answer(in_venv="2.12.0+cpu", configured=f"{PIN}+cpu")
    assert clone.install().returncode == 0
    assert f"torch=={PIN}+cpu" in clone.installs()[0]


@pytest.mark.parametrize(
    ("target", "extras"), [("demo", "app"), ("test", "app,eval,data,remote,scale,dev,docs")]
)
def test_a_second_make_installs_nothing_until_the_requirements_change(clone, target, extras):
    clone.answer(configured=f"{PIN}+cpu")
    for _ in range(2):
        assert clone.make(target).returncode == 0
    assert [line.endswith(f"clone[{extras}]") for line in clone.installs()] == [True]
    stamp = (clone.root / ".venv" / f"installed-{target}").stat().st_mtime
    os.utime(clone.root / "constraints.txt", (stamp + 5, stamp + 5))
    clone.make(target)
    assert len(clone.installs()) == 2


LINT = ["-m ruff check .", "-m ruff format --check ."]
TYPES = [".ci/typecheck.py"]
DOCS = [".ci/link_tree.py", "-m mkdocs build --strict --quiet"]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else "auto"
PYTEST = [f"-m pytest --numprocesses {CORES} --maxprocesses 4 --dist loadfile"]


@pytest.mark.parametrize(
    ("target", "commands"),
    [
        ("quick", [*LINT, *TYPES, f"{PYTEST[0]} -m not slow"]),
        ("test", [*LINT, *TYPES, *DOCS, *PYTEST]),
        ("types", TYPES),
        ("docs", DOCS),
        (
            "coverage",
            [
                f"-m coverage run {PYTEST[0]}",
                "-m coverage combine --quiet",
                "-m coverage report",
                ".ci/coverage_page.py",
            ],
        ),
    ],
)
def test_make_runs_its_checks_in_order_and_says_how_long_they_took(clone, target, commands):
    clone.answer(configured=f"{PIN}+cpu")
    made = clone.make(target)
    assert made.returncode == 0 and re.search(rf"make {target} took \d+ s$", made.stdout)
    assert [line.strip() for line in clone.log.read_text().splitlines()[-len(commands) :]] == commands


@pytest.mark.parametrize("failing", [*LINT, *TYPES, DOCS[0], *PYTEST])
def test_make_test_stops_at_the_first_check_that_fails(clone, failing):
    clone.answer(configured=f"{PIN}+cpu")
    python = clone.root / ".venv" / "bin" / "python"
    clone.make("types")
    clone.executable(python, python.read_text() + f'case "$*" in "{failing}"*) exit 1 ;; esac\n')
    made = clone.make("test")
    assert made.returncode == 2 and "make test took" in made.stdout + made.stderr
    assert clone.log.read_text().splitlines()[-1].startswith(failing)


def test_make_says_what_to_do_without_python(clone):
    failed = clone.run("make", "demo", "PYTHON=")
    assert failed.returncode == 2
    assert "error: found no Python 3.11" in failed.stderr and "apt-get install python3" in failed.stderr


@pytest.mark.parametrize("argv", [[], ["--help"], ["app", "dev"]])
def test_install_explains_itself(clone, argv):
    refused = clone.run(sys.executable, "install.py", *argv)
    assert refused.returncode == 1 and refused.stderr.startswith("usage: ")


def test_every_requirement_has_a_tested_version_that_satisfies_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = (line for lines in project["optional-dependencies"].values() for line in lines)
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    for requirement in map(Requirement, [*project["dependencies"], *extras]):
        if requirement.name != project["name"]:
            version = pins.get(requirement.name.lower().replace("_", "-"))
            assert version and requirement.specifier.contains(version), (
                f"{requirement}: tested with {version}"
            )


def test_every_tested_version_has_the_hash_of_its_file():
    pins = {line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"}
    lines = [line for line in (ROOT / "hashes.txt").read_text().splitlines() if line[0] != "#"]
    hashed = {re.fullmatch(r"(\S+==\S+) --hash=sha256:[0-9a-f]{64}", line)[1] for line in lines}
    assert {pin.split("==")[0] for pin in pins - hashed} == {"torch", "torchvision", "xformers"}, (
        "run python .ci/hashes.py"
    )
    assert hashed <= pins, "run python .ci/hashes.py"
