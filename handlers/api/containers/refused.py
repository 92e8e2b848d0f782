"""Names of what we don't decode, by how it begins, and what to do."""

OFFERED = "JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, HEIC, JPEG XL or JPEG 2000, or a .npy frame"
RAW = "a camera's RAW file: develop it to JPEG or TIFF"
_TEXT = rb"(?is)(\xef\xbb\xbf)?\s*"
NAMES: tuple[tuple[bytes, str], ...] = (  # how what we refuse begins, and what to do
    (rb"\x1f\x8b", "gzip data: send the picture itself"),
    (rb"%PDF", "a PDF: render its page as PNG or JPEG"),
    (rb"(?s).{4}ftypcrx|II\x2a\0.{4}CR|IIU\0|IIRO|IIRS|MMOR|FUJIFILMCCD-RAW|FOVb|\0MRM", RAW),
    (
        rb"(?s).{4}ftyp|\x1aE\xdf\xa3|RIFF.{4}AVI |\0\0\x01[\xb3\xba]|FLV\x01|OggS",
        "a video: send one of its frames as JPEG or PNG",
    ),
    (_TEXT + rb"(https?|ftp|file|s3|gs)://", "a URL: send the bytes of the picture"),
    (_TEXT + rb"data:image/|/9j/|iVBORw0KGgo|UklGR|R0lGOD", "base64 text: send the bytes of the picture"),
    (rb"version https://git-lfs", "a Git LFS pointer: fetch the file with `git lfs pull`"),
    (_TEXT + rb'(\{\s*["}]|\[\s*["{\d\[\]])', "JSON: send the bytes of the picture as the body"),
    (_TEXT + rb"(<\?xml[^>]{0,200}>\s*)?(<!--.{0,200}-->\s*)?(<!doctype svg|<svg)", "an SVG: render it as PNG"),
    (_TEXT + rb"<(!doctype html|html|head|body)", "an HTML page, maybe an error's: send the picture itself"),
    (rb"PK\x03\x04", "a ZIP archive: send the pictures in it one by one"),
    (rb"8BPS", "a Photoshop file: export it as PNG or JPEG"),
    (rb"\x76\x2f\x31\x01|#\?RADIANCE", "an HDR picture: export it as PNG or JPEG"),
    (rb"(?s).{128}DICM", "a DICOM file: export its picture as PNG or TIFF"),
    (rb"P[1-7]\s", "a PNM picture: convert it to PNG"),
    (rb"\0\0\x01\0", "an icon: convert it to PNG"),
    (rb"(?s)--\S{1,70}\r\nContent-", "a form that was not parsed: send it as multipart/form-data, or the bytes alone"),
)
