"""The price of removing a unit: against cases by hand, and against explicit least squares."""

import pytest
import torch
from torch import Tensor

from comp_cli.engine import brain_surgeon
from comp_cli.engine.brain_surgeon import hessian, removal_prices


def drawn(samples: int, channels: int, outputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Correlated activations with a mean, (samples, channels), and a projection, (outputs, channels)."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=random, dtype=torch.double)
    x = torch.randn(samples, channels, generator=random, dtype=torch.double) @ mixing + 1
    return x, torch.randn(outputs, channels, generator=random, dtype=torch.double)


def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1)


def squared_error(x: Tensor, weight: Tensor, kept: list[int], bias: bool = True) -> float:
    """What least squares on the kept channels leaves, fitted explicitly."""
    rows = with_ones(x[:, kept]) if bias else x[:, kept]
    wanted = x @ weight.T
    return float((wanted - rows @ torch.linalg.lstsq(rows, wanted).solution).square().sum())


def test_three_channels_by_hand():
    # Channels 0 and 1 are correlated, channel 2 stands alone: H = [[2, 1, 0], [1, 2, 0], [0, 0, 1]], W = [1, 2, 3].
    # H^-1 = [[2, -1, 0], [-1, 2, 0], [0, 0, 3]] / 3. First prices: 1 / (2/3) = 1.5, 4 / (2/3) = 6, 9. Channel 0
    # goes; channel 1 becomes 2 + 1/2, at 1 / (H^-1)_11 = 2: 2.5^2 * 2 = 12.5. So channel 2 goes next, for 9.
    h = torch.tensor([[2.0, 1, 0], [1, 2, 0], [0, 0, 1]])
    prices = removal_prices(torch.tensor([[1.0, 2, 3]]), h)
    assert prices.tolist() == pytest.approx([1.5, 12.5, 9.0], abs=1e-12)


def test_a_group_by_hand():
    # Units of two channels: {0, 1} and {2, 3}; H is the identity, so nothing can be refitted: prices are squared norms.
    weight = torch.tensor([[1.0, 2, 0, 1], [0, 1, 1, 0]])
    assert removal_prices(weight, torch.eye(4), width=2).tolist() == pytest.approx([6.0, 2.0], abs=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("width", "channels"), [(1, 7), (3, 12)])
def test_the_sum_of_prices_is_the_residual_of_an_explicit_refit(bias: bool, width: int, channels: int):
    x, weight = drawn(400, channels, 5)
    rows = with_ones(x)
    prices = removal_prices(weight, hessian(rows.T @ rows, bias, ridge=0.0), width)
    order = prices.argsort().tolist()
    greedy, gone = [], []
    for unit in order:
        gone += range(unit * width, (unit + 1) * width)
        kept = [channel for channel in range(channels) if channel not in gone]
        greedy.append(squared_error(x, weight, kept, bias) if kept or bias else float((x @ weight.T).square().sum()))
    steps = torch.tensor([greedy[0], *(b - a for a, b in zip(greedy, greedy[1:], strict=False))], dtype=torch.double)
    assert steps.cummax(0).values.tolist() == pytest.approx(prices[order].tolist(), rel=1e-9)


def test_every_removal_is_the_cheapest_one():
    x, weight = drawn(300, 8, 4, seed=1)
    rows = with_ones(x)
    order = removal_prices(weight, hessian(rows.T @ rows, True, 0.0)).argsort(stable=True).tolist()
    kept = list(range(8))
    for unit in order[:5]:
        errors = {other: squared_error(x, weight, [c for c in kept if c != other]) for other in kept}
        assert unit == min(errors, key=errors.__getitem__)
        kept.remove(unit)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch):
    x, weight = drawn(500, 40, 6, seed=2)
    rows = with_ones(x)
    h = hessian(rows.T @ rows, True, 1e-3)
    whole = removal_prices(weight, h)
    for block in (1, 7, 16):
        monkeypatch.setattr(brain_surgeon, "BLOCK", block)
        torch.testing.assert_close(removal_prices(weight, h), whole, rtol=1e-9, atol=0)


def test_a_channel_that_others_can_say_costs_nothing():
    x, weight = drawn(200, 5, 3, seed=3)
    x[:, 4] = 2 * x[:, 0] - x[:, 1] + 3
    rows = with_ones(x)
    prices = removal_prices(weight, hessian(rows.T @ rows, True, 1e-10))
    assert prices.min() < 1e-6 * prices.max()
    assert prices.argmin() in (0, 1, 4)


def test_fewer_samples_than_channels_give_finite_prices():
    x, weight = drawn(6, 20, 3, seed=4)
    rows = with_ones(x)
    prices = removal_prices(weight, hessian((rows.T @ rows).float(), True, 1e-3))
    assert prices.isfinite().all() and (prices >= 0).all() and (prices > 0).any()


def test_one_unit_costs_all_that_varies():
    x, weight = drawn(50, 1, 2, seed=5)
    rows = with_ones(x)
    price = removal_prices(weight, hessian(rows.T @ rows, True, 0.0))
    assert price.tolist() == pytest.approx([squared_error(x, weight, [])], rel=1e-9)


def test_prices_rise_in_the_order_of_the_elimination():
    # One channel goes for free; what is left without it may be cheaper still, and must not overtake it.
    x, weight = drawn(300, 24, 2, seed=6)
    rows = with_ones(x)
    prices = removal_prices(weight, hessian(rows.T @ rows, True, 1e-3), width=4)
    assert (prices.sort().values.diff() >= 0).all()


@pytest.mark.slow
@pytest.mark.parametrize(("channels", "outputs", "seconds"), [(3072, 768, 60), (11008, 4096, 600)])
def test_wide_layers_take_seconds_to_minutes(channels: int, outputs: int, seconds: float):
    import time

    x = torch.randn(channels, 256)
    h = x @ x.T + torch.eye(channels)
    begin = time.perf_counter()
    assert removal_prices(torch.randn(outputs, channels), h).isfinite().all()
    assert time.perf_counter() - begin < seconds
