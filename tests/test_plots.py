"""Plots show what was written, on Axes of their own or those given; all are compared with pictures, in three styles.

A picture that is missing in `images/` is made and the test fails: look at it, and run again. Delete one to replace it.
"""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from helpers import poisson_counts, scanpy_settings
from matplotlib.testing.compare import compare_images

import sc_noise2self as n2s

IMAGES = Path(__file__).parent / "images"
MADE_WITH = "3.11"  # matplotlib
TRIPLE = ["gene-0", "gene-1", "gene-2"]


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def _written():
    """Three groups of cells, each with genes of its own, denoised in two ways."""
    import anndata as ad

    rng = np.random.default_rng(0)
    groups = np.repeat([0, 1, 2], [150, 100, 50])
    programmes = rng.gamma(1.0, size=(3, 60)) + 0.05
    for group in range(3):
        programmes[:, group] = np.where(np.arange(3) == group, 12, 0.5)
    mixed = 0.8 * np.eye(3)[groups] + 0.2 * rng.dirichlet(np.ones(3), size=300)
    profiles = mixed @ (programmes / programmes.sum(axis=1, keepdims=True))
    out = ad.AnnData(poisson_counts(profiles, 300, seed=1))
    out.obs_names, out.var_names = [f"cell-{i}" for i in range(300)], [f"gene-{i}" for i in range(60)]
    out.obs["group"] = pd.Categorical(np.array(["alpha", "beta", "gamma"])[groups])
    out.uns["group_colors"] = ["#0072B2", "#E69F00", "#009E73"]
    out.obsm["X_umap"] = mixed[:, :2] + 0.03 * rng.normal(size=(300, 2))
    n2s.denoise(out, n2s.PCA(transform="log1p"), write_layer=False)
    n2s.denoise(out, "diffusion", key_added="walk", write_layer=False)
    n2s.select_rank(out, max_rank=20)
    n2s.select_rank(out, max_rank=20, protocol="mcv", key_added="mcv")
    n2s.select_rank(out, max_rank=20, protocol="noise2self", key_added="noise2self")
    n2s.select_resolution(out)
    n2s.cluster_support(out, resolution=1.5)
    n2s.calibrate(out, blurred, {"share": [0.0, 0.5, 0.9], "power": [1, 2]})
    return out


def blurred(counts, share, power):
    """The cells' own counts, less and less of them, and the mean profile."""
    size = np.asarray(counts.sum(axis=1))
    mean = size @ np.asarray(counts.sum(axis=0)) / counts.sum()
    return share**power * counts.toarray() + (1 - share**power) * mean


@pytest.fixture
def written(_written):
    return _written.copy()


def same_picture(figure, name, tmp_path):
    if not mpl.__version__.startswith(f"{MADE_WITH}."):
        pytest.skip(f"the pictures were made with matplotlib {MADE_WITH}, this is {mpl.__version__}")
    expected, found = IMAGES / f"{name}.png", tmp_path / f"{name}.png"
    made = not expected.exists()
    figure.savefig(expected if made else found, dpi=60, metadata={"Software": None})
    assert not made, f"{expected} was made: look at it and run again"
    assert compare_images(str(expected), str(found), tol=2) is None


