"""Each of the paper's experiments from one command: settings, and a complete run at small scale."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bnrnn.report import paper
from bnrnn.settings.same import to_dict
from bnrnn.settings.schema import SCALES
from tests.conftest import DATA, ROOT, needs_data

FOLDER = ROOT / "conf" / "reproduce"
EXPERIMENTS = sorted(file.stem for file in FOLDER.glob("*.yaml"))
AS_BY_THEMSELVES = ["mnist", "pmnist", "ptb", "text8", "sum", "words"]


def jobs(experiment):
    """Return the overrides of each job of the experiment's sweep."""
    params = yaml.safe_load((FOLDER / f"{experiment}.yaml").read_text())["hydra"]["sweeper"][
        "params"
    ]
    values = [[f"{key}={value}" for value in str(v).split(",")] for key, v in params.items()]
    return [list(job) for job in itertools.product(*values)]


def ends(experiment):
    """Return the first and last job: each takes seconds, and the others share their settings."""
    first, *_, last = jobs(experiment)
    return [first, last]


SOME_JOBS = pytest.mark.parametrize("some", [ends, pytest.param(jobs, marks=pytest.mark.slow)])


@SOME_JOBS
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_job_of_every_scale_composes(composed, experiment, some):
    for scale in ["minutes"] if some is ends else SCALES:  # tests below cover the others
        for job in some(experiment):
            assert composed(f"reproduce={experiment}", f"scale={scale}", *job).scale == scale


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_scales_differ_in_their_steps(composed, experiment):
    job = jobs(experiment)[0]
    configs = [composed(f"reproduce={experiment}", f"scale={scale}", *job) for scale in SCALES]
    assert [config.scale for config in configs] == list(SCALES)
    steps = {config.scale: config.max_steps for config in configs}
    assert steps["minutes"] != steps["hour"]


@SOME_JOBS
@pytest.mark.parametrize("experiment", AS_BY_THEMSELVES)
def test_in_full_it_is_the_run_of_task_and_model_alone(composed, experiment, some):
    for job in some(experiment)[-1:] if some is ends else some(experiment):
        ours = to_dict(composed(f"reproduce={experiment}", *job))
        task = {"sum": "ptb_characters", "words": "ptb_words"}.get(experiment, experiment)
        task = [] if job[0].startswith("task=") else [f"task={task}"]
        plain = to_dict(composed(*task, *job))
        assert ours == plain


def test_which_models_and_data_are_compared():
    assert [job[:1] for job in jobs("ptb")] == [["model=lstm"], ["model=bnlstm"]]
    assert {tuple(job[:2]) for job in jobs("pmnist")} == {
        (f"task={task}", f"model={model}")
        for task in ("pmnist_official", "pmnist")
        for model in ("lstm", "bnlstm")
    }
    assert len(jobs("cnn4")) == 5
    assert [job[0] for job in jobs("sum")] == ["model=characters_lstm", "model=characters_bn_sum"]
    assert {job[0] for job in jobs("words")} == {
        f"model=words_{size}{kind}"
        for size in ("small", "medium", "large")
        for kind in ("", "_bn_input")
    }
    gammas = {tuple(job[:3]) for job in jobs("gamma")}
    assert gammas == {
        (f"task={task}", "model=bnlstm", f"model.gamma_init={gamma}")
        for task in ("pmnist_official", "ptb")
        for gamma in (0.1, 0.3, 0.5, 0.7, 1.0)
    }


@SOME_JOBS
def test_question_answering_in_full(composed, some):
    """Sizes, learning rates and batches are the authors'; shorter scales generate their data."""
    for model, *_ in [*some("cnn4"), ["model=attentive_bne_star"]]:
        hour = composed("reproduce=cnn4", "scale=hour", model)
        assert (hour.data.synthetic, hour.model.hidden_size) == (20000, 100)
        assert (hour.task.batch_size, hour.optimizer.lr) == (40, 8e-4)
        full = composed("reproduce=cnn4", model)
        assert (full.data.synthetic, full.model.hidden_size) == (None, 240)
        star = full.model.name == "attentive_bne_star"
        assert (full.task.batch_size, full.optimizer.lr) == ((40, 8e-4) if star else (64, 8e-5))
    full = composed("reproduce=cnn", "model=attentive_bne_star_star")
    assert (full.model.hidden_size, full.optimizer.lr) == (120, 8e-4)
    assert composed("reproduce=cnn", "model=attentive_lstm").model.hidden_size == 240


@pytest.mark.parametrize("experiment", ["cnn4", "cnn"])
def test_in_full_each_reader_goes_as_far_as_its_curve_in_the_paper(composed, experiment):
    for model, *_ in jobs(experiment):
        steps = composed(f"reproduce={experiment}", model).max_steps
        name = model.removeprefix("model=")
        assert steps == paper.RESULTS[experiment, name].steps
        curve = paper.validation(experiment)[name]
        assert steps == pytest.approx(curve[-1][0], rel=0.002)


def test_the_gamma_sweep_is_on_the_papers_pixel_map(composed):
    config = composed("reproduce=gamma", "task=pmnist_official", "model.gamma_init=0.3")
    assert config.task.permutation == "official_code"
    assert (config.max_steps, config.model.gamma_init) == (50_000, 0.3)


