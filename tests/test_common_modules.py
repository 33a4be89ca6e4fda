"""PyTorch's own tests of `torch.nn.LSTM`, applied to `BNLSTM`.

The samples are those of `torch.testing._internal.common_modules`. The assertions are those that
`test/test_modules.py` and `test/test_nn.py` of PyTorch make for every module. There are three
exceptions:

- Samples with `proj_size` are left out, because `BNLSTM` has no projections.
- If statistics are taken over a batch, the samples run in evaluation only. They are single
  sequences, and training on one raises an error.
- The reference of the samples copies an LSTM's weights by their names in `torch.nn.LSTM`. Instead
  of using it, a module without normalisation is compared with `torch.nn.LSTM` itself.
"""

import copy
import functools
import pickle
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from bnrnn import BNLSTM, calibrate

NONE = {"input_norm": "none", "recurrent_norm": "none", "cell_norm": "none"}
FRAMES = {}
SEQUENCES = {"input_norm": "sequence", "recurrent_norm": "none", "cell_norm": "none"}
SUM = {"input_norm": "none", "recurrent_norm": "sum", "cell_norm": "none"}
KINDS = pytest.mark.parametrize(
    "options", [NONE, FRAMES, SEQUENCES, SUM], ids=["plain", "frame", "seq", "sum"]
)


@functools.cache
def lstm_info():
    """Import PyTorch's samples, which takes three seconds, only in the process that needs them."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr("sys.argv", ["pytest"])  # common_utils parses it
        warnings.simplefilter("ignore")  # from packages that only PyTorch's other tests use
        # It forbids later changes of torch's flags, which other tests in this process make.
        patch.setattr("torch.backends.disable_global_flags", lambda: None)
        from torch.testing._internal import common_modules
    (info,) = (m for m in common_modules.module_db if m.module_cls is nn.LSTM)
    return info


def samples(dtype=torch.float64, requires_grad=True):
    info = lstm_info()
    found = info.module_inputs_func(
        info, device="cpu", dtype=dtype, requires_grad=requires_grad, training=False
    )
    return [s for s in found if s.constructor_input.kwargs["proj_size"] == 0]


def modules(options, dtype=torch.float64):
    """For each sample, a calibrated module and the arguments of its constructor and of a call."""
    for sample in samples(dtype):
        constructed = sample.constructor_input
        module = BNLSTM(*constructed.args, **constructed.kwargs, dtype=dtype, **options)
        batch = torch.randn(4, 4, 2, dtype=dtype)
        calibrate(module, [batch])
        yield module.eval(), constructed.kwargs, sample.forward_input.args


def flat(results):
    output, (h_n, c_n) = results
    return output, h_n, c_n


def test_there_are_samples():
    assert len(samples()) == 16


@KINDS
def test_forward(options):
    """An unbatched sample equals a batch of one; without norms, it equals `torch.nn.LSTM`."""
    for module, kwargs, (input, *hx) in modules(options):
        batch_dim = 0 if kwargs["batch_first"] else 1
        given = [tuple(state[:, None] for state in hx[0])] if hx else []
        output, h_n, c_n = flat(module(input, *hx))
        batched = flat(module(input.unsqueeze(batch_dim), *given))
        assert torch.equal(output, batched[0].squeeze(batch_dim))
        assert torch.equal(h_n, batched[1][:, 0])
        assert torch.equal(c_n, batched[2][:, 0])
        if options == NONE:
            lstm = nn.LSTM(**kwargs, dtype=torch.float64)
            module.load_state_dict(lstm.state_dict())
            for ours, theirs in zip(flat(module(input, *hx)), flat(lstm(input, *hx)), strict=True):
                torch.testing.assert_close(ours, theirs)


@KINDS
@pytest.mark.parametrize(
    ("check", "every"),
    [
        # All samples would take seconds. The default ones include each kind of arguments.
        (torch.autograd.gradcheck, 3), (torch.autograd.gradgradcheck, 8),
        pytest.param(torch.autograd.gradcheck, 1, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_gradients(options, check, every):
    for number, (module, _, (input, *hx)) in enumerate(modules(options)):
        if number % every:
            continue
        parameters = dict(module.named_parameters())

        def call(input, *rest, module=module, names=tuple(parameters), hx=hx):
            state = [tuple(rest[:2])] if hx else []
            values = dict(zip(names, rest[2 * len(hx) :], strict=True))
            return flat(torch.func.functional_call(module, values, (input, *state)))

        leaves = [input, *(hx[0] if hx else ()), *parameters.values()]
        assert check(call, leaves, fast_mode=True)


@KINDS
def test_non_contiguous_inputs(options):
    for module, _, (input, *hx) in modules(options):
        strided = torch.stack([input, input], dim=-1)[..., 0].detach().requires_grad_()
        assert not strided.is_contiguous()
        for ours, theirs in zip(flat(module(strided, *hx)), flat(module(input, *hx)), strict=True):
            assert torch.equal(ours, theirs)
        ours, theirs = (
            torch.autograd.grad(module(i, *hx)[0].square().sum(), i) for i in (strided, input)
        )
        torch.testing.assert_close(ours, theirs)


@KINDS
def test_pickle_and_copy(options):
    for module, _, arguments in modules(options):
        expected = flat(module(*arguments))
        for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
            for ours, theirs in zip(flat(other(*arguments)), expected, strict=True):
                assert torch.equal(ours, theirs)
        assert repr(module) == repr(copy.deepcopy(module))


@KINDS
def test_dtypes_and_devices(options):
    for _, kwargs, _ in modules(options):
        for dtype in (torch.float32, torch.float64):
            module = BNLSTM(**kwargs, device="cpu", dtype=dtype, **options)
            for tensor in (*module.parameters(), *module.buffers()):
                assert tensor.dtype in (dtype, torch.long)
        with torch.device("meta"):
            module = BNLSTM(**kwargs, **options)
        assert all(t.is_meta for t in (*module.parameters(), *module.buffers()))
        module = module.to_empty(device="cpu")
        module.reset_parameters()
        assert all(t.isfinite().all() for t in (*module.parameters(), *module.buffers()))
        with torch.device("cpu"):
            assert module.double().weight_hh_l0.dtype == torch.float64


@KINDS
def test_training_and_evaluation_mode(options):
    for module, _, (input, *hx) in modules(options):
        assert not module.training
        before = copy.deepcopy(module.state_dict())
        module(input, *hx)
        for name, value in module.state_dict().items():
            assert torch.equal(value, before[name]), name
        module.train()
        assert all(m.training for m in module.modules())


@KINDS
def test_factories_draw_on_the_default_generator(options):
    for _, kwargs, _ in modules(options):
        make = partial(BNLSTM, **kwargs, **options)
        torch.manual_seed(3)
        first = make()
        torch.manual_seed(3)
        second = make()
        for ours, theirs in zip(first.parameters(), second.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_errors():
    """PyTorch's samples of invalid LSTM arguments; test_dropin.py checks the messages."""
    lstm = BNLSTM(10, 20, 2)
    for input, hx in (
        (torch.randn(5, 3, 11), None),
        (torch.randn(5, 3, 10), (torch.randn(2, 3, 21), torch.randn(2, 3, 20))),
        (torch.randn(5, 3, 10), (torch.randn(3, 3, 20), torch.randn(2, 3, 20))),
        (torch.randn(5, 3, 10), (torch.randn(2, 2, 20), torch.randn(2, 3, 20))),
    ):
        with pytest.raises(RuntimeError):
            lstm(input, hx)
