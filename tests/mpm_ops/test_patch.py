"""Any timm ViT with merging, against a loop over blocks and merges for one image at a time."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import timm
import torch
from fake_cuda import compute_packed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mpm_ops import merge_tokens, patch_timm
from mpm_ops.attention import block_forward, use_attention
from mpm_ops.packed import PackedTokens
from mpm_ops.patch import MergingBlocks, is_plain

# timm's own models, smaller; 8 x 8 patches leave enough rows for matrix products to run the same
# kernel whatever the batch.
VITS: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": ("vit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4, "no_embed_class": True}),
    "average pooling": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "attention pooling": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "map"}),
    "layer scale": ("vit_tiny_patch16_224", {"init_values": 0.5}),
    "normalised queries and keys": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "norm before the blocks": ("vit_tiny_patch16_224", {"pre_norm": True, "num_classes": 0}),
    "any picture size": ("vit_tiny_patch16_224", {"dynamic_img_size": True, "img_size": 64}),
    "SigLIP": ("vit_base_patch16_siglip_224", {}),
    "DINOv2": ("vit_small_patch14_reg4_dinov2", {"patch_size": 16, "init_values": 0.5}),
    "DINOv2 giant": ("vit_giant_patch14_dinov2", {"patch_size": 16, "init_values": 0.5, "mlp_ratio": 4}),
    "CLIP": ("vit_base_patch16_clip_224", {}),
    "FlexiViT": ("flexivit_small", {}),
}
SCHEDULE = (1, 3)


def make_vit(name: str, img_size: int = 128) -> VisionTransformer:
    model, options = VITS[name]
    torch.manual_seed(0)
    sizes = {"img_size": img_size, "embed_dim": 64, "num_heads": 2, "depth": 5, "num_classes": 10}
    vit = timm.create_model(model, pretrained=False, **(sizes | options)).eval()
    for parameter in vit.parameters():  # timm starts with weights so small that blocks change little
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    return vit


def pictures(num_pictures: int) -> Tensor:
    """Pictures that are partly blank, each to another degree, so that they merge to different lengths."""
    images = torch.randn(num_pictures, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    for i, image in enumerate(images):
        image[:, : 128 * i // num_pictures] = image[:, :1, :1]
    return images


def merged_depths(vit: VisionTransformer, image: Tensor, schedule: tuple[int, ...], align: int = 1) -> list[Tensor]:
    """Full-length tokens [1, L, D] of one picture after each block, by an unpatched model's parts."""
    special = vit.num_prefix_tokens
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(image[None])))
    origin = torch.arange(x.shape[1] - special)
    depths = []
    for i, block in enumerate(vit.blocks):
        if i in schedule:
            merged, merge_map = merge_tokens(x[0, special:], align=align)
            assert len(merged) < len(merge_map)
            x = torch.cat([x[:, :special], merged[None]], dim=1)
            origin = merge_map[origin]
        x = block(x)
        depths.append(torch.cat([x[:, :special], x[:, special:][:, origin]], dim=1))
    return depths


