"""Reports from run directories written by hand, with exact numbers, and the shipped results."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from bnrnn.errors import CheckpointError
from bnrnn.report import compare, report, results
from bnrnn.report.document import (
    Bullets,
    Code,
    Figure,
    Heading,
    Link,
    Paragraph,
    Table,
    to_html,
    to_markdown,
)
from bnrnn.report.figures import validation_curves
from bnrnn.report.groups import groups, mean_curve, sweeps
from bnrnn.report.runs import find, find_runs, read_run
from bnrnn.rundir import RunDirectory

ROOT = Path(__file__).parent.parent
HOSTILE = 'the loss is nan; see /home/someone/outputs/a/last.pt <script>alert("x")</script> a|b *c*'


def make_run(
    folder, model, values, finished=True, task="ptb", seed=0, steps=None, test=None, **changes
):
    """Validations 100 steps apart; `changes` are settings, double underscores for dots."""
    folder.mkdir(parents=True)
    config = {
        "model": {"name": model},
        "task": {"name": task, "kind": "pixels" if "mnist" in task else "characters"},
        "seed": seed,
        "max_valid_batches": None,
        "data_dir": "/somewhere",
    }
    for key, value in changes.items():
        group, _, name = key.rpartition("__")
        (config.setdefault(group, {}) if group else config)[name] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    metric = "accuracy" if "mnist" in task else "bpc"
    lines = [
        {"step": 100 * k, "split": "valid", "statistics": kind, metric: value + shift, "seconds": k}
        for k, value in enumerate(values, start=1)
        for kind, shift in (("population", 0.0), ("batch", 0.25))
        if kind == "population" or model != "lstm"
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        result = {
            "test": {metric: values[-1] - 0.125 if test is None else test},
            "valid": {metric: values[-1]},
            "best_step": 100 * len(values), "steps": steps or 100 * len(values), "epochs": 2.0,
            "data": "/somewhere/the.txt: 9 characters",
            "wall_seconds": 90.0, "train_seconds": 60.0, "kernel": "reference", "commit": "abc",
            "machine": "a machine", "threads": 2,
            "command": f"bnrnn task={task} model={model} data_dir=/somewhere threads=1",
        }  # fmt: skip
        (folder / "result.json").write_text(json.dumps(result))


def fail(folder, error=HOSTILE):
    (folder / "failed.json").write_text(json.dumps({"error": error, "exit_code": 5}))


def rows(blocks, *first):
    """The cells of the table rows that begin so."""
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


def test_a_run_reads_back_its_curves(tmp_path):
    make_run(tmp_path / "a", "bnlstm", [0.5, 0.75], task="pmnist")
    run = read_run(tmp_path / "a")
    assert run.curve() == ([100, 200], [50.0, 75.0])
    assert run.curve("batch") == ([100, 200], [75.0, 100.0])
    assert (run.best_step(), run.final("test")) == (200, 62.5)
    with pytest.raises(CheckpointError, match="no readable run directory"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("changes", "data"),
    [
        ({"task": "pmnist"}, "pmnist"),
        ({"task": "pmnist", "task__permutation": "official_code"}, "pmnist-official-map"),
        ({"task": "cnn4", "data__synthetic": 300}, "cnn4-synthetic"),
        ({"task": "ptb", "task__variant": "stripped"}, "ptb-stripped"),
        ({"task": "text", "task__path": "/books/emma.txt"}, "text-emma"),
    ],
)
def test_data_that_are_not_the_papers_have_another_name(tmp_path, changes, data):
    make_run(tmp_path / "a", "lstm", [1.0], **changes)
    assert read_run(tmp_path / "a").data == data


def test_results_on_a_part_of_the_corpus_do_not_stand_beside_the_papers(tmp_path):
    make_run(tmp_path / "a", "lstm", [1.3], task="text8", steps=195_300, model__hidden_size=500)
    file = tmp_path / "a" / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"whole_data": False}))
    assert read_run(tmp_path / "a").data == "text8-part"
    made = document(tmp_path)
    assert Heading(3, "text8, a part of it") in made
    assert rows(made, "LSTM") == [["500 units", "1.175 test", "1", "195,300"]]


def test_three_seeds_have_a_mean_a_standard_deviation_and_a_verdict(tmp_path):
    for seed, bpc in enumerate([1.30, 1.34, 1.35]):
        make_run(tmp_path / f"{seed}", "bnlstm", [bpc], seed=seed, steps=39_500, test=bpc)
    for seed, bpc in enumerate([1.36, 1.37, 1.365]):
        make_run(tmp_path / f"l{seed}", "lstm", [bpc], seed=seed, steps=39_500, test=bpc)
    lstm, bnlstm = groups(find_runs(tmp_path))
    # Deviations from the mean 1.33 are -0.03, 0.01, 0.02: (9 + 1 + 4) / 2 = 7 (of 1e-4).
    assert bnlstm.mean == pytest.approx(1.33)
    assert bnlstm.deviation == pytest.approx(7e-4**0.5)
    assert bnlstm.difference == pytest.approx(0.01)
    assert rows(document(tmp_path), "BN-LSTM") == [
        ["1.330 ± 0.026 test", "1.32, table 2", "+0.010", "within the seeds' spread", "3",
         "39,500 of 39,500"],
    ]  # fmt: skip
    assert rows(document(tmp_path), "LSTM") == [
        ["1.365 ± 0.005 test", "1.38, table 2", "−0.015", "outside the seeds' spread, better", "3",
         "39,500 of 39,500"],
    ]  # fmt: skip
    assert lstm.split == "test"


def test_two_seeds_have_a_range(tmp_path):
    for seed, accuracy in enumerate([0.95, 0.96]):
        changes = {"task": "pmnist", "task__permutation": "official_code", "seed": seed}
        make_run(
            tmp_path / f"b{seed}", "bnlstm", [accuracy], steps=100_000, test=accuracy, **changes
        )
        make_run(
            tmp_path / f"l{seed}", "lstm", [0.5], steps=100_000, test=accuracy - 0.1, **changes
        )
    assert rows(document(tmp_path), "BN-LSTM") == [
        ["95.50 (95.00 to 96.00) test", "95.4, table 1", "+0.10", "within the seeds' spread", "2",
         "100,000 of 100,000"],
    ]  # fmt: skip
    ((*_, difference, verdict, _, _),) = rows(document(tmp_path), "LSTM")
    assert (difference, verdict) == ("−4.70", "outside the seeds' spread, worse")


def test_no_verdict_of_one_seed_a_shorter_run_or_other_settings(tmp_path):
    make_run(tmp_path / "a", "bnlstm", [1.3], steps=39_500)
    make_run(tmp_path / "b", "lstm", [1.3], steps=3_160, scale="hour")
    make_run(tmp_path / "c", "lstm", [1.3], task="text8", steps=195_300, model__hidden_size=500)
    made = document(tmp_path)
    assert rows(made, "BN-LSTM")[0][-3] == "one seed"
    text8 = ["500 units", "1.175 test", "1.43, table 3", "−0.255", "not the paper's settings", "1"]
    assert rows(made, "LSTM") == [
        ["scale=hour", "1.175 test", "1.38, table 2", "−0.205", "8 % of the paper's steps", "1",
         "3,160 of 39,500"],
        [*text8, "195,300 of 195,300"],
    ]  # fmt: skip


def test_the_best_validation_counts_where_the_paper_has_no_test(tmp_path):
    make_run(tmp_path / "a", "attentive_lstm", [0.5], task="cnn4")
    config = (tmp_path / "a" / "config.yaml").read_text().replace("characters", "questions")
    (tmp_path / "a" / "config.yaml").write_text(config)
    for name in ("metrics.jsonl", "result.json"):
        file = tmp_path / "a" / name
        file.write_text(file.read_text().replace('"bpc"', '"error"'))
    ((value, reported, *_),) = rows(document(tmp_path), "LSTM")
    assert (value, reported) == ("75.00 valid", "50.3, section 5.4")  # with batch statistics


def test_groups_are_told_apart_by_what_differs(tmp_path):
    make_run(tmp_path / "a", "lstm", [2.0], task="pydocs", optimizer__lr=0.002, kernel="cpu")
    make_run(tmp_path / "b", "lstm", [2.0], task="pydocs", optimizer__lr=0.01, scale="full")
    make_run(tmp_path / "c", "lstm", [2.0], task="pydocs", optimizer__lr=0.01, seed=1)
    found = groups(find_runs(tmp_path))
    assert [(g.label, len(g.runs)) for g in found] == [
        ("learning rate 0.002", 1), ("learning rate 0.01", 2),
    ]  # fmt: skip


def test_an_older_run_has_the_default_of_a_setting_that_it_does_not_know(tmp_path):
    make_run(tmp_path / "a", "lstm", [2.0], task="pydocs")
    make_run(tmp_path / "b", "lstm", [2.0], task="pydocs", seed=1, optimizer__clip="norm")
    make_run(tmp_path / "c", "lstm", [2.0], task="pydocs", optimizer__clip="square_root")
    found = groups(find_runs(tmp_path))
    assert [(g.label, len(g.runs)) for g in found] == [("", 2), ("clip square_root", 1)]


def test_the_settings_of_the_released_code_are_told_as_one(tmp_path):
    for name, decay, changes in (
        ("a", 0.9, {}),
        ("b", 0.9, {"model__cell_bias": True, "selection": "batch"}),
        ("c", 0.5, {"model__cell_bias": True}),
    ):
        make_run(tmp_path / name, "lstm", [0.5], task="pmnist", task__permutation="official_code",
                 optimizer__name="rmsprop", optimizer__decay=decay, **changes)  # fmt: skip
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
        for file in (tmp_path / f"{seed}").iterdir():
            text = file.read_text().replace("characters", "questions").replace('"bpc"', '"error"')
            file.write_text(text)
    ((value, _, _, verdict, _, steps),) = rows(document(tmp_path), "BN-e*")
    assert (value, steps) == ("50.00 ± 0.00 valid", "550,000 of 550,000")
    assert verdict == "outside the seeds' spread, worse"


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
    make_run(tmp_path / "lstm", "lstm", [2.0], task="pydocs", model__gamma_init=0.1)
    runs = find_runs(tmp_path)
    (sweep,) = sweeps(runs)
    assert {gamma: [run.seed for run in of_gamma] for gamma, of_gamma in sweep.items()} == {
        0.1: [0, 1], 0.3: [0, 1], 1.0: [0, 1],
    }  # fmt: skip
    assert list(sweep) == [0.1, 0.3, 1.0]
    assert [g.label for g in groups(runs)] == ["", "γ 0.1", "γ 0.3", "γ 1"]
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
    fail(folder / "2-failed")
    make_run(folder / "3-stopped", "lstm", [2.5], finished=False, seed=7)
    (folder / "3-stopped" / "last.pt").write_bytes(b"")
    make_run(folder / "4-running", "lstm", [], finished=False, seed=2)
    make_run(folder / "5-without-checkpoint", "lstm", [], finished=False, seed=3)
    (folder / "6-unreadable").mkdir()
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


def test_every_run_is_listed_whatever_became_of_it(all_states):
    made = document(all_states)
    assert made[2] == Paragraph(
        "9 runs: 1 finished, 1 running, 1 stopped, 1 unfinished, 1 failed, 4 unreadable."
    )
    assert rows(made, "2-failed", "failed")[0] == ["200", "nan at 200", HOSTILE]
    assert rows(made, "3-stopped", "stopped")[0] == [
        "100", "2.500 at 100", ("go on with ", Code("bnrnn 7")),
    ]  # fmt: skip
    assert rows(made, "4-running", "running")[0] == ["0", "none", "a process is training there"]
    assert rows(made, "5-without-checkpoint", "unfinished")[0] == [
        "0", "none", "no checkpoint to go on from",
    ]  # fmt: skip
    unreadable = rows(made, Code("6-unreadable"), "unreadable")[0]
    assert "expected the node content" in unreadable[-1]
    assert "config.yaml" in rows(made, Code("7-incomplete"), "unreadable")[0][-1]
    assert rows(made, Code("8-strange"), "unreadable")[0][-1] == "no 'best_step' there"
    reason = "an analysis that this version does not know, of_tomorrow"
    assert rows(made, Code("newer"), "unreadable")[0][-1] == reason
    # The best of a run with a NaN in it is its best number.
    assert rows(made, "2-failed", "failed", "3.000")[0][:3] == ["-", "100", "200"]


def test_a_run_that_goes_on_is_as_any_other(all_states):
    (all_states / "2-failed" / "failed.json").unlink()
    assert rows(document(all_states), "2-failed", "unfinished")


def test_what_was_not_run_is_said(all_states):
    not_run, _ = [block.items for block in document(all_states) if isinstance(block, Bullets)]
    assert len(not_run) == 14  # of the paper's fifteen results
    assert (
        "Penn Treebank, characters, LSTM: the paper has 1.38 bits per character (test, table 2, "
        "39,500 steps); begun, not finished"
    ) in not_run
    assert not any("Treebank, characters, BN-LSTM" in line for line in not_run)
    assert "99.0 % accuracy (test, table 1, 100,000 steps)" in not_run[1]


def test_the_same_step_of_the_papers_curve(tmp_path):
    assert report.interpolate([[50, 3.0], [150, 2.0], [200, 1.8]], 100) == 2.5
    assert report.interpolate([[50, 3.0], [150, 2.0]], 151) is None
    assert report.thinned(list(range(18)), 12) == [1, 3, 5, 7, 9, 11, 13, 15, 17]
    assert report.thinned([1, 2], 12) == [1, 2]


class Page(HTMLParser):
    """Its tags, balanced; what it refers to; its text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.references, self.text = [], [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
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
    assert "script" not in page.tags
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
    fail(tmp_path / "outputs" / "b")
    make_run(tmp_path / "outputs" / "trial", "lstm", [3.0], seed=1, max_valid_batches=2)
    make_run(tmp_path / "outputs" / "demo" / "a", "lstm", [3.0], seed=2)
    target = tmp_path / "results"
    results.main(tmp_path / "outputs", target)
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
        in (text)
    )
    command = "`bnrnn task=ptb model=bnlstm`"
    assert f"\n- [ptb-bnlstm-seed0](runs/ptb-bnlstm-seed0): {command}\n" in text
    copied = [file for file in target.rglob("*") if file.suffix in (".yaml", ".json", ".md")]
    assert not re.search("/somewhere|/home", "".join(file.read_text() for file in copied))
    assert (target / "figures" / "ptb.png").stat().st_size > 10_000
    assert not list(target.rglob("*.svg"))
    results.main(tmp_path / "nothing new", target)
    assert (target / "README.md").read_text() == text
    assert results.write(target, figures=False) == text


