"""Test reports on hand-made run directories with exact numbers, and the shipped results."""

import json
import math
import re
import shlex
import shutil
from html.parser import HTMLParser

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from bnrnn.errors import CheckpointError
from bnrnn.report import by_paper, compare, paper, report, results
from bnrnn.report import command as command_of
from bnrnn.report.document import (
    Bullets,
    Code,
    Figure,
    Folded,
    Heading,
    Link,
    Paragraph,
    Table,
    to_html,
    to_markdown,
)
from bnrnn.report.figures import end_limits, gamma_sweep, validation_curves
from bnrnn.report.groups import groups, mean_curve, order, sweeps
from bnrnn.report.run_tables import ordered
from bnrnn.runs.directory import RunDirectory
from bnrnn.runs.find import find, find_runs, read_run
from bnrnn.runs.record import ACCURACY, BITS_PER_CHARACTER, Record, Result
from bnrnn.settings.compose import compose_config
from bnrnn.settings.same import flatten, to_dict
from bnrnn.tasks.characters import TITLES
from bnrnn.tasks.pixels import ORDERS
from tests.conftest import ROOT
from tests.run_folders import change, fail, make_run, usual_settings

HOSTILE = 'the loss is nan; see /home/someone/outputs/a/last.pt <script>alert("x")</script> a|b *c*'


def rows(blocks, *first):
    """The remaining cells of the table rows that start with the cells `first`."""
    found = [row for block in blocks if isinstance(block, Table) for row in block.rows]
    n = len(first)
    return [list(row[n:]) for row in found if tuple(row[:n]) == first]


def document(folder):
    return report.document(
        find(folder), "Report", "All.", lambda run: run.path.name, lambda run: f"bnrnn {run.seed}"
    )


def test_the_comparison_table(tmp_path):
    make_run(tmp_path / "a", "bnlstm", [2.0, 1.75, 1.5, 1.25])
    make_run(tmp_path / "b", "lstm", [3.0, 2.5])
    make_run(tmp_path / "c", "bn_input", [2.25], finished=False)
    runs = sorted(find_runs(tmp_path), key=lambda run: run.model)
    assert compare.table(runs).splitlines() == [
        "ptb: validation and test, bits per character; population statistics",
        "",
        "                             step 100         test   seconds   ms a step",
        "------------------------------------------------------------------------",
        "LSTM, BN on the input term      2.250   unfinished         -           -",
        "BN-LSTM                         2.000        1.125        90         150",
        "LSTM                            3.000        2.375        90         300",
    ]


def test_the_comparison_figure(tmp_path):
    make_run(tmp_path / "a", "bnlstm", [2.0, 1.75])
    make_run(tmp_path / "b", "lstm", [3.0, 2.5])
    compare.main([str(tmp_path), str(tmp_path / "c" / "both.png")])
    assert (tmp_path / "c" / "both.png").read_bytes().startswith(b"\x89PNG")
    make_run(tmp_path / "other", "lstm", [3.0, 2.5], task="pydocs")
    with pytest.raises(CheckpointError, match="several data sets"):
        compare.main([str(tmp_path)])


def test_data_and_models_come_in_the_papers_order(tmp_path):
    data = [
        "mnist", "pmnist_official", "pmnist", "ptb", "ptb-stripped", "text8", "text8-part", "cnn4",
        "cnn4-synthetic", "cnn", "cnn-part", "pydocs", "text-emma",
    ]  # fmt: skip
    for k, name in enumerate(data):
        make_run(tmp_path / f"{k * 7 % 13}-l", "lstm", [1.0], data=name)
        make_run(tmp_path / f"{k * 7 % 13}-b", "bnlstm", [1.0], data=name)
        make_run(tmp_path / f"{k * 7 % 13}-a", "bn_input", [1.0], data=name)
    ordered = [(run.data, run.model) for run in sorted(find_runs(tmp_path), key=order)]
    assert ordered == [(name, m) for name in data for m in ("lstm", "bnlstm", "bn_input")]


def test_the_paper_and_the_tasks_have_one_title_for_one_data_set():
    of_tasks = TITLES | {name: title for name, title, _ in ORDERS.values()}
    for data, entry in paper.DATA.items():
        assert of_tasks.get(data, entry.title) == entry.title
    # For stacked layers, the paper has only training curves: no validation and no test result.
    assert {data for data, _ in paper.RESULTS} == paper.DATA.keys() - {"ptb_characters"}
    assert {model for _, model in paper.RESULTS} == {
        model for model in paper.MODELS if not model.startswith(("characters_", "speech_"))
    }


@pytest.mark.parametrize(
    ("data", "model"),
    [  # A third of them by default.
        pytest.param(*key, marks=[] if number % 3 == 0 else pytest.mark.slow)
        for number, key in enumerate(paper.RESULTS)
    ],
)
def test_the_papers_settings_are_those_of_task_and_model(composed, data, model):
    theirs = paper.settings(data, model)
    config = composed(f"task={data}", f"model={model}")
    assert theirs["task.name"] == config.task.name == data
    assert theirs["model.title"] == config.model.title == paper.model_title(model)
    assert theirs["model.gamma_init"] == (1.0 if model.endswith("bn_input") else paper.GAMMA)
    assert paper.settings(f"{data}-part", model) == theirs
    assert paper.settings(f"{data}-synthetic", model) == {}


