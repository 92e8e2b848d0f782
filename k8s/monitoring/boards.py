"""What the dashboards show: panels and their queries, from which Grafana's boards are made.

`VARIABLES` and `$__rate_interval` are Grafana's variables; `concrete` fills them in for everyone else.
"""

import re
from dataclasses import dataclass

RATE = "$__rate_interval"
# Labels to choose by. Those of a pod come from components/monitoring; on one host there are none, and all is shown.
VARIABLES = {"namespace": "Namespace", "model": "Model", "track": "Track", "node": "Node", "gpu_product": "GPU"}
_OF_MODEL = ("namespace", "model", "track")  # what recorded series have
_MODEL = ", ".join(f'{name}=~"${name}"' for name in VARIABLES)
OBJECTIVE = 0.001  # of a month's requests may fail
_INTO = 'point="in"'
_OUT_OF = 'point="out"'
LONG = "30m"  # for what is sampled rarely


@dataclass(frozen=True, slots=True)
class Query:
    """PromQL, and the legend of its series in terms of their labels."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot.

    Attributes:
        title, about: what it shows, and how to read it.
        unit: Grafana's name of the unit.
        queries: what is plotted.
        heatmap: the one query gives buckets, by `le`.
        exemplars: dots for single requests, with their names, where the scraped histogram has them.
    """

    title: str
    about: str
    unit: str
    queries: tuple[Query, ...]
    heatmap: bool = False
    exemplars: bool = False


@dataclass(frozen=True, slots=True)
class Board:
    """A dashboard: its title, Grafana's uid and its panels."""

    title: str
    uid: str
    panels: tuple[Panel, ...]


def concrete(expr: str, *, rate: str = "1m") -> str:
    """The query with Grafana's variables filled in, for everything that there is."""
    return re.sub(rf"\$({'|'.join(VARIABLES)})\b", ".*", expr.replace(RATE, rate))


def _metric(name: str, *matchers: str) -> str:
    return name + "{" + ", ".join((_MODEL, *matchers)) + "}"


def _recorded(name: str, over: str = "") -> str:
    """A series of rules.yml, averaged over a time where one is given."""
    series = name + "{" + ", ".join(f'{label}=~"${label}"' for label in _OF_MODEL) + "}"
    return f"avg_over_time({series}[{over}])" if over else series


def _rate(name: str, *matchers: str, by: str = "", over: str = RATE) -> str:
    """Summed increase per second."""
    return f"sum{f' by ({by})' if by else ''} (rate({_metric(name, *matchers)}[{over}]))"


def _mean(name: str, *matchers: str, by: str = "", over: str = RATE) -> str:
    """Mean of a histogram."""
    return (
        f"{_rate(f'{name}_sum', *matchers, by=by, over=over)} / {_rate(f'{name}_count', *matchers, by=by, over=over)}"
    )


def _quantile(q: float, name: str, by: str = "le", over: str = RATE) -> str:
    return f"histogram_quantile({q:g}, {_rate(f'{name}_bucket', by=by, over=over)})"


def _quantiles(name: str, *quantiles: float, by: str = "") -> tuple[Query, ...]:
    """Quantiles of a histogram, for each value of the label `by` where there is one."""
    labels, of = (f"le, {by}", f" of {by} {{{{{by}}}}}") if by else ("le", "")
    return tuple(Query(_quantile(q, name, by=labels), f"p{100 * q:g}{of}") for q in quantiles)


def _seconds_per_token(schedule: str) -> str:
    seconds = _rate("mpm_stage_seconds_sum", schedule, over=LONG)
    tokens = _rate("mpm_tokens_total", _INTO, 'stage="0"', schedule, over=LONG)
    return f"({seconds} / {tokens})"


_MERGING = 'schedule!="off"'
_REFERENCE = 'schedule="off"'
_KEPT = 'outcome="kept"'
_IN = _rate("mpm_tokens_total", _INTO)
_PADDING = _rate("mpm_padding_tokens_total")
_OFFERED = _rate("mpm_tokens_total", _INTO, 'stage="0"')
_SECOND = 'le="1.0"'
_FAILED = 'code=~"500|503|504"'
# By the pod that computes on it: what DCGM's exporter calls so, a scrape that keeps its own labels calls `exported_`.
_GPUS = "DCGM_FI_DEV_GPU_UTIL"
for _label in ("pod", "namespace"):
    _GPUS = f'label_replace({_GPUS}, "{_label}", "$1", "exported_{_label}", "(.+)")'

