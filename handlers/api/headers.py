"""Names of the request headers that carry options, for processes that need no more than that."""

CONTEXT_HEADERS = ("traceparent", "tracestate")
# All that Triton passes on of a request's headers, and takes as its parameters.
OPTION_HEADERS = (
    "x-mpm-outputs",
    "x-mpm-priority",
    "x-mpm-schedule",
    "x-mpm-view",
    "x-request-id",
    *CONTEXT_HEADERS,
)