PICTURES = {
    "loss": lambda adata: n2s.pl.loss(adata),
    "loss_several": lambda adata: n2s.pl.loss(adata, key=["mcv", "noise2self"]),
    "loss_walk": lambda adata: n2s.pl.loss(adata, key="walk"),
    "loss_calibrate": lambda adata: n2s.pl.loss(adata, key="calibrate"),
    "loss_resolutions": lambda adata: n2s.pl.loss(adata, key="select_resolution"),
    "cluster_support": lambda adata: n2s.pl.cluster_support(adata),
    "markers": lambda adata: n2s.pl.markers(adata, TRIPLE, panels=("raw", "under", "denoised", "over")),
    "markers_plain": lambda adata: n2s.pl.markers(adata, TRIPLE[:2], panels=("raw", "denoised", 1), ncols=2),
    "markers_groups": lambda adata: n2s.pl.markers(adata, TRIPLE[:2], color="group"),
    "markers_numbers": lambda adata: n2s.pl.markers(adata, TRIPLE[:2], color="denoised_size", size=20),
    "markers_long_names": lambda adata: n2s.pl.markers(*with_long_names(adata), color="group"),
    "embedding": lambda adata: n2s.pl.embedding(adata, TRIPLE[:2]),
    "embedding_long_names": lambda adata: n2s.pl.embedding(*with_long_names(adata), ncols=4),
    "gain_per_gene": lambda adata: n2s.pl.gain_per_gene(adata),
    "gain_of_some": lambda adata: n2s.pl.gain_per_gene(adata, genes=TRIPLE),
    "spectrum": lambda adata: n2s.pl.spectrum(adata),
    "calibration": lambda adata: n2s.pl.calibration(adata),
    "caption": lambda adata: n2s.pl.caption(adata, n2s.pl.spectrum(adata)).axes[0],
}


STYLES = {
    "default": lambda: None,
    "scanpy": lambda: sc.set_figure_params(vector_friendly=False),  # that is no rcParam, and would stay
    "dark": lambda: plt.style.use("dark_background"),
}


@pytest.fixture(params=STYLES)
def style(request):
    with mpl.rc_context():
        STYLES[request.param]()
        yield request.param


@pytest.mark.parametrize("name", PICTURES)
def test_picture(written, name, style, tmp_path):
    axes = PICTURES[name](written)
    same_picture(np.ravel(axes)[0].figure, f"{name}_{style}", tmp_path)


@pytest.mark.parametrize("name", PICTURES)
def test_text_and_lines_are_seen_on_any_background(written, name, style):
    figure = np.ravel(PICTURES[name](written))[0].figure
    drawn = [*figure.findobj(mpl.text.Text), *figure.findobj(mpl.lines.Line2D)]
    for artist in drawn:
        distance = np.abs(np.subtract(mpl.colors.to_rgb(artist.get_color()), mpl.colors.to_rgb(figure.get_facecolor())))
        assert distance.max() > 0.15, artist


def with_long_names(adata):
    """Return an object whose genes and groups have long names, and two of the genes."""
    out = adata.copy()
    out.var_names = [f"ENSG00000000000_a_gene_of_a_long_name_{i}" for i in range(out.n_vars)]
    out.obs["group"] = out.obs["group"].cat.rename_categories(
        lambda name: f"{name} cell, as an ontology names it at length"
    )
    return out, list(out.var_names[:2])


def test_an_embedding_and_colours_with_the_defaults_of_scanpy_2(written, scanpy2):
    written.obsm["umap"] = written.obsm.pop("X_umap")  # as scanpy 2 names it
    axes = n2s.pl.embedding(written, ["gene-0", "gene-1"], "umap", show=False)
    assert all(ax.collections for ax in np.ravel(axes))
    del written.uns["group_colors"]
    assert n2s.pl.markers(written, ["gene-0", "gene-1"], color="group", show=False)[0].collections


def test_genes_by_a_column_of_var(written):
    written.var["symbol"] = [f"SYMBOL{i}" for i in range(written.n_vars)]
    named = {"gene_symbols": "symbol"}
    by_symbol, by_name = (
        n2s.pl.markers(written, genes, color=color, panels=("raw",), **options)[0]
        for genes, color, options in (
            (["SYMBOL0", "SYMBOL1"], "SYMBOL2", named),
            (TRIPLE[:2], TRIPLE[2], {}),
        )
    )
    assert (by_symbol.get_xlabel(), by_symbol.get_ylabel()) == ("SYMBOL0, log1p(CP10k)", "SYMBOL1, log1p(CP10k)")
    found, expected = (axes.collections[0].get_offsets() for axes in (by_symbol, by_name))
    np.testing.assert_array_equal(found, expected)
    assert n2s.pl.embedding(written, "SYMBOL0", **named)[0, 0].get_title().startswith("SYMBOL0")
    labels = {text.get_text() for text in n2s.pl.gain_per_gene(written, genes=["SYMBOL3"], **named).texts}
    assert "SYMBOL3" in labels
    with pytest.raises(KeyError, match="gene-0"):
        n2s.pl.markers(written, TRIPLE[:2], **named)


