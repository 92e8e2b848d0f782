"""What a person may send, what an attacker may send, and what goes back."""

import io
import json
import resource
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import PngImageFile
from pycocotools import mask as coco

from handlers.api import colours
from handlers.api.decode import decode_image
from handlers.api.formats.json import describe_classes, regions
from handlers.api.formats.npy import encode_npy
from handlers.api.formats.png import encode_mask_png
from handlers.api.formats.views import encode_picture
from handlers.errors import ErrorKind, ServingError
from mpm_ops.classes import Classes, default_colors

CLOSE = 12  # grey levels that lossy formats may be off on smooth pictures


def decode(data: bytes, *, max_bytes: int = 10**7, max_pixels: int = 10**6) -> np.ndarray:
    return decode_image(data, max_bytes=max_bytes, max_pixels=max_pixels)


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def ramp(height: int = 24, width: int = 32) -> np.ndarray:
    """A smooth picture whose corners all differ, uint8 RGB."""
    rows, columns = np.linspace(0, 255, height), np.linspace(0, 255, width)
    planes = np.broadcast_arrays(rows[:, None], columns[None], (rows[:, None] + columns[None]) / 2)
    return np.stack(planes, axis=2).astype(np.uint8)


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.dtype == np.uint8
    assert got.shape == expected.shape
    assert np.abs(got.astype(int) - expected.astype(int)).max() <= CLOSE