def test_results_on_a_part_of_the_corpus_do_not_stand_beside_the_papers(tmp_path):
    make_run(tmp_path / "a", "lstm", [1.3], task="text8", steps=195_300, model__hidden_size=500,
             data="text8-part", data_title="Part of text8")  # fmt: skip
    made = document(tmp_path)
    assert Heading(3, "Part of text8") in made
    assert rows(made, "LSTM") == [["500 units", "1.175 test", "1", "195,300"]]


def test_three_seeds_have_a_mean_a_standard_deviation_and_a_verdict(tmp_path):
    for seed, bpc in enumerate([1.30, 1.34, 1.35]):
        make_run(tmp_path / f"{seed}", "bnlstm", [bpc], seed=seed, steps=39_500, test=bpc)
    for seed, bpc in enumerate([1.36, 1.37, 1.365]):
        make_run(tmp_path / f"l{seed}", "lstm", [bpc], seed=seed, steps=39_500, test=bpc)
    lstm, bnlstm = groups(find_runs(tmp_path))
    # Deviations from the mean 1.33 are -0.03, 0.01, 0.02; the variance is (9 + 1 + 4) / 2 * 1e-4.
    assert bnlstm.mean == pytest.approx(1.33)
    assert bnlstm.deviation == pytest.approx(7e-4**0.5)
    assert bnlstm.difference == pytest.approx(0.01)
    assert rows(document(tmp_path), "BN-LSTM") == [
        ["1.330 ± 0.026 test", "1.32, table 2", "+0.010", "reached: within the seeds' spread",
         "3", "39,500 of 39,500"],
    ]  # fmt: skip
    assert rows(document(tmp_path), "LSTM") == [
        ["1.365 ± 0.005 test", "1.38, table 2", "−0.015",
         "reached: outside the seeds' spread, better", "3", "39,500 of 39,500"],
    ]  # fmt: skip
    assert lstm.split == "test"


def test_two_seeds_have_a_range(tmp_path):
    for seed, accuracy in enumerate([0.95, 0.96]):
        common = {"task": "pmnist_official", "seed": seed, "steps": 100_000}
        make_run(tmp_path / f"b{seed}", "bnlstm", [accuracy], test=accuracy, **common)
        make_run(tmp_path / f"l{seed}", "lstm", [0.5], test=accuracy - 0.1, **common)
    assert rows(document(tmp_path), "BN-LSTM") == [
        ["95.50 (95.00 to 96.00) test", "95.4, table 1", "+0.10",
         "reached: within the seeds' spread", "2", "100,000 of 100,000"],
    ]  # fmt: skip
    ((*_, difference, verdict, _, _),) = rows(document(tmp_path), "LSTM")
    assert (difference, verdict) == ("−4.70", "not reached: outside the seeds' spread, worse")


def test_the_verdict_on_one_seed_a_shorter_run_and_other_settings(tmp_path):
    make_run(tmp_path / "a", "bnlstm", [1.3], steps=39_500)
    make_run(tmp_path / "b", "lstm", [1.3], steps=3_160, scale="hour")
    make_run(tmp_path / "c", "lstm", [1.3], task="text8", steps=195_300, model__hidden_size=500)
    made = document(tmp_path)
    assert rows(made, "BN-LSTM")[0][-3] == "reached: one seed"
    text8 = ["500 units", "1.175 test", "1.43, table 3", "−0.255", "not the paper's settings", "1"]
    assert rows(made, "LSTM") == [
        ["scale=hour", "1.175 test", "1.38, table 2", "−0.205",
         "reached after 8 % of the paper's steps", "1", "3,160 of 39,500"],
        [*text8, "195,300 of 195,300"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "test", "verdict"),
    [
        ("lstm", 1.3849, "reached"),  # 1.38, in the paper's decimals
        ("lstm", 1.3851, "not reached"),
        ("bnlstm", 1.3264, "not reached"),  # 1.33; the paper: 1.32
        ("bnlstm", 1.2, "reached"),
    ],
)
def test_one_seed_reaches_a_number_in_the_papers_decimals(tmp_path, model, test, verdict):
    make_run(tmp_path / "a", model, [test], steps=15_800, test=test)
    (group,) = groups(find_runs(tmp_path))
    assert group.verdict() == f"{verdict} after 40 % of the paper's steps"


def test_the_best_validation_counts_where_the_paper_has_no_test(tmp_path):
    make_run(tmp_path / "a", "attentive_lstm", [0.5], task="cnn4")
    ((value, reported, *_),) = rows(document(tmp_path), "LSTM")
    assert (value, reported) == ("75.00 valid", "50.3, section 5.4")  # with batch statistics


def test_groups_are_told_apart_by_what_differs(tmp_path):
    make_run(tmp_path / "a", "lstm", [2.0], task="pydocs", optimizer__lr=0.02, kernel="cpu")
    make_run(tmp_path / "b", "lstm", [2.0], task="pydocs", optimizer__lr=0.01, scale="full")
    make_run(tmp_path / "c", "lstm", [2.0], task="pydocs", optimizer__lr=0.01, seed=1)
    found = groups(find_runs(tmp_path))
    assert [(g.label, len(g.runs)) for g in found] == [
        ("learning rate 0.01", 2), ("learning rate 0.02", 1),
    ]  # fmt: skip


