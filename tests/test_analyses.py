"""The paper's analyses, compared with finite differences, closed forms and scores by hand."""

import dataclasses
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bnrnn import BNLSTM, batch_statistics, calibrate
from bnrnn.analyses.gradient_flow import gradient_flow, hidden_gradients, log_norms
from bnrnn.analyses.lengths import lengths
from bnrnn.analyses.population import population
from bnrnn.analyses.tanh_derivative import tanh_derivative
from bnrnn.datasets import load_mnist
from bnrnn.errors import ConfigError, DataError
from bnrnn.plots.style import encode, plt
from bnrnn.report.analyses import analysis_name, furthest
from bnrnn.report.analysis_figures import FIGURES
from bnrnn.report.document import Figure
from bnrnn.report.report import document
from bnrnn.report.results import collect
from bnrnn.runs.analysis import (
    KINDS,
    Analysed,
    Band,
    GradientFlow,
    Lengths,
    Population,
    TanhDerivative,
    Units,
    read_analysis,
    write_analysis,
)
from bnrnn.runs.find import find
from bnrnn.settings.schema import CharacterConfig, ModelConfig
from bnrnn.tasks import CharacterTask
from tests.conftest import DATA, ROOT, needs_data
from tests.equations import bn

CPU = torch.device("cpu")
NORMALIZED = {"input_norm": "frame", "recurrent_norm": "frame", "cell_norm": "frame"}


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setenv("BNRNN_CACHE_DIR", str(tmp_path))
    path = tmp_path / "text.txt"
    letters = np.random.default_rng(0).integers(97, 107, 4000, dtype=np.uint8)
    path.write_bytes(letters.tobytes())
    config = CharacterConfig(name="text", corpus="text", path=str(path), length=10, batch_size=8)
    return CharacterTask(config, 0, Path())


def make_model(task, norms):
    model = task.build_model(ModelConfig(name="m", hidden_size=6, **norms), "auto").double()
    if norms:
        calibrate(model, task.calibration_batches(5), lambda batch: model(batch.input))
    return model


def make_images(n=6, steps=12):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, steps), dtype=np.uint8), rng.integers(0, 10, n)


def test_hidden_gradients_are_finite_differences_of_the_loss():
    rng = np.random.default_rng(0)
    steps, batch, hidden, classes, gamma = 5, 4, 3, 3, 0.7
    pixels, target = rng.random((steps, batch)), rng.integers(0, classes, batch)
    w_h, w_x = rng.normal(size=(hidden, hidden)), rng.normal(size=(hidden, 1))
    w_y, h_0 = rng.normal(size=(classes, hidden)), rng.normal(size=(batch, hidden))

    def run(h, first):
        """Return the states from frame `first` on, and the loss."""
        states = []
        for x in pixels[first:]:
            z = h @ w_h.T + x[:, None] @ w_x.T
            h = np.tanh(bn(z, gamma, 0, z.mean(0), z.var(0), 1e-5))
            states.append(h)
        logits = h @ w_y.T
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return states, -log_p[np.arange(batch), target].mean()

    expected = np.empty((steps, batch, hidden))
    states, _ = run(h_0, 0)
    for t, b, k in np.ndindex(*expected.shape):
        step = np.zeros((batch, hidden))
        step[b, k] = 1e-5
        above, below = (run(states[t] + sign * step, t + 1)[1] for sign in (1, -1))
        expected[t, b, k] = (above - below) / 2e-5
    tensors = (torch.from_numpy(a) for a in (pixels, target, w_h, w_x, w_y, h_0))
    found = hidden_gradients(*tensors, gamma)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-9)


def test_norms_far_below_the_square_root_of_the_smallest_number():
    gradients = torch.tensor([[3.0, 4.0], [6.0, 8.0]], dtype=torch.float64)  # norms 5 and 10
    scales = torch.tensor([1.0, 1e-200, 1e200, 0.0], dtype=torch.float64)
    found = log_norms(scales[:, None, None] * gradients)
    at_one = np.log10(7.5)
    assert found.tolist() == pytest.approx([at_one, at_one - 200, at_one + 200, -np.inf])