OVERVIEW = Board(
    "Segmenter: overview",
    "mpm-overview",
    (
        Panel(
            "Pictures per second",
            "Answered with a mask or a view.",
            "reqps",
            (Query(_rate("mpm_images_total", by="model"), "{{model}}"),),
        ),
        Panel(
            "Requests by status",
            "503 is overload, 504 a missed deadline, 499 a client that gave up.",
            "reqps",
            (Query(_rate("mpm_requests_total", by="code"), "{{code}}"),),
        ),
        Panel(
            "Latency",
            "From submitting a picture to its answer; the front end's own queue isn't in it. Dots are single requests "
            "with their trace's or their own id.",
            "s",
            _quantiles("mpm_request_seconds", 0.5, 0.95, 0.99),
            exemplars=True,
        ),
        Panel(
            "Failed requests",
            "Share of answers that are 500, 503 or 504; the objective is 0.1 %.",
            "percentunit",
            (
                Query(
                    f"({_rate('mpm_requests_total', _FAILED)} or vector(0)) / {_rate('mpm_requests_total')}",
                    "failed",
                ),
            ),
        ),
        Panel(
            "Failed requests by track",
            "The same, of what is stable and of a canary.",
            "percentunit",
            (
                Query(
                    f"({_rate('mpm_requests_total', _FAILED, by='model, track')} "
                    f"or 0 * {_rate('mpm_requests_total', by='model, track')}) "
                    f"/ {_rate('mpm_requests_total', by='model, track')}",
                    "{{model}} {{track}}",
                ),
            ),
        ),
        Panel(
            "Latency by track",
            "p99, of what is stable and of a canary.",
            "s",
            (Query(_quantile(0.99, "mpm_request_seconds", by="le, model, track"), "{{model}} {{track}}"),),
        ),
        Panel(
            "Busy device",
            "Share of the time in which a group is being computed; near 1 more load only waits longer.",
            "percentunit",
            (Query(_rate("mpm_stage_seconds_sum", by="instance"), "{{instance}}"),),
        ),
        Panel(
            "Requests in flight",
            "Accepted and not yet answered.",
            "short",
            (Query(f"sum by (instance) ({_metric('mpm_inflight_requests')})", "{{instance}}"),),
        ),
        Panel(
            "Where the time of a picture goes",
            "Means; queue is what its windows waited between decoding and their last stage.",
            "s",
            tuple(Query(_mean(f"mpm_{step}_seconds"), step) for step in ("decode", "queue", "labels", "encode")),
        ),
        Panel(
            "What is served",
            "Replicas by schedule, runtime and device.",
            "short",
            (
                Query(
                    f"count by (model, variant, schedule, align, runtime, precision, device) "
                    f"({_metric('mpm_model_info')})",
                    "{{model}}: {{variant}}, merging at {{schedule}}, {{runtime}} {{precision}} on {{device}}",
                ),
            ),
        ),
    ),
)

MERGING = Board(
    "Segmenter: merging",
    "mpm-merging",
    (
        Panel(
            "Tokens into and out of stages",
            "What falls between in and out of a stage was merged away.",
            "short",
            (Query(_rate("mpm_tokens_total", _MERGING, by="stage, point"), "stage {{stage}} {{point}}"),),
        ),
        Panel(
            "Tokens that a merge leaves",
            "Share; the lower, the more alike the patches of the pictures are.",
            "percentunit",
            (
                Query(
                    f"{_rate('mpm_tokens_total', _OUT_OF, _MERGING, by='stage')} / "
                    f"{_rate('mpm_tokens_total', _INTO, _MERGING, by='stage')} "
                    f"and on (stage) {_rate('mpm_merge_seconds_count', by='stage')}",
                    "stage {{stage}}",
                ),
            ),
        ),
        Panel(
            "Merging's share of the device's time",
            "What merging costs.",
            "percentunit",
            (
                Query(
                    f"{_rate('mpm_merge_seconds_sum')} / {_rate('mpm_stage_seconds_sum', _MERGING)}",
                    "merging",
                ),
            ),
        ),
        Panel(
            "What merging earns",
            "Device time per token of picture without merging, over that with it; above 1 merging pays. Without "
            "comes from the samples, which run in groups of their own, so on a device that needs large groups it "
            "flatters merging.",
            "none",
            (Query(f"{_seconds_per_token(_REFERENCE)} / {_seconds_per_token(_MERGING)}", "times faster"),),
        ),
        Panel(
            "Time of a merge",
            "Of one group; on a GPU, the device's time.",
            "s",
            _quantiles("mpm_merge_seconds", 0.5, 0.99, by="stage"),
        ),
        Panel(
            "Agreement with no merging",
            "Share of a sampled picture's pixels that keep their label; the mean, and the worst twentieth.",
            "percentunit",
            (
                Query(_mean("mpm_agreement_ratio", over=LONG), "mean"),
                Query(_quantile(0.05, "mpm_agreement_ratio", over=LONG), "worst 5 %"),
            ),
        ),
        Panel(
            "Agreement by class",
            "Of the pixels that no merging gives a class, the share that merging gives it too.",
            "percentunit",
            (
                Query(
                    f"{_rate('mpm_agreement_pixels_total', _KEPT, by='class', over=LONG)} / "
                    f"{_rate('mpm_agreement_pixels_total', by='class', over=LONG)}",
                    "{{class}}",
                ),
            ),
        ),
        Panel(
            "Padding",
            "Share of computed tokens that only fill the buffers of captured graphs; 0 without graphs.",
            "percentunit",
            (Query(f"{_PADDING} / ({_PADDING} + {_IN})", "padding"),),
        ),
    ),
)

