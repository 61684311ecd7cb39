"""Thinning and smoothing of curves."""

from __future__ import annotations

import pytest

from nanochat.reports.curves import smooth, thin


def test_curves() -> None:
    points = [(i, float(i % 2)) for i in range(1, 10_001)]
    thinned = thin(points)
    assert len(thinned) == 2000
    assert thinned[0] == (5, 0.6)
    assert [value for _, value in smooth([(1, 2.0), (2, 2.0), (3, 2.0)])] == [2.0, 2.0, 2.0]
    assert smooth(points)[-1][1] == pytest.approx(0.5, abs=0.01)