def test_a_gradient_of_zero_is_null(tmp_path):
    # BN removes what all sequences of a batch have in common; here they are equal.
    images, labels = np.full((2, 3), 9, dtype=np.uint8), np.array([4, 4])
    result = gradient_flow(images, labels, [0.5], ["identity"], 1, hidden_size=12, noise=0.0)
    write_analysis(tmp_path / "result.json", result)
    assert read_analysis(tmp_path / "result.json") == result
    (band,) = result.curves
    # p = 1/10: the norm of (p - y) / 2, which W_y preserves.
    last = round(float(np.log10(np.sqrt(0.9**2 + 9 * 0.1**2) / 2)), 2)
    assert band.median == band.lowest == band.highest == [None, last]


def test_repeats_differ_by_their_seed():
    images, labels = make_images()
    common = {"gammas": [0.3, 1.0], "matrices": ["orthogonal"], "hidden_size": 12}
    whole = gradient_flow(images, labels, repeats=3, seed=5, **common)
    assert whole.t == [0, 4, 8, 11]
    single = [gradient_flow(images, labels, repeats=1, seed=s, **common) for s in (5, 6, 7)]
    for k, band in enumerate(whole.curves):
        assert band.gamma == common["gammas"][k]
        each = np.array([result.curves[k].median for result in single])
        assert len(np.unique(each[:, 0])) == 3
        assert [band.lowest, band.median, band.highest] == np.sort(each, 0).tolist()


@needs_data("mnist")
def test_a_small_gamma_keeps_the_gradient_on_mnist_and_an_orthogonal_matrix_reverses_it():
    data = load_mnist(DATA)
    result = gradient_flow(
        data.train_images[:100], data.train_labels[:100], [0.1, 0.7, 1.0],
        ["identity", "orthogonal"], 1,
    )  # fmt: skip
    curves = {
        (band.matrix, band.gamma): dict(zip(result.t, np.array(band.median, float), strict=True))
        for band in result.curves
    }
    assert result.t[-1] == 783
    for curve in curves.values():
        assert curve[783] == pytest.approx(-2.02, abs=0.015)
    identity, orthogonal = (
        [curves[matrix, gamma] for gamma in (0.1, 0.7, 1.0)]
        for matrix in ("identity", "orthogonal")
    )
    for t in (0, 100, 200, 300, 400, 500, 600, 700):
        assert identity[0][t] > identity[1][t] > identity[2][t]
        assert orthogonal[0][t] < orthogonal[1][t] < orthogonal[2][t]
    # The published curves: 0.1 stays near 10^-3, 1.0 is below 10^-18 within 84 steps.
    assert [identity[0][t] for t in (100, 400, 700)] == pytest.approx([-3.1, -3.1, -2.55], abs=0.5)
    assert identity[2][700] == pytest.approx(-18.2, abs=2)
    assert identity[2][400] < -24
    # With an orthogonal matrix, 1.0 grows by 13.9 decades within 392 steps.
    assert orthogonal[2][392] == pytest.approx(12, abs=2)


def test_the_derivative_of_tanh():
    sigmas = [0.0, 0.1, 0.25, 0.5, 0.75, 1.0]
    result = tanh_derivative(sigmas)
    # Means and quartiles of two million samples, to three digits.
    known = [
        [1, 1, 1], [0.990, 0.987, 0.999], [0.944, 0.922, 0.994], [0.827, 0.731, 0.975],
        [0.707, 0.513, 0.945], [0.606, 0.331, 0.905],
    ]  # fmt: skip
    found = np.array([result.mean, result.lower_quartile, result.upper_quartile]).T
    np.testing.assert_allclose(found, known, atol=1e-3)

    z = np.random.default_rng(0).normal(size=1_000_000)
    for sigma, row in zip(sigmas, found, strict=True):
        sample = 1 - np.tanh(sigma * z) ** 2
        np.testing.assert_allclose(
            row, [sample.mean(), *np.quantile(sample, [0.25, 0.75])], atol=1.5e-3
        )


def test_the_mean_derivative_of_tanh_is_exact():
    nodes, weights = np.polynomial.hermite_e.hermegauss(150)
    expected = ((1 - np.tanh(nodes) ** 2) * weights).sum() / weights.sum()
    assert tanh_derivative([1.0]).mean[0] == pytest.approx(expected, abs=1e-6)
    # For large σ only the density at 0 matters: the integral of 1 - tanh² is 2.
    sigma = 20.0
    near_zero = 2 / (sigma * np.sqrt(2 * np.pi))
    assert tanh_derivative([sigma]).mean[0] == pytest.approx(near_zero, rel=2e-3)


