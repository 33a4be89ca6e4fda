"""Word-level Penn Treebank: streams, carried states, protocol, schedule, resuming, bad input."""

import hashlib
import json
import math
import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bnrnn import BNLSTM, calibrate, train
from bnrnn.datasets import load_ptb_words, ptb
from bnrnn.datasets.fetch import RemoteFile
from bnrnn.datasets.words import cut, windows
from bnrnn.errors import CheckpointError, ConfigError, DataError
from bnrnn.optim import learning_rate
from bnrnn.report import report
from bnrnn.report.document import Figure, Heading, Table
from bnrnn.runs.find import find
from bnrnn.runs.record import PERPLEXITY
from bnrnn.settings.schema import SGDConfig, WordConfig, WordModelConfig
from bnrnn.tasks.words import WordModel, WordTask
from tests.conftest import DATA, needs_data
from tests.equations import bn_lstm
from tests.run_folders import change, make_run
from tests.test_cli import assert_error, assert_same_run, only_run, records

BN_INPUT = {"input_norm": "frame", "gamma_init": 1.0}
BN_LSTM = {"input_norm": "frame", "recurrent_norm": "frame", "cell_norm": "frame"}
SMALL = [
    "task=ptb_words", "model.hidden_size=8", "task.batch_size=4", "task.length=5", "log_every=1",
    "calibration_batches=3",
]  # fmt: skip


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """Make small files of 12 words and <eos>, and register their hashes."""
    (tmp_path / "ptb").mkdir()
    rng = np.random.default_rng(0)
    words = ["the", "of", "to", "a", "in", "and", "that", "for", "is", "on", "said", "<unk>"]
    files = []
    for file, lines in zip(ptb.FILES, (60, 23, 17), strict=True):
        chosen = [rng.choice(words, rng.integers(2, 9)) for _ in range(lines)]
        content = "".join(f" {' '.join(line)} \n" for line in [words, *chosen]).encode()
        (tmp_path / "ptb" / file.name).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        files.append(RemoteFile(file.name, (), f"sha256:{digest}", len(content)))
    monkeypatch.setattr(ptb, "FILES", tuple(files))
    return tmp_path


def task_of(data_dir, **settings):
    settings = {"batch_size": 4, "length": 5} | settings
    return WordTask(WordConfig(name="ptb_words", **settings), 0, data_dir)


def model_of(task, **settings):
    config = WordModelConfig(name="m", **{"hidden_size": 6, "init_range": 0.5} | settings)
    return WordModel(config, len(task.corpus.words), "auto").double()


def plain_logits(model, words):
    """Compute logits of words (T, B) with torch.nn's own modules in one pass, without dropout."""
    lstm = nn.LSTM(model.lstm.input_size, model.lstm.hidden_size, model.lstm.num_layers).double()
    with torch.no_grad():
        for layer in range(lstm.num_layers):
            for ours, theirs in (("weight_ih", "weight_ih"), ("weight_hh", "weight_hh"),
                                 ("bias", "bias_ih")):  # fmt: skip
                value = model.lstm.get_parameter(f"{ours}_l{layer}")
                lstm.get_parameter(f"{theirs}_l{layer}").copy_(value)
            lstm.get_parameter(f"bias_hh_l{layer}").zero_()
        return model.head(lstm(model.embedding(words))[0])


# ---------------------------------------------------------------- data


@needs_data("ptb")
def test_the_real_text():
    corpus = load_ptb_words(DATA)
    sizes = len(corpus.train), len(corpus.valid), len(corpus.test), len(corpus.words)
    assert sizes == (929_589, 73_760, 82_430, 10_000)
    assert corpus.words[:4] == ["the", "<unk>", "<eos>", "N"]
    first = (DATA / "ptb" / "ptb.test.txt").read_text().splitlines()[0].split()
    assert [corpus.words[k] for k in corpus.test[: len(first) + 1]] == [*first, "<eos>"]
    counts = np.bincount(corpus.train, minlength=10_000)
    assert (np.diff(counts) <= 0).all()
    assert counts[-1] > 0
    # As many steps per epoch as TensorFlow's reader makes, and 20 validation streams.
    for length, steps in ((20, 2323), (35, 1327)):
        task = WordTask(WordConfig(name="ptb_words", length=length), 0, DATA)
        assert task.steps_per_epoch == steps
        assert task.valid_batches()[0].input[0].shape == (length, 20)


