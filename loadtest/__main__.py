"""Load a running server, and write what it did as a page and as JSON.

    python -m loadtest [--url http://127.0.0.1:8080] [--rate 2] [--seconds 30] [--slo p99=800ms,errors=0.1%]
    python -m loadtest worker --master HOST:PORT

Status: 0 if every promise was kept, 1 if one was broken, 2 if there was no run, 3 if the client could not keep up, so
that the run says nothing about the server.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from .client.arrivals import Arrival, write_trace
from .options import limits_of, load_settings, make_parser, masks_of, metrics_of, parse_address, server_pid_of
from .preparing import PAINTED, ensure_painted
from .report.page import told, write_report
from .report.summary import summarize
from .running import RunError, RunResult, run_load, worker_command, worker_environment

KEPT, BROKEN, NO_RUN, NOT_VALID = 0, 1, 2, 3


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["worker"]:
        return _work(argv[1:])
    arguments = make_parser().parse_args(argv)
    try:
        settings, limits = load_settings(arguments), limits_of(arguments)
        metrics, pid = metrics_of(arguments, settings), server_pid_of(arguments, settings)
        if arguments.server_pid and pid is None:
            print(f"server-pid: this user sees nobody listen at {settings.urls[0]} here", file=sys.stderr)
        bind = parse_address("bind", arguments.bind) if arguments.bind else None
        if arguments.pictures is None:
            ensure_painted(arguments.paint)
        settings = replace(settings, library=masks_of(arguments, metrics))
        result = run_load(settings, metrics=metrics, server_pid=pid, bind=bind, log=arguments.log)
        summary = summarize(settings, result, limits)
        write_report(summary, arguments.out)
        if arguments.save_trace:
            write_trace(arguments.save_trace, _sent(result))
    except (OSError, ValueError, RunError) as error:
        print(error, file=sys.stderr)
        return NO_RUN
    except KeyboardInterrupt:
        return NO_RUN
    print(told(summary))
    print(f"\n{arguments.out}")
    if arguments.print_json:
        print(json.dumps(summary, allow_nan=False))
    if not summary["valid"]:
        return NOT_VALID
    return KEPT if summary["held"] else BROKEN


def _work(argv: Sequence[str]) -> int:  # noqa: RET503  (this process becomes another)
    parser = argparse.ArgumentParser(prog="python -m loadtest worker", description="Send for a master elsewhere.")
    parser.add_argument("--master", required=True, metavar="HOST:PORT")
    parser.add_argument("--paint", type=Path, default=PAINTED, help="folder of pictures, painted if it has none")
    arguments = parser.parse_args(argv)
    try:
        host, port = parse_address("master", arguments.master)
        ensure_painted(arguments.paint)
    except (ValueError, RunError) as error:
        print(error, file=sys.stderr)
        return NO_RUN
    command = worker_command(host, port)
    os.execve(command[0], command, worker_environment())


def _sent(result: RunResult) -> list[Arrival]:
    """By the file's own names, but for what is bad: that is made anew."""
    return [Arrival(record.at, "" if record.kind == "bad" else record.name, record.kind) for record in result.records]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started has to be stopped
    sys.exit(main())
