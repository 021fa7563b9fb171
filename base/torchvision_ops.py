"""Make `import torchvision` possible where its compiled operators do not match torch.

PyPI's torchvision is built for CUDA. Beside a CPU build of torch its operators cannot be loaded and the
import stops at `torchvision::nms`; torch-fidelity and every `transformers` model then fail with it. Declaring
the schemas of the two operators lets the import pass; calling one of them still raises torch's own clear
error.
"""

import functools
import importlib.util
from pathlib import Path

OPERATORS = ("nms", "qnms")


@functools.cache
def ensure_torchvision() -> None:
    """Load torchvision's operators, or declare their schemas where they cannot be loaded. Works once a
    process."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    import torch

    for library in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
            return
        except OSError:  # built for CUDA, beside a CPU build of torch
            continue
    ensure_torchvision.library = torch.library.Library("torchvision", "DEF")  # lives as long as the process
    for name in OPERATORS:
        ensure_torchvision.library.define(
            f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        )
