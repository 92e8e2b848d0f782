"""Every runtime against the plain torch modules."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from PIL import Image
from torch import nn

from mpm_ops import Segmenter, load_segmenter
from mpm_ops._timm import Block
from mpm_ops.cpus import usable_cores
from mpm_ops.merging import make_merger
from mpm_ops.packed import PackedTokens
from mpm_ops.runtime import make_runtime, openvino
from mpm_ops.runtime.eager import TorchRuntime
from mpm_ops.runtime.openvino import OpenVINORuntime
from mpm_ops.stages import Decoded, Stage, WindowBatch
from mpm_ops.windows import cut_windows, plan_windows

Make = Callable[..., Segmenter]
DEMO = Path(__file__).resolve().parents[2] / "model_store" / "demo" / "checkpoint.pth"
NETWORKS: dict[str, dict[str, Any]] = {
    "mask": {},
    "many classes": {"n_cls": 150, "d_model": 128, "n_heads": 2},
    "linear": {"decoder": "linear"},
    "distilled": {"distilled": True},
    "two classes": {"n_cls": 2, "decoder_layers": 1},
}


def windows(seed: int = 0, number: int = 3) -> torch.Tensor:
    return torch.randn(number, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("schedule", [(), (0,), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("name", NETWORKS)
def test_openvino_gives_the_logits_of_torch(tiny_model: Make, name: str, schedule: tuple[int, ...]) -> None:
    model = tiny_model(schedule=schedule, **NETWORKS[name])
    expected = model.window_logits(windows())
    model.runtime = make_runtime(model, "openvino", "fp32")
    torch.testing.assert_close(model.window_logits(windows()), expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def streets(data_root: Path) -> list[np.ndarray]:
    pictures = sorted((data_root / "camvid" / "val" / "images").iterdir())[:40:20]
    return [np.asarray(Image.open(picture)) for picture in pictures]


@pytest.mark.parametrize("schedule", [(), (2, 5)])
def test_openvino_on_real_pictures(schedule: tuple[int, ...], streets: list[np.ndarray]) -> None:
    model = load_segmenter(DEMO, schedule)
    torch_runtime, openvino = TorchRuntime(model), make_runtime(model, "openvino", "fp32")
    for image in streets:
        height, width, _ = image.shape
        cut = cut_windows(image, plan_windows(height, width, model.inference), model.inference)
        model.runtime = torch_runtime
        expected, labels = model.window_logits(cut), model.segment(image)
        model.runtime = openvino
        off = (model.window_logits(cut) - expected).abs()
        assert off.mean() < 1e-3
        assert schedule or off.max() < 1e-3  # a pair that two rounding errors decide moves some logits by more
        assert (model.segment(image) == labels).mean() > 0.999


@pytest.mark.bf16
@pytest.mark.parametrize("runtime", ["torch", "openvino"])
def test_bf16_agrees_with_fp32_on_real_pictures(streets: list[np.ndarray], runtime: str) -> None:
    exact, model = load_segmenter(DEMO, (2, 5)), load_segmenter(DEMO, (2, 5), runtime=runtime, precision="bf16")
    for image in streets:
        assert (model.segment(image) == exact.segment(image)).mean() > 0.99


def test_one_openvino_runtime_serves_every_schedule(tiny_model: Make) -> None:
    schedules: list[tuple[int, ...]] = [(), (1,), (2,), (1, 2), (0, 2)]
    models = [tiny_model(schedule=schedule) for schedule in schedules]
    shared = make_runtime(models[0], "openvino", "fp32", mergers=[model.merger for model in models])
    for model in models:
        model.load_state_dict(models[0].state_dict())
        expected = model.window_logits(windows())
        model.runtime = shared
        torch.testing.assert_close(model.window_logits(windows()), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.bf16)])
def test_a_window_gets_the_same_bytes_alone_and_among_others(tiny_model: Make, precision: str) -> None:
    model = tiny_model(schedule=(1, 2))
    model.runtime = make_runtime(model, "openvino", precision)
    together = model.window_logits(windows(number=5))
    for i, window in enumerate(windows(number=5)):
        assert torch.equal(model.window_logits(window[None])[0], together[i])


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.bf16)])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_row_sees_what_fills_its_bucket(tiny_model: Make, name: str, precision: str) -> None:
    model = tiny_model(schedule=(1, 2), **NETWORKS[name])
    runtime = OpenVINORuntime(model, precision, [model.merger])
    for stage in model.stages[1:]:
        piece = runtime._later(stage.parts, stage.wants_keys, stage.attention_counts)[0]
        x, sizes = torch.randn(64, model.config.d_model), torch.ones(64)
        sizes[41:] = 0
        x[41:] = 0
        number = 41 - (0 if stage.merges else model.encoder.num_special)
        expected = piece(x, sizes)[0][:number].clone()
        x[41:] = 1e4
        assert torch.equal(piece(x, sizes)[0][:number], expected)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.bf16)])
def test_each_length_of_a_bucket_gets_the_same_bytes_among_mates(tiny_model: Make, precision: str) -> None:
    model = tiny_model(schedule=(1, 2))
    runtime = make_runtime(model, "openvino", precision)
    lengths = (31, 32, 33, 1, 64, 65, 48, 96)
    with torch.inference_mode():
        tokens = PackedTokens(torch.randn(sum(lengths), 64), lengths)
        tokens.split()[3].fill_(float("nan"))  # spoils itself alone
        for stage in model.stages[1:]:
            maps = tuple(torch.arange(96) % max(length - 1, 1) for length in lengths)
            batch = WindowBatch(tokens, None if stage.merges else maps)
            if not stage.merges:
                batch = batch.part(4, 8)
            together = runtime.run(stage, batch)
            for i in range(len(batch.tokens.lengths)):
                alone = runtime.run(stage, batch.part(i, i + 1))
                if isinstance(alone, WindowBatch):
                    assert isinstance(together, WindowBatch)
                    own = together.part(i, i + 1).tokens.values
                    assert torch.equal(own.nan_to_num(), alone.tokens.values.nan_to_num())
                    assert own.isfinite().all() == (i != 3)
                else:
                    assert isinstance(together, Decoded)
                    assert torch.equal(together.logits[i], alone.logits[0])


def test_padding_is_counted_as_it_is_computed(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(schedule=(1, 2))
    model.runtime = runtime = OpenVINORuntime(model, "fp32", [model.merger])
    computed, real = [], []
    fill = OpenVINORuntime._filled

    def filled(self: OpenVINORuntime, x: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        found = fill(self, x, *rest)
        real.append(len(x))
        computed.append(len(found[0]))
        return found

    monkeypatch.setattr(OpenVINORuntime, "_filled", filled)
    model.window_logits(windows())
    assert len(real) == 6, "three windows behind two merges"
    assert computed == [runtime.bucket(length) for length in real]
    assert runtime.padding_tokens == sum(computed) - sum(real) > 0


def test_the_warm_up_visits_every_bucket_within_reach(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(schedule=(1, 2))
    mergers = [model.merger, make_merger("mpm:1,2,keep=0.5", model.tower), make_merger("tome:r=3", model.tower)]
    runtime = OpenVINORuntime(model, "fp32", mergers, threads=2, streams=2)
    visited: list[list[int]] = [[], [], []]
    monkeypatch.setattr("mpm_ops.runtime.openvino._BUCKET", 4)
    run = OpenVINORuntime.run

    def noted(self: OpenVINORuntime, stage: Stage, given: Any) -> Any:
        visited[self._place].append(runtime.bucket(given.tokens.lengths[0]) if stage.index else 0)
        return run(self, stage, given)

    monkeypatch.setattr(OpenVINORuntime, "run", noted)
    for merger, expected in zip(
        mergers,
        (
            [0, 8, 12, 12, 16, 16, 20, 20],  # 17 tokens, of which 16 are halved once and twice
            [0, 12, 16, 16, 20, 20],  # a quarter of them merges at most
            [0, 8, 12, 16],  # as many as it says
        ),
        strict=True,
    ):
        for places in visited:
            places.clear()
        runtime.warm_up([merger])
        assert [sorted(lengths) for lengths in visited] == [expected] * 3, "for all threads and each stream"


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.bf16)])
def test_streams_give_the_bytes_of_all_threads_at_every_length(precision: str) -> None:
    """At the shapes of a whole Ti: threads share its sums otherwise than a tiny network's."""
    model = load_segmenter(DEMO, (2, 5))
    runtime = OpenVINORuntime(model, precision, [], threads=2, streams=2)
    last = model.stages[-1]
    with torch.inference_mode():
        for length in (33, *range(97, 1025, 160), 1025):
            batch = WindowBatch(PackedTokens(torch.randn(length, model.config.d_model), (length,)))
            expected, *found = (place.run(last, batch) for place in (runtime, *runtime.streams))
            assert isinstance(expected, Decoded)
            for decoded in found:
                assert isinstance(decoded, Decoded)
                assert torch.equal(decoded.logits, expected.logits)
        window = torch.randn(1, 3, 512, 512)
        first, *others = (place.run(model.stages[0], window) for place in (runtime, *runtime.streams))
        assert isinstance(first, WindowBatch)
        for other in others:
            assert isinstance(other, WindowBatch)
            assert torch.equal(other.tokens.values, first.tokens.values)