def test_a_less_known_setting_is_shown_where_it_is_not_as_usual(tmp_path):
    make_run(tmp_path / "a", "lstm", [2.0], task="pydocs")
    make_run(tmp_path / "b", "lstm", [2.0], task="pydocs", optimizer__clip="square_root")
    found = groups(find_runs(tmp_path))
    assert [(g.label, len(g.runs)) for g in found] == [("", 1), ("clip square_root", 1)]


def test_the_settings_of_the_released_code_are_named_as_one(tmp_path):
    for name, decay, changes in (
        ("a", 0.9, {}),
        ("b", 0.9, {"model__cell_bias": True, "selection": "batch"}),
        ("c", 0.5, {"model__cell_bias": True}),
    ):
        make_run(tmp_path / name, "lstm", [0.5], task="pmnist_official", optimizer__decay=decay,
                 **changes)  # fmt: skip
    labels = {group.first.path.name: group.label for group in groups(find_runs(tmp_path))}
    assert labels == {"a": "", "b": "experiment=official_code", "c": "cell bias, decay 0.5"}


def test_another_model_than_the_papers_gets_no_verdict(tmp_path):
    for seed, bpc in enumerate([1.31, 1.32, 1.33]):
        make_run(tmp_path / f"{seed}", "bnlstm", [bpc], seed=seed, steps=39_500, test=bpc,
                 model__num_layers=3, optimizer__max_grad_norm=50.0)  # fmt: skip
    ((settings, *_, verdict, _, _),) = rows(document(tmp_path), "BN-LSTM")
    assert settings == "3 layers, max grad norm 50"
    assert verdict == "not the paper's settings"


def test_steps_are_compared_with_those_of_the_papers_own_run(tmp_path):
    for seed in range(3):
        make_run(tmp_path / f"{seed}", "attentive_bne_star", [0.25], task="cnn4", seed=seed,
                 steps=550_000, task__batch_size=40, optimizer__lr=8e-4)  # fmt: skip
    ((value, _, _, verdict, _, steps),) = rows(document(tmp_path), "BN-e*")
    assert (value, steps) == ("50.00 ± 0.00 valid", "550,000 of 550,000")
    assert verdict == "not reached: outside the seeds' spread, worse"


def test_of_one_seed_a_run_counts_once_and_lengths_apart(tmp_path):
    make_run(tmp_path / "a", "lstm", [2.0, 1.5], task="pydocs")
    make_run(tmp_path / "b", "lstm", [2.0, 1.75], task="pydocs")
    make_run(tmp_path / "c", "lstm", [2.0], task="pydocs", seed=1)
    assert [(g.steps, g.values) for g in groups(find_runs(tmp_path))] == [
        ((100, 100), [1.875]), ((200, 200), [1.625]),
    ]  # fmt: skip


def test_a_sweep_over_gamma(tmp_path):
    for gamma in (1.0, 0.1, 0.3):
        for seed in (0, 1):
            make_run(tmp_path / f"{gamma}-{seed}", "bnlstm", [2.0 + gamma, 1.5], seed=seed,
                     task="pydocs", model__gamma_init=gamma)  # fmt: skip
    make_run(tmp_path / "lstm", "lstm", [2.0], task="pydocs")
    runs = find_runs(tmp_path)
    (sweep,) = sweeps(runs)
    assert {gamma: [run.seed for run in of_gamma] for gamma, of_gamma in sweep.items()} == {
        0.1: [0, 1], 0.3: [0, 1], 1.0: [0, 1],
    }  # fmt: skip
    assert list(sweep) == [0.1, 0.3, 1.0]
    assert [g.label for g in groups(runs)] == ["", "γ 0.1", "γ 0.3", "γ 1"]
    validation = gamma_sweep(sweep).axes[1]
    (mean,) = [line for line in validation.lines if line.get_label() == "γ = 0.3"]
    assert mean.get_xydata().tolist() == [[100, 2.55], [200, 1.75]]  # batch statistics
    report.write_report(tmp_path, tmp_path / "report")
    names = {file.name for file in (tmp_path / "report" / "figures").iterdir()}
    assert names == {
        f"pydocs{name}.{kind}" for name in ("", "-bnlstm-gamma") for kind in ("png", "svg")
    }


def test_runs_with_other_settings_than_the_papers_have_a_figure_of_their_own(tmp_path):
    make_run(tmp_path / "a", "bnlstm", [2.0, 1.5, 1.0])
    make_run(tmp_path / "b", "lstm", [2.0, 1.5, 1.0])
    make_run(tmp_path / "c", "lstm", [2.0, 1.25], model__dropout=0.5)
    figures = [block for block in document(tmp_path) if isinstance(block, Figure)]
    assert [figure.name for figure in figures] == ["ptb", "ptb-settings"]
    (axes,) = figures[1].draw().axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["LSTM"] == [[100, 2.0], [200, 1.5]]
    assert lines["LSTM, dropout 0.5"] == [[100, 2.0], [200, 1.25]]
    assert set(lines) == {"LSTM", "LSTM, dropout 0.5"}


