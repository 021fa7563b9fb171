"""The house stands: packages, import arrows, light imports, the wheel's contents."""

import ast
import functools
import importlib
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
import tomllib
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = {name: ROOT / folder for name, folder in SETUPTOOLS["package-dir"].items()}
SCRIPT_FOLDERS = [ROOT / name for name in ("tests", "benchmarks", "recipes", "docs", "spaces")]

# From the foundations to the roof: a part imports itself and parts of an earlier row.
ROWS = (
    {"base"},
    {"data", "metrics"},
    {"training", "alignment"},
    {"tokenizer", "generator", "captioner"},
    {"prompts", "ranking"},
    {"inputs", "results"},
    {"conditions"},
    {"pipeline", "photo_index"},
    {"serve"},
    {"commands", "eval"},
    {"app"},
    {"completion"},
    {"cli", "__init__"},
    {"__main__"},
)
ROW = {part: number for number, row in enumerate(ROWS) for part in row}
PUBLIC_NAMES = {"TAVQTokenizer": "tokenizer", "Pipeline": "pipeline"}  # `from tavq import ...` leads there


def module_files() -> dict[str, Path]:
    """Return every module of the installed packages: 'tavq.data.units' -> its file."""
    files = {}
    for package, folder in FOLDERS.items():
        for path in folder.glob("*.py"):
            files[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return files


def python_files() -> list[Path]:
    scripts = [path for folder in SCRIPT_FOLDERS for path in folder.rglob("*.py")]
    return sorted([*module_files().values(), *ROOT.glob("*.py"), *scripts])


def imported_modules(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Yield (line, absolute dotted name) of every import in `source`, those inside functions included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def part_of(module: str) -> str | None:
    """Name the part that an imported dotted name belongs to; None for other people's modules."""
    root, _, rest = module.partition(".")
    if root != "tavq":
        return None
    part = rest.split(".")[0] or "__init__"
    return PUBLIC_NAMES.get(part, part)


def forbidden_arrows(source: str, module: str, package: str) -> list[str]:
    """List the imports that do not point towards the foundations."""
    own, found = part_of(module), []
    for line, name in imported_modules(source, package):
        target = part_of(name)
        if target is None or target == own:
            continue
        for part in (own, target):
            assert part in ROW, f"{module}:{line}: {part!r} has no place in ROWS; give it one"
        if ROW[target] >= ROW[own]:
            found.append(f"{module}:{line} imports {name}")
    return found


def test_every_package_folder_is_listed_and_every_listed_one_exists():
    folders = {path.parent for path in ROOT.glob("*/__init__.py")}
    assert folders == set(FOLDERS.values())
    assert set(SETUPTOOLS["packages"]) == set(FOLDERS)
    nested = [str(path) for folder in folders for path in folder.glob("*/**/*.py")]
    assert not nested, "packages are flat: one folder, one package"


@pytest.mark.parametrize("package", SETUPTOOLS["packages"])
def test_every_package_imports_from_this_tree(package):
    assert Path(importlib.import_module(package).__file__).parent == FOLDERS[package]


def test_imports_point_towards_the_foundations():
    found = []
    for module, path in module_files().items():
        package = module if path.stem == "__init__" else module.rpartition(".")[0]
        found += forbidden_arrows(path.read_text(), module, package)
    assert not found


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("tavq.generator.model", "from tavq.tokenizer.model import A", False),
        ("tavq.generator.model", "def f():\n    import tavq.tokenizer.model", False),
        ("tavq.generator.model", "from tavq import TAVQTokenizer", False),
        ("tavq.generator.model", "from tavq import training, data", True),
        ("tavq.generator.model", "from .sampling import A\nfrom tavq.training.loop import B", True),
        ("tavq.metrics.image", "from tavq.data.images import A", False),
        ("tavq.metrics.image", "from ..data.images import A", False),
        ("tavq.metrics.image", "from tavq.base.files import A", True),
        ("tavq.data.images", "import tavq.metrics.image", False),
        ("tavq.pipeline", "from tavq.captioner.model import A", True),
        ("tavq.pipeline", "from tavq.app.demo import A", False),
        ("tavq.eval.results", "import tavq.cli", False),
        ("tavq.cli", "from tavq.app.demo import main", True),
        ("tavq.base.arguments", "from tavq.metrics import A", False),
        ("tavq.alignment.aligner", "from tavq.tokenizer.model import A", False),
        ("tavq.alignment.aligner", "from tavq.training.loop import A", False),
        ("tavq.alignment.aligner", "from tavq.data.text_encoder import A", True),
    ],
)
def test_the_arrow_check_itself(module, source, allowed):
    assert (forbidden_arrows(source, module, module.rpartition(".")[0]) == []) is allowed


def test_no_folder_of_ours_is_imported_by_its_bare_name():
    bare = {folder.name for folder in FOLDERS.values()} - {"tavq"}
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in python_files()
        for line, name in imported_modules(path.read_text(), "tavq.anywhere")
        if name.split(".")[0] in bare
    ]
    assert not found


