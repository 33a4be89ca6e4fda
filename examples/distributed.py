"""Two processes train one character model, each on its own lines of different lengths.

They communicate by Gloo, so this runs on CPUs. They find each other through a file.

    python examples/distributed.py --data data/ptb/ptb.train.txt --normalise
"""

import argparse
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import bnrnn


class LineModel(nn.Module):
    def __init__(self, symbols: int, normalise: bool, longest: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, 32)
        # The one line that changes. DistributedDataParallel copies the statistics of rank 0 to all
        # processes, so they must have the same shape everywhere, regardless of the line lengths.
        self.lstm = bnrnn.BNLSTM(32, 64, max_length=longest) if normalise else nn.LSTM(32, 64)
        self.output = nn.Linear(64, symbols)

    def forward(self, x: PackedSequence) -> Tensor:
        """Logits, in the order of the packed data."""
        output, _ = self.lstm(x._replace(data=self.embedding(x.data)))
        return self.output(output.data)


def batches(lines: list[Tensor], size: int) -> Iterator[tuple[PackedSequence, Tensor]]:
    """Batches of characters and the next characters.

    The last, incomplete batch is dropped: a single line has no batch statistics.
    """
    for k in range(0, len(lines) - size + 1, size):
        part = lines[k : k + size]
        x = pack_sequence([line[:-1] for line in part], enforce_sorted=False)
        y = pack_sequence([line[1:] for line in part], enforce_sorted=False)
        yield x, y.data


def work(rank: int, args: argparse.Namespace, meeting_point: str) -> None:
    """Run one process, which trains on every n-th line of n processes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=args.processes
    )
    torch.manual_seed(0)
    text = args.data.read_text("utf-8").splitlines()
    # Strip the lines: if all began with the same character, the first step would have no variance.
    text = [line.strip()[: args.longest + 1] for line in text]
    text = [line for line in text if len(line) > 1][: args.lines]
    symbols = sorted(set("".join(text)))
    lines = [torch.tensor([symbols.index(character) for character in line]) for line in text]
    # All processes need the same number of lines, because they synchronise after every batch.
    share = len(lines) // args.processes
    own = lines[rank :: args.processes][:share]
    train, valid = own[: share * 9 // 10], own[share * 9 // 10 :]

    model = LineModel(len(symbols), args.normalise, args.longest)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for epoch in range(args.epochs):
        for x, y in batches(train, args.batch_size):
            loss = F.cross_entropy(parallel(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        if rank == 0:
            print(f"epoch {epoch + 1}: training loss {losses[-1]:.3f}")

    if args.normalise:
        # Average over the training lines with the final weights; the running averages of training
        # lag behind them. Each process uses the averages over its own lines.
        bnrnn.calibrate(model, (x for x, _ in batches(train, args.batch_size)))
    model.eval()
    nats_and_characters = torch.zeros(2)
    with torch.no_grad():
        for x, y in batches(valid, args.batch_size):
            nats = F.cross_entropy(model(x), y, reduction="sum").item()
            nats_and_characters += torch.tensor([nats, len(y)])
    dist.all_reduce(nats_and_characters)
    if rank == 0:
        nats, characters = nats_and_characters.tolist()
        print(f"held-out lines: {nats / characters / math.log(2):.3f} bits per character")
    if args.save:
        state = {"model": model.state_dict(), "losses": losses}
        torch.save(state, args.save / f"rank{rank}.pt")
    # If the wrapper were freed after the group, it would free the group's threads while it holds
    # Python's lock, for which they may wait.
    del parallel
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, default="data/ptb/ptb.train.txt", help="any text")
    parser.add_argument("--lines", type=int, default=4000, help="of it, a tenth held out")
    parser.add_argument("--longest", type=int, default=100, help="characters of a line; then cut")
    parser.add_argument("--normalise", action="store_true", help="BNLSTM instead of nn.LSTM")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32, help="of each process")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--save", type=Path, help="a folder, for what each process ends with")
    args = parser.parse_args(arguments)
    if not args.data.exists():
        parser.error(f"there is no {args.data}: --data names it")
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, (args, f"{folder}/meet"), nprocs=args.processes)


if __name__ == "__main__":
    main()