def test_a_mean_is_over_runs_of_the_same_length(tmp_path):
    make_run(tmp_path / "a", "lstm", [2.0, 1.5, 1.0])
    make_run(tmp_path / "b", "lstm", [3.0, 1.75, 1.25], seed=1)
    make_run(tmp_path / "c", "lstm", [4.0], seed=2)
    figure = validation_curves(find_runs(tmp_path))
    (legend,) = [line for line in figure.axes[0].lines if "mean of 2 seeds" in line.get_label()]
    assert legend.get_xydata().tolist() == [[100, 2.5], [200, 1.625], [300, 1.125]]


def test_with_early_stopping_the_mean_is_over_all_seeds(tmp_path):
    for seed, values in enumerate(([2.0, 1.5, 1.0], [3.0, 1.75], [4.0, 2.0, 1.5, 1.25])):
        make_run(tmp_path / str(seed), "lstm", values, seed=seed, patience=2, steps=1000)
    figure = validation_curves(find_runs(tmp_path))
    (legend,) = [line for line in figure.axes[0].lines if "mean of 3 seeds" in line.get_label()]
    assert legend.get_xydata().tolist() == [[100, 3.0], [200, 1.75]]


def test_many_settings_are_drawn_at_the_best_of_each_model(tmp_path):
    for model in ("lstm", "bnlstm", "zoneout"):
        for rate in (1, 2, 3):
            make_run(tmp_path / f"{model}{rate}", model, [3.0, 1.0 + rate], task="pydocs",
                     optimizer__lr=rate / 1000)  # fmt: skip
    (figure,) = [b for b in document(tmp_path) if isinstance(b, Figure) and b.name == "pydocs"]
    assert figure.caption.endswith(
        "Each model is shown at its best settings, as in the leaderboard."
    )
    (axes,) = figure.draw().axes
    assert [line.get_xydata()[-1].tolist() for line in axes.lines] == [
        [200, 2.0], [200, 2.25], [200, 2.0], [200, 2.25], [200, 2.0],
    ]  # fmt: skip
    # With two models, there is no leaderboard: draw all, with the legend below the axes.
    for run in tmp_path.glob("zoneout*"):
        shutil.rmtree(run)
    for rate in (4, 5):
        for model in ("lstm", "bnlstm"):
            make_run(tmp_path / f"{model}{rate}", model, [3.0, 1.0 + rate], task="pydocs",
                     optimizer__lr=rate / 1000)  # fmt: skip
    (figure,) = [b for b in document(tmp_path) if isinstance(b, Figure) and b.name == "pydocs"]
    drawn = figure.draw()
    (legend,) = drawn.legends
    assert len(legend.get_texts()) == 10
    drawn.canvas.draw()
    box, axes = legend.get_window_extent(), drawn.axes[0].get_tightbbox()
    assert 0 <= box.x0 < box.x1 <= drawn.bbox.x1
    assert 0 <= box.y0 < box.y1 <= axes.y0


def test_the_y_axis_shows_the_end_of_every_curve():
    start, slow = [9.0, 5.0, 2.0, 1.5, 1.25, 1.1, 1.0, 1.0], [8.0, 6.0, 4.0]
    assert end_limits([start, slow], BITS_PER_CHARACTER, 1 / 2) == pytest.approx((0.82, 4.18))
    assert end_limits([start], BITS_PER_CHARACTER, 1 / 4) == pytest.approx((0.94, 2.06))
    assert end_limits([[-v for v in start]], ACCURACY, 1 / 4) == pytest.approx((-2.06, -0.94))
    assert end_limits([start, [math.nan, 1e300]], BITS_PER_CHARACTER, 1 / 4) is not None
    assert end_limits([start[:7]], BITS_PER_CHARACTER, 1 / 4) is None  # few values
    assert end_limits([start[::-1]], BITS_PER_CHARACTER, 1 / 4) is None  # the worst is an end
    assert end_limits([[1.0] * 9], BITS_PER_CHARACTER, 1 / 4) is None


def test_with_many_curves_the_paper_has_one_entry(tmp_path):
    for k, dropout in enumerate((0.0, 0.25, 0.5, 0.75)):
        values = [2.0] * 9 + [1.5 + k]
        make_run(tmp_path / f"l{k}", "lstm", values, model__dropout=dropout)
        make_run(tmp_path / f"b{k}", "bnlstm", values, model__dropout=dropout)
    axes = validation_curves(find_runs(tmp_path)).axes[0]
    labels = axes.get_legend_handles_labels()[1]
    assert labels.count("the paper") == 1
    assert len([line for line in axes.lines if line.get_alpha() == 0.3]) == 2
    assert not any("LSTM, the paper" in label for label in labels)


def test_a_run_that_ended_early_and_was_tested(tmp_path):
    make_run(tmp_path / "a", "lstm", [2.0, 1.5])
    change(tmp_path / "a" / "run.json", total_steps=1000)
    make_run(tmp_path / "b", "lstm", [2.0, 1.5], seed=1)
    made = document(tmp_path)
    assert made[2] == Paragraph("2 runs: 1 finished; 1 ended early, tested.")
    assert Heading(2, "Not finished") not in made
    # If it can be resumed, the report states how.
    (tmp_path / "a" / "last.pt").write_bytes(b"")
    ((_, _, resume),) = rows(document(tmp_path), "a", "ended early, tested")
    assert resume == ("resume with ", Code("bnrnn 0"))
    # The results have no such commands, so the table of unfinished runs has one column fewer.
    make_run(tmp_path / "c", "lstm", [2.0], seed=2, finished=False)
    (tmp_path / "a" / "last.pt").unlink()
    made = report.document(find(tmp_path), "Report", "All.", lambda run: run.path.name)
    (table,) = [b for b in made if isinstance(b, Table) and "last validation" in b.header]
    assert list(table.header) == ["run", "state", "step", "last validation"]


