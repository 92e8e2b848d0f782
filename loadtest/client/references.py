"""What is right: the idle servers' masks, which all have to be alike and the library's."""

import base64
import time
from collections.abc import Sequence

from loadtest.settings import LoadSettings

from .masks import OK, MaskError, Reference, check_answer
from .pictures import Item
from .ways import Answer, Client, NoAnswerError

_TRIES = 3
_RETRY_SECONDS = 1.0


class References:
    """The mask of every picture, to check answers under load.

    Attributes:
        library_agreement: share of pixels that all servers have as the library at least, by names of pictures.
    """

    def __init__(self, settings: LoadSettings, client: Client) -> None:
        self.library_agreement: dict[str, float] = {}
        self._settings = settings
        self._client = client
        self._masks: dict[tuple[str, str], Reference] = {}
        self._library = {name: Reference(base64.b64decode(png)) for name, png in settings.library.items()}

    def take(self, pictures: Sequence[Item]) -> None:
        """Ask every idle server for the mask of each picture.

        Raises:
            MaskError: a server does not answer, or with no mask, another than a server before it or the library.
            ValueError: the library made masks of other pictures.
        """
        if strangers := sorted(self._library.keys() - {item.name for item in pictures}):
            raise ValueError(f"library: expected masks of pictures that are sent, got one of {strangers[0]!r}")
        for item in pictures:
            for server in range(len(self._settings.urls)):
                self._take(item, server)

    def check(self, item: Item, answer: Answer) -> tuple[str, float | None]:
        """What became of a request; see `check_answer`."""
        reference = self._masks.get(("raw" if item.kind == "raw" else "png", item.name))
        return check_answer(item, answer, reference, min_agreement=self._settings.min_agreement)

    def _take(self, item: Item, server: int) -> None:
        where = f"{item.name} from {self._settings.urls[server]} when idle"
        answer = self._ask(item, server)
        outcome, _ = self.check(item, answer)
        if outcome != OK:
            said = "" if answer.status == 200 else f": {answer.body[:200]!r}"
            raise MaskError(f"{where}: {outcome}{said}")
        if item.name in self._library:
            self._hold_against_library(item, answer, where)
        self._masks.setdefault((item.kind, item.name), Reference(answer.body))

    def _hold_against_library(self, item: Item, answer: Answer, where: str) -> None:
        least = self._settings.min_agreement
        outcome, agreement = check_answer(item, answer, self._library[item.name], min_agreement=least)
        if agreement is None:
            raise MaskError(f"{where}, held against the library's mask: {outcome}")
        if agreement < least:
            shares = f"{100 * agreement:.4g} % of the pixels agree, expected at least {100 * least:.4g} %"
            raise MaskError(f"{where}: not the library's mask: {shares}")
        self.library_agreement[item.name] = min(agreement, self.library_agreement.get(item.name, 1.0))

    def _ask(self, item: Item, server: int) -> Answer:
        for tried in range(1, _TRIES + 1):
            try:
                answer = self._client.ask(item, server, self._settings.timeout_seconds)
            except (NoAnswerError, TimeoutError) as error:
                raise MaskError(f"{self._settings.urls[server]}: {error or 'no answer in time'}") from None
            if answer.status != 503 or tried == _TRIES:
                return answer
            time.sleep(_RETRY_SECONDS)  # other workers ask too
        raise AssertionError("unreachable")
