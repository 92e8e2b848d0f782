"""The parts of timm we build on, imported so that they load beside a CPU build of torch.

torchvision's wheel registers fake kernels for two operators that only its compiled library defines.
Where that library cannot load, the import of torchvision (and so of timm) fails for lack of their
schemas; defining them is enough, because nothing here ever calls them.
"""

import torch

_MISSING_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library = torch.library.Library("torchvision", "FRAGMENT")  # schemas live as long as this object

if not torch.cuda.is_available():
    for _schema in _MISSING_SCHEMAS:
        _name = _schema.partition("(")[0]
        if not torch._C._jit_get_schemas_for_operator(f"torchvision::{_name}"):
            _library.define(_schema)

from timm.layers import Attention  # noqa: E402
from timm.models.vision_transformer import Block, VisionTransformer  # noqa: E402

__all__ = ["Attention", "Block", "VisionTransformer"]
