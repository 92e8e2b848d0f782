"""Frames and class ids through memory that a Triton on the same machine shares."""

import io
from typing import TYPE_CHECKING
from uuid import uuid4

if TYPE_CHECKING:
    import numpy as np


def segment_shared(address: str, model: str, frame: "np.ndarray", secret: str) -> "np.ndarray":
    """Pass an uncompressed frame to a Triton on this machine, and its class ids back, through shared memory.

    Args:
        address: HOST:PORT of gRPC.
        frame: uint8 RGB [H, W, 3].
        secret: the server's, because who may register memory may read what others registered.

    Returns:
        [H, W] class ids of a model with 256 classes at most, a copy of the shared memory.

    Raises:
        tritonclient.utils.InferenceServerException: the server refused.
    """
    import numpy as np
    import tritonclient.grpc as triton
    from tritonclient.utils import serialize_byte_tensor, shared_memory

    admin = {"triton-grpc-protocol-x-admin": secret}
    file = io.BytesIO()
    np.save(file, frame)
    image_bytes = serialize_byte_tensor(np.array([[file.getvalue()]], dtype=np.object_)).item()
    mask_bytes = frame.shape[0] * frame.shape[1]  # one a pixel
    name, size = f"mpm-{uuid4()}", len(image_bytes) + mask_bytes
    with triton.InferenceServerClient(address, channel_args=[("grpc.enable_http_proxy", 0)]) as client:
        memory = shared_memory.create_shared_memory_region(name, f"/{name}", size)
        try:
            shared_memory.set_shared_memory_region(memory, [np.frombuffer(image_bytes, np.uint8)])
            client.register_system_shared_memory(name, f"/{name}", size, headers=admin)
            try:
                image = triton.InferInput("IMAGE", [1, 1], "BYTES")
                image.set_shared_memory(name, len(image_bytes))
                mask = triton.InferRequestedOutput("MASK")
                mask.set_shared_memory(name, mask_bytes, offset=len(image_bytes))
                client.infer(model, [image], outputs=[mask])
            finally:
                client.unregister_system_shared_memory(name, headers=admin)
            labels = shared_memory.get_contents_as_numpy(memory, np.uint8, list(frame.shape[:2]), len(image_bytes))
            return np.array(labels)
        finally:
            shared_memory.destroy_shared_memory_region(memory)
