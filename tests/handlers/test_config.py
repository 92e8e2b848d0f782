"""What an operator may configure."""

import math
from typing import Any

import pytest
import yaml

from handlers import cli, config, folder
from handlers.api.formats import FORMATS, MASKS
from handlers.bench.__main__ import DESCRIPTION, PROGRAM, QUESTIONS
from handlers.config import ServingConfig
from mpm_ops import runtime
from mpm_ops.bench import parsers
from mpm_ops.models import files

COUNTS = ["align", "max_image_bytes", "max_image_pixels", "max_group_windows", "codec_threads"]


def test_defaults() -> None:
    assert ServingConfig.from_mapping({}) == ServingConfig()
    assert ServingConfig().schedule == (2, 5)


def test_from_yaml() -> None:
    config = ServingConfig.from_mapping(
        yaml.safe_load("schedule: [1, 3]\nalign: 8\ninference: {window_stride: 256}\nmax_group_windows: 4\n")
    )
    assert config.schedule == (1, 3)
    assert config.align == 8
    assert config.inference == {"window_stride": 256}
    assert config.max_group_windows == 4


def test_no_merging() -> None:
    assert ServingConfig.from_mapping({"schedule": []}).schedule == ()


@pytest.mark.parametrize("keys", [["windos"], ["zz", "aa"], ["Schedule"], [1], [None], [1, "x"]])
def test_unknown_fields_are_named(keys: list[Any]) -> None:
    with pytest.raises(ValueError, match="unknown fields") as caught:
        ServingConfig.from_mapping({"align": 1} | dict.fromkeys(keys, 1))
    assert all(str(key) in str(caught.value) for key in keys)
    assert "max_group_windows" in str(caught.value)


@pytest.mark.parametrize("values", [None, [], "schedule", 3])
def test_no_mapping(values: Any) -> None:
    with pytest.raises(ValueError, match="expected a mapping"):
        ServingConfig.from_mapping(values)


@pytest.mark.parametrize("value", ["8", 0, -1, 1.0, math.nan, None, True, [8], {}])
@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_positive_integers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected an integer >= 1"):
        ServingConfig.from_mapping({name: value})


@pytest.mark.parametrize("value", ["2", -1, 0.5, None, False])
def test_torch_threads(value: Any) -> None:
    assert ServingConfig.from_mapping({"torch_threads": 0}).torch_threads == 0
    with pytest.raises(ValueError, match="torch_threads: expected an integer >= 0"):
        ServingConfig.from_mapping({"torch_threads": value})


@pytest.mark.parametrize("value", ["2", 0, -1, 0.5, None, True])
def test_streams(value: Any) -> None:
    assert [ServingConfig.from_mapping({"streams": given}).streams for given in ("auto", 1, 16)] == ["auto", 1, 16]
    with pytest.raises(ValueError, match="streams: expected auto or an integer >= 1"):
        ServingConfig.from_mapping({"streams": value})


@pytest.mark.parametrize("value", ["auto", "cpu", "cuda", "cuda:1"])
def test_devices(value: str) -> None:
    assert ServingConfig.from_mapping({"device": value}).device == value


@pytest.mark.parametrize("value", ["gpu", "cuda:", "cuda:one", "cpu:0x", "", None, 0])
def test_no_devices(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^device: expected auto, cpu, cuda or one such as cuda:1, got"):
        ServingConfig.from_mapping({"device": value})


def test_graphs_leave_shapes_and_bits_open() -> None:
    assert ServingConfig.from_mapping({"graph_mib": 512}).graph_mib == 512
    with pytest.raises(ValueError, match=r"^graph_mib: expected 0 with deterministic, got 512$"):
        ServingConfig.from_mapping({"graph_mib": 512, "deterministic": True})
    with pytest.raises(ValueError, match=r"^graph_mib: expected auto or an integer >= 0, got 1.5$"):
        ServingConfig.from_mapping({"graph_mib": 1.5})


def test_graphs_are_captured_on_a_gpu_unless_told_otherwise() -> None:
    config = ServingConfig()
    assert (config.graph_bytes("cuda"), config.graph_bytes("cpu")) == (4 * 2**30, 0)
    assert ServingConfig(graph_mib=0).graph_bytes("cuda") == 0
    assert ServingConfig(graph_mib=3).graph_bytes("cuda") == 3 * 2**20
    assert ServingConfig(deterministic=True).graph_bytes("cuda") == 0


@pytest.mark.parametrize("value", ["2,5", 2, None, {2: 5}, {2, 5}, ["2", "5"], [2, None], [2.0], [-1], [[2]], [True]])
def test_schedule(value: Any) -> None:
    with pytest.raises(ValueError, match="schedule: expected"):
        ServingConfig.from_mapping({"schedule": value})


def test_merger_in_place_of_a_schedule() -> None:
    assert ServingConfig().merging == {"schedule": (2, 5), "align": 1}
    config = ServingConfig.from_mapping({"merger": "tome:r=46", "allowed_mergers": ["mpm:1,2,keep=0.75", "none"]})
    assert config.merging == {"merger": "tome:r=46"}
    assert config.allowed_mergers == ("mpm:1,2,keep=0.75", "none")
    with pytest.raises(ValueError, match=r"^merger: expected without schedule and align, got 'none' beside them$"):
        ServingConfig.from_mapping({"merger": "none", "schedule": [2, 5], "align": 1})


@pytest.mark.parametrize("value", [None, 3, ["tome"], "tome:", "tome:r=4:5", "a b", ":2,5", "2,5"])
def test_mergers_are_text(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^merger: expected a name and its parameters such as tome:r=46, got "):
        ServingConfig.from_mapping({"merger": value})
    with pytest.raises(ValueError, match=r"^allowed_mergers: expected a name and its parameters"):
        ServingConfig.from_mapping({"allowed_mergers": [value]})
    with pytest.raises(ValueError, match=r"^allowed_mergers: expected a list of mergers, got 'tome'$"):
        ServingConfig.from_mapping({"allowed_mergers": "tome"})


@pytest.mark.parametrize("value", [None, "window_size", 512, [512]])
def test_inference_is_a_mapping(value: Any) -> None:
    with pytest.raises(ValueError, match="inference: expected a mapping"):
        ServingConfig.from_mapping({"inference": value})


@pytest.mark.parametrize("name", ["deterministic"])
@pytest.mark.parametrize("value", [1, "yes", None])
def test_switches_are_true_or_false(name: str, value: Any) -> None:
    assert getattr(ServingConfig.from_mapping({name: True}), name) is True
    with pytest.raises(ValueError, match=f"^{name}: expected true or false, got {value!r}$"):
        ServingConfig.from_mapping({name: value})


@pytest.mark.parametrize("name", ["padded", "jpeg_draft"])
def test_fields_that_are_gone_say_what_to_do(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"^{name}: no longer a field: .*; remove it and build the model again$"
    ) as caught:
        ServingConfig.from_mapping({name: False})
    assert "\n" not in str(caught.value)


def test_names_are_those_of_the_runtimes() -> None:
    assert set(config.RUNTIMES) == set(runtime.RUNTIMES)
    assert config.PRECISIONS == runtime.PRECISIONS


def test_what_the_command_repeats_to_be_light_is_in_the_tables() -> None:
    assert set(cli._FORMATS) == FORMATS.keys() - {"maps"}
    assert {name: FORMATS[name].media_types[0] for name in MASKS} == folder.MEDIA_TYPES
    assert cli._WEIGHTS == files._SUFFIXES
    assert set(cli.QUESTIONS) == parsers(PROGRAM, DESCRIPTION, QUESTIONS)[1].keys()
