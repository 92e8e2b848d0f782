"""How a launcher asks its server's worker to take nothing new; the secret keeps everyone else from it."""

import hmac
import os
from collections.abc import Mapping

DRAIN_HEADER = "X-MPM-Drain"
DRAIN_SECRET_VARIABLE = "MPM_DRAIN_SECRET"


def asks_to_drain(headers: Mapping[str, str]) -> bool:
    """Whether a request, its header names in lower case, is the launcher's."""
    secret = os.environ.get(DRAIN_SECRET_VARIABLE, "")
    given = headers.get(DRAIN_HEADER.lower(), "")
    return bool(secret) and hmac.compare_digest(given.encode(errors="replace"), secret.encode())
