"""Official checkpoints: read whole and as stored, or refused with the reason, and never run."""

import argparse
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from golden.cases import Case, write_checkpoint
from safetensors.torch import save_file
from torch import Tensor

from mpm_ops import CheckpointError, InferenceConfig, load_segmenter
from mpm_ops.models import read_variant

TINY = Case(d_model=64, n_layers=1, n_cls=3, image_size=(32, 32), decoder_layers=1)
CLASSIFIERS = ("encoder.head.", "encoder.head_dist.")

# Official variants with fewer layers and a smaller picture, and what `image_size` then holds.
VARIANTS = {
    "Ti/16": Case(n_layers=3, n_cls=150),
    "S/16": Case(d_model=384, n_layers=1, n_cls=150),
    "B/16": Case(d_model=768, n_layers=1, n_cls=60, decoder_layers=1, dataset="pascal_context"),
    "B/8 linear": Case(d_model=768, n_layers=1, n_cls=150, patch_size=8, decoder="linear"),
    "L/16 Cityscapes": Case(
        d_model=1024, n_layers=1, n_cls=19, decoder_layers=1, distilled=None, dataset="cityscapes"
    ),
    "DeiT B/16 linear": Case(
        d_model=768, n_layers=1, n_cls=150, decoder="linear", distilled=True, normalization="deit"
    ),
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(TINY, tmp_path)


@pytest.fixture
def rewrite(checkpoint: Path) -> Callable[[Callable[[dict[str, Any]], object]], None]:
    """Changes the stored weights."""

    def change(edit: Callable[[dict[str, Any]], object]) -> None:
        data = torch.load(checkpoint, weights_only=True)
        edit(data["model"])
        torch.save(data, checkpoint)

    return change


@pytest.fixture
def revise(checkpoint: Path) -> Callable[[str, object], None]:
    """Changes one entry of variant.yml, named by its dotted path; ... removes it."""

    def change(where: str, value: object) -> None:
        path = checkpoint.parent / "variant.yml"
        variant = read_variant(path)
        *parents, last = where.split(".")
        entry = variant
        for parent in parents:
            entry = entry[parent]
        entry[last] = value
        if value is ...:
            del entry[last]
        path.write_text(yaml.dump(variant))

    return change


@pytest.fixture
def stored(name: str, tmp_path: Path) -> Iterator[Path]:
    path = write_checkpoint(VARIANTS[name], tmp_path)
    yield path
    path.unlink()  # up to 100 MB, and pytest keeps the folders of three runs


@pytest.mark.parametrize("name", VARIANTS)
def test_official_variants_load_as_stored(name: str, stored: Path) -> None:
    case = VARIANTS[name]
    model = load_segmenter(stored, schedule=(0,), align=8)
    weights: dict[str, Tensor] = torch.load(stored, weights_only=True)["model"]
    expected = {key: value for key, value in weights.items() if not key.startswith(CLASSIFIERS)}
    loaded = model.state_dict()
    assert set(loaded) == set(expected)
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)
    assert not model.training
    assert (model.schedule, model.align) == ((0,), 8)

    config = model.config
    assert (config.d_model, config.n_heads, config.n_cls) == (case.d_model, case.d_model // 64, case.n_cls)
    assert (config.patch_size, config.image_size) == (case.patch_size, case.image_size)
    assert (config.decoder, config.distilled) == (case.decoder, bool(case.distilled))
    if case.decoder == "mask_transformer":
        assert config.decoder_layers == case.decoder_layers
    max_ratio = {"ade20k": 4, "pascal_context": 8, "cityscapes": 2}[case.dataset]
    assert model.inference == InferenceConfig(
        im_size=64, max_ratio=max_ratio, window_size=64, window_stride=64, normalization=case.normalization
    )


def test_files_of_torch_before_1_6_load(checkpoint: Path) -> None:
    """Those of the first releases, which can't be mapped."""
    expected = load_segmenter(checkpoint).state_dict()
    torch.save(torch.load(checkpoint, weights_only=True), checkpoint, _use_new_zipfile_serialization=False)
    loaded = load_segmenter(checkpoint).state_dict()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


WRITERS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "DDP": lambda w: {"model": {f"module.{k}": v for k, v in w.items()}},
    "torch.compile": lambda w: {"model": {f"_orig_mod.{k}": v for k, v in w.items()}},
    "compiled parts in DDP": lambda w: {
        f"module.{k.replace('encoder.', 'encoder._orig_mod.')}": v for k, v in w.items()
    },
    "state_dict": lambda w: {"state_dict": w, "arguments": argparse.Namespace(lr=0.1), "path": Path("/data")},
    "Lightning": lambda w: {
        "state_dict": {f"model.{k}": v for k, v in w.items()} | {"criterion.weight": torch.ones(3)},
        "hyper_parameters": {"optimizer": torch.optim.SGD, "size": np.float64(3)},
    },
    "timm's EMA beside": lambda w: {"state_dict": w, "state_dict_ema": {k: v + 1 for k, v in w.items()}},
    "EMA alone": lambda w: {"model_ema": {"decay": 0.99, "module": w}},
}


