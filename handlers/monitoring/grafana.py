"""Write the dashboards as JSON for Grafana.

python -m handlers.monitoring.grafana --out k8s/monitoring/dashboards
"""

import argparse
import itertools
import json
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef, GridPos, VariableRefresh
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from .boards import BOARDS, Board, Panel

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
        .with_variable(
            dashboard.QueryVariable("model")
            .label("Model")
            .datasource(_SOURCE)
            .query("label_values(mpm_model_info, model)")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .include_all(True)
            .all_value(".+")
            .multi(True)
        )
    )
    for i, panel in enumerate(board.panels):
        row, column = divmod(i, _COLUMNS)
        builder = builder.with_panel(
            _panel(panel).id(i + 1).grid_pos(GridPos(h=_HEIGHT, w=_WIDTH, x=column * _WIDTH, y=row * _HEIGHT))
        )
    return json.dumps(builder.build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def _panel(panel: Panel) -> heatmap.Panel | timeseries.Panel:
    legend = common.VizLegendOptions().show_legend(True)
    builder = heatmap.Panel() if panel.heatmap else timeseries.Panel().min(0).legend(legend)
    builder = builder.title(panel.title).description(panel.about).unit(panel.unit).datasource(_SOURCE)
    for query, letter in zip(panel.queries, itertools.count(ord("A"))):
        target = prometheus.Dataquery().expr(query.expr).legend_format(query.legend).ref_id(chr(letter)).range()
        builder = builder.with_target(target.format(PromQueryFormat.HEATMAP) if panel.heatmap else target)
    return builder


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m handlers.monitoring.grafana", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for one JSON file per dashboard")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for board in BOARDS:
        (out / f"{board.uid}.json").write_text(render(board))


if __name__ == "__main__":
    main()
