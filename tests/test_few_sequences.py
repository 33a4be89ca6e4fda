"""The CPU kernel's forward pass for few sequences in evaluation, compared with the reference."""

import pytest
import torch

from bnrnn import BNLSTM
from bnrnn.kernels import cpu
from tests.test_cpu_kernel import (
    FRAME,
    LAYER,
    NONE,
    SLOTS,
    SUM,
    assert_as_accurate_as_the_reference,
    problem,
)

pytestmark = [pytest.mark.numeric, pytest.mark.usefixtures("built_kernel")]
MOST = 8  # kFewSequences in evaluation.h
FEW_FRAMES = 32  # with more, the weights are packed


def values(recurrence, case):
    with torch.no_grad():
        output, h_n, c_n, moments = recurrence(**case)
    assert not any(moments)
    return {"output": output, "h_n": h_n, "c_n": c_n}


def assert_accurate(case):
    assert_as_accurate_as_the_reference(case, run=values)


def draw(*shape, norms=FRAME, **options):
    options = {"given": True} | options
    return problem(*shape, norms, torch.float32, **options)


@pytest.mark.parametrize("norms", SLOTS)
def test_every_normalisation(norms):
    """A few frames and many have products of their own."""
    torch.set_num_threads(2)
    for steps, batch, options in (
        (3, 5, {}), (FEW_FRAMES + 1, 1, {}), (7, 6, {"lengths": True, "expectation": True}),
        (5, MOST, {"one_hot": True, "bias": False}), (2, 1, {"beta_c": True, "one_hot": True}),
    ):  # fmt: skip
        assert_accurate(draw(steps, batch, 5, 37, norms=norms, **options))


@pytest.mark.parametrize("batch", range(1, MOST + 1))
@pytest.mark.parametrize("hidden", [2, 8, 15, 16, 17, 33, 100])
def test_units_and_sequences_that_do_not_fill_their_tiles(hidden, batch):
    torch.set_num_threads(1)
    many = FEW_FRAMES // batch + 1
    for steps, features, norms in (
        (2, 3, FRAME), (many, 20, FRAME), (1, 1, NONE), (many, 2, LAYER),
    ):  # fmt: skip
        assert_accurate(draw(steps, batch, features, hidden, norms=norms))


@pytest.mark.parametrize(("steps", "features"), [(4, 300), (60, 300), (60, 20), (1, 20)])
def test_few_symbols_and_many(steps, features):
    assert_accurate(draw(steps, 2, features, 20, norms=SUM, one_hot=True))
    case = draw(steps, 2, features, 20, one_hot=True)
    for wrong in (-1, features):
        case["input"][steps - 1, 1] = wrong
        with pytest.raises(IndexError, match=f"one-hot indices must be in 0..{features - 1}"):
            values(cpu.recurrence, case)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_many_steps_are_processed_in_chunks(batch):
    for norms in (FRAME, SUM):
        assert_accurate(draw(600 // batch, batch, 7, 20, norms=norms, lengths=batch > 1))


@pytest.mark.parametrize("norms", [FRAME, NONE, LAYER, ("layer", "frame", "layer")])
@pytest.mark.parametrize(("steps", "batch"), [(1, 8), (2, 3), (5, 8), (300, 2)])
def test_the_same_bits_for_any_number_of_threads(norms, steps, batch):
    case = draw(steps, batch, 70, 200, norms=norms, lengths=batch > 1, expectation=True)
    torch.set_num_threads(1)
    alone = values(cpu.recurrence, case)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        again = values(cpu.recurrence, case)
        assert all(torch.equal(alone[name], again[name]) for name in alone), threads


def test_a_sequence_that_is_not_finite_leaves_the_others_alone():
    for steps, batch in ((2, 2), (2, 5), (12, 3), (5, 8)):
        case = draw(steps, batch, 6, 20, norms=NONE, given=False)
        expected = values(cpu.recurrence, case)["output"]
        with torch.no_grad():
            case["input"][1, batch - 1] = torch.nan
        output = values(cpu.recurrence, case)["output"]
        assert torch.equal(output[:, :-1], expected[:, :-1])
        assert torch.equal(output[:1], expected[:1])
        assert output[1:, -1].isnan().any()


def test_finished_sequences_keep_their_states():
    case = draw(9, 3, 6, 20)
    case["lengths"] = torch.tensor([4, 9, 1])
    found = values(cpu.recurrence, case)
    for b, length in enumerate((4, 9, 1)):
        alone = values(
            cpu.recurrence,
            {**case, "lengths": None, "input": case["input"][:length, [b]],
             "h_0": case["h_0"][[b]], "c_0": case["c_0"][[b]]},
        )  # fmt: skip
        torch.testing.assert_close(found["output"][:length, [b]], alone["output"])
        torch.testing.assert_close(found["h_n"][[b]], alone["h_n"])
        torch.testing.assert_close(found["c_n"][[b]], alone["c_n"])
        assert not found["output"][length:, b].any()


def test_the_arguments_stay_as_they_are():
    """The kernel's own states must not share memory with those of the caller."""
    case = draw(3, 1, 4, 16)
    before = [t.detach().clone() for t in (case["h_0"], case["c_0"], case["input"])]
    values(cpu.recurrence, case)
    for now, old in zip((case["h_0"], case["c_0"], case["input"]), before, strict=True):
        assert torch.equal(now, old)


@pytest.mark.parametrize("pieces", [[30], [10, 20], [1] * 30, [29, 1]])
def test_a_text_in_pieces_is_the_text(pieces):
    lstm = BNLSTM(6, 40)
    lstm(torch.randn(20, 12, 6))
    lstm.eval()
    x = torch.randn(30, 1, 6)
    with torch.inference_mode():
        expected, last = lstm(x)
        state, outputs, step = None, [], 0
        for piece in pieces:
            output, state = lstm(x[step : step + piece], state, first_step=step)
            outputs.append(output)
            step += piece
    torch.testing.assert_close(torch.cat(outputs), expected)
    torch.testing.assert_close(state, last)


def test_auto_evaluates_few_sequences_of_a_plain_layer_by_the_faster_kernel():
    none = dict.fromkeys(("input_norm", "recurrent_norm", "cell_norm"), "none")
    lstm = BNLSTM(4, 5, **none)
    fast = "cpu" if torch.ops.bnrnn_cpu.lanes(False) >= 16 else "torch.lstm"
    with torch.no_grad():
        assert [lstm.active_kernel(batch=n) for n in (1, 4, 5)] == [fast, fast, "torch.lstm"]
    assert lstm.active_kernel(batch=1) == "torch.lstm"