def test_no_file_is_longer_than_500_lines():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in python_files()}
    assert {name: n for name, n in lengths.items() if n > 500} == {}


def run_python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"} | environment
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_help_is_quick_and_does_not_load_torch(tmp_path):
    code = "from tavq.cli import main; main(['--help'])"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = run_python("-X", "importtime", "-c", code, cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert shown.returncode == 0 and "usage" in shown.stdout.lower(), shown.stderr[-500:]
    loaded = set(re.findall(r"\|\s+(\w+)$", shown.stderr, flags=re.MULTILINE))
    assert loaded & {"argparse", "tavq"} and not loaded & {"torch", "transformers", "gradio", "matplotlib"}
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1  # whatever else runs here


@pytest.mark.slow
def test_importing_every_module_does_nothing_else(tmp_path):
    home, cwd = tmp_path / "home", tmp_path / "cwd"
    home.mkdir(), cwd.mkdir()
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)"
    places = {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "TMPDIR": str(cwd)}
    done = run_python("-c", code, *sorted(module_files()), cwd=cwd, **places)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [str(path) for folder in (home, cwd) for path in folder.rglob("*")] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the packages alone."""
    folder = tmp_path_factory.mktemp("wheel")
    for package in FOLDERS.values():
        shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    build = "from setuptools import build_meta; import sys; build_meta.build_wheel(sys.argv[1])"
    built = run_python("-c", build, str(folder), cwd=folder)
    assert built.returncode == 0, built.stderr[-2000:]
    return next(folder.glob("ta_vq-*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_packages_and_of_the_results_what_the_demo_shows(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    packed = {name for name in names if ".dist-info/" not in name}
    expected = {
        f"{package.replace('.', '/')}/{path.relative_to(folder)}"
        for package, folder in FOLDERS.items()
        for path in folder.rglob("*")
        if path.is_file() and not {"__pycache__", "results"} & set(path.parts)
    }
    from tavq.app.tab_about import METRICS

    shown = {file for file, *_ in METRICS}
    expected |= {f"tavq/checkpoints/flickr8k/results/{file}" for file in shown}
    assert packed == expected
    assert {name.split("/")[0] for name in packed} == {"tavq"}
    assert "tavq/py.typed" in packed and "tavq/checkpoints/flickr8k/generator/model.safetensors" in packed
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert wheel.stat().st_size < 30e6


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `tavq` command of a fresh environment that holds the wheel, and sees the libraries of this one."""
    environment = tmp_path_factory.mktemp("installed") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    pip = [sys.executable, "-m", "pip", "--python", environment / "bin" / "python", "install"]
    # With this checkout on PYTHONPATH, pip would find the package installed already.
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run([*pip, "--quiet", "--no-deps", "--no-index", wheel], check=True, env=clean)
    (site_packages,) = environment.glob("lib/python*/site-packages")
    libraries = sysconfig.get_path("purelib")
    (site_packages / "libraries.pth").write_text(f"import site; site.addsitedir({libraries!r})\n")
    return environment / "bin" / "tavq"


@pytest.fixture
def stranger(tmp_path: Path) -> dict[str, Any]:
    """Options of a process that starts in an empty folder, offline, and knows nothing of this checkout."""
    for folder in ("here", "home"):
        (tmp_path / folder).mkdir()
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TAVQ"))
    }
    environment |= {"HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    return {"cwd": tmp_path / "here", "env": environment, "text": True}


@pytest.mark.slow
def test_the_installed_wheel_generates_and_captions_from_an_empty_folder(installed, stranger):
    run = functools.partial(subprocess.run, capture_output=True, **stranger)
    code = "import tavq.data, tavq.pipeline; print(tavq.data.__file__, tavq.pipeline.CHECKPOINT)"
    places = run([installed.parent / "python", "-c", code]).stdout.split()
    assert len(places) == 2 and all(place.startswith(str(installed.parent.parent)) for place in places)

    generated = run([installed, "generate", "a dog runs on the beach", "--device", "cpu"])
    assert generated.returncode == 0, generated.stderr[-2000:]
    image = stranger["cwd"] / "out" / "000000.png"
    assert image.is_file()
    captioned = run([installed, "caption", image, "--device", "cpu"])
    assert captioned.returncode == 0 and len(captioned.stdout.split()) > 4, captioned.stderr[-2000:]


@pytest.mark.slow
def test_the_demo_of_the_installed_wheel_starts_in_an_empty_folder(installed, stranger):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [installed, "demo", "--device", "cpu", "--port", str(port)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, **pipes, **stranger) as demo:
        try:
            said = demo.stdout.readline()
            assert said.startswith("TA-VQ demo on"), said + demo.stdout.read()
            with urllib.request.urlopen(said.split()[-1]) as page:
                assert page.status == 200 and b"gradio" in page.read()
        finally:
            demo.terminate()
    assert list(stranger["cwd"].iterdir()) == []
