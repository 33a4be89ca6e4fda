"""Figure 1 of Laurent et al., 2015: stacked layers with BN of the sum of both terms."""

import json
import math

import numpy as np
import pytest
import torch

from bnrnn.report import report
from bnrnn.report.document import Figure, Heading, Table
from bnrnn.runs.find import find
from bnrnn.tasks.characters import CharacterStack
from tests.equations import bn_lstm
from tests.run_folders import change, make_run


@pytest.mark.numeric
def test_stacked_layers_over_a_lookup_table(composed):
    config = composed("task=ptb_characters", "model.hidden_size=8").model
    model = CharacterStack(config, 50, "auto").double()
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == {
        "embedding.weight": (50, 8), "head.weight": (50, 8), "head.bias": (50,),
        **{
            f"lstm.{name}_l{layer}": shape
            for layer in range(3)
            for name, shape in (
                ("weight_ih", (32, 8)), ("weight_hh", (32, 8)), ("bias", (32,)), ("gamma_hh", (32,))
            )
        },
    }  # fmt: skip
    assert not model.lstm.bias_l1.any()
    assert model.lstm.weight_hh_l2.abs().max() <= math.sqrt(6 / 16)

    characters = torch.randint(50, (5, 4))
    logits, _ = model(characters)
    x = model.embedding(characters).detach().numpy()
    for layer in range(3):
        weights = {
            name: model.lstm.get_parameter(f"{name}_l{layer}").detach().numpy()
            for name in ("weight_ih", "weight_hh", "bias", "gamma_hh")
        }
        zeros, norms = np.zeros((4, 8)), {"ih": "none", "hh": "sum", "c": "none"}
        x, _, _, seen = bn_lstm(x, zeros, zeros, weights, norms)
        for k, name in enumerate(("mean", "var")):
            found = getattr(model.lstm.statistics[f"hh_l{layer}"], name)
            np.testing.assert_allclose(found.numpy(), np.stack(seen["hh"][k]), rtol=1e-9)
    expected = x @ model.head.weight.detach().numpy().T
    np.testing.assert_allclose(logits.detach().numpy(), expected, rtol=1e-9, atol=1e-11)


def make(folder, model, bits, finished=True, **kwargs):
    """Make a run of two steps per epoch; bits: training bits per character, by epoch."""
    make_run(folder, model, [2.0], task="ptb_characters", finished=finished,
             data_title="Penn Treebank, characters, stacked layers", **kwargs)  # fmt: skip
    change(folder / "run.json", steps_per_epoch=2)
    lines = []
    for epoch, value in enumerate(bits, start=1):
        for k, off in enumerate((0.5, -0.5)):
            lines.append({"step": 2 * epoch - 1 + k, "split": "train", "bpc": value + off})
        lines += [
            {"step": 2 * epoch, "split": "valid", "statistics": kind, "bpc": 9.0}
            for kind in ("population", "batch")
        ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_figure_1(tmp_path):
    make(tmp_path / "a", "characters_bn_sum", [4.0, 3.0, 2.5])
    make(tmp_path / "b", "characters_lstm", [3.5], finished=False)
    make_run(tmp_path / "c", "bnlstm", [2.0])
    make_run(tmp_path / "d", "lstm", [2.0], task="pydocs")
    made = report.document(find(tmp_path), "Report", "All.", lambda run: run.path.name)
    headings = [b.text for b in made if isinstance(b, Heading)]
    assert headings[:7] == [
        "Report",
        "Recurrent Batch Normalization: Cooijmans et al., ICLR 2017",
        "Penn Treebank, characters",
        "Batch Normalized Recurrent Neural Networks: Laurent et al., 2016 (arXiv 2015)",
        "Penn Treebank, characters, stacked layers",
        "Other data",
        "Python's documentation, the embedded corpus",
    ]
    (table,) = [b for b in made if isinstance(b, Table) and "last, at epoch" in b.header]
    assert list(table.header) == [
        "model", "settings", "seed", "epoch 1", "epoch 2", "last, at epoch",
    ]  # fmt: skip
    # 4, 3 and 2.5 bits are 2.773, 2.079 and 1.733 nats.
    name = "LSTM, BN on the sum of both terms"
    assert [list(row) for row in table.rows] == [
        ["LSTM", "-", "0", "2.426", "-", "2.426 at 1"],
        [name, "-", "0", "2.773", "2.079", "1.733 at 3"],
        ["LSTM: the paper", "-", "-", "2.620", "2.387", "1.815 at 20"],
        [f"{name}: the paper", "-", "-", "3.117", "2.742", "1.901 at 20"],
    ]
    (figure,) = [b for b in made if isinstance(b, Figure) and b.name.endswith("figure-1")]
    (axes,) = figure.draw().axes
    theirs = [line.get_xydata().tolist() for line in axes.lines if line.get_alpha() == 0.3]
    assert [(len(curve), curve[0], curve[-1]) for curve in theirs] == [
        (21, [0, 4.04], [20, 1.815]), (21, [0, 4.194], [20, 1.901]),
    ]  # fmt: skip
    ours = [line.get_xydata() for line in axes.lines if line.get_alpha() is None]
    np.testing.assert_allclose(ours[0], [[1, 3.5 * math.log(2)]])
    np.testing.assert_allclose(
        ours[1], [[k, b * math.log(2)] for k, b in ((1, 4), (2, 3), (3, 2.5))]
    )
    assert axes.get_ylim() == (1.5, 4.5)
    assert figure.name == "ptb_characters-laurent-figure-1"


def test_a_run_that_has_not_validated_is_reported(tmp_path):
    make(tmp_path / "a", "characters_lstm", [], finished=False)
    report.write_report(tmp_path, tmp_path / "report")
    assert "stacked layers" in (tmp_path / "report" / "report.md").read_text()
