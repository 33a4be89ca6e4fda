"""The paper's analyses against finite differences, closed forms and scoring by hand."""

import itertools
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
from bnrnn.config import CharacterConfig, ModelConfig
from bnrnn.datasets import load_mnist
from bnrnn.errors import ConfigError, DataError
from bnrnn.report.analysis_figures import CAPTIONS, FIGURES
from bnrnn.report.document import Figure
from bnrnn.report.figures import plt
from bnrnn.report.report import document
from bnrnn.report.results import collect
from bnrnn.report.runs import analysis_name, find
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
        """States from frame `first` on, and the loss."""
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


def test_a_gradient_of_zero_is_null():
    # BN takes out what all sequences of a batch have in common: here, all of it.
    images, labels = np.full((2, 3), 9, dtype=np.uint8), np.array([4, 4])
    result = gradient_flow(images, labels, [0.5], ["identity"], 1, hidden_size=12, noise=0.0)
    (curve,) = json.loads(json.dumps(result, allow_nan=False))["curves"]
    # p = 1/10: the norm of (p - y) / 2, and W_y keeps it.
    last = round(float(np.log10(np.sqrt(0.9**2 + 9 * 0.1**2) / 2)), 2)
    assert curve["median"] == curve["lowest"] == curve["highest"] == [None, last]


def test_repeats_differ_by_their_seed():
    images, labels = make_images()
    common = {"gammas": [0.3, 1.0], "matrices": ["orthogonal"], "hidden_size": 12}
    whole = gradient_flow(images, labels, repeats=3, seed=5, **common)
    assert whole["t"] == [0, 4, 8, 11]
    single = [gradient_flow(images, labels, repeats=1, seed=s, **common) for s in (5, 6, 7)]
    for k, curve in enumerate(whole["curves"]):
        assert curve["gamma"] == common["gammas"][k]
        each = np.array([result["curves"][k]["median"] for result in single])
        assert len(np.unique(each[:, 0])) == 3
        assert [curve["lowest"], curve["median"], curve["highest"]] == np.sort(each, 0).tolist()


@needs_data("mnist")
def test_a_small_gamma_keeps_the_gradient_on_mnist_and_an_orthogonal_matrix_reverses_it():
    data = load_mnist(DATA)
    result = gradient_flow(
        data.train_images[:100], data.train_labels[:100], [0.1, 0.7, 1.0],
        ["identity", "orthogonal"], 1,
    )  # fmt: skip
    curves = {
        (curve["matrix"], curve["gamma"]): dict(zip(result["t"], curve["median"], strict=True))
        for curve in result["curves"]
    }
    assert result["t"][-1] == 783
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
    # 1.0 grows by 13.9 decades within 392 steps where the matrix is orthogonal.
    assert orthogonal[2][392] == pytest.approx(12, abs=2)


def test_the_derivative_of_tanh():
    sigmas = [0.0, 0.1, 0.25, 0.5, 0.75, 1.0]
    result = tanh_derivative(sigmas)
    # Means and quartiles of two million samples, to three digits.
    known = [
        [1, 1, 1], [0.990, 0.987, 0.999], [0.944, 0.922, 0.994], [0.827, 0.731, 0.975],
        [0.707, 0.513, 0.945], [0.606, 0.331, 0.905],
    ]  # fmt: skip
    names = ("mean", "lower_quartile", "upper_quartile")
    found = np.array([result[name] for name in names]).T
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
    assert tanh_derivative([1.0])["mean"][0] == pytest.approx(expected, abs=1e-6)
    # For a wide x only the density at 0 counts: the integral of 1 - tanh² is 2.
    sigma = 20.0
    near_zero = 2 / (sigma * np.sqrt(2 * np.pi))
    assert tanh_derivative([sigma])["mean"][0] == pytest.approx(near_zero, rel=2e-3)


@pytest.mark.parametrize("norms", [{}, NORMALIZED])
def test_bits_per_character_of_slices(task, norms):
    model = make_model(task, norms)
    text = torch.from_numpy(task.corpus.test.astype(np.int64))
    cut = [10, 30]
    model.train()  # the analysis has to leave it
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

    assert len(text) == 200  # 20 slices in fours of 5; 6 in twos of 3, and 20 characters left
    with torch.no_grad():
        expected = {"population": [by_hand(10, 1), by_hand(30, 1)]}
        if norms:
            with batch_statistics(model):
                expected["batch"] = [by_hand(10, 5), by_hand(30, 3)]
            assert abs(expected["batch"][0] - expected["population"][0]) > 1e-3
    assert result["bpc"].keys() == expected.keys()
    for kind, values in expected.items():
        assert result["bpc"][kind] == pytest.approx(values, abs=6e-6)
    assert result["lengths"] == cut


