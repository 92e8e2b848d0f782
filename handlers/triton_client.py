"""Four ways to ask Triton for a mask, each short enough to copy.

    python -m handlers.triton_client http|grpc|asyncio|shm URL MODEL PICTURE MASK.png

URL is http://HOST:8000 for http, else HOST:8001. `shm` passes the picture and the mask through shared memory, for
callers on the server's own machine; it asks for the secret in MPM_ADMIN_SECRET.
"""

import argparse
import asyncio
import io
import os
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
from PIL import Image
from tritonclient.utils import InferenceServerException, serialize_byte_tensor, shared_memory

ADMIN_SECRET_VARIABLE = "MPM_ADMIN_SECRET"
Parameters = dict[str, str] | None


def segment_http(url: str, model: str, picture: bytes, parameters: Parameters = None) -> bytes:
    """Ask over HTTP for a mask as PNG.

    Parameters carry the options under the names of headers: `{"x-mpm-schedule": "off"}`.

    Binary data in both directions: JSON can't hold a picture.
    """
    triton = tritonclient.http
    with triton.InferenceServerClient(url.removeprefix("http://")) as client:
        image = triton.InferInput("IMAGE", [1, 1], "BYTES")
        image.set_data_from_numpy(np.array([[picture]], dtype=np.object_), binary_data=True)
        wanted = [triton.InferRequestedOutput("MASK_PNG", binary_data=True)]
        result = client.infer(model, [image], outputs=wanted, parameters=parameters)
        return bytes(result.as_numpy("MASK_PNG")[0, 0])


def segment_grpc(url: str, model: str, picture: bytes, parameters: Parameters = None) -> bytes:
    """Ask over gRPC for a mask as PNG."""
    triton = tritonclient.grpc
    with triton.InferenceServerClient(url) as client:
        image = triton.InferInput("IMAGE", [1, 1], "BYTES")
        image.set_data_from_numpy(np.array([[picture]], dtype=np.object_))
        wanted = [triton.InferRequestedOutput("MASK_PNG")]
        result = client.infer(model, [image], outputs=wanted, parameters=parameters)
        return bytes(result.as_numpy("MASK_PNG")[0, 0])


async def segment_many(url: str, model: str, pictures: list[bytes], parameters: Parameters = None) -> list[bytes]:
    """Ask for many masks at once, from one thread; the server groups their windows."""
    triton = tritonclient.grpc.aio

    async def segment(client: Any, picture: bytes) -> bytes:
        image = tritonclient.grpc.InferInput("IMAGE", [1, 1], "BYTES")
        image.set_data_from_numpy(np.array([[picture]], dtype=np.object_))
        wanted = [tritonclient.grpc.InferRequestedOutput("MASK_PNG")]
        result = await client.infer(model, [image], outputs=wanted, parameters=parameters)
        return bytes(result.as_numpy("MASK_PNG")[0, 0])

    async with triton.InferenceServerClient(url) as client:
        return list(await asyncio.gather(*(segment(client, picture) for picture in pictures)))


def segment_frame(url: str, model: str, frame: np.ndarray, secret: str, parameters: Parameters = None) -> np.ndarray:
    """Pass an uncompressed frame in, and its class ids out, through shared memory.

    Args:
        url: of gRPC, on this machine.
        frame: uint8 RGB [H, W, 3].
        secret: the server's, because who may register memory may read what others registered.

    Returns:
        [H, W] class ids, a copy of the shared memory.
    """
    triton = tritonclient.grpc
    admin = {"triton-grpc-protocol-x-admin": secret}
    file = io.BytesIO()
    np.save(file, frame)
    image_bytes = serialize_byte_tensor(np.array([[file.getvalue()]], dtype=np.object_)).item()
    mask_bytes = frame.shape[0] * frame.shape[1]  # one a pixel up to 256 classes
    name = f"mpm-{uuid4()}"
    with triton.InferenceServerClient(url) as client:
        memory = shared_memory.create_shared_memory_region(name, f"/{name}", len(image_bytes) + mask_bytes)
        try:
            shared_memory.set_shared_memory_region(memory, [np.frombuffer(image_bytes, np.uint8)])
            client.register_system_shared_memory(name, f"/{name}", len(image_bytes) + mask_bytes, headers=admin)
            try:
                image = triton.InferInput("IMAGE", [1, 1], "BYTES")
                image.set_shared_memory(name, len(image_bytes))
                mask = triton.InferRequestedOutput("MASK")
                mask.set_shared_memory(name, mask_bytes, offset=len(image_bytes))
                client.infer(model, [image], outputs=[mask], parameters=parameters)
            finally:
                client.unregister_system_shared_memory(name, headers=admin)
            labels = shared_memory.get_contents_as_numpy(
                memory, np.uint8, list(frame.shape[:2]), offset=len(image_bytes)
            )
            return np.array(labels)
        finally:
            shared_memory.destroy_shared_memory_region(memory)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m handlers.triton_client", description=__doc__.split("\n")[0])
    parser.add_argument("way", choices=["http", "grpc", "asyncio", "shm"])
    parser.add_argument("url", help="http://HOST:8000 for http, else HOST:8001")
    parser.add_argument("model")
    parser.add_argument("picture", type=Path)
    parser.add_argument("mask", type=Path)
    arguments = parser.parse_args()
    try:
        arguments.mask.write_bytes(_segment(arguments))
    except (OSError, ValueError, InferenceServerException, shared_memory.SharedMemoryException) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _segment(arguments: argparse.Namespace) -> bytes:
    url, model, picture = arguments.url, arguments.model, arguments.picture.read_bytes()
    if arguments.way == "http":
        return segment_http(url, model, picture)
    if arguments.way == "grpc":
        return segment_grpc(url, model, picture)
    if arguments.way == "asyncio":
        return asyncio.run(segment_many(url, model, [picture]))[0]
    frame = np.asarray(Image.open(arguments.picture).convert("RGB"))
    mask = io.BytesIO()
    Image.fromarray(segment_frame(url, model, frame, os.environ.get(ADMIN_SECRET_VARIABLE, ""))).save(mask, "PNG")
    return mask.getvalue()


if __name__ == "__main__":
    sys.exit(main())
