"""Charts whose axes have round numbers and whose names belong to their curves."""

import re

import pytest
from reward_guidance.tests.harness.environment import CHECKOUT
from reward_guidance.tests.tools import chart

TABLES = CHECKOUT / "tests" / "bench" / "README.md"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0607, 0.771], [0, 0.2, 0.4, 0.6, 0.8]),
        ([0, 3900], [0, 1000, 2000, 3000, 4000]),
        ([0, 1.05], [0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2]),
        ([-12.2, -1.3], [-14, -12, -10, -8, -6, -4, -2, 0]),
        ([0.9, 1.0], [0.9, 0.92, 0.94, 0.96, 0.98, 1.0]),
        ([3, 3], [3]),
    ],
)
def test_ticks_are_round_numbers_that_enclose_the_values(values, expected):
    assert chart.ticks(values) == expected


def test_a_floor_has_powers_of_ten_above_it():
    assert chart.decades(1e-3, 0.28) == pytest.approx([1e-3, 1e-2, 1e-1, 1])
    assert chart.decades(1e-3, 0.1) == pytest.approx([1e-3, 1e-2, 1e-1])


def test_names_stand_beside_their_ends_and_off_each_other():
    ends = {"first": (100.0, 50.0), "second": (100.0, 52.0), "third": (100.0, 48.0), "elsewhere": (400.0, 50.0)}
    places = chart.beside(ends)
    assert places["elsewhere"] == (400.0 + chart.AWAY, 50.0)
    heights = [places[name][1] for name in ("third", "first", "second")]
    assert min(b - a for a, b in zip(heights, heights[1:], strict=False)) > chart.LINE - 0.1
    assert max(abs(places[name][1] - ends[name][1]) for name in ends) <= 2 * chart.LINE


def curves() -> dict[str, list[tuple[float, float]]]:
    """Held-out reward against model calls, of the benchmarks' table of selection."""
    table = TABLES.read_text(encoding="utf-8").split("tests/bench/selection.py")[1]
    found: dict[str, list[tuple[float, float]]] = {}
    for method, calls, heldout in re.findall(
        r"^\| ([a-z ]+)(?:, [a-z ]*\d+)? \| (\d+) \|[^|]+\| ([-\d.]+)", table, re.M
    ):
        found.setdefault(method, []).append((float(calls), float(heldout)))
    return found


def test_the_chart_of_selection_is_drawn_in_its_colours():
    known = curves()
    assert len(known) == 5
    picture = chart.draw_chart("Held-out reward against cost", "model calls per step", known, logarithmic=True)
    drawn = {colour for _, colour in picture.getcolors(1 << 20)}
    assert set(chart.COLOURS[:5]) <= drawn
