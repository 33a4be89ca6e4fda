"""`BNLSTM` in place of `torch.nn.LSTM`, in the ways that users and libraries use one."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

from bnrnn import BNLSTM, calibrate, kernels

T, B, D, H = 6, 4, 3, 5
NONE = {"input_norm": "none", "recurrent_norm": "none", "cell_norm": "none"}
SUM = {"input_norm": "none", "recurrent_norm": "sum", "cell_norm": "frame"}
LAYER = {
    "input_norm": "layer", "recurrent_norm": "layer", "cell_norm": "layer",
    "zoneout_cell": 0.3, "zoneout_hidden": 0.1,
}  # fmt: skip
IN_THE_WORDS_OF_NN_LSTM = pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < (2, 13),
    reason="the nn.LSTM of older versions checks less, and in other words",
)
PLAIN_AND_NORMALISING = pytest.mark.parametrize("options", [NONE, {}], ids=["plain", "norm"])


def x(*shape, dtype=torch.float32):
    return torch.randn(*(shape or (T, B, D)), dtype=dtype)


def evaluated(module, input=None):
    """Put the module into evaluation mode, with population statistics."""
    module(x(dtype=module.weight_hh_l0.dtype) if input is None else input)
    return module.eval()


# ------------------------------------------------------------------ coming from nn.LSTM


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("options", [NONE, {}, {"input_norm": "sequence"}, SUM], ids=str)
def test_from_lstm_computes_the_same(options, bidirectional):
    lstm = nn.LSTM(D, H, 2, bidirectional=bidirectional, batch_first=True, dtype=torch.float64)
    batches = [x(B, T, D, dtype=torch.float64), x(7, 9, D, dtype=torch.float64)]
    packed = pack_padded_sequence(x(9, B, D, dtype=torch.float64), [9, 5, 2, 2])
    ours = BNLSTM.from_lstm(lstm, [*batches, packed, (batches[0], None)], **options).eval()
    for input in (*batches, x(2, 20, D, dtype=torch.float64), packed):
        (output, (h_n, c_n)), (expected, (h, c)) = ours(input), lstm(input)
        if input is packed:
            output, expected = output.data, expected.data
        for found, wanted in ((output, expected), (h_n, h), (c_n, c)):
            torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)
    ours.train()(batches[0])  # training can continue


def test_from_lstm_takes_pooled_moments():
    """The statistics are taken over all rows of all steps and batches together."""
    lstm = nn.LSTM(D, H, dtype=torch.float64)
    batches = [x(dtype=torch.float64), x(9, 2, D, dtype=torch.float64)]
    ours = BNLSTM.from_lstm(lstm, batches)
    rows = torch.cat([(b @ lstm.weight_ih_l0.t()).flatten(0, 1) for b in batches])
    torch.testing.assert_close(ours.statistics["ih_l0"].mean[0], rows.mean(0))
    torch.testing.assert_close(ours.statistics["ih_l0"].var[0], rows.var(0, correction=0))
    with_sum = BNLSTM.from_lstm(lstm, batches, **SUM)
    before = [torch.cat([torch.zeros_like(h[:1]), h[:-1]]) for h in (lstm(b)[0] for b in batches)]
    rows += torch.cat([(h @ lstm.weight_hh_l0.t()).flatten(0, 1) for h in before])
    torch.testing.assert_close(with_sum.statistics["hh_l0"].mean[0], rows.mean(0))
    torch.testing.assert_close(with_sum.statistics["hh_l0"].var[0], rows.var(0, correction=0))


def test_there_and_back():
    lstm = nn.LSTM(D, H, 2, bidirectional=True, dtype=torch.float64)
    input = x(dtype=torch.float64)
    for options in (NONE, {}, SUM):
        back = BNLSTM.from_lstm(lstm, [input], **options).to_lstm()
        torch.testing.assert_close(back(input)[0], lstm(input)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "prepare", "reason"),
    [
        ({}, lambda m: None, "no population statistics"),
        ({"cell_norm": "none"}, lambda m: m(x()), "differ between time steps"),
        ({"max_length": 1}, lambda m: m(x()), "the cell state of layer 0 is normalised"),
        ({**NONE, "learned_state": True}, lambda m: None, "starts from zeros"),
    ],
)
def test_to_lstm_is_refused_where_there_is_none(options, prepare, reason):
    module = BNLSTM(D, H, **options)
    prepare(module)
    with pytest.raises(ValueError, match=reason):
        module.to_lstm()


@pytest.mark.parametrize("options", [{}, SUM], ids=["frame", "sum"])
def test_to_lstm_folds_statistics_of_one_row(options):
    options = {**options, "cell_norm": "none", "max_length": 1}
    module = evaluated(BNLSTM(D, H, dtype=torch.float64, **options))
    input = x(dtype=torch.float64)
    torch.testing.assert_close(module.to_lstm()(input)[0], module(input)[0])


def test_from_lstm_says_what_it_cannot():
    with pytest.raises(ValueError, match="proj_size"):
        BNLSTM.from_lstm(nn.LSTM(D, H, proj_size=2))
    with pytest.raises(ValueError, match="at least one batch"):
        BNLSTM.from_lstm(nn.LSTM(D, H), [])
    with pytest.raises(ValueError, match="bias=True"):
        BNLSTM.from_lstm(nn.LSTM(D, H, bias=False), [x()])


@pytest.mark.parametrize("bias", [True, False])
@PLAIN_AND_NORMALISING
def test_the_state_of_an_nn_lstm_is_loaded(options, bias):
    class Model(nn.Module):
        def __init__(self, lstm):
            super().__init__()
            self.lstm = lstm

    lstm = nn.LSTM(D, H, 2, bias, bidirectional=True)
    ours = Model(BNLSTM(D, H, 2, bias, bidirectional=True, **options))
    ours.load_state_dict(Model(lstm).state_dict())
    assert torch.equal(ours.lstm.weight_hh_l1_reverse, lstm.weight_hh_l1_reverse)
    if bias:
        assert torch.equal(ours.lstm.bias_l0, lstm.bias_ih_l0 + lstm.bias_hh_l0)
    if options == NONE:
        input = x()
        torch.testing.assert_close(ours.lstm(input)[0], lstm(input)[0])


@IN_THE_WORDS_OF_NN_LSTM
def test_the_arguments_of_nn_lstm_are_checked_as_there():
    for arguments in (
        {"dropout": True}, {"dropout": 2.0}, {"bias": 1}, {"batch_first": 0}, {"hidden_size": 0},
        {"input_size": 2.0}, {"num_layers": 0},
    ):  # fmt: skip
        given = {"input_size": D, "hidden_size": H, **arguments}
        with pytest.raises((TypeError, ValueError)) as theirs:
            nn.LSTM(**given)
        with pytest.raises(theirs.type) as ours:
            BNLSTM(**given)
        assert str(ours.value) == str(theirs.value)
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        BNLSTM(D, H, dropout=0.5)
    with pytest.raises(ValueError, match=r"proj_size must be 0: project the outputs with"):
        BNLSTM(D, H, proj_size=2)


@IN_THE_WORDS_OF_NN_LSTM
@PLAIN_AND_NORMALISING
@pytest.mark.parametrize(
    "arguments",
    [
        (torch.zeros(T, B, D + 1),),
        (torch.zeros(D),),
        (torch.zeros(T, B, D, dtype=torch.float64),),
        (torch.zeros(T, B, D), (torch.zeros(1, B, H), torch.zeros(1, B + 1, H))),
        (torch.zeros(T, B, D), (torch.zeros(B, H), torch.zeros(B, H))),
        (torch.zeros(T, D), (torch.zeros(1, B, H), torch.zeros(1, B, H))),
        (torch.zeros(0, B, D),),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_in_the_words_of_nn_lstm(options, arguments):
    with pytest.raises((RuntimeError, ValueError)) as theirs:
        nn.LSTM(D, H)(*arguments)
    with pytest.raises(theirs.type) as ours:
        BNLSTM(D, H, **options)(*arguments)
    assert str(ours.value).splitlines()[0] == str(theirs.value).splitlines()[0]


@PLAIN_AND_NORMALISING
@pytest.mark.parametrize("state", [(2, 1, B, H), (1, B, H), (2, B, H)])
def test_a_state_of_one_tensor_is_refused(options, state):
    for input in (x(), pack_padded_sequence(x(), torch.full((B,), T))):
        with pytest.raises(RuntimeError, match="hx must be a tuple of two tensors"):
            BNLSTM(D, H, **options)(input, torch.zeros(state))


@PLAIN_AND_NORMALISING
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch(options, training):
    module = evaluated(BNLSTM(D, H, 2, bidirectional=True, **options)).train(training)
    input = torch.zeros(T, 0, D, requires_grad=True)
    output, (h_n, c_n) = module(input)
    assert output.shape == (T, 0, 2 * H)
    assert h_n.shape == c_n.shape == (4, 0, H)
    output.sum().backward()


@PLAIN_AND_NORMALISING
def test_hooks_fire_once(options):
    module, calls = BNLSTM(D, H, **options).eval(), []
    calibrate(module, [x()])
    module.register_forward_hook(lambda *_: calls.append(1))
    for input in (x(), x(T, D), pack_padded_sequence(x(), [6, 3, 2, 2])):
        module(input)
    assert len(calls) == 3


def test_all_weights():
    module = BNLSTM(D, H, 2, bidirectional=True, **NONE)
    assert [len(weights) for weights in module.all_weights] == [3] * 4
    assert module.all_weights[3][1] is module.weight_hh_l1_reverse


def test_the_usual_ways_to_initialise_an_nn_lstm():
    module = BNLSTM(D, H, 2, bidirectional=True)
    for names in module._all_weights:  # a common way to set the bias of the forget gate
        for name in filter(lambda name: "bias" in name, names):
            nn.init.ones_(getattr(module, name).data[H : 2 * H])
    assert [p.sum() for name, p in module.named_parameters() if "bias" in name] == [H] * 4
    assert module.mode == nn.LSTM(D, H).mode
    message = r"BNLSTM has no bias_hh_l1_reverse: its bias_l1_reverse is the sum of .* two biases"
    with pytest.raises(AttributeError, match=message):
        module.bias_hh_l1_reverse  # noqa: B018
    assert not hasattr(module, "bias_ih_l0")
    with pytest.raises(AttributeError, match="no attribute 'bias_l0'"):
        BNLSTM(D, H, bias=False).bias_l0  # noqa: B018


# ------------------------------------------------------------------ weights that are not parameters


def weight_normed(module):
    parametrizations.weight_norm(module, "weight_hh_l0")


def spectrally_normed(module):
    parametrizations.spectral_norm(module, "weight_hh_l0")


def orthogonal(module):
    parametrizations.orthogonal(module, "weight_hh_l0")


def pruned(module):
    prune.l1_unstructured(module, "weight_hh_l0", 0.5)


@PLAIN_AND_NORMALISING
@pytest.mark.parametrize("change", [weight_normed, spectrally_normed, orthogonal, pruned])
def test_reparametrised_weights(options, change):
    module = BNLSTM(D, H, dtype=torch.float64, **options)
    change(module)
    module(x(dtype=torch.float64))[0].sum().backward()
    trained = [p for n, p in module.named_parameters() if "weight_hh" in n]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    module.eval()
    same = BNLSTM(D, H, dtype=torch.float64, **options)
    with torch.no_grad():
        same.weight_hh_l0.copy_(module.weight_hh_l0)
    others = {n: v for n, v in module.state_dict().items() if "weight_hh" not in n}
    same.load_state_dict(others, strict=False)
    input = x(dtype=torch.float64)
    torch.testing.assert_close(module(input)[0], same.eval()(input)[0])


@PLAIN_AND_NORMALISING
def test_functional_call(options):
    module = BNLSTM(D, H, **options)
    doubled = {name: 2 * p.detach() for name, p in module.named_parameters()}
    found, _ = torch.func.functional_call(module, doubled, (input := x(),))
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(2)
    assert torch.equal(found, module(input)[0])


@PLAIN_AND_NORMALISING
def test_weight_drop(options):
    """As in AWD-LSTM, the parameter is renamed, and a tensor with zeros replaces it."""
    module = BNLSTM(D, H, **options)
    raw = module.weight_hh_l0
    del module._parameters["weight_hh_l0"]
    module.register_parameter("weight_hh_l0_raw", raw)
    module.weight_hh_l0 = nn.functional.dropout(raw, 0.5)
    module(x())[0].sum().backward()
    assert ((raw.grad == 0) == (module.weight_hh_l0 == 0)).all()


@PLAIN_AND_NORMALISING
def test_per_sample_gradients_in_evaluation(options):
    module = evaluated(BNLSTM(D, H, dtype=torch.float64, **options))
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    buffers = dict(module.named_buffers())

    def loss(parameters, sample):
        output, _ = torch.func.functional_call(module, (parameters, buffers), (sample[:, None],))
        return output.square().sum()

    input = x(dtype=torch.float64)
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(parameters, input)
    for b in range(B):
        module.zero_grad()
        module(input[:, b : b + 1])[0].square().sum().backward()
        for name, parameter in module.named_parameters():
            torch.testing.assert_close(per_sample[name][b], parameter.grad)


@pytest.mark.parametrize("options", [NONE, {}, {"input_norm": "sequence"}, SUM], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_graph", [True, False])
@pytest.mark.filterwarnings("ignore:.*jit.script:DeprecationWarning")  # PyTorch's own use of it
def test_forward_mode_differentiation(options, training, with_graph):
    """The tangent of the output is its Jacobian, found backwards, times that of the input."""
    module = evaluated(BNLSTM(D, H, dtype=torch.float64, **options)).train(training)
    input, tangent = x(dtype=torch.float64), x(dtype=torch.float64)
    with forward_ad.dual_level(), torch.set_grad_enabled(with_graph):
        output, _ = module(forward_ad.make_dual(input, tangent))
        found = forward_ad.unpack_dual(output).tangent
    jacobian = torch.autograd.functional.jacobian(lambda x: module(x)[0], input)
    torch.testing.assert_close(found, (jacobian * tangent).sum((3, 4, 5)))


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_statistics_of_another_dtype_than_the_weights(dtype, kernel):
    """As with FSDP2 in mixed precision, which converts the parameters but not the buffers."""
    module = evaluated(BNLSTM(D, H, 2, kernel=kernel))
    input = x(dtype=dtype)
    expected, states = copy.deepcopy(module).to(dtype)(input)
    for p in module.parameters():
        p.data = p.to(dtype)
    found, found_states = module(input)
    assert torch.equal(found, expected)
    assert all(map(torch.equal, found_states, states))
    module.train()(input)
    assert module.statistics["ih_l0"].mean.dtype == torch.float32


def test_quantisation_is_refused():
    module = nn.Sequential(nn.Linear(D, D), BNLSTM(D, H))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"BNLSTM cannot be quantised: quantise the other"):
            torch.ao.quantization.quantize_dynamic(module, {nn.LSTM})


def test_synchronised_batch_norm_is_refused():
    module = nn.Sequential(nn.BatchNorm1d(3), BNLSTM(D, H))
    with pytest.raises(AttributeError, match="convert the other modules one by one"):
        nn.SyncBatchNorm.convert_sync_batchnorm(module)


# ------------------------------------------------------------------ precision


@PLAIN_AND_NORMALISING
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [False, True])
def test_autocast(options, dtype, given):
    """The module follows a layer in half precision; its dtypes are those of `torch.nn.LSTM`, with
    which oneDNN does not interfere: with it, they depend on the processor."""
    linear, module = nn.Linear(D, D), BNLSTM(D, H, 2, **options)
    state = (torch.zeros(2, B, H), torch.zeros(2, B, H)) if given else None
    with torch.autocast("cpu", dtype):
        features = linear(x())
        assert features.dtype == dtype
        output, (h_n, c_n) = module(features, state)
        torch._C._set_mkldnn_enabled(False)
        try:
            theirs, (h, c) = nn.LSTM(D, H, 2)(features, state)
        finally:
            torch._C._set_mkldnn_enabled(True)
    assert (output.dtype, h_n.dtype, c_n.dtype) == (theirs.dtype, h.dtype, c.dtype)
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())
    exact = module.eval()
    with torch.no_grad():
        calibrate(exact, [features.float()])
        expected, _ = exact(features.float(), state)
        with torch.autocast("cpu", dtype):
            found, _ = exact(features, state)
    # On a processor that multiplies fast in bfloat16, factors are rounded to 8 bits.
    rounds = dtype == torch.bfloat16 and kernels.has_bfloat16()
    atol = 2**-6 * expected.abs().max().item() if rounds else 0
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=atol)


@PLAIN_AND_NORMALISING
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_construction_in_half_precision(options, dtype):
    module = BNLSTM(D, H, recurrent_init="identity", dtype=dtype, **options)
    assert {p.dtype for p in module.parameters()} == {dtype}
    w = BNLSTM(D, H, dtype=dtype, **options).weight_hh_l0.float()
    torch.testing.assert_close(w.t() @ w, torch.eye(H), rtol=0, atol=H * torch.finfo(dtype).eps)
    if dtype == torch.bfloat16:
        output, _ = module(x(dtype=dtype))
        assert output.dtype == dtype


# ------------------------------------------------------------------ statistics


def test_max_length_gives_buffers_of_constant_shape():
    module = BNLSTM(D, H, max_length=9)
    before = {name: (b.shape, b.data_ptr()) for name, b in module.named_buffers()}
    assert module.statistics["hh_l0"].mean.shape == (9, 4 * H)
    for steps in (4, 7, 12):
        module(x(steps, B, D))
    calibrate(module, [x(5, B, D)])
    assert before == {name: (b.shape, b.data_ptr()) for name, b in module.named_buffers()}
    # Steps that no sequence has reached are normalised like the last step that one has.
    statistics = module.statistics["hh_l0"]
    assert statistics.num_batches.tolist() == [1] * 5 + [0] * 4
    assert torch.equal(statistics.mean[5:], statistics.mean[4].expand(4, -1))
    grown = BNLSTM(D, H)
    grown.load_state_dict(module.state_dict())
    short = BNLSTM(D, H, max_length=3)
    short.load_state_dict(module.state_dict())
    assert torch.equal(short.statistics["c_l0"].var, module.statistics["c_l0"].var[:3])
    input = x(20, B, D)
    assert torch.equal(grown.eval()(input)[0], module.eval()(input)[0])


def test_shared_statistics_do_not_grow_behind_other_processes():
    module = BNLSTM(D, H)
    module(x(3, B, D))
    module.share_memory()
    module(x(3, B, D))
    with pytest.raises(RuntimeError, match=r"grow to 4 time steps here, .* max_length=\.\.\."):
        module(x(4, B, D))
    fixed = BNLSTM(D, H, max_length=9).share_memory()
    fixed(x(4, B, D))
    assert fixed.statistics["hh_l0"].mean.is_shared()


def test_statistics_do_not_grow_behind_other_ranks():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(RuntimeError, match=r"grow to 3 time steps here, .* max_length=\.\.\."):
            BNLSTM(D, H)(x(3, B, D))
        BNLSTM(D, H, max_length=3)(x(4, B, D))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_models(use_buffers):
    model = nn.Sequential(nn.Linear(D, D), BNLSTM(D, H, max_length=T))
    averaged = AveragedModel(model, use_buffers=use_buffers)
    for _ in range(3):
        model(x())
        averaged.update_parameters(model)
    loader = [(x(), None) for _ in range(4)]
    update_bn(loader, averaged)
    expected = copy.deepcopy(averaged.module)
    calibrate(expected, loader)
    for name, buffer in averaged.module.named_buffers():
        torch.testing.assert_close(buffer, expected.get_buffer(name))


def test_update_bn_without_max_length():
    averaged = AveragedModel(BNLSTM(D, H))
    update_bn([x(), x()], averaged)
    assert averaged.module.statistics["hh_l0"].num_batches.tolist() == [2] * T
    averaged.eval()(x())


@pytest.mark.parametrize("what", ["calibrate", "train"])
def test_training_after_inference_mode(what):
    module = BNLSTM(D, H)
    with torch.inference_mode():
        calibrate(module, [x()]) if what == "calibrate" else module(x())
    module(x())[0].sum().backward()
    assert module.statistics["hh_l0"].num_batches.tolist() == [2] * T
    module.eval()(x())[0].sum().backward()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_counts_statistics_once(use_reentrant):
    module, input = BNLSTM(D, H), x().requires_grad_()
    output, _ = checkpoint(module, input, use_reentrant=use_reentrant)
    output.square().sum().backward()
    assert module.statistics["hh_l0"].num_batches.tolist() == [1] * T
    (gradient,) = torch.autograd.grad(module(input)[0].square().sum(), module.weight_hh_l0)
    torch.testing.assert_close(module.weight_hh_l0.grad, gradient)


def test_first_step_counts_in_training():
    """For a sequence in pieces, statistics are averaged in the rows of their steps."""
    whole, pieces = (BNLSTM(D, H, dtype=torch.float64) for _ in range(2))
    pieces.load_state_dict(whole.state_dict())
    input, state = x(dtype=torch.float64), None
    whole(input)
    for first in range(0, T, 2):
        _, state = pieces(input[first : first + 2], state, first_step=first)
    for term in ("ih_l0", "hh_l0", "c_l0"):
        assert pieces.statistics[term].num_batches.tolist() == [1] * T
        torch.testing.assert_close(pieces.statistics[term].mean, whole.statistics[term].mean)
        torch.testing.assert_close(pieces.statistics[term].var, whole.statistics[term].var)
    module = BNLSTM(D, H, max_length=4)
    module(input.float()[:3], first_step=3)  # only the last row is updated
    assert module.statistics["hh_l0"].num_batches.tolist() == [0, 0, 0, 1]
    module = BNLSTM(D, H, input_norm="sequence")
    module(input.float()[3:], first_step=3)  # sequence-wise statistics have one row
    assert module.statistics["ih_l0"].num_batches.tolist() == [1]
    assert module.statistics["hh_l0"].num_batches.tolist() == [0] * 3 + [1] * 3


def test_a_single_sequence_left_is_not_normalised_away():
    module, input = BNLSTM(D, H), x(9, 3, D)
    output, _ = module(input, lengths=torch.tensor([9, 3, 3]))
    assert (output[3:, 0].abs() > 0).all()
    # It is normalised by the statistics of the last step with several sequences, as constants.
    w, statistics = module, module.statistics
    rows = (input[:3] @ w.weight_ih_l0.t())[2]
    torch.testing.assert_close(statistics["ih_l0"].mean[4], rows.mean(0))


def test_a_warning_where_all_sequences_begin_alike():
    module, input = BNLSTM(D, H), x()
    input[0] = 0.5
    module(x())
    with pytest.warns(UserWarning, match="begin with the same frame, whose variance is 0") as found:
        module(input)
    assert found[0].filename == __file__  # the line of the user's call
    module(input)  # warns only once: another warning would be an error here
    BNLSTM(D, H, init_noise=0.1)(input)
    BNLSTM(D, H, **NONE)(input)
    with pytest.warns(UserWarning, match="begin with the same frame"):
        BNLSTM(D, H)(torch.zeros(T, B, dtype=torch.long))


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = BNLSTM(D, H), nn.Linear(H, 2)

    def forward(self, input):
        return self.head(self.lstm(input)[0][-1])


def test_calibrate_takes_batches_of_input_and_target():
    model, batches = Classifier(), [(x(), torch.zeros(B)), [x(), torch.zeros(B)]]
    assert calibrate(model, batches) == 2
    with pytest.raises(RuntimeError) as caught:  # the target is not a valid hx
        calibrate(model.lstm, batches)
    assert any("forward=" in note for note in caught.value.__notes__)
    assert calibrate(model.lstm, batches, forward=lambda batch: model.lstm(batch[0])) == 2


# ------------------------------------------------------------------ saved, compiled, exported


@PLAIN_AND_NORMALISING
def test_a_pickled_module_is_loaded_without_its_code(options):
    module = evaluated(BNLSTM(D, H, 2, dropout=0.5, **options))
    torch.save(module, file := io.BytesIO())
    file.seek(0)
    loaded, input = torch.load(file, weights_only=True), x()
    assert torch.equal(loaded(input)[0], module(input)[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("options", "training", "padded", "bidirectional"),
    [
        # The default is a small one, in evaluation: test_operators.py compiles training.
        pytest.param(
            options, training, padded, bidirectional,
            marks=[] if (options, training, padded, bidirectional) == ({}, False, True, False)
            else pytest.mark.slow,
        )
        for options in (NONE, {}, SUM)
        for training in (False, True)
        for padded, bidirectional in ((True, False), (False, False), (True, True))
    ],
)  # fmt: skip
def test_a_compiled_model(options, training, padded, bidirectional):
    """One graph serves any length, in evaluation and (with `max_length`) in training."""
    torch._dynamo.reset()
    model = nn.Sequential(BNLSTM(D, H, bidirectional=bidirectional, max_length=30, **options))
    calibrate(model, [x()])
    model.train(training)
    compiled = torch.compile(
        lambda *arguments: model[0](*arguments)[0], backend="aot_eager", fullgraph=True,
        dynamic=True,
    )  # fmt: skip
    for number, (steps, batch) in enumerate(((8, 7), (9, 4), (12, 18))):
        lengths = torch.randint(1, steps + 1, (batch,)) if padded else None
        if lengths is not None:
            lengths[:2] = steps
        input = x(steps, batch, D)
        context = torch._dynamo.config.patch(error_on_recompile=True)
        with context if number > 0 else warnings.catch_warnings():
            found = compiled(input, None, lengths)
        torch.testing.assert_close(found, model[0](input, None, lengths)[0])


@PLAIN_AND_NORMALISING
def test_an_exported_model_at_any_length(options):
    module = evaluated(BNLSTM(D, H, 2, bidirectional=True, **options))
    dynamic = {"input": {0: torch.export.Dim("T"), 1: torch.export.Dim("B")}}
    program = torch.export.export(module, (x(),), dynamic_shapes=dynamic)
    for shape in ((T, B, D), (13, 2, D)):
        input = x(*shape)
        torch.testing.assert_close(program.module()(input)[0], module(input)[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit is itself deprecated
@pytest.mark.parametrize("inside", [False, True])
def test_what_looks_into_a_module_is_refused_in_one_line(inside):
    module = nn.Sequential(BNLSTM(3, 4)) if inside else BNLSTM(3, 4)
    with pytest.raises(RuntimeError, match=r"^torch.jit.script cannot .* use torch.export.*trace$"):
        torch.jit.script(module)
    with pytest.raises(TypeError, match=r"^torch.fx.symbolic_trace cannot .* use torch.export.*$"):
        torch.fx.symbolic_trace(module)

    class Leaving(torch.fx.Tracer):
        def is_leaf_module(self, m, module_qualified_name):
            return isinstance(m, BNLSTM)

    if inside:
        x = torch.randn(5, 2, 3)
        traced = torch.fx.GraphModule(module, Leaving().trace(module))
        torch.testing.assert_close(traced(x)[0], module(x)[0])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@PLAIN_AND_NORMALISING
def test_a_traced_model(options):
    module = evaluated(BNLSTM(D, H, 2, **options))
    traced = torch.jit.trace(module, (x(),))
    for shape in ((T, B, D), (13, 2, D)):
        input = x(*shape)
        torch.testing.assert_close(traced(input)[0], module(input)[0])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_traced_plain_model_needs_no_operator_of_ours():
    traced = torch.jit.trace(BNLSTM(D, H, **NONE).eval(), (x(T, 64, D),))
    assert traced.inlined_graph.findNode("aten::lstm") is not None
    assert "bnrnn_cpu" not in str(traced.inlined_graph)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # from the exporter
def test_onnx_of_a_cell_bias(tmp_path):
    module = BNLSTM(D, H, cell_bias=True, **NONE).eval()
    torch.nn.init.ones_(module.beta_c_l0)
    torch.onnx.export(module, (x(),), dynamo=True, verbose=False).save(tmp_path / "lstm.onnx")
    import onnxruntime  # slow to import

    input = x()
    session = onnxruntime.InferenceSession(tmp_path / "lstm.onnx")
    found = session.run(None, {"input": input.numpy()})
    torch.testing.assert_close(torch.from_numpy(found[0]), module(input)[0])


@pytest.mark.slow  # test_onnx_of_a_cell_bias runs by default
@pytest.mark.filterwarnings("ignore")  # from the exporter
@pytest.mark.parametrize(
    ("options", "padded"),
    [({}, True), ({}, False), (NONE, True), (NONE, False), (SUM, True), (LAYER, True)],
    ids=str,
)
def test_onnx_at_any_length(options, padded, tmp_path):
    module = evaluated(BNLSTM(D, H, 2, bidirectional=True, **options))
    dims = {0: torch.export.Dim("T"), 1: torch.export.Dim("B")}
    example, shapes = (x(),), {"input": dims}
    if padded:
        example = (x(), None, torch.tensor([6, 2, 4, 1]))
        shapes = {"input": dims, "hx": None, "lengths": {0: dims[1]}}
    program = torch.onnx.export(module, example, dynamo=True, dynamic_shapes=shapes, verbose=False)
    import onnxruntime  # slow to import

    program.save(tmp_path / "lstm.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "lstm.onnx")
    for steps, batch in ((T, B), (13, 2)):
        input = x(steps, batch, D)
        given = {"input": input}
        if padded:
            given["lengths"] = torch.randint(1, steps + 1, (batch,))
        found = session.run(None, {name: value.numpy() for name, value in given.items()})
        output, (h_n, c_n) = module(input, None, given.get("lengths"))
        for ours, theirs in zip(found, (output, h_n, c_n), strict=True):
            torch.testing.assert_close(torch.from_numpy(ours), theirs)
