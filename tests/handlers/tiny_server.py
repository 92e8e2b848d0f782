"""A small model behind a real TorchServe and a real Triton, each started once."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from handlers.launch.processes import free_port
from handlers.launch.torchserve import TorchServe
from handlers.launch.triton import Triton
from model_store.torchserve import build_archive
from model_store.triton import build_model
from mpm_ops import InferenceConfig, Segmenter, SegmenterConfig, load_segmenter
from mpm_ops.classes import Classes, load_classes

DEMO = Path(__file__).resolve().parents[2] / "model_store" / "demo" / "checkpoint.pth"
SCHEDULE = (0, 1)
MERGER = "mpm:0,1,2,keep=0.75,weighted,proportional"  # requests to `tiny` may ask for it
SERVING = {"schedule": list(SCHEDULE), "precision": "fp32"}  # the same on every chip
NETWORK = SegmenterConfig(
    image_size=(128, 128), patch_size=16, d_model=192, n_heads=3, n_layers=3, n_cls=11, decoder_layers=1
)
INFERENCE = InferenceConfig(im_size=128, max_ratio=4, window_size=128, window_stride=96, normalization="vit")
VARIANT = """\
net_kwargs:
  {image_size: [128, 128], patch_size: 16, d_model: 192, n_heads: 3, n_layers: 3, n_cls: 11, normalization: vit,
   decoder: {name: mask_transformer, n_layers: 1}}
inference_kwargs: {im_size: 128, window_size: 128, window_stride: 96}
"""


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An official-format checkpoint of random weights, its classes beside it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "variant.yml").write_text(VARIANT)
    rows = [f"{i},thing {i},{20 * i},{255 - 20 * i},{i}" for i in range(11)]
    (folder / "classes.csv").write_text("index,name,red,green,blue\n" + "\n".join(rows) + "\n")
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: value + 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in Segmenter(NETWORK, INFERENCE).state_dict().items()
    }
    torch.save({"model": weights}, folder / "checkpoint.pth")
    return folder / "checkpoint.pth"


@pytest.fixture(scope="session")
def merger() -> str:
    return MERGER


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> Segmenter:
    """As `tiny` is served."""
    return load_segmenter(checkpoint, SCHEDULE, runtime="auto", precision="fp32")


@pytest.fixture(scope="session")
def classes(checkpoint: Path) -> Classes:
    return load_classes(checkpoint.parent, 11)


@pytest.fixture(scope="session")
def photo() -> Callable[..., np.ndarray]:
    """Paints uint8 RGB pictures of flat areas and fine detail, each seed another."""
    return _photo


@pytest.fixture(scope="session")
def demo_checkpoint() -> Path:
    """Served without any configuration: in bf16 where the chip has it."""
    if not DEMO.is_file():
        pytest.skip("no demo checkpoint")
    return DEMO


@pytest.fixture(scope="session")
def demo_model(demo_checkpoint: Path) -> Segmenter:
    """As `demo` is served."""
    return load_segmenter(demo_checkpoint, (2, 5), runtime="auto")


@pytest.fixture(scope="session")
def max_image_bytes() -> int:
    """The limit of the model `tiny`."""
    return 24 * 2**20


@pytest.fixture(scope="session")
def metrics_port() -> int:
    """Of the model `tiny`."""
    return free_port()


@pytest.fixture(scope="session")
def store(checkpoint: Path, max_image_bytes: int, metrics_port: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store with `tiny`, its twin that takes a single picture at a time, and `demo` where there is one."""
    out = tmp_path_factory.mktemp("store")
    serving = SERVING | {"max_image_bytes": max_image_bytes, "allowed_mergers": [MERGER]}
    watched = {"metrics_port": metrics_port, "agreement_fraction": 0.2, "agreement_min_fraction": 0.1}
    build_archive(checkpoint, name="tiny", out=out, serving=serving | watched)
    build_archive(checkpoint, name="tiny_busy", out=out, serving=serving | {"max_inflight_tokens": 65})
    if DEMO.is_file():
        build_archive(DEMO, name="demo", out=out, serving={})
    return out


@pytest.fixture(scope="session")
def server(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    """A running TorchServe of its own; its output goes to `server.log`."""
    with TorchServe(store, log=tmp_path_factory.mktemp("torchserve") / "torchserve.log") as running:
        running.wait_ready()
        java = psutil.Process(running.pid)
        processes = [java, *java.children(recursive=True)]
        yield running
    assert not [process for process in processes if process.is_running()]


@pytest.fixture(scope="session")
def triton_metrics_port() -> int:
    """Of the model `tiny` behind Triton."""
    return free_port()


@pytest.fixture(scope="session")
def repository(checkpoint: Path, triton_metrics_port: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with `tiny`, `narrow` that takes one picture at a time, and `demo`."""
    out = tmp_path_factory.mktemp("repository")
    own = {"max_image_bytes": 24 * 2**20, "metrics_port": triton_metrics_port, "allowed_mergers": [MERGER]}
    build_model(checkpoint, name="tiny", out=out, serving=SERVING | own)
    build_model(checkpoint, name="narrow", out=out, serving=SERVING, max_inflight=1, max_queue_size=2)
    if DEMO.is_file():
        build_model(DEMO, name="demo", out=out, serving={})
    return out


@pytest.fixture(scope="session")
def triton(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    """A running Triton of its own; its output goes to its log."""
    log = tmp_path_factory.mktemp("triton") / "triton.log"
    with Triton(repository, log=log, exit_seconds=10) as running:
        running.wait_ready()
        processes = [psutil.Process(running.pid), *psutil.Process(running.pid).children(recursive=True)]
        yield running
    assert not [process for process in processes if process.is_running()]
    assert log.read_text().count("stopped with 0 pictures in flight") == len(running.models)


def _photo(seed: int, height: int = 96, width: int = 128) -> np.ndarray:
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (-(-height // 32), -(-width // 32), 3)).repeat(32, axis=0).repeat(32, axis=1)
    detail = random.normal(0, 40, (height, width, 3)) * (random.random((height, width, 1)) > 0.7)
    return (coarse[:height, :width] + detail).clip(0, 255).astype(np.uint8)
