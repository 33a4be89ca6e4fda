"""A character language model on one long text, with truncated backpropagation through time.

The text is split into parallel streams, and each stream into windows. The state is carried from
window to window, without its gradient.

    python examples/language_model.py --data data/ptb/ptb.train.txt --normalise
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnrnn

State = tuple[Tensor, Tensor]


class LanguageModel(nn.Module):
    def __init__(self, symbols: int, hidden_size: int, normalise: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, 32)
        # The one line that changes:
        self.lstm = (bnrnn.BNLSTM if normalise else nn.LSTM)(32, hidden_size)
        self.output = nn.Linear(hidden_size, symbols)

    def forward(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """x (T, B) -> logits (T, B, symbols), and the initial state of the next window."""
        output, (h, c) = self.lstm(self.embedding(x), state)
        return self.output(output), (h.detach(), c.detach())


def windows(text: Tensor, streams: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Characters and next characters, (steps, streams) each; each window continues the last."""
    length = (len(text) - 1) // streams // steps * steps
    x, y = (text[k : k + streams * length].view(streams, length).t() for k in (0, 1))
    yield from zip(x.split(steps), y.split(steps), strict=True)


@torch.no_grad()
def evaluate(model: LanguageModel, text: Tensor, args: argparse.Namespace) -> float:
    """Bits per character."""
    model.eval()
    losses, state = [], None
    for x, y in windows(text, args.streams, args.steps):
        logits, state = model(x, state)
        losses.append(F.cross_entropy(logits.flatten(0, 1), y.flatten()).item())
    return sum(losses) / len(losses) / math.log(2)


def main(arguments: Sequence[str] | None = None) -> tuple[list[float], float]:
    """Return the training losses, in nats, and the bits per character of the held-out text."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default="data/ptb/ptb.train.txt", help="any text")
    parser.add_argument("--characters", type=int, default=500_000, help="of it, a tenth held out")
    parser.add_argument("--normalise", action="store_true", help="BNLSTM instead of nn.LSTM")
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50, help="of a window")
    parser.add_argument("--epochs", type=int, default=2)
    args = parser.parse_args(arguments)
    if not args.data.exists():
        parser.error(f"there is no {args.data}: --data names it")

    torch.manual_seed(0)
    characters = args.data.read_text("utf-8")[: args.characters]
    symbols = sorted(set(characters))
    text = torch.tensor([symbols.index(character) for character in characters])
    train, valid = text.tensor_split([len(text) * 9 // 10])

    model = LanguageModel(len(symbols), args.hidden_size, args.normalise)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for epoch in range(args.epochs):
        model.train()
        state = None
        for x, y in windows(train, args.streams, args.steps):
            logits, state = model(x, state)
            loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: training loss {losses[-1]:.3f}")

    if args.normalise:
        # Average over the training set with the final weights; the running averages of training
        # lag behind them. Carry the state here too, because it affects the statistics.
        carried: State | None = None

        def forward(x: Tensor) -> None:
            nonlocal carried
            _, carried = model(x, carried)

        bnrnn.calibrate(model, (x for x, _ in windows(train, args.streams, args.steps)), forward)
    bits = evaluate(model, valid, args)
    print(f"held-out text: {bits:.3f} bits per character")
    return losses, bits


if __name__ == "__main__":
    main()
