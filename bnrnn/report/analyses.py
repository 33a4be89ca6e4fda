"""Select the analyses that a report shows, and name them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from bnrnn.report import paper
from bnrnn.report.groups import GAMMA, part
from bnrnn.runs.analysis import Analysed, Analysis
from bnrnn.runs.text import slug


def analysis_name(found: Analysis) -> str:
    """A unique name for an analysis; it is also the name of its folder."""
    if found.of is None:
        return found.analysis
    of = found.of
    parts = [of.data, of.model, *departures(of)]
    return slug("-".join([found.analysis, *map(slug, parts), f"seed{of.seed}"]), most=200)


def furthest(analyses: Iterable[tuple[Path, Analysis]]) -> dict[str, Analysis]:
    """The analyses by name.

    If several share a name, keep the one of the longest-trained model, then the newest.
    """
    ranked = sorted(analyses, key=lambda found: (trained(found[1]), found[0].name))
    return {analysis_name(analysis): analysis for _, analysis in ranked}


def trained(found: Analysis) -> int:
    """Training steps of the analysed model; 0 if the analysis has no trained model."""
    return 0 if found.of is None else found.of.step


def departures(of: Analysed) -> list[str]:
    """Labels of the settings in which a model differs from the defaults of its task."""
    usual = paper.usual(of.task, of.model)
    settings = {GAMMA: of.gamma_init, "model.hidden_size": of.hidden_size}
    return [part(key, value) for key, value in settings.items() if value != usual.get(key)]


def made(models: Sequence[Analysed], several: bool, steps: str = "steps") -> str:
    """A label such as `3,160 steps`, with everything else that distinguishes these models.

    Args:
        models: models that differ only in their seed.
        several: whether the figure has several seeds.
    """
    at = list(dict.fromkeys(f"{model.step:,}" for model in models))
    seeds = [str(model.seed) for model in models]
    parts = [*departures(models[0]), f"{'/'.join(at)} {steps}"]
    if several:
        parts.append(f"seed{'s' * (len(seeds) > 1)} {'/'.join(seeds)}")
    if models[0].scale:
        parts.append(f"scale={models[0].scale}")
    return ", ".join(parts)
