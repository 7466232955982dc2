"""Length penalties and the adaptive KL coefficient, by hand."""

from __future__ import annotations

import pytest
import torch

from rlcore.engine.config import RolloutConfig
from rlcore.engine.shaping import at_last_token, length_penalty, next_coefficient
from rlcore.layout import TokenBatch


def test_rewards_stand_at_last_tokens():
    batch = TokenBatch(torch.zeros(6, dtype=torch.int64), torch.tensor([0, 1, 4, 6]))
    assert at_last_token(torch.tensor([1.0, 2.0, 3.0]), batch).tolist() == [1, 0, 0, 2, 0, 3]


def test_the_papers_penalty():
    """L_max 20480 with a buffer of 4096: nothing up to 16384, -1 at the end, a straight line between."""
    config = RolloutConfig(max_new_tokens=20480, overlong_buffer=0.2)
    lengths = torch.tensor([1, 16384, 17408, 18432, 20480])
    torch.testing.assert_close(length_penalty(lengths, config), torch.tensor([0.0, 0.0, -0.25, -0.5, -1.0]))


def test_penalty_of_a_buffer_that_is_no_whole_number_of_tokens():
    config = RolloutConfig(max_new_tokens=8, overlong_buffer=0.2, overlong_penalty=0.5)
    lengths = torch.tensor([6, 7, 8])
    torch.testing.assert_close(length_penalty(lengths, config), torch.tensor([0.0, -0.5 * 0.6 / 1.6, -0.5]))
    assert not length_penalty(lengths, RolloutConfig()).any()


@pytest.mark.parametrize(
    ("kl", "expected"), [(6.0, 0.1), (6.6, 0.1 * 1.01), (60.0, 0.1 * 1.02), (0.0, 0.1 * 0.98), (5.4, 0.1 * 0.99)]
)
def test_controller(kl, expected):
    assert next_coefficient(0.1, kl, target=6.0, horizon=1000, answers=100) == pytest.approx(expected)
