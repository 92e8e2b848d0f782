"""Locust's view of a run: who asks."""

from locust import User, constant, task
from locust.exception import StopUser

from .part import Part


class OpenLoopUser(User):
    """Sends requests when they are due. One in every worker."""

    wait_time = constant(0)

    @task
    def run_part(self) -> None:
        """All of the worker's requests."""
        part: Part = self.environment.part
        if part.enter(alone=True):
            part.session.run()
            part.leave()
        raise StopUser


class ClosedLoopUser(User):
    """Asks again as soon as it is answered: how many at most a server can do, and not how long people would wait."""

    wait_time = constant(0)
    stopping = False

    @task
    def run_part(self) -> None:
        """All of this user's requests."""
        part: Part = self.environment.part
        if part.enter():
            part.session.run_user(lambda: self.stopping)
            part.leave()
        raise StopUser

    def on_stop(self) -> None:
        self.stopping = True
