"""Small networks and what they are shown: the same seeded numbers here and beside upstream's code.

Every tensor is drawn from its own generator, seeded by its name, and only by exact arithmetic. So
nothing depends on the order in which modules are created, on torch or on a maths library.
"""

import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor

HEAD_DIM = 64
NUM_SAMPLES = 1000

# How much a layer amplifies its input; 1.5 where nothing is said. Tokens and what blocks add to them stay
# small, because only then does a wrong LayerNorm eps show.
_GAINS = {"patch_embed.proj": 0.1, "attn.proj": 0.1, "mlp.fc2": 0.1}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A network, how pictures become its windows, and sizes (height, width) of what it is shown.

    Attributes:
        distilled: None where variant.yml does not say, as for upstream's large networks.
        windows: shapes of the windows whose logits are recorded.
        pictures: shapes of the pictures whose labels are recorded.
    """

    d_model: int = 192
    n_layers: int = 2
    n_cls: int = 19
    patch_size: int = 16
    image_size: tuple[int, int] = (64, 64)
    decoder: str = "mask_transformer"
    decoder_layers: int = 2
    distilled: bool | None = False
    normalization: str = "vit"
    dataset: str = "ade20k"
    im_size: int = 64
    window_size: int = 64
    window_stride: int = 64
    windows: tuple[tuple[int, int], ...] = ()
    pictures: tuple[tuple[int, int], ...] = ()


CASES = {
    "tiny": Case(n_layers=12, n_cls=150, windows=((64, 64),)),
    "small": Case(d_model=384, n_layers=4, n_cls=60, dataset="pascal_context", windows=((80, 80),)),
    "base": Case(d_model=768, n_cls=150, windows=((48, 64),)),
    "base_patch8": Case(d_model=768, n_cls=60, patch_size=8, decoder="linear", windows=((40, 40),)),
    "large": Case(d_model=1024, decoder_layers=1, distilled=None, dataset="cityscapes", windows=((64, 64),)),
    "deit": Case(d_model=768, n_cls=60, distilled=True, normalization="deit", windows=((64, 64),)),
    "deit_linear": Case(
        d_model=384, n_cls=60, decoder="linear", distilled=True, normalization="deit", windows=((80, 64),)
    ),
    "linear": Case(n_cls=60, decoder="linear", windows=((64, 64),)),
    # Positions are resized for other counts of patches, but not for other shapes of the stored count.
    "shapes": Case(windows=((48, 96), (50, 70), (112, 96), (32, 128), (20, 120), (7, 1))),
    "oblong": Case(image_size=(48, 96), distilled=True, windows=((96, 48), (64, 64), (90, 40))),
    # Pictures: resized down and up, by 8-bit and by float interpolation; windows overlap, or are padded.
    "sliding": Case(
        n_cls=150,
        im_size=80,
        window_stride=48,
        pictures=((40, 300), (300, 40), (1, 1), (3, 5), (110, 150), (240, 200)),
    ),
    "sliding_cityscapes": Case(
        decoder_layers=1,
        dataset="cityscapes",
        image_size=(96, 96),
        im_size=128,
        window_size=96,
        window_stride=64,
        pictures=((100, 150), (64, 200), (256, 128)),
    ),
    "sliding_deit": Case(
        n_cls=60,
        patch_size=8,
        image_size=(56, 56),
        decoder="linear",
        distilled=True,
        normalization="deit",
        dataset="pascal_context",
        im_size=65,
        window_size=60,
        window_stride=40,
        pictures=((30, 500), (90, 70), (1, 1)),
    ),
}


def write_checkpoint(case: Case, folder: Path) -> Path:
    """Write checkpoint.pth and variant.yml as upstream's training does; returns the first."""
    decoder = {"name": case.decoder, "n_cls": case.n_cls}
    if case.decoder == "mask_transformer":
        decoder |= {"n_layers": case.decoder_layers, "drop_path_rate": 0.0, "dropout": 0.1}
    net = {
        "backbone": "seeded",
        "image_size": case.image_size,  # dumped with the tag !!python/tuple
        "patch_size": case.patch_size,
        "d_model": case.d_model,
        "n_heads": case.d_model // HEAD_DIM,
        "n_layers": case.n_layers,
        "normalization": case.normalization,
        "dropout": 0.0,
        "drop_path_rate": 0.1,
        "n_cls": case.n_cls,
        "decoder": decoder,
    }
    if case.distilled is not None:
        net["distilled"] = case.distilled
    variant = {
        "net_kwargs": net,
        "dataset_kwargs": {
            "dataset": case.dataset,
            "image_size": case.im_size,
            "crop_size": case.window_size,
            "normalization": case.normalization,
        },
        "inference_kwargs": {
            "im_size": case.im_size,
            "window_size": case.window_size,
            "window_stride": case.window_stride,
        },
    }
    (folder / "variant.yml").write_text(yaml.dump(variant))
    path = folder / "checkpoint.pth"
    model = {key: _tensor(key, shape) for key, shape in _shapes(case).items()}
    torch.save({"model": model, "optimizer": {}, "n_cls": case.n_cls, "lr_scheduler": {}, "epoch": 0}, path)
    return path


