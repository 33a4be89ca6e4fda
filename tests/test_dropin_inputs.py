"""What `BNLSTM` accepts as input, states and lengths, and how it refuses the rest."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence

from bnrnn import BNLSTM, calibrate

T, B, D, H = 6, 4, 3, 5
NONE = {"input_norm": "none", "recurrent_norm": "none", "cell_norm": "none"}
LAYER = dict.fromkeys(NONE, "layer")
ALL_KINDS = pytest.mark.parametrize("options", [NONE, {}, LAYER], ids=["plain", "batch", "layer"])
KERNELS = pytest.mark.parametrize("kernel", ["auto", "cpu", "reference"])


def x(*shape):
    return torch.randn(*(shape or (T, B, D)))


# ------------------------------------------------------------------ one-hot inputs


@KERNELS
@ALL_KINDS
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_every_type_of_integer_is_an_index(options, kernel, dtype):
    module = BNLSTM(D, H, kernel=kernel, **options)
    symbols = torch.randint(D, (T, B))
    expected, _ = module(nn.functional.one_hot(symbols, D).float())
    torch.testing.assert_close(module(symbols.to(dtype))[0], expected)
    lengths = torch.tensor([T, 2, 4, 1])
    module(symbols.to(dtype), lengths=lengths)


@KERNELS
@ALL_KINDS
@pytest.mark.parametrize("wrong", [-1, D])
def test_an_index_out_of_range_is_refused(options, kernel, wrong):
    symbols = torch.zeros(T, B, dtype=torch.long)
    symbols[2, 1] = wrong
    with pytest.raises(IndexError, match=rf"^one-hot indices must be in 0\.\.{D - 1}, got "):
        BNLSTM(D, H, kernel=kernel, **options)(symbols)


@ALL_KINDS
@pytest.mark.parametrize(
    ("input", "message"),
    [
        (torch.ones(T, B, dtype=torch.bool), "must be floating-point or integers, got torch.bool"),
        (torch.ones(T, B, D, dtype=torch.bool), "must be floating-point or integers"),
        (torch.ones(T, B, D, dtype=torch.complex64), "got torch.complex64"),
        (torch.ones(T, B, D, dtype=torch.long), r"integers must be \(T, B\), .*, got 3D: convert"),
        (torch.ones(T, dtype=torch.long), r"integers must be \(T, B\), .*, got 1D: convert"),
    ],
    ids=str,
)
def test_other_inputs_are_refused(options, input, message):
    with pytest.raises(ValueError, match=message):
        BNLSTM(D, H, **options)(input)


# ------------------------------------------------------------------ lengths and steps


@ALL_KINDS
def test_lengths_of_every_kind(options):
    module, input = BNLSTM(D, H, **options), x()
    wanted, _ = module(input, lengths=torch.tensor([6, 3, 3, 1]))
    for lengths in (
        [6, 3, 3, 1], (6, 3, 3, 1), torch.tensor([6, 3, 3, 1]).numpy(),
        torch.tensor([6, 3, 3, 1], dtype=torch.int32), torch.tensor([6, 3, 3, 1]).byte(),
    ):  # fmt: skip
        torch.testing.assert_close(module(input, lengths=lengths)[0], wanted)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (torch.tensor([6.0, 2.9, 1.0, 1.0]), "lengths must be integers, got torch.float32"),
        ([6, 2.9, 1, 1], "lengths must be integers"),
        (torch.ones(B, dtype=torch.bool), "lengths must be integers, got torch.bool"),
        (3, r"lengths must be \(4,\), got \(\)"),
        ([3, 3], r"lengths must be \(4,\), got \(2,\)"),
        ([6, 0, 1, 1], r"lengths must be in 1\.\.6, got 0\.\.6"),
    ],
    ids=str,
)
def test_other_lengths_are_refused(lengths, message):
    with pytest.raises(ValueError, match=message):
        BNLSTM(D, H)(x(), lengths=lengths)


@pytest.mark.parametrize("first_step", [None, 2.0, "a", True])
def test_a_first_step_is_an_integer(first_step):
    with pytest.raises(TypeError, match="first_step must be an integer, got "):
        BNLSTM(D, H)(x(), first_step=first_step)


# ------------------------------------------------------------------ devices without values


@ALL_KINDS
def test_the_meta_device(options):
    """Shape inference, as `torch.nn.LSTM` allows it."""
    module = BNLSTM(D, H, 2, device="meta", **options)
    assert module.active_kernel()
    input = x().to("meta")
    for training in (True, False):
        output, (h_n, c_n) = module.train(training)(input)
        assert output.is_meta
        assert (output.shape, h_n.shape, c_n.shape) == ((T, B, H), (2, B, H), (2, B, H))
    padded, _ = module(input, lengths=torch.tensor([6, 3, 3, 1], device="meta"))
    assert padded.shape == (T, B, H)


@ALL_KINDS
@pytest.mark.parametrize("training", [True, False])
def test_tensors_on_other_devices_are_refused_in_the_words_of_nn_lstm(options, training):
    module = BNLSTM(D, H, **options)
    module(x())
    module.train(training)
    state = torch.zeros(1, B, H, device="meta")
    for arguments in (
        (x().to("meta"),),
        (x(), (state, state)),
        (x(), (torch.zeros(1, B, H), state)),
    ):
        with pytest.raises(RuntimeError) as ours:
            module(*arguments)
        with pytest.raises(RuntimeError) as theirs:
            nn.LSTM(D, H)(*arguments)
        assert str(ours.value) == str(theirs.value)
    with pytest.raises(RuntimeError, match="not at the same device"):
        module(torch.zeros(T, B, dtype=torch.long, device="meta"))


@ALL_KINDS
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("inside", [True, False], ids=["fake weights", "real weights"])
def test_fake_tensors(options, training, inside):
    real = BNLSTM(D, H, **options)
    real(x())
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = BNLSTM(D, H, max_length=T, **options) if inside else real
        output, _ = module.train(training)(torch.empty(T, B, D), lengths=torch.ones(B).long())
    assert output.shape == (T, B, H)


def test_noise_is_drawn_from_the_cpu_generator_on_any_default_device():
    module, input = BNLSTM(D, H, zoneout_cell=0.5, weight_dropout=0.5), x()
    torch.manual_seed(3)
    expected, _ = module(input)
    torch.manual_seed(3)
    with torch.device("meta"):
        found, _ = module(input)
    assert torch.equal(found, expected)


# ------------------------------------------------------------------ batches of calibrate, from_lstm


@pytest.mark.parametrize("batches", [x(), pack_padded_sequence(x(), [6, 3, 3, 1])])
def test_one_batch_is_not_a_list_of_batches(batches):
    for convert in (
        lambda: BNLSTM.from_lstm(nn.LSTM(D, H), batches), lambda: calibrate(BNLSTM(D, H), batches)
    ):  # fmt: skip
        with pytest.raises(TypeError, match="batches must be an iterable of batches"):
            convert()


def test_empty_batches_do_not_count():
    lstm, input = nn.LSTM(D, H), x()
    ours = BNLSTM.from_lstm(lstm, [input[:, :0], input, input[:, :0]]).eval()
    torch.testing.assert_close(ours(input)[0], lstm(input)[0], rtol=1e-4, atol=1e-5)
    assert (ours.statistics["ih_l0"].num_batches == 1).all()
    with pytest.raises(ValueError, match="at least one batch with sequences"):
        BNLSTM.from_lstm(lstm, [input[:, :0]])
    with pytest.raises(ValueError, match="at least one batch with sequences"):
        calibrate(BNLSTM(D, H), [input[:, :0]])


def test_a_batch_that_is_a_dictionary_needs_a_function():
    with pytest.raises(AttributeError) as caught:
        calibrate(BNLSTM(D, H), [{"input": x()}])
    assert any("forward=" in note for note in caught.value.__notes__)


# ------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_length": 2.5}, ValueError, "max_length must be an integer or None, got 2.5"),
        ({"max_length": True}, ValueError, "max_length must be an integer or None, got True"),
        ({"momentum": None}, ValueError, "momentum must be a number, got None"),
        ({"eps": "1e-5"}, ValueError, "eps must be a number, got '1e-5'"),
        ({"gamma_init": None}, ValueError, "gamma_init must be a number"),
        ({"forget_bias": [1]}, ValueError, "forget_bias must be a number"),
        ({"zoneout_cell": "a"}, ValueError, "zoneout_cell must be a number, got 'a'"),
        ({"learned_state": 1}, ValueError, "learned_state must be True or False, got 1"),
        ({"cell_norm": None}, ValueError, "cell_norm must be a string, got None"),
        ({"zoneout": 0.1}, TypeError, "BNLSTM has no option 'zoneout'; it has .*zoneout_cell"),
        ({"num_layers": True}, TypeError, "num_layers should be of type int, got: bool"),
    ],
    ids=str,
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        BNLSTM(D, H, **options)