def test_long_names_narrow_no_panel(written):
    def widths(adata, genes):
        axes = n2s.pl.markers(adata, genes, color="group")
        axes[0].figure.canvas.draw()
        return [ax.get_window_extent().width for ax in axes]

    np.testing.assert_allclose(widths(*with_long_names(written)), widths(written, TRIPLE[:2]), rtol=0.1)


def test_panels_in_rows(written):
    def n_rows_and_columns(axes):
        return axes.flat[0].get_subplotspec().get_gridspec().get_geometry()

    assert n_rows_and_columns(n2s.pl.markers(written, TRIPLE, panels=("raw", "denoised", 1, 2), ncols=2)) == (2, 2)
    assert n_rows_and_columns(n2s.pl.markers(written, TRIPLE, panels=("raw", "denoised", 1, 2))) == (1, 4)
    three = n2s.pl.markers(written, TRIPLE, panels=("raw", "denoised", 1), ncols=2)
    assert len([ax for ax in three[0].figure.axes if ax.get_label() != "<colorbar>"]) == 3
    assert all(ax.get_xlabel() and ax.xaxis.get_tick_params()["labelbottom"] for ax in three[1:])
    axes = n2s.pl.embedding(written, TRIPLE, ncols=4)
    assert axes.shape == (3, 2)
    assert n_rows_and_columns(axes) == (2, 4)


def test_size_of_points(written):
    from sc_noise2self.pl._style import point_size

    for axes in (n2s.pl.markers(written, TRIPLE, size=3), n2s.pl.embedding(written, "gene-0", size=3)):
        assert all(ax.collections[0].get_sizes() == 3 for ax in axes.flat)
    assert n2s.pl.markers(written, TRIPLE)[0].collections[0].get_sizes() == 9
    assert point_size(120_000, None, 9) == 1


def test_many_points_are_an_image(written, monkeypatch):
    def rasterized():
        axes = [
            *n2s.pl.markers(written, TRIPLE),
            *n2s.pl.embedding(written, "gene-0")[0],
            n2s.pl.gain_per_gene(written),
        ]
        return {bool(points.get_rasterized()) for ax in axes for points in ax.collections}

    assert rasterized() == {False}
    for module in ("_markers", "_gain"):
        monkeypatch.setattr(f"sc_noise2self.pl.{module}.MANY", 60)
    assert rasterized() == {True}


def test_labels_of_genes_do_not_collide(written):
    ax = n2s.pl.gain_per_gene(written, genes=list(written.var_names[:20]))
    boxes = [text.get_window_extent() for text in ax.texts if text.get_text()]
    assert len(boxes) == 20
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
    assert len(n2s.pl.gain_per_gene(written).texts) == 15
    assert not n2s.pl.gain_per_gene(written, genes=[]).texts


def test_a_picture_without_its_title_is_another(written, tmp_path):
    """What the comparison can see."""
    ax = n2s.pl.spectrum(written)
    ax.set_title("")
    with pytest.raises(AssertionError):
        same_picture(ax.figure, "spectrum_default", tmp_path)


def _without_numbers(adata):
    adata.obs["none"] = np.nan
    return adata


def _without_gains(adata):
    del adata.var["denoised_gain"]
    return adata


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_loss_of_ranks(written):
    ax, curve = n2s.pl.loss(written), written.uns["select_rank"]
    x, y = ax.lines[0].get_xydata().T
    np.testing.assert_array_equal(x, curve["table"]["rank"])
    np.testing.assert_allclose(y, 100 * (curve["table"]["loss"] / curve["table"]["loss"][0] - 1))
    assert x[y.argmin()] == curve["split_rank"]
    assert {f"chosen: {curve['rank']}", "k = 0: one mean profile", "corrected to full depth"} <= set(labels(ax))
    with pytest.raises(KeyError, match="there is no result 'other': run sc_noise2self.select_rank"):
        n2s.pl.loss(written, key="other")


