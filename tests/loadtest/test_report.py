"""The page, from figures that are known."""

import json
import re
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from handlers.client import Key, Metrics
from loadtest.__main__ import main
from loadtest.arrivals import Phase
from loadtest.masks import OK
from loadtest.options import LoadSettings
from loadtest.page import render, told
from loadtest.run import Pulse, Record
from loadtest.server import MemorySample, MetricsSample
from loadtest.slo import Slo
from loadtest.summary import RunResult, memory_growth, summarize

NUM_REQUESTS = 200


def key(name: str, **labels: str) -> Key:
    return name, tuple(sorted(labels.items()))


def sample(second: int) -> MetricsSample:
    """A server that in each second takes 1000 tokens, merges a quarter of them and then a fifth, and pads 50."""
    lane = {"schedule": "2,5"}
    values = {
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
    }
    return MetricsSample(1000.0 + second, Metrics(values), {})


def answered_records() -> list[Record]:
    return [
        Record(i, i / 10, 0.001, (i + 1) / 1000, OK, "png", "<a&b>.jpg", 1000, 600, 1.0) for i in range(NUM_REQUESTS)
    ]


def summary(slo: str = "p99=1s", **more: Any) -> dict[str, Any]:
    settings = LoadSettings(
        protocol="torchserve",
        hosts=("http://127.0.0.1:1",),
        model="segmenter",
        pictures=Path("somewhere"),
        phases=(Phase(20, 10),),
        arrivals="even",
        seconds=20,
        slo=Slo.parse(slo),
        max_growth=0.05,
    )
    fields: dict[str, Any] = {
        "began_at": 1000.0,
        "seconds": 20,
        "records": answered_records(),
        "pulses": [Pulse(float(i), 0, 0.002, 0.1, 3) for i in range(20)],
        "samples": [sample(second) for second in range(20)],
    }
    return summarize(settings, RunResult(**(fields | more)))


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


def test_growth_that_is_not_known_is_not_kept() -> None:
    found = summary(memory=[MemorySample(1000.0 + second, 500.0) for second in range(3)])
    growth = next(check for check in found["checks"] if check["name"] == "memory growth, total")
    assert (growth["value"], growth["kept"]) == (None, False)


def test_failures_are_slower_than_any_answer() -> None:
    records = [Record(i, i / 10, 0.0, 0.01, OK if i else "status 503", "png", "a") for i in range(50)]
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


def charts_in(page: str) -> dict[str, Any]:
    (found,) = re.findall(r"^const charts = (.*);$", page, re.MULTILINE)
    return {chart["title"]: chart for chart in json.loads(found)}


def test_the_page_stands_alone() -> None:
    page = render(summary())
    charts = charts_in(page)
    assert len(charts) == page.count('class="plot"') == 10
    assert charts["Latency"]["bounds"] == [["p99 ≤ 1000 ms", 1000]]
    assert {line["name"] for line in charts["Merged"]["lines"]} == {"after stage 0", "after stage 1", "padding"}
    assert "{{" not in page.partition("uPlot=")[0]
    assert "&lt;a&amp;b&gt;.jpg" in page
    assert "<a&b>" not in page
    for outside in ("<link", " src=", "@import", "url(", "http-equiv", "fetch("):
        assert outside not in page
    links = set(re.findall(r"https?://[^\s\"'<]+", page))
    assert {link for link in links if "127.0.0.1" not in link} <= {"https://github.com/leeoniya/uPlot"}


def test_a_page_of_an_older_run() -> None:
    found = summary()
    for name in ("library", "memory", "replicas"):
        del found[name]
    del found["series"]["memory"]
    assert len(charts_in(render(found))) == 10
    assert "not watched" in told(found)


def test_a_page_from_the_end_of_a_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO(f"some words\n{json.dumps(summary())}\n"))
    assert main(["report", "-", "--out", str(tmp_path / "page.html")]) == 0
    assert charts_in((tmp_path / "page.html").read_text())
    monkeypatch.setattr(sys, "stdin", StringIO("some words\n"))
    assert main(["report", "-"]) == 2
    assert "expected the JSON of a run" in capsys.readouterr().err


def test_memory_growth_leaves_out_what_warms_up() -> None:
    assert memory_growth([100.0, 150.0, *[200.0] * 14]) == 0
    assert memory_growth([200.0 + 2 * i for i in range(16)]) == pytest.approx(227 / 211 - 1)
    assert memory_growth([200.0] * 7) is None  # too few to know
    assert memory_growth([0.0] * 16) is None