@pytest.mark.parametrize(("streams", "length"), [(1, 5), (4, 5), (7, 3), (4, 1)])
def test_streams_and_windows(data_dir, streams, length):
    """As in TensorFlow's `ptb_producer`: rows of equal length, all windows with a successor."""
    task = task_of(data_dir, batch_size=streams, length=length)
    text = task.corpus.train.astype(int)
    per_stream = len(text) // streams
    rows = np.reshape(text[: streams * per_stream], [streams, per_stream])
    steps = (per_stream - 1) // length
    assert task.steps_per_epoch == steps
    for index in range(steps):
        (words, first), target = task.train_batch(3, index)
        begin, end = index * length, (index + 1) * length
        np.testing.assert_array_equal(words.numpy(), rows[:, begin:end].T)
        np.testing.assert_array_equal(target.numpy(), rows[:, begin + 1 : end + 1].T)
        assert bool(first) == (index == 0)


@pytest.mark.parametrize(("length", "size"), [(7, 3), (8, 3), (2, 3), (30, 1)])
def test_all_windows_predict_every_word_but_the_first_once(length, size):
    found = windows(length, size, whole=False)
    assert [k for begin, end in found for k in range(begin, end)] == list(range(length - 1))
    assert all(end - begin == size for begin, end in found[:-1])
    assert [w for w in found if w[1] - w[0] == size] == windows(length, size)


