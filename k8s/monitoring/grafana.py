"""The dashboards as JSON for Grafana; `python -m k8s.generate` writes them."""

import itertools
import json
import re
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, text, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef, GridPos, VariableRefresh
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from grafana_foundation_sdk.models.text import TextMode

from .boards import BOARDS, VARIABLES, Board, Panel

RUNBOOK = Path(__file__).resolve().parent / "runbook.md"
RUNBOOK_UID = "mpm-runbook"

_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_WIDTH, _HEIGHT, _COLUMNS = 12, 8, 2  # in Grafana's grid of 24 columns


def render(board: Board) -> str:
    """A board as Grafana imports it."""
    builder = (
        dashboard.Dashboard(board.title)
        .uid(board.uid)
        .tags(["segmenter", "mpm"])
        .refresh("10s")
        .time("now-1h", "now")
        .timezone("browser")
        .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    )
    for name, label in VARIABLES.items():
        builder = builder.with_variable(_variable(name).label(label))
    for i, panel in enumerate(board.panels):
        row, column = divmod(i, _COLUMNS)
        builder = builder.with_panel(
            _panel(panel).id(i + 1).grid_pos(GridPos(h=_HEIGHT, w=_WIDTH, x=column * _WIDTH, y=row * _HEIGHT))
        )
    return json.dumps(builder.build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def _variable(name: str) -> dashboard.QueryVariable:
    """A label to choose by, among what those before it leave; all of them is also none."""
    before = list(VARIABLES)[: list(VARIABLES).index(name)]
    matchers = ", ".join(f'{label}=~"${label}"' for label in before)
    return (
        dashboard.QueryVariable(name)
        .datasource(_SOURCE)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .include_all(True)
        .multi(True)
        .query(f"label_values(mpm_model_info{{{matchers}}}, {name})")
        .all_value(".*")
    )


def render_runbook(markdown: str) -> str:
    """The runbook as a board, a panel per alert, so that an alert can link to its own: panel 1 is the first entry.

    Raises:
        ValueError: it names a board that isn't there.
    """
    boards = {board.title.removeprefix("Segmenter: "): board.uid for board in BOARDS}
    _, *entries = re.split(r"^## ", markdown, flags=re.MULTILINE)
    builder = dashboard.Dashboard("Segmenter: runbook").uid(RUNBOOK_UID).tags(["segmenter", "mpm"])
    for i, entry in enumerate(entries):
        title, _, told = entry.partition("\n")
        linked = re.sub(r"\*([A-Z]\w+)\*", lambda named: _link(named[1], boards), told.strip())
        panel = text.Panel().title(title).mode(TextMode.MARKDOWN).content(linked)
        row, column = divmod(i, _COLUMNS)
        place = GridPos(h=_HEIGHT, w=_WIDTH, x=column * _WIDTH, y=row * _HEIGHT)
        builder = builder.with_panel(panel.id(i + 1).grid_pos(place))
    return json.dumps(builder.build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def _link(title: str, boards: dict[str, str]) -> str:
    if title.lower() not in boards:
        raise ValueError(f"runbook: expected a board, one of {', '.join(boards)}, got {title}")
    return f"[{title}](/d/{boards[title.lower()]})"


def _panel(panel: Panel) -> heatmap.Panel | timeseries.Panel:
    legend = common.VizLegendOptions().show_legend(True)
    builder = heatmap.Panel() if panel.heatmap else timeseries.Panel().min(0).legend(legend)
    builder = builder.title(panel.title).description(panel.about).unit(panel.unit).datasource(_SOURCE)
    for query, letter in zip(panel.queries, itertools.count(ord("A"))):
        target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(chr(letter)).range()
        if panel.exemplars:
            target = target.exemplar(True)
        builder = builder.with_target(target.format(PromQueryFormat.HEATMAP) if panel.heatmap else target)
    return builder
