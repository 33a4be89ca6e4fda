"""Zoneout, the dropouts of the recurrence, and the norm stabiliser."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from bnrnn import BNLSTM, NormStabilizer, norm_stabilizer
from bnrnn.kernels import bernoulli, new_key, philox
from bnrnn.nn.noise import drop_weights

T, B, D, H = 6, 5, 3, 8
PLAIN = {"input_norm": "none", "recurrent_norm": "none", "cell_norm": "none"}
LAYER = {"input_norm": "layer", "recurrent_norm": "layer", "cell_norm": "layer"}
NOISES = ("zoneout_cell", "zoneout_hidden", "recurrent_dropout", "hidden_dropout", "weight_dropout")


def philox_in_integers(counter, key):
    """Philox4x32-10 (Salmon et al. 2011, section 4.3) in Python integers."""
    a, b, c, d = counter
    k0, k1 = key
    for _ in range(10):
        of_a, of_c = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (of_c >> 32) ^ b ^ k0, of_c % 2**32, (of_a >> 32) ^ d ^ k1, of_a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [a, b, c, d]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_the_test_knows_philox(counter, key, words):
    """The known answers that its authors publish."""
    counter, key, words = ([int(x, 16) for x in text.split()] for text in (counter, key, words))
    assert philox_in_integers(counter, key) == words


@pytest.mark.parametrize("draw", [philox.bernoulli, bernoulli])
def test_masks_are_philox(draw):
    key, p = -5_000_000_000_000_000_123, 0.3
    halves = key % 2**32, (key >> 32) % 2**32
    for stream in (0, 3):
        words = np.array([philox_in_integers((n, 0, stream, 0), halves) for n in range(150)])
        numbers = np.stack([words % 2**16, words // 2**16], 2).ravel()
        expected = (numbers < round(p * 2**16))[:1197]
        assert (draw(torch.tensor(key), stream, 1197, p).numpy() == expected).all()


def test_both_draw_the_same_for_any_number_of_threads():
    threads = torch.get_num_threads()
    try:
        for count in (0, 1, 1023, 1024, 1025, 100_003):
            key = new_key()
            expected = philox.bernoulli(key, 1, count, 0.7)
            for n in (1, 3):
                torch.set_num_threads(n)
                assert torch.equal(bernoulli(key, 1, count, 0.7), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.999])
def test_how_many_are_true(p):
    n = 1_000_000
    found = bernoulli(new_key(), 0, n, p).sum().item()
    assert abs(found - n * p) < 5 * math.sqrt(n * p * (1 - p))
    a, b = (bernoulli(torch.tensor(7), stream, n, 0.5) for stream in (0, 1))
    assert abs((a == b).sum().item() - n / 2) < 5 * math.sqrt(n / 4)  # they are independent


@pytest.mark.parametrize("norms", [PLAIN, {}, LAYER], ids=["plain", "BN", "LN"])
@pytest.mark.parametrize("noise", NOISES)
def test_the_same_numbers_for_every_kernel(norms, noise):
    found = []
    for kernel in ("cpu", "reference"):
        torch.manual_seed(0)
        lstm = BNLSTM(
            D, H, 2, bidirectional=True, kernel=kernel, dtype=torch.float64, **norms,
            **{noise: 0.4},
        )  # fmt: skip
        x = torch.randn(T, B, D, dtype=torch.float64)
        output, _ = lstm(x, lengths=torch.tensor([T, T, 3, 2, 1]))
        output.square().sum().backward()
        found.append([output, *(p.grad for p in lstm.parameters())])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("noise", NOISES)
def test_random_in_training_and_the_expectation_in_evaluation(noise):
    torch.manual_seed(0)
    lstm = BNLSTM(D, H, **PLAIN, **{noise: 0.5})
    x = torch.randn(T, B, D)
    assert not torch.equal(lstm(x)[0], lstm(x)[0])
    torch.manual_seed(3)
    first = lstm(x)[0]
    torch.manual_seed(3)
    assert torch.equal(lstm(x)[0], first)
    evaluated = lstm.eval()(x)[0]
    assert torch.equal(lstm(x)[0], evaluated)
    plain = BNLSTM(D, H, **PLAIN)
    plain.load_state_dict(lstm.state_dict())
    same = torch.allclose(plain.eval()(x)[0], evaluated, atol=1e-6)
    assert same == (not noise.startswith("zoneout"))
    # In the first step only zoneout is linear in its mask, so its mean equals the evaluation.
    if noise == "zoneout_hidden":
        lstm.train()
        many = torch.stack([lstm(x[:1])[0] for _ in range(1000)]).mean(0)
        error = 5 * (lstm.eval()(x[:1])[0].abs().max() / math.sqrt(1000)).item()
        torch.testing.assert_close(many, lstm(x[:1])[0], atol=error, rtol=0)


def test_the_same_units_of_h_are_dropped_at_all_steps_and_others_of_g_at_each():
    """With i = f = o = 1 the cell sums the candidates that are not dropped."""
    lstm = BNLSTM(1, 200, bias=True, **PLAIN, recurrent_dropout=0.5)
    with torch.no_grad():
        for name, p in lstm.named_parameters():
            p.fill_(0.0)
            if name.startswith("bias"):
                p.copy_(torch.tensor([30.0, 30.0, 30.0, 30.0]).repeat_interleave(200))
    _, (_, c_n) = lstm(torch.zeros(10, 2, 1))
    counts = c_n / 2  # each candidate that is not dropped adds 1 / (1 - 0.5)
    torch.testing.assert_close(counts, counts.round())
    assert counts.unique().numel() > 4
    lstm = BNLSTM(1, 200, **PLAIN, hidden_dropout=0.5)
    h_0 = torch.ones(1, 2, 200)
    weight = lstm.weight_hh_l0
    with torch.no_grad():
        for p in lstm.parameters():
            p.fill_(0.0)
        weight.copy_(torch.eye(200).repeat(4, 1))  # each unit depends only on itself
    output, _ = lstm(torch.zeros(3, 2, 1), (h_0, torch.zeros(1, 2, 200)))
    # If h is dropped at the first step, all gate arguments are zero, so c and h stay zero.
    dropped = output[0] == 0
    assert 120 < dropped.sum() < 280
    assert torch.equal(output[2] == 0, dropped)


def test_weights_are_dropped_once_a_call():
    lstm = BNLSTM(D, H, **PLAIN, weight_dropout=0.5)
    weight = lstm.weight_hh_l0.detach().clone()
    output, _ = lstm(torch.randn(T, B, D))
    output.sum().backward()
    gradient = lstm.weight_hh_l0.grad
    zeros = (gradient == 0).float().mean().item()
    assert abs(zeros - 0.5) < 0.2  # 256 elements
    assert torch.equal(lstm.weight_hh_l0, weight)


def test_weights_that_are_kept_grow_by_what_is_dropped():
    p, n = 0.25, 10_000
    found = drop_weights(torch.ones(n // 50, 50), p, new_key())
    assert set(found.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
    deviation = math.sqrt(p / (1 - p) / n)  # of the mean of n values that are 0 or 1 / (1 - p)
    assert abs(found.mean().item() - 1) < 5 * deviation
    assert drop_weights(found, p, None) is found


def test_kernels_without_noise_say_so():
    lstm = BNLSTM(D, H, **PLAIN, zoneout_cell=0.1, kernel="torch.lstm")
    with pytest.raises(ValueError, match=r"kernel 'torch\.lstm' cannot run this"):
        lstm(torch.randn(T, B, D))
    assert BNLSTM(D, H, **PLAIN, zoneout_cell=0.1).active_kernel() == "cpu"
    assert BNLSTM(D, H, **PLAIN, weight_dropout=0.1).active_kernel() == "torch.lstm"


@pytest.mark.parametrize("options", [LAYER, {**PLAIN, "zoneout_hidden": 0.2}])
def test_no_lstm_computes_the_same(options):
    with pytest.raises(ValueError, match=r"which torch\.nn\.LSTM cannot do"):
        BNLSTM(D, H, **options).to_lstm()
    with pytest.raises(ValueError, match=r"which torch\.nn\.LSTM cannot do"):
        BNLSTM.from_lstm(torch.nn.LSTM(D, H), [torch.randn(T, B, D)], **options)


def test_layer_normalisation_needs_no_batch_and_no_statistics():
    lstm = BNLSTM(D, H, **LAYER)
    x = torch.randn(T, B, D)
    assert not list(lstm.buffers())
    whole = lstm(x)[0]
    alone = torch.cat([lstm(x[:, b : b + 1])[0] for b in range(B)], 1)
    torch.testing.assert_close(alone, whole)
    torch.testing.assert_close(lstm.eval()(x)[0], whole)


def test_what_is_random_shows():
    shown = repr(BNLSTM(D, H, **LAYER, zoneout_cell=0.15))
    assert "input_norm=layer" in shown
    assert "zoneout_cell=0.15" in shown
    assert "dropout" not in shown


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in torch's own compiler
def test_compiled():
    lstm = BNLSTM(D, H, **LAYER, zoneout_cell=0.3, hidden_dropout=0.2)
    faster = torch.compile(lstm, backend="aot_eager", fullgraph=True)
    x = torch.randn(T, B, D)
    torch.manual_seed(1)
    expected = lstm(x)[0]
    torch.manual_seed(1)
    torch.testing.assert_close(faster(x)[0], expected)


def stabilizer_in_numpy(output, lengths):
    terms = []
    for b, length in enumerate(lengths):
        norms = [np.sqrt((h**2).sum()) for h in output[:length, b]]
        terms += [(after - before) ** 2 for before, after in itertools.pairwise(norms)]
    return np.mean(terms)


def test_norm_stabilizer():
    output = torch.randn(T, B, H, dtype=torch.float64, requires_grad=True)
    for lengths in (None, torch.tensor([T, 4, 2, 1, 1])):
        found = norm_stabilizer(output, lengths)
        expected = stabilizer_in_numpy(
            output.detach().numpy(), [T] * B if lengths is None else lengths
        )
        assert found.item() == pytest.approx(expected, rel=1e-12)
        assert torch.autograd.gradcheck(lambda y, n=lengths: norm_stabilizer(y, n), output)
    assert norm_stabilizer(output[:1]).item() == 0


def test_the_stabilizer_sees_a_checkpointed_pass_once():
    module, x = BNLSTM(4, 6), torch.randn(7, 5, 4)
    stabilizer = NormStabilizer(module, 2.0)
    output, _ = checkpoint(module, x, use_reentrant=False)
    (output.square().sum() + stabilizer.take()).backward()
    assert stabilizer.take() == 0.0
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.zero_grad()
    (module(x)[0].square().sum() + stabilizer.take()).backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def test_what_the_stabilizer_adds_to_the_loss():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = BNLSTM(D, H, **LAYER)
            self.second = BNLSTM(H, H, batch_first=True, **PLAIN)

        def forward(self, x):
            y, _ = self.first(x)
            z, _ = self.second(y.transpose(0, 1))
            return y, z.transpose(0, 1)

    model, x = Model(), torch.randn(T, B, D)
    watcher = NormStabilizer(model, 2.5)
    y, z = model(x)
    expected = 2.5 * (norm_stabilizer(y) + norm_stabilizer(z))
    term = watcher.take()
    torch.testing.assert_close(term, expected)
    term.backward()
    assert model.first.weight_hh_l0.grad.abs().sum() > 0
    assert watcher.take() == 0
    model.eval()
    model(x)
    assert watcher.take() == 0
    assert not NormStabilizer(Model(), 0.0).take()
    copy.deepcopy(model)


def test_the_stabilizer_leaves_padding_out():
    lstm = BNLSTM(D, H, **PLAIN)
    watcher = NormStabilizer(lstm, 1.0)
    lengths = torch.tensor([T, 3, 2, 2, 1])
    x = torch.randn(T, B, D)
    output, _ = lstm(x, lengths=lengths)
    expected = stabilizer_in_numpy(output.detach().numpy(), lengths)
    assert watcher.take().item() == pytest.approx(expected, rel=1e-5)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    lstm(packed)
    assert watcher.take().item() == pytest.approx(expected, rel=1e-5)
