"""Every file under conf/ composes, is valid, and says what the paper says."""

import re
from pathlib import Path

import pytest
import yaml

from bnrnn import config as settings
from bnrnn.errors import ConfigError
from bnrnn.nn.attentive_reader import VARIANTS

CONF = Path(__file__).parent.parent / "conf"


def names(group):
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("model", names("model"))
@pytest.mark.parametrize("task", names("task"))
def test_every_model_composes_with_every_task(composed, task, model):
    path = ["path=book.txt"] if task == "text" else []
    if task.startswith("cnn") == model.startswith("attentive"):
        config = composed(f"task={task}", f"model={model}", *path)
        assert (config.task.name, config.model.name) == (task, model)
    else:
        with pytest.raises(ConfigError, match=f"task={task} takes model="):
            composed(f"task={task}", f"model={model}", *path)


@pytest.mark.parametrize("experiment", names("experiment"))
@pytest.mark.parametrize("task", [t for t in names("task") if t != "text"])
def test_every_experiment_composes_with_every_task(composed, experiment, task):
    composed(f"task={task}", f"experiment={experiment}")


@pytest.mark.parametrize("optimizer", names("optimizer"))
def test_every_optimizer_composes_and_wins_over_the_tasks_own(composed, optimizer):
    assert composed("task=pmnist", f"optimizer={optimizer}").optimizer.name == optimizer


# Section 2 of the paper's experiments: hidden size, length, batch, optimiser, rate, epochs.
PAPER = {
    "mnist": (100, None, 100, "rmsprop", 1e-3, 200),
    "pmnist": (100, None, 100, "rmsprop", 1e-3, 200),
    "ptb": (1000, 100, 64, "adam", 2e-3, 50),
    "text8": (2000, 180, 128, "adam", 1e-3, 50),
}


@pytest.mark.parametrize("task", PAPER)
@pytest.mark.parametrize("model", ["lstm", "bnlstm"])
def test_task_and_model_alone_are_the_papers_run(composed, task, model):
    config = composed(f"task={task}", f"model={model}")
    assert (
        config.model.hidden_size, getattr(config.task, "length", None), config.task.batch_size,
        config.optimizer.name, config.optimizer.lr, config.task.max_epochs,
    ) == PAPER[task]  # fmt: skip
    assert config.optimizer.max_grad_norm == 1.0
    assert config.model.gamma_init == 0.1
    assert config.model.learned_state
    assert config.model.forget_bias == 1.0
    pixels = task in ("mnist", "pmnist")
    assert config.model.recurrent_init == ("identity" if pixels else "orthogonal")
    if pixels:
        assert config.optimizer.decay == 0.9
        assert config.optimizer.momentum == 0.0
        assert config.task.init_noise == 0.1
        assert config.task.permutation == ("none" if task == "mnist" else "true")


def test_the_released_codes_map_has_no_noise_unless_it_is_asked_for(composed):
    assert composed("task=pmnist", "task.permutation=official_code").task.init_noise == 0.0
    noisy = composed("task=pmnist", "task.permutation=official_code", "task.init_noise=0.2")
    assert noisy.task.init_noise == 0.2


TASK_OF = {"attentive": ["task=cnn"]}


def test_the_readers_are_the_librarys_variants(composed):
    for name, variant in VARIANTS.items():
        model = composed("task=cnn4", f"model={name}").model
        assert {key: getattr(model, key) for key in variant} == variant


def test_the_slots_of_each_model(composed):
    slots = {
        model: (c.input_norm, c.recurrent_norm, c.cell_norm, c.gamma_init)
        for model in names("model")
        for c in [composed(f"model={model}", *TASK_OF.get(model.partition("_")[0], [])).model]
    }
    assert slots == {
        "lstm": ("none", "none", "none", 0.1),
        "bnlstm": ("frame", "frame", "frame", 0.1),
        "bn_input": ("frame", "none", "none", 1.0),
        "bn_input_sequence": ("sequence", "none", "none", 1.0),
        "attentive_lstm": ("none", "none", "none", 0.1),
        "attentive_bnlstm": ("frame", "frame", "frame", 0.1),
        "attentive_bn_everywhere": ("frame", "frame", "frame", 0.1),
        "attentive_bne_star": ("sequence", "frame", "frame", 0.1),
        "attentive_bne_star_star": ("sequence", "frame", "frame", 0.1),
    }