def test_the_state_may_start_anew_within_an_epoch(data_dir):
    task = task_of(data_dir, resets=3)
    first = [k for k in range(task.steps_per_epoch) if task.train_batch(0, k).input[1]]
    assert first == [0, task.steps_per_epoch // 3, 2 * task.steps_per_epoch // 3]


# ---------------------------------------------------------------- the state


def walk(task, model, batches):
    carry, losses = None, []
    for batch in batches:
        losses.append(task.loss(model, batch, carry))
        carry = losses[-1].carry
    return losses


def test_the_carried_state_is_that_of_one_long_pass_of_nn_lstm(data_dir):
    task = task_of(data_dir)
    model = model_of(task)
    batches = [task.train_batch(0, k) for k in range(task.steps_per_epoch)]
    losses = walk(task, model, batches)

    words, target = (torch.cat(parts) for parts in zip(*((b.input[0], b.target) for b in batches),
                                                       strict=True))  # fmt: skip
    each = F.cross_entropy(plain_logits(model, words).flatten(0, 1), target.flatten(),
                           reduction="none").view(target.shape)  # fmt: skip
    for k, loss in enumerate(losses):
        window = each[5 * k : 5 * k + 5]
        # Summed over time, averaged over the streams.
        assert loss.value.item() == pytest.approx(window.sum(0).mean().item(), rel=1e-12)
        assert loss.sums["nll"] == pytest.approx(window.sum().item(), rel=1e-12)
        assert loss.sums["count"] == 20


def test_no_gradient_goes_back_across_windows(data_dir):
    task = task_of(data_dir)
    model = model_of(task)
    one, two = task.train_batch(0, 0), task.train_batch(0, 1)
    carry = task.loss(model, one).carry
    assert not any(state.requires_grad for state in carry)
    value = task.loss(model, two, carry).value
    value.backward()
    gradient = model.embedding.weight.grad
    assert gradient is not None
    unseen = sorted(set(range(len(gradient))) - set(two.input[0].flatten().tolist()))
    assert unseen
    assert not gradient[unseen].any()


def test_an_epoch_a_validation_and_the_test_start_at_zero(data_dir):
    task = task_of(data_dir)
    model = model_of(task)
    carry = tuple(torch.full((2, 4, 6), 0.7, dtype=torch.float64) for _ in range(2))
    for batch in (task.train_batch(5, 0), task.valid_batches()[0]):
        assert task.loss(model, batch, carry).sums == task.loss(model, batch).sums
    later = task.train_batch(5, 1)
    assert task.loss(model, later, carry).sums != task.loss(model, later).sums


# ---------------------------------------------------------------- evaluation


def test_perplexity(data_dir):
    task = task_of(data_dir)
    found = task.metrics({"nll": 3 * math.log(7) + 5 * math.log(2), "count": 8})
    assert found["perplexity"] == pytest.approx((7**3 * 2**5) ** (1 / 8), rel=1e-12)
    assert found["cross_entropy"] == pytest.approx(math.log(found["perplexity"]))
    assert task.metrics({"nll": 1e9, "count": 1})["perplexity"] == math.inf
    model = model_of(task)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    sums = task.score(model, task.valid_batches(), torch.device("cpu"))
    assert task.metrics(sums)["perplexity"] == pytest.approx(13)  # a uniform guess


def test_validation_is_on_parallel_streams(data_dir):
    task = task_of(data_dir, eval_batch_size=3)
    model = model_of(task)
    found = task.score(model, task.valid_batches(), torch.device("cpu"))
    rows = cut(task.corpus.valid.astype(np.int64), 3)
    steps = 5 * ((rows.shape[1] - 1) // 5)
    words = torch.from_numpy(rows.T[: steps + 1].copy())
    expected = F.cross_entropy(
        plain_logits(model, words[:-1]).flatten(0, 1), words[1:].flatten(), reduction="sum"
    )
    assert found["count"] == 3 * steps
    assert found["nll"] == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("length", [5, 7, 1000])
def test_the_test_is_one_stream_of_the_whole_text(data_dir, length):
    task = task_of(data_dir, batch_size=1 if length == 1000 else 4, length=min(length, 50))
    model = model_of(task).eval()
    found = task.test(model, torch.device("cpu"), lambda items: items)
    words = torch.from_numpy(task.corpus.test.astype(np.int64))[:, None]
    nll = F.cross_entropy(plain_logits(model, words[:-1]).flatten(0, 1), words[1:].flatten())
    assert found["perplexity"] == pytest.approx(math.exp(nll), rel=1e-10)


def moments_by_position(model, task):
    """Average each window's moments over all training windows, in NumPy, for one layer."""
    weights = numpy_weights(model)
    h = c = np.zeros((4, 6))
    sums = {}
    for k in range(task.steps_per_epoch):
        x = weights["embedding"][task.train_batch(0, k).input[0].numpy()]
        _, h, c, seen = bn_lstm(x, h, c, weights, norms_of(model))
        for term, (means, variances) in seen.items():
            if means:
                old = sums.get(term, (0, 0))
                sums[term] = old[0] + np.stack(means), old[1] + np.stack(variances)
    return {
        term: (means / task.steps_per_epoch, variances / task.steps_per_epoch)
        for term, (means, variances) in sums.items()
    }


def numpy_weights(model):
    found = {name.removesuffix("_l0"): p.detach().numpy()
             for name, p in model.lstm.named_parameters()}  # fmt: skip
    return found | {"embedding": model.embedding.weight.detach().numpy()}


def norms_of(model):
    return dict(zip(("ih", "hh", "c"), model.lstm.normalization[:3], strict=True))


@pytest.mark.parametrize("norms", [BN_INPUT, BN_LSTM])
def test_with_normalisation_word_k_is_of_position_k_mod_length(data_dir, norms):
    """Calibrate along the training streams, then compare the test with one pass in NumPy.

    That pass normalises each word by the statistics of its position.
    """
    task = task_of(data_dir)
    model = model_of(task, num_layers=1, **norms)
    carry = None

    def run(batch):
        nonlocal carry
        carry = task.loss(model, batch, carry).carry

    assert calibrate(model, task.calibration_batches(None), run) == task.steps_per_epoch
    model.eval()
    found = task.test(model, torch.device("cpu"), lambda items: items)

    population = moments_by_position(model, task)
    text = task.corpus.test.astype(np.int64)
    tiles = -(-len(text) // 5)
    tiled = {term: (np.tile(means, (tiles, 1)), np.tile(variances, (tiles, 1)))
             for term, (means, variances) in population.items()}  # fmt: skip
    weights = numpy_weights(model)
    output, *_ = bn_lstm(
        weights["embedding"][text[:-1, None]], np.zeros((1, 6)), np.zeros((1, 6)), weights,
        norms_of(model), population=tiled,
    )  # fmt: skip
    logits = output[:, 0] @ model.head.weight.detach().numpy().T + model.head.bias.detach().numpy()
    log_sum = np.log(np.exp(logits).sum(1))
    nll = (log_sum - logits[np.arange(len(logits)), text[1:]]).mean()
    assert found["perplexity"] == pytest.approx(np.exp(nll), rel=1e-9)


# ---------------------------------------------------------------- the model


@pytest.mark.parametrize("norms", [{}, BN_INPUT, BN_LSTM])
@pytest.mark.parametrize("init_range", [0.1, 0.05, 0.04])
def test_parameters_are_uniform_but_for_gammas_and_shifts(data_dir, norms, init_range):
    task = task_of(data_dir)
    model = model_of(task, hidden_size=40, init_range=init_range, **norms)
    for name, parameter in model.named_parameters():
        short = name.removeprefix("lstm.").partition("_l")[0]
        if short.startswith("gamma"):
            assert (parameter.float() == norms.get("gamma_init", 0.1)).all(), name
        elif short == "beta_c" or (short == "bias" and norms):
            assert not parameter.any(), name
        else:
            n = parameter.numel()
            assert parameter.abs().max() <= init_range * (1 + 1e-6), name
            assert parameter.abs().max() > init_range * (1 - 30 / n), name
            # Six standard errors of the mean; U(-r, r) has standard deviation r / sqrt(3).
            assert abs(parameter.mean()) < 6 * init_range / math.sqrt(3 * n), name
    if not norms:
        torch.manual_seed(0)
        without = model_of(task, hidden_size=40, init_range=init_range)
        torch.manual_seed(0)
        again = model_of(task, hidden_size=40, init_range=init_range, forget_bias=1.0)
        shift = again.lstm.bias_l1 - without.lstm.bias_l1
        expected = torch.tensor([0.0, 1.0, 0.0, 0.0]).repeat_interleave(40).double()
        torch.testing.assert_close(shift, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norms", [{}, BN_INPUT])
def test_dropout_is_before_between_and_after_the_layers(data_dir, norms):
    task = task_of(data_dir)
    model = model_of(task, dropout=0.4, **norms)
    words = task.train_batch(0, 0).input[0]
    layers = [
        BNLSTM(6, 6, input_norm=norms.get("input_norm", "none"), recurrent_norm="none",
               cell_norm="none").double()
        for _ in range(2)
    ]  # fmt: skip
    with torch.no_grad():
        for k, layer in enumerate(layers):
            for name, parameter in layer.named_parameters():
                parameter.copy_(model.lstm.get_parameter(name.replace("_l0", f"_l{k}")))
    torch.manual_seed(5)
    found, _ = model.train()(words)

    torch.manual_seed(5)
    x = model.embedding(words)
    for layer in layers:
        x, _ = layer(F.dropout(x, 0.4))
    torch.testing.assert_close(found, model.head(F.dropout(x, 0.4)), rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        model.eval()
        if not norms:
            torch.testing.assert_close(model(words)[0], plain_logits(model, words))


# ---------------------------------------------------------------- settings


# Zaremba et al., 2014, section 4.1: units, dropout, initial range, steps, learning rate factor,
# epochs at the full rate, epochs, clipping norm.
ZAREMBA = {
    "small": (200, 0.0, 0.1, 20, 1 / 2, 4, 13, 5),
    "medium": (650, 0.5, 0.05, 35, 1 / 1.2, 6, 39, 5),
    "large": (1500, 0.65, 0.04, 35, 1 / 1.15, 14, 55, 10),
}


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        # By default, each size with one of the kinds.
        pytest.param(size, kind, marks=[] if i == j else pytest.mark.slow)
        for i, size in enumerate(ZAREMBA)
        for j, kind in enumerate(["", "_bn_input", "_bnlstm"])
    ],
)
def test_the_three_networks(composed, size, kind):
    config = composed("task=ptb_words", f"model=words_{size}{kind}")
    model, task, optimizer = config.model, config.task, config.optimizer
    assert (
        model.hidden_size, model.dropout, model.init_range, task.length, optimizer.lr_decay,
        optimizer.lr_decay_after, task.max_epochs, optimizer.max_grad_norm,
    ) == ZAREMBA[size]  # fmt: skip
    assert (model.num_layers, model.forget_bias, model.learned_state) == (2, 0, False)
    assert (optimizer.name, optimizer.lr, optimizer.momentum) == ("sgd", 1.0, 0.0)
    assert (task.batch_size, task.resets, config.selection) == (20, 1, "last")
    slots = (model.input_norm, model.recurrent_norm, model.cell_norm)
    assert slots == {"": ("none",) * 3, "_bn_input": ("frame", "none", "none"),
                     "_bnlstm": ("frame",) * 3}[kind]  # fmt: skip
    assert model.gamma_init == (1.0 if kind == "_bn_input" else 0.1)
    code = composed("task=ptb_words", f"model=words_{size}{kind}", "experiment=laurent_code")
    assert (code.task.batch_size, code.task.resets, code.model.eps) == (32, 2, 1e-6)
    assert code.task.max_epochs == (5 if size == "small" else task.max_epochs)


def test_slots_choose_the_normalisation_as_well(composed):
    slots = ["model.input_norm=frame", "model.gamma_init=1"]
    ours = composed("task=ptb_words", "model=words_medium", *slots).model
    named = composed("task=ptb_words", "model=words_medium_bn_input").model
    assert vars(ours) | {"name": "", "title": ""} == vars(named) | {"name": "", "title": ""}


@pytest.mark.parametrize("size", ZAREMBA)
def test_the_learning_rate_is_tensorflows(size):
    """ptb_word_lm.py has `lr_decay ** max(i + 1 - max_epoch, 0)`, with i from 0."""
    *_, factor, full, epochs, _ = ZAREMBA[size]
    config = SGDConfig(lr=1.0, lr_decay=factor, lr_decay_after=full)
    found = [learning_rate(config, epoch) for epoch in range(1, epochs + 1)]
    assert found == [factor ** max(i + 1 - full, 0.0) for i in range(epochs)]
    assert found[full - 1 : full + 1] == [1.0, factor]
    assert learning_rate(SGDConfig(lr=0.3), 100) == 0.3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lr_decay=1.5"], r"optimizer.lr_decay must be in \(0, 1\], got 1.5"),
        (["optimizer.lr_decay=0"], r"optimizer.lr_decay must be in \(0, 1\], got 0"),
        (["optimizer.lr_decay_after=-1"], "optimizer.lr_decay_after must be 0 or more, got -1"),
        (["optimizer.lr_decay=null"], "lr_decay and optimizer.lr_decay_after go together"),
        (["patience=3"], "patience waits for a better validation, but selection=last"),
        (["selection=best"], "selection must be one of population, batch, last"),
        (["task.resets=0"], "task.resets must be positive"),
        (["task.length=0"], "task.length must be positive"),
        (["model.init_range=0"], "model.init_range must be positive"),
        (["model.size=tiny"], "model.size must be one of small, medium, large"),
        (["model.num_layers=0"], "model.num_layers must be positive"),
        (["model=lstm"], "task=ptb_words takes model=words_…, not model=lstm"),
        (["model=words_small_bnlstm", "task.batch_size=1"], "task.batch_size must be 2 or more"),
    ],
)
def test_settings_out_of_range(composed, overrides, message):
    with pytest.raises(ConfigError, match=message):
        composed("task=ptb_words", *overrides)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 500}, "4 streams of the training text have .* fewer than a window"),
        ({"eval_batch_size": 60}, "60 streams of the validation text have 2 words each"),
        ({"resets": 999}, "task.resets=999 is too many"),
    ],
)
def test_a_text_that_is_too_short(data_dir, settings, message):
    with pytest.raises(DataError, match=message):
        task_of(data_dir, **settings)


