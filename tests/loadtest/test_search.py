"""The search finds what it should, known in advance."""

import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from loadtest.masks import Library, read_masks
from loadtest.search import (
    Bisection,
    Configuration,
    SearchSettings,
    Trial,
    _library_masks,
    bisect_interleaved,
    summarize_search,
)
from loadtest.slo import Slo


def trial(rate: float, held: bool) -> Trial:
    return Trial(rate, held, 10.0 * rate, 20.0 * rate)


@pytest.mark.parametrize("limit", [0.7, 3.3, 6.0, 9.9, 14.0])
def test_a_bisection_closes_in_on_the_limit(limit: float) -> None:
    bisection = Bisection(5.0, 10.0)  # for most limits a wrong guess
    for _ in range(16):
        rate = bisection.next_rate
        bisection.learn(trial(rate, rate <= limit))
    assert bisection.rate <= limit <= bisection.high
    assert bisection.rate == pytest.approx(limit, rel=0.05)


def test_what_never_holds_has_no_rate() -> None:
    bisection = Bisection(5.0, 10.0)
    for _ in range(5):
        bisection.learn(trial(bisection.next_rate, False))
    result = summarize_search([bisection], [bisection])
    assert (result["rate_per_second"], result["p99_ms"], result["ratio_to_first"]) == (0, None, None)


def test_noisy_limits_and_their_range() -> None:
    dice = random.Random(0)
    order: list[int] = []

    def try_rate(i: int, rate: float, repeat: int) -> Trial:
        order.append(i)
        return trial(rate, rate <= (4.0, 6.0)[i] * dice.uniform(0.95, 1.05))

    slow, fast = bisect_interleaved([(2.0, 5.0), (3.0, 7.5)], try_rate, repeats=5, trials=7)
    assert {order.count(i) for i in (0, 1)} == {35}
    assert all(set(order[i : i + 2]) == {0, 1} for i in range(0, len(order), 2))  # in turns
    first, second = summarize_search(slow, slow), summarize_search(fast, slow)
    for result, limit in ((first, 4.0), (second, 6.0)):
        assert result["low"] <= result["rate_per_second"] <= result["high"]
        assert result["rate_per_second"] == pytest.approx(limit, rel=0.08)
        assert len(result["repeats"]) == 5
        assert result["p99_ms"] == pytest.approx(20 * result["rate_per_second"], rel=1e-3)
    assert first["ratio_to_first"] == {"median": 1, "low": 1, "high": 1}
    assert second["ratio_to_first"]["median"] == pytest.approx(1.5, rel=0.1)


def test_configurations() -> None:
    parsed = Configuration.parse("protocol=triton schedule=off align=8 replicas=2 runtime=torch max_group_windows=16")
    assert asdict(parsed) == {
        "protocol": "triton",
        "schedule": "off",
        "align": 8,
        "replicas": 2,
        "serving": {"runtime": "torch", "max_group_windows": 16},
    }
    assert parsed.name == "triton, no merging, align 8, 2 replicas, runtime torch, max_group_windows 16"
    with pytest.raises(ValueError, match="expected NAME=VALUE, got 'fast'"):
        Configuration.parse("fast")
    with pytest.raises(ValueError, match="replicas: expected an integer >= 1, got 'many'"):
        Configuration.parse("replicas=many")


def test_configurations_that_compute_the_same_share_the_library_s_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Library] = []

    def masks(library: Library, pictures: Sequence[Path]) -> dict[str, bytes]:
        made.append(library)
        assert pictures == [tmp_path / "a.jpg", tmp_path / "b.jpg"]
        return {"a.jpg": str(len(made)).encode()}

    monkeypatch.setattr(Library, "masks", masks)
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).touch()
    texts = ["schedule=off", "protocol=triton schedule=off runtime=torch", "align=8", 'inference={"im_size":256}']
    settings = SearchSettings(slo=Slo.parse("p99=1s"), pictures=tmp_path)
    configurations = [Configuration.parse(text) for text in texts]
    found = _library_masks(configurations, Path("a.pth"), settings, tmp_path)
    assert [read_masks(folder)["a.jpg"] for folder in found if folder] == [b"1", b"1", b"2", b"3"]
    assert [(library.schedule, library.align, library.inference) for library in made] == [
        ("off", 1, {}),
        ("2,5", 8, {}),
        ("2,5", 1, {"im_size": 256}),
    ]
    unwatched = replace(settings, library_sample=0)
    assert _library_masks(configurations, Path("a.pth"), unwatched, tmp_path) == [None] * 4


def test_a_trial_is_long_enough_for_its_quantile(tmp_path: object) -> None:
    settings = SearchSettings(slo=Slo.parse("p99=1s"), pictures=tmp_path)  # type: ignore[arg-type]
    assert [settings.trial_seconds(rate) for rate in (1000, 4, 0.1)] == [10, 25, 60]
