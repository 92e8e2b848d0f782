"""A Triton whose /dev/shm is full: answers and pictures that find no room there leave nobody hanging."""

import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from asking_triton import infer_raw

from handlers.api.formats.npy import encode_npy
from handlers.api.formats.views import encode_picture
from handlers.launch.triton import Triton
from model_store.triton import build_model

pytest_plugins = ("tiny_server",)

SMALL = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=65m tmpfs /dev/shm && exec "$@"', "-"]


@pytest.mark.slow
def test_what_finds_no_room_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    if subprocess.run([*SMALL, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    build_model(checkpoint, name="tiny", out=tmp_path, serving={"schedule": [0, 1], "precision": "fp32"})
    command = [*SMALL, sys.executable, __file__, str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def main(store: Path) -> None:
    large = encode_picture(np.zeros((6000, 6000, 3), np.uint8), "image/jpeg")
    frame = encode_npy(np.zeros((3000, 3000, 3), np.uint8))
    with Triton(store, log=store / "log", exit_seconds=10) as server, ThreadPoolExecutor(10) as clients:
        server.wait_ready()
        for picture in (large, frame):  # 36 MB of labels, and 27 MB of pixels
            answers = [clients.submit(infer_raw, server.url, "tiny", picture, X_MPM_Outputs="MASK") for _ in range(10)]
            seen = Counter(answer.result().status for answer in answers)
            assert set(seen) == {200, 500}, seen
            assert infer_raw(server.url, "tiny", large, X_MPM_Outputs="MASK_PNG").status == 200
        two = infer_raw(server.url, "tiny", encode_picture(np.zeros((8000, 8000, 3), np.uint8), "image/jpeg"))
        assert two.status == 503
        assert "bytes that /dev/shm has for it" in two.error
    assert "Traceback" not in (store / "log").read_text()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