@pytest.mark.parametrize(
    ("typed", "steps", "shown"),
    [
        ("task=ptb data_dir=/d outputs=/o threads=1 resume=auto", {}, "task=ptb"),
        ("task=text path=/books/emma.txt", {}, "task=text path=emma.txt"),
        ("task=ptb mode=lengths run=/o/ptb/1", {}, "task=ptb mode=lengths run=auto"),
        ("task=ptb max_epochs=4", {"steps": 3160, "max_steps": 3160}, "task=ptb max_epochs=4"),
        ("task=ptb max_epochs=4", {"steps": 3547, "max_steps": 3160}, "task=ptb max_steps=3547"),
        ("task=ptb patience=2", {"steps": 900, "max_steps": 39500}, "task=ptb patience=2"),
    ],
)
def test_the_command_that_makes_a_result_elsewhere(typed, steps, shown):
    assert results.command({"command": f"bnrnn {typed}"} | steps) == f"bnrnn {shown}"


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
        {"model__gamma_init": 0.1}, {"model__gamma_init": 0.3}, {"model__gamma_init": 1.0},
        {"model__gamma_init": 0.1, "scale": "hour"}, {"model__gamma_init": 0.1, "seed": 1},
        {"model__gamma_init": 0.1, "task__new": 2, "task__newer": 2},
        {"model__gamma_init": 0.1, "task__new": 2, "task__newer": 3},
    ]):  # fmt: skip
        known = {"task__new": 1, "task__newer": 1} | changes
        make_run(outputs / str(k), "bnlstm", [3.0], **known)
    make_run(outputs / "map", "bnlstm", [0.5], task="pmnist", task__permutation="official_code")
    make_run(outputs / "true", "bnlstm", [0.5], task="pmnist", task__permutation="true")
    results.collect(outputs, target)
    assert sorted(path.name for path in (target / "runs").iterdir()) == [
        "pmnist-bnlstm-seed0", "pmnist-official-map-bnlstm-seed0",
        "ptb-bnlstm-gamma0.3-seed0", "ptb-bnlstm-gamma1-seed0", "ptb-bnlstm-hour-seed0",
        "ptb-bnlstm-new_2-newer_3-seed0", "ptb-bnlstm-new_2-seed0", "ptb-bnlstm-seed0",
        "ptb-bnlstm-seed1",
    ]  # fmt: skip
    before = {file: file.read_bytes() for file in target.rglob("*.*") if file.is_file()}
    results.collect(outputs, target)
    assert {file: file.read_bytes() for file in target.rglob("*.*") if file.is_file()} == before


def test_large_records_are_thinned():
    records = [{"step": step, "split": "train"} for step in range(1, 1001)]
    records += [{"step": 1000, "split": "valid"}, {"step": 1000, "split": "test"}]
    thin = results.thin(records)
    assert [r["step"] for r in thin if r["split"] == "train"] == list(range(1, 1001, 3))
    assert [r["split"] for r in thin[-2:]] == ["valid", "test"]
    assert results.thin(thin) == thin


def test_analyses_are_collected_too(all_states, tmp_path):
    results.main(all_states, tmp_path / "results")
    file = tmp_path / "results" / "analyses" / "tanh_derivative" / "result.json"
    assert json.loads(file.read_text())["deviations"] == [0.0, 1.0]
    assert (tmp_path / "results" / "figures" / "tanh_derivative.png").exists()
    text = (tmp_path / "results" / "README.md").read_text()
    assert "![The derivative of tanh](figures/tanh_derivative.png)" in text


def test_the_shipped_table_is_what_the_script_makes_of_the_shipped_files():
    folder = ROOT / "results"
    assert (folder / "README.md").read_text() == results.write(folder, figures=False)
