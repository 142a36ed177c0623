"""Makes ``import torchvision`` work beside a CPU build of torch; imported before torchvision, by tests alone.

The wheel of torchvision links against CUDA, so that its operators cannot be loaded there, and its import looks two of them
up. Non-maximum suppression is defined here in Python, with the same result as the original on a CPU.
"""

import sys
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, library

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def suppress(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Return the indices of boxes kept by non-maximum suppression, best first.

    Args:
        boxes: Corners x1, y1, x2, y2; [boxes, 4].
        scores: [boxes].
        threshold: Intersection over union above which the lower-scored of two boxes is dropped.
    """
    if boxes.numel() == 0:
        return torch.empty((0,), dtype=torch.long)
    order = torch.argsort(scores, descending=True, stable=True)
    x1, y1, x2, y2 = boxes.unbind(1)
    areas = (x2 - x1) * (y2 - y1)
    alive = torch.ones(boxes.size(0), dtype=torch.bool)
    kept = []
    for index in order.tolist():
        if alive[index]:
            kept.append(index)
            width = (torch.minimum(x2[index], x2) - torch.maximum(x1[index], x1)).clamp(min=0)
            height = (torch.minimum(y2[index], y2) - torch.maximum(y1[index], y1)).clamp(min=0)
            overlap = width * height
            alive &= ~(overlap / (areas[index] + areas - overlap) > threshold)
    return torch.tensor(kept, dtype=torch.long)


def install() -> None:
    """Define the operators and import torchvision with its pure Python paths."""
    for name in ("nms", "qnms"):
        library.define(f"torchvision::{name}", SCHEMA)
    library.impl("torchvision::nms", "cpu", suppress)
    boxes: Any = import_module("torchvision.ops.boxes")
    boxes._assert_has_ops = lambda: None
    align: Any = import_module("torchvision.ops.roi_align")
    align._roi_align = getattr(align._roi_align, "__wrapped__", align._roi_align)


if "torchvision" not in sys.modules:
    install()
