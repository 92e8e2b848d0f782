"""Coverage-guided fuzzing, for FUZZ_SECONDS (20) a target; what it found is in `test_decode` and beside it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_decode import KINDS

pytest.importorskip("atheris", reason="pip install atheris")

SECONDS = int(os.environ.get("FUZZ_SECONDS", "20"))
SEEDS = {
    "frames": [
        b"\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (1, 2, 3), }".ljust(124) + b"\n123456"
    ],
    "options": [b"image/png;q=0.5, */*\noverlay\n2,5\ntome:r=46\nbulk\nmine"],
    "documents": [
        b'{"instances": [{"b64": "aGFsbG8="}]}',
        b'{"inputs": [{"name": "IMAGE", "shape": [1, 1], "a": "\\""}]}',
    ],
    "variant": [
        b"net_kwargs: {image_size: [512, 512], patch_size: 16, d_model: 192, n_heads: 3, n_layers: 12, n_cls: 11,\n"
        b"  normalization: vit, decoder: {name: mask_transformer, n_layers: 2}}\n"
        b"inference_kwargs: {im_size: 512, window_size: 512, window_stride: !!python/tuple [512, 512]}\n"
        b"dataset_kwargs: {dataset: ade20k, crop_size: 512, normalization: vit}\n"
    ],
}


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", ["decoder", *SEEDS])
def test_only_errors_for_clients_come_out(target: str, tmp_path: Path) -> None:
    seeds = tmp_path / "seeds"
    seeds.mkdir()
    for i, data in enumerate(SEEDS.get(target) or [make() for make, _, _ in KINDS.values()]):
        (seeds / str(i)).write_bytes(data)
    command = [sys.executable, str(Path(__file__).with_name("fuzzing.py")), target, str(seeds), "-verbosity=0"]
    command += [f"-max_total_time={SECONDS}", "-timeout=20", "-rss_limit_mb=4096", "-max_len=20000"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    found = [path.read_bytes()[:2000] for path in tmp_path.glob("*-*") if path.is_file()]
    assert ended.returncode == 0, f"{ended.stderr[-3000:]}\n{found}"