@pytest.mark.parametrize("writer", WRITERS)
def test_loads_what_others_write_around_the_weights(writer: str, checkpoint: Path) -> None:
    expected = load_segmenter(checkpoint).state_dict()
    torch.save(WRITERS[writer](torch.load(checkpoint, weights_only=True)["model"]), checkpoint)
    loaded = load_segmenter(checkpoint.parent).state_dict()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint.pth"])
def test_loads_safetensors_under_any_name(name: str, checkpoint: Path) -> None:
    weights = torch.load(checkpoint, weights_only=True)["model"]
    checkpoint.unlink()
    save_file(weights, checkpoint.with_name(name))
    loaded = load_segmenter(checkpoint.parent).state_dict()
    assert all(torch.equal(loaded[key], weights[key]) for key in loaded)


class Network(torch.nn.Linear):
    pass


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"<!DOCTYPE html><html>Sign in</html>", "an HTML page, not a checkpoint: .*; open its address in a browser$"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "a Git LFS pointer .* `git lfs pull`"),
        (b"\x1f\x8b\x08\x00", "compressed by gzip: unpack it first$"),
        (
            Network(2, 2),
            r"holds a whole test_checkpoint\.Network object, whose code is never run: save the weights alone",
        ),
        ({"model": Network(2, 2)}, r"holds a whole test_checkpoint\.Network object"),
        ({"state_dict": {"a": torch.ones(2), "b": 3}}, "expected a state_dict, or one under .* got keys state_dict$"),
        ({"fc.weight": torch.ones(2)}, r"expected a checkpoint of Segmenter, got weights called fc\.weight$"),
        (
            {"blocks.0.attn.qkv.weight": torch.ones(2), "patch_embed.proj.weight": torch.ones(2)},
            "got a ViT of timm without a decoder: train one on it, or use patch_timm for its features$",
        ),
    ],
    ids=["HTML", "LFS", "gzip", "module", "module in a file", "no weight", "other", "timm"],
)
def test_names_the_cause_and_the_cure(content: object, told: str, checkpoint: Path) -> None:
    (checkpoint.parent / "variant.yml").unlink()
    if isinstance(content, bytes):
        checkpoint.write_bytes(content)
    else:
        torch.save(content, checkpoint)
    with pytest.raises(CheckpointError, match=told) as raised:
        load_segmenter(checkpoint)
    assert "weights_only" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_finds_the_weights_of_a_folder(checkpoint: Path) -> None:
    folder = checkpoint.parent
    assert load_segmenter(checkpoint.rename(folder / "epoch_7.pt")).config == load_segmenter(folder).config
    (folder / "last.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"one file of weights in this folder, found epoch_7\.pt, last\.ckpt$"):
        load_segmenter(folder)
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such checkpoint, nor a folder with one$"):
        load_segmenter(folder / "nowhere")
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: expected checkpoint\.pth in this folder, found no weights$"):
        load_segmenter(folder / "empty")


PEAK = """\
import re, sys
from pathlib import Path
from mpm_ops import load_segmenter
def peak():  # in KiB; getrusage's would be this test's own, whose process the child was before it became itself
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
load_segmenter(sys.argv[1])
print(1024 * (peak() - before))
"""


def test_what_training_left_beside_the_weights_takes_no_memory(checkpoint: Path) -> None:
    if not Path("/proc/self/status").is_file():
        pytest.skip("needs Linux, to know the most memory that a process held")
    data = torch.load(checkpoint, weights_only=True)
    data["optimizer"] = {"state": {0: {"exp_avg": torch.ones(2**26)}}, "param_groups": [{"lr": 1e-3}]}
    torch.save(data, checkpoint)
    assert checkpoint.stat().st_size > 2**28
    done = subprocess.run([sys.executable, "-c", PEAK, str(checkpoint)], capture_output=True, text=True)
    checkpoint.unlink()
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2**27, "half of what the optimizer's state takes"


def test_a_bare_state_dict_and_half_precision_weights_load_in_float32(checkpoint: Path) -> None:
    weights = {key: value.half() for key, value in torch.load(checkpoint, weights_only=True)["model"].items()}
    torch.save(weights, checkpoint)
    for key, value in load_segmenter(checkpoint).state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, weights[key].float())


