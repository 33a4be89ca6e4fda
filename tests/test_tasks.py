"""Batches, permutations, metrics and test protocol of the tasks."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bnrnn import calibrate
from bnrnn.datasets import MNIST, even_batches
from bnrnn.errors import CheckpointError, DataError
from bnrnn.settings.schema import CharacterConfig, ModelConfig, PixelConfig
from bnrnn.tasks import CharacterTask, PixelTask
from bnrnn.tasks.base import IGNORED, classify
from bnrnn.tasks.pixels import checksum, pixel_order
from tests.accuracy import assert_rounded

NORMALIZED = {"input_norm": "frame", "recurrent_norm": "frame", "cell_norm": "frame"}


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.setenv("BNRNN_CACHE_DIR", str(tmp_path))
    path = tmp_path / "text.txt"
    letters = np.random.default_rng(0).integers(97, 123, 4000, dtype=np.uint8)
    path.write_bytes(letters.tobytes())
    return CharacterConfig(
        name="text", corpus="text", path=str(path), length=10, batch_size=8, stream_length=50
    )


@pytest.fixture
def pixels(monkeypatch):
    rng = np.random.default_rng(0)
    parts = [
        part
        for n in (60, 30, 30)
        for part in (rng.integers(0, 256, (n, 784), dtype=np.uint8), rng.integers(0, 10, n))
    ]
    monkeypatch.setattr("bnrnn.tasks.pixels.load_mnist", lambda data_dir: MNIST(*parts))
    return PixelConfig(name="pmnist", batch_size=10, permutation="true")


def test_an_epoch_is_disjoint_sequences_at_one_random_offset(text):
    task = CharacterTask(text, seed=0, data_dir=Path())
    train, length = task.corpus.train, text.length
    offsets = set()
    for epoch in range(5):
        rows = []
        for index in range(task.steps_per_epoch):
            batch = task.train_batch(epoch, index)
            assert batch.input.shape == batch.target.shape == (length - 1, text.batch_size)
            assert torch.equal(batch.input[1:], batch.target[:-1])  # targets: inputs one step later
            rows += [*torch.cat([batch.input, batch.target[-1:]]).t().tolist()]
        cut = [train[k : k + length].tolist() for k in range(len(train) - length + 1)]
        starts = [cut.index(row) for row in rows]
        assert len({start % length for start in starts}) == 1
        assert len(set(starts)) == len(starts)
        assert starts != sorted(starts)
        offsets.add(starts[0] % length)
    assert len(offsets) > 1


def test_a_batch_is_a_function_of_seed_epoch_and_index(text):
    one, same, other = (CharacterTask(text, seed, Path()) for seed in (0, 0, 1))
    one.train_batch(3, 1)  # calls are independent
    assert torch.equal(one.train_batch(1, 2).input, same.train_batch(1, 2).input)
    assert not torch.equal(one.train_batch(1, 2).input, other.train_batch(1, 2).input)
    assert not torch.equal(one.train_batch(1, 2).input, one.train_batch(2, 2).input)


@pytest.mark.numeric
@pytest.mark.parametrize("piece", [7, 50, 10_000])
@pytest.mark.parametrize("norms", [{}, NORMALIZED])
def test_the_test_string_is_one_sequence_regardless_of_the_piece(text, piece, norms):
    text.stream_length = piece
    task = CharacterTask(text, 0, Path())
    model = task.build_model(ModelConfig(name="m", hidden_size=6, **norms), "auto").double()
    if norms:
        calibrate(model, task.calibration_batches(5), lambda b: model(b.input))
    model.eval()
    found = task.test(model, torch.device("cpu"), lambda items: items)

    characters = torch.from_numpy(task.corpus.test.astype(np.int64))[:, None]
    with torch.no_grad():
        logits, _ = model(characters[:-1])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), characters[1:].flatten())
    assert found["bpc"] == pytest.approx(float(expected) / np.log(2), rel=1e-9)


def test_bits_per_character_of_a_uniform_guess(text):
    task = CharacterTask(text, 0, Path())
    loss = classify(torch.zeros(5, 3, 32), torch.zeros(5, 3, dtype=torch.long))
    assert task.metrics(loss.sums)["bpc"] == pytest.approx(5.0)
    assert loss.value.item() == pytest.approx(5.0 * np.log(2))


@pytest.mark.numeric
def test_sums_of_uneven_batches_add_up_exactly():
    logits, target = torch.randn(10, 4), torch.randint(4, (10,))
    whole = classify(logits, target).sums
    parts = [classify(logits[part], target[part]).sums for part in (slice(0, 7), slice(7, 10))]
    assert sum(p["nll"] for p in parts) == pytest.approx(whole["nll"], rel=1e-12)
    for key in ("correct", "count"):
        assert sum(p[key] for p in parts) == whole[key]


def test_the_loss_and_its_gradient_are_those_of_torch_bit_for_bit():
    logits, target = torch.randn(33, 7, 50, requires_grad=True), torch.randint(50, (33, 7))
    (ours,) = torch.autograd.grad(classify(logits, target).value, logits)
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
    assert torch.equal(ours, torch.autograd.grad(theirs, logits)[0])


def test_padding_is_never_a_target():
    logits, target = torch.randn(6, 4, dtype=torch.float64), torch.randint(4, (6,))
    padded = torch.cat([target, torch.full((3,), IGNORED)])
    found = classify(torch.cat([logits, torch.full((3, 4), 7.0)]), padded)
    expected = classify(logits, target)
    assert found.sums == expected.sums
    assert found.value.item() == pytest.approx(expected.value.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("n", "size"),
    [(10, 10), (11, 10), (101, 10), (3964, 64), (3, 2), (5, 2), (2, 2), (4, 3), (2, 9)],
)
def test_even_batches_cover_all_and_none_is_tiny(n, size):
    parts = even_batches(n, size)
    assert [k for part in parts for k in range(n)[part]] == list(range(n))
    sizes = [part.stop - part.start for part in parts]
    assert 2 <= min(sizes) <= max(sizes) <= max(size, 3)
    assert max(sizes) - min(sizes) <= 1


def test_a_true_permutation_is_one_and_depends_on_its_seed():
    order = pixel_order("true", 0)
    assert sorted(order) == list(range(784))
    assert not np.array_equal(order, pixel_order("true", 1))
    assert np.array_equal(order, pixel_order("true", 0))
    assert checksum(order) == "fe62e3fef305"  # the same on every machine and in every version


def test_the_authors_map_draws_with_replacement():
    order = pixel_order("official_code", 5)
    assert len(set(order)) == 501  # counted in the authors' code with its seed, 1
    np.random.seed(1)
    assert np.array_equal(order, np.random.randint(0, 784, size=(784,)))


def test_pixels_come_in_the_order_of_the_permutation(pixels):
    task = PixelTask(pixels, 0, Path())
    (first, *_) = task.valid_batches()
    assert first.input.shape == (784, 10, 1)
    expected = task.data.valid_images[:10][:, task.order].T / 255
    assert_rounded(first.input[..., 0], torch.from_numpy(expected), operations=1)
    seen = torch.cat([task.train_batch(0, k).target for k in range(task.steps_per_epoch)])
    assert sorted(seen.tolist()) == sorted(task.data.train_labels.tolist())


def test_a_batch_beyond_the_data_is_one_line(pixels):
    pixels.batch_size = 61
    with pytest.raises(DataError, match="60 training images, fewer than a batch: lower"):
        PixelTask(pixels, 0, Path())


def test_the_permutation_travels_with_the_checkpoint(pixels):
    task = PixelTask(pixels, 0, Path())
    state = task.state()
    pixels.permutation_seed = 9
    other = PixelTask(pixels, 0, Path())
    assert not np.array_equal(other.order, task.order)
    other.load_state(state)
    assert np.array_equal(other.order, task.order)
    state["order"][0] = state["order"][1]
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        other.load_state(state)
