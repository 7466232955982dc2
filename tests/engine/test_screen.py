"""Long work tells how far it is, on stderr, and short work nothing."""

from __future__ import annotations

import itertools
import sys
import time

import pytest

from rlcore.engine.screen import watched


@pytest.fixture
def a_second_each(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))


def test_short_work_says_nothing(capsys, a_second_each):
    assert list(watched("abc", "making")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_long_work_says_how_far_it_is_less_and_less_often(capsys, a_second_each):
    assert list(watched(range(100), "making")) == list(range(100))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [f"making: {n} of 100 after {n} s" for n in (5, 10, 20, 40, 80)]


def test_the_number_of_items_may_be_unknown(capsys, a_second_each):
    assert len(list(watched(iter(range(7)), "reading x"))) == 7
    assert capsys.readouterr().err == "reading x: 5 after 5 s\n"


def test_on_a_terminal_there_is_a_bar_that_goes_away(monkeypatch, capsys, a_second_each):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    some = itertools.islice(watched(range(50), "making"), 20)
    assert list(some) == list(range(20))
    del some  # who stops early leaves no bar behind either
    assert " of 50 after" not in capsys.readouterr().err
