"""Masks of many pictures: found, shared among processes, answered a few at a time, and written whole or not at all."""

import glob
import os
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from handlers.client import AnswerError, Client, NoAnswerError, fetch

MEDIA_TYPES = {"png": "image/png", "json": "application/json", "npy": "application/x-npy"}  # of masks; else views

# Of an engine that nobody else asks, and that takes its time.
ALONE: dict[str, Any] = {"deadline_seconds": 86_400.0, "agreement_fraction": 0, "agreement_min_fraction": 0}
_ROOM_SECONDS = 0.02  # until it is asked again whether it has room
_ASKED_SECONDS = 900.0  # for a picture, from a server that may be started again meanwhile
_TRIES = 60
_NOT_OF_A_PICTURE = (401, 403, 404, 405)
_ASKED = 16  # pictures on their way to a server
_LINE_SECONDS = 30.0  # between two lines of progress, where there is no terminal

Ask = Callable[[bytes], Mapping[str, bytes]]


class BadPictureError(Exception):
    """A picture was not segmented; the message says why."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One of several parts of the pictures; which part one belongs to depends on its name alone."""

    index: int
    count: int

    def has(self, name: str) -> bool:
        return zlib.crc32(name.encode(errors="surrogateescape")) % self.count == self.index


@dataclass(frozen=True, slots=True)
class Job:
    """A picture, and where its answers go, without their suffixes."""

    picture: str
    stem: str

    def target(self, form: str) -> str:
        return f"{self.stem}.{form}" if form in MEDIA_TYPES else f"{self.stem}.{form}.png"


def find_jobs(sources: Sequence[str], out: Path, shard: Shard) -> list[Job]:
    """A shard's pictures of files, folders and patterns, with the folders below kept in `out`.

    Names that would differ in their suffix alone keep it. Hidden files and `out` itself are left out.

    Raises:
        ValueError: there is no picture, two have one name, or an answer might replace a picture.
    """
    jobs: dict[str, Job] = {}
    num_found = 0
    for paths in _groups(sources, out):
        num_found += len(paths)
        stems = Counter(os.path.splitext(name)[0] for name in paths.values())
        for path, name in paths.items():
            short = os.path.splitext(name)[0]
            stem = short if stems[short] == 1 else name
            if not shard.has(stem):
                continue
            if stem in jobs:
                raise ValueError(f"PICTURE: expected names that differ, got {jobs[stem].picture} and {path}")
            jobs[stem] = Job(path, str(out / stem))
    if not num_found:
        raise ValueError("PICTURE: expected pictures, got folders without any")
    return list(jobs.values())


def _groups(sources: Sequence[str], out: Path) -> Iterator[dict[str, str]]:
    """Pictures by path with their names below `out`; those whose names may differ in their suffix alone together."""
    named: dict[str, str] = {}
    for source in sources:
        if os.path.isdir(source):
            yield from _walk(source, out)
        elif glob.has_magic(source) and not os.path.lexists(source):
            parts = Path(source).parts
            root = Path(*parts[: next(i for i, part in enumerate(parts) if glob.has_magic(part))])
            for path in sorted(glob.glob(source, recursive=True)):
                if os.path.isdir(path):
                    yield from _walk(path, out, os.path.relpath(path, root))
                else:
                    named[path] = os.path.relpath(path, root)
        elif other := next((path for path, name in named.items() if name == os.path.basename(source)), None):
            raise ValueError(f"PICTURE: expected names that differ, got {other} and {source}")
        else:
            named[source] = os.path.basename(source)
    for path in named:
        _check_apart(os.path.dirname(path), out, os.path.basename(path))
    yield named


def _walk(folder: str, out: Path, below: str = ".") -> Iterator[dict[str, str]]:
    """The files of a folder, and of those in it."""
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and not _is_same(os.path.join(parent, name), out)
        )
        names = sorted(name for name in names if not name.startswith("."))
        if names:
            _check_apart(parent, out, names[0])
            inner = os.path.normpath(os.path.join(below, os.path.relpath(parent, folder)))
            yield {os.path.join(parent, name): os.path.normpath(os.path.join(inner, name)) for name in names}


def _check_apart(folder: str, out: Path, name: str) -> None:
    if _is_same(folder or ".", out):
        raise ValueError(f"--out: expected a folder without the pictures, got one with {name}")


def _is_same(folder: str, out: Path) -> bool:
    return os.path.realpath(folder) == os.path.realpath(out)


def segment_jobs(jobs: Sequence[Job], ask: Ask, forms: Sequence[str], *, at_once: int) -> dict[str, str]:
    """Write the answers of pictures, with a bar of progress.

    Args:
        ask: gives the answer of a picture in each form.
        forms: of the answers.
        at_once: pictures read, asked for or written at a time; no more are in memory.

    Returns:
        What is wrong with the pictures that failed, by file.

    Raises:
        OSError: an answer can't be written, or the server is gone.
    """
    failed: dict[str, str] = {}

    def work(job: Job) -> None:
        try:
            with open(job.picture, "rb") as file:
                picture = file.read()
        except OSError as error:
            raise BadPictureError(error.strerror) from None
        answers = ask(picture)
        for form in forms:
            write_whole(job.target(form), answers[form])

    lines = not sys.stderr.isatty()
    with tqdm(
        total=len(jobs),
        unit=" pictures",
        smoothing=0.1,
        dynamic_ncols=True,
        mininterval=_LINE_SECONDS if lines else 0.1,
        delay=_LINE_SECONDS if lines else 0.0,
        bar_format="{n_fmt} of {total_fmt} pictures, {rate_fmt}, {remaining} left{postfix}\n" if lines else None,
    ) as bar:
        for job, done in _bounded(work, jobs, at_once):
            try:
                done.result()
            except BadPictureError as error:
                failed[job.picture] = str(error)
                bar.set_postfix(bad=len(failed), refresh=False)
            bar.update()
    return failed


