"""Initialising, converting and loading the weights of a `BNLSTM`, however they are stored."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

from bnrnn import BNLSTM, calibrate
from bnrnn.nn.attentive_reader import AttentiveReader
from bnrnn.nn.feature_norm import FeatureNorm
from tests.accuracy import assert_as_accurate

T, B, D, H = 6, 4, 3, 5
NONE = {"input_norm": "none", "recurrent_norm": "none", "cell_norm": "none"}
LAYER = dict.fromkeys(NONE, "layer")
ALL_KINDS = pytest.mark.parametrize("options", [NONE, {}, LAYER], ids=["plain", "batch", "layer"])


def x(*shape):
    return torch.randn(*(shape or (T, B, D)))


def changed(module):
    """Set every parameter and buffer to another value."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.add_(1)
    return module


# ------------------------------------------------------------------ reset_parameters


@pytest.mark.parametrize(
    "create",
    [
        lambda: BNLSTM(D, H, 2, learned_state=True),
        lambda: FeatureNorm(H, beta=True),
        lambda: AttentiveReader(
            vocabulary=20, hidden_size=H, input_norm="frame", attention_norm=True
        ),
    ],
    ids=["BNLSTM", "FeatureNorm", "AttentiveReader"],
)
def test_every_module_of_a_model_can_be_reset(create):
    """Many programs initialise a model again by `model.apply` and `reset_parameters`."""
    model = create()
    fresh = {name: t.clone() for name, t in model.state_dict().items()}
    changed(model).apply(lambda m: getattr(m, "reset_parameters", lambda: None)())
    for name, tensor in model.state_dict().items():
        if any(part in name for part in ("gamma", "beta", "statistics")):
            assert torch.equal(tensor, fresh[name]), name


@ALL_KINDS
@pytest.mark.parametrize(
    "reparametrise",
    [
        lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
        lambda m: parametrizations.orthogonal(m, "weight_ih_l0"),
        lambda m: parametrizations.spectral_norm(m, "weight_hh_l0"),
        lambda m: prune.random_unstructured(m, "weight_hh_l0", 0.5),
        pytest.param(
            lambda m: weight_norm(m, "weight_hh_l0"),
            marks=pytest.mark.filterwarnings("ignore::FutureWarning"),
        ),
    ],
    ids=["weight_norm", "orthogonal", "spectral_norm", "pruned", "old weight_norm"],
)
def test_resetting_weights_that_are_not_parameters(options, reparametrise):
    module = BNLSTM(D, H, **options)
    reparametrise(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
    module.reset_parameters()
    output, _ = module(x())
    assert torch.isfinite(output).all()
    effective = {"weight_ih_l0": module.weight_ih_l0, "weight_hh_l0": module.weight_hh_l0}
    for name, weight in effective.items():
        pruned = any(key.startswith(name + "_mask") for key, _ in module.named_buffers())
        if not pruned:  # orthonormal columns
            product = weight.mT @ weight
            torch.testing.assert_close(product, torch.eye(len(product)), rtol=1e-5, atol=1e-5)
    assert bool((module.bias_l0.chunk(4)[1] == module.options.forget_bias).all())


def test_resetting_a_parametrisation_without_inverse():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    module = BNLSTM(D, H)
    parametrize.register_parametrization(module, "weight_hh_l0", Doubled())
    module.reset_parameters()
    original = module.parametrizations["weight_hh_l0"].original
    torch.testing.assert_close(original.mT @ original, torch.eye(H), rtol=1e-5, atol=1e-5)


@ALL_KINDS
def test_resetting_leaves_what_a_subclass_adds(options):
    class Larger(BNLSTM):
        def __init__(self):
            super().__init__(D, H, **options)
            self.projection = nn.Linear(H, 2)
            self.temperature = nn.Parameter(torch.ones(3))

    module = Larger()
    before = [p.clone() for p in (*module.projection.parameters(), module.temperature)]
    module.reset_parameters()
    after = (*module.projection.parameters(), module.temperature)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_functions_for_all_batch_normalisations_leave_the_statistics():
    """They find `StepStatistics`, which derives from PyTorch's class."""
    module, input = BNLSTM(D, H), x()
    calibrate(module, [input])
    expected, _ = module.eval()(input)
    torch.func.replace_all_batch_norm_modules_(module)
    assert torch.equal(module(input)[0], expected)
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
            assert [getattr(part, name) for name in names] == [None] * 5
            assert not part.affine
            assert not part.track_running_stats


# ------------------------------------------------------------------ from_lstm


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "reparametrise",
    [
        lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
        lambda m: weight_norm(m, "weight_ih_l0"),
        lambda m: prune.random_unstructured(m, "weight_hh_l0", 0.5),
    ],
    ids=["weight_norm", "old weight_norm", "pruned"],
)
@pytest.mark.parametrize("options", [NONE, {}], ids=["plain", "batch"])
def test_an_nn_lstm_whose_weights_are_not_parameters(options, reparametrise):
    lstm, input = nn.LSTM(D, H, dtype=torch.float64), x().double()
    reparametrise(lstm)
    ours = BNLSTM.from_lstm(lstm, [input], **options).eval()
    torch.testing.assert_close(ours(input)[0], lstm(input)[0], rtol=1e-10, atol=1e-10)