def test_loss_of_several_runs_marks_each_choice(written):
    keys = ["mcv", "noise2self"]
    ax = n2s.pl.loss(written, key=keys)
    assert {f"{key}: {written.uns[key]['rank']}" for key in keys} <= set(labels(ax))
    marked = {float(line.get_xdata()[0]) for line in ax.lines if line.get_markersize() == 7}
    assert marked == {written.uns[key]["rank"] for key in keys}
    with pytest.raises(ValueError, match="these results have different axes: 'mcv' principal components, .*'walk'"):
        n2s.pl.loss(written, key=["mcv", "walk"])


def test_loss_with_a_candidate_that_failed(adata):
    def fails_at_two(counts, share):
        if share == 2:
            raise RuntimeError
        return blurred(counts, share, 1)

    with pytest.warns(UserWarning, match="fail"):
        n2s.calibrate(adata, fails_at_two, {"share": [0.0, 0.5, 2.0]})
    ax = n2s.pl.loss(adata, key="calibrate")
    low, high = ax.get_ylim()
    assert low < adata.uns["calibrate"]["table"]["loss"].min() < high
    assert "chosen: share 0.5" in labels(ax)


def test_loss_that_is_no_likelihood_has_no_line_of_the_mean_profile(adata):
    n2s.calibrate(adata, blurred, {"share": [0.0, 0.5], "power": [1]}, loss="mse")
    ax = n2s.pl.loss(adata, key="calibrate")
    assert ax.get_ylabel() == "loss (mse)"
    assert "one mean profile" not in labels(ax)
    assert ax.get_ylim()[0] > 0


def test_loss_of_a_walk_is_minus_its_gain(written):
    ax, table = n2s.pl.loss(written, key="walk"), written.uns["walk"]["learned"]["diffusion"]["table"]
    drawn = np.concatenate([np.asarray(line.get_ydata(), float) for line in ax.lines])
    assert set(np.round(-table["gain"], 6)) <= set(np.round(drawn, 6))
    best = table["gain"].argmax()
    assert table["chosen"][best]
    assert table["chosen"].sum() == 1
    assert any(f"n_neighbors {table['n_neighbors'][best]}" in label for label in labels(ax) if "chosen" in label)


def test_loss_of_a_member_of_an_ensemble(adata):
    n2s.denoise(adata, ["pca", "knn", "diffusion"], write_layer=False)
    if {"knn", "diffusion"} <= set(adata.uns["denoised"]["learned"]):
        assert n2s.pl.loss(adata, key="denoised", member="knn").get_xlabel() == "n_neighbors"
    with pytest.raises(KeyError, match="has no member 'autoencoder': it has"):
        n2s.pl.loss(adata, key="denoised", member="autoencoder")
    assert n2s.pl.spectrum(adata).get_title().startswith("Spectrum, PCA of")


def test_loss_of_a_pca_says_where_to_look(written):
    with pytest.raises(KeyError, match="result 'denoised' has no curve: .* sc_noise2self.pl.spectrum"):
        n2s.pl.loss(written, key="denoised")


def test_markers_show_log1p_of_molecules_per_ten_thousand(written):
    raw, denoised = n2s.pl.markers(written, TRIPLE[:2])
    size = written.X.sum(axis=1).A1
    expected = np.log1p(written[:, "gene-0"].X.toarray().ravel() / size * 1e4)
    np.testing.assert_allclose(raw.collections[0].get_offsets()[:, 0], expected, rtol=1e-5)
    expected = n2s.get.denoised(written, "gene-1", scale="log1p_cp10k").to_numpy().ravel()
    np.testing.assert_allclose(denoised.collections[0].get_offsets()[:, 1], expected, rtol=1e-5)
    assert raw.get_xlim() == denoised.get_xlim()


