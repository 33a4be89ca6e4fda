"""The question-answering task: batches, scores, commands and learning."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import bnrnn
from bnrnn.datasets import load_cnn, pad
from bnrnn.datasets.cnn.questions import format_question, parse_question
from bnrnn.nn.attentive_reader import VARIANTS, AttentiveReader
from bnrnn.settings.schema import AttentiveReaderConfig, QuestionConfig
from bnrnn.tasks import Batch, QuestionTask
from tests.conftest import DATA, QUESTIONS, missing_data, needs_data
from tests.question_corpora import baselines, four_sentence_items, question_corpus

SAMPLES = DATA / "cnn_qa"
SMALL = [
    "task=cnn4", "data.synthetic=300", "model.hidden_size=8", "threads=1", "task.batch_size=20",
    "calibration_batches=2", "test_calibration_batches=2", "max_valid_batches=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def task(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("BNRNN_CACHE_DIR", str(data_dir / "cache"))
    config = QuestionConfig(name="cnn4", four_sentences=True, batch_size=20)
    return QuestionTask(config, 3, data_dir, 300)


def test_a_batch_is_a_function_of_seed_epoch_and_index(task, data_dir):
    again = QuestionTask(task.config, 3, data_dir, 300)
    other = QuestionTask(task.config, 4, data_dir, 300)
    again.train_batch(0, 0)  # earlier calls change nothing
    ours, same, differs = (t.train_batch(2, 5) for t in (task, again, other))
    for a, b in zip((*ours.input, ours.target), (*same.input, same.target), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(ours.target, differs.target)


def test_an_epoch_has_every_question_at_most_once_and_validation_every_one(task):
    starts = [tuple(b.input[2][:3, k].tolist()) for b in task.valid_batches() for k in
              range(len(b.target))]  # fmt: skip
    assert len(starts) == len(task.corpus.valid)
    assert task.steps_per_epoch == len(task.corpus.train) // 20
    for index in range(task.steps_per_epoch):
        assert len(task.train_batch(0, index).target) == 20


def test_training_keeps_the_names_where_the_setting_says_so(task):
    plain = {tuple(task.corpus.train.passages[k]) for k in range(len(task.corpus.train))}
    task.config.relabel = "none"
    passage, lengths = task.train_batch(0, 0).input[:2]
    assert {tuple(passage[:n, k].tolist()) for k, n in enumerate(lengths)} <= plain


def test_training_renames_the_entities_and_validation_does_not(task):
    plain = {tuple(task.corpus.train.passages[k]) for k in range(len(task.corpus.train))}
    batch = task.train_batch(0, 0)
    passage, lengths = batch.input[:2]
    seen = {tuple(passage[:length, k].tolist()) for k, length in enumerate(lengths)}
    assert not seen & plain
    entities = set(task.corpus.entity_ids.tolist())

    def without_entities(rows):
        return {tuple(0 if k in entities else k for k in row) for row in rows}

    assert without_entities(seen) <= without_entities(plain)
    assert set(batch.target.tolist()) <= entities
    valid = {tuple(task.corpus.valid.passages[k]) for k in range(len(task.corpus.valid))}
    passage, lengths = task.valid_batches()[0].input[:2]
    assert tuple(passage[: lengths[0], 0].tolist()) in valid


def test_scores_over_the_vocabulary_and_over_the_named_entities(task):
    batch = task.valid_batches()[0]
    logits = torch.randn(len(batch.target), len(task.corpus.words))
    sums = task.loss(lambda *input: (logits, None), batch).sums
    entities = set(task.corpus.entity_ids.tolist())
    right = right_named = 0
    for k, answer in enumerate(batch.target.tolist()):
        right += int(logits[k].argmax()) == answer
        named = sorted(set(batch.input[0][: batch.input[1][k], k].tolist()) & entities)
        right_named += named[int(logits[k, named].argmax())] == answer
    n = len(batch.target)
    assert (sums["correct"], sums["correct_named"], sums["count"]) == (right, right_named, n)
    metrics = task.metrics(sums)
    assert metrics["error"] == 1 - right / n
    assert metrics["error_named"] == 1 - right_named / n
    nll = torch.nn.functional.cross_entropy(logits, batch.target).item()
    assert metrics["cross_entropy"] == pytest.approx(nll, rel=1e-5)


def test_a_passage_without_entities_is_not_answered(task):
    words = torch.full((4, 2), 5)
    assert 5 not in task.corpus.entity_ids
    lengths = torch.tensor([4, 3])
    batch = Batch((words, lengths, words, lengths), torch.from_numpy(task.corpus.entity_ids[:2]))
    logits = torch.zeros(2, len(task.corpus.words))
    logits[:, task.corpus.entity_ids[0]] = 1
    sums = task.loss(lambda *input: (logits, None), batch).sums
    assert (sums["correct"], sums["correct_named"]) == (1, 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_built_from_its_settings(task, variant):
    config = AttentiveReaderConfig(name=variant, hidden_size=6, **VARIANTS[variant])
    model = task.build_model(config, "auto")
    model.eval()
    batch = task.train_batch(0, 0)
    with torch.no_grad(), bnrnn.batch_statistics(model):
        assert model(*batch.input)[0].shape == (20, len(task.corpus.words))
        assert task.loss(model, batch).value.isfinite()


def test_train_resume_evaluate_and_answer(bnrnn_here, tmp_path):
    arguments = [*SMALL, "model=attentive_bne_star_star", "max_steps=4", "validate_every=2"]
    done = bnrnn_here(*arguments, "outputs=whole")
    assert done.returncode == 0, done.stderr
    assert bnrnn_here(*arguments, "max_steps=2", "outputs=parts").returncode == 0
    assert bnrnn_here(*arguments, "outputs=parts", "resume=auto").returncode == 0
    whole, parts = (next((tmp_path / f / "cnn4").glob("*/*")) for f in ("whole", "parts"))
    ours, theirs = (torch.load(run / "last.pt", weights_only=True) for run in (whole, parts))
    for name, value in ours["model"].items():
        assert torch.equal(value, theirs["model"][name]), name

    result = json.loads((whole / "result.json").read_text())
    assert result["kernel"] == "cpu"
    assert set(result["test"]) == {"error", "error_named", "cross_entropy"}
    assert 0 <= result["test"]["error_named"] <= result["test"]["error"] <= 1
    again = bnrnn_here("mode=evaluate", f"run={whole}")
    assert f"error {result['test']['error']:.4f}" in again.stdout

    text = SAMPLES / "questions" / "000021e9748578a514493c773809465c661a28d1.question"
    if reason := missing_data(QUESTIONS):
        pytest.skip(reason)
    answered = bnrnn_here("mode=answer", f"run={whole}", f"question={text}")
    assert answered.returncode == 0, answered.stderr
    assert "looked at:" in answered.stdout
    (folder,) = (whole / "answer").iterdir()
    assert (folder / "attention.png").stat().st_size > 10_000
    first = answered.stdout.splitlines()[0]
    assert first == " ".join(parse_question(text.read_bytes(), "q").question)

    for question, message in (
        (tmp_path / "missing", "No such file"),
        (whole / "config.yaml", "config.yaml"),
    ):
        failed = bnrnn_here("mode=answer", f"run={whole}", f"question={question}")
        assert failed.returncode == 3
        assert message in failed.stderr
        assert "Traceback" not in failed.stderr
    no_entity = parse_question(text.read_bytes(), "q")
    no_entity = no_entity._replace(passage=["nothing", "here", "."])
    (tmp_path / "none.question").write_text(format_question(no_entity))
    failed = bnrnn_here("mode=answer", f"run={whole}", f"question={tmp_path / 'none.question'}")
    assert failed.returncode == 3
    assert "names no entity" in failed.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task=cnn", "model=bnlstm"], "task=cnn takes model=attentive_…, not model=bnlstm"),
        (["task=ptb", "model=attentive_lstm"], "task=ptb takes model="),
        (["task=cnn", "model.num_layers=2"], "there is no setting 'model.num_layers'"),
        (["data.synthetic=100"], "task=pydocs takes no data.synthetic"),
        (
            ["task=cnn", "data.features=x.scp"],
            "task=cnn takes no data.features, only data.synthetic",
        ),
        (["task=cnn", "data.synthetic=-1"], "data.synthetic must be positive"),
        (["task=cnn", "task.relabel=all"], "task.relabel must be one of batch, none"),
        (["mode=answer"], "mode=answer needs a finished run"),
        (["question=x"], "question=FILE goes with mode=answer run=DIR"),
    ],
)
def test_wrong_settings(bnrnn_here, arguments, message):
    done = bnrnn_here(*arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_missing_data_say_what_to_put_where(bnrnn_here):
    done = bnrnn_here("task=cnn")
    assert done.returncode == 3
    assert "cnn.tgz" in done.stderr


def epochs(corpus, model, n, lr, seed=0):
    """Train on batches of 50 of the 200 items, then calibrate on them."""
    optimizer = torch.optim.Adam(model.parameters(), lr)
    order = np.random.default_rng(seed)

    def batch(chosen):
        passages, questions = (
            pad([rows[k] for k in chosen]) for rows in (corpus.train.passages,
                                                        corpus.train.questions)
        )  # fmt: skip
        return tuple(map(torch.from_numpy, (*passages, *questions))), corpus.train.answers[chosen]

    for _ in range(n):
        for chosen in np.array_split(order.permutation(200), 4):
            input, answers = batch(chosen)
            loss = torch.nn.functional.cross_entropy(model(*input)[0], torch.from_numpy(answers))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
            optimizer.step()
    bnrnn.calibrate(model, [batch(part)[0] for part in np.array_split(np.arange(200), 4)])
    model.eval()
    input, answers = batch(np.arange(200))
    with torch.no_grad():
        return (model(*input)[0].argmax(1).numpy() != answers).mean()


@pytest.mark.slow
@needs_data(QUESTIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_overfits_the_genuine_items(variant):
    items = four_sentence_items(SAMPLES / "four_sentence_sample.txt")
    corpus = question_corpus("the sample", items, items, items)
    model = AttentiveReader(
        vocabulary=len(corpus.words), hidden_size=64, dropout=0.0, **VARIANTS[variant]
    )
    # Otherwise the joint embedding saturates while it learns the frequency of the answers. Without
    # BN it hardly recovers: the loss has a plateau of thousands of steps.
    frequency = np.bincount(corpus.train.answers, minlength=len(corpus.words)) + 1e-2
    with torch.no_grad():
        model.output.bias.copy_(torch.from_numpy(np.log(frequency)))
    error = epochs(corpus, model, 100 if variant == "attentive_lstm" else 40, 2e-3)
    assert error < 0.05


RUNS = Path(__file__).parent.parent / "results" / "runs"


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variants_run_beats_the_baselines_on_held_out_questions(variant, tmp_path):
    """Compare the runs in results/ with guesses that do not combine question and passage.

    Both are scored on the same questions.
    """
    run = RUNS / f"cnn4-synthetic-{variant}-seed0"
    config = yaml.safe_load((run / "config.yaml").read_text())
    result = json.loads((run / "result.json").read_text())
    corpus = load_cnn(tmp_path, four_sentences=True, synthetic=config["data"]["synthetic"])
    guesses = baselines(corpus, "test")
    accuracy = 1 - result["test"]["error"]
    assert accuracy > 2 * max(guesses["frequent"], guesses["question"])
    assert accuracy > guesses["frequent_other"]