def test_frozen_weights_stay_frozen():
    lstm = nn.LSTM(D, H, 2)
    for name in ("weight_ih_l0", "bias_ih_l1", "bias_hh_l1", "bias_ih_l0"):
        lstm.get_parameter(name).requires_grad_(False)
    ours = BNLSTM.from_lstm(lstm)
    frozen = {name for name, p in ours.named_parameters() if not p.requires_grad}
    assert frozen == {"weight_ih_l0", "bias_l1"}
    plain = BNLSTM.from_lstm(lstm, **NONE)
    back = {name for name, p in plain.to_lstm().named_parameters() if not p.requires_grad}
    assert back == {"weight_ih_l0", "bias_ih_l1", "bias_hh_l1"}


def test_a_conversion_draws_no_random_numbers():
    lstm = nn.LSTM(D, H)
    before = torch.get_rng_state()
    BNLSTM.from_lstm(lstm, **NONE).to_lstm()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("other", [nn.GRU(D, H), nn.Linear(D, H), nn.LSTMCell(D, H)])
def test_other_modules_cannot_be_converted(other):
    with pytest.raises(TypeError, match=f"must be a torch.nn.LSTM, got {type(other).__name__}"):
        BNLSTM.from_lstm(other)


# ------------------------------------------------------------------ loading


@pytest.mark.parametrize("options", [{}, LAYER, {"cell_bias": True, "learned_state": True, **NONE}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_state_of_an_nn_lstm_is_assigned(options, dtype, device):
    lstm = nn.LSTM(D, H, 2, dtype=dtype)
    ours = BNLSTM(D, H, 2, device=device, **options)
    ours.load_state_dict(lstm.state_dict(), assign=True)
    loaded = BNLSTM(D, H, 2, dtype=dtype, **options)
    loaded.load_state_dict(lstm.state_dict())
    for name, tensor in loaded.state_dict().items():
        found = ours.state_dict()[name]
        assert (found.device, found.dtype) == (tensor.device, tensor.dtype), name
        assert torch.equal(found, tensor) or device == "cpu", name
        torch.testing.assert_close(found, tensor)
    input = x().to(dtype)
    torch.testing.assert_close(ours(input)[0], loaded(input)[0])


def test_an_incomplete_state_is_not_taken_for_an_nn_lstm_s():
    for options, key in (({}, "statistics.ih_l0.mean"), (LAYER, "gamma_ih_l0")):
        module = BNLSTM(D, H, bias=False, **options)
        state = module.state_dict()
        del state[key]
        with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
            module.load_state_dict(state)


# ------------------------------------------------------------------ precision and replicas


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"input_norm": "sequence"}, {"cell_norm": "none"}], ids=str
)
def test_gradients_in_half_precision(options, dtype):
    """The factor 1 / sqrt(var + ε) has a gradient beyond the range of float16."""

    def gradients(problem, lengths):
        module = BNLSTM(D, H, dtype=problem["x"].dtype, kernel="reference", **options)
        module.load_state_dict({**module.state_dict(), **problem["weights"]})
        output, _ = module(problem["x"], lengths=lengths)
        output.square().sum().backward()
        return {name: parameter.grad for name, parameter in module.named_parameters()}

    weights = dict(BNLSTM(D, H, dtype=dtype, **options).named_parameters())
    problem = {"x": x().to(dtype), "weights": {n: w.detach() for n, w in weights.items()}}
    whole = [T] * B
    assert_as_accurate(lambda p: gradients(p, whole), lambda p: gradients(p, None), problem)
    for grad in gradients(problem, [6, 3, 3, 1]).values():
        assert torch.isfinite(grad).all()


def test_feature_norm_in_half_precision():
    norm = FeatureNorm(H, dtype=torch.float16)
    y = (1e-3 * torch.randn(T, B, H)).half().requires_grad_()
    mask = torch.ones(T, B, dtype=torch.bool)
    mask[3:, 1] = False
    norm(y, mask).square().sum().backward()
    assert torch.isfinite(y.grad).all()
    assert torch.isfinite(norm.gamma.grad).all()


def test_statistics_of_a_replica_do_not_vanish():
    """DataParallel trains on replicas; what they grow would be lost."""
    for max_length in (None, T):
        module = BNLSTM(D, H, max_length=max_length)
        replica = module._replicate_for_data_parallel()
        replica.statistics = module.statistics._replicate_for_data_parallel()
        for name, parameter in module.named_parameters():
            setattr(replica, name, parameter.clone())
        for name, statistics in module.statistics.items():
            replica.statistics._modules[name] = statistics._replicate_for_data_parallel()
        if max_length is None:
            with pytest.raises(
                RuntimeError, match="replicas share them: give the module max_length"
            ):
                replica(x())
        else:
            replica(x())
            assert (module.statistics["ih_l0"].num_batches == 1).all()
