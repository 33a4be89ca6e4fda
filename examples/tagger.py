"""A bidirectional tagger on packed sequences: it restores the spaces removed from sentences.

Any text with one sentence per line will do.

    python examples/tagger.py --data data/ptb/ptb.train.txt --normalise
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_sequence

import bnrnn

Sentence = tuple[Tensor, Tensor]  # characters without spaces, and whether a space follows


class Tagger(nn.Module):
    def __init__(self, symbols: int, hidden_size: int, normalise: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, 32)
        # The one line that changes:
        self.lstm = (bnrnn.BNLSTM if normalise else nn.LSTM)(32, hidden_size, bidirectional=True)
        self.output = nn.Linear(2 * hidden_size, 1)

    def forward(self, characters: PackedSequence) -> Tensor:
        """A logit for each character, in the order of the packed data."""
        output, _ = self.lstm(characters._replace(data=self.embedding(characters.data)))
        return self.output(output.data).squeeze(1)


def read(file: Path, number: int) -> tuple[list[Sentence], int]:
    """The first sentences of a file, one per line, and the number of distinct characters."""
    with file.open(encoding="utf-8") as lines:
        sentences = [line.split() for line, _ in zip(lines, range(number), strict=False)]
    symbols = sorted({character for words in sentences for word in words for character in word})
    pairs = []
    for words in filter(None, sentences):
        characters = torch.tensor([symbols.index(c) for word in words for c in word])
        ends = torch.tensor([float(k == len(word) - 1) for word in words for k in range(len(word))])
        pairs.append((characters, ends))
    return pairs, len(symbols)


def batches(sentences: list[Sentence], size: int) -> Iterator[tuple[PackedSequence, Tensor]]:
    """Batches in random order. A batch has sentences of similar lengths, so that batch statistics
    have enough rows at every step.

    The last, incomplete batch is dropped: it might be a single sentence, which has no batch
    statistics.
    """
    by_length = sorted(sentences, key=lambda sentence: len(sentence[0]))
    for k in torch.randperm(len(sentences) // size).mul(size).tolist():
        characters, ends = zip(*by_length[k : k + size], strict=True)
        lengths = torch.tensor([len(c) for c in characters])
        packed, targets = (
            pack_padded_sequence(pad_sequence(list(part)), lengths, enforce_sorted=False)
            for part in (characters, ends)
        )
        yield packed, targets.data


def main(arguments: Sequence[str] | None = None) -> tuple[list[float], float]:
    """Return the training losses and the accuracy on held-out sentences."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default="data/ptb/ptb.train.txt", help="any text")
    parser.add_argument("--sentences", type=int, default=4000, help="of it, a tenth held out")
    parser.add_argument("--normalise", action="store_true", help="BNLSTM instead of nn.LSTM")
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args(arguments)
    if not args.data.exists():
        parser.error(f"there is no {args.data}: --data names it")

    torch.manual_seed(0)
    sentences, symbols = read(args.data, args.sentences)
    cut = len(sentences) * 9 // 10
    train, valid = sentences[:cut], sentences[cut:]
    model = Tagger(symbols, args.hidden_size, args.normalise)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for epoch in range(args.epochs):
        for characters, ends in batches(train, args.batch_size):
            loss = F.binary_cross_entropy_with_logits(model(characters), ends)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: training loss {losses[-1]:.3f}")

    if args.normalise:
        # Average over training batches with the final weights; the running averages of training
        # lag behind them.
        bnrnn.calibrate(model, (characters for characters, _ in batches(train, args.batch_size)))
    model.eval()
    with torch.no_grad():
        right = torch.cat([(model(x) > 0) == (y > 0) for x, y in batches(valid, args.batch_size)])
    accuracy = right.float().mean().item()
    print(f"held-out sentences: {accuracy:.1%} of the characters right")
    return losses, accuracy


if __name__ == "__main__":
    main()
