"""The release rule of groups: which of the waiting windows run next, together, and on what. Pure functions."""

from collections.abc import Callable, Sequence


def choose_group(
    lengths: Sequence[int],
    bucket: Callable[[int], int],
    *,
    max_batch_tokens: int,
    max_group_windows: int,
) -> list[int]:
    """Choose the windows to run now from those that wait in a lane: the oldest, and mates that cost least padding.

    A runtime that runs every length as it is pads nothing: there the mates are the oldest ones. One that runs a
    window of each length at the length of its bucket runs windows of one bucket together first, then those of the
    nearest ones.

    Args:
        lengths: tokens of each waiting window, oldest first.
        bucket: the length at which the runtime runs a window of some length.
        max_batch_tokens: tokens of a group, padding included. A longer window runs alone.
        max_group_windows: windows of a group.

    Returns:
        Indices into `lengths`, oldest first; empty if nothing waits.
    """
    padded = [bucket(length) for length in lengths]
    mates = range(1, len(lengths))
    if padded != list(lengths):
        mates = sorted(mates, key=lambda i: abs(padded[i] - padded[0]))  # type: ignore[assignment]  # stable
    chosen, room = [0][: len(lengths)], max_batch_tokens - sum(padded[:1])
    for i in mates:
        if padded[i] > room or len(chosen) == max_group_windows:
            break
        chosen.append(i)
        room -= padded[i]
    return sorted(chosen)


def worth_streams(num_waiting: int, num_streams: int) -> bool:
    """Whether windows are computed side by side, one a stream, rather than one after the other on all cores.

    All cores together answer one window soonest, but each core that joins adds less. So streams pay where most of them
    have something to do; a window that waits alone has all cores.
    """
    return 2 * num_waiting > num_streams > 1
