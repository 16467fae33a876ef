"""What every result keeps, whatever the method: checks that tests and `benchmarks/fuzz.py` share.

Each check takes a `Result` and raises AssertionError with what does not hold.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from hypothesis import reject

import sc_noise2self as n2s

SLOTS = ("obs", "var", "obsm", "varm", "obsp", "varp", "uns", "layers")

WARNINGS = (
    r"\d+ cell\(s\) hold no molecule and stay zero",
    r"\d+ cell\(s\) have exactly the counts of another",
    "no candidate predicts (held-out|hidden) molecules better than one mean profile",
    "no rank predicts held-out molecules better than rank 0",
    ".* looks like reads, not molecules",
    "adata looks transposed",
    "the loss still falls at the largest rank tried",
    "no clustering predicts held-out molecules better than one cluster",
    "the gain still rises at the largest resolution tried",
    r'adata.var\["highly_variable"\] was not used, and sc.pp.pca would use it',
    "the loss is least at the largest value tried",
    r"\d+ of \d+ candidates failed and were left out",
    ".* predicts even the molecules that it was given worse than one mean profile",
    "the model predicts held-out molecules of these cells no better",
    "the model was fitted to these very cells",
    "training diverged",
    # scikit-learn's, in the example of docs/contributing.md.
    r"Number of distinct clusters \(\d+\) found smaller than n_clusters",
    # anndata's own.
    "(Observation|Variable) names are not unique",
    "adata is a view: it is made an object of its own",
    "Setting element|Trying to (set|modify) attribute|Initializing view as actual|Received a view",
    "Transforming to str index",
    "Writing zarr v2",
    "zarr v3 autosharding",
    "Both zarr.json",
)


@contextmanager
def documented_warnings() -> Iterator[list[warnings.WarningMessage]]:
    """Let the warnings that the documentation names pass and be gathered; any other is an error."""
    with warnings.catch_warnings(record=True) as gathered:
        warnings.simplefilter("error")
        for message in WARNINGS:
            warnings.filterwarnings("always", message=message, category=UserWarning)
        # anndata 0.13 asks pandas 3 for options that are on their way out.
        warnings.filterwarnings("ignore", message="The '(future.infer_string|mode.chained_assignment)' option")
        warnings.filterwarnings("ignore", message="The set_bad function", category=PendingDeprecationWarning)
        yield gathered


@contextmanager
def refused_for_few(counts: np.ndarray) -> Iterator[None]:
    """Let counts of so few molecules that a half may hold none be refused; the example is then another's."""
    try:
        yield
    except ValueError as error:
        if "too few" not in str(error) or counts.sum() > 100:
            raise
        reject()


def fingerprint(value: Any) -> Any:
    """Return all that can be told of a value, as nested dicts and tuples that compare bit by bit."""
    if isinstance(value, AnnData):
        own = {slot: fingerprint(getattr(value, slot)) for slot in SLOTS}
        names = {axis: fingerprint(getattr(value, axis)) for axis in ("obs_names", "var_names")}
        return {"X": fingerprint(value.X), **own, **names, "is_view": value.is_view}
    if isinstance(value, pd.DataFrame):
        columns = {f"{i} {name!r}": fingerprint(value.iloc[:, i]) for i, name in enumerate(value.columns)}
        return {"columns": columns, "index": fingerprint(value.index)}
    if isinstance(value, pd.Series | pd.Index):
        return {"values": [repr(each) for each in value], "dtype": str(value.dtype), "name": repr(value.name)}
    if isinstance(value, Mapping):
        return {repr(name): fingerprint(each) for name, each in value.items()}
    if sp.issparse(value):
        parts = [fingerprint(getattr(value, part)) for part in ("data", "indices", "indptr")]
        return (type(value).__name__.lower().removesuffix("view"), value.shape, *parts)
    if isinstance(value, np.ndarray):
        content = repr(value.tolist()) if value.dtype.hasobject else value.tobytes()
        return (str(value.dtype), value.shape, content)
    return repr(value)