def test_a_length_beyond_the_test_string(task):
    assert len(lengths(make_model(task, {}), task, [200], 5, CPU)["bpc"]["population"]) == 1
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
    result = json.loads(json.dumps(population(model, 10, seed=1)))
    assert (result["steps"], result["t"]) == (steps, t)
    assert len(set(result["recurrent"]["units"])) == 10
    assert max(result["recurrent"]["units"]) >= 6  # of all four gates
    assert result["cell"]["units"] == list(range(6))  # there are no more
    for term, name in (("recurrent", "hh_l0"), ("cell", "c_l0")):
        statistics = lstm.statistics[name]
        for key, buffer in (("mean", statistics.mean), ("variance", statistics.var)):
            expected = buffer[result["t"]][:, result[term]["units"]].T.numpy()
            np.testing.assert_allclose(result[term][key], expected, rtol=6e-4)
    assert population(model, 10, seed=2)["recurrent"] != result["recurrent"]


@pytest.mark.parametrize("norms", [{"recurrent_norm": "none"}, {"cell_norm": "none"}])
def test_population_statistics_need_a_bn_lstm(norms):
    for model in (BNLSTM(3, 6, **norms), torch.nn.LSTM(3, 6)):
        with pytest.raises(ConfigError, match="model=bnlstm"):
            population(model, 10, 0)


def test_the_figures(task):
    images, labels = make_images()
    model = make_model(task, NORMALIZED)
    facts = {"task": "ptb", "seed": 0, "step": 3160}
    results = {
        "gradient_flow": [
            gradient_flow(images, labels, [0.1, 0.55], ["identity", "orthogonal"], 2, 12)
        ],
        "tanh_derivative": [tanh_derivative([0.0, 0.5, 1.0])],
        "lengths": [
            lengths(model, task, [10, 20], 5, CPU) | {"model": name} | facts
            for name, model in (*[("bnlstm", model)] * 2, ("lstm", make_model(task, {})))
        ],
        "population": [population(model, 4, 0) | {"model": "bnlstm"} | facts] * 2,
    }
    assert results.keys() == FIGURES.keys() == CAPTIONS.keys()
    figures = {}
    for name, found in results.items():
        assert all(result["analysis"] == name for result in found)
        figures[name] = FIGURES[name](found)
        figures[name].canvas.draw()
    identity, orthogonal = figures["gradient_flow"].axes
    # The paper has a curve for 0.1, for W_h = I.
    assert (len(identity.lines), len(orthogonal.lines)) == (3, 2)
    (axes,) = figures["lengths"].axes
    assert len(axes.lines) == 3 + 5
    assert legend(figures["lengths"]) == [
        "LSTM, the paper", "BN-LSTM, batch statistics, the paper",
        "BN-LSTM, population statistics, the paper",
        "LSTM, 3,160 steps", "BN-LSTM, batch statistics, 3,160 steps",
        "BN-LSTM, population statistics, 3,160 steps",
    ]  # fmt: skip
    assert axes.lines[3].get_ydata().tolist() == results["lengths"][2]["bpc"]["population"]
    assert len(figures["population"].axes) == 8


@pytest.fixture(autouse=True)
def _no_figures_left():
    yield
    plt.close("all")


def legend(figure):
    return [text.get_text() for text in figure.legends[0].texts]


LENGTHS = {
    "analysis": "lengths", "lengths": [10, 20], "bpc": {"population": [2.0, 1.9]}, "task": "ptb",
    "model": "lstm", "seed": 0, "step": 100,
}  # fmt: skip
CURVES = {"units": [0], "mean": [[0.0, 1.0]], "variance": [[1.0, 1.0]]}
POPULATION = {
    "analysis": "population", "t": [0, 1], "recurrent": CURVES, "cell": CURVES, "task": "ptb",
    "model": "bnlstm", "seed": 0, "step": 3160,
}  # fmt: skip


def test_a_figure_says_of_which_models_it_is():
    figure = FIGURES["lengths"]([
        LENGTHS | {"task": "text8", "data": "text8-part", **own}
        for own in (
            {"seed": 1, "step": 1580, "gamma_init": 0.1, "hidden_size": 1000, "scale": None},
            {},
            {"hidden_size": 200, "scale": "minutes"},
            {"model": "bnlstm", "gamma_init": 0.3, "bpc": {"batch": [3.0, 2.9]}},
        )
    ])  # fmt: skip
    assert legend(figure) == [
        "LSTM, 100/1,580 steps, seeds 0/1",
        "LSTM, 200 units, 100 steps, seed 0, scale=minutes",
        "BN-LSTM, batch statistics, γ 0.3, 100 steps, seed 0",
    ]
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "text8, a part of it"
    assert [line.get_marker() for line in axes.lines] == ["o", "o", "s", "o"]

    def titles(*results):
        return [part.get_suptitle() for part in FIGURES["population"](list(results)).subfigs]

    assert titles(POPULATION) == ["Penn Treebank, characters: BN-LSTM, 3,160 training steps"]
    assert titles(POPULATION | {"seed": 1, "scale": "hour"}, POPULATION) == [
        "Penn Treebank, characters: BN-LSTM, 3,160 training steps, seed 0",
        "Penn Treebank, characters: BN-LSTM, 3,160 training steps, seed 1, scale=hour",
    ]


def put(folder, result):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result))


