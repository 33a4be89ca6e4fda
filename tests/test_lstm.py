"""`BNLSTM` compared with `torch.nn.LSTM`, and its own conventions."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from bnrnn import BNLSTM, batch_statistics
from tests.accuracy import assert_as_accurate, assert_rounded

pytestmark = pytest.mark.numeric
T, B, D, H = 7, 5, 3, 4
NONE = {"input_norm": "none", "recurrent_norm": "none", "cell_norm": "none"}
LENGTHS = torch.tensor([5, 7, 1, 3, 3])


def pair(layers, bidirectional, plain_code, **kwargs):
    """A BNLSTM, on torch's code or on our recurrence, and a torch.nn.LSTM with the same weights."""
    theirs = nn.LSTM(D, H, layers, bidirectional=bidirectional, dtype=torch.float64, **kwargs)
    ours = BNLSTM(
        D, H, layers, bidirectional=bidirectional, dtype=torch.float64, **NONE,
        cell_bias=not plain_code,  # a zero cell bias, which torch's code does not support
        **kwargs,
    )  # fmt: skip
    assert (ours.active_kernel() == "torch.lstm") == plain_code
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def state(layers, bidirectional):
    shape = (layers * (2 if bidirectional else 1), B, H)
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))


@pytest.mark.parametrize("plain_code", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_plain_equals_nn_lstm_in_outputs_and_all_gradients(
    plain_code, layers, bidirectional, padded
):
    ours, theirs = pair(layers, bidirectional, plain_code)
    x = torch.randn(T, B, D, dtype=torch.float64, requires_grad=True)
    hx = state(layers, bidirectional)

    if padded:
        output, (h_n, c_n) = ours(x, hx, lengths=LENGTHS)
        packed, (h_their, c_their) = theirs(
            pack_padded_sequence(x, LENGTHS, enforce_sorted=False), hx
        )
        expected, _ = pad_packed_sequence(packed, total_length=T)
    else:
        output, (h_n, c_n) = ours(x, hx)
        expected, (h_their, c_their) = theirs(x, hx)

    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(output, expected, **close)
    torch.testing.assert_close(h_n, h_their, **close)
    torch.testing.assert_close(c_n, c_their, **close)

    weight = torch.randn_like(output)
    our_names, their_names = (
        [n for n, _ in ours.named_parameters() if not n.startswith("beta_c")],
        [n for n, _ in theirs.named_parameters() if not n.startswith("bias_hh")],
    )
    assert [n.replace("bias_l", "bias_ih_l") for n in our_names] == their_names
    our_gradients = torch.autograd.grad(
        (output * weight).sum() + h_n.sum() + c_n.sum(),
        [x, *hx, *(ours.get_parameter(n) for n in our_names)],
    )
    their_gradients = torch.autograd.grad(
        (expected * weight).sum() + h_their.sum() + c_their.sum(),
        [x, *hx, *(theirs.get_parameter(n) for n in their_names)],
    )
    for name, a, b in zip(
        ["x", "h_0", "c_0", *our_names], our_gradients, their_gradients, strict=True
    ):
        torch.testing.assert_close(a, b, **close, msg=lambda m, name=name: f"{name}: {m}")


def test_batch_first():
    ours, theirs = pair(2, True, True, batch_first=True)
    x = torch.randn(B, T, D, dtype=torch.float64)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    packed = pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
    expected, _ = pad_packed_sequence(theirs(packed)[0], batch_first=True)
    torch.testing.assert_close(ours(x, lengths=LENGTHS)[0], expected)


@pytest.mark.parametrize("plain_code", [True, False])
@pytest.mark.parametrize("sorted_already", [True, False])
def test_packed_sequences(plain_code, sorted_already):
    ours, theirs = pair(2, True, plain_code)
    x = torch.randn(T, B, D, dtype=torch.float64)
    lengths = LENGTHS.sort(descending=True)[0] if sorted_already else LENGTHS
    packed = pack_padded_sequence(x, lengths, enforce_sorted=sorted_already)
    output, (h_n, c_n) = ours(packed)
    expected, (h_their, c_their) = theirs(packed)
    torch.testing.assert_close(output.data, expected.data)
    assert torch.equal(output.batch_sizes, expected.batch_sizes)
    assert (output.sorted_indices is None) == (expected.sorted_indices is None)
    torch.testing.assert_close(pad_packed_sequence(output)[0], pad_packed_sequence(expected)[0])
    torch.testing.assert_close((h_n, c_n), (h_their, c_their))


def test_one_unbatched_sequence():
    ours, theirs = pair(2, True, True)
    x = torch.randn(T, D, dtype=torch.float64)
    output, (h_n, c_n) = ours(x)
    expected, (h_their, c_their) = theirs(x)
    torch.testing.assert_close((output, h_n, c_n), (expected, h_their, c_their))


def test_without_bias():
    ours, theirs = pair(1, False, True, bias=False)
    x = torch.randn(T, B, D, dtype=torch.float64)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])