def difference(before: Any, after: Any, path: str = "adata") -> str:
    """Return where two fingerprints differ first; empty where they are the same."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in [*before, *(name for name in after if name not in before)]:
            if name not in before or name not in after:
                return f"{path}[{name}] is {'new' if name in after else 'gone'}"
            found = difference(before[name], after[name], f"{path}[{name}]")
            if found:
                return found
        return ""
    return "" if before == after else f"{path} has changed"


@dataclass(frozen=True)
class Result:
    """What `denoise` returned, and the counts that it was given, dense float64 of shape (cells, genes)."""

    adata: AnnData
    counts: np.ndarray
    key: str = "denoised"

    @property
    def record(self) -> Mapping[str, Any]:
        return self.adata.uns[self.key]

    @property
    def has_factors(self) -> bool:
        """Whether values can be rebuilt without the layer."""
        return bool(self.record["has_factors"])

    @property
    def scale(self) -> str:
        return str(self.record["scale"])

    @property
    def on_scale(self) -> dict[str, Any]:
        """What gives the layer's own scale to functions of `get`."""
        return {"key": self.key, "scale": n2s.scales.SCALES[self.scale](**self.record.get("scale_params", {}))}

    @property
    def layer(self) -> np.ndarray:
        return np.asarray(self.adata.layers[self.key])

    @property
    def rates(self) -> np.ndarray | None:
        """The shares of each cell's molecules that the layer stands for; None where it does not say them."""
        values, size = self.layer.astype(np.float64), self.counts.sum(axis=1, keepdims=True)
        if self.scale == "expected_log1p_cp10k":
            return None
        if self.scale == "counts":
            return np.divide(values, size, out=np.zeros_like(values), where=size > 0)
        return values if self.scale == "rates" else np.expm1(values) / 1e4


def layer_is_float32_of_the_same_shape(result: Result) -> None:
    layer = result.adata.layers[result.key]
    assert layer.dtype == np.float32, f"the layer is {layer.dtype}"
    assert layer.shape == result.counts.shape, f"the layer has shape {layer.shape}"


def values_are_finite_and_not_negative(result: Result) -> None:
    assert np.isfinite(result.layer).all(), "the layer is not finite"
    assert (result.layer >= 0).all(), "the layer is negative somewhere"


def factors_and_gains_are_finite(result: Result) -> None:
    adata, key = result.adata, result.key
    for slot in ("obsm", "varm"):
        for name in (key, f"{key}_scale") if result.has_factors else (f"{key}_scale",):
            assert np.isfinite(np.asarray(getattr(adata, slot)[name])).all(), f"{slot}[{name!r}] is not finite"
    gain, error, candidates = result.record["gain"], result.record["gain_error"], result.record["candidates"]
    tells = result.record["gain_cells"] > 1  # one cell tells no error
    assert np.isfinite(gain), f"gain is {gain}"
    assert np.isfinite(error) if tells else error == np.inf, f"gain_error is {error}"
    assert error >= 0
    assert np.isfinite(candidates["gain"]).all(), "a candidate's gain is not finite"
    assert (np.isfinite(candidates["error"]) | (not tells)).all(), "a candidate's error is not finite"
    assert (candidates["error"] >= 0).all()
    members = result.record["members"]
    assert np.isfinite(members["weight"]).all()
    assert abs(members["weight"].sum() - 1) < 1e-6, f"weights of members add up to {members['weight'].sum()}"


def cells_keep_their_sizes(result: Result) -> None:
    size = result.counts.sum(axis=1)
    np.testing.assert_allclose(result.adata.obs[f"{result.key}_size"], size, rtol=1e-6)
    if result.rates is None:
        if not result.has_factors:
            return
        upper = n2s.get.denoised(result.adata, key=result.key, scale="log1p_cp10k").to_numpy()
        assert (result.layer <= upper * (1 + 1e-3) + 1e-3).all(), "the mean of logarithms is above that of the mean"
        return
    np.testing.assert_allclose(result.rates.sum(axis=1), size > 0, rtol=2e-4, err_msg="sums of cells")


def genes_keep_their_totals(result: Result) -> None:
    """To 0.3 % on average, 1 % below 30 cells; not with mix, nor where a scale does not say them."""
    if result.record["params"]["mix"] or result.rates is None:
        return
    total = result.counts.sum(axis=0)
    found = (result.rates * result.counts.sum(axis=1, keepdims=True)).sum(axis=0)
    off = np.abs(found - total)[total > 0] / total[total > 0]
    bound = 3e-3 if len(result.counts) >= 30 else 1e-2
    assert off.mean() <= bound, f"totals of genes are off by {off.mean():.2%} on average, {off.max():.2%} at most"


def what_is_empty_stays_zero(result: Result) -> None:
    assert not result.layer[result.counts.sum(axis=1) == 0].any(), "an empty cell has values"
    assert not result.layer[:, result.counts.sum(axis=0) == 0].any(), "an unexpressed gene has values"


