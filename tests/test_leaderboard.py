"""Test the leaderboard: best settings, time to reach a target, files and terminal output."""

import json

import pytest

from bnrnn.report import leaderboard, paper
from bnrnn.report.document import Heading
from bnrnn.report.groups import Group, baseline
from bnrnn.report.leaderboard import standings, target
from bnrnn.runs.find import find_runs
from tests.run_folders import make_run


@pytest.fixture
def outputs(tmp_path):
    """Runs with validations 100 steps and one second apart; test = last validation - 1/8."""

    def run(name, model, values, **options):
        make_run(tmp_path / "ptb" / model / name, model, values, **options)

    run("a", "lstm", [3.0, 2.0, 1.75, 1.5])
    run("b", "lstm", [3.0, 2.5, 1.75, 1.5], seed=1)
    # The choice uses only seed 0, which both learning rates have; there, 1e-3 is better.
    run("a", "bnlstm", [2.0, 1.5, 1.25, 1.125])
    run("b", "bnlstm", [2.0, 1.5, 1.25, 1.0], optimizer__lr=1e-3)
    run("c", "bnlstm", [2.0, 1.75, 1.5, 1.5], optimizer__lr=1e-3, seed=1)
    run("a", "zoneout", [2.0, 2.0, 2.0, 1.75])
    run("b", "zoneout", [2.0, 2.0, 2.0, 0.5], finished=False, optimizer__lr=1e-3)
    return tmp_path


def test_each_model_at_its_best_settings_and_the_best_test_first(outputs):
    found = standings(find_runs(outputs))
    assert [(e.first.model, e.tried, [run.seed for run in e.runs]) for e in found] == [
        ("bnlstm", 2, [0, 1]), ("lstm", 1, [0, 1]), ("zoneout", 1, [0]),
    ]  # fmt: skip
    best = found[0]
    assert best.first.settings["optimizer"]["lr"] == 1e-3
    assert best.valid == 1.25
    assert best.tests == [0.875, 1.375]


def test_how_soon_the_baselines_best_is_reached(outputs):
    bnlstm, lstm, zoneout = standings(find_runs(outputs))
    value, whose = target([bnlstm, lstm, zoneout])
    assert (value, whose) == (1.5, "the mean over seeds of the LSTM's best")
    assert bnlstm.reached(value) == [(200, 2.0), (300, 3.0)]
    assert lstm.reached(value) == [(400, 4.0), (400, 4.0)]
    assert zoneout.reached(value) == []
    assert target([bnlstm, zoneout]) == (1.75, "the best of the model that is worst")


def test_a_pause_counts_as_three_times_the_median(tmp_path):
    make_run(tmp_path / "a", "lstm", [2.0, 1.5, 1.25, 1.0, 0.75])
    file = tmp_path / "a" / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line, seconds in zip(lines, (10, 20, 5000, 5010, 5022), strict=True):
        line["seconds"] = seconds
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run,) = find_runs(tmp_path)
    assert leaderboard.training_seconds(run) == {100: 10, 200: 20, 300: 50, 400: 60, 500: 72}
    assert leaderboard.standings([run])[0].reached(1.25) == [(300, 50)]
    curve = leaderboard.chart_of(leaderboard.standings([run]), 1.0, "A title").panels[0].curves[0]
    assert curve.x["seconds"] == [10, 20, 50, 60, 72]


def test_word_models_of_different_sizes_are_not_compared(tmp_path):
    for size, last in (("small", 120.0), ("medium", 90.0)):
        for model in (f"words_{size}", f"words_{size}_bn_input", f"words_{size}_bnlstm"):
            make_run(tmp_path / model, model, [200.0, last], task="ptb_words")
    found = [b for b in leaderboard.blocks(find_runs(tmp_path)) if isinstance(b, Heading)]
    assert [heading.text for heading in found] == [
        "Leaderboard", "ptb_words, small: all models", "ptb_words, medium: all models",
    ]  # fmt: skip
    assert [baseline(m) for m in ("words_small_bn_input", "words_medium", "bn_zoneout")] == [
        "words_small", "words_medium", "lstm",
    ]  # fmt: skip
    assert [baseline(m) for m in ("attentive_bne_star", "speech_bn", "characters_bn_sum")] == [
        "attentive_lstm", "speech_lstm", "characters_lstm",
    ]  # fmt: skip


