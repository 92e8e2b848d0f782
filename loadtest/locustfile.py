"""Load on a served model, for locust; see README.md.

    locust -f loadtest/locustfile.py --host http://127.0.0.1:8080                    its page: http://127.0.0.1:8089
    locust -f loadtest/locustfile.py --headless -u 8 -r 8 -t 1m                      each user waits for its answer
    locust -f loadtest/locustfile.py --headless --rate 20 -t 1m --slo p99=800ms --report report.html

Everything of locust works as it does elsewhere: --master and --worker, --processes, --csv, --html, --tags. What is
added: requests that do not wait for answers (`--rate`), every mask checked, promises that set the exit status, and a
report.

Exit status with `--headless`: 0 if every promise was kept, 1 if one was broken, 2 if there was no run, 3 if the client
could not keep up, so that the run says nothing about the server.
"""

import sys
from pathlib import Path

if (_ROOT := str(Path(__file__).resolve().parents[1])) not in sys.path:
    sys.path.insert(0, _ROOT)  # `locust -f` looks only beside this file

from locust import User, constant, events, tag, task
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import Runner, WorkerRunner

from loadtest.controller import Controller, Worker
from loadtest.options import OPEN_LOOP_USERS, LoadSettings, add_arguments
from loadtest.protocols import PROTOCOLS
from loadtest.shapes import SHAPES

events.init_command_line_parser.add_listener(add_arguments)


class SegmentUser(User):
    """Sends pictures and checks the masks.

    The tags of the tasks are the kinds of requests, so that `--tags` chooses among them. A seeded mix decides the kind
    of each request (`--accept`, `--raw`, `--bad`), so that any number of workers send the same.
    """

    wait_time = constant(0)

    def _send(self) -> None:
        share = self.environment.worker.share
        request = share and share.next_request()
        if not request:
            raise StopUser
        share.send(request)

    @tag("png")
    @task
    def png(self) -> None:
        """Ask for a mask as PNG."""
        self._send()

    @tag("json")
    @task
    def description(self) -> None:  # `json` is a method of every user, for the page
        """Ask for a description as JSON."""
        self._send()

    @tag("raw")
    @task
    def raw(self) -> None:
        """Send an uncompressed frame."""
        self._send()

    @tag("bad")
    @task
    def bad(self) -> None:
        """Send what is no picture and has to be refused."""
        self._send()


@events.init.add_listener
def _wire(environment: Environment, runner: Runner, **_: object) -> None:
    options = environment.parsed_options
    assert options is not None
    if not isinstance(runner, WorkerRunner):
        environment.host = environment.host or PROTOCOLS[options.protocol].host
        if options.rate:
            options.num_users = options.num_users or OPEN_LOOP_USERS
            options.spawn_rate = options.spawn_rate or options.num_users
        try:
            LoadSettings.read(options, environment.host)
        except ValueError as error:
            print(error, file=sys.stderr)
            sys.exit(2)
        environment.available_shape_classes = {shape.__name__: shape() for shape in SHAPES}
        for shape in environment.available_shape_classes.values():
            shape.runner = runner
        if options.shape or options.headless or options.autostart:  # a shape counts time from the first request
            environment.shape_class = environment.available_shape_classes[(options.shape or "steady").capitalize()]
        environment.run = Controller(environment)  # type: ignore[attr-defined]
    environment.worker = Worker(environment)  # type: ignore[attr-defined]
