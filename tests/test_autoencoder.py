"""The autoencoder: sampling, losses, training, the choice of the width, faults."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from helpers import divergence, low_rank_profiles, mean_divergence, poisson_counts
from scipy import stats
from scipy.special import gammaln, logsumexp

torch = pytest.importorskip("torch")

import sc_noise2self as n2s  # noqa: E402
from sc_noise2self._blocks import Counts  # noqa: E402
from sc_noise2self._counts import column_sums  # noqa: E402
from sc_noise2self._loss import Gain  # noqa: E402
from sc_noise2self._model import LINKS  # noqa: E402
from sc_noise2self.methods import _network_losses as network_losses  # noqa: E402
from sc_noise2self.methods import _training as training  # noqa: E402
from sc_noise2self.methods._autoencoder import AutoencoderModel  # noqa: E402
from sc_noise2self.methods._base import Learned, nine_tenths, set_aside  # noqa: E402
from sc_noise2self.methods._components import learn_components  # noqa: E402
from sc_noise2self.methods._device import DeviceProfiles, gram_product_on  # noqa: E402
from sc_noise2self.methods._network import (  # noqa: E402
    Aside,
    DeviceCounts,
    Network,
    PrincipalScores,
    Process,
    StreamedCounts,
)
from sc_noise2self.methods._populations import Populations  # noqa: E402
from sc_noise2self.methods._profiles import LowRankProfiles  # noqa: E402

CPU = torch.device("cpu")
LOSSES = tuple(LINKS)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small gain nothing from several, which wait for each other where cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Fitted:
    profiles: LowRankProfiles
    learned: Learned
    model: AutoencoderModel

    @property
    def gain(self):
        """On the molecules set aside."""
        return self.learned.values["table"]["gain"].max()


def fit(counts, width=16, *, used=None, batch=None, seed=0, **options):
    about = Counts.of(counts, used)
    if batch is not None:
        about = replace(about, columns={"batch": pd.Series(pd.Categorical(batch))})
        options["batch_key"] = "batch"
    options = {"n_hidden": 32, "n_components": 10, "device": "cpu", "n_epochs": 40, **options}
    (learner,) = n2s.Autoencoder(width=width, **options).checked(about).learners(about)
    rng = np.random.default_rng(seed)
    learner.prepare(counts, np.arange(counts.shape[0]), rng)
    profiles = learner.refit(about, learner.settings[0], rng)
    return Fitted(
        profiles, learner.learned(learner.settings[0]), AutoencoderModel.from_state(learner.states()[0], "cpu")
    )


@pytest.fixture(scope="module")
def truth():
    return low_rank_profiles(300, 120, 5, seed=0)


@pytest.fixture(scope="module")
def counts(truth):
    return poisson_counts(truth, depth=600, seed=1)


@pytest.fixture(scope="module")
def fitted(counts):
    """Trained until it gains no more, at a learning rate that overshoots now and then."""
    return fit(counts, learning_rate=0.02)


def test_a_batch_holds_the_counts_of_its_cells(counts):
    cells = np.array([7, 3, 250])
    entries = DeviceCounts.of(counts, None, CPU)[cells]
    assert (entries.dense().numpy() == counts[cells].toarray()).all()
    assert (entries.sizes().numpy() == counts[cells].toarray().sum(axis=1)).all()


def test_indices_that_are_not_sorted_are_read_right(counts):
    shuffled = counts[:, np.random.default_rng(0).permutation(120)]
    assert not shuffled.has_sorted_indices
    expected = shuffled.toarray()
    held = DeviceCounts.of(shuffled, None, CPU)
    shuffled.sum_duplicates()  # as SciPy does in place when it adds up rows
    assert (held[np.arange(300)].dense().numpy() == expected).all()


def test_large_counts_keep_their_value():
    counts = sp.csr_matrix(np.array([[70_000, 1], [0, 3]], np.float32))
    assert (DeviceCounts.of(counts, None, CPU)[np.arange(2)].dense().numpy() == counts.toarray()).all()


def test_parts_add_up_and_are_binomial():
    counts = sp.csr_matrix(np.tile(np.array([0, 1, 2, 9, 40], np.float32), (4000, 1)))
    torch.manual_seed(0)
    entries = DeviceCounts.of(counts, None, CPU)[np.arange(4000)]
    first, second = entries.split(0.3, 0.3)
    assert ((first.values + second.values) == entries.values).all()
    assert (first.values >= 0).all()
    assert (second.values >= 0).all()
    drawn = first.dense().numpy()
    n = counts[0].toarray().ravel()
    error = np.sqrt(n * 0.3 * 0.7 / 4000)
    assert (np.abs(drawn.mean(axis=0) - 0.3 * n) <= 4.5 * error).all()
    variance = n * 0.3 * 0.7
    assert np.allclose(drawn.var(axis=0), variance, rtol=4.5 * np.sqrt(3 / 4000))


@pytest.mark.parametrize("share", [0.3, 0.55, 0.9])
def test_parts_follow_the_binomial_distribution(share):
    """Small counts are dealt in another way than large ones; each has the whole distribution, not its moments."""
    n_cells = 20_000
    counts = sp.csr_matrix(np.tile(np.array([1, 2, 3, 4, 5, 12], np.float32), (n_cells, 1)))
    torch.manual_seed(1)
    first, _ = DeviceCounts.of(counts, None, CPU)[np.arange(n_cells)].split(share, share)
    for drawn, n in zip(first.dense().numpy().T, counts[0].toarray().ravel().astype(int), strict=True):
        expected = n_cells * stats.binom(n, share).pmf(np.arange(n + 1))
        found = np.bincount(drawn.astype(int), minlength=n + 1)
        common = expected >= 5
        rest = [found[~common].sum(), expected[~common].sum()] if expected[~common].sum() >= 5 else [0, 0]
        statistic = (np.square(found - expected)[common] / expected[common]).sum()
        statistic += (rest[0] - rest[1]) ** 2 / max(rest[1], 1)
        assert stats.chi2(common.sum() - 1).sf(statistic) > 1e-4


def test_every_cell_draws_its_own_share():
    counts = sp.csr_matrix(np.full((2000, 1), 1000, np.float32))
    torch.manual_seed(0)
    first, _ = DeviceCounts.of(counts, None, CPU)[np.arange(2000)].split(0.3, 0.9)
    shares = first.values.numpy() / 1000
    assert stats.kstest(shares, stats.uniform(0.3, 0.6).cdf).pvalue > 1e-3


def principal_scores(counts, scale):
    found = learn_components(counts, "log1p", 6, np.random.default_rng(0))
    center, depth = found.mean @ found.vectors, found.transform.target
    layer = PrincipalScores(found.vectors, found.gene_weights, center, depth, found.mean, found.gene_share, scale)
    return found, layer


def test_hidden_genes_are_hidden_and_the_rest_is_seen(counts):
    torch.manual_seed(0)
    seen, held_out = DeviceCounts.of(counts, None, CPU)[np.arange(300)].hide(0.1, 0.7)
    hidden = seen.hidden.numpy()
    x = counts.toarray()
    np.testing.assert_array_equal(seen.dense().numpy(), np.where(hidden, 0, x))
    np.testing.assert_array_equal(held_out.dense().numpy(), np.where(hidden, x, 0))
    # a share of 120 genes is known to .046 at most, so uniform shares spread to a standard deviation of .173 to .18
    shares = hidden.mean(axis=1)
    assert shares.mean() == pytest.approx(0.4, abs=4 * 0.18 / np.sqrt(300))
    assert 0.15 < shares.std() < 0.2


def test_scores_do_not_depend_on_what_is_hidden_and_are_those_of_the_mean_where_all_is(counts):
    _, layer = principal_scores(counts, scale=1.0)
    torch.manual_seed(0)
    seen, _ = DeviceCounts.of(counts, None, CPU)[np.arange(300)].hide(0.1, 0.7)
    other = counts.toarray()
    other[seen.hidden.numpy()] += 5
    hidden = seen.hidden
    changed = DeviceCounts.of(sp.csr_matrix(other), None, CPU)[np.arange(300)]
    values = changed.values.masked_fill(hidden[changed.rows, changed.genes], 0)
    assert torch.allclose(layer(seen), layer(replace(changed, values=values, hidden=hidden)), atol=1e-4)
    nothing = replace(seen, values=torch.zeros_like(seen.values), hidden=torch.ones_like(hidden))
    assert torch.allclose(layer(nothing), torch.zeros(300, 6), atol=1e-4)


def test_principal_scores_are_those_of_the_pca(counts):
    components, layer = principal_scores(counts, scale=2.0)
    found = layer(DeviceCounts.of(counts, None, CPU)[np.arange(300)]).numpy()
    assert np.allclose(found, components.coordinates(counts) / 2, atol=1e-4)


def entries_of(x):
    return DeviceCounts.of(sp.csr_matrix(x, dtype=np.float32), None, CPU)[np.arange(len(x))]


def log_likelihood(name, output, x):
    """From scipy, without log x!, which no output changes."""
    size = x.sum(axis=1, keepdims=True)
    if name == "multinomial":
        return (x * (output - logsumexp(output, axis=1, keepdims=True))).sum()
    means = size * np.exp(output)
    if name == "poisson":
        return (stats.poisson(means).logpmf(x) + gammaln(x + 1) - x * np.log(size)).sum()
    return (stats.nbinom(np.e, np.e / (np.e + means)).logpmf(x) + gammaln(x + 1)).sum()


@pytest.mark.parametrize("name", ["multinomial", "poisson", "negative_binomial"])
def test_likelihoods_are_those_of_scipy(name, counts):
    x = counts[:20].toarray().astype(np.float64)
    x[3] = 0  # a cell whose molecules all went to the other part
    output = np.random.default_rng(0).normal(-4, 1, x.shape)
    loss = network_losses.LOSSES[name](counts, 0.5).double()
    found = loss.compare(torch.from_numpy(output), entries_of(x)).item()
    kept = x.sum(axis=1) > 0
    assert found == pytest.approx(-log_likelihood(name, output[kept], x[kept]) / x.sum(), rel=1e-5)


def test_squared_error_is_that_of_transformed_counts(counts):
    loss = network_losses.LOSSES["mse_sqrt"](counts, 0.5)
    x = counts[:20].toarray()
    y = np.sqrt(x / x.sum(axis=1, keepdims=True) * loss.transform.target)
    found = loss.compare(torch.zeros(x.shape), entries_of(x)).item()
    assert found == pytest.approx((y**2).mean(), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_finds_structure(name, truth, counts):
    fold = nine_tenths(counts, np.random.default_rng(0), np.arange(300))
    found = fit(fold.seen, loss=name).profiles
    assert divergence(truth, found) < 0.5 * mean_divergence(truth, counts)
    gain = fold.gain(found)  # of molecules that neither training nor its end has seen
    assert gain.mean > 4 * gain.error


def test_what_is_set_aside_is_a_tenth_and_is_not_trained_on(counts):
    before = counts.copy()
    cells = np.arange(0, counts.shape[0], 2)
    seen, aside = set_aside(counts, cells, np.random.default_rng(0))
    assert (seen[cells] + aside != counts[cells]).nnz == 0
    assert (counts != before).nnz == 0
    total = float(counts[cells].sum())
    assert aside.sum() == pytest.approx(0.1 * total, abs=4.5 * float(np.sqrt(0.09 * total)))


def test_the_gain_on_molecules_set_aside_ranks_as_the_truth(truth, counts, fitted):
    """Widths 16 and 1 on five programmes, and training cut short: whoever gains more is nearer the truth."""
    fits = [fitted, fit(counts, 1), fit(counts, n_epochs=1)]
    errors = [divergence(truth, each.profiles) for each in fits]
    assert list(np.argsort([each.gain for each in fits])) == list(np.argsort(errors)[::-1])


@pytest.mark.parametrize("dimension", [2, 8])
def test_the_width_is_the_intrinsic_dimension(dimension):
    """Log rates linear in so many coordinates: the narrowest width as good as any is that many, or one step off."""
    rng = np.random.default_rng(dimension)
    z = rng.normal(size=(800, dimension)) @ rng.normal(size=(dimension, 150)) * 0.9 / np.sqrt(dimension)
    profiles = np.exp(z + rng.normal(-1, 1, 150))
    profiles /= profiles.sum(axis=1, keepdims=True)
    widths = [width for width in (32, 16, 8, 4, 2, 1) if width <= 4 * dimension]
    found = fit(poisson_counts(profiles, depth=1500, seed=0), widths, n_epochs=30).learned
    table = found.values["table"]
    assert list(table) == ["width", "loss", "error", "gain", "chosen"]
    assert dimension / 2 <= found.rank <= 2 * dimension
    assert list(table["width"][table["chosen"]]) == [found.rank]
    assert list(table["width"]) == sorted(table["width"], reverse=True)
    assert table["width"].iloc[-1] < found.rank  # narrower was tried, and was worse
    best = table["gain"].argmax()
    assert table["error"][best] == 0
    assert table["width"][table["gain"] >= table["gain"][best] - table["error"]].iloc[-1] == found.rank


def test_same_seed_same_bytes_and_nothing_global_moves(counts):
    torch.manual_seed(5)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    first, second = (fit(counts, n_epochs=4).profiles.counts() for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert (torch.get_rng_state() == before).all()
    assert torch.get_num_threads() == threads
    assert fit(counts, n_epochs=4, seed=1).profiles.counts().tobytes() != first.tobytes()


def test_learning_curves_are_kept_and_the_best_state_restored(fitted):
    losses, checked, gains = (
        fitted.learned.values[name] for name in ("epoch_losses", "checked_epochs", "checked_gains")
    )
    assert len(losses) == checked.max()
    assert len(checked) == len(gains)
    assert fitted.gain == pytest.approx(gains.max(), abs=1e-6)


def train(network, loss, counts, check, n_epochs):
    schedule = training.Schedule("autoencoder", n_epochs, batch_size=100, learning_rate=0.01, prior_scale=1)
    return training.train(network, loss, DeviceCounts.of(counts, None, CPU), np.random.default_rng(0), check, schedule)


def test_training_stops_when_the_gain_falls_and_restores_the_best(counts):
    gains = iter([0.1, 0.3, 0.2, 0.25, 0.29, 0.4])
    loss = network_losses.LOSSES["multinomial"](counts, 0.5)
    scores = PrincipalScores(np.ones((120, 2)), np.ones(120), np.zeros(2), 100, np.ones(120), np.ones(120) / 120, 1)
    network, states = Network(scores, 4, 8, loss.start, 0), []

    def check(averaged):
        states.append(averaged.genes.weight.detach().clone())
        return Gain(np.array([next(gains)]), np.array([1.0]))

    history = train(network, loss, counts, check, n_epochs=10)
    assert history.checked == [1, 2, 3, 4, 5]  # three checks without a better one
    assert history.gains == [0.1, 0.3, 0.2, 0.25, 0.29]
    assert torch.equal(network.genes.weight, states[1])
    assert not torch.equal(states[1], states[4])


def test_of_the_states_in_an_average_the_t_th_weighs_as_t_times_the_next_two_numbers(counts):
    loss = network_losses.LOSSES["multinomial"](counts, 0.5)
    scores = PrincipalScores(np.ones((120, 2)), np.ones(120), np.zeros(2), 100, np.ones(120), np.ones(120) / 120, 1)
    parts = training.Compared(Network(scores, 4, 8, loss.start, 0), loss, CPU)
    average, t = training.Average(parts), np.arange(1, 21)
    states = np.random.default_rng(0).normal(size=len(t))
    for state in states:
        with torch.no_grad():
            parts.network.code.bias.fill_(state)
        average.add(parts)
    expected = np.average(states, weights=t * (t + 1) * (t + 2))
    np.testing.assert_allclose(average.parts.network.code.bias.detach(), expected, rtol=1e-5)
    assert not torch.equal(parts.network.code.bias, average.parts.network.code.bias)


def test_the_gain_of_averaged_states_rises_as_long_as_training_goes_on(truth, counts):
    found = fit(counts, 32, n_epochs=60)
    gains = found.learned.values["checked_gains"]
    assert (np.diff(gains) > -0.01 * gains.max()).all()
    assert divergence(truth, found.profiles) < divergence(truth, fit(counts, 32, n_epochs=6).profiles)


class _Diverging(network_losses.Multinomial):
    """Turns into NaN after so many steps."""

    steps_left = 0

    def compare(self, output, held_out):
        self.steps_left -= 1
        return super().compare(output, held_out) * (float("nan") if self.steps_left < 0 else 1)


def _diverge_after(monkeypatch, n_steps):
    def make(counts, invariance):
        loss = _Diverging(counts)
        loss.steps_left = n_steps
        return loss

    monkeypatch.setitem(network_losses.LOSSES, "multinomial", make)


def test_a_loss_that_turns_nan_keeps_the_best_state(counts, monkeypatch):
    _diverge_after(monkeypatch, 3 * 10 + 2)  # three steps an epoch
    with pytest.warns(UserWarning, match=r"in epoch 11 of 40: the learning rate.*state after epoch \d+ is kept"):
        found = fit(counts)
    assert np.isfinite(found.profiles.counts()).all()
    assert found.gain > 0


def test_a_loss_that_is_nan_at_once_is_an_error(counts, monkeypatch):
    _diverge_after(monkeypatch, 2)
    with pytest.raises(FloatingPointError, match=r"epoch 1 of 40.*smaller learning_rate"):
        fit(counts)


def _out_of_memory(monkeypatch, batch_size):
    """The device holds batches smaller than this."""
    forward = Network.forward

    def limited(self, entries):
        if len(entries.starts) >= batch_size:
            raise torch.OutOfMemoryError("no memory")
        return forward(self, entries)

    monkeypatch.setattr(Network, "forward", limited)


def test_out_of_memory_halves_the_batch_once(counts, monkeypatch):
    _out_of_memory(monkeypatch, 64)
    with pytest.warns(UserWarning, match="too little memory for batch_size=64: 32 is taken"):
        found = fit(counts, batch_size=64, n_epochs=10)
    assert found.gain > 0


def test_out_of_memory_says_what_to_lower(counts, monkeypatch):
    _out_of_memory(monkeypatch, 32)
    with (
        pytest.warns(UserWarning, match="32 is taken"),
        pytest.raises(MemoryError, match=r"smaller batch_size \(it was 32\)"),
    ):
        fit(counts, batch_size=64)


@pytest.mark.parametrize("where", ["DeviceCounts.__init__", "Network.factors"])
def test_counts_that_the_device_cannot_hold_are_refused(counts, fitted, monkeypatch, where):
    def fail(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(f"sc_noise2self.methods._network.{where}", fail)
    with pytest.raises(MemoryError, match="too little memory for these counts: pass device='cpu'"):
        fitted.model.predict(counts)
    if where == "DeviceCounts.__init__":
        with pytest.raises(MemoryError, match="too little memory for these counts: pass device='cpu'"):
            fit(counts)


def test_empty_cells_stay_empty(counts):
    dense = counts.toarray()
    dense[:150] = 0
    found = fit(sp.csr_matrix(dense), batch_size=16, n_epochs=10)
    denoised = found.profiles.counts()
    assert (denoised[:150] == 0).all()
    assert np.allclose(denoised[150:].sum(axis=1), dense[150:].sum(axis=1), rtol=1e-4)
    assert (found.model.predict(sp.csr_matrix(dense[:3])).counts() == 0).all()


def test_cells_one_by_one_are_the_cells_together(counts, fitted):
    together = fitted.model.predict(counts[:5]).counts()
    alone = np.vstack([fitted.model.predict(counts[[i]]).counts() for i in range(5)])
    assert np.allclose(together, alone, rtol=1e-4, atol=1e-6)


def test_what_a_model_keeps_predicts_the_same(counts, fitted):
    loaded = AutoencoderModel.from_state(fitted.model.state(), "cpu")
    assert loaded.predict(counts).counts().tobytes() == fitted.model.predict(counts).counts().tobytes()
    scores = loaded.predict(counts).scaled(n_rounds=0).scores
    np.testing.assert_allclose(scores, fitted.profiles.scores, rtol=1e-4, atol=1e-5)
    assert loaded.width == 16


def test_cells_not_trained_on_are_denoised_as_well(truth, counts):
    found = fit(counts[:200]).model.predict(counts[200:])
    assert divergence(truth[200:], found) < 0.5 * mean_divergence(truth, counts)


def test_masked_genes_do_not_determine_the_scores(counts):
    """Two masked genes are swapped: sizes stay, and so does what the network makes of the cell."""
    mask = np.ones(120, bool)
    mask[[0, 1]] = False
    model = fit(counts, used=mask, n_epochs=5).model
    swapped = counts[:, [1, 0, *range(2, 120)]]
    assert np.allclose(model.predict(counts).scores, model.predict(swapped).scores, atol=1e-5)


def test_a_batch_covariate_takes_the_batch_out_of_the_code(truth):
    rng = np.random.default_rng(3)
    batch = np.arange(len(truth)) % 2
    shifted = truth * np.exp(rng.normal(0, 1, truth.shape[1]) * batch[:, None])
    counts = poisson_counts(shifted / shifted.sum(axis=1, keepdims=True), depth=800, seed=2)
    known, unknown = fit(counts, 4, batch=batch), fit(counts, 4)

    def separation(found):
        codes = batch if found is known else None
        with torch.no_grad():
            code = found.model.network.bottleneck(DeviceCounts.of(counts, codes, CPU)[np.arange(len(batch))]).numpy()
        design = np.column_stack([code, np.ones(len(code))])
        fitted = design @ np.linalg.lstsq(design, batch, rcond=None)[0]
        return 1 - (fitted - batch).var() / batch.var()

    assert known.gain > unknown.gain - 0.005  # which the codes can make up for
    assert separation(known) < separation(unknown)
    assert known.model.predict(counts, batch).counts().shape == counts.shape


def test_cpu_does_not_touch_cuda(monkeypatch):
    def touched(*_):
        raise AssertionError("CUDA was touched")

    monkeypatch.setattr(torch.cuda, "is_available", touched)
    monkeypatch.setattr(torch.cuda, "_lazy_init", touched)
    assert training.choose_device("cpu") == CPU


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "xyz"])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(ValueError, match="pass 'auto' or 'cpu'"):
        training.choose_device(name)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_denoises_as_well_as_the_processor(truth, counts):
    on_cpu, on_cuda = (fit(counts, device=device).profiles for device in ("cpu", "cuda"))
    assert divergence(truth, on_cuda) == pytest.approx(divergence(truth, on_cpu), rel=0.2)


def test_it_can_be_calibrated_like_any_other_denoiser(adata):
    method = n2s.Autoencoder(width=8, n_hidden=32, n_components=10, device="cpu", n_epochs=4)
    found = n2s.calibrate(adata, method, {"prior_scale": [0.001, 0.08]})
    assert found.best == {"prior_scale": 0.08}  # a tight prior leaves every gene at its mean


@pytest.mark.parametrize("loss", ["multinomial", "mse_sqrt"])
def test_cells_that_are_not_in_memory_train_it_too(counts, truth, loss, monkeypatch):
    """From a Dask array, in pools of a few cells, it comes as near to the truth as from memory."""
    da = pytest.importorskip("dask.array")
    monkeypatch.setattr("sc_noise2self._blocks._STRETCH", 30)
    monkeypatch.setattr("sc_noise2self._blocks._STRETCHES", 3)
    monkeypatch.setattr("sc_noise2self.methods._autoencoder._LEARNED_CELLS", 200)
    batch = pd.Categorical(np.where(np.arange(counts.shape[0]) % 2, "a", "b"))
    method = n2s.Autoencoder(
        width=8, n_hidden=32, n_components=10, n_epochs=30, device="cpu", loss=loss, batch_key="batch"
    )
    inside = ad.AnnData(counts.copy(), obs=pd.DataFrame({"batch": batch}, index=[f"c{i}" for i in range(300)]))
    outside = ad.AnnData(da.from_array(counts, chunks=(50, -1), asarray=False), obs=inside.obs.copy())
    for adata in (inside, outside):
        n2s.denoise(adata, method, write_layer=False)
    assert isinstance(outside.obsm["denoised"], da.Array)
    found, expected = (n2s.get.denoised(adata).to_numpy() for adata in (outside, inside))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
    assert divergence(truth, found) < 0.5 * mean_divergence(truth, counts)


def test_a_pool_has_each_cell_once_and_none_of_what_was_set_aside(counts):
    some = np.array([3, 70, 299])
    aside = counts[some].copy()
    aside.data = np.ceil(aside.data / 2)
    streamed = StreamedCounts(Counts.of(counts), None, CPU, Aside(some, aside))
    total = sum(entries.dense().sum(dim=0) for entries in streamed.batches(np.random.default_rng(0), 64))
    expected = column_sums(counts) - column_sums(aside)
    np.testing.assert_allclose(total.numpy(), expected, rtol=1e-6)
    assert sum(1 for _ in streamed.batches(np.random.default_rng(0), 64)) == 5


def test_counts_too_large_for_the_device_are_streamed(counts, truth, monkeypatch):
    monkeypatch.setattr("sc_noise2self.methods._autoencoder._LEARNED_CELLS", 200)
    monkeypatch.setattr("sc_noise2self._blocks._STRETCH", 30)
    monkeypatch.setattr("sc_noise2self._blocks._STRETCHES", 3)
    made = []
    init = StreamedCounts.__init__
    monkeypatch.setattr(StreamedCounts, "__init__", lambda *args: (made.append(1), init(*args))[1])
    streamed = fit(counts)
    assert made
    made.clear()
    monkeypatch.setattr("sc_noise2self.methods._network._fits", lambda counts, device: True)
    resident = fit(counts)
    assert not made
    assert divergence(truth, streamed.profiles) < 1.3 * divergence(truth, resident.profiles)


@pytest.mark.parametrize("n_populations", [1, 3])
@pytest.mark.parametrize("height", [0.0, 0.25])
def test_profiles_are_scaled_on_a_device_as_on_the_processor(n_populations, height):
    def profiles():
        rng = np.random.default_rng(1)
        loadings = np.hstack([rng.normal(size=(80, 5)), np.ones((80, 1))]).astype(np.float32)
        scores = np.hstack([rng.normal(size=(400, 5)), np.zeros((400, 1))]).astype(np.float32)
        size, share = rng.integers(0, 500, 400).astype(float), rng.dirichlet(np.ones(80))
        size[:3] = 0
        found = LowRankProfiles.unscaled("exp", scores, loadings, size, share, rng.uniform(0.8, 1.2, 80))
        factors = rng.uniform(0, 2, (n_populations, 80)).astype(np.float32)
        factors[:, 5] = 0
        factors[-1] = 0  # cells there have the profile of the population
        own = [np.sqrt(rng.dirichlet(np.ones(80), n_populations)), factors, rng.dirichlet(np.ones(80), n_populations)]
        return found.of_populations(Populations(*(each.astype(np.float32) for each in own), height))

    here = profiles()
    there = DeviceProfiles.on(CPU, profiles())
    for _ in range(2):  # populations are found, then known
        np.testing.assert_allclose(there.sums_of_populations(), here.sums_of_populations(), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(there.population, here.population)
        np.testing.assert_allclose(there.scales(), here.scales(), rtol=1e-5)
        np.testing.assert_allclose(there.counts(), here.counts(), rtol=1e-4, atol=1e-6)
    assert len(np.unique(here.population)) == n_populations


def test_gram_products_on_a_device_are_those_of_the_processor(counts):
    vectors = np.random.default_rng(0).normal(size=(120, 7)).astype(np.float32)
    expected = counts.T @ (counts @ vectors)
    np.testing.assert_allclose(gram_product_on(CPU)(counts, vectors), expected, rtol=1e-5, atol=1e-2)


PROCESS = """
import sys
import anndata as ad, numpy as np, torch
sys.path.insert(0, {tests!r})
from helpers import low_rank_profiles, poisson_counts
import sc_noise2self as n2s
torch.distributed.init_process_group("gloo")
torch.set_num_threads(1)
adata = ad.AnnData(poisson_counts(low_rank_profiles(300, 120, 5, seed=0), depth=600, seed=1))
n2s.denoise(adata, n2s.Autoencoder(width=(16, 1), n_hidden=32, n_components=10, device="cpu", n_epochs=30))
np.save({out!r} + f"/{{torch.distributed.get_rank()}}.npy", adata.layers["denoised"])
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_several_processes_train_one_network(tmp_path, truth, counts):
    script = tmp_path / "script.py"
    script.write_text(PROCESS.format(tests=str(Path(__file__).parent), out=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    subprocess.run(command, check=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"})
    one, two = (np.load(tmp_path / f"{rank}.npy") for rank in (0, 1))
    assert one.tobytes() == two.tobytes()
    alone = [fit(counts, n_epochs=30, seed=seed).profiles for seed in range(3)]
    errors = [divergence(truth, each) for each in alone]
    assert divergence(truth, one) < max(errors) + 2 * (max(errors) - min(errors))


def test_processes_share_the_cells_out():
    cells = np.arange(3, 14)
    shares = [Process(number, 3).own(cells) for number in range(3)]
    assert [len(share) for share in shares] == [4, 4, 4]
    assert set(np.concatenate(shares)) == set(cells)


def test_steps_and_epochs_of_many_cells_are_bounded(counts, monkeypatch):
    """300 cells count as very many: three epochs of the largest batches make the steps, and no more are shown."""
    monkeypatch.setattr("sc_noise2self.methods._autoencoder._CELLS_SHOWN", 0)
    monkeypatch.setattr("sc_noise2self.methods._autoencoder._STEPS", 13)
    monkeypatch.setattr("sc_noise2self.methods._autoencoder._BATCHES", (16, 64))
    schedules, made = [], training.Schedule
    monkeypatch.setattr(training, "Schedule", lambda *args: schedules.append(made(*args)) or schedules[-1])
    fit(counts, n_epochs=None)
    assert [(each.n_epochs, each.batch_size) for each in schedules] == [(3, 64)]
    fit(counts, n_epochs=20)
    assert (schedules[-1].n_epochs, schedules[-1].batch_size) == (20, 64)
    fit(counts, n_epochs=1)
    assert (schedules[-1].n_epochs, schedules[-1].batch_size) == (1, 23)  # as many as make 13 steps


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_it_trains_where_gradients_are_switched_off(adata, around):
    method = n2s.Autoencoder(width=4, n_epochs=3, device="cpu")
    expected = n2s.denoise(adata, method, copy=True)
    with around():
        n2s.denoise(adata, method)
    np.testing.assert_array_equal(adata.layers["denoised"], expected.layers["denoised"])