# ---------------------------------------------------------------- the command


@pytest.fixture
def bnrnn(bnrnn_here, data_dir):
    def run(*arguments, check=True):
        done = bnrnn_here(*arguments, f"data_dir={data_dir}")
        assert done.returncode == 0 or not check, done.stderr
        return done

    return run


@pytest.mark.parametrize(
    "model",
    [
        # By default only a small model is resumed after a signal, see below.
        pytest.param(model, marks=pytest.mark.slow)
        for model in ("words_medium", "words_medium_bn_input", "words_large_bnlstm")
    ],
)  # fmt: skip
def test_resumed_in_mid_epoch_equals_uninterrupted(bnrnn, tmp_path, model):
    """With dropout, carried states, and a learning rate that decays during the run."""
    arguments = [*SMALL, f"model={model}", "optimizer.lr_decay_after=1", "max_epochs=4"]
    bnrnn(*arguments, "outputs=whole")
    whole = only_run(tmp_path / "whole")
    steps = json.loads((whole / "run.json").read_text())["steps_per_epoch"]
    assert steps > 10
    for stop in (3, steps + 4, 2 * steps):
        bnrnn(*arguments, f"max_steps={stop}", "outputs=parts", "resume=auto")
        last = torch.load(only_run(tmp_path / "parts") / "last.pt", weights_only=True)
        assert [tuple(state.shape) for state in last["training"]["carry"]] == [(2, 4, 8)] * 2
    bnrnn(*arguments, "outputs=parts", "resume=auto")
    parts = only_run(tmp_path / "parts")
    trained = [[r for r in records(run) if r["split"] == "train"] for run in (parts, whole)]
    assert trained[0] == trained[1]
    assert len(trained[0]) == 4 * steps
    if model == "words_medium":  # the others are also calibrated at each stop
        ends = {3, steps + 4}
        assert [r for r in records(parts) if r["step"] not in ends] == [
            r for r in records(whole) if r["step"] not in ends
        ]
    a, b = (torch.load(run / "last.pt", weights_only=True) for run in (parts, whole))
    for name, value in a["model"].items():
        if "statistics" not in name:
            assert torch.equal(value, b["model"][name]), name
    for ours, theirs in zip(a["training"]["carry"], b["training"]["carry"], strict=True):
        assert torch.equal(ours, theirs)
    (group,) = a["training"]["optimizer"]["param_groups"]
    assert group["lr"] == json_settings(whole)["optimizer"]["lr_decay"] ** 3