def test_an_lstm_with_dropout_is_no_baseline(outputs):
    make_run(outputs / "ptb" / "dropout_lstm" / "a", "dropout_lstm", [2.0, 1.25])
    found = standings(find_runs(outputs))
    assert [e.first.model for e in found][:2] == ["bnlstm", "dropout_lstm"]
    assert target(found) == (1.5, "the mean over seeds of the LSTM's best")


def test_where_more_is_better(tmp_path):
    for model, last in (("lstm", 0.5), ("bnlstm", 0.75), ("zoneout", 0.625)):
        make_run(tmp_path / model, model, [0.25, last], task="pmnist", test=last)
    found = standings(find_runs(tmp_path))
    assert [e.first.model for e in found] == ["bnlstm", "zoneout", "lstm"]
    assert found[0].reached(50.0) == [(200, 2.0)]


def test_files_and_terminal(bnrnn_here, outputs):
    shown = bnrnn_here("mode=leaderboard", f"outputs={outputs}").stdout
    rows = [" ".join(line.split()) for line in shown.splitlines()]
    assert "BN-LSTM 1.125 (0.875 to 1.375) 2 400 1.250 250 2 2" in rows
    assert "LSTM, zoneout 1.625 1 400 1.750 not reached - 1" in rows
    folder = outputs / "leaderboard"
    markdown = (folder / "leaderboard.md").read_text()
    assert "learning rate 0.001" in markdown
    assert "`bnrnn task=ptb model=lstm" in markdown
    assert (folder / "figures" / "ptb-leaderboard.png").stat().st_size > 10_000
    assert "data:image/svg+xml" in (folder / "leaderboard.html").read_text()
    bnrnn_here("mode=report", f"outputs={outputs}")
    assert "## Leaderboard" in (outputs / "report" / "report.md").read_text()


def test_too_few_models_are_one_line(bnrnn_here, tmp_path):
    make_run(tmp_path / "a", "lstm", [2.0, 1.0])
    failed = bnrnn_here("mode=leaderboard", f"outputs={tmp_path}")
    assert failed.returncode != 0
    assert "no data set under" in failed.stderr
    assert "train more" in failed.stderr
    assert not (tmp_path / "leaderboard").exists()


def test_a_figure_that_shows_the_end_of_long_curves(tmp_path):
    for model, last in (("lstm", 1.5), ("bnlstm", 1.25), ("zoneout", 1.375)):
        make_run(tmp_path / model, model, [6.0, 3.0, 2.0, 1.75, 1.625, last, last, last])
    ranked = standings(find_runs(tmp_path))
    axes = leaderboard.figure(ranked, 1.5, "A title").axes[0]
    low, high = axes.get_ylim()
    assert low < 1.25 < 1.5 < high <= 3


def test_what_other_papers_report(composed, tmp_path):
    """Check their numbers and settings. There is no verdict if the training steps are unknown."""
    for (data, model), (reported, experiment) in paper.FAMILY.items():
        config = composed(f"task={data}", f"model={model}", f"experiment={experiment}")
        theirs = paper.settings(data, model)
        assert theirs["model.name"] == config.model.name == model
        assert theirs["model.zoneout_cell"] == config.model.zoneout_cell
        assert paper.reported(data, model) == reported
    config = composed("task=ptb", "model=lnlstm", "experiment=ln_paper")
    assert (config.task.batch_size, config.optimizer.lr) == (128, 1e-3)
    assert (config.model.input_dropout, config.model.output_dropout) == (0.1, 0.1)
    config = composed("task=ptb", "model=zoneout", "experiment=zoneout_paper")
    assert (config.model.zoneout_cell, config.model.zoneout_hidden) == (0.5, 0.05)
    assert (config.task.batch_size, config.patience) == (32, 25)
    config = composed("task=pmnist_official", "model=bn_zoneout", "experiment=zoneout_paper")
    assert (config.model.zoneout_cell, config.model.zoneout_hidden) == (0.15, 0.15)
    assert config.optimizer.decay == 0.5
    make_run(tmp_path / "a", "zoneout", [1.5, 1.395])
    (run,) = find_runs(tmp_path)
    group = Group([run], "")
    assert group.verdict() == "not the paper's settings"
    assert group.difference == pytest.approx(1.27 - 1.27)