@pytest.fixture(params=[colours.STRIP_PIXELS, 100], ids=["whole", "in strips"])
def _strips(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are converted as a whole, and a few rows at a time."""
    monkeypatch.setattr(colours, "STRIP_PIXELS", request.param)


@pytest.mark.usefixtures("_strips")
class TestModes:
    @pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "GIF"])
    def test_grey(self, file_format: str) -> None:
        grey = ramp()[..., 0]
        decoded = decode(encode(Image.fromarray(grey), file_format))
        np.testing.assert_array_equal(decoded, np.repeat(grey[..., None], 3, axis=2))

    @pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF"])
    def test_rgb_is_kept_to_the_byte(self, file_format: str) -> None:
        np.testing.assert_array_equal(decode(encode(Image.fromarray(ramp()), file_format)), ramp())

    def test_lossless_webp(self) -> None:
        np.testing.assert_array_equal(decode(encode(Image.fromarray(ramp()), "WEBP", lossless=True)), ramp())

    @pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
    def test_jpeg(self, options: dict[str, Any]) -> None:
        assert_close(decode(encode(Image.fromarray(ramp()), "JPEG", quality=95, **options)), ramp())

    def test_cmyk_jpeg(self) -> None:
        assert_close(decode(encode(Image.fromarray(ramp()).convert("CMYK"), "JPEG", quality=95)), ramp())

    @pytest.mark.parametrize("mode", ["LA", "RGBA"])
    def test_transparency_lies_over_white(self, mode: str) -> None:
        image = Image.new(mode, (3, 1), "black")
        image.putalpha(Image.fromarray(np.array([[0, 128, 255]], np.uint8)))
        np.testing.assert_array_equal(decode(encode(image, "PNG"))[0, :, 0], [255, 127, 0])

    def test_palette_with_transparency(self) -> None:
        image = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
        image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
        decoded = decode(encode(image, "PNG", transparency=1))
        np.testing.assert_array_equal(decoded, [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]])

    def test_rgb_with_a_transparent_colour(self) -> None:
        image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
        decoded = decode(encode(image, "PNG", transparency=(4, 5, 6)))
        np.testing.assert_array_equal(decoded, [[[1, 2, 3], [255, 255, 255]]])

    @pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
    def test_16_bit_grey_spreads_over_8_bits(self, file_format: str) -> None:
        values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
        decoded = decode(encode(Image.fromarray(values), file_format))
        np.testing.assert_array_equal(decoded[0, :, 0], [0, 0, 1, 128, 255])

    def test_16_bit_rgb_png(self) -> None:
        scanline = b"\0" + struct.pack(">6H", 0, 32768, 65535, 256, 255, 512)
        decoded = decode(png(2, 1, idat(scanline), depth=16))
        np.testing.assert_array_equal(decoded, [[[0, 128, 255], [1, 0, 2]]])

    def test_float_tiff_shows_its_own_range(self) -> None:
        values = np.array([[-1.0, 0.0, 1.0, np.nan, np.inf]], np.float32)
        decoded = decode(encode(Image.fromarray(values), "TIFF"))
        np.testing.assert_array_equal(decoded[0, :, 0], [0, 127, 255, 127, 127])

    def test_flat_float_tiff(self) -> None:
        assert decode(encode(Image.fromarray(np.full((2, 3), 7.5, np.float32)), "TIFF")).shape == (2, 3, 3)

    @pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF"])
    def test_1_bit(self, file_format: str) -> None:
        image = Image.fromarray(np.array([[0, 255, 255, 0]], np.uint8)).convert("1")
        np.testing.assert_array_equal(decode(encode(image, file_format))[0, :, 0], [0, 255, 255, 0])

    @pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
    def test_first_frame_of_several(self, file_format: str) -> None:
        first, second = Image.new("RGB", (8, 6), (200, 30, 30)), Image.new("RGB", (8, 6), (30, 30, 200))
        data = encode(first, file_format, save_all=True, append_images=[second])
        assert_close(decode(data), np.full((6, 8, 3), (200, 30, 30), np.uint8))

    def test_mpo_of_a_phone(self) -> None:
        second = Image.new("RGB", (32, 24))
        data = encode(Image.fromarray(ramp()), "MPO", save_all=True, append_images=[second], quality=95)
        assert_close(decode(data), ramp())

    @pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation(self, file_format: str, orientation: int) -> None:
        stored = ramp()
        upright = {
            1: stored,
            2: stored[:, ::-1],
            3: stored[::-1, ::-1],
            4: stored[::-1],
            5: stored.transpose(1, 0, 2),
            6: np.rot90(stored, -1),
            7: stored[::-1, ::-1].transpose(1, 0, 2),
            8: np.rot90(stored, 1),
        }[orientation]
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        quality = {} if file_format in ("PNG", "TIFF") else {"quality": 95}
        assert_close(decode(encode(Image.fromarray(stored), file_format, exif=exif, **quality)), upright)

    @pytest.mark.filterwarnings("ignore")  # Pillow warns of broken EXIF
    @pytest.mark.parametrize(
        "exif",
        [b"", b"no tiff at all", b"II*\0\xff\xff\xff\x7f", b"II*\0\x08\0\0\0\xff\xff" + b"\x0f\x01\x02\0" * 9],
        ids=["empty", "garbage", "offset", "count"],
    )
    def test_broken_exif_does_not_spoil_the_picture(self, exif: bytes) -> None:
        jpeg = encode(Image.fromarray(ramp()), "JPEG", quality=95)
        segment = b"Exif\0\0" + exif
        data = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + jpeg[2:]
        assert_close(decode(data), ramp())

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_any_bytes(self, kind: Any) -> None:
        assert decode(kind(encode(Image.fromarray(ramp()), "JPEG"))).shape == (24, 32, 3)


def jpegs() -> dict[str, bytes]:
    """Kinds of JPEG that decoders treat differently."""
    noise = np.random.default_rng(0).integers(0, 256, (37, 51, 3), dtype=np.uint8)
    image = Image.fromarray(cv2.GaussianBlur(noise, (5, 5), 2))
    jfif_stripped = encode(image, "JPEG")
    return {
        "4:2:0": encode(image, "JPEG", subsampling=2),
        "4:2:2": encode(image, "JPEG", subsampling=1),
        "4:4:4": encode(image, "JPEG", subsampling=0, quality=97),
        "progressive": encode(image, "JPEG", progressive=True, quality=40),
        "optimised": encode(image, "JPEG", optimize=True),
        "restarts": encode(image, "JPEG", restart_marker_blocks=2),
        "grey": encode(image.convert("L"), "JPEG"),
        "rgb": encode(image, "JPEG", keep_rgb=True),
        "cmyk": encode(image.convert("CMYK"), "JPEG"),
        "no jfif": jfif_stripped[:2] + jfif_stripped[4 + int.from_bytes(jfif_stripped[4:6], "big") :],
        "trailing bytes": encode(image, "JPEG") + b"and more",
        "mpo": encode(image, "MPO", save_all=True, append_images=[image.rotate(180)]),
        "one pixel": encode(Image.new("RGB", (1, 1), (9, 99, 199)), "JPEG"),
    }


class TestJpeg:
    @pytest.mark.parametrize("kind", jpegs())
    @pytest.mark.parametrize("orientation", [None, 1, 2, 3, 4, 5, 6, 7, 8])
    def test_the_same_to_the_byte_as_pillow(self, kind: str, orientation: int | None) -> None:
        data = jpegs()[kind]
        if orientation is not None:
            exif = Image.Exif()
            exif[ExifTags.Base.Orientation] = orientation
            body = b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")
            data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]
        image = Image.open(io.BytesIO(data), formats=["JPEG"])
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        got = decode(data)
        np.testing.assert_array_equal(got, expected)
        assert got.flags.c_contiguous

    def test_photos(self, data_root: Path) -> None:
        files = sorted((data_root / "photos").glob("*.jpg"))[:40]
        assert files
        for file in files:
            with Image.open(file) as image:
                if "icc_profile" not in image.info:
                    np.testing.assert_array_equal(decode(file.read_bytes()), np.asarray(image.convert("RGB")))

    @pytest.mark.filterwarnings("ignore")
    def test_broken_ones_are_judged_by_pillow(self) -> None:
        data = encode(Image.fromarray(ramp(96, 128)), "JPEG", quality=95, restart_marker_blocks=4)
        random = np.random.default_rng(0)
        size = slice(data.index(b"\xff\xc0") + 5, data.index(b"\xff\xc0") + 9)
        many = [data[:length] for length in random.integers(2, len(data), 50)]
        for _ in range(300):
            broken = bytearray(data)
            for _ in range(random.integers(1, 4)):
                broken[random.integers(random.choice([2, 200]), len(data))] = random.integers(0, 256)
            if broken[size] == data[size]:  # others are too large, or another picture
                many.append(bytes(broken))
        kept = 0
        for one in many:
            try:
                expected = np.asarray(Image.open(io.BytesIO(one), formats=["JPEG"]).convert("RGB"))
            except Exception:
                with pytest.raises(ServingError):
                    decode(one)
                continue
            kept += 1
            np.testing.assert_array_equal(decode(one), expected)
        assert 50 < kept < 300

    @pytest.mark.parametrize("sampling", [0x11, 0x12, 0x14, 0x21, 0x22, 0x31, 0x41, 0x42, 0x44])
    def test_unusual_sampling(self, sampling: int) -> None:
        data = bytearray(encode(Image.new("RGB", (64, 64), (200, 30, 30)), "JPEG", subsampling=0))
        start = data.index(b"\xff\xc0")
        data[start + 11] = sampling
        data += bytes(2000)
        try:
            expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        except OSError:
            decodes_or_is_refused(bytes(data))
            return
        np.testing.assert_array_equal(decode(bytes(data)), expected)


class TestRefusals:
    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"\0",
            b"hello",
            b"<!doctype html><html><body>404</body></html>",
            b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'/>",
            b"%PDF-1.7\n",
            b"PK\x03\x04" + bytes(100),
            b"\x93NUMPY" + bytes(100),
            b"\xff\xd8\xff",
            b"\x89PNG\r\n\x1a\n",
            b"GIF89a",
            b"RIFF\x04\0\0\0WEBP",
            b"BM",
            b"II*\0",
        ],
        ids=lambda data: repr(data[:8]),
    )
    def test_no_picture(self, data: bytes) -> None:
        with pytest.raises(ServingError) as caught:
            decode(data)
        assert caught.value.kind is ErrorKind.BAD_REQUEST
        assert "\n" not in str(caught.value)

    def test_formats_that_are_not_offered(self) -> None:
        for file_format in ("PPM", "ICO", "TGA", "PCX", "PDF"):
            with pytest.raises(ServingError, match="expected JPEG, PNG, WebP, GIF, BMP, TIFF"):
                decode(encode(Image.fromarray(ramp()), file_format))

    def test_too_many_bytes(self) -> None:
        data = encode(Image.fromarray(ramp()), "PNG")
        assert decode(data, max_bytes=len(data)).shape == (24, 32, 3)
        with pytest.raises(ServingError, match=f"at most {len(data) - 1} bytes, got {len(data)}") as caught:
            decode(data, max_bytes=len(data) - 1)
        assert caught.value.kind is ErrorKind.TOO_LARGE

    def test_too_many_pixels(self) -> None:
        data = encode(Image.fromarray(ramp()), "PNG")
        assert decode(data, max_pixels=24 * 32).shape == (24, 32, 3)
        with pytest.raises(ServingError, match="at most 767 pixels, got 32x24 = 768") as caught:
            decode(data, max_pixels=24 * 32 - 1)
        assert caught.value.kind is ErrorKind.TOO_LARGE

    def test_huge_pictures_are_refused_by_their_header(self) -> None:
        huge = {
            "png": png(50_000, 50_000, idat(bytes(1000))),
            "png of zeros": png(50_000, 50_000, idat(bytes(10**7))),
            "gif": with_bytes(encode(Image.fromarray(ramp()), "GIF"), 6, struct.pack("<HH", 65535, 65535)),
            "bmp": with_bytes(encode(Image.fromarray(ramp()), "BMP"), 18, struct.pack("<ii", 50_000, 50_000)),
            "webp": webp_canvas(16384, 16384),
            "wide webp": webp_canvas(2**24, 24),
            "tiff": tiff(width=50_000, height=50_000),
            "tiff tile": tiff(width=16, height=16, tile=16384),
        }
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for name, data in huge.items():
            with pytest.raises(ServingError) as caught:
                decode(data)
            assert caught.value.kind is ErrorKind.TOO_LARGE, name
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB

    @pytest.mark.parametrize("place", ["before", "after"])
    @pytest.mark.parametrize("chunk_type", [b"zTXt", b"iTXt", b"iCCP"])
    def test_compressed_text_that_explodes(self, chunk_type: bytes, place: str) -> None:
        between = b"\0\1\0\0\0" if chunk_type == b"iTXt" else b"\0\0"
        bomb = chunk(chunk_type, b"k" + between + zlib.compress(bytes(50 * 2**20)))
        pixels = idat(b"\0" + bytes(3))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        data = png(1, 1, *((bomb, pixels) if place == "before" else (pixels, bomb)))
        if chunk_type == b"iCCP":
            with pytest.raises(ServingError, match="colour profile of at most 4194304 bytes"):
                decode(data)
        else:
            np.testing.assert_array_equal(decode(data), np.zeros((1, 1, 3)))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 * 1024  # KiB

    def test_jpeg_of_endless_scans(self) -> None:
        jpeg = encode(Image.fromarray(ramp()), "JPEG", progressive=True)
        last_scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
        assert decode(jpeg[:-2] + 40 * last_scan + jpeg[-2:]).shape == (24, 32, 3)
        for prefix in (b"", b"\xff\x01", b"\xff\xff", b"\xff\xd0"):  # markers without a length
            with pytest.raises(ServingError, match="at most 64 scans"):
                decode(jpeg[:-2] + prefix + 64 * last_scan + jpeg[-2:])

    def test_jpeg_of_endless_segments(self) -> None:
        jpeg = encode(Image.fromarray(ramp()), "JPEG")
        with pytest.raises(ServingError, match="at most 50000 segments"):
            decode(jpeg[:2] + 50_000 * b"\xff\xfe\0\2" + jpeg[2:])


def lossy_and_lossless() -> dict[str, bytes]:
    """A small picture in every format and in kinds that take different paths."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 4), dtype=np.uint8)
    image = Image.fromarray(noise).convert("RGB")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.ImageDescription] = "a picture"
    return {
        "jpeg": encode(image, "JPEG", exif=exif),
        "progressive jpeg": encode(image, "JPEG", progressive=True),
        "mpo": encode(image, "MPO", save_all=True, append_images=[image]),
        "png": encode(image, "PNG", exif=exif),
        "rgba png": encode(Image.fromarray(noise), "PNG"),
        "apng": encode(image, "PNG", save_all=True, append_images=[Image.new("RGB", (32, 24))]),
        "webp": encode(image, "WEBP", exif=exif),
        "lossless webp": encode(Image.fromarray(noise), "WEBP", lossless=True),
        "gif": encode(image, "GIF", save_all=True, append_images=[Image.new("RGB", (32, 24))]),
        "tiff": encode(image, "TIFF", exif=exif),
        "lzw tiff": encode(image, "TIFF", compression="tiff_lzw"),
        "jpeg tiff": encode(image, "TIFF", compression="jpeg"),
        "bmp": encode(image, "BMP"),
    }


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it finds
@pytest.mark.parametrize("kind", lossy_and_lossless())
class TestBrokenFiles:
    def test_cut_anywhere(self, kind: str) -> None:
        data = lossy_and_lossless()[kind]
        for length in {*range(64), *np.linspace(0, len(data), 150, dtype=int).tolist()}:
            decodes_or_is_refused(data[:length])

    def test_flipped_bytes(self, kind: str) -> None:
        data = lossy_and_lossless()[kind]
        random = np.random.default_rng(1)
        for _ in range(60):
            broken = bytearray(data)
            early = random.integers(0, 2)  # half of them among the headers
            for _ in range(random.integers(1, 8)):
                broken[random.integers(0, 200 if early else len(data))] = random.integers(0, 256)
            decodes_or_is_refused(bytes(broken))