def test_streams_that_round_otherwise_are_given_up(
    tiny_model: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(schedule=(1, 2))
    runtime = OpenVINORuntime(model, "fp32", [model.merger], threads=2, streams=2)
    runtime.warm_up([model.merger])
    assert [stream.streams for stream in runtime.streams] == [(), ()]
    run = OpenVINORuntime.run

    def rounding(self: OpenVINORuntime, stage: Stage, given: Any) -> Any:
        done = run(self, stage, given)
        if isinstance(done, Decoded) and self._place:
            done.logits[0, 0, 0] += 1e-6
        return done

    monkeypatch.setattr(OpenVINORuntime, "run", rounding)
    runtime.warm_up([model.merger])
    assert runtime.streams == []
    assert "streams: not used" in caplog.text


def test_streams_divide_threads_and_only_openvino_has_them(tiny_model: Make) -> None:
    model = tiny_model(schedule=(1, 2))
    assert not OpenVINORuntime(model, "fp32", []).streams, "the library computes one window at a time"
    for threads, streams, number in ((2, "auto", 2), (3, 2, 2), (1, "auto", 0), (2, 1, 0)):
        assert len(OpenVINORuntime(model, "fp32", [], threads=threads, streams=streams).streams) == number
    with pytest.raises(ValueError, match=r"^streams: expected auto or at most 2, one a thread, got 3$"):
        OpenVINORuntime(model, "fp32", [], threads=2, streams=3)
    assert not make_runtime(model, "torch", "fp32", streams="auto").streams
    with pytest.raises(ValueError, match=r"^streams: expected auto or 1 with runtime torch, which has none, got 2$"):
        make_runtime(model, "torch", "fp32", streams=2)


def test_openvino_takes_the_usable_cores_whatever_torch_has(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    compile_graph = openvino.compile_graph

    def noted(graph: ov.Model, precision: str, threads: int, **options: object) -> ov.CompiledModel:
        seen.append(threads)
        return compile_graph(graph, precision, threads, **options)

    monkeypatch.setattr(openvino, "compile_graph", noted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)  # as OMP_NUM_THREADS=7 has it
    make_runtime(tiny_model(), "openvino", "fp32")
    assert seen == [usable_cores()]


def test_torch_keeps_its_threads_and_merging_needs_one(tiny_model: Make) -> None:
    model = tiny_model(schedule=(1, 2))
    model.runtime = make_runtime(model, "openvino", "fp32")
    before, seen = torch.get_num_threads(), []
    model.runtime.launch(model.stages[0], windows(), before_merge=lambda: seen.append(torch.get_num_threads()))
    assert (seen, torch.get_num_threads()) == ([1], before)


def test_openvino_keeps_the_weights_it_was_built_with(tiny_model: Make) -> None:
    model = tiny_model(schedule=(1, 2))
    model.runtime = make_runtime(model, "openvino", "fp32")
    before = model.window_logits(windows())
    torch.nn.init.zeros_(model.encoder.norm.weight)
    assert torch.equal(model.window_logits(windows()), before)


@pytest.mark.parametrize("lengths", [(17, 40, 41, 255), (1, 2, 3)])
def test_every_length_runs_in_the_same_piece(tiny_model: Make, lengths: tuple[int, ...]) -> None:
    model = tiny_model(schedule=(1, 2))
    torch_runtime, compiled = TorchRuntime(model), make_runtime(model, "openvino", "fp32")
    middle = model.stages[1]
    with torch.inference_mode():
        batch = WindowBatch(PackedTokens(torch.randn(sum(lengths), 64), lengths))
        expected, found = torch_runtime.run(middle, batch), compiled.run(middle, batch)
    assert isinstance(expected, WindowBatch)
    assert isinstance(found, WindowBatch)
    torch.testing.assert_close(found.tokens.values, expected.tokens.values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (50, 70), (16, 16)])
def test_windows_of_any_size_run(tiny_model: Make, size: tuple[int, int]) -> None:
    model = tiny_model(schedule=(1, 2))
    window = torch.randn(2, 3, *size)
    expected = model.window_logits(window)
    model.runtime = make_runtime(model, "openvino", "fp32")
    torch.testing.assert_close(model.window_logits(window), expected, atol=1e-4, rtol=1e-4)


def test_a_block_with_layer_scale_is_computed(tiny_model: Make) -> None:
    model = tiny_model(schedule=(1, 2))
    plain = model.window_logits(windows())
    scaled = nn.Sequential(*(Block(64, 1, qkv_bias=True, init_values=0.5) for _ in range(3))).eval()
    scaled.load_state_dict(model.encoder.blocks.state_dict(), strict=False)
    model.encoder.blocks = scaled
    model.runtime = TorchRuntime(model)
    expected = model.window_logits(windows())
    assert (expected - plain).abs().max() > 0.1
    walked = scaled(model.encoder.embed(windows()).values.unflatten(0, (3, -1)))  # as timm computes it
    batch = model.embed(windows())
    whole = Stage(0, range(6))
    torch.testing.assert_close(model.run_blocks(whole, batch).tokens.values, walked.flatten(0, 1))
    model.runtime = make_runtime(model, "openvino", "fp32")
    torch.testing.assert_close(model.window_logits(windows()), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("runtime", ["torch", "openvino"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qk_norm": True}, "encoder.blocks.1 has a norm of queries"),
        ({"scale_attn_norm": True}, "encoder.blocks.1 has a norm after attention"),
        ({"attn_layer": "diff"}, "encoder.blocks.1 has a DiffAttention"),
    ],
)
def test_a_block_that_would_be_computed_wrongly_is_refused(
    tiny_model: Make, runtime: str, options: dict[str, Any], message: str
) -> None:
    model = tiny_model(schedule=(1, 2))
    model.encoder.blocks[1] = Block(64, 2, qkv_bias=True, **options)
    with pytest.raises(ValueError, match=f"model: {message}.*; expected timm's plain Block"):
        make_runtime(model, runtime, "fp32")


def test_bf16_on_torch_comes_close(tiny_model: Make) -> None:
    """Logits are standardised over the classes, so a deviation of 0.2 is a tenth of their spread."""
    model = tiny_model()
    expected = model.window_logits(windows())
    model.runtime = make_runtime(model, "torch", "bf16")
    logits = model.window_logits(windows())
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().mean() < 0.2
    assert not torch.equal(logits, expected)


def test_bf16_tokens_merge_by_float32_similarity(tiny_model: Make) -> None:
    model = tiny_model(schedule=(1, 2))
    model.runtime = make_runtime(model, "torch", "bf16")
    assert model.window_logits(windows()).isfinite().all()


def test_auto_takes_openvino_on_a_cpu(tiny_model: Make) -> None:
    native = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    chosen = make_runtime(tiny_model(schedule=(1, 2)))
    assert isinstance(chosen, OpenVINORuntime)
    assert (chosen.name, chosen.precision) == ("openvino", "bf16" if native else "fp32")


def test_a_checkpoint_runs_as_the_servers_run_it_where_nothing_else_is_said() -> None:
    native = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    served = load_segmenter(DEMO, (2, 5), runtime="auto").runtime
    assert (served.name, served.precision) == ("openvino", "bf16" if native else "fp32")
    for runtime, name in (("torch", "torch"), ("auto", "openvino")):
        loaded = load_segmenter(DEMO, (2, 5), runtime=runtime, precision="fp32").runtime
        assert (loaded.name, loaded.precision) == (name, "fp32")
    assert load_segmenter(DEMO, (2, 5)).runtime.precision == "fp32"


def test_what_is_unknown_or_cannot_run_is_refused(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="runtime: expected one of auto, openvino, torch, got 'tpu'"):
        make_runtime(tiny_model(schedule=(1, 2)), "tpu")
    with pytest.raises(ValueError, match="precision: expected one of auto, fp32, bf16, fp16, got 'fp64'"):
        make_runtime(tiny_model(schedule=(1, 2)), "torch", "fp64")
    monkeypatch.setattr(ov.Core, "get_property", lambda *_: ["FP32"])
    with pytest.raises(ValueError, match="no native bf16"):
        make_runtime(tiny_model(schedule=(1, 2)), "openvino", "bf16")
    assert make_runtime(tiny_model(schedule=(1, 2)), "openvino").precision == "fp32"