BATCHING = Board(
    "Segmenter: batching",
    "mpm-batching",
    (
        Panel(
            "Windows per group",
            "Means; under load they should approach max_group_windows.",
            "short",
            (Query(_mean("mpm_group_windows", by="stage"), "stage {{stage}}"),),
        ),
        Panel(
            "Group sizes",
            "Groups per second by their number of windows.",
            "short",
            (Query(_rate("mpm_group_windows_bucket", by="le"), "{{le}}"),),
            heatmap=True,
        ),
        Panel(
            "Why groups were released",
            "full: enough windows; delay: the oldest waited long enough; idle: nothing better to do.",
            "short",
            (Query(_rate("mpm_group_release_total", by="reason"), "{{reason}}"),),
        ),
        Panel(
            "Wait for a group",
            "Of the window of each group that waited longest.",
            "s",
            _quantiles("mpm_group_wait_seconds", 0.5, 0.99, by="stage"),
        ),
        Panel(
            "Waiting windows",
            "By the stage they wait for.",
            "short",
            (Query(f"sum by (stage) ({_metric('mpm_waiting_windows')})", "stage {{stage}}"),),
        ),
        Panel(
            "Waiting tokens",
            "The work that waits: the signal to scale on.",
            "short",
            (Query(f"sum by (instance) ({_metric('mpm_waiting_tokens')})", "{{instance}}"),),
        ),
        Panel(
            "Lengths",
            "Windows per second by their tokens into every stage.",
            "short",
            (Query(_rate("mpm_tokens_per_window_bucket", _MERGING, by="le"), "{{le}}"),),
            heatmap=True,
        ),
        Panel(
            "Queueing of a picture",
            "Between decoding and the last stage.",
            "s",
            _quantiles("mpm_queue_seconds", 0.5, 0.99),
        ),
    ),
)

