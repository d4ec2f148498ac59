"""Pictures: equal numbers give equal bytes; a page may hold them without asking the world for anything."""

import itertools
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from al_pipeline.reporting.charts import (
    CurvePoint,
    _apart,
    comparison_png,
    comparison_svg,
    histogram_svg,
    learning_curve_png,
    learning_curve_svg,
    save_learning_curve,
)

CURVE = (CurvePoint(40, 0.7, 0.6, 0.8), CurvePoint(80, 0.8, 0.75, 0.86, solid=False), CurvePoint(120, 0.9))
BASELINE = (CurvePoint(40, 0.7, 0.5, 0.8), CurvePoint(80, 0.72, 0.6, 0.8))


def elements(svg):
    """Both drawings of a chart, parsed as the XML that they must be."""
    return list(ElementTree.fromstring(f"<both>{svg}</both>"))


@pytest.mark.slow
def test_equal_numbers_give_equal_bytes():
    assert learning_curve_svg("a", "macro-F1", CURVE, BASELINE) == learning_curve_svg("a", "macro-F1", CURVE, BASELINE)
    assert learning_curve_png(CURVE, BASELINE) == learning_curve_png(CURVE, BASELINE)
    assert learning_curve_png(CURVE) != learning_curve_png(CURVE, BASELINE)


def test_a_matplotlibrc_changes_nothing():
    import matplotlib

    before = learning_curve_svg("a", "macro-F1", CURVE)
    with matplotlib.rc_context({"axes.facecolor": "black", "font.size": 30, "svg.fonttype": "path"}):
        assert learning_curve_svg("a", "macro-F1", CURVE) == before
        assert matplotlib.rcParams["font.size"] == 30


def test_a_chart_is_a_wide_and_a_narrow_drawing_that_can_be_read_aloud():
    wide, narrow = elements(learning_curve_svg("a", "macro-F1", CURVE, BASELINE))
    assert (wide.get("class"), narrow.get("class")) == ("chart-wide", "chart-narrow")
    for drawing in (wide, narrow):
        assert drawing.get("role") == "img"
        assert "80 labels 0.80 (0.75 to 0.86)" in drawing.get("aria-label")


def test_charts_of_one_page_share_no_id_and_every_reference_is_met():
    page = learning_curve_svg("a", "macro-F1", CURVE, BASELINE) + learning_curve_svg("b", "macro-F1", CURVE, BASELINE)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    references = set(re.findall(r'(?:href="|url\()#([^")]+)', page))
    assert references
    assert references <= set(ids)


def test_a_chart_names_nothing_outside_the_page_and_takes_its_colors():
    svg = learning_curve_svg("a", "macro-F1", CURVE, BASELINE) + histogram_svg("h", "score", (0, 0.5, 1), (3, 1))
    assert "http" not in svg
    assert "<style" not in svg
    assert "font-family" not in svg
    assert set(re.findall(r"var\((--\w+)\)", svg)) == {"--ink", "--muted", "--line", "--accent", "--second", "--paper"}
    assert not re.findall(r"#[0-9a-f]{6}", svg)


def test_what_cannot_be_drawn_is_empty():
    assert learning_curve_svg("a", "macro-F1", ()) == ""
    assert histogram_svg("h", "score", (), ()) == ""
    assert histogram_svg("h", "score", (0.0, 1.0), (1, 2)) == ""


@pytest.mark.parametrize("curve", [CURVE[:1], CURVE[2:], (CurvePoint(0, 0.0), CurvePoint(0, 0.5))])
def test_few_points_are_drawn_too(curve):
    assert len(elements(learning_curve_svg("a", "macro-F1", curve))) == 2
    assert learning_curve_png(curve).startswith(b"\x89PNG")


def test_hostile_labels_stay_text():
    svg = histogram_svg("h", '"><script>$x_{1}$</script>', (0.0, 1.0), (1,))
    assert "<script" not in svg
    assert len(elements(svg)) == 2


@given(stops=st.lists(st.integers(1, 500), unique=True).map(sorted), least=st.floats(1, 80))
def test_ticks_do_not_overlap_and_none_is_left_out_without_need(stops, least):
    kept = _apart(stops, least)
    assert all(b - a >= least for a, b in itertools.pairwise(kept))
    assert all(any(0 <= stop - near < least for near in kept) for stop in stops)


def test_saving_writes_the_picture(tmp_path):
    save_learning_curve(tmp_path / "docs/curve.png", CURVE, BASELINE)
    assert (tmp_path / "docs/curve.png").read_bytes() == learning_curve_png(CURVE, BASELINE)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    st.lists(
        st.builds(
            CurvePoint,
            st.integers(0, 10**6),
            st.floats(0, 1),
            st.none() | st.floats(0, 1),
            st.none() | st.floats(0, 1),
            st.booleans(),
        ),
        min_size=1,
        max_size=40,
    )
)
def test_any_curve_is_drawn(curve):
    assert len(elements(learning_curve_svg("a", "macro-F1", curve, curve))) == 2


def test_a_comparison_tells_every_strategy_from_the_others():
    lines = {"random": BASELINE, **{f"arm_{number}": CURVE for number in range(7)}}
    wide, narrow = elements(comparison_svg("c", "macro-F1", lines, full=0.95))
    for drawing in (wide, narrow):
        words = {text for element in drawing.iter() if (text := "".join(element.itertext()).strip())}
        assert {"random", *(f"arm {number}" for number in range(7))} <= words
    hues = set(re.findall(r"var\(--(\w+)\)", comparison_svg("c", "m", lines)))
    assert hues >= {"accent", "second", "third", "fourth", "fifth", "sixth"}
    assert comparison_svg("c", "m", lines, 0.9) == comparison_svg("c", "m", lines, 0.9)
    assert comparison_png("m", lines).startswith(b"\x89PNG") and comparison_png("m", lines) != comparison_png(
        "m", lines, 0.9
    )