def decodes_or_is_refused(data: bytes) -> None:
    try:
        decoded = decode(data)
    except ServingError:
        return
    assert decoded.dtype == np.uint8
    assert decoded.ndim == 3
    assert decoded.shape[2] == 3


class TestReplies:
    def test_indices_of_the_mask_are_class_ids(self) -> None:
        classes, labels = example()
        image = Image.open(io.BytesIO(encode_mask_png(labels, classes)))
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), labels)
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), classes.colors[labels])

    @pytest.mark.parametrize("num_classes", [11, 256, 1000])
    def test_plain_ids_for_readers_that_make_colours_of_a_palette(self, num_classes: int) -> None:
        classes, labels = example(num_classes=num_classes)
        encoded = encode_mask_png(labels, classes, grey=True)
        read = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)
        assert read is not None
        assert read.dtype == labels.dtype
        np.testing.assert_array_equal(read, labels)
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encoded))), labels)

    def test_names_of_the_classes_are_in_the_file(self) -> None:
        _, labels = example()
        names = ("ciel bleuté", 'a "b", c', *(f"class {i}" for i in range(2, 11)))
        image = Image.open(io.BytesIO(encode_mask_png(labels, Classes(names, default_colors(11)))))
        assert isinstance(image, PngImageFile)
        assert json.loads(image.text["classes"]) == list(names)

    def test_mask_of_256_classes(self) -> None:
        classes, labels = example(num_classes=256)
        image = Image.open(io.BytesIO(encode_mask_png(labels, classes)))
        np.testing.assert_array_equal(np.asarray(image), labels)

    def test_mask_of_more_classes_is_16_bit(self) -> None:
        classes, labels = example(num_classes=1000)
        image = Image.open(io.BytesIO(encode_mask_png(labels, classes)))
        assert image.mode.startswith("I;16")
        np.testing.assert_array_equal(np.asarray(image), labels)

    @pytest.mark.parametrize("num_classes", [11, 1000])
    def test_npy(self, num_classes: int) -> None:
        _, labels = example(num_classes=num_classes)
        read = np.load(io.BytesIO(encode_npy(labels)), allow_pickle=False)
        assert read.dtype == labels.dtype
        np.testing.assert_array_equal(read, labels)

    @pytest.mark.parametrize("num_classes", [11, 1000])
    def test_classes_as_json(self, num_classes: int) -> None:
        classes, labels = example(num_classes=num_classes)
        described = json.loads(json.dumps(describe_classes(labels, classes)))

        rebuilt = np.full(labels.shape, -1)
        for entry in described:
            region = coco.decode(entry["rle"]).astype(bool)
            assert region.sum() == entry["area"]
            assert entry["name"] == classes.names[entry["id"]]
            assert entry["color"] == classes.colors[entry["id"]].tolist()
            rebuilt[region] = entry["id"]
        np.testing.assert_array_equal(rebuilt, labels)
        areas = [entry["area"] for entry in described]
        assert areas == sorted(areas, reverse=True)

    def test_regions_are_those_of_pycocotools(self) -> None:
        random = np.random.default_rng(0)
        for height, width, num_classes in [(1, 1, 1), (1, 9, 3), (9, 1, 3), (40, 30, 5), (64, 300, 300), (90, 70, 2)]:
            labels = random.integers(0, num_classes, (height, width)).astype(
                np.uint8 if num_classes <= 256 else np.uint16
            )
            if num_classes == 2:
                blurred = cv2.GaussianBlur(labels.astype(np.float32), (15, 15), 5)
                labels = np.where(blurred > 0.5, 4, 0).astype(np.uint8)
            found = regions(labels)
            ids, areas = np.unique(labels, return_counts=True)
            assert [(r.index, r.area) for r in found] == sorted(
                zip(ids, areas, strict=True), key=lambda r: (-r[1], r[0])
            )
            for region in found:
                expected = coco.encode(np.asfortranarray(labels == region.index))
                assert region.counts.encode() == expected["counts"]

    @pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (5, 1921), (300, 257)], ids=str)
    @pytest.mark.parametrize("num_classes", [1, 2, 16, 256, 1000])
    def test_mask_of_any_shape(self, shape: tuple[int, int], num_classes: int) -> None:
        labels = np.random.default_rng(0).integers(0, num_classes, shape)
        labels[: shape[0] // 2] = num_classes - 1
        labels = labels.astype(np.uint8 if num_classes <= 256 else np.uint16)
        classes = Classes(tuple(map(str, range(num_classes))), default_colors(num_classes))
        for view in (labels, np.asfortranarray(labels), np.repeat(labels, 2, axis=1)[:, ::2]):
            data = encode_mask_png(view, classes)
            image = Image.open(io.BytesIO(data))
            image.verify()
            np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), labels)
            read = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
            np.testing.assert_array_equal(read, labels if num_classes > 256 else classes.colors[labels][..., ::-1])

    def test_picture(self) -> None:
        np.testing.assert_array_equal(decode(encode_picture(ramp(), "image/png")), ramp())
        assert_close(decode(encode_picture(ramp(), "image/jpeg")), ramp())


