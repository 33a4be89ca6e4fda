"""Text from a trained character model."""

import numpy as np
import torch

from bnrnn.runs.interrupt import Interruption
from bnrnn.settings.schema import SampleConfig
from bnrnn.tasks import CharacterModel, CharacterTask


@torch.no_grad()
def sample(model: CharacterModel, task: CharacterTask, config: SampleConfig, seed: int) -> str:
    """Return the prompt (by default a line break) followed by `length` sampled characters.

    The model must be calibrated: it uses population statistics.

    Raises:
        DataError: the prompt has a character that the corpus does not have.
    """
    model.eval()
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    prompt = config.prompt or ("\n" if "\n" in task.corpus.symbols else task.corpus.symbols[0])
    characters = task.corpus.encode(prompt).astype(np.int64).tolist()
    state, first, written = None, 0, list(characters)
    with Interruption() as stop:
        for _ in range(config.length):
            stop.check()
            input = torch.tensor(characters, device=device)[:, None]
            logits, state = model(input, state, first_step=first)
            first += len(characters)
            probabilities = torch.softmax(logits[-1, 0].double().cpu() / config.temperature, 0)
            characters = [int(torch.multinomial(probabilities, 1, generator=generator))]
            written += characters
    return task.corpus.decode(np.array(written[0 if config.prompt else 1 :]))
