"""python recipes/coco_train2014.py coco/

Write dataset_coco_train2014.json: Karpathy's splits of COCO without "restval", the 30,504 images of val2014
that are trained on otherwise. So every image of val2014 can be measured on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from tyro.conf import Positional

from tavq.base.arguments import parse, run_main
from tavq.base.files import atomic_write

NEEDED = ("dataset_coco.json", "annotations/captions_val2014.json", "train2014", "val2014")


@dataclasses.dataclass(frozen=True)
class SplitsRun:
    """Write Karpathy's splits of COCO without "restval".

    Example: python recipes/coco_train2014.py coco/
    """

    folder: Positional[Path]
    """Folder of COCO: train2014/, val2014/, annotations/ and Karpathy's dataset_coco.json."""


@run_main
def main(argv: Sequence[str] | None = None) -> None:
    run = parse(SplitsRun, argv, prog="python recipes/coco_train2014.py")
    absent = [name for name in NEEDED if not (run.folder / name).exists()]
    if absent:
        raise FileNotFoundError(
            f"{run.folder} has no {', no '.join(absent)}; see the head of recipes/coco256.sh"
        )
    content = json.loads((run.folder / "dataset_coco.json").read_text())
    content["images"] = [image for image in content["images"] if image["split"] != "restval"]
    with atomic_write(run.folder / "dataset_coco_train2014.json") as path:
        path.write_text(json.dumps(content))
    print(f"{run.folder / 'dataset_coco_train2014.json'}: {len(content['images']):,} images")


if __name__ == "__main__":
    main()