def test_markers_of_a_subset_of_genes_keep_their_scale(written):
    """The molecules of a cell are those that were denoised, not those of the genes that are left."""
    part = written[:, TRIPLE].copy()
    for one, other in zip(n2s.pl.markers(written, TRIPLE), n2s.pl.markers(part, TRIPLE), strict=True):
        np.testing.assert_allclose(one.collections[0].get_offsets(), other.collections[0].get_offsets(), rtol=1e-5)


def test_markers_over_and_under_corrected(written):
    """As the data would be with so many components, none of them shrunk."""
    learned = written.uns["denoised"]["learned"]["pca log1p"]
    n_kept = int((learned["weights"] > 0).sum())
    axes = n2s.pl.markers(written, TRIPLE, panels=("over", 2, "under", n_kept, 3))
    over, two, under, all_of_them, three = (ax.collections[0].get_offsets() for ax in axes)
    np.testing.assert_array_equal(over, two)
    np.testing.assert_array_equal(under, all_of_them)
    assert axes[0].get_title() == "over-corrected: 2 components"
    assert axes[4].get_title() == "3 components"
    assert np.abs(under - three).max() > 0.5
    group = (written.obs["group"] == "alpha").to_numpy()[np.argsort(axes[2].collections[0].get_array())]
    assert group.any()
    with pytest.raises(ValueError, match=f"panels has 99: {n_kept} components have a weight above 0"):
        n2s.pl.markers(written, TRIPLE, panels=(99,))
    with pytest.raises(
        ValueError, match="panels has 'over': other numbers of components need a result of method='pca'"
    ):
        n2s.pl.markers(written, TRIPLE, key="walk", panels=("over",))
    with pytest.raises(ValueError, match="panels has 'best': pass raw, under, denoised, over, or a number"):
        n2s.pl.markers(written, TRIPLE, panels=("best",))


def test_markers_take_the_colours_of_groups_from_uns(written):
    _, denoised = n2s.pl.markers(written, TRIPLE[:2], color="group")
    assert labels(denoised) == ["alpha", "beta", "gamma"]
    for points, color in zip(denoised.collections, written.uns["group_colors"], strict=True):
        assert mpl.colors.to_hex(points.get_facecolor()[0]) == color.lower()
    part = written.copy()
    part.obs.loc[part.obs["group"] == "alpha", "group"] = np.nan
    _, denoised = n2s.pl.markers(part, TRIPLE[:2], color="group")
    assert labels(denoised) == ["no value", "beta", "gamma"]
    assert len(denoised.collections[0].get_offsets()) == 150
    assert mpl.colors.to_hex(denoised.collections[1].get_facecolor()[0]) == "#e69f00"
    del written.uns["group_colors"]
    written.obs["text"] = written.obs["group"].astype(str)
    _, denoised = n2s.pl.markers(written, TRIPLE[:2], color="text")
    assert labels(denoised) == ["alpha", "beta", "gamma"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: n2s.pl.markers(a, ["gene-0"]), r"genes has 1 name\(s\), \['gene-0'\]: pass two, x and y"),
        (lambda a: n2s.pl.markers(a, "gene-0"), r"genes has 1 name\(s\), \['gene-0'\]: pass two, x and y"),
        (lambda a: n2s.pl.markers(a, TRIPLE, color="group"), "color was given with three genes"),
        (lambda a: n2s.pl.markers(a, TRIPLE, panels=()), "panels is empty: pass some of raw"),
        (lambda a: n2s.pl.markers(a, TRIPLE, ax=plt.figure().subplots(1, 3)), "ax holds 3 Axes: pass 2"),
        (
            lambda a: n2s.pl.markers(_without_numbers(a), TRIPLE[:2], color="none"),
            "adata.obs\\['none'\\] holds no number",
        ),
        (lambda a: n2s.pl.markers(a, TRIPLE, ncols=0), "ncols is 0: pass a whole number, 1 or more"),
        (lambda a: n2s.pl.markers(a, TRIPLE, size=0), "size is 0: pass a number above 0"),
        (
            lambda a: n2s.pl.embedding(a, TRIPLE, ncols=3),
            "ncols is 3: pass an even number, for a gene takes two panels",
        ),
        (lambda a: n2s.pl.embedding(a, []), "genes is empty"),
        (lambda a: n2s.pl.embedding(a, TRIPLE, scale="log"), "scale is 'log': pass one of counts"),
    ],
)
def test_what_does_not_fit_is_refused(written, call, message):
    with pytest.raises(ValueError, match=message):
        call(written)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda a: n2s.pl.markers(a, TRIPLE[:2], color="louvain"),
            "there is no column or gene 'louvain': adata.obs has",
        ),
        (lambda a: n2s.pl.markers(a, ["gene-0", "Mpo"]), r"gene\(s\) not in adata: 'Mpo'"),
        (lambda a: n2s.pl.embedding(a, "gene-0", "tsne"), "there is no embedding 'tsne': .* Run sc.tl.tsne first"),
        (lambda a: n2s.pl.gain_per_gene(_without_gains(a)), "gains of genes of 'denoised' are gone from adata.var"),
        (lambda a: n2s.pl.gain_per_gene(a, key="x"), "there is no result 'x': run sc_noise2self.denoise"),
        (lambda a: n2s.pl.gain_per_gene(a, key="select_rank"), "'select_rank' is a result of select_rank, not of"),
        (lambda a: n2s.pl.spectrum(a, key="walk"), "result 'walk' has no PCA: its members are diffusion"),
        (lambda a: n2s.pl.spectrum(a, member="pca sqrt"), "result 'denoised' has no pca sqrt"),
        (lambda a: n2s.pl.caption(a, plt.figure(), key="x"), "there is no result 'x'"),
    ],
)
def test_what_is_missing_is_named(written, call, message):
    with pytest.raises(KeyError, match=message):
        call(written)