def test_the_analysis_of_the_model_that_was_trained_furthest_counts(tmp_path):
    outputs, results = tmp_path / "outputs", tmp_path / "results"
    name = "lengths-ptb-lstm-seed0"

    def shown(folder):
        return {key: (a["step"], a.get("mark")) for key, a in find(folder).analyses.items()}

    put(outputs / "ptb/lstm/run/lengths/2026-01-01_00-00-02", LENGTHS | {"mark": "new"})
    put(outputs / "ptb/lstm/run/lengths/2026-01-01_00-00-01", LENGTHS | {"mark": "old"})
    put(outputs / "sweeps/now/0-run/lengths/2026-01-01_00-00-00", LENGTHS | {"mark": "sweep"})
    assert shown(outputs) == {name: (100, "new")}
    collect(outputs, results)
    assert shown(results / "analyses") == {name: (100, "new")}

    put(outputs / "sweeps/now/0-run/lengths/2026-01-01_00-00-03", LENGTHS | {"step": 99})
    assert shown(outputs) == {name: (100, "new")}
    put(outputs / "a/lengths/2025-01-01_00-00-00", LENGTHS | {"step": 101})
    assert shown(outputs) == {name: (101, None)}
    collect(outputs, results)
    assert shown(results / "analyses") == {name: (101, None)}

    # One of fewer steps stays out of results/; one of as many is newer.
    for step, kept in ((100, (101, None)), (101, (101, "again"))):
        other = tmp_path / f"other-{step}"
        put(other / "run", LENGTHS | {"step": step, "mark": "again"})
        collect(other, results)
        assert shown(results / "analyses") == {name: kept}


def test_analyses_of_unlike_models_have_names_of_their_own():
    usual = {"gamma_init": 0.1, "hidden_size": 1000, "scale": "full", "data": "ptb"}
    for own, name in (
        ({}, "lengths-ptb-lstm-seed0"),
        (usual, "lengths-ptb-lstm-seed0"),
        (usual | {"gamma_init": 0.3}, "lengths-ptb-lstm-gamma0.3-seed0"),
        (usual | {"hidden_size": 200}, "lengths-ptb-lstm-200_units-seed0"),
        ({"task": "text", "data": "text-book"}, "lengths-text-book-lstm-seed0"),
    ):  # fmt: skip
        assert analysis_name(LENGTHS | own) == name
    # Not the size of a model of a run: of the one in the analysis.
    assert analysis_name({"analysis": "gradient_flow", "hidden_size": 100}) == "gradient_flow"


def test_the_report_has_a_figure_a_data_set(tmp_path):
    for k, (result, task) in enumerate(itertools.product((LENGTHS, POPULATION), ("pydocs", "ptb"))):
        put(tmp_path / f"run{k}", result | {"task": task})
    blocks = document(find(tmp_path), "Report", "", lambda run: run.path.name)
    found = {block.name: block for block in blocks if isinstance(block, Figure)}
    assert list(found) == ["lengths", "lengths-pydocs", "population", "population-pydocs"]
    assert found["lengths"].alt == "Longer sequences than in training"
    assert found["lengths-pydocs"].alt == (
        "Longer sequences than in training: Python's documentation, the embedded corpus"
    )
    assert "the paper's, after its full training" in found["lengths"].caption
    assert "the paper" not in found["lengths-pydocs"].caption
    assert len(legend(found["lengths"].draw())) == 3 + 1
    assert legend(found["lengths-pydocs"].draw()) == ["LSTM, 100 steps"]


SMALL = ["max_steps=2", "model.hidden_size=8", "calibration_batches=2", "task.batch_size=500",
         "task.length=10", "test_calibration_batches=2", "task.stream_length=50000",
         "model.gamma_init=0.2", "lengths.lengths=[10,40]"]  # fmt: skip


def test_what_is_analysed_already_is_not_analysed_again(bnrnn_here, tmp_path):
    assert bnrnn_here(*SMALL).returncode == 0
    (run,) = tmp_path.glob("outputs/pydocs/bnlstm/*")

    def analyse(*arguments):
        """What was said, and whether a folder came of it."""
        before = set(tmp_path.rglob("*"))
        done = bnrnn_here(*arguments, *SMALL)
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
    facts = {"task": "pydocs", "data": "pydocs", "model": "bnlstm", "gamma_init": 0.2,
             "hidden_size": 8, "seed": 0, "scale": None, "step": 2, "units": 3}  # fmt: skip
    assert {key: result[key] for key in facts} == facts

    # Asked for by name, with other settings, or of a model that went on, it is made again.
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
        arguments = "ARGS=outputs=somewhere task.permutation=official_code"
        commands = make("--dry-run", arguments, f"reproduce-{target}")
        assert commands.index(expected) < commands.index("bin/bnrnn ")
        assert "bnrnn mode=report outputs=somewhere &&" in commands
        assert commands.count("outputs=somewhere task.permutation=official_code;") > 0
    assert make("--dry-run", "ARGS=outputs=somewhere", "report").splitlines()[-1].endswith(
        "bnrnn mode=report outputs=somewhere"
    )  # fmt: skip