def example(*, num_classes: int = 11) -> tuple[Classes, np.ndarray]:
    classes = Classes(tuple(f"class {i}" for i in range(num_classes)), default_colors(num_classes))
    labels = np.random.default_rng(0).integers(0, num_classes, (13, 17))
    labels[0, :2] = 0, num_classes - 1
    return classes, labels.astype(np.uint8 if num_classes <= 256 else np.uint16)


def chunk(chunk_type: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + chunk_type + data + struct.pack(">I", zlib.crc32(chunk_type + data))


def idat(scanlines: bytes) -> bytes:
    return chunk(b"IDAT", zlib.compress(scanlines))


def png(width: int, height: int, *chunks: bytes, depth: int = 8) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def webp_canvas(width: int, height: int) -> bytes:
    """An animation of one small frame on a canvas of any size."""
    frame = encode(Image.fromarray(ramp()), "WEBP")[12:]
    canvas = bytes([2, 0, 0, 0]) + uint24(width - 1) + uint24(height - 1)
    placed = bytes(6) + uint24(31) + uint24(23) + bytes(4) + frame
    chunks = ((b"VP8X", canvas), (b"ANIM", bytes(6)), (b"ANMF", placed))
    body = b"WEBP" + b"".join(
        name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for name, data in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def uint24(value: int) -> bytes:
    return struct.pack("<I", value)[:3]


def tiff(*, width: int, height: int, tile: int | None = None) -> bytes:
    """A grey deflate TIFF in one strip or one tile of zeros."""
    pixels = zlib.compress(bytes(1000))
    place = (273, 278, 279) if tile is None else (324, 322, 325)
    entries = {
        256: width,
        257: height,
        258: 8,
        259: 8,
        262: 1,
        277: 1,
        place[1]: tile or height,
        place[2]: len(pixels),
    }
    if tile is not None:
        entries[323] = tile
    entries[place[0]] = 8 + 2 + 12 * (len(entries) + 1) + 4
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, entries[tag]) for tag in sorted(entries))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4) + pixels


def with_bytes(data: bytes, position: int, replacement: bytes) -> bytes:
    return data[:position] + replacement + data[position + len(replacement) :]