def test_markers_need_the_counts_for_raw(written):
    written.layers["counts"] = written.X.copy()
    n2s.denoise(written, layer="counts", write_layer=False)
    del written.layers["counts"]
    with pytest.raises(KeyError, match="layer 'counts' with the counts that were denoised to 'denoised' is gone"):
        n2s.pl.markers(written, TRIPLE)
    assert len(n2s.pl.markers(written, TRIPLE, panels=("denoised",))) == 1


def test_markers_coloured_by_a_column_of_numbers(written):
    written.obs["age"] = size = written.obs["denoised_size"].where(np.arange(300) >= 5)
    for ax in n2s.pl.markers(written, TRIPLE[:2], color="age"):
        without, points = ax.collections
        assert len(without.get_offsets()) == 5
        np.testing.assert_allclose(points.get_array(), np.sort(size.dropna()))
        assert points.get_clim() == (size.min(), size.max())


def test_markers_coloured_by_a_gene(written):
    by_color, third = n2s.pl.markers(written, TRIPLE[:2], color="gene-2"), n2s.pl.markers(written, TRIPLE)
    for one, other in zip(by_color, third, strict=True):
        np.testing.assert_array_equal(one.collections[0].get_array(), other.collections[0].get_array())


def test_embedding_refuses_to_save_an_empty_picture(written):
    with pytest.raises(TypeError, match="embedding takes no save: .* To save, call savefig of the figure"):
        n2s.pl.embedding(written, "gene-0", save="x.png")
    assert not plt.get_fignums()


@pytest.mark.parametrize("scale", ["counts", "rates", "log1p_cp10k", "expected_log1p_cp10k"])
def test_embedding_shares_a_colour_scale(written, scale):
    raw, denoised = n2s.pl.embedding(written, "gene-2", scale=scale)[0]
    assert raw.collections[0].get_clim() == denoised.collections[0].get_clim()
    shown = np.sort(denoised.collections[0].get_array())
    expected = np.sort(n2s.get.denoised(written, "gene-2", scale=scale).to_numpy().ravel())
    np.testing.assert_allclose(shown, expected, rtol=1e-5)


