"""What of the GPU's benchmark runs without one: its checks, and the work that it times."""

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install -e '.[kernels]'")

from mpm_ops import Segmenter
from mpm_ops.bench import __main__ as bench
from mpm_ops.bench import gpu as bench_gpu
from mpm_ops.packed import PackedTokens
from mpm_ops.stages import Stage, WindowBatch

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_explains_itself_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["bench", "gpu"])
    assert bench.main() == 1
    assert capsys.readouterr().err == "gpu: no CUDA device is visible to torch; run this on a machine with one\n"


def test_parity_holds() -> None:
    assert set(bench_gpu.check_parity("cpu").values()) == {1.0}


def test_no_figure_where_parity_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def unmerged(tokens: PackedTokens, *, num_special: int) -> tuple[PackedTokens, torch.Tensor]:
        return tokens, torch.cat([torch.arange(n) for n in tokens.lengths])

    monkeypatch.setattr(bench_gpu, "merge_windows_gpu", unmerged)
    with pytest.raises(RuntimeError, match=r"^parity: \d+ of \d+ tokens merge otherwise at N=1000 D=384 float32"):
        bench_gpu.check_parity("cpu")


@torch.inference_mode()
def test_the_work_it_times(tiny_model: Callable[..., Segmenter], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(schedule=(1, 2))
    monkeypatch.setattr(bench_gpu, "LENGTHS", (12, 9))
    monkeypatch.setattr(bench_gpu, "SPREAD", 1)
    windows = torch.randn(3, 3, 64, 64)
    seen: list[tuple[int, ...]] = []
    plain = model.runtime.run_blocks

    def spy(stage: Stage, batch: WindowBatch) -> WindowBatch:
        seen.append(batch.tokens.lengths)
        return plain(stage, batch)

    monkeypatch.setattr(model.runtime, "run_blocks", spy)
    for align in (1, 4, None):
        assert bench_gpu.run(model, model.runtime, windows, align).shape == (3, 16, 5)
    assert seen[0] == seen[3] == seen[6] == seen[7] == seen[8] == (17, 17, 17)
    assert all(10 <= length <= 17 for length in seen[1])
    assert {(length - 1) % 4 for length in seen[4] + seen[5]} == {0}


def test_plain_torch_finds_the_nearest() -> None:
    x = torch.tensor([[[1.0, 0.0], [0.8, 0.6], [0.6, 0.8]]])
    assert bench_gpu.plain_nearest(x).tolist() == [[1, 2, 1]]
