"""Which analyses count, and what each is called."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from bnrnn.report import paper
from bnrnn.report.groups import GAMMA, part
from bnrnn.runs.analysis import Analysed, Analysis
from bnrnn.runs.text import slug


def analysis_name(found: Analysis) -> str:
    """A unique name, also of a folder."""
    if found.of is None:
        return found.analysis
    of = found.of
    parts = [of.data, of.model, *departures(of)]
    return slug("-".join([found.analysis, *map(slug, parts), f"seed{of.seed}"]), most=200)


def furthest(analyses: Iterable[tuple[Path, Analysis]]) -> dict[str, Analysis]:
    """By name. If several share it: the one of the longest-trained model, then the newest."""
    ranked = sorted(analyses, key=lambda found: (trained(found[1]), found[0].name))
    return {analysis_name(analysis): analysis for _, analysis in ranked}


def trained(found: Analysis) -> int:
    """Steps behind the model of an analysis; 0 where there is no trained model."""
    return 0 if found.of is None else found.of.step


def departures(of: Analysed) -> list[str]:
    """What tells a model from the usual one of its task."""
    usual = paper.usual(of.task, of.model)
    settings = {GAMMA: of.gamma_init, "model.hidden_size": of.hidden_size}
    return [part(key, value) for key, value in settings.items() if value != usual.get(key)]


def made(models: Sequence[Analysed], several: bool, steps: str = "steps") -> str:
    """`3,160 steps`, and what else tells these models from others.

    Args:
        models: alike but for their seeds.
        several: there are other seeds in the figure.
    """
    at = list(dict.fromkeys(f"{model.step:,}" for model in models))
    seeds = [str(model.seed) for model in models]
    parts = [*departures(models[0]), f"{'/'.join(at)} {steps}"]
    if several:
        parts.append(f"seed{'s' * (len(seeds) > 1)} {'/'.join(seeds)}")
    if models[0].scale:
        parts.append(f"scale={models[0].scale}")
    return ", ".join(parts)
