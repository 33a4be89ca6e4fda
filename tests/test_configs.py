"""Every file under conf/ composes, is valid, and agrees with the paper."""

import re
from pathlib import Path

import pytest
import yaml
from hydra.errors import HydraException

from bnrnn.command.explain import explain
from bnrnn.errors import ConfigError
from bnrnn.nn.attentive_reader import VARIANTS
from bnrnn.settings.same import differences, to_dict
from bnrnn.settings.schema import SIZES

CONF = Path(__file__).parent.parent / "conf"


def names(group):
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def go_together(task, model):
    kinds = {
        "cnn": "attentive", "cnn4": "attentive", "ptb_characters": "characters",
        "ptb_words": "words", "frames": "speech", "an4": "speech",
    }  # fmt: skip
    kind = model.partition("_")[0]
    return kinds.get(task) == (kind if kind in kinds.values() else None)


@pytest.mark.parametrize(
    ("task", "model"),
    [
        # By default, each task with one model that it accepts and one that it refuses, and each
        # model with one of its tasks.
        pytest.param(task, model, marks=[] if few else pytest.mark.slow)
        for task in names("task")
        for model in names("model")
        for refused in ["lstm" if go_together(task, "attentive_lstm") else "attentive_lstm"]
        for few in [
            (
                go_together(task, model)
                and (
                    task in ("pydocs", "cnn", "ptb_words", "frames")
                    or model in ("lstm", "attentive_lstm", "speech_lstm")
                )
            )
            or model == refused
        ]
    ],
)
def test_every_model_composes_with_every_task(composed, task, model):
    path = ["task.path=book.txt"] if task == "text" else []
    if go_together(task, model):
        config = composed(f"task={task}", f"model={model}", *path)
        assert (config.task.name, config.model.name) == (task, model)
    else:
        arguments = [f"task={task}", f"model={model}", *path]
        with pytest.raises((ConfigError, HydraException)) as caught:
            composed(*arguments)
        assert f"task={task} takes model=" in explain(caught.value, arguments)


@pytest.mark.parametrize(
    ("task", "experiment"),
    [
        # By default, each with a third of the others.
        pytest.param(task, experiment, marks=[] if (i + j) % 3 == 0 else pytest.mark.slow)
        for i, task in enumerate(t for t in names("task") if t != "text")
        for j, experiment in enumerate(names("experiment"))
    ],
)
def test_every_experiment_composes_with_every_task(composed, experiment, task):
    composed(f"task={task}", f"experiment={experiment}")


@pytest.mark.parametrize("optimizer", names("optimizer"))
def test_every_optimizer_composes_and_wins_over_the_tasks_own(composed, optimizer):
    assert composed("task=pmnist", f"optimizer={optimizer}").optimizer.name == optimizer


