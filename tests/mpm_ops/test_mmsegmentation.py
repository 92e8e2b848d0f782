"""mmsegmentation's Segmenter checkpoints, against its modules' structure on torch's own attention."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from mpm_ops import CheckpointError, load_segmenter
from mpm_ops.classes import load_classes
from mpm_ops.models import copy_checkpoint

WIDTH, HEADS, SIDE, CLASSES = 128, 2, 64, 5

CONFIG = """\
dataset_type = 'CityscapesDataset'
model = dict(
    type='EncoderDecoder',
    backbone=dict(type='VisionTransformer', img_size=(64, 64), interpolate_mode='bicubic'),
    test_cfg=dict(crop_size=(
        64,
        64,
    ), mode='slide', stride=(
        48,
        48,
    )))
"""


class Layer(nn.Module):
    """A pre-norm block with the names of theirs."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH, eps=eps), nn.LayerNorm(WIDTH, eps=eps)
        self.attn = nn.ModuleDict({"attn": nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)})
        first = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU())
        self.ffn = nn.ModuleDict({"layers": nn.ModuleList([first, nn.Linear(4 * WIDTH, WIDTH)])})

    def forward(self, x: Tensor) -> Tensor:
        normed = self.ln1(x)
        x = x + self.attn["attn"](normed, normed, normed, need_weights=False)[0]
        return x + nn.Sequential(*self.ffn["layers"].children())(self.ln2(x))


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"projection": nn.Conv2d(3, WIDTH, 16, 16)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (SIDE // 16) ** 2, WIDTH))
        self.layers = nn.ModuleList(Layer(1e-6) for _ in range(3))
        self.ln1 = nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, -x.shape[3] % 16, 0, -x.shape[2] % 16))
        patches = self.patch_embed["projection"](x)
        positions: Tensor = self.pos_embed
        if patches[0, 0].numel() != positions.shape[1] - 1:
            stored = positions[:, 1:].reshape(1, SIDE // 16, SIDE // 16, WIDTH).permute(0, 3, 1, 2)
            resized = F.interpolate(stored, size=patches.shape[2:], mode="bicubic", align_corners=False)
            positions = torch.cat([positions[:, :1], resized.flatten(2).mT], 1)
        x = torch.cat([self.cls_token.expand(len(x), 1, -1), patches.flatten(2).mT], 1) + positions
        for layer in self.layers:
            x = layer(x)
        return self.ln1(x)[:, 1:].mT.unflatten(2, patches.shape[2:])


class Head(nn.Module):
    def __init__(self, mask: bool) -> None:
        super().__init__()
        self.conv_seg = nn.Conv2d(WIDTH, CLASSES, 1)  # a mask head has one too, and leaves it alone
        if mask:
            self.dec_proj = nn.Linear(WIDTH, WIDTH)
            self.cls_emb = nn.Parameter(torch.zeros(1, CLASSES, WIDTH))
            self.layers = nn.ModuleList(Layer(1e-5) for _ in range(2))
            self.patch_proj = nn.Linear(WIDTH, WIDTH, bias=False)
            self.classes_proj = nn.Linear(WIDTH, WIDTH, bias=False)
            self.decoder_norm, self.mask_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(CLASSES)

    def forward(self, features: Tensor) -> Tensor:
        if not hasattr(self, "dec_proj"):
            return self.conv_seg(features)
        x = torch.cat([self.dec_proj(features.flatten(2).mT), self.cls_emb.expand(len(features), -1, -1)], 1)
        for layer in self.layers:
            x = layer(x)
        x = self.decoder_norm(x)
        patches, classes = self.patch_proj(x[:, :-CLASSES]), self.classes_proj(x[:, -CLASSES:])
        patches, classes = patches / patches.norm(dim=-1, keepdim=True), classes / classes.norm(dim=-1, keepdim=True)
        return self.mask_norm(patches @ classes.mT).mT.unflatten(2, features.shape[2:])


def reference(mask: bool = True) -> nn.Sequential:
    network = nn.Sequential()
    network.add_module("backbone", Backbone())
    network.add_module("decode_head", Head(mask))
    for name, weight in network.named_parameters():  # small tokens, so that another eps shows
        gain = 0.05 if "projection" in name or "pos_embed" in name else 1.0
        with torch.no_grad():
            weight.add_(gain * torch.randn(weight.shape) / math.sqrt(weight[0].numel() if weight.ndim > 1 else 50))
    return network.eval()


def write(network: nn.Module, path: Path, **meta: Any) -> Path:
    stored = {"meta": {"epoch": 3, **meta}, "state_dict": network.state_dict(), "optimizer": {"state": {}}}
    torch.save(stored, path)
    return path


@pytest.mark.parametrize("mask", [True, False], ids=["mask transformer", "linear"])
@torch.inference_mode()
def test_logits_are_those_of_mmsegmentation(mask: bool, tmp_path: Path) -> None:
    network = reference(mask)
    model = load_segmenter(write(network, tmp_path / "iter_160000.pth"))
    model, network = model.double(), network.double()
    for size in ((64, 64), (96, 64), (50, 130), (32, 128)):  # bicubic positions, padding, as many patches as stored
        windows = torch.randn(2, 3, *size, dtype=torch.float64)
        torch.testing.assert_close(model.window_logits(windows), network(windows), rtol=0, atol=1e-10)
    other_eps = load_segmenter(tmp_path).double()
    other_eps.encoder.norm.eps = 1e-5
    assert not torch.allclose(other_eps.window_logits(windows), network(windows), rtol=0, atol=1e-6)


@pytest.mark.parametrize("version", [0, 1])
def test_windows_and_classes_come_from_the_configuration(version: int, tmp_path: Path) -> None:
    names, colors = ["road", "sky", "car", "tree", "sign"], [[i, 2 * i, 3 * i] for i in range(5)]
    meta: dict[str, Any] = {"config": CONFIG, "CLASSES": names, "PALETTE": colors}
    if version:
        meta = {"cfg": CONFIG, "dataset_meta": {"classes": tuple(names), "palette": colors}}
    path = write(reference(), tmp_path / "weights.pth", **meta)
    inference = load_segmenter(path).inference
    assert (inference.window_size, inference.window_stride, inference.normalization) == (64, 48, "vit")
    assert (inference.im_size, inference.max_ratio) == (1024, 2)

    built = tmp_path / "built"
    built.mkdir()
    copy_checkpoint(path, built)
    model, again = load_segmenter(path), load_segmenter(built)
    assert again.inference == inference
    windows = torch.randn(1, 3, 64, 48)
    assert torch.equal(again.window_logits(windows), model.window_logits(windows))
    classes = load_classes(built, 5)
    assert (list(classes.names), classes.colors.tolist()) == (names, colors)
    assert yaml.safe_load((built / "variant.yml").read_text())["net_kwargs"]["norm_eps"] == 1e-6


def test_says_that_another_network_is_not_one(tmp_path: Path) -> None:
    network = nn.ModuleDict({"backbone": nn.Linear(2, 2), "decode_head": nn.Linear(2, 2)})
    with pytest.raises(CheckpointError, match=r"got another network of mmsegmentation: a plain ViT with Segmenter's"):
        load_segmenter(write(network, tmp_path / "swin.pth"))
    strange = reference().state_dict() | {"neck.weight": torch.zeros(3)}
    torch.save({"state_dict": strange}, tmp_path / "neck.pth")
    with pytest.raises(CheckpointError, match=r"does not fit the network of its weights .*: unexpected neck.weight"):
        load_segmenter(tmp_path / "neck.pth")