def test_inference_can_be_overridden(checkpoint: Path) -> None:
    overrides = {"window_stride": 32, "max_windows_per_request": 7, "normalization": "deit"}
    inference = load_segmenter(checkpoint, inference=overrides).inference
    assert (inference.window_stride, inference.max_windows_per_request) == (32, 7)
    assert (inference.normalization, inference.window_size) == ("deit", 64)
    with pytest.raises(ValueError, match=r"^inference: unknown fields stride, tiles$"):
        load_segmenter(checkpoint, inference={"tiles": 2, "stride": 3})


def test_inference_settings_are_the_stored_ones(checkpoint: Path, revise: Callable[[str, object], None]) -> None:
    revise("inference_kwargs", {"im_size": 520, "window_size": 480, "window_stride": 320})
    inference = load_segmenter(checkpoint).inference
    assert (inference.im_size, inference.window_size, inference.window_stride) == (520, 480, 320)


def test_the_dataset_stands_in_for_missing_inference_settings(
    checkpoint: Path, revise: Callable[[str, object], None]
) -> None:
    revise("inference_kwargs", ...)
    revise("dataset_kwargs.image_size", 128)
    revise("dataset_kwargs.crop_size", 96)
    inference = load_segmenter(checkpoint).inference
    assert (inference.im_size, inference.window_size, inference.window_stride) == (128, 96, 96)


@pytest.mark.parametrize("name", ["checkpoint.pth", "variant.yml"])
def test_missing_files(name: str, checkpoint: Path) -> None:
    (checkpoint.parent / name).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(name)):
        load_segmenter(checkpoint)


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda model: model.pop("encoder.norm.bias"), r"missing encoder\.norm\.bias \[64\]"),
        (lambda model: model.update({"decoder.extra": torch.zeros(2)}), r"unexpected decoder\.extra \[2\]"),
        (
            lambda model: model.update({"encoder.pos_embed": torch.zeros(1, 10, 64)}),
            r"encoder\.pos_embed: expected shape \[1, 5, 64\], got \[1, 10, 64\]",
        ),
        (
            lambda model: model.update({"encoder.dist_token": torch.zeros(1, 1, 64)}),
            r"unexpected encoder\.dist_token \[1, 1, 64\]",
        ),
    ],
    ids=["missing", "unexpected", "shape", "distilled but not said so"],
)
def test_names_weights_that_do_not_fit(
    edit: Callable[[dict[str, Any]], object],
    problem: str,
    checkpoint: Path,
    rewrite: Callable[[Callable[[dict[str, Any]], object]], None],
) -> None:
    rewrite(edit)
    with pytest.raises(CheckpointError, match=f"does not fit the network of variant.yml: {problem}$"):
        load_segmenter(checkpoint)


def test_names_all_that_another_number_of_classes_breaks(
    checkpoint: Path, revise: Callable[[str, object], None]
) -> None:
    revise("net_kwargs.n_cls", 4)
    with pytest.raises(CheckpointError) as raised:
        load_segmenter(checkpoint)
    assert "decoder.cls_emb: expected shape [1, 4, 64], got [1, 3, 64]" in str(raised.value)
    assert "decoder.mask_norm.weight: expected shape [4], got [3]" in str(raised.value)


def test_shortens_a_long_list_of_problems(
    checkpoint: Path, rewrite: Callable[[Callable[[dict[str, Any]], object]], None]
) -> None:
    rewrite(lambda model: model.update({f"unknown.{i}": torch.zeros(1) for i in range(30)}))
    with pytest.raises(CheckpointError, match=r"unexpected unknown\.7 \[1\]; and 22 more$"):
        load_segmenter(checkpoint)


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
def test_refuses_truncated_weights(kept: float, checkpoint: Path) -> None:
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: int(kept * len(whole)) if kept < 1 else int(kept)])
    told = (
        "an empty file|not a torch checkpoint: (damaged or incomplete|expected what torch.save or safetensors wrote)"
    )
    with pytest.raises(CheckpointError, match=rf"checkpoint\.pth: ({told})"):
        load_segmenter(checkpoint)