def test_official_code_sets_every_deviation_that_concerns_a_task(composed):
    for task in ("mnist", "pmnist", "ptb"):
        config = composed(f"task={task}", "experiment=official_code", "model=lstm")
        assert config.selection == "batch"
        assert config.model.cell_bias
        if task != "ptb":
            assert config.task.permutation == ("none" if task == "mnist" else "official_code")
            assert config.task.init_noise_for == ("normalized" if task == "mnist" else "all")
            assert config.task.init_noise == (0.1 if task == "mnist" else 0.0)
            assert config.optimizer.decay == 0.9


@pytest.mark.parametrize("task", ["cnn", "cnn4"])
@pytest.mark.parametrize("model", VARIANTS)
def test_official_code_of_the_readers(composed, task, model):
    config = composed(f"task={task}", "experiment=official_code", f"model={model}")
    assert not config.model.mask_attention_statistics
    assert config.model.count_padding
    assert config.model.init == "official_code"
    assert (config.model.eps, config.model.sequence_eps) == (1e-5, 1e-6)
    assert (config.optimizer.clip, config.optimizer.max_grad_norm) == ("square_root", 10)
    assert (config.optimizer.eps_on, config.optimizer.eps) == ("uncorrected", 1e-8)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.clip=value", "optimizer.clip must be one of norm, square_root, got 'value'"),
        ("optimizer.eps_on=v", "optimizer.eps_on must be one of corrected, uncorrected, got 'v'"),
        ("model.sequence_eps=0", "model.sequence_eps must be positive, got 0.0"),
    ],
)
def test_settings_out_of_range(composed, override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        composed(override)


def without(saved, *keys):
    for key in keys:
        section, _, name = key.rpartition(".")
        del (saved[section] if section else saved)[name]
    return saved


@pytest.mark.parametrize(
    ("run", "missing", "change", "found"),
    [
        ([], ["optimizer.clip", "optimizer.eps_on", "model.sequence_eps"], [], {}),
        ([], ["data", "sample", "calibration_batches"], [], {}),
        ([], ["optimizer.clip"], ["optimizer.clip=square_root"],
         {"optimizer.clip": ("square_root", "norm")}),
        ([], ["calibration_batches"], ["calibration_batches=7"], {"calibration_batches": (7, 50)}),
        (["task=cnn"], ["data"], ["data.synthetic=9"], {"data.synthetic": (9, None)}),
        # Each dataclass has defaults of its own.
        (["model=lstm"], ["model.forget_bias"], [], {}),
        (["task=cnn"], ["model.forget_bias"], [], {}),
        (["task=cnn"], ["model.forget_bias"], ["model.forget_bias=1"],
         {"model.forget_bias": (1.0, 0.0)}),
        (["optimizer=sgd"], ["optimizer.momentum"], ["optimizer.momentum=0.5"],
         {"optimizer.momentum": (0.5, 0.0)}),
    ],
)  # fmt: skip
def test_a_saved_run_that_lacks_a_setting_had_its_default(composed, run, missing, change, found):
    saved = without(settings.to_dict(composed(*run)), *missing)
    ours = settings.to_dict(composed(*run, *change))
    assert settings.differences(ours, saved) == found


def test_a_setting_that_only_the_saved_run_has_is_a_difference(composed):
    ours = settings.to_dict(composed())
    saved = ours | {"model": ours["model"] | {"zoneout": 0.1}}
    assert settings.differences(ours, saved) == {"model.zoneout": (None, 0.1)}


def test_a_setting_on_the_command_line_wins_over_task_and_experiment(composed):
    config = composed(
        "task=pmnist", "experiment=official_code", "task.permutation=none",
        "model.hidden_size=7", "selection=population",
    )  # fmt: skip
    assert config.task.permutation == "none"
    assert config.model.hidden_size == 7
    assert config.selection == "population"


def test_every_config_file_starts_by_saying_what_it_is():
    for file in CONF.glob("*/*.yaml"):
        text = file.read_text()
        if file.parent.name != "optimizer":
            assert text.startswith("#"), file
        assert yaml.safe_load(text) is not None, file
