"""One line of JSON about each request, the same behind every server."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from handlers.engine.request import Reply


def describe_request(
    request_id: str,
    code: int,
    seconds: float,
    *,
    trace_id: str = "",
    replies: Sequence[Reply] = (),
    error: str = "",
) -> str:
    """Describe the end of a request.

    Args:
        request_id: names it.
        code: its HTTP status.
        seconds: from its arrival to its answer.
        trace_id: of its span, where one is recorded.
        replies: one for each of its pictures, if it was answered: of several, the tokens and windows of all and the
            steps of the slowest.
        error: the message that its client got otherwise.
    """
    fields: dict[str, Any] = {"request_id": request_id, "code": code}
    if trace_id:
        fields["trace_id"] = trace_id
    steps: Mapping[str, float] = {}
    if replies:
        steps = max((reply.seconds for reply in replies), key=lambda seconds: sum(seconds.values()))
        fields["windows"] = sum(reply.num_windows for reply in replies)
        fields["tokens"] = [sum(counts) for counts in zip(*(reply.tokens for reply in replies), strict=True)]
    if error:
        fields["error"] = error
    fields["ms"] = {step: round(1000 * value, 2) for step, value in {**steps, "total": seconds}.items()}
    return json.dumps(fields)
