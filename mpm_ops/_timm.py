"""The parts of timm we build on, imported so that they load beside a CPU build of torch.

torchvision's wheel registers fake kernels for two operators that only its compiled library defines. Beside a build of
torch that the library was not compiled for, importing torchvision (and so timm) fails for lack of their schemas.
Defining them is enough, because nothing here calls them; defining them twice would end the process.
"""

import sys

import torch

_MISSING_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None  # its schemas live as long as it does

try:
    import torchvision  # noqa: F401
except RuntimeError as error:
    if "torchvision::" not in str(error):
        raise
    for _name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[_name]  # half imported
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for _schema in _MISSING_SCHEMAS:
        if not torch._C._jit_get_schemas_for_operator(f"torchvision::{_schema.partition('(')[0]}"):
            _library.define(_schema)

from timm import create_model  # noqa: E402
from timm.layers import Attention  # noqa: E402
from timm.models.vision_transformer import Block, VisionTransformer  # noqa: E402

__all__ = ["Attention", "Block", "VisionTransformer", "create_model"]
