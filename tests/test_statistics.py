"""Population statistics: definition, calibration, steps beyond the last row, streaming."""

import copy

import numpy as np
import pytest
import torch

from bnrnn import BNLSTM, batch_statistics, calibrate
from bnrnn.nn.statistics import StepStatistics
from tests.equations import bn_lstm

pytestmark = pytest.mark.numeric
T, B, D, H = 6, 5, 3, 4
NORMS = {"ih": "frame", "hh": "frame", "c": "frame"}
TERMS = ("ih", "hh", "c")
SUM = {"input_norm": "none", "recurrent_norm": "sum"}


def make(**kwargs):
    lstm = BNLSTM(D, H, dtype=torch.float64, **kwargs)
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.normal_()
    return lstm


def batches(n, steps=T, batch=B):
    return [torch.randn(steps, batch, D, dtype=torch.float64) for _ in range(n)]


def moments_by_the_equations(lstm, x, norms=NORMS, **kwargs):
    weights = {name.removesuffix("_l0"): p.detach().numpy() for name, p in lstm.named_parameters()}
    zeros = np.zeros((x.shape[1], H))
    seen = bn_lstm(x.numpy(), zeros, zeros, weights, norms, **kwargs)[3]
    return {term: tuple(np.stack(part) for part in seen[term]) for term in TERMS if seen[term][0]}


@pytest.mark.parametrize(
    ("options", "norms"), [({}, NORMS), (SUM, {"ih": "none", "hh": "sum", "c": "frame"})], ids=str
)
def test_calibration_is_the_plain_average_of_the_minibatch_moments(options, norms):
    lstm, data = make(**options), batches(4)
    lstm(batches(1)[0])  # calibration must discard these running averages
    assert calibrate(lstm, data) == 4
    each = [moments_by_the_equations(lstm, x, norms) for x in data]
    for term in each[0]:
        statistics = lstm.statistics[term + "_l0"]
        for k, ours in enumerate((statistics.mean, statistics.var)):
            expected = np.mean([moments[term][k] for moments in each], axis=0)
            np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-9, atol=1e-12)
        assert statistics.num_batches.tolist() == [4] * T
    assert lstm.training


def test_evaluation_uses_population_statistics_and_the_last_step_beyond_them():
    lstm, data = make(), batches(3)
    calibrate(lstm, data)
    lstm.eval()
    x = torch.randn(T + 5, 2, D, dtype=torch.float64)
    weights = {name.removesuffix("_l0"): p.detach().numpy() for name, p in lstm.named_parameters()}
    population = {
        term: tuple(moment.numpy() for moment in lstm.statistics[term + "_l0"].population())
        for term in TERMS
    }
    zeros = np.zeros((2, H))
    expected = bn_lstm(x.numpy(), zeros, zeros, weights, NORMS, population=population)[0]
    np.testing.assert_allclose(lstm(x)[0].detach().numpy(), expected, rtol=1e-9, atol=1e-12)


def test_running_averages_start_at_the_first_batch_and_then_move_by_momentum():
    lstm, data = make(momentum=0.25), batches(6)
    mean = None
    for n, x in enumerate(data, start=1):
        found = moments_by_the_equations(lstm, x)["hh"][0]
        weight = max(1 / n, 0.25)
        mean = found if mean is None else mean + weight * (found - mean)
        lstm(x)
    np.testing.assert_allclose(lstm.statistics["hh_l0"].mean.numpy(), mean, rtol=1e-9, atol=1e-12)


def test_evaluation_changes_no_statistics():
    lstm = make()
    lstm(batches(1)[0])
    before = copy.deepcopy(lstm.state_dict())
    lstm.eval()
    lstm(batches(1)[0])
    with batch_statistics(lstm):
        lstm(batches(1)[0])
    lstm.train()
    with batch_statistics(lstm):
        lstm(batches(1)[0])
    for name, value in lstm.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_batch_statistics_are_those_of_training():
    lstm, (x,) = make(), batches(1)
    trained, _ = lstm(x)
    lstm.eval()
    with batch_statistics(lstm):
        assert torch.equal(lstm(x)[0], trained)
    assert not torch.equal(lstm(batches(1)[0])[0], trained)


def test_an_uncalibrated_model_says_so():
    lstm = make().eval()
    with pytest.raises(RuntimeError, match=r"no population statistics: .*bnrnn\.calibrate"):
        lstm(batches(1)[0])


