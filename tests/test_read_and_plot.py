"""Getters and plots take what was written, and show it as it is."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import sc_noise2self as n2s


@pytest.fixture
def written(pbmc):
    n2s.denoise(pbmc)
    n2s.select_rank(pbmc)
    yield pbmc
    plt.close("all")


def test_get_gives_what_the_layer_holds(written):
    genes = ["NKG7", "CD79A"]
    found = n2s.get.denoised(written, genes)
    expected = written[:, genes].layers["denoised"]
    pd.testing.assert_frame_equal(found, pd.DataFrame(expected, index=written.obs_names, columns=genes), rtol=1e-4)
    assert n2s.get.denoised(written, "NKG7").shape == (700, 1)


def test_get_follows_a_subset(written):
    part = written[::2, ::3].copy()
    gene = part.var_names[0]
    expected = part[:, gene].layers["denoised"]
    np.testing.assert_allclose(n2s.get.denoised(part, gene), expected, rtol=1e-4)


def test_get_names_what_is_missing(written):
    with pytest.raises(KeyError, match=r"gene\(s\) not in adata: 'Xist'"):
        n2s.get.denoised(written, ["NKG7", "Xist"])
    with pytest.raises(KeyError, match=r"cell\(s\) not in adata: 'nobody'"):
        n2s.get.denoised(written, ["NKG7"], cells=["nobody"])
    with pytest.raises(KeyError, match="there is no result 'other': run sc_noise2self.denoise"):
        n2s.get.denoised(written, ["NKG7"], key="other")
    written.var_names = ["NKG7", *written.var_names[:-1]]
    with pytest.raises(KeyError, match="var_names_make_unique"):
        n2s.get.denoised(written, ["NKG7"])


def test_plot_of_the_loss(written):
    ax = n2s.pl.loss(written)
    curve = written.uns["select_rank"]
    drawn = ax.lines[0].get_xydata()
    np.testing.assert_array_equal(drawn[:, 0], curve["ranks"])
    assert drawn[:, 1].argmin() == curve["split_rank"]
    assert drawn[:, 1].min() == 0
    assert f"chosen: {curve['rank']}" in [text.get_text() for text in ax.get_legend().get_texts()]
    own = plt.figure().subplots()
    assert n2s.pl.loss(written, ax=own) is own
    with pytest.raises(KeyError, match="there is no result 'other': run sc_noise2self.select_rank"):
        n2s.pl.loss(written, key="other")


def test_plot_of_markers(written):
    raw, denoised = n2s.pl.markers(written, ["CD79A", "NKG7"])
    size = np.asarray(written.X.sum(axis=1)).ravel()
    points = raw.collections[0].get_offsets()
    np.testing.assert_allclose(points[:, 0], np.log1p(written[:, "CD79A"].X.toarray().ravel() / size * 1e4), rtol=1e-5)
    points = denoised.collections[0].get_offsets()
    expected = written[:, "NKG7"].layers["denoised"].ravel() / size * 1e4
    np.testing.assert_allclose(points[:, 1], np.log1p(expected), rtol=1e-4)
    assert raw.get_xlim() == denoised.get_xlim()
    axes = n2s.pl.markers(written, ["CD79A", "NKG7"], color="bulk_labels")
    assert len(axes[1].get_legend().get_texts()) == 10
    with pytest.raises(ValueError, match=r"genes has 3 name\(s\): pass two, x and y"):
        n2s.pl.markers(written, ["CD79A", "NKG7", "LYZ"])


def test_a_result_without_a_curve_is_refused(adata):
    n2s.denoise(adata, write_layer=False)
    with pytest.raises(KeyError, match="result 'denoised' has no curve"):
        n2s.pl.loss(adata, key="denoised")