def test_the_mean_of_curves_is_where_all_seeds_have_a_value(tmp_path):
    make_run(tmp_path / "a", "lstm", [2.0, 1.5, 1.0])
    make_run(tmp_path / "b", "lstm", [3.0, 1.75], seed=1)
    runs = find_runs(tmp_path)
    assert mean_curve(runs, lambda run: run.curve()) == ([100, 200], [2.5, 1.625])


@pytest.fixture
def all_states(tmp_path):
    folder = tmp_path / "outputs"
    make_run(folder / "1-finished", "bnlstm", [2.0, 1.5])
    make_run(folder / "2-failed", "lstm", [3.0, float("nan")], finished=False)
    fail(folder / "2-failed", HOSTILE)
    make_run(folder / "3-stopped", "lstm", [2.5], finished=False, seed=7)
    (folder / "3-stopped" / "last.pt").write_bytes(b"")
    make_run(folder / "4-running", "lstm", [], finished=False, seed=2)
    make_run(folder / "5-without-checkpoint", "lstm", [], finished=False, seed=3)
    make_run(folder / "6-unreadable", "lstm", [2.0])
    (folder / "6-unreadable" / "config.yaml").write_text("model: [")
    (folder / "7-incomplete").mkdir()
    (folder / "7-incomplete" / "metrics.jsonl").write_text("")
    make_run(folder / "8-strange", "lstm", [2.5])
    (folder / "8-strange" / "result.json").write_text("{}")
    evaluated = folder / "1-finished" / "evaluate" / "result.json"
    evaluated.parent.mkdir()
    evaluated.write_text('{"test": {"bpc": 1.0}}')
    (folder / "tanh").mkdir()
    (folder / "tanh" / "result.json").write_text(
        json.dumps({
            "analysis": "tanh_derivative", "deviations": [0.0, 1.0], "mean": [1.0, 0.6],
            "lower_quartile": [1.0, 0.4], "upper_quartile": [1.0, 0.9],
        })
    )  # fmt: skip
    (folder / "newer").mkdir()
    (folder / "newer" / "result.json").write_text('{"analysis": "of_tomorrow"}')
    with RunDirectory(folder / "4-running"):
        yield folder


def test_every_run_is_listed_regardless_of_its_state(all_states):
    made = document(all_states)
    assert made[2] == Paragraph(
        "9 runs: 1 finished, 1 running, 1 stopped, 1 unfinished, 1 failed, 4 unreadable."
    )
    assert rows(made, "2-failed", "failed")[0] == ["200", "nan at 200", HOSTILE]
    assert rows(made, "3-stopped", "stopped")[0] == [
        "100", "2.500 at 100", ("resume with ", Code("bnrnn 7")),
    ]  # fmt: skip
    assert rows(made, "4-running", "running")[0] == ["0", "none", "a process is training there"]
    assert rows(made, "5-without-checkpoint", "unfinished")[0] == [
        "0", "none", "no checkpoint to resume from",
    ]  # fmt: skip
    reasons = {
        "6-unreadable": "config.yaml is damaged: ",
        "7-incomplete": "has no config.yaml",
        "8-strange": "result.json is damaged: ",
        "newer": "result.json: an analysis that this version does not know, 'of_tomorrow'",
    }
    for name, reason in reasons.items():
        ((_, _, found),) = rows(made, Code(name), "unreadable")
        assert reason in found, name
    # NaN is ignored when the best validation is chosen.
    assert rows(made, "2-failed", "failed", "3.000")[0][:3] == ["-", "100", "200"]


def test_a_run_that_goes_on_is_as_any_other(all_states):
    (all_states / "2-failed" / "failed.json").unlink()
    assert rows(document(all_states), "2-failed", "unfinished")


def test_what_was_not_run_is_listed(all_states):
    (folded,) = [block for block in document(all_states) if isinstance(block, Folded)]
    assert folded == document(all_states)[-1]
    (not_run,) = [block.items for block in folded.blocks if isinstance(block, Bullets)]
    assert len(not_run) == 14 + 6  # of 15 results in the first paper and 6 in the second
    assert folded.heading == Heading(2, "Not run: 20 of the papers' results")
    assert (
        "Penn Treebank, characters, LSTM: Cooijmans et al. have 1.38 bits per character (test, "
        "table 2, 39,500 steps); begun, not finished"
    ) in not_run
    assert not any("Treebank, characters, BN-LSTM" in line for line in not_run)
    assert "99.0 % accuracy (test, table 1, 100,000 steps)" in not_run[1]
    assert not_run[-1] == (
        "Penn Treebank, words, Large LSTM, BN on the input term: Laurent et al. have 97.4 "
        "perplexity (valid, table 2, 72,985 steps)"
    )


def test_the_same_step_of_the_papers_curve(tmp_path):
    assert by_paper.interpolate([[50, 3.0], [150, 2.0], [200, 1.8]], 100) == 2.5
    assert by_paper.interpolate([[50, 3.0], [150, 2.0]], 151) is None
    assert by_paper.thinned(list(range(18)), 12) == [1, 3, 5, 7, 9, 11, 13, 15, 17]
    assert by_paper.thinned([1, 2], 12) == [1, 2]


