"""How a reduction is shared between tokens and parameters: filling a plan, cutting tokens, and the descent, by hand."""

import math
from dataclasses import replace

import pytest
import torch
from test_engine import counted, one_pair

from comp_cli.engine import flops
from comp_cli.engine.allocation import AllocationState, Cut, Judged, Look, Space, descend
from comp_cli.engine.schedule import Floors


@pytest.fixture(scope="module")
def prices(dense):
    """Random ones, of every unit."""
    random = torch.Generator().manual_seed(0)
    return {
        (tower.name, index, part): torch.rand(len(units.units), generator=random, dtype=torch.double)
        for tower in dense.plan.towers
        for index, layer in enumerate(tower.layers)
        for part, units in layer.parts.items()
    }


@pytest.fixture(scope="module")
def space(dense, prices):
    return Space(dense.plan, dense.reference, prices)


def total(dense, plan) -> int:
    return flops.count(plan, dense.reference).total


def test_the_cheapest_per_flops_go_and_the_dearer_stay(dense, prices, space):
    plan = space.remove_cheapest(dense.plan, 0.6 * total(dense, dense.plan))
    rows = {(row.tower, row.layer): row for row in flops.count(dense.plan, dense.reference).layers}
    gone, kept = [], []
    for tower in plan.towers:
        for index, layer in enumerate(tower.layers):
            for part, units in layer.parts.items():
                price = prices[tower.name, index, part]
                cost = rows[tower.name, index].parts[part] / len(price)
                here = set(units.units)
                assert all(price[a] <= price[b] for a in range(len(price)) if a not in here for b in here)
                if part != "ffn":  # heads go one by one
                    gone += [float(price[unit]) / cost for unit in range(len(price)) if unit not in here]
                    kept += [float(price[unit]) / cost for unit in sorted(here, key=lambda u: price[u])[:-1]]
                else:
                    assert len(here) % 8 == 0 and len(here) >= math.ceil(0.1 * len(price) / 8) * 8
    assert gone and kept and max(gone) <= min(kept)


def test_as_little_goes_as_is_enough(dense, space):
    target = 0.6 * total(dense, dense.plan)
    plan = space.remove_cheapest(dense.plan, target)
    assert 0.98 * target < total(dense, plan) <= target


def test_floors_hold_where_all_should_go(dense, space):
    plan = space.remove_cheapest(dense.plan, 0)
    for tower in plan.towers:
        for layer in tower.layers:
            assert {part: len(units.units) for part, units in layer.parts.items()} == {
                part: 24 if part == "ffn" else 1 for part in layer.parts
            }


def test_heads_that_rank_tokens_stay(dense, space):
    plan = space.cut_tokens(dense.plan, "vision", 1, 0.7 * total(dense, dense.plan))
    assert space.ranking_parts(plan) == {("vision", 1, "attention")}
    smallest = space.remove_cheapest(plan, 0)
    heads = [len(layer.kept("attention")) for layer in smallest.tower("vision").layers]
    assert heads == [1, 6, 1, 1, 1]


def test_a_cut_keeps_as_many_tokens_as_the_flops_allow(dense, space):
    target = 0.8 * total(dense, dense.plan)
    plan = space.cut_tokens(dense.plan, "vision", 1, target)
    kept = [layer.keep.get("vision") for layer in plan.tower("vision").layers]
    assert [keep is None for keep in kept] == [True, False, True, True, True]
    assert space.kept(plan, "vision", 1) == kept[1]
    more = space.keeping(dense.plan, "vision", 1, kept[1] + 1)
    assert total(dense, plan) <= target < total(dense, more)


def test_a_cut_that_floors_forbid_is_none(dense, space):
    assert space.cut_tokens(dense.plan, "vision", 4, 0.2 * total(dense, dense.plan)) is None


def test_parts_that_should_stay_stay(dense, space):
    stay = frozenset({("vision", 0, "ffn"), ("language", 2, "attention")})
    smallest = replace(space, stay=stay).remove_cheapest(dense.plan, 0)
    whole = {
        (tower.name, index, part)
        for tower in smallest.towers
        for index, layer in enumerate(tower.layers)
        for part, units in layer.parts.items()
        if units == dense.plan.tower(tower.name).layers[index].parts[part]
    }
    assert whole == stay


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("cuts", [{}, {"vision": Cut(1, 0.5)}, {"vision": Cut(0, 0.35), "language": Cut(1, 0.5)}])
def test_candidates_have_the_ratio_as_it_runs(dense, inputs, space, ratio, cuts):
    plan = space.candidate(ratio, cuts)
    before, after = (counted(dense.runtime(p), one_pair(inputs)) for p in (dense.plan, plan))
    assert 1 - after / before == pytest.approx(ratio, abs=0.01)


def test_a_candidate_out_of_reach_is_none(space):
    assert space.candidate(0.99, {}) is None
    assert replace(space, floors=Floors(tokens=36)).candidate(0.02, {"vision": Cut(0, 0.95)}) is None


