"""Draw statistics.svg: `python docs/figures/statistics.py`."""

from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

STEPS, BATCH = 6, 4
GREY, INK = "#8a8f98", "#6b7fd7"  # legible on white and on dark
SLOTS = {
    "frame": lambda t, b: t == 2,
    "sequence": lambda t, b: True,
    "layer": lambda t, b: (t, b) == (2, 1),
}


def main() -> None:
    mpl.rcParams |= {"svg.fonttype": "path", "svg.hashsalt": "statistics"}
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.6))
    for axis, (name, together) in zip(axes, SLOTS.items(), strict=True):
        for t in range(STEPS):
            for b in range(BATCH):
                colour = INK if together(t, b) else "none"
                axis.add_patch(
                    plt.Rectangle((t + 0.08, b + 0.08), 0.84, 0.84, facecolor=colour,
                                  edgecolor=GREY, linewidth=1.2)
                )  # fmt: skip
        axis.set(xlim=(-0.1, STEPS + 0.1), ylim=(-0.1, BATCH + 0.1), aspect="equal")
        axis.set_title(name, color=GREY, fontsize=13)
        axis.set_xlabel("time step", color=GREY, fontsize=11)
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)
    axes[0].set_ylabel("sequence of the batch", color=GREY, fontsize=11)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".svg"), transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