@pytest.mark.parametrize("name", VITS)
@torch.inference_mode()
def test_output_of_each_picture_is_that_of_a_loop_over_blocks_and_merges(name: str) -> None:
    vit, images = make_vit(name), pictures(3)
    expected = torch.cat([vit.norm(merged_depths(vit, image, SCHEDULE)[-1]) for image in images])
    expected_head = vit.forward_head(expected)
    plain = vit(images)

    assert patch_timm(vit, SCHEDULE) is vit
    torch.testing.assert_close(vit.forward_features(images), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(vit(images), expected_head, rtol=0, atol=2e-5)
    assert not torch.allclose(vit(images), plain, rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", VITS)
@torch.inference_mode()
def test_where_ragged_images_run_in_one_call_output_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vit, images = patch_timm(make_vit(name), SCHEDULE), pictures(3)
    expected = vit.forward_features(images)
    compute_packed(monkeypatch)
    calls: list[int] = []

    def count(block: Block, tokens: PackedTokens) -> PackedTokens:
        calls.append(len(set(tokens.lengths)))
        return block_forward(block, tokens)

    monkeypatch.setattr("mpm_ops.patch.block_forward", count)
    monkeypatch.setattr("mpm_ops.patch.can_pack", lambda block, x: is_plain(block))
    monkeypatch.setattr("mpm_ops.patch._choose_attention", lambda block, device: use_attention(block, "flash"))
    torch.testing.assert_close(vit.forward_features(images), expected, rtol=0, atol=2e-5)
    if name == "normalised queries and keys":  # which packed attention does not know
        assert not calls
    else:
        assert len(calls) == 5
        assert calls[-1] > 1, "lengths do not differ"


def test_blocks_in_training_are_not_packed() -> None:
    block = make_vit("class token").blocks[0]
    assert is_plain(block)
    assert not is_plain(block.train())


@pytest.mark.parametrize("name", VITS)
@torch.inference_mode()
def test_an_empty_schedule_changes_nothing(name: str) -> None:
    vit, images = make_vit(name), pictures(3)
    plain, features = vit(images), vit.forward_features(images)
    patch_timm(patch_timm(vit, SCHEDULE), ())
    assert torch.equal(vit(images), plain)
    assert torch.equal(vit.forward_features(images), features)


@pytest.mark.parametrize(("name", "align"), [("registers", 1), ("average pooling", 8)])
@torch.inference_mode()
def test_no_bit_depends_on_the_batch(name: str, align: int, threads: int) -> None:
    vit, images = patch_timm(make_vit(name), SCHEDULE, align=align), pictures(5)
    images[3] = images[1]  # equal lengths meet too
    alone = torch.cat([vit.forward_features(image[None]) for image in images])
    assert torch.equal(vit.forward_features(images), alone)
    assert torch.equal(vit.forward_features(images[[4, 0, 2]]), alone[[4, 0, 2]])


@pytest.mark.parametrize("align", [1, 4])
@torch.inference_mode()
def test_later_blocks_see_fewer_tokens(align: int) -> None:
    vit = make_vit("registers")
    lengths: list[int] = []
    for block in vit.blocks:
        block.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    patch_timm(vit, (0, 3), align=align)(pictures(1))
    assert 5 + 64 > lengths[0] == lengths[1] == lengths[2] > lengths[3] == lengths[4] >= 5 + 16
    assert all((length - 5) % align == 0 for length in lengths)


@pytest.mark.parametrize(
    ("indices", "taken"), [(None, [0, 1, 2, 3, 4]), (2, [3, 4]), ([0, 2], [0, 2]), ([1, 4], [1, 4])], ids=str
)
@torch.inference_mode()
def test_intermediates_have_full_length(indices: list[int] | int | None, taken: list[int]) -> None:
    vit, images = make_vit("distilled"), pictures(2)
    depths = [torch.cat(pair) for pair in zip(*(merged_depths(vit, image, SCHEDULE) for image in images), strict=True)]

    patch_timm(vit, SCHEDULE)
    final, features = vit.forward_intermediates(images, indices=indices, output_fmt="NLC", return_prefix_tokens=True)
    torch.testing.assert_close(final, vit.norm(depths[-1]), rtol=0, atol=2e-5)
    assert len(features) == len(taken)
    for depth, (patches, prefix) in zip(taken, features, strict=True):
        torch.testing.assert_close(torch.cat([prefix, patches], dim=1), depths[depth], rtol=0, atol=2e-5)
    (last,) = vit.forward_intermediates(images, indices=[1], intermediates_only=True, stop_early=True)
    assert last.shape == (2, 64, 8, 8)
    torch.testing.assert_close(last.flatten(2).mT, depths[1][:, 2:], rtol=0, atol=2e-5)


@torch.inference_mode()
def test_patching_again_replaces_the_schedule() -> None:
    vit, images = make_vit("class token"), pictures(2)
    expected = patch_timm(deepcopy(vit), (2,), align=4)(images)
    assert torch.equal(patch_timm(patch_timm(vit, SCHEDULE), (2,), align=4)(images), expected)


@torch.inference_mode()
def test_parameters_keep_their_names() -> None:
    vit = make_vit("layer scale")
    before = {key: value.clone() for key, value in vit.state_dict().items()}
    patch_timm(vit, SCHEDULE)
    assert list(vit.state_dict()) == list(before)
    copy = patch_timm(make_vit("layer scale"), SCHEDULE)
    nn.init.zeros_(copy.blocks[0].attn.qkv.weight)
    copy.load_state_dict(before)
    assert torch.equal(copy(pictures(1)), vit(pictures(1)))


@torch.inference_mode()
def test_blocks_can_be_counted_indexed_cut_and_pruned() -> None:
    vit, image = make_vit("class token"), pictures(1)
    blocks = list(vit.blocks)
    depths = merged_depths(vit, image[0], SCHEDULE)
    patch_timm(vit, SCHEDULE)
    assert len(vit.blocks) == 5
    assert vit.blocks[0] is blocks[0]
    assert vit.blocks[-1] is blocks[4]

    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(image)))
    for stop in range(1, 6):
        part = vit.blocks[:stop]
        assert isinstance(part, MergingBlocks)
        assert part.schedule == tuple(block for block in SCHEDULE if block < stop)
        torch.testing.assert_close(part(x), depths[stop - 1], rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match=r"^merging blocks: expected a slice from the first block on, got slice"):
        vit.blocks[1:]

    vit.prune_intermediate_layers([2])
    torch.testing.assert_close(vit.forward_features(image), vit.norm(depths[2]), rtol=0, atol=2e-5)