@pytest.mark.parametrize("norms", [NONE, {}])
def test_indices_are_one_hot_vectors_in_plain_and_normalized_modules(norms):
    indices = torch.randint(D, (T, B))

    def run(input, weights):
        dtype = weights["bias_l0"].dtype
        lstm = BNLSTM(D, H, dtype=dtype, **norms)
        lstm.load_state_dict(weights, strict=False)  # the state has no statistics
        return lstm(input if input.dim() == 2 else input.to(dtype))[0]

    vectors = nn.functional.one_hot(indices, D)
    assert_as_accurate(
        lambda weights: run(indices, weights), lambda weights: run(vectors, weights),
        dict(BNLSTM(D, H, **norms).named_parameters()),
    )  # fmt: skip


def test_dropout_is_between_layers_and_only_in_training():
    lstm = BNLSTM(D, H, 2, dropout=1.0)
    x = torch.randn(T, B, D)
    trained, _ = lstm(x)
    lstm.eval()
    with batch_statistics(lstm):
        assert not torch.equal(lstm(x)[0], trained)
        kept = BNLSTM(D, H, 2, dropout=0.0)
        kept.load_state_dict(lstm.state_dict())
        kept.eval()
        with batch_statistics(kept):
            assert torch.equal(lstm(x)[0], kept(x)[0])


def test_learned_states_start_at_zero_get_gradients_and_yield_to_given_ones():
    lstm = BNLSTM(D, H, 2, bidirectional=True, learned_state=True, dtype=torch.float64)
    x = torch.randn(T, B, D, dtype=torch.float64)
    assert not lstm.initial_hidden.any()
    assert not lstm.initial_cell.any()
    with torch.no_grad():
        lstm.initial_hidden.normal_()
        lstm.initial_cell.normal_()
    output, _ = lstm(x)
    hx = tuple(
        v.detach()[:, None].repeat(1, B, 1) for v in (lstm.initial_hidden, lstm.initial_cell)
    )
    torch.testing.assert_close(lstm(x, hx)[0], output)
    output.square().sum().backward()
    assert lstm.initial_cell.grad is not None
    assert (lstm.initial_cell.grad != 0).all()


def test_noise_on_the_initial_hidden_state():
    lstm = BNLSTM(D, H, init_noise=0.1)
    x = torch.zeros(T, B, D)
    assert not torch.equal(lstm(x)[0], lstm(x)[0])
    hx = (torch.zeros(1, B, H), torch.zeros(1, B, H))
    assert torch.equal(lstm(x, hx)[0], lstm(x, hx)[0])


def weight_gradient(dtype, noise, kernel, seed):
    """The gradient of weight_hh, in float64, from sequences with the same first six frames."""
    torch.manual_seed(seed)
    weights = BNLSTM(2, 20, recurrent_init="identity").state_dict()
    x = torch.randn(16, 32, 2)
    x[:6] = 0
    h_0 = 0.3 * torch.randn(20) + noise * torch.randn(1, 32, 20)
    c_0 = torch.zeros(1, 32, 20)
    lstm = BNLSTM(2, 20, kernel=kernel, dtype=dtype)
    lstm.load_state_dict(weights)
    output, _ = lstm(x.to(dtype), (h_0.to(dtype), c_0.to(dtype)))
    output[-1].square().sum().backward()
    return lstm.weight_hh_l0.grad.double()


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
@pytest.mark.parametrize(("noise", "kept"), [(0.1, True), (0.0, False)])
def test_noise_keeps_the_gradient_where_sequences_begin_alike(kernel, noise, kept, seed):
    exact = weight_gradient(torch.float64, noise, kernel, seed)
    error = (weight_gradient(torch.float32, noise, kernel, seed) - exact).norm() / exact.norm()
    # With noise: five roundings in each of 16 steps, not amplified. Without: no correct digit.
    assert error < 5 * 16 * torch.finfo(torch.float32).eps if kept else error > 1e3