def json_settings(run):
    return torch.load(run / "last.pt", weights_only=True)["config"]


def by_hand(weights, rows, epochs, length, rate, most):
    """Train with the equations of ptb_word_lm.py; return the weights after `epochs` epochs.

    weights: embedding, (W, U, b) of each layer, weight and bias of the head; rows: (B, words).
    """
    embedding, layers, head, shift = weights
    flat = [embedding, *(p for layer in layers for p in layer), head, shift]
    for epoch in range(epochs):
        states = [(torch.zeros(len(rows), layers[0][1].shape[1]).double(),) * 2 for _ in layers]
        for begin in range(0, rows.shape[1] - length, length):
            states = [(h.detach(), c.detach()) for h, c in states]
            total = torch.zeros(()).double()
            for t in range(begin, begin + length):
                x = embedding[rows[:, t]]
                for k, (w, u, b) in enumerate(layers):
                    h, c = states[k]
                    i, f, g, o = (x @ w.T + h @ u.T + b).chunk(4, 1)
                    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                    states[k] = x, _ = o.sigmoid() * c.tanh(), c
                logits = x @ head.T + shift
                chosen = logits[range(len(rows)), rows[:, t + 1]]
                total = total + (logits.logsumexp(1) - chosen).sum()
            gradients = torch.autograd.grad(total / len(rows), flat)
            norm = torch.sqrt(sum(g.square().sum() for g in gradients))
            with torch.no_grad():
                for p, g in zip(flat, gradients, strict=True):
                    p -= rate(epoch) * g * most / max(norm, most)
    return flat


