"""Connectionist temporal classification: recognise the phones of an utterance from padded frames.

The data are AN4 as Kaldi archives, see data/kaldi.md. The phones are those of its alignment; the
times in the alignment are not used.

    python examples/ctc.py --data data/an4 --normalise
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import bnrnn
from bnrnn.datasets.frames import FrameSplit, Normalizer, corpus_sources, load_frames

STACKED = 3  # frames of 10 ms per input of the network
STATES = 3  # classes of the alignment per phone
INPUT_TERMS = {
    "input_norm": "sequence", "recurrent_norm": "none", "cell_norm": "none", "gamma_init": 1.0
}  # fmt: skip

Utterance = tuple[Tensor, Tensor]  # inputs (T, D), and phones numbered from 1; 0 is CTC's blank
Batch = tuple[Tensor, Tensor, Tensor, Tensor]


class Recogniser(nn.Module):
    def __init__(self, features: int, hidden_size: int, phones: int, normalise: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, hidden_size, num_layers=2)
        if normalise:  # the one change; only input terms are normalised, as in Laurent et al. 2015
            self.lstm = bnrnn.BNLSTM(features, hidden_size, num_layers=2, **INPUT_TERMS)
        self.output = nn.Linear(hidden_size, 1 + phones)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """x (T, B, D), padded -> log probabilities (T, B, 1 + phones)."""
        # A unidirectional nn.LSTM reads padding only after the end of an utterance. BNLSTM would
        # average over the padding, so it needs the lengths.
        known = {"lengths": lengths} if isinstance(self.lstm, bnrnn.BNLSTM) else {}
        output, _ = self.lstm(x, **known)
        return self.output(output).log_softmax(2)


def read(split: FrameSplit, number: int) -> list[Utterance]:
    """Up to `number` utterances, sorted by length; their features have mean 0 and variance 1."""
    normalizer = Normalizer("utterance", split)
    utterances = []
    for k in range(min(number, len(split.names))):
        frames = torch.from_numpy(normalizer.features(split, k))
        whole = len(frames) // STACKED
        phones = torch.from_numpy(split.targets(k)).long() // STATES
        x = frames[: STACKED * whole].reshape(whole, -1)
        utterances.append((x, 1 + phones.unique_consecutive()))
    return sorted(utterances, key=lambda utterance: len(utterance[0]))


def batches(utterances: list[Utterance], size: int) -> list[Batch]:
    """Batches of inputs, their lengths, all phones concatenated, and each utterance's phone count.

    The last, incomplete batch is dropped: it might be a single utterance, which has no batch
    statistics.
    """
    found = []
    for k in range(0, len(utterances) - size + 1, size):
        inputs, phones = zip(*utterances[k : k + size], strict=True)
        lengths, counts = (torch.tensor([len(t) for t in part]) for part in (inputs, phones))
        found.append((pad_sequence(list(inputs)), lengths, torch.cat(phones), counts))
    return found


def edits(found: list[int], wanted: list[int]) -> int:
    """Insertions, deletions and substitutions between two sequences."""
    row = list(range(len(wanted) + 1))
    for i, a in enumerate(found, start=1):
        last, row[0] = row[0], i
        for j, b in enumerate(wanted, start=1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]


@torch.no_grad()
def phone_error_rate(model: Recogniser, of: list[Batch]) -> float:
    model.eval()
    errors = total = 0
    for x, lengths, phones, counts in of:
        best = model(x, lengths).argmax(2)
        for b, wanted in enumerate(phones.split(counts.tolist())):
            found = best[: lengths[b], b].unique_consecutive()
            errors += edits(found[found > 0].tolist(), wanted.tolist())
            total += len(wanted)
    return errors / total


def main(arguments: Sequence[str] | None = None) -> tuple[list[float], float]:
    """Return the training losses, in nats per phone, and the phone error rate on the dev set."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default="data/an4", help="folder of train, dev, test")
    parser.add_argument("--utterances", type=int, default=800, help="of each set")
    parser.add_argument("--normalise", action="store_true", help="BNLSTM instead of nn.LSTM")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args(arguments)
    if not args.data.exists():
        parser.error(f"there is no {args.data}: --data names it")

    torch.manual_seed(0)
    corpus = load_frames(*corpus_sources(args.data))
    train = batches(read(corpus.train, args.utterances), args.batch_size)
    dev = batches(read(corpus.dev, args.utterances), args.batch_size)
    model = Recogniser(
        STACKED * corpus.features, args.hidden_size, corpus.classes // STATES, args.normalise
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for epoch in range(args.epochs):
        model.train()
        for k in torch.randperm(len(train)).tolist():
            x, lengths, phones, counts = train[k]
            loss = F.ctc_loss(model(x, lengths), phones, lengths, counts)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: training loss {sum(losses[-len(train) :]) / len(train):.3f}")

    if args.normalise:
        # Average over the training set with the final weights; the running averages of training
        # lag behind them.
        bnrnn.calibrate(model, ((x, lengths) for x, lengths, _, _ in train))
    rate = phone_error_rate(model, dev)
    print(f"dev set: {rate:.1%} phone error rate")
    return losses, rate


if __name__ == "__main__":
    main()