def test_initialization():
    lstm = BNLSTM(D, H, gamma_init=0.3, recurrent_init="identity")
    i, f, g, o = lstm.weight_hh_l0.detach().chunk(4)
    assert torch.equal(g, torch.eye(H))
    others = torch.cat([i, f, o])
    # The orthogonality of an m x n matrix from a QR decomposition: Higham, theorem 19.4.
    for matrix in (others, lstm.weight_ih_l0.detach()):
        assert_rounded(matrix.t() @ matrix, torch.eye(matrix.shape[1]), operations=matrix.numel())
    b_i, b_f, b_g, b_o = lstm.bias_l0.detach().chunk(4)
    assert torch.equal(b_f, torch.ones(H))
    assert not torch.cat([b_i, b_g, b_o]).any()
    assert torch.equal(lstm.gamma_ih_l0.detach(), torch.full((4 * H,), 0.3))
    assert torch.equal(lstm.gamma_c_l0.detach(), torch.full((H,), 0.3))
    assert not lstm.beta_c_l0.any()


@pytest.mark.parametrize(
    ("norms", "present"),
    [
        (("none", "none", "none"), set()),
        (("frame", "none", "none"), {"gamma_ih_l0"}),
        (("sequence", "none", "none"), {"gamma_ih_l0"}),
        (("none", "frame", "none"), {"gamma_hh_l0"}),
        (("none", "sum", "none"), {"gamma_hh_l0"}),
        (("sequence", "frame", "frame"), {"gamma_ih_l0", "gamma_hh_l0", "gamma_c_l0", "beta_c_l0"}),
    ],
)
def test_each_slot_has_its_parameters_and_no_other(norms, present):
    lstm = BNLSTM(D, H, input_norm=norms[0], recurrent_norm=norms[1], cell_norm=norms[2])
    always = {"weight_ih_l0", "weight_hh_l0", "bias_l0"}
    assert {name for name, _ in lstm.named_parameters()} == always | present


