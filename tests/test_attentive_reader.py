"""`AttentiveReader` and `FeatureNorm`: comparison with equations in NumPy, and conventions."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from bnrnn import BNLSTM, batch_statistics, calibrate
from bnrnn.nn.attentive_reader import VARIANTS, AttentiveReader
from bnrnn.nn.feature_norm import FeatureNorm
from bnrnn.nn.statistics import StepStatistics
from tests.accuracy import assert_as_accurate
from tests.equations import bn, bn_lstm

pytestmark = pytest.mark.numeric
T, Q, B, H, V = 7, 5, 4, 3, 11
# Two rows reach the last step, so that every step has a variance.
PASSAGE_LENGTHS = torch.tensor([7, 3, 7, 1])
QUESTION_LENGTHS = torch.tensor([2, 5, 1, 5])
BOTH_NORMALIZED = ["attentive_bne_star", "attentive_bne_star_star"]
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def make(variant, init_parameters=True, **kwargs):
    defaults = {"vocabulary": V, "hidden_size": H, "dropout": 0.0, "dtype": torch.float64}
    reader = AttentiveReader(**{**defaults, **VARIANTS[variant], **kwargs})
    if init_parameters:
        with torch.no_grad():
            for parameter in trained(reader):
                parameter.normal_(0, 0.7)
    return reader


def trained(reader):
    return [parameter for parameter in reader.parameters() if parameter.requires_grad]


def batch():
    passage, question = torch.randint(V, (T, B)), torch.randint(V, (Q, B))
    return passage, PASSAGE_LENGTHS, question, QUESTION_LENGTHS


def other_padding(words, lengths):
    padding = torch.arange(len(words))[:, None] >= lengths
    return torch.where(padding, (words + 1) % V, words)


# The equations are from section 5.4 of the paper and a description of the authors' code.


def backwards(x, lengths):
    y = x.copy()
    for row, length in enumerate(lengths):
        y[:length, row] = x[:length, row][::-1]
    return y


def encode(w, prefix, words, lengths, settings, population, seen):
    """States (T, B, c) and last states (B, c); the moments are added to `seen`."""
    x = w["embedding.weight"][words]
    x[np.arange(len(words))[:, None] >= lengths] = 0
    norms = {"ih": settings["input_norm"], "hh": settings["recurrent_norm"]}
    norms["c"] = settings["cell_norm"]
    outputs, last = [], []
    for direction, suffix in enumerate(["_l0", "_l0_reverse"][: 1 + settings["bidirectional"]]):
        weights = {
            name.removeprefix(prefix + ".").removesuffix(suffix): value
            for name, value in w.items()
            if name.startswith(prefix + ".") and name.endswith(suffix)
        }
        learned = w.get(prefix + ".initial_hidden", np.zeros((2, H)))
        h_0 = np.tile(learned[direction], (len(lengths), 1))
        keys = {term: f"{prefix}.statistics.{term}{suffix}" for term in norms}
        given = None
        if population is not None:
            given = {term: population.get(key) for term, key in keys.items()}
        output, h_n, _, moments = bn_lstm(
            backwards(x, lengths) if direction else x, h_0, np.zeros_like(h_0), weights, norms,
            population=given, lengths=lengths, count_padding=settings["count_padding"],
            sequence_eps=settings["sequence_eps"],
        )  # fmt: skip
        for term, key in keys.items():
            if moments[term][0]:
                seen[key] = tuple(np.stack(part) for part in moments[term])
        outputs.append(backwards(output, lengths) if direction else output)
        last.append(h_n)
    return np.concatenate(outputs, axis=2), np.concatenate(last, axis=1)


def equations(reader, passage, passage_lengths, question, question_lengths, population=None, **kw):
    """Logits (B, V), attention (T, B), and all moments by the name of their statistics."""
    w = {name: value.detach().numpy() for name, value in reader.named_parameters()}
    settings = {
        "count_padding": True, "mask_attention_statistics": True, "similarity": True,
        "mean_passage": True, "sequence_eps": None, **kw,
    }  # fmt: skip
    passage, lengths = passage.numpy(), passage_lengths.numpy()
    steps, rows = passage.shape
    seen = {}
    d, d_last = encode(w, "passage_encoder", passage, lengths, settings, population, seen)
    _, u = encode(
        w, "question_encoder", question.numpy(), question_lengths.numpy(), settings, population,
        seen,
    )  # fmt: skip

    def term(name, y, counted):
        """W y with its bias or BN; batch statistics are over the vectors in `counted`."""
        matrix = w[name + ".linear.weight"]
        if not settings["attention_norm"]:
            return matrix @ y + w.get(name + ".linear.bias", 0)
        key = name + ".norm.statistics"
        if population is None:
            terms = np.array([matrix @ vector for vector in counted])
            seen[key] = (terms.mean(0)[None], terms.var(0)[None])
        mean, var = (population or seen)[key]
        gamma, beta = w[name + ".norm.gamma"], w.get(name + ".norm.beta", 0)
        return bn(matrix @ y, gamma, beta, mean[0], var[0], 1e-5)

    if settings["mask_attention_statistics"]:
        counted = [d[t, b] for b in range(rows) for t in range(lengths[b])]
    else:
        carried = d_last.copy()
        carried[:, H:] = 0
        counted = [
            d[t, b] if t < lengths[b] else carried[b] for b in range(rows) for t in range(steps)
        ]
    attention = np.zeros((steps, rows))
    r, mean_d = np.zeros_like(u), np.zeros_like(u)
    for b in range(rows):
        exp_e = []
        for t in range(lengths[b]):
            s = 0.0
            if settings["similarity"]:
                s = (d[t, b] @ w["bilinear"]) @ (u[b] @ w["bilinear"])
            m = np.tanh(
                term("attention_passage", d[t, b], counted)
                + term("attention_question", u[b], u)
                + s
            )
            exp_e.append(np.exp(w["attention_score.weight"][0] @ m))
        attention[: lengths[b], b] = np.array(exp_e) / sum(exp_e)
        r[b] = sum(attention[t, b] * d[t, b] for t in range(lengths[b]))
        mean_d[b] = sum(d[t, b] for t in range(lengths[b])) / lengths[b]
    logits = []
    for b in range(rows):
        g = term("joint_attended", r[b], r) + term("joint_question", u[b], u)
        if settings["mean_passage"]:
            g = g + term("joint_mean", mean_d[b], mean_d)
        logits.append(w["output.weight"] @ np.tanh(g) + w["output.bias"])
    return np.array(logits), attention, seen


SWITCHES = [
    {},
    {"count_padding": False},
    {"mask_attention_statistics": False},
    {"similarity": False, "mean_passage": False},
    {"sequence_eps": 0.1},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: ",".join(s) or "default")
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_equations_in_training_and_in_evaluation(variant, switches):
    reader = make(variant, **switches)
    settings = VARIANTS[variant] | switches
    first, second, third = batch(), batch(), batch()
    moments = []
    for data in (first, second):
        logits, attention = reader(*data)
        expected_logits, expected_attention, seen = equations(reader, *data, **settings)
        np.testing.assert_allclose(logits.detach().numpy(), expected_logits, **CLOSE)
        np.testing.assert_allclose(attention.detach().numpy(), expected_attention, **CLOSE)
        moments.append(seen)

    # Population statistics: plain averages over minibatches, with a row per step.
    population = {
        key: tuple(np.mean([seen[key][part] for seen in moments], axis=0) for part in (0, 1))
        for key in moments[0]
    }
    calibrate(reader, [first, second])
    reader.eval()
    logits, attention = reader(*third)
    expected_logits, expected_attention, _ = equations(reader, *third, population, **settings)
    np.testing.assert_allclose(logits.detach().numpy(), expected_logits, **CLOSE)
    np.testing.assert_allclose(attention.detach().numpy(), expected_attention, **CLOSE)
    statistics = dict(reader.named_modules())
    for key, (mean, var) in population.items():
        np.testing.assert_allclose(statistics[key].mean.numpy(), mean, **CLOSE)
        np.testing.assert_allclose(statistics[key].var.numpy(), var, **CLOSE)


# For each variant: the encoders' input, recurrent and cell norms, attention norm, directions.
TABLE = {
    "attentive_lstm": (None, None, None, False, 1),
    "attentive_bnlstm": ("frame", "frame", "frame", False, 1),
    "attentive_bn_everywhere": ("frame", "frame", "frame", True, 1),
    "attentive_bne_star": ("sequence", "frame", "frame", True, 1),
    "attentive_bne_star_star": ("sequence", "frame", "frame", True, 2),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_normalizes_the_terms_of_the_table(variant):
    assert list(VARIANTS) == list(TABLE)
    reader = make(variant)
    reader(*batch())
    found = {
        name: len(module.mean)
        for name, module in reader.named_modules()
        if isinstance(module, StepStatistics)
    }

    # Compare the numbers of rows: one per step, or a single one.
    *encoder_kinds, attention, directions = TABLE[variant]
    expected = {}
    for encoder, steps in (("passage_encoder", T), ("question_encoder", Q)):
        for suffix in ("_l0", "_l0_reverse")[:directions]:
            for term, kind in zip(("ih", "hh", "c"), encoder_kinds, strict=True):
                if kind is not None:
                    rows = steps if kind == "frame" else 1
                    expected[f"{encoder}.statistics.{term}{suffix}"] = rows
    if attention:
        for term in ("attention_passage", "attention_question"):
            expected[term + ".norm.statistics"] = 1
        for term in ("joint_attended", "joint_question", "joint_mean"):
            expected[term + ".norm.statistics"] = 1
    assert found == expected

    # β replaces the bias of the plain model.
    parameters = dict(reader.named_parameters())
    for term in ("attention_passage", "joint_question"):
        assert (term + ".norm.beta" in parameters) == attention
        assert (term + ".linear.bias" in parameters) != attention
    for term in ("attention_question", "joint_attended", "joint_mean"):
        assert term + ".norm.beta" not in parameters
        assert term + ".linear.bias" not in parameters


@pytest.mark.numeric(repeat=False)  # errors of finite differences are far above rounding
@pytest.mark.parametrize(
    ("variant", "fast"),
    [  # By default: the whole Jacobian of the small model, products with that of the large one.
        ("attentive_lstm", False), ("attentive_bne_star_star", True),
        pytest.param("attentive_bne_star_star", False, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_gradients(variant, fast):
    size = {"vocabulary": 5, "hidden_size": 2, "kernel": "reference"}
    reader = make(variant, **size, mask_attention_statistics=False)
    passage, question = torch.randint(5, (3, 3)), torch.randint(5, (2, 3))
    lengths = torch.tensor([3, 2, 3]), torch.tensor([1, 2, 2])
    parameters = {n: p for n, p in reader.named_parameters() if p.requires_grad}

    def run(*values):
        call = (passage, lengths[0], question, lengths[1])
        state = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(reader, state, call)

    assert torch.autograd.gradcheck(run, tuple(parameters.values()), fast_mode=fast)
    logits, _ = reader(passage, lengths[0], question, lengths[1])
    logits.square().sum().backward()
    assert {n for n, p in parameters.items() if p.grad is None or not p.grad.any()} == set()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_depends_on_neither_its_padding_nor_its_neighbours_in_evaluation(variant):
    reader = make(variant)
    calibrate(reader, [batch(), batch()])
    reader.eval()
    passage, lengths, question, question_lengths = batch()
    logits, attention = reader(passage, lengths, question, question_lengths)
    longer_passage = torch.cat([passage, torch.randint(V, (3, B))])
    longer_question = torch.cat([question, torch.randint(V, (2, B))])
    padded = reader(
        other_padding(longer_passage, lengths), lengths,
        other_padding(longer_question, question_lengths), question_lengths,
    )  # fmt: skip
    torch.testing.assert_close(padded[0], logits, **CLOSE)
    torch.testing.assert_close(padded[1][:T], attention, **CLOSE)
    assert not padded[1][T:].any()
    # Compare with each row alone and unpadded, so that reversal must have left padding out.
    for b in range(B):
        n, m = int(lengths[b]), int(question_lengths[b])
        alone = reader(passage[:n, [b]], lengths[[b]], question[:m, [b]], question_lengths[[b]])
        torch.testing.assert_close(alone[0], logits[[b]], **CLOSE)
        torch.testing.assert_close(alone[1], attention[:n, [b]], **CLOSE)


@pytest.mark.parametrize("count_padding", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_fills_the_padding_changes_nothing_in_training(variant, count_padding):
    reader = make(variant, count_padding=count_padding)
    passage, lengths, question, question_lengths = batch()
    results, gradients = [], []
    for fill in (lambda words, _: words, other_padding):
        data = fill(passage, lengths), lengths, fill(question, question_lengths), question_lengths
        logits, attention = reader(*data)
        reader.zero_grad()
        logits.square().sum().backward()
        results.append((logits, attention))
        gradients.append(reader.embedding.weight.grad.clone())
    torch.testing.assert_close(results[1], results[0], **CLOSE)
    torch.testing.assert_close(gradients[1], gradients[0], **CLOSE)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("variant", BOTH_NORMALIZED)
def test_how_much_padding_there_is_matters_where_it_counts_in_the_attention(variant, masked):
    reader = make(variant, mask_attention_statistics=masked)
    passage, *others = batch()
    logits, _ = reader(passage, *others)
    longer, _ = reader(torch.cat([passage, passage]), *others)
    assert torch.allclose(longer, logits, **CLOSE) == masked


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_adds_up_to_one_over_the_words(variant):
    _, attention = make(variant)(*batch())
    padding = torch.arange(T)[:, None] >= PASSAGE_LENGTHS
    assert (attention[~padding] > 0).all()
    assert not attention[padding].any()
    torch.testing.assert_close(attention.sum(0), torch.ones(B, dtype=torch.float64))


def test_statistics_obey_batch_statistics_calibration_and_checkpoints():
    reader, data = make("attentive_bne_star_star"), batch()
    reader.eval()
    with pytest.raises(RuntimeError, match="no population statistics"):
        reader(*data)
    reader.train()
    in_training, _ = reader(*data)
    reader.eval()
    before = copy.deepcopy(reader.state_dict())
    with batch_statistics(reader):
        assert torch.equal(reader(*data)[0], in_training)
    for name, value in reader.state_dict().items():
        assert torch.equal(value, before[name]), name

    calibrate(reader, [data, batch(), batch()])
    assert not reader.training
    for module in reader.modules():
        if isinstance(module, StepStatistics):
            assert (module.num_batches == 3).all()
    evaluated, _ = reader(*data)
    assert not torch.allclose(evaluated, in_training)
    fresh = make("attentive_bne_star_star").eval()
    fresh.load_state_dict(reader.state_dict())
    assert torch.equal(fresh(*data)[0], evaluated)


@pytest.mark.parametrize("variant", VARIANTS)
def test_kernels_agree_in_values_and_gradients(variant):
    readers = [make(variant, kernel=kernel) for kernel in ("reference", "cpu")]
    readers[1].load_state_dict(readers[0].state_dict())
    data = batch()
    results = [reader(*data) for reader in readers]
    torch.testing.assert_close(results[0], results[1], **CLOSE)
    for logits, attention in results:
        (logits.square().sum() + attention.square().sum()).backward()
    gradients = [torch.cat([p.grad.flatten() for p in trained(reader)]) for reader in readers]
    atol = 1e-11 * float(gradients[0].abs().max())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=atol)


def test_dropout_is_on_word_vectors_and_g_and_only_in_training():
    reader = make("attentive_lstm", dropout=0.5)
    seen = {}
    reader.passage_encoder.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    reader.output.register_forward_pre_hook(lambda _, args: seen.update(g=args[0]))
    passage, question = torch.randint(V, (50, 40)), torch.randint(V, (2, 40))
    data = passage, torch.full((40,), 50), question, torch.full((40,), 2)
    reader(*data)
    dropped = seen["x"] == 0
    assert 0.45 < dropped.double().mean() < 0.55  # 6,000 elements
    torch.testing.assert_close(
        seen["x"], torch.where(dropped, 0, 2 * reader.embedding.weight[passage])
    )
    assert 0.3 < (seen["g"] == 0).double().mean() < 0.7  # 120 elements
    assert not torch.equal(reader(*data)[0], reader(*data)[0])
    reader.eval()
    assert torch.equal(reader(*data)[0], reader(*data)[0])
    torch.testing.assert_close(seen["x"], reader.embedding.weight[passage])
    assert (seen["g"] != 0).all()


@pytest.mark.parametrize("bidirectional", [False, True])
def test_official_initialization(bidirectional):
    kwargs = {"init": "official_code", "bidirectional": bidirectional}
    reader = make("attentive_bn_everywhere", init_parameters=False, **kwargs)
    c = 2 * H if bidirectional else H
    small = [reader.bilinear]
    for encoder in (reader.passage_encoder, reader.question_encoder):
        for name, parameter in encoder.named_parameters():
            if name.startswith("weight"):
                small += parameter.chunk(4)
    assert len(small) == 1 + 2 * 2 * 4 * (1 + bidirectional)
    uniform = [
        getattr(reader, name).linear.weight
        for name in ("attention_question", "joint_attended", "joint_question", "joint_mean")
    ]
    (uniform if bidirectional else small).append(reader.attention_passage.linear.weight)
    for matrix in small:
        values = torch.linalg.svdvals(matrix.detach())
        torch.testing.assert_close(values, torch.full_like(values, 0.05))
    for matrix in small[1:]:
        assert torch.equal(matrix, small[1])
    if not bidirectional:
        assert torch.equal(reader.bilinear, small[1].t())  # it multiplies from the other side
    uniform_bound = (6 / (c + H + 1)) ** 0.5
    first = np.random.RandomState(123).uniform(-1, 1, (c, H)).T * uniform_bound
    for matrix in uniform:
        np.testing.assert_allclose(matrix.detach().numpy(), first, rtol=1e-12)
    for matrix in (reader.embedding.weight, reader.output.weight):
        bound = (6 / (V + H + 1)) ** 0.5
        assert 0.8 * bound < matrix.abs().max() <= bound
    assert 0 < reader.attention_score.weight.abs().max() <= H**-0.5
    assert not reader.output.bias.any()
    assert not reader.attention_passage.norm.beta.any()
    assert not reader.passage_encoder.bias_l0.any()
    assert (reader.joint_mean.norm.gamma == 0.1).all()


def test_sound_initialization():
    reader = make("attentive_lstm", init_parameters=False, forget_bias=1.0)
    eye = torch.eye(H, dtype=torch.float64)
    for matrix in (
        reader.bilinear, reader.attention_passage.linear.weight, reader.joint_mean.linear.weight,
        reader.output.weight, reader.passage_encoder.weight_hh_l0,
    ):  # fmt: skip
        torch.testing.assert_close(matrix.t() @ matrix, eye)
    assert not torch.equal(
        reader.passage_encoder.weight_hh_l0, reader.question_encoder.weight_hh_l0
    )
    assert reader.passage_encoder.bias_l0.tolist() == [0] * H + [1] * H + [0] * 2 * H
    assert not reader.joint_question.linear.bias.any()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_construction_in_half_precision(variant, dtype):
    reader = AttentiveReader(vocabulary=11, hidden_size=6, dtype=dtype, **VARIANTS[variant])
    assert {parameter.dtype for parameter in reader.parameters()} == {dtype}
    assert all(parameter.isfinite().all() for parameter in reader.parameters())


def test_the_initial_hidden_state_is_learned_and_the_cell_stays_zero():
    reader = make("attentive_lstm")
    reader(*batch())[0].sum().backward()
    for encoder in (reader.passage_encoder, reader.question_encoder):
        assert encoder.initial_hidden.grad.any()
        assert encoder.initial_cell.grad is None
        assert not encoder.initial_cell.any()
    for without in (make("attentive_lstm", learned_state=False), make("attentive_bnlstm")):
        assert not any("initial" in name for name, _ in without.named_parameters())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"vocabulary": 0}, "vocabulary must be positive, got 0"),
        ({"hidden_size": 0}, "hidden_size must be positive"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"init": "xavier"}, "init must be one of sound, official_code, got 'xavier'"),
        ({"input_norm": "group"}, "input_norm must be one of none, frame, sequence, layer"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"sequence_eps": 0.0}, "sequence_eps must be positive, got 0.0"),
        ({"kernel": "fpga"}, "kernel must be one of auto, scan, torch.lstm"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make("attentive_lstm", **kwargs)


def test_bad_input():
    reader = make("attentive_bn_everywhere")
    passage, lengths, question, question_lengths = batch()
    for arguments, message in (
        ((passage.float(), lengths, question, question_lengths), "passage must be .* int64"),
        ((passage, lengths, question[:, 0], question_lengths), "question must be"),
        ((passage, lengths[:2], question, question_lengths), r"passage_lengths must be \(4,\)"),
        ((passage, lengths, question, lengths), r"question_lengths must be in 1\.\.5"),
        ((passage, 0 * lengths, question, question_lengths), r"passage_lengths must be in 1\.\.7"),
        ((passage, lengths, question[:, :2], question_lengths[:2]), "4 passages, but 2 questions"),
        (
            (passage[:, :1], lengths[:1], question[:, :1], question_lengths[:1]),
            "a batch of one sequence has no per-step batch statistics",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            reader(*arguments)
    with pytest.raises(IndexError):
        reader(passage + V, lengths, question, question_lengths)


# FeatureNorm on its own.


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("beta", [False, True])
def test_feature_norm_is_its_equation(masked, beta):
    norm = FeatureNorm(3, beta=beta, eps=0.01).double()
    nn.init.normal_(norm.gamma)
    if beta:
        nn.init.normal_(norm.beta)
    y = torch.randn(6, 5, 3, dtype=torch.float64) + 4
    mask = torch.rand(6, 5) < 0.6 if masked else None
    counted = (y[mask] if masked else y.reshape(-1, 3)).numpy()
    expected = bn(
        y.numpy(), norm.gamma.detach().numpy(), norm.beta.detach().numpy() if beta else 0,
        counted.mean(0), counted.var(0), 0.01,
    )  # fmt: skip
    np.testing.assert_allclose(norm(y, mask).detach().numpy(), expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(norm.statistics.mean, y.new_tensor(counted.mean(0)[None]))
    torch.testing.assert_close(norm.statistics.var, y.new_tensor(counted.var(0)[None]))
    # After one batch, the population statistics are those of the batch.
    np.testing.assert_allclose(norm.eval()(y).detach().numpy(), expected, rtol=1e-9, atol=1e-11)


def test_feature_norm_keeps_nan_outside_the_mask_out_of_its_statistics():
    norm = FeatureNorm(2)
    y, mask = torch.randn(4, 2), torch.tensor([True, True, False, True])
    expected = norm(y, mask)
    y[2] = torch.nan
    out = norm(y, mask)
    assert torch.equal(out[mask], expected[mask])
    assert out[2].isnan().all()
    assert torch.isfinite(norm.statistics.mean).all()
    assert torch.isfinite(norm.statistics.var).all()


def test_feature_norm_averages_over_batches_and_by_momentum():
    def by_the_module(data):
        norm = FeatureNorm(2, momentum=0.5).to(data[0].dtype)
        for y in data:
            norm(y)
        running = norm.statistics.mean.clone()
        calibrate(norm, data)
        return running, norm.statistics.mean, norm.statistics.var

    def by_hand(data):
        means = [y.mean(0, keepdim=True) for y in data]
        running = means[0] / 8 + means[1] / 8 + means[2] / 4 + means[3] / 2
        variances = torch.stack([y.var(0, correction=0, keepdim=True) for y in data])
        return running, torch.stack(means).mean(0), variances.mean(0)

    data = [torch.randn(5, 2) * (k + 1) for k in range(4)]
    assert_as_accurate(by_the_module, by_hand, data)


def test_feature_norm_gradients():
    norm = FeatureNorm(2, beta=True).double()
    y = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(4, 3) < 0.6

    def run(y, gamma, beta):
        return torch.func.functional_call(norm, {"gamma": gamma, "beta": beta}, (y, mask))

    assert torch.autograd.gradcheck(run, (y, norm.gamma, norm.beta))


def test_feature_norm_refuses_what_it_cannot_do():
    norm = FeatureNorm(2)
    with pytest.raises(RuntimeError, match="no population statistics"):
        FeatureNorm(2).eval()(torch.randn(4, 2))
    for arguments, message in (
        ((torch.randn(4, 3),), r"y must be \(\.\.\., 2\)"),
        ((torch.randn(1, 2),), "at least two vectors, got 1"),
        ((torch.randn(4, 2), torch.zeros(4, dtype=torch.bool)), "at least two vectors, got 0"),
        ((torch.randn(4, 2), torch.ones(3, dtype=torch.bool)), r"booleans of shape \(4,\)"),
        ((torch.randn(4, 2), torch.ones(4)), r"booleans of shape \(4,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            norm(*arguments)
    assert norm.statistics.num_batches.tolist() == [0]
    for kwargs, message in (
        ({"features": 0}, "features must be at least 1"),
        ({"features": 2, "eps": 0.0}, "eps must be positive"),
        ({"features": 2, "momentum": 0.0}, "momentum must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            FeatureNorm(**kwargs)


def test_both_encoders_have_their_own_statistics_and_gains():
    reader = make("attentive_bne_star")
    encoders = [module for module in reader.modules() if isinstance(module, BNLSTM)]
    assert len(encoders) == 2
    assert encoders[0].gamma_hh_l0 is not encoders[1].gamma_hh_l0
    assert encoders[0].statistics["hh_l0"] is not encoders[1].statistics["hh_l0"]