def test_gain_per_gene_counts_what_it_shows(written):
    ax = n2s.pl.gain_per_gene(written)
    gain, error = written.var["denoised_gain"], written.var["denoised_gain_error"]
    assert f"predicted better ({(gain > 2 * error).sum()})" in labels(ax)
    assert sum(len(points.get_offsets()) for points in ax.collections) == 60
    molecules = written.X.sum(axis=0).A1
    shown = np.concatenate([points.get_offsets()[:, 0] for points in ax.collections])
    np.testing.assert_allclose(np.sort(shown), np.sort(molecules), rtol=1e-4)


def test_spectrum_has_the_noise_edge_where_components_stop_to_gain(written):
    ax, learned = n2s.pl.spectrum(written), written.uns["denoised"]["learned"]["pca log1p"]
    np.testing.assert_array_equal(ax.collections[0].get_offsets()[:, 1], learned["singular_values"])
    # Three groups vary in two directions.
    assert (learned["singular_values"] > 1.05 * learned["noise_edge"]).sum() == 2
    null = n2s.null_counts(written, random_state=1)
    with pytest.warns(UserWarning, match="no candidate"):
        n2s.denoise(null, key_added="null")
    with pytest.raises(KeyError, match="result 'null' has no PCA: its members are mean"):
        n2s.pl.spectrum(null, key="null")


@pytest.mark.parametrize("n_cells", [40, 300])
def test_the_noise_edge_is_the_largest_singular_value_of_noise(simulated, n_cells):
    from sc_noise2self._split import halves
    from sc_noise2self.methods._components import learn_components, noise_edge, noise_squares

    null = n2s.null_counts(simulated[:n_cells])
    pair = halves(null, 5, np.arange(n_cells))
    first = learn_components(pair[0], "log1p", 20, np.random.default_rng(0))
    edge = noise_edge(noise_squares(first, *pair), n_cells)
    assert edge == pytest.approx(first.singular_values[0], rel=0.08)


def test_the_noise_edge_follows_the_law_of_marchenko_and_pastur():
    from sc_noise2self.methods._components import noise_edge

    rng = np.random.default_rng(0)
    for scale in (np.ones(400), rng.uniform(0.5, 1.5, 400)):
        noise = rng.normal(size=(600, 400)) * scale
        edge = noise_edge(np.square(noise).sum(axis=0), 600)
        assert edge == pytest.approx(np.linalg.norm(noise, 2), rel=0.03)
    assert noise_edge(np.full(400, 600.0), 600) == pytest.approx(np.sqrt(600) + np.sqrt(400), rel=1e-6)


@pytest.mark.parametrize("autoshow", [True, False])
def test_plots_are_shown_where_scanpy_would(written, monkeypatch, autoshow):
    shown = []
    monkeypatch.setattr(plt, "show", lambda *_, **__: shown.append(True))
    with scanpy_settings(autoshow=autoshow):
        n2s.pl.spectrum(written, key="denoised")
    assert bool(shown) is autoshow
    n2s.pl.spectrum(written, key="denoised", ax=plt.figure().subplots())
    n2s.pl.spectrum(written, key="denoised", show=False)
    assert len(shown) == autoshow
    n2s.pl.spectrum(written, key="denoised", show=True)
    assert len(shown) == autoshow + 1


def test_a_tree_of_clusters_is_no_curve(written):
    with pytest.raises(KeyError, match="is a tree of clusters, not a curve: sc_noise2self.pl.cluster_support draws it"):
        n2s.pl.loss(written, key="cluster_support")


def test_an_embedding_may_be_a_table(written):
    table = written.copy()
    table.obsm["X_umap"] = pd.DataFrame(written.obsm["X_umap"], index=written.obs_names, columns=["x", "y"])
    drawn = [n2s.pl.embedding(adata, "gene-0", show=False)[0, 1].collections[0] for adata in (written, table)]
    np.testing.assert_array_equal(*(points.get_offsets() for points in drawn))
