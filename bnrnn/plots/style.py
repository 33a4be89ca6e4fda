"""Set up matplotlib, choose colours, encode figures; needs `pip install 'bnrnn[plot]'`."""

import io
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bnrnn.errors import printable
from bnrnn.runs.files import write_atomic
from bnrnn.settings.schema import SIZES

_LONGEST = 160  # characters of a text; a longer one would leave no room for the figure
# Okabe and Ito's colours, which colour-blind people can distinguish; one per model.
COLOURS = {
    "lstm": "#0072B2",
    "bnlstm": "#D55E00",
    "bn_input": "#009E73",
    "bn_input_sequence": "#CC79A7",
    "bn_sum": "#E69F00",
    "lnlstm": "#009E73",
    "zoneout": "#56B4E9",
    "bn_zoneout": "#882255",
    "dropout_lstm": "#E69F00",
    "stabilised": "#999999",
    "characters_lstm": "#0072B2",
    "characters_bn_sum": "#E69F00",
    "speech_lstm": "#0072B2",
    "speech_bn": "#CC79A7",
    "speech_bn_frame": "#009E73",
    "attentive_lstm": "#0072B2",
    "attentive_bnlstm": "#D55E00",
    "attentive_bn_everywhere": "#E69F00",
    "attentive_bne_star": "#009E73",
    "attentive_bne_star_star": "#CC79A7",
    **{f"words_{size}": "#0072B2" for size in SIZES},
    **{f"words_{size}_bn_input": "#009E73" for size in SIZES},
    **{f"words_{size}_bnlstm": "#D55E00" for size in SIZES},
}
MARKERS = "os^Dv"  # one for each group of settings of a model


def colour(model: str) -> str:
    return COLOURS.get(model, "black")


def plain(text: str) -> str:
    """Escape a user's text for a figure: matplotlib reads text between dollar signs as TeX."""
    shown = printable(text).replace("\n", " ")
    if len(shown) > _LONGEST:
        shown = shown[: _LONGEST - 1] + "…"
    return shown.replace("$", r"\$")


def entry(text: str) -> str:
    """Escape a text for a legend, which omits entries that are empty or begin with "_"."""
    return plain(text).lstrip("_ ") or "-"


def tidy(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def encode(figure: Figure, kind: str) -> bytes:
    """Encode as "png" or "svg"; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with plt.rc_context({"svg.hashsalt": "bnrnn"}), warnings.catch_warnings():
        # A character that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(
            buffer, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None
        )
    return buffer.getvalue()


def save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, encode(figure, path.suffix.removeprefix(".")))
    plt.close(figure)


__all__ = ["COLOURS", "MARKERS", "colour", "encode", "entry", "plain", "plt", "save", "tidy"]
