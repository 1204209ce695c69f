"""Ultralytics' `yolo`, also where torchvision's kernels are not: PyPI's are built for a torch with CUDA.

    PYTHON tests/support/yolo_command.py train data=set/data.yaml model=yolo11n.yaml epochs=1

Runs in the environment of tests/programs/ultralytics.txt. torchvision cannot even be imported beside a CPU build of
torch there, because its operators are missing; of all it has, Ultralytics asks for `nms` alone.
"""

from __future__ import annotations

import sys
from typing import Any


def lend_nms() -> None:
    """Let `import torchvision` work, with a plain `nms` where its own cannot be loaded."""
    import torch

    try:
        import torchvision
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        torchvision.ops.nms = nms


def nms(boxes: Any, scores: Any, threshold: float) -> Any:
    """Return the places of the boxes that stay, the surest first; as torchvision.ops.nms.

    `boxes` is [N, 4], two corners each; `scores` is [N]. Of two that overlap by more than `threshold` the surer stays.
    """
    import torch
    from torchvision.ops import box_iou

    overlaps = box_iou(boxes, boxes)
    order, kept = scores.argsort(descending=True), []
    while len(order):
        kept.append(order[0])
        order = order[1:][overlaps[order[0], order[1:]] <= threshold]
    return torch.stack(kept) if kept else order


if __name__ == "__main__":
    lend_nms()
    from ultralytics.cfg import entrypoint

    entrypoint()