class Page(HTMLParser):
    """A parser that collects tags, references and text, and asserts that tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.references, self.text = [], [], [], ""
        self.scripts = []  # their types
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append(dict(attrs).get("type"))
        self.references += [value for name, value in attrs if name in ("src", "href", "style")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_by_itself_and_escapes_what_it_shows(all_states, tmp_path):
    report.write_report(all_states, tmp_path / "report")
    text = (tmp_path / "report" / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.scripts == ["application/json", None]  # the numbers of a chart, page.js
    assert "link" not in page.tags
    assert HOSTILE in page.text
    assert page.tags.count("img") == 2  # Penn Treebank, the derivative of tanh
    assert all(r.startswith("data:image/svg+xml;base64,") for r in page.references)
    assert not re.search(r"url\(|@import|https?://", text)
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert r"\<script\>alert(" in markdown
    assert r"a\|b \*c\*" in markdown


def test_the_same_runs_make_the_same_bytes(all_states, tmp_path):
    for name in ("a", "b"):
        figures = tmp_path / name / "figures"
        figures.mkdir(parents=True)
        (figures / "of-a-run-that-is-gone.svg").touch()
        report.write_report(all_states, tmp_path / name)
    files = [file for file in sorted((tmp_path / "a").rglob("*")) if file.is_file()]
    assert len(files) == 6
    for file in files:
        assert file.read_bytes() == (tmp_path / "b" / file.relative_to(tmp_path / "a")).read_bytes()


def test_a_report_on_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="train one first"):
        report.write_report(tmp_path / "outputs", tmp_path)


def test_blocks_as_markdown_and_as_html():
    blocks = [
        Heading(2, "A & b"),
        Paragraph(("see ", Link("a_b", "runs/a_b"), " and ", Code("x `y`"), "_")),
        Bullets(["BN-e**", Code("a|b")]),
        Table(["n", "v"], "lr", [[Code("a|b"), "1 < 2"]]),
    ]
    assert to_markdown(blocks).split("\n\n") == [
        "## A &amp; b",
        "see [a_b](runs/a_b) and `` x `y` ``\\_",
        "- BN-e\\*\\*\n- `a|b`",
        "| n | v |\n|---|---:|\n| `a\\|b` | 1 \\< 2 |\n",
    ]
    page = to_html("<t>", blocks, {})
    for part in (
        "<title>&lt;t&gt;</title>", "<h2>A &amp; b</h2>", '<a href="runs/a_b">a_b</a>',
        "<code>x `y`</code>", "<li>BN-e**</li>", '<td class="r">1 &lt; 2</td>',
    ):  # fmt: skip
        assert part in page


def test_results_from_runs(tmp_path):
    make_run(tmp_path / "outputs" / "a", "bnlstm", [2.0, 1.5])
    make_run(tmp_path / "outputs" / "b", "lstm", [3.0, 2.5], finished=False)
    fail(tmp_path / "outputs" / "b", HOSTILE)
    make_run(tmp_path / "outputs" / "trial", "lstm", [3.0], seed=1, max_valid_batches=2)
    make_run(tmp_path / "outputs" / "demo" / "a", "lstm", [3.0], seed=2)
    target = tmp_path / "results"
    results.main([tmp_path / "outputs", target])
    text = (target / "README.md").read_text()
    assert sorted(path.name for path in (target / "runs").iterdir()) == [
        "ptb-bnlstm-seed0", "ptb-lstm-seed0",
    ]  # fmt: skip
    (row,) = [line for line in text.splitlines() if line.startswith("| [ptb-bnlstm-seed0]")]
    assert [cell.strip() for cell in row.split("|")][2:-1] == [
        "1.375 bits per character", "1.500", "1.750", "200", "200", "90 s", "300", "reference",
        "abc", "a machine, 2",
    ]  # fmt: skip
    assert (
        "| [ptb-lstm-seed0](runs/ptb-lstm-seed0) | failed | 200 | 2.500 at 200 | the loss is"
        in text
    )
    command = "`bnrnn task=ptb model=bnlstm`"
    assert f"\n- [ptb-bnlstm-seed0](runs/ptb-bnlstm-seed0): {command}\n" in text
    copied = [file for file in target.rglob("*") if file.suffix in (".yaml", ".json", ".md")]
    assert len(copied) == 7
    assert not re.search("/somewhere|/home", "".join(file.read_text() for file in copied))
    assert (target / "figures" / "ptb.png").stat().st_size > 10_000
    assert not list(target.rglob("*.svg"))
    results.main([tmp_path / "nothing new", target])
    assert (target / "README.md").read_text() == text
    assert results.write(target, figures=False) == text


def test_a_copy_holds_what_the_run_holds(tmp_path):
    make_run(tmp_path / "outputs" / "a", "bnlstm", [2.0, 1.5])
    results.collect(tmp_path / "outputs", tmp_path / "results")
    ours, copied = read_run(tmp_path / "outputs" / "a"), read_run(
        tmp_path / "results" / "runs" / "ptb-bnlstm-seed0"
    )  # fmt: skip
    assert copied.records == ours.records
    assert copied.subject.metric == ours.subject.metric
    assert copied.settings == ours.settings | {"data_dir": "data"}
    assert copied.final("test") == ours.final("test")


def make_result(command, steps=1, max_steps=1):
    return Result(
        {}, {}, 1, None, "t", "m", 0, "", True, steps, max_steps, 1.0, 1.0, 1.0, "", "", None, "",
        "", "", "", 1, command,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("typed", "steps", "shown"),
    [
        ("task=ptb data_dir=/d outputs=/o threads=1 resume=auto", {}, "task=ptb"),
        ("task=text task.path=/books/emma.txt", {}, "task=text task.path=emma.txt"),
        ("task=ptb mode=lengths run=/o/ptb/1", {}, "task=ptb mode=lengths run=auto"),
        ("task=ptb max_epochs=4", {"steps": 3160, "max_steps": 3160}, "task=ptb max_epochs=4"),
        ("task=ptb max_epochs=4", {"steps": 3547, "max_steps": 3160}, "task=ptb max_steps=3547"),
        ("task=ptb patience=2", {"steps": 900, "max_steps": 39500}, "task=ptb patience=2"),
    ],
)
def test_the_command_that_makes_a_result_elsewhere(typed, steps, shown):
    assert results.command(make_result(f"bnrnn {typed}", **steps)) == f"bnrnn {shown}"


def test_a_finished_run_stays_and_takes_its_folder_again(tmp_path):
    outputs, target = tmp_path / "outputs", tmp_path / "results"
    make_run(outputs / "a", "lstm", [3.0, 2.5])
    results.collect(outputs, target)
    (target / "runs" / "ptb-lstm-seed0").rename(target / "runs" / "another-name")
    make_run(outputs / "b", "lstm", [3.0, 2.5, 2.0, 1.5], finished=False)
    results.collect(outputs, target)
    (run,) = find_runs(target)
    assert (run.path.name, run.step, run.state) == ("another-name", 200, "finished")


def test_names_tell_settings_apart(tmp_path):
    outputs, target = tmp_path / "outputs", tmp_path / "results"
    for k, changes in enumerate([
        {}, {"model__gamma_init": 0.3}, {"model__gamma_init": 1.0}, {"scale": "hour"}, {"seed": 1},
        {"task__variant": "stripped", "model__dropout": 0.5},
        {"task__variant": "stripped", "model__dropout": 0.25},
    ]):  # fmt: skip
        make_run(outputs / str(k), "bnlstm", [3.0], **changes)
    make_run(outputs / "map", "bnlstm", [0.5], task="pmnist_official")
    make_run(outputs / "true", "bnlstm", [0.5], task="pmnist")
    # For data that are not in the paper, later runs are named by their differences from the first.
    make_run(outputs / "own1", "lstm", [3.0], task="pydocs")
    make_run(outputs / "own2", "lstm", [3.0], task="pydocs", model__dropout=0.5)
    make_run(outputs / "own3", "lstm", [3.0], task="pydocs", model__dropout=0.25)
    make_run(outputs / "own4", "lstm", [3.0], task="pydocs", model__dropout=0.25, seed=1)
    results.collect(outputs, target)
    assert sorted(path.name for path in (target / "runs").iterdir()) == [
        "pmnist-bnlstm-seed0", "pmnist_official-bnlstm-seed0",
        "ptb-bnlstm-dropout_0.25-variant_stripped-seed0",
        "ptb-bnlstm-dropout_0.5-variant_stripped-seed0",
        "ptb-bnlstm-gamma0.3-seed0", "ptb-bnlstm-gamma1-seed0", "ptb-bnlstm-hour-seed0",
        "ptb-bnlstm-seed0", "ptb-bnlstm-seed1",
        "pydocs-lstm-dropout_0.25-seed0", "pydocs-lstm-dropout_0.25-seed1",
        "pydocs-lstm-dropout_0.5-seed0", "pydocs-lstm-seed0",
    ]  # fmt: skip
    before = {file: file.read_bytes() for file in target.rglob("*.*") if file.is_file()}
    results.collect(outputs, target)
    assert {file: file.read_bytes() for file in target.rglob("*.*") if file.is_file()} == before


def test_large_records_are_thinned():
    records = [Record(step, "train", {}) for step in range(1, 1001)]
    records += [Record(1000, "valid", {}, "population"), Record(1000, "test", {}, "population")]
    thin = results.thin(records)
    assert [r.step for r in thin if r.split == "train"] == list(range(1, 1001, 3))
    assert [r.split for r in thin[-2:]] == ["valid", "test"]
    assert results.thin(thin) == thin


def test_analyses_are_collected_too(all_states, tmp_path):
    results.main([all_states, tmp_path / "results"])
    file = tmp_path / "results" / "analyses" / "tanh_derivative" / "result.json"
    assert json.loads(file.read_text())["deviations"] == [0.0, 1.0]
    assert (tmp_path / "results" / "figures" / "tanh_derivative.png").exists()
    text = (tmp_path / "results" / "README.md").read_text()
    assert "![The derivative of tanh](figures/tanh_derivative.png)" in text


def test_the_numbers_of_the_front_page_come_from_the_results(tmp_path):
    outputs, target = tmp_path / "outputs", tmp_path / "results"
    make_run(outputs / "a", "bnlstm", [2.0, 1.5])
    make_run(outputs / "b", "lstm", [3.0, 2.5])
    make_run(outputs / "other", "lstm", [3.0, 2.5, 1.0], model__dropout=0.5)
    make_run(outputs / "part", "lstm", [3.0], data="text8-part", data_title="a part")
    shutil.copytree(ROOT / "results" / "bench", target / "bench")
    (tmp_path / "README.md").write_text(
        "before\n<!-- results: experiments -->\n"
        "| command | paper | ours | time |\n|---|---|---|---|\n"
        "| `bnrnn task=ptb model=bnlstm` | 1.32 | old | 1 s |\n"
        "| `bnrnn task=text8 model=bnlstm` | 1.36 | | 1 s |\n"
        "| `bnrnn task=cnn model=attentive_bnlstm` | | | |\n"
        "| `bnrnn task=text task.path=FILE` | | as it is | |\n"
        "<!-- end of results -->\nafter\n"
    )
    results.main([outputs, target])
    assert (tmp_path / "README.md").read_text().splitlines()[4:9] == [
        "| `bnrnn task=ptb model=bnlstm` | 1.32 | 1.375 bits per character (LSTM 2.375) after 2 "
        "epochs | 1 s |",
        "| `bnrnn task=text8 model=bnlstm` | 1.36 | [only a part](results/README.md) | 1 s |",
        "| `bnrnn task=cnn model=attentive_bnlstm` | | not run yet | |",
        "| `bnrnn task=text task.path=FILE` | | as it is | |",
        "<!-- end of results -->",
    ]


def test_the_shipped_table_is_what_the_script_makes_of_the_shipped_files():
    folder = ROOT / "results"
    assert (folder / "README.md").read_text() == results.write(folder, figures=False)


def test_every_shipped_run_has_todays_settings():
    for run in find(ROOT / "results").runs:
        settings, title, free = usual_settings(run.subject.task, run.model)
        assert list(flatten(run.settings)) == list(flatten(settings)), run.path.name
        assert (run.subject.model_title, run.subject.free_settings) == (title, free)
    assert not find(ROOT / "results").unreadable


def test_the_shipped_commands_give_the_settings_of_their_runs():
    runs = {run.path.name: run for run in find_runs(ROOT / "results")}
    text = (ROOT / "results" / "README.md").read_text()
    shown = re.findall(r"^- \[(.*)\]\(runs/.*\): `(bnrnn .*)`$", text, re.MULTILINE)
    assert [name for name, _ in shown] == [r.path.name for r in ordered([*runs.values()])
                                           if r.result is not None]  # fmt: skip
    for name, line in shown:
        run = runs[name]
        assert len(line) < 250, name
        config = compose_config(*shlex.split(line)[1:])
        ignored = {*run.subject.free_settings} - {"patience", "scale", "task.path"}
        ours, theirs = (
            {key: value for key, value in flatten(settings).items() if key not in ignored}
            for settings in (to_dict(config), run.settings)
        )
        assert ours == theirs, name
        steps = run.result.steps if config.patience is None else run.result.max_steps
        assert config.total_steps(run.subject.steps_per_epoch) == steps, name


def test_the_command_has_only_what_is_not_usual(tmp_path):
    def command(name="ptb", model="lstm", **options):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        make_run(folder, model, [2.0, 1.5], task=name, **options)
        return command_of.command(read_run(folder))

    assert command() == "bnrnn task=ptb model=lstm"
    assert command(seed=3, threads=1, device="cpu", checkpoint_minutes=1.0) == (
        "bnrnn task=ptb model=lstm seed=3"
    )
    assert command(model__cell_bias=True, selection="batch", optimizer__lr=8e-5) == (
        "bnrnn task=ptb model=lstm experiment=official_code optimizer.lr=8e-05"
    )
    path = "/books/it's $HOME.txt"
    *words, word = shlex.split(command(task__path=path))
    assert words == ["bnrnn", "task=ptb", "model=lstm"]
    (override,) = OverridesParser.create().parse_overrides([word])
    assert (override.key_or_group, override.value()) == ("task.path", path)
    assert command(patience=5, max_epochs=3) == "bnrnn task=ptb model=lstm max_epochs=3 patience=5"
    change(tmp_path / "0" / "result.json", steps=150, max_steps=150)
    assert command_of.command(read_run(tmp_path / "0")) == "bnrnn task=ptb model=lstm max_steps=150"
    # Settings that this version does not know: the recorded command.
    change(tmp_path / "0" / "run.json", task="mine")
    assert command_of.command(read_run(tmp_path / "0")).startswith(
        "bnrnn task=ptb model=lstm data_dir"
    )


@pytest.mark.parametrize("value", ["a b", "it's", "1", "null", "${x}", "[a]", "é", "", 3, 0.1, None,
                                   True, 1e-08, [1, 2]])  # fmt: skip
def test_a_value_in_a_command_is_read_back(value):
    key = "gradient_flow.gammas" if isinstance(value, list) else "run"
    word = command_of._word(key, value)
    found = OmegaConf.create({"run": None, "gradient_flow": {"gammas": None}})
    for override in OverridesParser.create().parse_overrides([word]):
        OmegaConf.update(found, override.key_or_group, override.value())
    assert OmegaConf.select(found, key, default=None) == value or "${" in str(value)