def test_the_sum_says_what_it_is():
    lstm = BNLSTM(D, H, input_norm="none", recurrent_norm="sum", cell_norm="none", gamma_init=1.0)
    assert repr(lstm).startswith(
        f"BNLSTM(\n  {D}, {H}, input_norm=none, recurrent_norm=sum, cell_norm=none\n"
    )
    assert torch.equal(lstm.gamma_hh_l0.detach(), torch.ones(4 * H))
    assert lstm.active_kernel() == "cpu"
    shapes = {name: tuple(buffer.shape) for name, buffer in lstm.named_buffers()}
    assert shapes == {
        "statistics.hh_l0.mean": (0, 4 * H), "statistics.hh_l0.var": (0, 4 * H),
        "statistics.hh_l0.num_batches": (0,),
    }  # fmt: skip


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_row_alone_in_evaluation_is_the_row_in_its_batch(bidirectional):
    lstm = BNLSTM(D, H, 2, bidirectional=bidirectional, dtype=torch.float64)
    x = torch.randn(T, B, D, dtype=torch.float64)
    lstm(x, lengths=LENGTHS)
    lstm.eval()
    output, (h_n, _) = lstm(x, lengths=LENGTHS)
    for b, length in enumerate(LENGTHS.tolist()):
        alone, (h_alone, _) = lstm(x[:length, b : b + 1])
        torch.testing.assert_close(output[:length, b : b + 1], alone)
        torch.testing.assert_close(h_n[:, b : b + 1], h_alone)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be greater than zero"),
        ({"input_norm": "group"}, "input_norm must be one of none, frame, sequence, layer, got"),
        ({"hidden_size": 1, "cell_norm": "layer"}, "hidden_size must be 2 or more with cell_norm"),
        ({"zoneout_cell": 1.0}, r"zoneout_cell must be in \[0, 1\), got 1.0"),
        ({"weight_dropout": -0.1}, r"weight_dropout must be in \[0, 1\), got -0.1"),
        ({"recurrent_norm": "sequence"}, "recurrent_norm must be one of none, frame, sum"),
        (
            {"recurrent_norm": "sum"},
            "input_norm must be none with recurrent_norm=sum, which normalises the input term as "
            "well, got 'frame'",
        ),
        ({"dropout": 1.5}, "dropout should be a number in range"),
        ({"proj_size": 2}, "proj_size must be 0"),
        ({"kernel": "fpga"}, "kernel must be one of auto, scan, torch.lstm"),
        ({"max_length": 0}, "max_length must be positive"),
        ({"gamma_init": float("nan")}, "gamma_init must be a finite number, got nan"),
        ({"eps": float("inf")}, "eps must be a finite number, got inf"),
        ({"max_length": 1.5}, "max_length must be an integer or None, got 1.5"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        BNLSTM(**{"input_size": D, "hidden_size": H, **kwargs})


def test_bad_input():
    lstm = BNLSTM(D, H)
    x = torch.randn(T, B, D)
    for arguments, message in (
        ((x[:, :1],), "a batch of one sequence has no per-step batch statistics"),
        ((x[..., :2],), "Expected 3, got 2"),
        ((x[:0],), "Expected sequence length to be larger than 0"),
        (
            (x, (torch.zeros(1, B, H), torch.zeros(1, 2, H))),
            r"Expected hidden\[1\] size \(1, 5, 4\), got \[1, 2, 4\]",
        ),
        ((x, None, torch.tensor([1, 2])), r"lengths must be \(5,\)"),
        ((x, None, torch.tensor([0, 1, 1, 1, 1])), r"lengths must be in 1\.\.7"),
        ((x, None, None, -1), "first_step must be 0"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            lstm(*arguments)
    with pytest.raises(ValueError, match="a batch of one sequence has no per-step"):
        BNLSTM(D, H, input_norm="none", recurrent_norm="sum", cell_norm="none")(x[:, :1])
    with pytest.raises(RuntimeError, match="size mismatch for weight_ih_l0"):
        lstm.load_state_dict(nn.LSTM(D, H + 1).state_dict())
    for larger in (BNLSTM(D, H, 2), BNLSTM(D, H, bidirectional=True)):
        with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*bias_l"):
            larger.load_state_dict(nn.LSTM(D, H).state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*bias_l0"):
        lstm.load_state_dict(nn.LSTM(D, H, bias=False).state_dict())
    with pytest.raises(ValueError, match="first_step must be 0, or positive in a unidirectional"):
        BNLSTM(D, H, bidirectional=True)(x, first_step=3)


@pytest.mark.parametrize("norms", list(itertools.product(["none", "frame"], repeat=2)))
def test_one_sequence_can_train_where_no_term_needs_a_batch(norms):
    lstm = BNLSTM(D, H, input_norm="sequence", recurrent_norm=norms[0], cell_norm=norms[1])
    x = torch.randn(T, 1, D)
    if "frame" in norms:
        with pytest.raises(ValueError, match="at least two"):
            lstm(x)
    else:
        assert torch.isfinite(lstm(x)[0]).all()


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("plain_code", [True, False])
def test_packed_sequences_of_equal_lengths_keep_their_places(plain_code, enforce_sorted):
    """torch.sort leaves ties in place only up to 16 elements."""
    ours, theirs = pair(1, False, plain_code)
    batch = 64
    x = torch.randn(T, batch, D, dtype=torch.float64)
    lengths = torch.randint(1, T + 1, (batch,)).sort(descending=True, stable=True)[0]
    packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)
    if not enforce_sorted:
        # Another order of ties than torch.sort's: the one of a stable sort, reversed among equals.
        order = torch.from_numpy(np.lexsort((-np.arange(batch), -lengths.numpy())))
        repacked = pack_padded_sequence(x[:, order], lengths[order])
        packed = repacked._replace(sorted_indices=order, unsorted_indices=order.argsort())
    output, states = ours(packed)
    expected, their_states = theirs(packed)
    torch.testing.assert_close(output.data, expected.data)
    torch.testing.assert_close(states, their_states)
    for name in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        found, wanted = getattr(output, name), getattr(expected, name)
        assert (found is wanted is None) or torch.equal(found, wanted)