def _bounded(work: Callable[[Job], None], jobs: Iterable[Job], at_once: int) -> Iterator[tuple[Job, "Future[None]"]]:
    """Jobs as they are done in threads; no more than twice as many as there are threads wait or are under way."""
    pool = ThreadPoolExecutor(at_once)
    under_way: dict[Future[None], Job] = {}
    try:
        for job in jobs:
            under_way[pool.submit(work, job)] = job
            if len(under_way) >= 2 * at_once:
                for done in wait(under_way, return_when=FIRST_COMPLETED).done:
                    yield under_way.pop(done), done
        while under_way:
            for done in wait(under_way, return_when=FIRST_COMPLETED).done:
                yield under_way.pop(done), done
    finally:
        pool.shutdown(cancel_futures=True)


def write_whole(target: str, data: bytes) -> None:
    """Write a file so that it is never there in part: under a hidden name beside it at first."""
    folder = os.path.dirname(target)
    os.makedirs(folder, exist_ok=True)
    number, name = tempfile.mkstemp(suffix=".part", prefix=".", dir=folder)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(data)
        os.chmod(name, 0o666 & ~_UMASK)
        os.replace(name, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


_UMASK = _umask()  # read where there are no threads yet


def _is_written(target: str) -> bool:
    try:
        return os.stat(target).st_size > 0
    except FileNotFoundError:
        return False


@contextmanager
def asking_server(url: str, forms: Sequence[str], options: Mapping[str, Any]) -> Iterator[tuple[Ask, int]]:
    """What asks a server, once for each form, and how many pictures at once.

    Raises:
        NoAnswerError: nobody is there.
    """

    def ask(picture: bytes) -> dict[str, bytes]:
        try:
            return {
                form: client.ask(
                    picture, MEDIA_TYPES.get(form, "image/png"), view=None if form in MEDIA_TYPES else form, **options
                ).body
                for form in forms
            }
        except NoAnswerError:
            raise  # for good: no other picture would be answered
        except AnswerError as error:
            if error.status in _NOT_OF_A_PICTURE:
                raise OSError(f"{url}: {error}") from None
            raise BadPictureError(str(error)) from None

    with Client(url, timeout_seconds=_ASKED_SECONDS, retries=_TRIES) as client:
        if not client.is_ready() and not _answers(url):  # a gateway may pass the model's own path alone
            raise NoAnswerError(f"{url}: no server is there; start one with mpm serve")
        yield ask, _ASKED


def _answers(url: str) -> bool:
    try:
        return fetch(url).status > 0
    except (OSError, ValueError):
        return False


@contextmanager
def asking_engine(
    checkpoint: Path, forms: Sequence[str], fields: Mapping[str, Any], fit: str | None
) -> Iterator[tuple[Ask, int]]:
    """What asks the servers' own engine in this process, and how many pictures keep it busy.

    Raises:
        OSError, ValueError: the checkpoint or a field of the configuration does not fit.
    """
    from handlers.api.options import RequestOptions
    from handlers.config import ServingConfig
    from handlers.engine.loading import load_engine
    from handlers.errors import ErrorKind, ServingError
    from mpm_ops.stages import parse_schedule

    if isinstance(fields.get("schedule"), str):
        fields = {**fields, "schedule": parse_schedule(fields["schedule"])}
    config = ServingConfig.from_mapping({"codec_threads": max(2, (os.cpu_count() or 2) // 2), **fields, **ALONE})
    options = RequestOptions(request_id="mpm", format=forms[0], also=tuple(forms[1:]), fit=fit)

    def ask(picture: bytes) -> Mapping[str, bytes]:
        while True:
            try:
                bodies: Mapping[str, bytes] = engine.submit(picture, options).result().bodies
                return bodies
            except ServingError as error:
                if error.kind is not ErrorKind.OVERLOADED:
                    raise BadPictureError(str(error)) from None
            time.sleep(_ROOM_SECONDS)  # those under way hold all the memory that pictures may

    with closing(load_engine(checkpoint, config)) as engine:
        yield ask, 2 * config.max_group_windows + 2 * config.codec_threads


def segment_pictures(
    sources: Sequence[str],
    out: Path,
    asking: AbstractContextManager[tuple[Ask, int]],
    forms: Sequence[str],
    *,
    shard: Shard,
    resume: bool,
) -> int:
    """Segment pictures, and tell on standard error what became of them.

    Returns:
        1 where a picture failed, else 0.

    Raises:
        ValueError: see `find_jobs`.
        OSError: see `segment_jobs`.
    """
    jobs = find_jobs(sources, out, shard)
    left = [job for job in jobs if not (resume and all(_is_written(job.target(form)) for form in forms))]
    told = [f"{len(jobs) - len(left)} were there"] if len(left) < len(jobs) else []
    failed: dict[str, str] = {}
    seconds = 0.0
    if left:
        with asking as (ask, at_once):
            start = time.monotonic()
            failed = segment_jobs(left, ask, forms, at_once=at_once)
            seconds = time.monotonic() - start
    told += [f"{len(failed)} failed:"] if failed else []
    wrote = f"{len(left) - len(failed)} of {len(jobs)} pictures written to {out} in {seconds:.1f} s"
    print(", ".join([wrote, *told]), file=sys.stderr)
    for picture, error in sorted(failed.items()):
        print(f"{picture}: {error}", file=sys.stderr)
    return 1 if failed else 0
