"""Stages: where the encoder is cut, and that a window never notices with whom it is grouped."""

import re
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from mpm_ops import Segmenter, merge_tokens
from mpm_ops.packed import PackedTokens
from mpm_ops.stages import Stage, WindowBatch, WindowView, cut_stages, parse_schedule


@pytest.mark.parametrize(
    ("schedule", "blocks", "merges"),
    [
        ((), [range(12)], [False]),
        ((0,), [range(0), range(12)], [True, False]),
        ((0, 1), [range(0), range(1), range(1, 12)], [True, True, False]),
        ((2, 5), [range(2), range(2, 5), range(5, 12)], [True, True, False]),
        ([11], [range(11), range(11, 12)], [True, False]),
    ],
)
def test_cuts_before_each_block_of_the_schedule(
    schedule: Sequence[int], blocks: list[range], merges: list[bool]
) -> None:
    expected = [Stage(i, b, m) for i, (b, m) in enumerate(zip(blocks, merges, strict=True))]
    assert list(cut_stages(12, schedule)) == expected


@pytest.mark.parametrize("schedule", [(12,), (-1,), (5, 2), (2, 2), (2, 5, 99)])
def test_refuses_schedules_the_encoder_cannot_follow(schedule: tuple[int, ...]) -> None:
    message = f"schedule: expected strictly increasing block numbers within 0..11, got {schedule}"
    with pytest.raises(ValueError, match=re.escape(message)):
        cut_stages(12, schedule)


@pytest.mark.parametrize(("text", "schedule"), [("2,5", (2, 5)), ("off", ()), ("0", (0,)), ("2, 5, 9", (2, 5, 9))])
def test_reads_schedules_as_people_write_them(text: str, schedule: tuple[int, ...]) -> None:
    assert parse_schedule(text) == schedule


@pytest.mark.parametrize("text", ["", "2,", "two", "2;5", "()"])
def test_refuses_what_is_no_schedule(text: str) -> None:
    with pytest.raises(ValueError, match=r"^schedule: expected block numbers such as 2,5, or off, got"):
        parse_schedule(text)


@pytest.mark.parametrize("merged", [False, True])
def test_splitting_undoes_joining(merged: bool) -> None:
    windows = []
    for length in (40, 28, 33):
        window = WindowBatch(PackedTokens(torch.randn(length, 8), (length,)))
        windows.append(window.merged(num_special=1, align=1) if merged else window)
    joined = WindowBatch.join([windows[0], WindowBatch.join(windows[1:])])
    assert joined.tokens.lengths == tuple(len(window.tokens.values) for window in windows)
    for window, part in zip(windows, joined.split(), strict=True):
        assert torch.equal(window.tokens.values, part.tokens.values)
        assert window.tokens.lengths == part.tokens.lengths
        assert (part.merge_maps is None) is not merged
        for map_of_window, map_of_part in zip(window.merge_maps or (), part.merge_maps or (), strict=True):
            assert torch.equal(map_of_window, map_of_part)


@pytest.mark.parametrize("num_special", [0, 1, 2])
@pytest.mark.parametrize("align", [1, 8])
def test_merging_never_touches_special_tokens(num_special: int, align: int) -> None:
    # Special tokens that look like each other and like image tokens, so that they would merge if they could.
    sequences = [torch.randn(length, 8) for length in (50, 65)]
    for sequence in sequences:
        sequence[:num_special] = sequence[num_special]
    batch = WindowBatch(PackedTokens.pack(sequences)).merged(num_special=num_special, align=align)

    for sequence, merged, merge_map in zip(sequences, batch.tokens.split(), batch.merge_maps or (), strict=True):
        image, expected_map = merge_tokens(sequence[num_special:], align=align)
        assert torch.equal(merged, torch.cat([sequence[:num_special], image]))
        assert torch.equal(merge_map, expected_map)


def test_maps_lead_from_patches_to_tokens_over_all_merges() -> None:
    # Every patch has a column to itself, so a token shows by its non-zero columns which patches are in it.
    patches = torch.cat([0.1 * torch.eye(40), torch.randn(40, 8)], dim=1)
    batch = WindowBatch(PackedTokens(torch.cat([torch.ones(1, 48), patches]), (41,)))
    for _ in range(3):
        batch = batch.merged(num_special=1, align=1)
    assert batch.merge_maps is not None
    members = batch.tokens.values[1:, :40] > 0  # [M, N]
    assert len(members) < 30
    assert torch.equal(members, torch.arange(len(members))[:, None] == batch.merge_maps[0])


# Rows a lone window needs so that matrix products run the same kernel as in a group (MKL, up to 16 threads).
SAFE_ROWS = 28


def clutter(num_windows: int, side: int, *, seed: int) -> Tensor:
    """Windows that are partly blank, each to another degree, so that they merge to different lengths."""
    windows = torch.randn(num_windows, 3, side, side, generator=torch.Generator().manual_seed(seed))
    for i, window in enumerate(windows):
        window[:, : side * i // num_windows] = window[:, :1, :1]
    return windows


def run_in_groups(model: Segmenter, windows: Tensor, groups: list[list[int]]) -> tuple[list[list[Tensor]], Tensor]:
    """Run the same groups in every stage; tokens of each window after each stage, and logits of each."""
    waiting: dict[int, WindowView] = {}
    for group in groups:
        waiting |= dict(zip(group, model.embed(windows[group]).split(), strict=True))
    trace = [[waiting[i].tokens.values for i in range(len(windows))]]
    for stage in model.stages:
        for group in groups:
            batch = model.run_blocks(stage, WindowBatch.join([waiting[i] for i in group]))
            if stage.merges:
                batch = model.merge(batch)
            waiting |= dict(zip(group, batch.split(), strict=True))
        trace.append([waiting[i].tokens.values for i in range(len(windows))])
    logits: dict[int, Tensor] = {}
    for group in groups:
        logits |= dict(zip(group, model.decode(WindowBatch.join([waiting[i] for i in group])), strict=True))
    return trace, torch.stack([logits[i] for i in range(len(windows))])


@pytest.mark.parametrize(
    "shape",
    [
        {"schedule": (1, 2)},
        {"schedule": (0, 2), "align": 8, "distilled": True},
        {"schedule": (1,), "d_model": 192, "n_heads": 3, "decoder": "linear"},
    ],
    ids=str,
)
@torch.inference_mode()
def test_no_bit_depends_on_the_group(
    shape: dict[str, object], threads: int, tiny_model: Callable[..., Segmenter]
) -> None:
    model = tiny_model(image_size=(160, 160), **shape)
    windows = clutter(4, 160, seed=7)
    windows[3] = windows[1]  # equal lengths meet too
    alone, logits_alone = run_in_groups(model, windows, [[i] for i in range(4)])
    lengths = {len(tokens) for tokens in alone[-1]}
    assert min(lengths) >= SAFE_ROWS
    assert len(lengths) > 2 or model.align > 1

    for groups in ([[0, 1, 2, 3]], [[1, 3], [2, 0]], [[3, 0, 2], [1]]):
        together, logits_together = run_in_groups(model, windows, groups)
        for step, (expected, found) in enumerate(zip(alone, together, strict=True)):
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), f"{groups}, step {step}"
        assert torch.equal(logits_alone, logits_together), groups


def test_window_logits_of_a_batch_are_those_of_each_window(threads: int, tiny_model: Callable[..., Segmenter]) -> None:
    model = tiny_model(image_size=(160, 160), schedule=(1, 2))
    windows = clutter(3, 160, seed=8)
    alone = torch.cat([model.window_logits(window[None]) for window in windows])
    assert torch.equal(model.window_logits(windows), alone)