@pytest.fixture(scope="module")
def targets():
    """What `make help` prints."""
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_file_says_what_it_costs_and_what_to_expect(experiment, targets):
    text = (FOLDER / f"{experiment}.yaml").read_text()
    assert f"make reproduce-{experiment} " in text
    assert "Expected (the paper)" in text
    for scale in SCALES:
        assert f"scale={scale}" in text
    assert f"make reproduce-{experiment} " in targets


def test_scale_alone_is_refused(bnrnn_here):
    done = bnrnn_here("scale=hour")
    assert done.returncode == 2
    assert done.stderr == "bnrnn: error: scale=hour needs reproduce=NAME, such as reproduce=ptb\n"


SMALL = ["max_steps=2", "model.hidden_size=8", "calibration_batches=2", "task.batch_size=500",
         "task.length=10", "test_calibration_batches=2", "task.stream_length=50000"]  # fmt: skip


def test_analyses_of_a_trained_model_find_it_by_its_settings(bnrnn_here, tmp_path):
    missing = bnrnn_here("mode=lengths", "run=auto", *SMALL)
    assert missing.returncode == 4
    assert "no finished run of task=pydocs model=bnlstm" in missing.stderr
    assert not list(tmp_path.glob("outputs/*"))

    assert bnrnn_here(*SMALL).returncode == 0
    (run,) = tmp_path.glob("outputs/pydocs/bnlstm/*")
    done = bnrnn_here("mode=lengths", "run=auto", "lengths.lengths=[10,40]", *SMALL)
    assert done.returncode == 0, done.stderr
    (file,) = run.glob("lengths/*/result.json")
    result = json.loads(file.read_text())
    assert result["lengths"] == [10, 40]
    assert set(result["bpc"]) == {"population", "batch"}
    of = result["of"]
    assert (of["task"], of["model"], of["step"]) == ("pydocs", "bnlstm", 2)
    assert of["calibrated"] == 2
    assert (file.parent / "lengths.png").exists()

    done = bnrnn_here("mode=population", f"run={run}", "population.units=3")
    assert done.returncode == 0, done.stderr
    assert len(list(run.glob("population/*/population.png"))) == 1


def test_analyses_without_a_model(bnrnn_here, tmp_path):
    done = bnrnn_here("mode=tanh_derivative")
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("outputs/tanh_derivative/*/result.json")
    assert json.loads(file.read_text())["analysis"] == "tanh_derivative"
    assert (file.parent / "tanh_derivative.png").exists()


def test_wrong_settings_of_an_analysis(bnrnn_here):
    done = bnrnn_here("mode=gradient_flow", "gradient_flow.gammas=[0]")
    assert done.returncode == 2
    assert "gradient_flow.gammas must be positive" in done.stderr


def test_nothing_to_report_on_leaves_the_folder_alone(bnrnn_here, tmp_path):
    done = bnrnn_here("mode=report")
    assert done.returncode == 4
    assert done.stderr.startswith("bnrnn: error: no run under ")
    assert tmp_path.is_dir()
    assert not list(tmp_path.glob("outputs/*"))


def test_a_run_that_fails_says_so_in_its_folder_and_in_the_report(bnrnn_here, tmp_path):
    done = bnrnn_here(*SMALL, "optimizer=sgd", "optimizer.lr=1e30", "max_steps=50")
    assert done.returncode == 5
    (run,) = tmp_path.glob("outputs/pydocs/bnlstm/*")
    failure = json.loads((run / "failed.json").read_text())
    assert failure["exit_code"] == 5
    assert failure["error"] in done.stderr
    assert bnrnn_here("mode=report").returncode == 0
    report = (tmp_path / "outputs" / "report" / "report.md").read_text()
    assert "failed" in report


@pytest.mark.slow
@needs_data("mnist", "ptb", "text8")
@pytest.mark.parametrize(
    "targets",
    [
        ["mnist"], ["pmnist"], ["text8"], ["cnn4"], ["cnn"], ["gamma"], ["sum"], ["words"],
        ["frames"],
        ["gradient-flow", "tanh"],
        ["lengths", "population"],  # these need the runs of ptb
    ],
)  # fmt: skip
def test_every_target_end_to_end(targets, tmp_path, monkeypatch):
    """At the smallest scale; on real data, except for the questions."""
    for name in ("mnist", "ptb", "text8"):  # generated questions are written to the same folder
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / name).symlink_to(DATA / name)
    monkeypatch.setenv("BNRNN_CACHE_DIR", str(tmp_path / "cache"))
    outputs = tmp_path / "outputs"
    for target in targets:
        subprocess.run(
            ["make", "--assume-old=install", f"BIN={Path(sys.executable).parent}", "SCALE=minutes",
             f"ARGS=data_dir={tmp_path / 'data'} outputs={outputs}", f"reproduce-{target}"],
            cwd=ROOT, check=True, capture_output=True,
        )  # fmt: skip
    assert (outputs / "report" / "report.html").exists()
    results = list(outputs.glob("**/result.json"))
    expected = {"mnist": 2, "pmnist": 4, "text8": 2, "cnn4": 5, "cnn": 2, "gamma": 10,
                "sum": 2, "words": 6, "frames": 3, "gradient-flow": 2,
                "lengths": 2 + 2 + 1}[targets[0]]  # fmt: skip
    assert len(results) == expected
    assert len(list(outputs.glob("report/figures/*.png"))) > 0