def test_training_is_that_of_a_loop_by_hand(bnrnn, tmp_path, monkeypatch, data_dir):
    build = WordTask.build_model
    monkeypatch.setattr(WordTask, "build_model", lambda *settings: build(*settings).double())
    bnrnn(*SMALL, "model=words_small", "max_epochs=3", "optimizer.lr_decay_after=1",
          "optimizer.max_grad_norm=1", "model.init_range=0.5")  # fmt: skip
    trained = torch.load(only_run(tmp_path / "outputs") / "last.pt", weights_only=True)["model"]

    task = task_of(data_dir)
    torch.manual_seed(0)
    start = task.build_model(
        WordModelConfig(name="m", hidden_size=8, init_range=0.5), "auto"
    ).state_dict()
    names = [
        "embedding.weight",
        *(f"lstm.{p}_l{k}" for k in range(2) for p in ("weight_ih", "weight_hh", "bias")),
        "head.weight", "head.bias",
    ]  # fmt: skip
    assert set(names) == set(start)
    e, *inner, w, b = (start[name].clone().requires_grad_() for name in names)
    rows = torch.from_numpy(cut(task.corpus.train.astype(np.int64), 4))
    expected = by_hand(
        (e, (inner[:3], inner[3:]), w, b), rows, 3, 5, lambda epoch: 0.5 ** max(epoch, 0), 1.0
    )
    for name, value in zip(names, expected, strict=True):
        assert (value.detach() - start[name]).abs().max() > 1e-3
        # torch divides by the norm plus 1e-6 when it clips.
        torch.testing.assert_close(trained[name], value.detach(), rtol=1e-5, atol=1e-6)


def test_interrupted_by_a_signal_equals_uninterrupted(bnrnn, tmp_path, monkeypatch):
    arguments = [*SMALL, "model=words_small_bnlstm", "max_epochs=2"]
    bnrnn(*arguments, "outputs=whole")
    advance = train.Job.advance

    def stop_at(self, *values):
        advance(self, *values)
        if self.state.step in (7, 20):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(train.Job, "advance", stop_at)
        for _ in range(2):
            assert bnrnn(*arguments, "outputs=parts", "resume=auto", check=False).returncode == 143
    bnrnn(*arguments, "outputs=parts", "resume=auto")
    assert_same_run(only_run(tmp_path / "parts"), only_run(tmp_path / "whole"))


def test_the_last_model_is_tested_even_if_it_is_worse(bnrnn, tmp_path):
    bnrnn(*SMALL, "model=words_small", "optimizer.lr=20", "optimizer.max_grad_norm=1000",
          "optimizer.lr_decay=1", "max_epochs=3")  # fmt: skip
    run = only_run(tmp_path / "outputs")
    result = json.loads((run / "result.json").read_text())
    validations = {r["step"]: r["perplexity"] for r in records(run) if r["split"] == "valid"}
    assert result["best_step"] == result["steps"] == max(validations)
    assert validations[max(validations)] > min(validations.values())
    assert result["valid"]["perplexity"] == validations[max(validations)]


