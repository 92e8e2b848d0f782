"""The page, from figures that are known."""

import json
import math
import re
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

import loadtest.report.__main__
from loadtest.client.masks import OK
from loadtest.client.records import Pulse, Record
from loadtest.client.shapes import steady
from loadtest.report.charts import Chart, Line, draw, nice_ticks, time_ticks
from loadtest.report.page import render, told
from loadtest.report.summary import Limits, summarize
from loadtest.running import RunResult
from loadtest.settings import LoadSettings
from loadtest.slo import Slo
from loadtest.watching.scraping import Key, Sample

NUM_REQUESTS = 200


def key(name: str, **labels: str) -> Key:
    return name, tuple(sorted(labels.items()))


def sample(second: int) -> Sample:
    """A server that in each second takes 1000 tokens, merges a quarter of them and then a fifth, and pads 50."""
    lane = {"schedule": "2,5"}
    return Sample(
        1000.0 + second,
        {
            key("mpm_model_info", schedule="2,5", device="cpu"): 1,
            key("mpm_tokens_total", point="in", stage="0", **lane): 1000 * second,
            key("mpm_tokens_total", point="out", stage="0", **lane): 750 * second,
            key("mpm_tokens_total", point="in", stage="1", **lane): 750 * second,
            key("mpm_tokens_total", point="out", stage="1", **lane): 600 * second,
            key("mpm_tokens_total", point="in", stage="2", **lane): 600 * second,
            key("mpm_tokens_total", point="out", stage="2", **lane): 600 * second,
            key("mpm_tokens_total", point="in", stage="0", schedule="off"): 9 * second,  # sampled, not served
            key("mpm_padding_tokens_total"): 50 * second,
            key("mpm_waiting_tokens"): 10 * (second % 3),
            key("process_resident_memory_bytes"): 1e9 * (1 + second / 100),
        },
    )


def answered_records() -> list[Record]:
    return [
        Record(i, i / 10, 0.001, (i + 1) / 1000, OK, "png", "<a&b>.jpg", 1000, 600, 1.0) for i in range(NUM_REQUESTS)
    ]


def result(**more: Any) -> RunResult:
    fields: dict[str, Any] = {
        "began_at": 1000.0,
        "gave_up": False,
        "workers_finished": 1,
        "records": answered_records(),
        "pulses": [Pulse(float(i), 0, 0.002, 0.1, 3) for i in range(20)],
        "samples": [sample(second) for second in range(20)],
        "num_missed": 0,
    }
    return RunResult(**{**fields, **more})


def summary(slo: str = "p99=1s", **more: Any) -> dict[str, Any]:
    settings = LoadSettings(urls=("http://127.0.0.1:1",), pictures="somewhere", phases=steady(10, 20), process="even")
    return summarize(settings, result(**more), Limits(slo=Slo.parse(slo), max_growth=0.05))


def test_figures() -> None:
    found = summary()
    assert found["latency_ms"]["p50"] == 100
    assert found["latency_ms"]["p99"] == 198
    assert found["latency_ms"]["max"] == 200
    assert found["offered_per_second"] == 10
    stages = found["server"]["stages"]
    assert [stages[n]["merged_share"] for n in "012"] == pytest.approx([0.25, 0.2, 0])
    assert found["server"]["padding_share"] == pytest.approx(50 / (50 + 1000 + 750 + 600 + 9 * 0), rel=0.01)
    assert found["valid"]
    json.dumps(found, allow_nan=False)


def test_memory_that_grows_breaks_a_promise() -> None:
    found = summary()
    growth = next(check for check in found["checks"] if check["name"] == "memory growth")
    assert growth["value"] == pytest.approx((1 + 0.17) / (1 + 0.07) - 1, abs=0.01)
    assert not growth["kept"]
    assert not found["held"]


def test_failures_are_slower_than_any_answer() -> None:
    records = [Record(i, i / 10, 0, 0.01, OK if i else "status 503", "png", "a") for i in range(50)]
    found = summary("p99=1s", records=records)
    check = found["checks"][0]
    assert (check["value"], check["kept"]) == (None, False)
    assert found["outcomes"] == {OK: 49, "status 503": 1}
    assert "never" in told(found)


@pytest.mark.parametrize(
    ("more", "doubt"),
    [
        ({"records": [Record(i, i / 10, 0.2, 0.3, OK, "png", "a") for i in range(20)]}, "requests left 200 ms late"),
        ({"pulses": [Pulse(float(i), 0, 0.001, 0.97, 3) for i in range(20)]}, "worker 0 used 97 % of its core"),
        ({"pulses": [Pulse(float(i), 0, 0.3, 0.1, 3) for i in range(20)]}, "noticed answers up to 300 ms late"),
        ({"workers_finished": 0}, "1 of 1 workers were lost"),
        ({"records": answered_records()[:-3]}, "of 3 of 200 requests nothing is known"),
        ({"records": []}, "nothing was sent"),
    ],
)
def test_a_client_that_can_not_keep_up_says_so(more: dict[str, Any], doubt: str) -> None:
    found = summary(**more)
    assert not found["valid"]
    assert doubt in " ".join(found["doubts"])
    assert "not valid" in render(found)


def test_the_page_stands_alone() -> None:
    page = render(summary())
    assert page.count("<svg") == 10
    assert "<!--" not in page
    assert "&lt;a&amp;b&gt;.jpg" in page
    assert "<a&b>" not in page
    assert not re.findall(r"https?://(?!127\.0\.0\.1)", page)
    assert "nan" not in re.findall(r'd="([^"]*)"', page)


def test_a_page_of_an_older_run() -> None:
    found = summary()
    for name in ("library", "memory", "replicas"):
        del found[name]
    del found["series"]["memory"]
    assert render(found).count("<svg") == 10
    assert "not watched" in told(found)


def test_a_page_from_the_end_of_a_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["report", "-", "--out", str(tmp_path / "page.html")])
    monkeypatch.setattr(sys, "stdin", StringIO(f"some words\n{json.dumps(summary())}\n"))
    assert loadtest.report.__main__.main() == 0
    assert "<svg" in (tmp_path / "page.html").read_text()
    monkeypatch.setattr(sys, "stdin", StringIO("some words\n"))
    assert loadtest.report.__main__.main() == 1
    assert "expected the JSON of a run" in capsys.readouterr().err


def test_ticks() -> None:
    assert nice_ticks(9.5) == [0, 5, 10]
    assert nice_ticks(0.07) == pytest.approx([0, 0.02, 0.04, 0.06, 0.08])
    assert [name for _, name in time_ticks(30)] == ["0 s", "5 s", "10 s", "15 s", "20 s", "25 s", "30 s"]
    assert time_ticks(1800)[-1] == (1800, "30:00")


def test_gaps_and_nothing() -> None:
    gap = Line(name="a", points=[(0, 1.0), (1, None), (2, 3.0)], color=0)
    drawn = draw(Chart(title="t", unit="u", lines=[gap], x_max=2))
    (path,) = re.findall(r'class="line" d="([^"]*)"', drawn)
    assert path.count("M") == 2
    assert draw(Chart(title="t", unit="u", lines=[Line(name="a", points=[(0, None)], color=0)], x_max=2)) == ""
    assert math.isfinite(float(path.split()[-1]))