# The paper's experiments: hidden size, length, batch, optimiser, learning rate, epochs.
PAPER = {
    "mnist": (100, None, 100, "rmsprop", 1e-3, 200),
    "pmnist": (100, None, 100, "rmsprop", 1e-3, 200),
    "pmnist_official": (100, None, 100, "rmsprop", 1e-3, 200),
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
    pixels = "mnist" in task
    assert config.model.recurrent_init == ("identity" if pixels else "orthogonal")
    if pixels:
        assert config.optimizer.decay == 0.9
        assert config.optimizer.momentum == 0.0
        assert (config.task.permutation, config.task.init_noise) == {
            "mnist": ("none", 0.1),
            "pmnist": ("true", 0.1),
            "pmnist_official": ("official_code", 0.0),
        }[task]  # fmt: skip


TASK_OF = {
    "attentive": "cnn", "characters": "ptb_characters", "words": "ptb_words", "speech": "frames",
}  # fmt: skip


def test_figure_1_of_laurent_et_al(composed):
    config = composed("task=ptb_characters")
    assert (config.model.name, config.model.num_layers, config.model.hidden_size) == (
        "characters_bn_sum", 3, 250,
    )  # fmt: skip
    assert (config.optimizer.name, config.task.max_epochs) == ("sgd", 20)
    assert config.optimizer.momentum in (0.5, 0.8, 0.9, 0.95, 0.995)
    assert 1e-4 <= config.optimizer.lr <= 1
    assert config.task.batch_size in (32, 64, 128)


def test_the_readers_are_the_librarys_variants(composed):
    for name, variant in VARIANTS.items():
        model = composed("task=cnn", f"model={name}").model
        assert {key: getattr(model, key) for key in variant} == variant


def test_the_slots_of_each_model(composed):
    slots = {
        model: (c.input_norm, c.recurrent_norm, c.cell_norm, c.gamma_init)
        for model in names("model")
        for task in [TASK_OF.get(model.partition("_")[0], "pydocs")]
        for c in [composed(f"task={task}", f"model={model}").model]
    }
    assert slots == {
        "lstm": ("none", "none", "none", 0.1),
        "bnlstm": ("frame", "frame", "frame", 0.1),
        "bn_input": ("frame", "none", "none", 1.0),
        "bn_input_sequence": ("sequence", "none", "none", 1.0),
        "bn_sum": ("none", "sum", "none", 1.0),
        "lnlstm": ("layer", "layer", "layer", 1.0),
        "zoneout": ("none", "none", "none", 0.1),
        "bn_zoneout": ("frame", "frame", "frame", 0.1),
        "dropout_lstm": ("none", "none", "none", 0.1),
        "stabilised": ("none", "none", "none", 0.1),
        "characters_lstm": ("none", "none", "none", 1.0),
        "characters_bn_sum": ("none", "sum", "none", 1.0),
        "speech_lstm": ("none", "none", "none", 1.0),
        "speech_bn": ("sequence", "none", "none", 1.0),
        "speech_bn_frame": ("frame", "none", "none", 1.0),
        "attentive_lstm": ("none", "none", "none", 0.1),
        "attentive_bnlstm": ("frame", "frame", "frame", 0.1),
        "attentive_bn_everywhere": ("frame", "frame", "frame", 0.1),
        "attentive_bne_star": ("sequence", "frame", "frame", 0.1),
        "attentive_bne_star_star": ("sequence", "frame", "frame", 0.1),
        **{f"words_{size}": ("none", "none", "none", 0.1) for size in SIZES},
        **{f"words_{size}_bn_input": ("frame", "none", "none", 1.0) for size in SIZES},
        **{f"words_{size}_bnlstm": ("frame", "frame", "frame", 0.1) for size in SIZES},
    }


@pytest.mark.parametrize("task", ["mnist", "pmnist_official", "ptb"])
def test_official_code_sets_every_deviation_that_concerns_a_task(composed, task):
    for model in ("lstm", "bnlstm"):
        config = composed(f"task={task}", "experiment=official_code", f"model={model}")
        assert config.selection == "batch"
        assert config.model.cell_bias
        if task == "mnist":  # the authors' baseline has no noise
            assert config.task.init_noise == (0.1 if model == "bnlstm" else 0.0)


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


def test_a_setting_that_only_the_saved_run_has_is_a_difference(composed):
    ours = composed()
    saved = to_dict(ours) | {"model": to_dict(ours)["model"] | {"zoneout": 0.1}}
    assert differences(ours, saved) == {"model.zoneout": (None, 0.1)}


def test_a_resumed_run_may_change_places_and_lengths_and_nothing_else(composed):
    saved = to_dict(composed("task=ptb"))
    free = ["data_dir=x", "outputs=y", "max_steps=3", "threads=1", "task.stream_length=5",
            "sample.length=9", "log_every=1", "model.title=T"]  # fmt: skip
    assert differences(composed("task=ptb", *free), saved) == {}
    other = composed("task=ptb", "seed=1", "task.length=50", "validate_every=7")
    assert differences(other, saved) == {
        "seed": (1, 0), "task.length": (50, 100), "validate_every": (7, None),
    }  # fmt: skip


def test_a_setting_on_the_command_line_wins_over_task_and_experiment(composed):
    config = composed(
        "task=pmnist_official", "experiment=official_code", "task.permutation=none",
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