def test_calibration_without_batches_leaves_everything_as_it_was():
    lstm = make()
    lstm(batches(1)[0])
    before = copy.deepcopy(lstm.state_dict())
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(lstm, [])

    def broken():
        yield from batches(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(lstm, broken())
    for name, value in lstm.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert lstm.training
    assert all(s.source == "auto" for s in lstm.modules() if isinstance(s, StepStatistics))


def test_calibration_runs_without_dropout_and_takes_any_call():
    lstm = make(num_layers=2, dropout=0.9)
    data = batches(3)
    calibrate(lstm, data)
    first = copy.deepcopy(lstm.statistics["hh_l1"].mean)
    calibrate(lstm, [(x, None) for x in data])
    assert torch.equal(lstm.statistics["hh_l1"].mean, first)
    calibrate(lstm, data, forward=lambda x: lstm(x))
    assert torch.equal(lstm.statistics["hh_l1"].mean, first)


@pytest.mark.parametrize("count_padding", [False, True])
@pytest.mark.parametrize(
    ("options", "norms"), [({}, NORMS), (SUM, {"ih": "none", "hh": "sum", "c": "frame"})], ids=str
)
def test_padded_batches(options, norms, count_padding):
    lstm, (x,) = make(count_padding=count_padding, **options), batches(1)
    lengths = torch.tensor([T, 2, 4, 4, 1])
    calibrate(lstm, [(x, None, lengths)])
    expected = moments_by_the_equations(
        lstm, x, norms, lengths=lengths.numpy(), count_padding=count_padding
    )
    # Only the longest sequence has the last two steps, so they have no variance.
    steps = T if count_padding else 4
    for term in expected:
        statistics = lstm.statistics[term + "_l0"]
        assert statistics.num_batches.tolist() == [1] * steps + [0] * (T - steps)
        for ours, theirs in zip((statistics.mean, statistics.var), expected[term], strict=True):
            np.testing.assert_allclose(ours.numpy()[:steps], theirs[:steps], rtol=1e-9, atol=1e-12)
        for average in statistics.population():
            assert torch.equal(average[steps:], average[steps - 1].expand_as(average[steps:]))


def test_each_step_averages_the_batches_that_reach_it():
    lstm = make()
    short, long = batches(1, steps=3)[0], batches(1, steps=6)[0]
    calibrate(lstm, [short, long])
    statistics = lstm.statistics["hh_l0"]
    assert statistics.num_batches.tolist() == [2, 2, 2, 1, 1, 1]
    a, b = (moments_by_the_equations(lstm, x)["hh"][1] for x in (short, long))
    np.testing.assert_allclose(statistics.var[:3].numpy(), (a + b[:3]) / 2, rtol=1e-9)
    np.testing.assert_allclose(statistics.var[3:].numpy(), b[3:], rtol=1e-9)


def test_max_length_limits_the_rows():
    lstm = make(max_length=2)
    lstm(batches(1)[0])
    assert lstm.statistics["c_l0"].mean.shape == (2, H)
    lstm.eval()
    assert lstm(batches(1)[0])[0].shape == (T, B, H)


def test_sequence_wise_statistics_are_one_row_over_all_real_frames():
    lstm, (x,) = make(input_norm="sequence"), batches(1)
    lengths = torch.tensor([T, 2, 4, 4, 1])
    calibrate(lstm, [(x, None, lengths)])
    frames = torch.cat([x[:n, b] for b, n in enumerate(lengths)]) @ lstm.weight_ih_l0.detach().t()
    statistics = lstm.statistics["ih_l0"]
    assert statistics.mean.shape == (1, 4 * H)
    torch.testing.assert_close(statistics.mean[0], frames.mean(0))
    # The variance is about the masked mean, not about the mean of the padded tensor.
    torch.testing.assert_close(statistics.var[0], frames.var(0, correction=0))
    x_other = x.clone()
    x_other[4:, 1] = 1e6
    calibrate(lstm, [(x_other, None, lengths)])
    torch.testing.assert_close(statistics.var[0], frames.var(0, correction=0))


@pytest.mark.parametrize(
    "norms",
    [
        ("frame", "frame", "frame"), ("sequence", "frame", "frame"), ("none", "sum", "frame"),
        ("none", "none", "none"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("piece", [1, 3, 7, 100])
def test_streamed_evaluation_equals_one_piece(norms, piece):
    lstm = make(input_norm=norms[0], recurrent_norm=norms[1], cell_norm=norms[2], num_layers=2)
    lstm(batches(1)[0])
    lstm.eval()
    x = torch.randn(4 * T, 2, D, dtype=torch.float64)
    whole, (h_n, c_n) = lstm(x)
    state, parts = None, []
    for first in range(0, len(x), piece):
        part, state = lstm(x[first : first + piece], state, first_step=first)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, (h_n, c_n), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{}, SUM], ids=str)
def test_state_dict_carries_the_statistics_to_a_fresh_module(options):
    lstm = make(**options)
    calibrate(lstm, batches(2))
    fresh = make(**options)
    fresh.load_state_dict(lstm.state_dict())
    x = batches(1)[0]
    assert torch.equal(fresh.eval()(x)[0], lstm.eval()(x)[0])
    shorter = make(**options)
    calibrate(shorter, batches(1, steps=2))
    fresh.load_state_dict(shorter.state_dict())
    assert torch.equal(fresh(x)[0], shorter.eval()(x)[0])


def test_three_buffers_a_term_however_long_the_sequence():
    lstm = make()
    lstm(batches(1, steps=300)[0])
    assert len(list(lstm.buffers())) == 9


def test_averages_that_are_discarded_in_place_are_missed():
    """That there are averages is remembered, but not beyond a change of the counts."""
    lstm = BNLSTM(3, 4)
    lstm(torch.randn(5, 6, 3))
    lstm.eval()
    x = torch.randn(5, 1, 3)
    for discard in (
        lambda s: s.num_batches.zero_(), lambda s: s.reset(),
        lambda s: s.load_state_dict({**s.state_dict(), "num_batches": torch.zeros(5).long()}),
    ):  # fmt: skip
        before = {name: value.clone() for name, value in lstm.state_dict().items()}
        lstm(x)
        lstm(x)
        discard(lstm.statistics["hh_l0"])
        for module in (lstm, copy.deepcopy(lstm)):
            with pytest.raises(RuntimeError, match="no population statistics"):
                module(x)
        lstm.load_state_dict(before)
