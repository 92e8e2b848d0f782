"""The Vision Transformer encoder of Segmenter, on timm's blocks and with the official parameter names."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._timm import Block
from .packed import PackedTokens

LAYER_NORM_EPS = 1e-5  # Segmenter's; timm's own models use 1e-6
HEAD_DIM = 64


class Encoder(nn.Module):
    """Patch embedding, position embedding, transformer blocks, final norm."""

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        patch_size: int,
        d_model: int,
        n_heads: int,
        n_layers: int,
        distilled: bool,
        drop_path_rate: float = 0.0,
        norm_eps: float = LAYER_NORM_EPS,
        resize_mode: str = "bilinear",
    ) -> None:
        super().__init__()
        self.resize_mode = resize_mode
        self.patch_size = patch_size
        self.num_special = 2 if distilled else 1
        self.stored_grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        num_patches = self.stored_grid[0] * self.stored_grid[1]

        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, d_model, kernel_size=patch_size, stride=patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d_model))
        if distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, d_model))
        self.pos_embed = nn.Parameter(torch.zeros(1, num_patches + self.num_special, d_model))
        self.blocks = make_blocks(d_model, n_heads, n_layers, drop_path_rate, norm_eps)
        self.norm = nn.LayerNorm(d_model, eps=norm_eps)

    def embed(self, windows: Tensor) -> PackedTokens:
        """[B, 3, H, W] normalised windows -> special tokens and Gh x Gw patches of each, with positions.

        A window that is no multiple of the patch size is zero-padded on the right and bottom.
        """
        pad_bottom, pad_right = (-windows.shape[2] % self.patch_size, -windows.shape[3] % self.patch_size)
        if pad_bottom or pad_right:
            windows = F.pad(windows, (0, pad_right, 0, pad_bottom))
        grid = (windows.shape[2] // self.patch_size, windows.shape[3] // self.patch_size)
        if windows.is_cuda:
            patches = self._project(windows)
        else:
            windows = windows.contiguous()  # channels that lie last are added in another order
            patches = self.patch_embed["proj"](windows).flatten(2).transpose(1, 2)
        special = [self.cls_token] if self.num_special == 1 else [self.cls_token, self.dist_token]
        x = torch.cat([token.expand(len(windows), -1, -1) for token in special] + [patches], dim=1)
        return PackedTokens.from_batch(x + self.positions(grid))

    def _project(self, windows: Tensor) -> Tensor:
        """The convolution as one matrix product, [B, Gh * Gw, D]: on a GPU faster, and in float32 without TF32."""
        proj, side = self.patch_embed["proj"], self.patch_size
        assert isinstance(proj, nn.Conv2d)
        windows = windows.to(proj.weight.dtype)
        patches = windows.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5)
        return F.linear(patches.flatten(3).flatten(1, 2), proj.weight.flatten(1), proj.bias)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """[1, special + Gh x Gw, D] position embedding of a grid of patches."""
        # Upstream compares counts, not shapes: a 16x64 grid takes the rows of a stored 32x32 one as they are.
        if grid[0] * grid[1] == self.stored_grid[0] * self.stored_grid[1]:
            return self.pos_embed
        special, patches = self.pos_embed.split([self.num_special, self.pos_embed.shape[1] - self.num_special], 1)
        stored = patches.unflatten(1, self.stored_grid).permute(0, 3, 1, 2)
        resized = F.interpolate(stored, size=grid, mode=self.resize_mode, align_corners=False)
        return torch.cat([special, resized.flatten(2).transpose(1, 2)], dim=1)


def make_blocks(
    d_model: int, n_heads: int, n_layers: int, drop_path_rate: float = 0.0, norm_eps: float = LAYER_NORM_EPS
) -> nn.Sequential:
    """Segmenter's transformer blocks: pre-norm, exact GELU, 4x MLP, biases everywhere."""
    rates = torch.linspace(0, drop_path_rate, n_layers, device="cpu").tolist()
    return nn.Sequential(
        *(
            Block(
                d_model,
                n_heads,
                qkv_bias=True,
                drop_path=rate,
                norm_layer=partial(nn.LayerNorm, eps=norm_eps),
            )
            for rate in rates
        )
    )
