"""Learning rates at their corners, and the moving average of weights."""

from __future__ import annotations

import pytest
import torch

from rlcore.engine.schedule import MovingAverage, learning_rate


def rates(config):
    return [learning_rate(config, step) for step in range(1, config.steps + 1)]


@pytest.mark.parametrize("warmup", [0, 4])
def test_cosine(tiny, warmup):
    lr = rates(tiny(steps=44, update__lr=2.0, update__warmup=warmup, update__final_lr=0.1, update__schedule="cosine"))
    start = max(warmup, 1)
    assert lr[start - 1] == 2.0 and lr[-1] == pytest.approx(0.2)
    assert lr[: start - 1] == pytest.approx([2.0 * (i + 1) / start for i in range(start - 1)])
    assert lr[start - 1 :] == sorted(lr[start - 1 :], reverse=True)
    if warmup:
        assert lr[23] == pytest.approx(1.1)  # half way from step 4 to step 44


def test_constant(tiny):
    lr = rates(tiny(steps=6, update__lr=2.0, update__warmup=2, update__schedule="constant"))
    assert lr == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_one_step(tiny, schedule):
    assert rates(tiny(steps=1, update__lr=2.0, update__warmup=0, update__schedule=schedule)) == [2.0]


def test_another_peak(tiny):
    config = tiny(steps=9, update__warmup=2)
    assert learning_rate(config, 5, peak=3.0) == pytest.approx(learning_rate(config, 5) / config.update.lr * 3.0)


def test_moving_average():
    model = torch.nn.Linear(2, 1)
    model.bias.requires_grad_(False)
    first = model.weight.detach().clone()
    average = MovingAverage(model, 0.75)
    assert list(average.weights) == ["weight"]
    expected = first
    for _ in range(3):
        with torch.no_grad():
            model.weight += 1
        average.update()
        expected = 0.75 * expected + 0.25 * model.weight.detach()
    torch.testing.assert_close(average.weights["weight"], expected)
    with average.applied():
        torch.testing.assert_close(model.weight, torch.nn.Parameter(expected))
    assert torch.equal(model.weight, first + 1 + 1 + 1)