def windows(height: int, width: int) -> Tensor:
    """Two windows of noise, float32 [2, 3, H, W] in -2..2."""
    return torch.from_numpy(2 * _noise(f"windows {height}x{width}", (2, 3, height, width)))


def picture(height: int, width: int) -> np.ndarray:
    """A smooth random picture, uint8 [H, W, 3], that uses the whole range of values."""
    field = np.random.default_rng(zlib.crc32(f"picture {height}x{width}".encode())).integers(
        0, 256, (height, width, 3)
    )
    for axis in (0, 1):
        field = np.sum([np.roll(field, shift, axis) for shift in range(8)], axis=0)
    return ((field - field.min()) * 255 // np.ptp(field)).astype(np.uint8)


def sample(pixels: Tensor) -> np.ndarray:
    """The same NUM_SAMPLES values of every tensor of one shape, spread over all of it."""
    generator = np.random.default_rng(zlib.crc32(str(tuple(pixels.shape)).encode()))
    return pixels.flatten()[generator.integers(0, pixels.numel(), NUM_SAMPLES)].numpy()


def _shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all that an official checkpoint holds."""
    width, num_special = case.d_model, 2 if case.distilled else 1
    num_patches = math.prod(side // case.patch_size for side in case.image_size)
    blocks = [f"encoder.blocks.{i}" for i in range(case.n_layers)]
    norms = {"encoder.norm": width}
    linears: dict[str, tuple[int, ...]] = {
        "encoder.patch_embed.proj": (width, 3, case.patch_size, case.patch_size),
        "encoder.head": (1000, width),
    }
    others: dict[str, tuple[int, ...]] = {
        "encoder.cls_token": (1, 1, width),
        "encoder.pos_embed": (1, num_patches + num_special, width),
    }
    if case.distilled:
        others["encoder.dist_token"] = (1, 1, width)
        linears["encoder.head_dist"] = (1000, width)
    if case.decoder == "linear":
        linears["decoder.head"] = (case.n_cls, width)
    else:
        blocks += [f"decoder.blocks.{i}" for i in range(case.decoder_layers)]
        norms |= {"decoder.decoder_norm": width, "decoder.mask_norm": case.n_cls}
        linears["decoder.proj_dec"] = (width, width)
        others |= {
            "decoder.cls_emb": (1, case.n_cls, width),
            "decoder.proj_patch": (width, width),
            "decoder.proj_classes": (width, width),
        }
    for block in blocks:
        norms |= {f"{block}.norm1": width, f"{block}.norm2": width}
        linears |= {
            f"{block}.attn.qkv": (3 * width, width),
            f"{block}.attn.proj": (width, width),
            f"{block}.mlp.fc1": (4 * width, width),
            f"{block}.mlp.fc2": (width, 4 * width),
        }
    weights = linears | {name: (size,) for name, size in norms.items()}
    biases = {f"{name}.bias": shape[:1] for name, shape in weights.items()}
    return others | {f"{name}.weight": shape for name, shape in weights.items()} | biases


def _tensor(key: str, shape: tuple[int, ...]) -> Tensor:
    noise = _noise(key, shape)
    if key.endswith(".bias"):
        value = 0.05 * noise
    elif len(shape) == 1:  # LayerNorm
        value = 1 + 0.5 * noise
    elif shape[0] == 1:  # tokens and positions
        value = 0.1 * noise
    else:
        gain = next((gain for name, gain in _GAINS.items() if name in key), 1.5)
        value = gain * math.sqrt(3 / math.prod(shape[1:])) * noise
    return torch.from_numpy(value)


def _noise(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform float32 in -1..1."""
    return 2 * np.random.default_rng(zlib.crc32(name.encode())).random(shape, dtype=np.float32) - 1
