"""The layer x head maps hold the numbers of the table."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from metaopt_lens import Decomposition, DecompositionSet
from metaopt_lens._errors import OptionError
from metaopt_lens._plots import draw
from metaopt_lens.viz import head_map, head_means, head_table


@pytest.mark.parametrize("value", ["mass", "fidelity", "meta_gradient_norm", "direct_effect_norm"])
def test_a_map_is_the_pivot_of_the_table(result: Decomposition, value: str) -> None:
    (heatmap,) = head_map(result, value).data
    expected = result.to_frame().pivot(index="layer", columns="head", values=value)
    assert np.array_equal(np.array(heatmap.z), expected.to_numpy().astype(float))
    assert list(heatmap.x) == [0, 1, 2, 3]
    assert list(heatmap.y) == [0, 1, 2]


def test_plot_of_a_decomposition_is_its_map(result: Decomposition) -> None:
    assert result.plot("fidelity") == head_map(result, "fidelity")
    assert result.plot() == head_map(result, "mass")


def test_the_first_plot_loads_what_draws_and_nothing_before_it_does() -> None:
    """Results know only the registration; the package root imports `viz` when the first picture is asked for."""
    code = (
        "import sys, metaopt_lens as ml;"
        "split = ml.decompose(ml.load_tiny(), ml.ICLPrompt([('apple', 'dax')], 'plum')); "
        "assert not {'metaopt_lens.viz', 'plotly'} & set(sys.modules);"
        "assert split.plot('mass').data[0].type == 'heatmap'; assert 'metaopt_lens.viz' in sys.modules;"
        "assert ml.viz.head_map(split) == split.plot(); assert 'L1H2' in split.attention_view(['L1H2']).html"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def test_a_class_that_nothing_draws_is_named() -> None:
    with pytest.raises(LookupError, match=r"nothing draws int\.plot"):
        draw(1, "plot")


def test_layer_0_is_on_top(result: Decomposition) -> None:
    assert head_map(result).layout.yaxis.autorange == "reversed"


def test_several_positions_and_prompts_are_averaged_and_the_title_says_so(
    everywhere: Decomposition, several: DecompositionSet
) -> None:
    for averaged, n in ((everywhere, 2), (several, 3)):
        figure = head_map(averaged, "mass")
        frame = averaged.to_frame()
        expected = frame.groupby(["layer", "head"])["mass"].mean().unstack()
        assert np.allclose(np.array(figure.data[0].z), expected.to_numpy())
        assert f"mean of {n}" in figure.layout.title.text


def test_scales_are_fixed_where_the_value_has_bounds(result: Decomposition) -> None:
    assert (head_map(result, "mass").data[0].zmin, head_map(result, "mass").data[0].zmax) == (0, 1)
    assert (head_map(result, "fidelity").data[0].zmin, head_map(result, "fidelity").data[0].zmax) == (-1, 1)


def test_an_unknown_value_is_refused_with_the_known_ones(result: Decomposition) -> None:
    with pytest.raises(OptionError, match=r"no value 'masss' to draw: choose one of mass, meta_gradient_residual_norm"):
        head_map(result, "masss")
    with pytest.raises(OptionError, match="no value 'token'"):
        head_map(result, "token")


def test_the_table_has_the_column_that_orders_heads_and_the_share(result: Decomposition) -> None:
    table = head_table(result)
    assert np.allclose(table["meta_gradient_share"] * table["z_norm"], table["meta_gradient_norm"])
    order = head_means(result).sort_values("meta_gradient_residual_norm", ascending=False)["name"]
    assert list(order) == [str(ref) for ref in result.heads()]


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(OptionError, match="set of decompositions is empty"):
        head_map(DecompositionSet(()))