def test_both_kinds_of_statistics_are_validated(bnrnn, tmp_path):
    bnrnn(*SMALL, "model=words_small_bn_input", "max_epochs=1")
    found = records(only_run(tmp_path / "outputs"))
    kinds = [r["statistics"] for r in found if r["split"] == "valid"]
    assert kinds == ["population", "batch"]
    subject = json.loads((only_run(tmp_path / "outputs") / "run.json").read_text())
    assert (subject["data"], subject["data_title"]) == ("ptb_words", "Penn Treebank, words")
    assert subject["metric"] == {"name": "perplexity", "title": "perplexity", "decimals": 2,
                                 "lower_is_better": True, "unit": "", "factor": 1.0}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "part"),
    [
        # By default each once, because only the hash is checked.
        pytest.param(content, part, marks=[] if i == j else pytest.mark.slow)
        for i, content in enumerate([b"\xff\xfe not UTF-8", b" other words \n", b""])
        for j, part in enumerate(["train", "valid", "test"])
    ],
)
def test_a_wrong_file_is_one_line(bnrnn, data_dir, content, part):
    (data_dir / "ptb" / f"ptb.{part}.txt").write_bytes(content)
    done = bnrnn(*SMALL, "model=words_small", check=False)
    assert_error(done, 3, f"ptb.{part}.txt is not the expected file: sha256")


def test_another_vocabulary_is_one_line(bnrnn, tmp_path):
    bnrnn(*SMALL, "model=words_small", "max_steps=2")
    run = only_run(tmp_path / "outputs")
    for name in ("last.pt", "best.pt"):
        content = torch.load(run / name, weights_only=True)
        content["task"]["words"] = content["task"]["words"].replace("said", "spoke")
        torch.save(content, run / name)
    message = "trained on another vocabulary than the 13 words of Penn Treebank (words)"
    assert_error(bnrnn(f"resume={run}", "max_steps=3", check=False), 4, message)
    assert_error(bnrnn("mode=evaluate", f"run={run}", check=False), 4, message)


def test_a_carried_state_that_is_none_is_one_line(bnrnn, tmp_path):
    bnrnn(*SMALL, "model=words_small", "max_steps=2")
    run = only_run(tmp_path / "outputs")
    content = torch.load(run / "last.pt", weights_only=True)
    for carry in (
        7, [torch.zeros(2, 4, 8)] * 3, (torch.zeros(2, 4, 9), torch.zeros(2, 4, 8)), "h",
        (torch.zeros(2, 4, 8, dtype=torch.long),) * 2,
    ):  # fmt: skip
        content["training"]["carry"] = carry
        torch.save(content, run / "last.pt")
        done = bnrnn(f"resume={run}", "max_steps=3", check=False)
        assert_error(done, 4, "its carried state does not fit this model")


def test_a_task_without_a_carried_state_takes_none(data_dir):
    from bnrnn.tasks.base import Task

    with pytest.raises(CheckpointError, match="a carried state, which this task does not have"):
        Task.load_carry(task_of(data_dir), nn.Linear(1, 1), torch.zeros(1), data_dir)


@pytest.mark.parametrize(
    "models",
    [
        # By default, each kind of model and each size once.
        ["words_small_bnlstm", "words_medium_bn_input", "words_large"],
        pytest.param(
            [f"words_{s}{k}" for s in ZAREMBA for k in ("", "_bn_input", "_bnlstm")],
            marks=pytest.mark.slow,
        ),
    ],
    ids=len,
)
def test_every_word_model_in_the_command(bnrnn, tmp_path, models):
    bnrnn("-m", f"model={','.join(models)}", *SMALL, "max_steps=2")
    assert len(list(tmp_path.glob("outputs/ptb_words/*/*/result.json"))) == len(models)


# ---------------------------------------------------------------- the report


def make_words(folder, model, losses, finished=True, **kwargs):
    """Make a run of four steps per epoch; losses: (training of each step, validation) by epoch."""
    make_run(folder, model, [1.0], task="ptb_words", finished=finished, **kwargs)
    change(folder / "run.json", steps_per_epoch=4, total_steps=12, metric=vars(PERPLEXITY),
           data_title="Penn Treebank, words")  # fmt: skip
    lines = []
    for epoch, (trained, valid) in enumerate(losses, start=1):
        for k, nats in enumerate(trained):
            lines.append({"step": 4 * epoch - 3 + k, "split": "train", "cross_entropy": nats})
        for kind, value in (("population", valid), ("batch", valid - 1)):
            if kind == "population" or "bn" in model:
                lines.append({"step": 4 * epoch, "split": "valid", "statistics": kind,
                              "perplexity": value, "cross_entropy": math.log(value)})  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        change(folder / "result.json", test={"perplexity": 114.25}, valid={"perplexity": 120.0},
               steps=12, max_steps=12)  # fmt: skip


LOSSES = [
    ([6.0, 5.0, 5.0, 4.0], 180.0), ([4.0, 4.25, 4.5, 4.75], 120.0), ([4.0, 4.0, 3.5, 3.5], 125.5),
]  # fmt: skip


