"""Create .venv and install this project into it: `python3.11 install.py app,eval,dev`.

PyPI's torch for Linux brings several GB of CUDA libraries. Where no GPU answers, a CPU build is found
before anything is downloaded: among pip's configured sources, else on PyTorch's own index.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent
PYTHON = ROOT / ".venv" / "bin" / "python"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    if len(argv) != 1 or argv[0].startswith("-"):
        sys.exit("usage: python3.11 install.py EXTRA[,EXTRA]   (extras: app, eval, gpu, dev, all)")
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", str(ROOT / ".venv")], check=True)
    constraints = ROOT / "constraints.txt"
    requirements = [*torch_arguments(torch_pin(constraints)), "-e", f"{ROOT}[{argv[0]}]"]
    os.environ["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    sys.exit(subprocess.call([str(PYTHON), "-m", "pip", "install", "-c", str(constraints), *requirements]))


def torch_pin(constraints: Path) -> str:
    lines = constraints.read_text().splitlines()
    return next(line.removeprefix("torch==") for line in lines if line.startswith("torch=="))


def torch_arguments(version: str) -> list[str]:
    """Return what `pip install` must be told so that no CUDA build comes to a machine without a GPU."""
    cpu_build = f"{version}+cpu"
    if sys.platform != "linux" or has_gpu() or torch_in_venv() in (version, cpu_build):
        return []
    if offers(cpu_build):
        return [f"torch=={cpu_build}"]
    if offers(cpu_build, "--index-url", TORCH_CPU_INDEX):
        return [f"torch=={cpu_build}", "--extra-index-url", TORCH_CPU_INDEX]
    sys.exit(
        f"error: no GPU answers here, and no CPU build of torch {version} for this Python was found, neither "
        f"in pip's sources nor on {TORCH_CPU_INDEX}; nothing was installed. Fetch the wheel and type\n"
        f"    {PYTHON} -m pip install torch-{cpu_build}-*.whl\n"
        f"or accept the CUDA build (several GB) and type\n"
        f"    {PYTHON} -m pip install torch=={version}\n"
        f"then run make again."
    )


def has_gpu() -> bool:
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return False
    return answer.returncode == 0 and "GPU" in answer.stdout


def torch_in_venv() -> str:
    code = "import importlib.metadata as m; print(m.version('torch'))"
    return subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True).stdout.strip()


def offers(build: str, *sources: str) -> bool:
    """Ask pip, without a download, whether its sources (or those given) hold this build for this Python."""
    command = [str(PYTHON), "-m", "pip", "index", "versions", "torch", "--retries", "1", "--timeout", "20"]
    listing = subprocess.run([*command, *sources], capture_output=True, text=True).stdout
    available = [line for line in listing.splitlines() if line.startswith("Available versions:")]
    return build in " ".join(available).replace(",", " ").split()


if __name__ == "__main__":
    main()
