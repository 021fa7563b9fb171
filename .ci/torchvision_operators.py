"""Let `import torchvision` pass where torchvision was built for CUDA and torch for the CPU.

The operators of such a torchvision cannot be loaded, and its import stops with `operator torchvision::nms
does not exist`; so does every class of transformers, diffusers or torch-fidelity that imports it. The import
needs no more than the schemas of two operators. This module declares them; a call of either still raises
torch's own error.

install.py copies this file into the site-packages of such an environment, with a .pth file that imports it
at start-up. That costs a tenth of a millisecond: neither torch nor torchvision is imported before somebody
imports torchvision. Where the operators can be loaded after all (another build was installed later), nothing
is declared.
"""

import sys

libraries = []  # torch withdraws the schemas when the library object is collected


class TorchvisionFinder:
    """Finds torchvision where it is installed, and declares the operators before its first line runs."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != "torchvision":
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.origin is None:
            return spec
        load = spec.loader.exec_module

        def declare_and_load(module):
            declare_operators(spec.submodule_search_locations)
            load(module)

        spec.loader.exec_module = declare_and_load
        return spec


def declare_operators(folders):
    """Declare `nms` and `qnms` unless the compiled operators in `folders` can be loaded."""
    from pathlib import Path

    import torch

    for compiled in (path for folder in folders for path in Path(folder).glob("_C*.so")):
        try:
            torch.ops.load_library(str(compiled))
            return
        except OSError:  # built for CUDA, beside a CPU build of torch
            continue
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        libraries.append(library)


sys.meta_path.insert(0, TorchvisionFinder)
