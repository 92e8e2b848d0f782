"""What clients are told of a served model."""

import json
from collections.abc import Mapping
from typing import Any

from handlers.api.formats import FORMATS, MASKS, VIEWS
from handlers.api.options import PRIORITIES
from handlers.config import ServingConfig
from mpm_ops import Segmenter
from mpm_ops.classes import Classes
from mpm_ops.merging import Merger

_LIMITS = ("max_image_bytes", "max_image_pixels", "max_inflight_tokens", "deadline_seconds")


def describe_model(
    model: Segmenter, classes: Classes, config: ServingConfig, offered: Mapping[str, Merger], info: Mapping[str, str]
) -> bytes:
    """One JSON object.

    Args:
        model, classes, config: that are served.
        offered: mergers that requests may ask for, by the names in metrics.
        info: what the model runs on, as `mpm_model_info` says it.
    """
    fields: dict[str, Any] = {
        **{name: info[name] for name in ("variant", "runtime", "precision", "device")},
        "classes": [
            {"id": i, "name": name, "color": color}
            for i, (name, color) in enumerate(zip(classes.names, classes.colors.tolist(), strict=True))
        ],
        "mergers": [
            {"name": name, "is_default": name == info["schedule"], **_asked_for(name, merger)}
            for name, merger in offered.items()
        ],
        "patch_size": model.config.patch_size,
        "window_size": model.inference.window_size,
        "window_stride": model.inference.window_stride,
        "limits": {
            **{name: getattr(config, name) for name in _LIMITS},
            "max_windows": model.inference.max_windows_per_request,
        },
        "media_types": [FORMATS[name].media_types[0] for name in MASKS],
        "views": list(VIEWS),
        "priorities": list(PRIORITIES),
    }
    return json.dumps(fields).encode()


def _asked_for(name: str, merger: Merger) -> dict[str, str]:
    """The header of a request that asks for a merger."""
    if ":" in name:
        return {"header": "X-MPM-Merger", "value": str(merger)}
    return {"header": "X-MPM-Schedule", "value": name}
