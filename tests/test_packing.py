"""Test the balance of packs over ranks on lengths with a long tail, as measured by bench/packing.py."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "bench"))
from packing import long_tail, measure  # type: ignore  # noqa: E402

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("seed", range(3))
def test_ranks_have_equal_work_and_no_padding(seed):
    found = measure(long_tail(256, seed), 16_384, 8)
    assert found["lead-fast"]["efficiency"] >= 0.97 and found["lead-fast"]["slowest_over_mean"] <= 1.02
    assert all(found["lead-fast"]["efficiency"] > row["efficiency"] for n, row in found.items() if n != "lead-fast")