@pytest.mark.parametrize("norms", [{}, NORMALIZED])
def test_bits_per_character_of_slices(task, norms):
    model = make_model(task, norms)
    text = torch.from_numpy(task.corpus.test.astype(np.int64))
    cut = [10, 30]
    model.train()  # the analysis has to set evaluation mode
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = lengths(model, task, cut, 5, CPU)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def by_hand(length, batch_size):
        slices = list(text.split(length))[: len(text) // length]
        nats = []
        for first in range(0, len(slices), batch_size):
            rows = torch.stack(slices[first : first + batch_size])
            logits, _ = model(rows[:, :-1].t())
            target = rows[:, 1:].t().flatten()
            nats.append(F.cross_entropy(logits.flatten(0, 1), target, reduction="none"))
        return float(torch.cat(nats).mean()) / np.log(2)

    assert len(text) == 200  # 20 slices in 4 batches of 5; or 6 in 2 of 3, and 20 characters left
    with torch.no_grad():
        expected = {"population": [by_hand(10, 1), by_hand(30, 1)]}
        if norms:
            with batch_statistics(model):
                expected["batch"] = [by_hand(10, 5), by_hand(30, 3)]
            assert abs(expected["batch"][0] - expected["population"][0]) > 1e-3
    assert result.bpc.keys() == expected.keys()
    for kind, values in expected.items():
        assert result.bpc[kind] == pytest.approx(values, abs=6e-6)
    assert result.lengths == cut


def test_a_length_beyond_the_test_string(task):
    assert len(lengths(make_model(task, {}), task, [200], 5, CPU).bpc["population"]) == 1
    with pytest.raises(DataError, match=r"200 characters, too few for one slice.*lengths.lengths"):
        lengths(make_model(task, {}), task, [10, 201], 5, CPU)
    with pytest.raises(DataError, match=r"two slices.*of 101: lower lengths.lengths"):
        lengths(make_model(task, NORMALIZED), task, [101], 5, CPU)


@pytest.mark.parametrize(
    ("steps", "t"),
    [
        (5, [*range(5)]),
        (60, [*range(60)]),
        (89, [*range(30), *range(30, 89, 2)]),
    ],
)
def test_population_statistics_of_some_units(steps, t):
    lstm = BNLSTM(3, 6, init_noise=0.1)
    calibrate(lstm, [torch.randn(steps, 4, 3)])
    model = torch.nn.Sequential(torch.nn.ReLU(), lstm)
    result = population(model, 10, seed=1)
    assert (result.steps, result.t) == (steps, t)
    assert len(set(result.recurrent.units)) == 10
    assert max(result.recurrent.units) >= 6  # chosen from all four gates
    assert result.cell.units == list(range(6))  # all that there are
    for term, name in ((result.recurrent, "hh_l0"), (result.cell, "c_l0")):
        statistics = lstm.statistics[name]
        for found, buffer in ((term.mean, statistics.mean), (term.variance, statistics.var)):
            expected = buffer[result.t][:, term.units].T.numpy()
            np.testing.assert_allclose(found, expected, rtol=6e-4)
    assert population(model, 10, seed=2).recurrent != result.recurrent


@pytest.mark.parametrize("norms", [{"recurrent_norm": "none"}, {"cell_norm": "none"}])
def test_population_statistics_need_a_bn_lstm(norms):
    for model in (BNLSTM(3, 6, **norms), torch.nn.LSTM(3, 6)):
        with pytest.raises(ConfigError, match="model=bnlstm"):
            population(model, 10, 0)


OF = Analysed(
    "ptb", "ptb", "Penn Treebank, characters", "lstm", "LSTM", 0.1, 1000, seed=0, step=100,
    calibrated=None,
)  # fmt: skip
BN = dataclasses.replace(OF, model="bnlstm", model_title="BN-LSTM")
LENGTHS = Lengths([10, 20], 5, 200, {"population": [2.0, 1.9]}, of=OF)
UNITS = Units([0], [[0.0, 1.0]], [[1.0, 1.0]])
POPULATION = Population(0, 1, 2, [0, 1], UNITS, UNITS, of=dataclasses.replace(BN, step=3160))


def of(result, **changes):
    """Return the result as one of another model."""
    return dataclasses.replace(result, of=dataclasses.replace(result.of, **changes))


def draw(name, *results):
    return FIGURES[name].draw(list(results))


def test_the_figures(task):
    images, labels = make_images()
    model = make_model(task, NORMALIZED)
    ours = dataclasses.replace(lengths(model, task, [10, 20], 5, CPU), of=BN)
    plain = dataclasses.replace(lengths(make_model(task, {}), task, [10, 20], 5, CPU), of=OF)
    units = dataclasses.replace(population(model, 4, 0), of=BN)
    flow = gradient_flow(images, labels, [0.1, 0.55], ["identity", "orthogonal"], 2, 12)
    figures = {
        "gradient_flow": draw("gradient_flow", flow),
        "tanh_derivative": draw("tanh_derivative", tanh_derivative([0.0, 0.5, 1.0])),
        "lengths": draw("lengths", ours, ours, plain),
        "population": draw("population", units, units),
    }
    assert figures.keys() == FIGURES.keys() == KINDS.keys()
    for figure in figures.values():
        figure.canvas.draw()
    identity, orthogonal = figures["gradient_flow"].axes
    # The paper has a curve for γ = 0.1 with W_h = I.
    assert (len(identity.lines), len(orthogonal.lines)) == (3, 2)
    (axes,) = figures["lengths"].axes
    assert len(axes.lines) == 3 + 5
    assert legend(figures["lengths"]) == [
        "LSTM, the paper", "BN-LSTM, batch statistics, the paper",
        "BN-LSTM, population statistics, the paper",
        "LSTM, 100 steps", "BN-LSTM, batch statistics, 100 steps",
        "BN-LSTM, population statistics, 100 steps",
    ]  # fmt: skip
    assert axes.lines[3].get_ydata().tolist() == plain.bpc["population"]
    assert len(figures["population"].axes) == 8


@pytest.fixture(autouse=True)
def _no_figures_left():
    yield
    plt.close("all")


def legend(figure):
    return [text.get_text() for text in figure.legends[0].texts]


def test_a_figure_names_its_models():
    part = of(LENGTHS, task="text8", data="text8-part", data_title="Part of text8",
              hidden_size=2000)  # fmt: skip
    batch = dataclasses.replace(part, bpc={"batch": [3.0, 2.9]})
    figure = draw(
        "lengths",
        of(part, seed=1, step=1580),
        part,
        of(part, hidden_size=200, scale="minutes"),
        of(batch, model="bnlstm", model_title="BN-LSTM", gamma_init=0.3),
    )
    assert legend(figure) == [
        "LSTM, 100/1,580 steps, seeds 0/1",
        "LSTM, 200 units, 100 steps, seed 0, scale=minutes",
        "BN-LSTM, batch statistics, γ 0.3, 100 steps, seed 0",
    ]
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "Part of text8"
    assert [line.get_marker() for line in axes.lines] == ["o", "o", "s", "o"]

    def titles(*results):
        return [part.get_suptitle() for part in draw("population", *results).subfigs]

    assert titles(POPULATION) == ["Penn Treebank, characters: BN-LSTM, 3,160 training steps"]
    assert titles(of(POPULATION, seed=1, scale="hour"), POPULATION) == [
        "Penn Treebank, characters: BN-LSTM, 3,160 training steps, seed 0",
        "Penn Treebank, characters: BN-LSTM, 3,160 training steps, seed 1, scale=hour",
    ]


ODD = [float("nan"), float("inf"), -1e308, 1e308]


PLACES = [[0, 0, 0, 0], [0, 3, 1, 2], [2**53] * 4]


@pytest.mark.parametrize(
    ("x", "values"),
    [
        pytest.param(x, values, marks=[] if x in few else pytest.mark.slow)
        for x in PLACES
        for values, few in (
            (ODD, PLACES[1:2]), ([None] * 4, PLACES[:1]), ([1e308] * 4, []), ([0.0] * 4, []),
        )
    ],
)  # fmt: skip
def test_odd_numbers_are_left_out_of_a_figure(x, values):
    numbers = [np.nan if value is None else value for value in values]
    band = Band("identity", numbers[0], values, values, values)
    odd = Units([0, 0], [numbers, numbers], [numbers, numbers])
    for name, result in {
        "gradient_flow": GradientFlow([], ["identity"], 1, 1, 1, 0.0, 0, x, [band]),
        "tanh_derivative": TanhDerivative(numbers, numbers, numbers, numbers),
        "lengths": dataclasses.replace(LENGTHS, lengths=x, bpc={"batch": numbers, "$x^{$": ODD}),
        "population": dataclasses.replace(POPULATION, t=x, recurrent=odd, cell=odd),
    }.items():
        assert encode(draw(name, result), "svg").startswith(b"<?xml")


def test_a_curve_of_one_point_and_a_term_without_units():
    nothing = Units([], [], [])
    for name, result in {
        "gradient_flow": GradientFlow([], ["identity"], 1, 1, 1, 0.0, 0, [0], [
            Band("identity", 0.1, [1.0], [1.0], [1.0])
        ]),
        "tanh_derivative": TanhDerivative([0.5], [1.0], [1.0], [1.0]),
        "lengths": dataclasses.replace(LENGTHS, lengths=[10], bpc={"population": [1.0]}),
        "population": dataclasses.replace(POPULATION, t=[0], recurrent=nothing, cell=nothing),
    }.items():  # fmt: skip
        assert encode(draw(name, result), "png").startswith(b"\x89PNG")


def put(folder, result):
    folder.mkdir(parents=True, exist_ok=True)
    write_analysis(folder / "result.json", result)


def test_the_analysis_of_the_model_that_was_trained_furthest_counts(tmp_path):
    outputs, results = tmp_path / "outputs", tmp_path / "results"
    name = "lengths-ptb-lstm-seed0"

    def marked(mark, step=100):
        return dataclasses.replace(of(LENGTHS, step=step), machine=mark)

    def shown(folder):
        return {k: (a.of.step, a.machine) for k, a in furthest(find(folder).analyses).items()}

    put(outputs / "ptb/lstm/run/lengths/2026-01-01_00-00-02", marked("new"))
    put(outputs / "ptb/lstm/run/lengths/2026-01-01_00-00-01", marked("old"))
    put(outputs / "sweeps/now/0-run/lengths/2026-01-01_00-00-00", marked("sweep"))
    assert shown(outputs) == {name: (100, "new")}
    collect(outputs, results)
    assert shown(results / "analyses") == {name: (100, "new")}

    put(outputs / "sweeps/now/0-run/lengths/2026-01-01_00-00-03", marked("", 99))
    assert shown(outputs) == {name: (100, "new")}
    put(outputs / "a/lengths/2025-01-01_00-00-00", marked("", 101))
    assert shown(outputs) == {name: (101, "")}
    collect(outputs, results)
    assert shown(results / "analyses") == {name: (101, "")}

    # An analysis of fewer steps is not published in results/; one of as many is newer.
    for step, kept in ((100, (101, "")), (101, (101, "again"))):
        other = tmp_path / f"other-{step}"
        put(other / "run", marked("again", step))
        collect(other, results)
        assert shown(results / "analyses") == {name: kept}


def test_analyses_of_unlike_models_have_names_of_their_own():
    for own, name in (
        ({}, "lengths-ptb-lstm-seed0"),
        ({"scale": "full"}, "lengths-ptb-lstm-seed0"),
        ({"gamma_init": 0.3}, "lengths-ptb-lstm-gamma0.3-seed0"),
        ({"hidden_size": 200}, "lengths-ptb-lstm-200_units-seed0"),
        ({"task": "pydocs", "data": "pydocs", "hidden_size": 200}, "lengths-pydocs-lstm-seed0"),
        ({"task": "text", "data": "text-book", "hidden_size": 200}, "lengths-text-book-lstm-seed0"),
        ({"data": "../../../x", "seed": 7}, "lengths-_.._.._x-lstm-seed7"),
    ):
        assert analysis_name(of(LENGTHS, **own)) == name
    # The size is that of the model in the analysis, not of a run's model.
    flow = GradientFlow([], [], 1, 1, 100, 0.0, 0, [], [])
    assert analysis_name(flow) == "gradient_flow"


def test_the_report_has_a_figure_for_each_data_set(tmp_path):
    pydocs = {"task": "pydocs", "data": "pydocs", "data_title": "the manual", "hidden_size": 200}
    for k, result in enumerate([LENGTHS, POPULATION]):
        put(tmp_path / f"own{k}", of(result, **pydocs))
        put(tmp_path / f"ptb{k}", result)
    blocks = document(find(tmp_path), "Report", "", lambda run: run.path.name)
    found = {block.name: block for block in blocks if isinstance(block, Figure)}
    assert list(found) == ["lengths", "lengths-pydocs", "population", "population-pydocs"]
    assert found["lengths"].alt == "Longer sequences than in training"
    assert found["lengths-pydocs"].alt == "Longer sequences than in training: the manual"
    assert "the paper's, after its full training" in found["lengths"].caption
    assert "the paper" not in found["lengths-pydocs"].caption
    assert len(legend(found["lengths"].draw())) == 3 + 1
    assert legend(found["lengths-pydocs"].draw()) == ["LSTM, 100 steps"]


SMALL = ["max_steps=2", "model.hidden_size=8", "calibration_batches=2", "task.batch_size=100",
         "task.length=10", "test_calibration_batches=2",
         "model.gamma_init=0.2", "lengths.lengths=[10,40]"]  # fmt: skip


def test_what_is_analysed_already_is_not_analysed_again(bnrnn_here, tmp_path):
    text = tmp_path / "book.txt"
    text.write_bytes(np.random.default_rng(0).integers(97, 107, 20_000, dtype=np.uint8).tobytes())
    small = [*SMALL, "task=text", f"task.path={text}"]
    assert bnrnn_here(*small).returncode == 0
    (run,) = tmp_path.glob("outputs/text/bnlstm/*")

    def analyse(*arguments):
        """Run the command; return its output, and whether it created a folder."""
        before = set(tmp_path.rglob("*"))
        done = bnrnn_here(*arguments, *small)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr, bool(set(tmp_path.rglob("*")) - before)

    for mode in ("lengths", "population"):
        said, new = analyse(f"mode={mode}", "run=auto", "population.units=3")
        assert new
        assert "finished already" not in said
        (file,) = run.glob(f"{mode}/*/result.json")
        said, new = analyse(f"mode={mode}", "run=auto", "population.units=3")
        assert not new
        place = file.parent.relative_to(tmp_path)
        assert said == f"finished already: {place}/result.json, {place}/{mode}.png\n"
    result = json.loads(file.read_text())
    assert result["units"] == 3
    facts = {"task": "text", "data": "text-book", "model": "bnlstm", "gamma_init": 0.2,
             "hidden_size": 8, "seed": 0, "scale": None, "step": 2}  # fmt: skip
    assert {key: result["of"][key] for key in facts} == facts

    # It is computed again for a named run, for other settings, and after more training.
    assert analyse("mode=population", f"run={run}", "population.units=3")[1]
    assert analyse("mode=population", "run=auto", "population.units=2")[1]
    assert len(list(run.glob("population/*/result.json"))) == 3
    content = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(content | {"best_step": 3}))
    assert analyse("mode=population", "run=auto", "population.units=3")[1]


def make(*arguments):
    done = subprocess.run(
        ["make", "--no-print-directory", "--assume-old=install", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


def test_targets_say_first_what_to_expect_and_report_without_settings_of_runs():
    for target, expected in (
        ("lengths", "1.398 to 1.333"), ("population", "ten time steps"),
        ("gradient-flow", "flat at 0.1"), ("tanh", "0.99 at 0.1 and 0.61 at 1"),
    ):  # fmt: skip
        assert expected in make(f"expect-{target}")
        arguments = "ARGS=outputs=somewhere task.batch_size=5"
        commands = make("--dry-run", arguments, f"reproduce-{target}")
        assert commands.index(expected) < commands.index("bin/bnrnn ")
        assert "bnrnn mode=report outputs=somewhere &&" in commands
        assert commands.count("outputs=somewhere task.batch_size=5;") > 0
    assert make("--dry-run", "ARGS=outputs=somewhere", "report").splitlines()[-1].endswith(
        "bnrnn mode=report outputs=somewhere"
    )  # fmt: skip