@pytest.mark.parametrize(
    "content",
    [b"noise", b"\x80\x02}", b"..", b"(lp0\n0.0.", b"PK\x03\x04", pickle.dumps({"model": [1]}), bytes(range(256))],
    ids=repr,
)
def test_refuses_what_is_no_checkpoint(content: bytes, checkpoint: Path) -> None:
    checkpoint.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pth: ") as raised:
        load_segmenter(checkpoint)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [[1, 2], {"model": None}, {"model": {1: torch.zeros(1)}}, torch.zeros(3)], ids=str)
def test_refuses_what_is_no_state_dict(content: object, checkpoint: Path) -> None:
    torch.save(content, checkpoint)
    with pytest.raises(CheckpointError, match=r"expected a state_dict, or one under model, state_dict, .* got "):
        load_segmenter(checkpoint)


class Payload:
    """Makes a folder when unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("archive", [True, False], ids=["torch archive", "plain pickle"])
def test_never_runs_code_in_weights(archive: bool, checkpoint: Path) -> None:
    victim = checkpoint.parent / "victim"
    data = {"model": {"encoder.norm.bias": Payload(victim)}}
    if archive:
        torch.save(data, checkpoint)
    else:
        checkpoint.write_bytes(pickle.dumps(data))
    told = r"holds code \((posix|nt)\.mkdir\), which is never run: save" if archive else "expected what torch.save or"
    with pytest.raises(CheckpointError, match=rf"not a torch checkpoint: {told}"):
        load_segmenter(checkpoint)
    assert not victim.exists()

    pickle.loads(pickle.dumps(data))  # it would have worked
    assert victim.exists()


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir [{0}]", "!!python/object/new:os.mkdir [{0}]", "!!python/name:os.mkdir"]
)
def test_never_runs_code_in_variant(tag: str, checkpoint: Path) -> None:
    victim = checkpoint.parent / "victim"
    path = checkpoint.parent / "variant.yml"
    path.write_text(path.read_text() + f"extra: {tag.format(victim)}\n")
    with pytest.raises(CheckpointError, match=r"not a readable variant\.yml: could not determine a constructor"):
        load_segmenter(checkpoint)
    assert not victim.exists()


@pytest.mark.parametrize(
    "text",
    ["", "- a list", "net_kwargs: 3", "[", "a: *b", "\x00", "!!int x", "2024-99-99", "!!timestamp x", 500 * "["],
    ids=lambda text: text[:12],
)
def test_refuses_an_unreadable_variant(text: str, checkpoint: Path) -> None:
    (checkpoint.parent / "variant.yml").write_text(text)
    with pytest.raises(CheckpointError, match=r"variant\.yml: ") as raised:
        load_segmenter(checkpoint)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("net_kwargs.d_model", ..., "net_kwargs lacks d_model"),
        ("net_kwargs.decoder", "linear", r"net_kwargs\.decoder: expected a mapping with a name"),
        ("net_kwargs.decoder.name", "unet", "decoder: expected one of mask_transformer, linear, got 'unet'"),
        ("net_kwargs.decoder.n_layers", None, "decoder_layers: expected a positive integer, got None"),
        ("net_kwargs.n_layers", 1.5, r"n_layers: expected a positive integer, got 1\.5"),
        ("net_kwargs.n_heads", 2, "d_model: expected n_heads x 64 = 128, got 64"),
        ("net_kwargs.image_size", [], r"image_size: expected multiples of the patch size 16, got \(\)"),
        ("net_kwargs.drop_path_rate", "x", r"drop_path_rate: expected a number in \[0, 1\), got 'x'"),
        ("dataset_kwargs", [1], "dataset_kwargs, inference_kwargs: expected mappings"),
        ("inference_kwargs.window_size", None, "inference_kwargs and dataset_kwargs lack window_size"),
        ("inference_kwargs.im_size", "x", "im_size: expected a positive integer, got 'x'"),
        ("dataset_kwargs.normalization", ["vit"], "normalization: expected one of vit, deit, got "),
    ],
)
def test_names_what_is_wrong_in_variant(
    where: str, value: object, message: str, checkpoint: Path, revise: Callable[[str, object], None]
) -> None:
    revise(where, value)
    with pytest.raises(ValueError, match=message):
        load_segmenter(checkpoint)


def test_refuses_a_schedule_the_network_cannot_follow(checkpoint: Path) -> None:
    with pytest.raises(ValueError, match=r"^schedule: expected strictly increasing block numbers within 0\.\.0"):
        load_segmenter(checkpoint, schedule=(2, 5))