class Landscape:
    """A loss for every cut, lowest at a layer and a share; remembers what it was asked."""

    def __init__(self, layer: int, share: float, none: float, reach=lambda cut: True, depths=(1 / 6,)):
        self.layer, self.share, self.none, self.reach, self.depths = layer, share, none, reach, depths
        self.asked: list[dict[str, Cut]] = []
        self.told: list[Look] = []

    def look(self, cuts):
        self.asked.append(cuts)
        loss = self.none
        for cut in cuts.values():
            loss = abs(cut.layer - self.layer) + 10 * abs(cut.share - self.share) if self.reach(cut) else None
        return Look(cuts, {}, 0.5, None if loss is None else Judged(loss, 2, loss))

    def run(self, known=()):
        return descend(self.look, {"vision": (12, self.depths)}, self.told.append, list(known))


@pytest.mark.parametrize(("layer", "share"), [(2, 0.5), (5, 0.2), (0, 0.875), (2, 0.575)])
def test_the_descent_finds_the_lowest_place(layer, share):
    best = Landscape(layer, share, none=99.0).run()
    assert best.cuts["vision"].layer == layer and best.cuts["vision"].share == pytest.approx(share, abs=0.04)


def test_a_descent_that_is_caught_is_saved_by_another():
    class Two(Landscape):
        """A shallow valley at layer 3, a deep one at layer 0."""

        def look(self, cuts):
            found = super().look(cuts)
            deep = 2 * abs(cuts["vision"].share - 0.8) - 3 if cuts and cuts["vision"].layer == 0 else math.inf
            return replace(found, judged=Judged(min(found.loss, deep), 2, deep))

    assert Two(3, 0.5, none=9.0).run().cuts["vision"].layer == 3
    assert Two(3, 0.5, none=9.0, depths=(0.0, 1 / 4)).run().cuts == {"vision": Cut(0, 0.8)}


def test_no_second_descent_begins_where_far_more_is_lost():
    """Of two valleys, the deep one at layer 0: there three times as much is lost as where the first descent begins, or more."""

    class Two(Landscape):
        def __init__(self, begin):
            super().__init__(6, 0.5, none=99.0, depths=(0.0, 1 / 2))
            self.begin = begin

        def look(self, cuts):
            found = super().look(cuts)
            if not cuts or cuts["vision"].layer > 0:
                return replace(found, judged=Judged(1 + found.loss, 2, 1.0))
            return replace(found, judged=Judged(self.begin - 13 * abs(cuts["vision"].share - 0.5), 2, 1.0))

    assert Two(2.9).run().cuts["vision"].layer == 0
    far = Two(3.1)
    assert far.run().cuts == {"vision": Cut(6, 0.5)}
    assert sum(cuts.get("vision", Cut(1, 0)).layer == 0 for cuts in far.asked) == 1


def test_no_cut_is_taken_where_none_is_better():
    assert Landscape(3, 0.5, none=-1.0).run().cuts == {}


def test_what_cannot_be_reached_is_walked_around():
    best = Landscape(4, 0.5, none=50.0, reach=lambda cut: cut.layer >= 2 and cut.share >= 0.35).run()
    assert best.cuts == {"vision": Cut(4, 0.5)}
    assert Landscape(4, 0.5, none=None, reach=lambda cut: False).run() is None


def test_a_descent_goes_on_from_what_was_looked_at():
    whole = Landscape(5, 0.2, none=99.0)
    best = whole.run()
    assert len(whole.told) == len(whole.asked) == len({frozenset(cuts.items()) for cuts in whole.asked})
    for stopped in (1, 4, len(whole.told)):
        rest = Landscape(5, 0.2, none=99.0)
        saved = AllocationState(plan=None, looks=whole.told[:stopped])
        known = [Look.from_json(look.to_json()) for look in saved.looks]
        assert rest.run(known) == best
        assert rest.asked == whole.asked[stopped:]


def test_the_state_is_json(dense):
    import json

    found = Look({"vision": Cut(1, 0.35)}, {"vision": (1, 20)}, 0.5, Judged(0.1, 1, 0.09))
    state = AllocationState(dense.plan, [found, Look({}, {}, 0.0, None)])
    assert AllocationState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_what_comp_0_5_wrote_of_a_plan_is_read():
    written = {"cuts": {}, "tokens": {}, "ratio": 0.5, "loss": 0.1}
    assert Look.from_json(written).judged == Judged(0.1, 2, 0.1)
    assert Look.from_json(written | {"loss": None}).judged is None


def test_the_leader_is_the_plan_of_the_lowest_loss():
    looks = [Look({}, {}, 0.5, judged) for judged in (Judged(0.3, 2, 0.2), None, Judged(0.1, 2, 0.4), Judged(0.2, 1, 0.1))]
    assert AllocationState(plan=None, looks=looks).leader == Judged(0.1, 2, 0.4)
    assert AllocationState(plan=None).leader is None
