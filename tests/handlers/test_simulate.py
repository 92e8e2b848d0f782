import pytest

from handlers.bench.simulate import Profile, Rules, Simulation, paper_profiles, poisson
from handlers.engine.grouping import GroupCost

COST = GroupCost(launch=0.001, token=1e-5)
TWO_STAGES = Profile(name="test", source="made up", stages=(COST, COST))
WINDOWS = [(100, 50 + i % 7) for i in range(200)]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("rate", [10, 300, 5000])
def test_every_window_is_answered_or_refused_once(rate: int, padded: bool) -> None:
    rules = Rules(padded=padded, max_group_windows=4, pool_windows=8)
    outcome = Simulation(TWO_STAGES, rules, WINDOWS, max_inflight=30).run(poisson(rate, len(WINDOWS)))
    assert outcome.done + outcome.refused == len(WINDOWS)
    assert [sum(sizes) for sizes in outcome.groups] == [outcome.done] * 2
    assert max(outcome.groups[0]) <= 4
    assert 0 < outcome.occupancy <= 1
    assert min(outcome.waits) >= -1e-9


def test_clients_keep_their_number_in_flight_until_the_windows_run_out() -> None:
    outcome = Simulation(TWO_STAGES, Rules(max_group_windows=4, pool_windows=4), WINDOWS).run([0.0] * 8, closed=True)
    assert outcome.done == len(WINDOWS)
    assert outcome.occupancy == pytest.approx(1)
    assert outcome.groups[0] == [4] * 50


@pytest.mark.parametrize("padded", [False, True])
def test_a_window_alone_never_waits(padded: bool) -> None:
    rules = Rules(padded=padded, max_group_windows=8, pool_windows=32, max_group_delay=10.0)
    outcome = Simulation(TWO_STAGES, rules, WINDOWS[:3]).run([0.0, 1.0, 2.0])
    alone = [COST(1, first) + COST(1, second) for first, second in WINDOWS[:3]]
    assert outcome.waits == pytest.approx([0.0] * 3)
    assert outcome.latencies == pytest.approx(alone)
    assert outcome.reasons == {"idle": 6}


def test_who_comes_while_the_device_computes_waits_for_it() -> None:
    one_stage = Profile(name="test", source="made up", stages=(GroupCost(launch=1.0, token=0.0),))
    outcome = Simulation(one_stage, Rules(), [(10,), (10,), (10,)]).run([0.0, 0.25, 0.5])
    assert outcome.groups == [[1, 2]]
    assert outcome.waits == pytest.approx([0.0, 0.75, 0.5])
    assert outcome.seconds == pytest.approx(2.0)


def test_whoever_exceeds_the_limit_is_refused() -> None:
    one_stage = Profile(name="test", source="made up", stages=(GroupCost(launch=1.0, token=0.0),))
    outcome = Simulation(one_stage, Rules(), [(10,)] * 4, max_inflight=2).run([0.0, 0.1, 0.2, 1.5])
    assert (outcome.done, outcome.refused) == (3, 1)


def test_equal_lengths_need_no_padding_and_packed_groups_never_do() -> None:
    equal = Simulation(TWO_STAGES, Rules(padded=True), [(100, 64)] * 50).run([0.0] * 50)
    ragged = Simulation(TWO_STAGES, Rules(padded=True), WINDOWS).run([0.0] * 200)
    packed = Simulation(TWO_STAGES, Rules(), WINDOWS).run([0.0] * 200)
    assert equal.padding == [0, 0]
    assert ragged.padding[1] > 0
    assert packed.padding == [0, 0]
    assert packed.computed == [sum(window[stage] for window in WINDOWS) for stage in range(2)]


def test_a_packed_group_costs_its_windows_and_one_launch() -> None:
    profile = Profile(name="test", source="made up", stages=(GroupCost(launch=5.0, token=1.0, pair=0.5),))
    assert profile.seconds(0, [2, 4], padded=False) == 5 + (2 + 0.5 * 4) + (4 + 0.5 * 16)
    assert profile.seconds(0, [2, 4], padded=True) == 5 + 2 * (4 + 0.5 * 16)


def test_capacity_is_what_full_groups_of_equal_windows_reach() -> None:
    windows = [(100, 50)] * 400
    rules = Rules(max_group_windows=8, pool_windows=8)
    outcome = Simulation(TWO_STAGES, rules, windows).run([0.0] * 16, closed=True)
    assert outcome.done / outcome.seconds == pytest.approx(TWO_STAGES.capacity(windows, 8))


def test_paper_profiles_give_back_the_published_block_times() -> None:
    float32, bfloat16 = paper_profiles()
    blocks_and_merge = 2 * 5.73e-3 + 0.994e-3
    assert float32.stages[0](32, 1025) == pytest.approx(blocks_and_merge + 3e-4, rel=0.02)  # three assumed launches
    assert bfloat16.stages[2](32, 3020) == pytest.approx(9 * 3.876e-3 + 9e-4, rel=0.02)


def test_poisson_arrivals_have_the_rate_asked_for() -> None:
    arrivals = poisson(50, 5000)
    assert arrivals == sorted(arrivals)
    assert len(arrivals) / arrivals[-1] == pytest.approx(50, rel=0.05)