CAPACITY = Board(
    "Segmenter: capacity",
    "mpm-capacity",
    (
        Panel(
            "Headroom",
            "Share of the measured capacity that is free; below a tenth, add replicas.",
            "percentunit",
            (Query(f"1 - {_OFFERED} / sum ({_metric('mpm_capacity_tokens_per_second')})", "all replicas"),),
        ),
        Panel(
            "Load and capacity",
            "Tokens of pictures per second, before merging. The capacity is measured in the groups that ran, so it "
            "grows with the load while groups still grow.",
            "short",
            (
                Query(_OFFERED, "load"),
                Query(f"sum ({_metric('mpm_capacity_tokens_per_second')})", "capacity"),
            ),
        ),
        Panel(
            "Pictures per second and replica",
            "Even, if the balancer is.",
            "reqps",
            (Query(_rate("mpm_images_total", by="instance"), "{{instance}}"),),
        ),
        Panel(
            "Pictures per second by GPU",
            "And by node: a node below its neighbours has a fault, or too few cores.",
            "reqps",
            (
                Query(_rate("mpm_images_total", by="gpu_product"), "{{gpu_product}}"),
                Query(_rate("mpm_images_total", by="node"), "{{node}}"),
            ),
        ),
        Panel(
            "Capacity of a replica by GPU",
            "Means; tokens of pictures per second that one computes.",
            "short",
            (
                Query(
                    f"avg by (model, gpu_product) ({_metric('mpm_capacity_tokens_per_second')} > 0)",
                    "{{model}} on {{gpu_product}}",
                ),
            ),
        ),
        Panel(
            "Replicas",
            "That serve a model, as Prometheus reaches them.",
            "short",
            (Query(f"count by (model) ({_metric('mpm_model_info')})", "{{model}}"),),
        ),
        Panel(
            "Pictures per GPU-hour",
            "GPUs of the replicas, as DCGM's exporter counts them; where there is none, one device per replica.",
            "short",
            (
                Query(
                    f"3600 * {_rate('mpm_images_total')} / "
                    f"(count ({_GPUS} and on (namespace, pod) {_metric('mpm_model_info')}) "
                    f"or count ({_metric('mpm_model_info')}))",
                    "pictures",
                ),
            ),
        ),
        Panel(
            "Memory of a replica",
            "Resident, of the process that computes.",
            "bytes",
            (Query(f"process_resident_memory_bytes and on (instance) {_metric('mpm_model_info')}", "{{instance}}"),),
        ),
        Panel(
            "Memory of pictures in flight",
            "Bodies, pixels, and what decoding and drawing takes; at max_inflight_mib requests are refused.",
            "bytes",
            (Query(f"sum by (instance) ({_metric('mpm_inflight_bytes')})", "{{instance}}"),),
        ),
        Panel(
            "Processor of a replica",
            "Cores in use by the process that computes.",
            "short",
            (
                Query(
                    f"rate(process_cpu_seconds_total[{RATE}]) and on (instance) {_metric('mpm_model_info')}",
                    "{{instance}}",
                ),
            ),
        ),
        Panel(
            "Age of a replica",
            "Since its process started; a saw tooth means that it keeps dying.",
            "s",
            (
                Query(
                    f"time() - process_start_time_seconds and on (instance) {_metric('mpm_model_info')}",
                    "{{instance}}",
                ),
            ),
        ),
    ),
)

_MONTH = "30d"
_RECORDED_ERRORS, _RECORDED_REQUESTS = (
    _recorded(f"model:mpm_{each}:rate5m", _MONTH) for each in ("errors", "requests")
)
_SPENT = f"{_RECORDED_ERRORS} / {_RECORDED_REQUESTS} / {OBJECTIVE:g}"
_EACH = "{{model}} {{track}}"

OBJECTIVES = Board(
    "Segmenter: objectives",
    "mpm-objectives",
    (
        Panel(
            "Error budget left",
            "Share of the 0.1 % of 30 days' requests that may be 500 or 504, or of the days that Prometheus keeps.",
            "percentunit",
            (Query(f"clamp_min(1 - {_SPENT}, 0)", _EACH),),
        ),
        Panel(
            "Burn rate",
            "How many times faster than the budget allows: at 1 it lasts 30 days, at 14.4 an hour spends a fiftieth. "
            "The alerts are at 14.4 (1 h) and 6 (6 h).",
            "none",
            tuple(
                Query(f"{_recorded(series)} / {OBJECTIVE:g}", f"{_EACH}, {series.rpartition('ratio_rate')[2]}")
                for series in (
                    "model:mpm_errors:ratio_rate5m",
                    "model:mpm_errors:ratio_rate1h",
                    "model:mpm_errors:ratio_rate6h",
                    "model:mpm_errors:ratio_rate1d",
                )
            ),
        ),
        Panel(
            "Until the budget is spent",
            "At the last hour's rate, from what is left; 30 days at the most.",
            "s",
            (
                Query(
                    f"clamp_min(1 - {_SPENT}, 0) * 30 * 86400 "
                    f"/ clamp_min({_recorded('model:mpm_errors:ratio_rate1h')} / {OBJECTIVE:g}, 1)",
                    _EACH,
                ),
            ),
        ),
        Panel(
            "Requests refused",
            "503: overload is no error here, and has its own alert.",
            "percentunit",
            (Query(_recorded("model:mpm_refused:ratio_rate5m"), _EACH),),
        ),
        Panel(
            "Answered within a second",
            "Share of requests, whatever the answer.",
            "percentunit",
            (
                Query(
                    f"{_rate('mpm_request_seconds_bucket', _SECOND, by='model, track')} "
                    f"/ {_rate('mpm_request_seconds_count', by='model, track')}",
                    _EACH,
                ),
            ),
        ),
        Panel(
            "Requests",
            "Per second, what the shares are of.",
            "reqps",
            (Query(_recorded("model:mpm_requests:rate5m"), _EACH),),
        ),
    ),
)

BOARDS = (OVERVIEW, OBJECTIVES, MERGING, BATCHING, CAPACITY)
