"""Names and colours of classes: from a file where there is one, made up where there is none."""

from pathlib import Path

import numpy as np
import pytest

import mpm_ops
from mpm_ops.classes import default_colors, load_classes

HEADER = "index,name,red,green,blue\n"


def test_reads_names_and_colours_in_order_of_their_index(tmp_path: Path) -> None:
    path = tmp_path / "classes.csv"
    path.write_text(HEADER + '1,"road, paved",128,64,128\n0,ciel bleuté,70,130,255\n', encoding="utf-8")
    classes = load_classes(tmp_path, 2)
    assert classes.names == ("ciel bleuté", "road, paved")
    assert classes.colors.tolist() == [[70, 130, 255], [128, 64, 128]]
    assert classes.colors.dtype == np.uint8
    assert len(classes) == 2


@pytest.mark.parametrize("separator", [",", ";"])
def test_reads_what_excel_writes(separator: str, tmp_path: Path) -> None:
    text = HEADER + "0,Straße,128,64,128\n1,ciel,70,130,255\n"
    (tmp_path / "classes.csv").write_bytes(text.replace(",", separator).replace("\n", "\r\n").encode("utf-8-sig"))
    classes = load_classes(tmp_path, 2)
    assert classes.names == ("Straße", "ciel")
    assert classes.colors.tolist() == [[128, 64, 128], [70, 130, 255]]


def test_numbers_and_colours_classes_without_a_file(tmp_path: Path) -> None:
    classes = load_classes(tmp_path, 3)
    assert classes.names == ("class 0", "class 1", "class 2")
    assert np.array_equal(classes.colors, default_colors(3))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"expected classes 0\.\.1, each once, got 0 rows"),
        (HEADER + "0,a,1,2,3\n", r"expected classes 0\.\.1, each once, got 1 rows"),
        (HEADER + "0,a,1,2,3\n0,b,1,2,3\n", r"expected classes 0\.\.1, each once, got 2 rows"),
        (HEADER + "0,a,1,2,3\n1,b,1,2\n", "expected columns index, name, red, green, blue as UTF-8 text"),
        (HEADER + "0,a,1,2,3\n1,b,1,2,x\n", "expected columns index, name, red, green, blue as UTF-8 text"),
        ("index,name\n0,a\n1,b\n", "expected columns index, name, red, green, blue as UTF-8 text"),
        (HEADER + "0,a,1,2,3\n1,b,1,2,256\n", r"expected colours within 0\.\.255"),
    ],
)
def test_refuses_a_file_that_does_not_describe_the_classes(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "classes.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"classes\.csv: {message}$"):
        load_classes(tmp_path, 2)


@pytest.mark.parametrize("n_cls", [1, 2, 19, 150, 300])
def test_made_up_colours_differ(n_cls: int) -> None:
    colors = default_colors(n_cls)
    assert colors.shape == (n_cls, 3)
    assert colors.dtype == np.uint8
    assert len(np.unique(colors, axis=0)) == n_cls


def variant_of(folder: Path, dataset: object) -> Path:
    (folder / "variant.yml").write_text(f"net_kwargs: {{n_cls: 1}}\ndataset_kwargs: {dataset}\n")
    return folder


@pytest.mark.parametrize(
    ("dataset", "n_cls", "some"),
    [
        ("ade20k", 150, {0: ("wall", [120, 120, 120]), 149: ("flag", [92, 0, 255])}),
        ("cityscapes", 19, {0: ("road", [128, 64, 128]), 18: ("bicycle", [119, 11, 32])}),
        ("pascal_context", 60, {0: ("background", [120, 120, 120]), 59: ("wood", [31, 0, 255])}),
    ],
)
def test_knows_the_classes_of_the_official_datasets(
    dataset: str, n_cls: int, some: dict[int, tuple[str, list[int]]], tmp_path: Path
) -> None:
    classes = load_classes(variant_of(tmp_path, {"dataset": dataset}), n_cls)
    assert len(set(classes.names)) == len(np.unique(classes.colors, axis=0)) == n_cls
    assert {i: (classes.names[i], classes.colors[i].tolist()) for i in some} == some


def test_a_colour_that_two_classes_share_stays_the_first_one_s(tmp_path: Path) -> None:
    colors = load_classes(variant_of(tmp_path, {"dataset": "ade20k"}), 150).colors.astype(int)
    assert colors[6].tolist() == [140, 140, 140]  # road, as the dataset has it; skyscraper too
    assert np.abs(np.delete(colors, 48, axis=0) - colors[48]).sum(axis=1).min() > 40


def test_a_file_comes_before_the_dataset(tmp_path: Path) -> None:
    rows = "".join(f"{i},mine {i},{i},0,0\n" for i in range(19))
    (variant_of(tmp_path, {"dataset": "cityscapes"}) / "classes.csv").write_text(HEADER + rows)
    assert load_classes(tmp_path, 19).names[18] == "mine 18"


@pytest.mark.parametrize("dataset", [{"dataset": "ade20k"}, {"dataset": "../ade20k"}, {}, "ade20k", "null"])
def test_classes_of_another_number_or_dataset_are_numbered(dataset: object, tmp_path: Path) -> None:
    assert load_classes(variant_of(tmp_path, dataset), 5).names[4] == "class 4"


@pytest.mark.parametrize("dataset", ["ade20k", "pascal_context", "cityscapes"])
def test_the_lists_are_those_of_the_datasets(dataset: str, data_root: Path) -> None:
    ours = Path(mpm_ops.__file__).with_name("datasets") / f"{dataset}.csv"
    assert ours.read_bytes() == (data_root / "classes" / f"{dataset}.csv").read_bytes().replace(b"\r\n", b"\n")


def test_a_file_that_is_no_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "classes.csv").write_bytes("index,name,red,green,blue\n0,Straße,1,2,3\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"classes\.csv: expected .* as UTF-8 text"):
        load_classes(tmp_path, 1)