def test_table_2_and_figure_3(tmp_path):
    make_words(tmp_path / "a", "words_small", LOSSES)
    make_words(tmp_path / "b", "words_small_bn_input", LOSSES[:1], finished=False)
    make_words(tmp_path / "c", "words_large_bn_input", LOSSES, finished=False)
    make_run(tmp_path / "d", "bnlstm", [2.0])
    make_run(tmp_path / "e", "lstm", [2.0], task="pydocs")
    made = report.document(find(tmp_path), "Report", "All.", lambda run: run.path.name)
    assert [block.text for block in made if isinstance(block, Heading) and block.level == 2][
        :3
    ] == [
        "Recurrent Batch Normalization: Cooijmans et al., ICLR 2017",
        "Batch Normalized Recurrent Neural Networks: Laurent et al., 2016 (arXiv 2015)",
        "Other data",
    ]
    assert Heading(3, "Penn Treebank, words") in made
    figures = {block.name: block for block in made if isinstance(block, Figure)}
    small, large = figures["ptb_words-small"], figures["ptb_words-large"]
    assert "Wide and pale" not in small.caption  # the paper's figure has only the large network
    assert "Wide and pale: the paper, read off its figure." in large.caption
    assert all("One line per seed." in figure.caption for figure in (small, large))
    ticks = small.draw().axes[0].get_xticks()
    assert all(tick == round(tick) for tick in ticks)
    tables = [block for block in made if isinstance(block, Table)]
    (table,) = [t for t in tables if "Zaremba et al." in t.header]
    # At the epoch of the best validation with batch statistics; training perplexity is e^4.375.
    assert [list(row) for row in table.rows] == [
        ["Small LSTM", "-", "0", "2", "79.44", "78.5", "120.00", "119.2", "114.25", "114.5"],
        ["Small LSTM, BN on the input term, 33 % run", "-", "0", "1", "148.41", "62.5", "179.00",
         "120.9", "-", "-"],
        ["Large LSTM, BN on the input term, 100 % run", "-", "0", "2", "79.44", "35.0", "119.00",
         "97.4", "-", "-"],
    ]  # fmt: skip
    (result,) = [row for t in tables for row in t.rows if row[1] == "120.00 valid"]
    assert "119.2, table 2" in result
    (same,) = [t for t in tables if t.header[0] == "epoch"]
    assert [list(row) for row in same.rows] == [
        ["training, ours", "148.4", "79.4", "42.5"], ["training, the paper", "-", "154.3", "130.7"],
        ["validation, ours", "179.0", "119.0", "124.5"],
        ["validation, the paper", "162.9", "137.2", "121.1"],
    ]  # fmt: skip
    small, large = [b for b in made if isinstance(b, Figure) and b.name.startswith("ptb_words")]
    assert (small.name, large.name) == ("ptb_words-small", "ptb_words-large")
    (axes,) = large.draw().axes
    pale = [line.get_xydata().tolist() for line in axes.lines if line.get_alpha() == 0.3]
    assert pale == [[[2, 154.3], [3, 130.7]], [[0, 210.2], [1, 162.9], [2, 137.2], [3, 121.1]]]
    ours = [line.get_xydata().tolist() for line in axes.lines if line.get_alpha() is None]
    assert ours[0] == [[1, 179.0], [2, 119.0], [3, 124.5]]
    assert ours[2] == [[1, 180.0], [2, 120.0], [3, 125.5]]
    np.testing.assert_allclose(ours[1], [[1, math.exp(5)], [2, math.exp(4.375)],
                                         [3, math.exp(3.75)]])  # fmt: skip
    assert axes.get_ylim() == (0, 300)
    names = {block.name for block in made if isinstance(block, Figure)}
    assert names == {"ptb_words-small", "ptb_words-large", "ptb", "pydocs"}


def test_a_run_that_has_not_validated_and_a_strange_one_are_reported(tmp_path):
    make_words(tmp_path / "a", "words_small", [], finished=False)
    make_words(tmp_path / "b", "words_small_bnlstm", LOSSES, finished=False)
    change(tmp_path / "b" / "run.json", steps_per_epoch=0)
    make_words(tmp_path / "c", "words_medium", [([900.0], 1e305)], finished=False)
    make_words(tmp_path / "d", "words_large", LOSSES[:1], finished=False)
    change(tmp_path / "d" / "run.json", steps_per_epoch=16)  # a quarter of an epoch
    report.write_report(tmp_path, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| Small BN-LSTM, " in text
    assert (
        "| Large LSTM, 33 % run | - | 0 | 0.25 | 148.41 | 49.3 | 180.00 | 81.8 | - | 78.4 |" in text
    )
