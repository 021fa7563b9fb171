"""Create .venv and install this project into it: `python3.11 install.py app,eval,dev`.

PyPI's torch for Linux brings several GB of CUDA libraries. Where no GPU answers, CPU builds of torch and
torchvision are found before anything is downloaded: among pip's configured sources, else on PyTorch's own
index. Both come from one source where one offers both, because builds of unlike kinds do not fit each other.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PYTHON = ROOT / ".venv" / "bin" / "python"
CONSTRAINTS = ROOT / "constraints.txt"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OPERATORS = ROOT / ".ci" / "torchvision_operators.py"
TORCHVISION_EXTRAS = {"eval", "all"}


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    if len(argv) != 1 or argv[0].startswith("-"):
        sys.exit(
            "usage: python3.11 install.py EXTRA[,EXTRA]   "
            "(extras: app, eval, data, scale, gpu, dev, docs, mutants, all)"
        )
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", str(ROOT / ".venv")], check=True)

    os.environ["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    builds = cpu_builds(with_torchvision=bool(TORCHVISION_EXTRAS & set(argv[0].split(","))))
    requirements = [*builds, "-e", f"{ROOT}[{argv[0]}]"]
    command = [str(PYTHON), "-m", "pip", "install", "-c", str(CONSTRAINTS), *requirements]
    exit_code = subprocess.call(command)
    if exit_code == 0:
        mend_torchvision()
    sys.exit(exit_code)


def cpu_builds(*, with_torchvision: bool) -> list[str]:
    """Return what `pip install` must be told so that no CUDA build comes to a machine without a GPU."""
    if sys.platform != "linux" or has_gpu():
        return []
    names = ["torch", "torchvision"] if with_torchvision else ["torch"]
    if installed("torch") == pinned("torch"):  # a build for CUDA that somebody chose by hand
        return []
    builds = {name: f"{pinned(name)}+cpu" for name in names}
    missing = {name: build for name, build in builds.items() if installed(name) != build}
    if not missing:
        return []

    chosen, arguments = set(), []
    for source in ([], ["--index-url", TORCH_CPU_INDEX]):
        offers = {name for name, build in missing.items() if offered(name, build, *source)}
        if ("torch" in offers, len(offers)) > ("torch" in chosen, len(chosen)):
            chosen, arguments = offers, ["--extra-index-url", TORCH_CPU_INDEX] if source else []
        if chosen == set(missing):
            break
    if "torch" in missing and "torch" not in chosen:
        sys.exit(no_cpu_build(missing["torch"]))
    return [f"{name}=={missing[name]}" for name in sorted(chosen)] + arguments


def pinned(name: str) -> str:
    """The version of a package in constraints.txt."""
    lines = CONSTRAINTS.read_text().splitlines()
    return next(line.removeprefix(f"{name}==") for line in lines if line.startswith(f"{name}=="))


def has_gpu() -> bool:
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and "GPU" in answer.stdout


def installed(name: str) -> str:
    code = f"import importlib.metadata as m; print(m.version('{name}'))"
    return subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True).stdout.strip()


def offered(name: str, build: str, *source: str) -> bool:
    """Ask pip, without a download, whether its sources (or the one given) hold this build for this Python."""
    command = [str(PYTHON), "-m", "pip", "index", "versions", name, "--retries", "1", "--timeout", "20"]
    listing = subprocess.run([*command, *source], capture_output=True, text=True).stdout
    available = [line for line in listing.splitlines() if line.startswith("Available versions:")]
    return build in " ".join(available).replace(",", " ").split()


def no_cpu_build(build: str) -> str:
    version = build.removesuffix("+cpu")
    return (
        f"error: no GPU answers here, and no CPU build of torch {version} for this Python was found, neither "
        f"in pip's sources nor on {TORCH_CPU_INDEX}; nothing was installed. Fetch the wheel and type\n"
        f"    {PYTHON} -m pip install torch-{build}-*.whl\n"
        f"or accept the CUDA build (several GB) and type\n"
        f"    {PYTHON} -m pip install torch=={version}\n"
        f"then run make again."
    )


def mend_torchvision() -> None:
    """Make `import torchvision` pass in .venv where only a build for CUDA was to be had beside a CPU build.

    Copies .ci/torchvision_operators.py and a .pth file that imports it into the site-packages of .venv. Does
    nothing where torchvision is absent or works.
    """
    if "torchvision::nms" not in torchvision_error():
        return
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    folder = subprocess.run([str(PYTHON), "-c", code], check=True, capture_output=True, text=True).stdout
    module = Path(folder.strip()) / OPERATORS.name
    shutil.copyfile(OPERATORS, module)
    subprocess.run([str(PYTHON), "-m", "py_compile", str(module)], check=True)
    module.with_suffix(".pth").write_text(f"import {module.stem}\n")

    if error := torchvision_error():
        sys.exit(f"error: torchvision cannot be imported beside this torch: {error.splitlines()[-1]}")
    print(
        "torchvision here is built for CUDA and torch for the CPU: its operators stay away, and "
        f"{module.with_suffix('.pth')} lets `import torchvision` pass without them"
    )


def torchvision_error() -> str:
    """What `import torchvision` says in .venv; empty where it is absent or can be imported."""
    if not installed("torchvision"):
        return ""
    tried = subprocess.run([str(PYTHON), "-c", "import torchvision"], capture_output=True, text=True)
    return tried.stderr if tried.returncode else ""


if __name__ == "__main__":
    main()
