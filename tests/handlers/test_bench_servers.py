import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from handlers.bench import __main__ as bench

pytest_plugins = ("tiny_server",)


@pytest.mark.slow
def test_all_servers_are_timed_under_the_same_load(
    checkpoint: Path, photo: Callable[..., np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out = tmp_path / "images", tmp_path / "servers.json"
    images.mkdir()
    for seed in range(2):
        Image.fromarray(photo(seed, 128, 200)).save(images / f"{seed}.jpg")
    options = [
        "--checkpoint",
        str(checkpoint),
        "--images",
        str(images),
        "--mergers",
        "none",
        "mpm:0,1",
        "--out",
        str(out),
    ]
    monkeypatch.setattr(
        "sys.argv", ["bench", "servers", *options, "--clients", "2", "--seconds", "1", "--rounds", "2"]
    )
    assert bench.main() == 0
    report = json.loads(out.read_text())
    assert [(row["way"], row["merger"], row["clients"]) for row in report["servers"]] == [
        (way, merger, 2) for way in ("torchserve", "triton", "triton grpc") for merger in ("none", "mpm:0,1")
    ]
    assert [row["rps_ratio"] for row in report["servers"][::2]] == [1, 1, 1], "compared with the first merger"
    assert all(row["requests"] > 2 and row["rps"] > 0 and row["ms_p99"] >= row["ms_p50"] for row in report["servers"])
    assert report["shapes"]["pictures"] == [[128, 200, 3]] * 2
