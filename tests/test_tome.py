"""The peer in benchmarks/tome.py is the published algorithm: otherwise the comparison would be against a straw man."""

import copy

import tome
import torch


def test_merging_by_hand():
    """Tokens 2 and 4 (even) are alike to 1 and 5 (odd); [CLS] is like 3, and stays."""
    east, north, up = torch.eye(3)
    states = torch.stack([up, east, east * 3, up, north, north * 2]).unsqueeze(0)
    sizes = torch.tensor([[1.0, 1.0, 3.0, 1.0, 1.0, 1.0]])
    found, grown = tome.merge(states, sizes, keys=states, r=2)
    expected = torch.stack([up, (east + 3 * 3 * east) / 4, up, (north + 2 * north) / 2])
    torch.testing.assert_close(found, expected.unsqueeze(0))
    assert grown.tolist() == [[1.0, 4.0, 1.0, 2.0]]


def test_merging_keeps_the_sum_of_all_tokens():
    states, sizes = torch.randn(3, 21, 8), torch.ones(3, 21)
    found, grown = tome.merge(states, sizes, torch.randn(3, 21, 4), r=6)
    assert found.shape == (3, 15, 8) and (grown.sum(1) == 21).all()
    torch.testing.assert_close((found * grown.unsqueeze(-1)).sum(1), states.sum(1))
    torch.testing.assert_close(found[:, 0], states[:, 0])  # [CLS]


def test_no_merging_is_the_stock_model_and_merging_shortens(stock, inputs):
    with torch.inference_mode():
        same = tome.apply(copy.deepcopy(stock), 0)(**inputs)
        torch.testing.assert_close(same.itm_score, stock(**inputs).itm_score, atol=1e-5, rtol=0)
        assert tome.apply(copy.deepcopy(stock), 4)(**inputs).last_hidden_state.shape[1] == 37 - 5 * 4
