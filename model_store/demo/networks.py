"""The two networks that are trained: the Segmenter, and the convolutional teacher that it learns from."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpm_ops import InferenceConfig, Segmenter, SegmenterConfig
from mpm_ops.decoders import MaskTransformer

from .scene import CLASSES


class Student(nn.Module):
    """A Segmenter without merging on dense batches, which train faster than packed ones."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, windows: Tensor) -> Tensor:
        """[B, 3, H, W] normalised windows, whole patches -> [B, K, Gh, Gw] logits, as `Segmenter.forward` gives."""
        encoder, decoder = self.segmenter.encoder, self.segmenter.decoder
        assert isinstance(decoder, MaskTransformer)
        x = encoder.embed(windows).values.unflatten(0, (len(windows), -1))  # [B, 1 + N, D]
        x = decoder.proj_dec(encoder.norm(encoder.blocks(x))[:, encoder.num_special :])
        x = decoder.blocks(torch.cat([x, decoder.cls_emb.expand(len(x), -1, -1)], dim=1))
        patches, classes = decoder.decoder_norm(x).split([x.shape[1] - decoder.n_cls, decoder.n_cls], dim=1)
        patches = F.normalize(patches @ decoder.proj_patch, dim=-1)
        classes = F.normalize(classes @ decoder.proj_classes, dim=-1)
        masks = decoder.mask_norm(patches @ classes.mT)  # [B, N, K]
        return masks.mT.unflatten(2, (windows.shape[2] // encoder.patch_size, -1))


def build_segmenter(init: Path | None) -> Segmenter:
    """The network of variant.yml, with the weights of an earlier run or fresh ones."""
    config = SegmenterConfig(
        image_size=(512, 512),
        patch_size=16,
        d_model=192,
        n_heads=3,
        n_layers=12,
        n_cls=len(CLASSES),
        drop_path_rate=0.1,
    )
    inference = InferenceConfig(im_size=512, max_ratio=4, window_size=512, window_stride=512, normalization="vit")
    model = Segmenter(config, inference)
    if init is not None:
        weights = torch.load(init, map_location="cpu", weights_only=True)
        model.load_state_dict(weights.get("model", weights))
        return model
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.trunc_normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model


class Teacher(nn.Module):
    """A residual U-Net; from few pictures, convolutions learn far more than attention does.

    Source: Ronneberger et al., U-Net (arXiv 1505.04597), on the basic blocks of He et al. (arXiv 1512.03385).
    """

    def __init__(self, widths: tuple[int, ...] = (48, 64, 128, 256, 512), depths: tuple[int, ...] = (1, 2, 3, 4, 2)):
        super().__init__()
        inputs = (3, *widths)
        self.down = nn.ModuleList(
            nn.Sequential(*(Residual(inputs[i] if j == 0 else width, width, 2 if j == 0 else 1) for j in range(depth)))
            for i, (width, depth) in enumerate(zip(widths, depths, strict=True))
        )
        self.scene = nn.Linear(widths[-1], widths[-1])
        steps = list(zip(widths[:0:-1], widths[-2::-1], strict=True))  # (coarser, finer), from the coarsest
        self.up = nn.ModuleList(nn.Conv2d(coarse, fine, 1) for coarse, fine in steps)
        self.join = nn.ModuleList(Residual(2 * fine, fine, 1) for _, fine in steps)
        self.head = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(widths[0], len(CLASSES), 1))

    def forward(self, windows: Tensor) -> Tensor:
        """[B, 3, H, W] normalised windows, sides multiples of 32 -> [B, K, H / 2, W / 2] logits."""
        x, levels = windows, []
        for down in self.down:
            x = down(x)
            levels.append(x)
        x = x + self.scene(x.mean((2, 3)))[:, :, None, None]
        for up, join, level in zip(self.up, self.join, levels[-2::-1], strict=True):
            x = join(torch.cat([F.interpolate(up(x), scale_factor=2.0), level], dim=1))
        return self.head(x)


class Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, num_inputs: int, num_outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(num_inputs, num_outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(num_outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(num_outputs, num_outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(num_outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or num_inputs != num_outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(num_inputs, num_outputs, 1, stride, bias=False), nn.BatchNorm2d(num_outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x), inplace=True)