def test_gradients_reach_every_block() -> None:
    vit = patch_timm(make_vit("class token"), SCHEDULE)
    vit(pictures(2)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in vit.blocks.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_merging(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks run twice then: what they merge, give and learn is the same, whenever it is switched on."""
    monkeypatch.setattr("timm.models._manipulate.use_reentrant_ckpt", lambda: reentrant)
    vit, images = make_vit("registers", 64), pictures(2)[:, :, :64, :64].requires_grad_()
    early = deepcopy(vit)
    early.set_grad_checkpointing()
    patch_timm(early, SCHEDULE)
    expected = patch_timm(vit, SCHEDULE)(images)
    expected.square().sum().backward()
    final, features = vit.forward_intermediates(images)
    late = deepcopy(vit)
    late.set_grad_checkpointing()
    lengths: list[int] = []
    early.blocks[4].register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    output = early(images)
    torch.testing.assert_close([output, late(images)], [expected, expected], rtol=0, atol=2e-5)
    output.square().sum().backward()
    for (name, parameter), own in zip(vit.named_parameters(), early.parameters(), strict=True):
        torch.testing.assert_close(own.grad, parameter.grad, rtol=1e-3, atol=1e-3, msg=name)
    found, found_features = early.forward_intermediates(images)
    torch.testing.assert_close([found, *found_features], [final, *features], rtol=0, atol=2e-5)
    assert len(lengths) == 3 * 2, "the last block does not run again for gradients"
    assert all(length < 4 + 16 for length in lengths)


@pytest.mark.parametrize("name", ["class token", "attention pooling"])
def test_an_empty_batch_gives_empty_features(name: str) -> None:
    vit, nothing = patch_timm(make_vit(name), SCHEDULE), torch.zeros(0, 3, 128, 128)
    assert vit(nothing).shape == (0, 10)
    x = torch.zeros(0, 64 + vit.num_prefix_tokens, 64)
    assert [block(x).shape for block in vit.blocks] == [x.shape] * 5  # timm's intermediates can't be empty anyway


@torch.inference_mode()
def test_refuses_attention_masks() -> None:
    vit = patch_timm(make_vit("class token"), SCHEDULE)
    with pytest.raises(ValueError, match=r"^merging blocks take no attn_mask, is_causal$"):
        vit.forward_features(pictures(1), is_causal=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2), "^vit: expected a timm VisionTransformer, got Linear$"),
        (lambda: timm.create_model("vit_tiny_patch16_224", patch_drop_rate=0.5), "without patch dropout$"),
        (
            lambda: timm.create_model("swin_tiny_patch4_window7_224", embed_dim=24, depths=(1,)),
            "^vit: expected a timm VisionTransformer, got SwinTransformer, which attends in windows .* table 10",
        ),
        (
            lambda: tiny("vit_relpos_small_patch16_224"),
            "got VisionTransformerRelPos, which has relative positions, and",
        ),
        (
            lambda: tiny("beit_base_patch16_224"),
            "got Beit, which has relative positions, and a merged token has none$",
        ),
        (lambda: tiny("samvit_base_patch16_224"), "got VisionTransformerSAM, which attends in windows"),
        (lambda: tiny("eva02_tiny_patch14_224"), "got Eva, which rotates queries and keys by their positions"),
        (lambda: tiny("vit_small_patch16_dinov3"), "got Eva, which .* EVA-02 and DINOv3 .* a merged token has none$"),
    ],
    ids=["no ViT", "patch dropout", "Swin", "relative positions", "BEiT", "SAM", "EVA-02", "DINOv3"],
)
def test_refuses_models_it_would_break(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        patch_timm(make())


def tiny(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, **({"embed_dim": 48, "depth": 1, "num_heads": 2} | options))


@pytest.mark.parametrize(("schedule", "align"), [((5,), 1), ((3, 1), 1), ((1,), 0)])
def test_refuses_a_schedule_or_align_that_does_not_fit(schedule: tuple[int, ...], align: int) -> None:
    vit = make_vit("class token")
    with pytest.raises(ValueError, match=r"^(schedule|align): expected"):
        patch_timm(vit, schedule, align=align)
    assert not isinstance(vit.blocks, MergingBlocks)