def factors_rebuild_the_layer(result: Result) -> None:
    found = n2s.get.denoised(result.adata, **result.on_scale).to_numpy()
    _close(found, result.layer, "get.denoised")
    if result.has_factors:
        _close(np.asarray(n2s.get.lazy(result.adata, **result.on_scale)), result.layer, "get.lazy")
        return
    for read in (n2s.get.lazy, partial(n2s.get.denoised, source="factors")):
        with pytest.raises(ValueError, match="has no factors"):
            read(result.adata, **result.on_scale)


def other_scales_are_of_the_same_rates(result: Result) -> None:
    if not result.has_factors or result.rates is None:
        return
    found = {
        scale: n2s.get.denoised(result.adata, key=result.key, scale=scale).to_numpy() for scale in n2s.scales.SCALES
    }
    size = result.counts.sum(axis=1, keepdims=True)
    _close(found["counts"], result.rates * size, "counts")
    _close(found["rates"], result.rates, "rates")
    _close(found["log1p_cp10k"], np.log1p(1e4 * result.rates), "log1p_cp10k")
    expected = found["expected_log1p_cp10k"]
    assert (expected >= 0).all(), "expected logarithms are no numbers from 0 on"
    assert (expected <= found["log1p_cp10k"] * (1 + 1e-3) + 1e-3).all(), "the mean of logarithms is above that of means"


def the_layer_is_read_as_it_is(result: Result) -> None:
    found = n2s.get.denoised(result.adata, source="layer", **result.on_scale)
    np.testing.assert_array_equal(found.to_numpy(), result.layer)
    assert list(found.index) == list(result.adata.obs_names)
    assert list(found.columns) == list(result.adata.var_names)


def parts_of_a_result_are_read_as_the_whole(result: Result) -> None:
    n_cells, n_genes = result.counts.shape
    cells, genes = np.arange(n_cells)[::2], np.arange(n_genes)[::-2]
    for part, of_layer in (
        (result.adata[cells], result.layer[cells]),
        (result.adata[:, genes], result.layer[:, genes]),
        (result.adata[cells][:, genes], result.layer[cells][:, genes]),
    ):
        _close(n2s.get.denoised(part.copy(), **result.on_scale).to_numpy(), of_layer, "get.denoised of a part")


def the_report_is_plain_text(result: Result) -> None:
    said = n2s.report(result.adata, key=result.key, detail=True)
    assert len(said) > 200
    assert "\n" not in said
    assert said.endswith(".")
    words = said.replace("+-", " ").replace("(", " ").split()
    assert not {"nan", "inf", "-inf", "None"} & set(words), said


def reading_changes_nothing(result: Result) -> None:
    before = fingerprint(result.adata)
    n2s.report(result.adata, key=result.key)
    own = n2s.get.adata(result.adata, **result.on_scale)
    own.X[:] = -1
    own.obs["new"] = own.var["new"] = 1
    values = n2s.get.denoised(result.adata, **result.on_scale)
    values[:] = -1
    if result.has_factors:
        np.asarray(n2s.get.lazy(result.adata, key=result.key))
    assert not difference(before, fingerprint(result.adata))


def _close(found: np.ndarray, layer: np.ndarray, what: str) -> None:
    np.testing.assert_allclose(found, layer, rtol=1e-4, atol=1e-6 * max(1.0, float(layer.max())), err_msg=what)


PROMISES: tuple[Callable[[Result], None], ...] = (
    layer_is_float32_of_the_same_shape,
    values_are_finite_and_not_negative,
    factors_and_gains_are_finite,
    cells_keep_their_sizes,
    genes_keep_their_totals,
    what_is_empty_stays_zero,
    factors_rebuild_the_layer,
    other_scales_are_of_the_same_rates,
    the_layer_is_read_as_it_is,
    parts_of_a_result_are_read_as_the_whole,
    the_report_is_plain_text,
    reading_changes_nothing,
)


def check_all(result: Result) -> None:
    """Check every promise; raise AssertionError with the names of all that do not hold."""
    broken = {}
    for promise in PROMISES:
        try:
            check(promise, result)
        except Exception as error:
            broken[promise.__name__] = error
    if broken:
        said = "; ".join(f"{name}: {type(error).__name__}: {error}" for name, error in broken.items())
        raise AssertionError(said) from next(iter(broken.values()))


def check(promise: Callable[[Result], None], result: Result) -> None:
    """Check one; reading a result may say again what its counts are warned of."""
    with documented_warnings():
        promise(result)
