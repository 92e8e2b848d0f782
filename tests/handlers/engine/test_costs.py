from collections.abc import Callable

import pytest

from handlers.engine import clock, costs
from mpm_ops import Segmenter
from mpm_ops.stages import Stage, WindowBatch


def test_a_busy_moment_does_not_mislead(tiny_model: Callable[..., Segmenter], monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of its own, every shape takes what a known cost says, and a stretch of runs ten times that."""
    model = tiny_model()
    now = 0.0
    runs: list[tuple[int, int]] = []

    def run_blocks(stage: Stage, batch: WindowBatch) -> WindowBatch:
        nonlocal now
        count, length = len(batch.tokens.lengths), batch.tokens.lengths[0]
        runs.append((count, length))
        busy = 10 if 8 <= len(runs) < 16 else 1  # two runs of each shape, as they take turns
        now += busy * (1.0 + 0.01 * count * length + 0.0001 * count * length**2)
        return batch

    monkeypatch.setattr(model, "run_blocks", run_blocks)
    monkeypatch.setattr(clock, "monotonic", lambda: now)
    cost = costs.measure_cost(model, longest=65, max_group_windows=8)
    assert (cost.launch, cost.token, cost.pair) == pytest.approx((1.0, 0.01, 0.0001))
    assert set(runs) == {(1, 32), (1, 65), (8, 32), (8, 65)}
    assert len(set(runs[:4])) == 4, "shapes take turns"


def test_a_real_block_has_a_cost(tiny_model: Callable[..., Segmenter]) -> None:
    cost = costs.measure_cost(tiny_model(), longest=17, max_group_windows=4)
    assert cost(4, 17) > 0
