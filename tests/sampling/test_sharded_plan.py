"""The plan of a run, and the protocol by which processes share it: whatever ends when, each shard is drawn once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tarflow_fast.sampling.sharded.plan import ShardPlan

PLANS = st.builds(
    ShardPlan, first=st.integers(0, 2**40), n=st.integers(1, 500), size=st.one_of(st.integers(1, 40), st.just(10**6))
)


@given(PLANS)
def test_shards_divide_the_images(plan: ShardPlan) -> None:
    shards = [plan.numbers(shard) for shard in range(len(plan))]
    assert [i for numbers in shards for i in numbers] == list(range(plan.first, plan.first + plan.n))
    assert all(len(numbers) == plan.size for numbers in shards[:-1])
    assert 1 <= len(shards[-1]) <= plan.size


@given(PLANS)
def test_names_are_in_the_order_of_shards(plan: ShardPlan) -> None:
    names = [plan.name(shard) for shard in range(len(plan))]
    assert names == sorted(set(names))


def test_names_of_very_many() -> None:
    plan = ShardPlan(0, 10**6, 1)
    assert (plan.name(0), plan.name(999_999)) == ("000000", "999999")


@given(PLANS, st.integers(1, 70), st.data())
def test_each_process_tries_all_shards(plan: ShardPlan, world: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, world - 1))
    order = list(plan.order(rank, world))
    assert sorted(order) == list(range(len(plan)))
    if world <= len(plan):  # they begin apart
        assert len({next(plan.order(other, world)) for other in range(world)}) == world


class _Process:
    """A `_Process` goes through the shards as `Run.draw` does, in steps between which any other may act."""

    def __init__(self, plan: ShardPlan, rank: int, world: int):
        self.order, self.claimed = list(plan.order(rank, world)), None

    def step(self, done: set[int], claims: set[int], drawn: list[int]) -> None:
        if self.claimed is not None:
            drawn.append(self.claimed)
            done.add(self.claimed)
            self.die(claims)
            return
        for shard in self.order:
            if shard not in done and shard not in claims:
                claims.add(shard)
                self.claimed = shard
                return

    def die(self, claims: set[int]) -> None:
        claims.discard(-1 if self.claimed is None else self.claimed)
        self.claimed = None


@given(PLANS.filter(lambda plan: len(plan) <= 60), st.data())
def test_whatever_ends_each_shard_is_drawn_once(plan: ShardPlan, data: st.DataObject) -> None:
    """Processes step at random, die at random, and are restarted, as many as may be."""
    done: set[int] = set()
    drawn: list[int] = []
    for _ in range(data.draw(st.integers(1, 4))):
        claims: set[int] = set()
        world = data.draw(st.integers(1, 5))
        alive = [_Process(plan, rank, world) for rank in range(world)]
        for who, dies in data.draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=40)):
            if not alive:
                break
            process = alive[who % len(alive)]
            if dies == 0:
                process.die(claims)
                alive.remove(process)
            else:
                process.step(done, claims, drawn)
        assert len(claims) == sum(process.claimed is not None for process in alive)
    last = _Process(plan, 0, 1)
    while len(done) < len(plan):
        last.step(done, set(), drawn)
    assert sorted(drawn) == list(range(len(plan)))
