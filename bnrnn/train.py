"""The training loop, for every task."""

import dataclasses
import logging
import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from bnrnn import checkpoint
from bnrnn.config import (
    AdamConfig,
    Config,
    OptimizerConfig,
    PixelConfig,
    RMSPropConfig,
    SGDConfig,
    to_dict,
)
from bnrnn.errors import CheckpointError, ConfigError, NonFiniteError
from bnrnn.evaluate import final_test, load_best, validate
from bnrnn.interrupt import Interrupted, Interruption
from bnrnn.metrics import MetricsWriter, format_values
from bnrnn.nn import BNLSTM
from bnrnn.provenance import commit, provenance
from bnrnn.rundir import RunDirectory
from bnrnn.tasks import Task
from bnrnn.tasks.scoring import Score

log = logging.getLogger(__name__)

# A mean gradient norm beyond which float32, of seven digits, loses parts of the usual size.
ROUNDING_ERRORS = 1e6


@dataclass
class LoopState:
    """All that the loop remembers from step to step; plain numbers, saved in checkpoints."""

    step: int = 0
    validated: int = -1  # the step of the last validation
    best: float | None = None
    best_step: int = 0
    stale: int = 0  # validations since the best one
    seconds: float = 0.0
    train_seconds: float = 0.0  # of those, in training steps
    # Sums since the last line of metrics, so that a resumed run writes the same lines.
    nll: float = 0.0
    correct: int = 0
    correct_named: int = 0
    count: int = 0
    grad_norm: float = 0.0
    logged: int = 0  # the step of that line
    commits: list[str] = field(default_factory=list)  # of the source, one after the other


def train(config: Config, task: Task, run: RunDirectory, device: torch.device) -> dict[str, Any]:
    """Train, choose the best model on validation, test it; go on if `run` has a checkpoint.

    Returns:
        what `result.json` holds.

    Raises:
        Interrupted: by a signal, after saving a checkpoint.
        NonFiniteError: the loss or the gradient is not finite.
        ConfigError: fewer steps are asked for than `run` has done.
        CheckpointError: `run` was trained on other data; and see there.
        OutputError: see there.
    """
    state = LoopState()
    resumed = checkpoint.load(run.last, device) if run.last.exists() else None
    if resumed is not None:
        task.load_state(resumed["task"])
        if resumed.get("data") not in (None, task.fingerprint):
            raise CheckpointError(
                f"{run.path} was trained on other data than these, {task.describe()}: go on with "
                "its own, or choose another place for a new run with outputs=DIR"
            )
    torch.manual_seed(config.seed)
    model = task.build_model(config.model, config.kernel).to(device)
    optimizer = build_optimizer(config.optimizer, model)
    if resumed is not None:
        state = restore(resumed, run, model, optimizer)
        log.info("Going on at step %d of %s", state.step, run.path)
    run.write_config(config)

    epochs = config.max_epochs or config.task.max_epochs
    total = epochs * task.steps_per_epoch
    if config.max_steps is not None:
        total = min(total, config.max_steps)
    if state.step > total:
        raise ConfigError(
            f"{run.path} is at step {state.step} already, beyond the {total} that max_steps and "
            f"max_epochs allow: max_steps={state.step} tests it as it is, more goes on"
        )
    if (source := commit()) is not None and source not in state.commits[-1:]:
        state.commits.append(source)
    validate_every = config.validate_every or task.steps_per_epoch
    log.info("%s", task.describe())
    log.info(
        "%s: %s parameters; %s steps (%s an epoch) on %s, kernel %s; %s",
        config.model.name,
        f"{sum(p.numel() for p in model.parameters()):,}",
        f"{total:,}",
        f"{task.steps_per_epoch:,}",
        device,
        kernel_name(model, task),
        run.path,
    )

    with (
        Interruption() as stop,
        MetricsWriter(run, config, task.metric, state.step, state.validated) as metrics,
        logging_redirect_tqdm(),
        tqdm(total=total, initial=state.step, disable=None, dynamic_ncols=True) as bar,
    ):
        if state.step < total:
            run.result.unlink(missing_ok=True)  # of a run that was finished with fewer steps
        warned = False
        saved_at = began = time.monotonic()
        seconds_before = state.seconds
        try:
            while True:
                at_end = state.step >= total
                if state.validated != state.step and (
                    at_end or (state.step > 0 and state.step % validate_every == 0)
                ):
                    found = validate(model, task, config, device, stop)
                    state.validated = state.step
                    state.seconds = seconds_before + time.monotonic() - began
                    for kind, values in found.items():
                        name = f"validation {task.metric} with {kind} statistics"
                        check_finite(name, values[task.metric], config, state, run)
                        values = values | {"seconds": round(state.seconds, 2)}
                        metrics.write(state.step, "valid", values, statistics=kind)
                    metrics.write_parameters(state.step, model)
                    metrics.write_figures(state.step, draw(model, task, device))
                    chosen_by = found.get(config.selection, found["population"])[task.metric]
                    if task.is_better(chosen_by, state.best):
                        state.best, state.best_step, state.stale = chosen_by, state.step, 0
                        save_best(run, config, task, model, state.step, None)
                    else:
                        state.stale += 1
                    save_last(run, config, task, model, optimizer, state)
                    saved_at = time.monotonic()
                    log.info("%s", progress_line(state, task, found))
                if at_end or (config.patience is not None and state.stale >= config.patience):
                    break

                step_began = time.monotonic()
                epoch, index = divmod(state.step, task.steps_per_epoch)
                batch = task.train_batch(epoch, index).to(device)
                model.train()
                logits = task.predict(model, batch)
                loss = nn.functional.cross_entropy(logits.flatten(0, -2), batch.target.flatten())
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                grad_norm = clip_gradients(model, config.optimizer)
                check_finite("loss", loss.item(), config, state, run)
                check_finite("gradient norm", grad_norm.item(), config, state, run)
                set_adam_eps(optimizer, config.optimizer, state.step + 1)
                optimizer.step()
                state.step += 1

                now = time.monotonic()
                state.train_seconds += now - step_began
                state.seconds = seconds_before + now - began
                add(state, task.score(logits.detach(), batch), grad_norm.item())
                if state.step % config.log_every == 0:
                    values = averages(state, task)
                    metrics.write(state.step, "train", values)
                    if not warned and values["grad_norm"] > ROUNDING_ERRORS:
                        log.warning("%s", rounding_errors(values["grad_norm"], config, state))
                        warned = True
                    shown = {k: v for k, v in values.items() if k not in ("epoch", "seconds")}
                    bar.set_postfix_str(format_values(shown))
                bar.update()

                end_of_epoch = state.step % task.steps_per_epoch == 0
                minutes = (now - saved_at) / 60
                if end_of_epoch or minutes >= config.checkpoint_minutes:
                    save_last(run, config, task, model, optimizer, state)
                    saved_at = time.monotonic()
                stop.check()

            bar.close()
            result = test_best(config, task, run, device, stop, metrics)
            state.seconds = seconds_before + time.monotonic() - began
        except Interrupted:
            save_last(run, config, task, model, optimizer, state)
            raise

    result |= {
        "task": config.task.name,
        "model": config.model.name,
        "seed": config.seed,
        "data": task.describe(),
        "whole_data": task.whole_data,
        "steps": state.step,
        "max_steps": total,
        "epochs": state.step / task.steps_per_epoch,
        "wall_seconds": round(state.seconds, 1),
        "train_seconds": round(state.train_seconds, 1),
        "kernel": kernel_name(model, task),
        **provenance(device),
        "commits": state.commits,
    }
    run.write_result(result)
    return result


def test_best(
    config: Config,
    task: Task,
    run: RunDirectory,
    device: torch.device,
    stop: Interruption,
    metrics: MetricsWriter,
) -> dict[str, Any]:
    """Test the best model, and keep it with the statistics it was tested with."""
    model, content = load_best(config, run.path, task, device)
    step = content["step"]
    found, calibrated = final_test(model, task, config, device, stop, content["calibrated"])
    save_best(run, config, task, model, step, calibrated)
    metrics.write(step, "test", found["test"], statistics="population")
    log.info(
        "Best model, step %d, population statistics: valid %s; test %s",
        step, format_values(found["valid"]), format_values(found["test"]),
    )  # fmt: skip
    return {**found, "best_step": step, "calibrated": calibrated}


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    parameters = model.parameters()
    if isinstance(config, AdamConfig):
        betas = (config.beta1, config.beta2)
        return torch.optim.Adam(parameters, config.lr, betas, config.eps, fused=True)
    if isinstance(config, RMSPropConfig):
        return torch.optim.RMSprop(
            parameters, config.lr, config.decay, config.eps, momentum=config.momentum
        )
    if isinstance(config, SGDConfig):
        return torch.optim.SGD(parameters, config.lr, config.momentum, fused=True)
    raise TypeError(f"no optimizer for {type(config).__name__}")


def clip_gradients(model: nn.Module, config: OptimizerConfig) -> torch.Tensor:
    """Scale all gradients down where their norm n over all parameters is large; returns n.

    With m = `max_grad_norm`, by `clip`:
        norm: to the norm m where n > m.
        square_root: to the norm m sqrt(n) where n > m^2, as in the authors' code for the CNN
            questions, which takes the root of what is a root already.
    """
    if config.clip == "norm":
        return nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    # It never scales up, and m sqrt(n) < n is n > m^2.
    limit = config.max_grad_norm * math.sqrt(norm.item())
    nn.utils.clip_grads_with_norm_(model.parameters(), limit, norm)
    return norm


def set_adam_eps(optimizer: torch.optim.Optimizer, config: OptimizerConfig, step: int) -> None:
    """Before step `step` (from 1): which root of Adam's second moment v the ε is added to.

    By `eps_on`, with β_1, β_2 and the first moment m of Kingma and Ba, "Adam", ICLR 2015:
        corrected: lr m̂ / (sqrt(v̂) + ε), their algorithm 1, as in torch.
        uncorrected: lr sqrt(1 - β_2^t) / (1 - β_1^t) m / (sqrt(v) + ε), the variant at the end of
            their section 2, as in the authors' code for the CNN questions.
    """
    if isinstance(config, AdamConfig) and config.eps_on == "uncorrected":
        # The same as `corrected` with another ε at each step, for v̂ is v / (1 - β_2^t).
        for group in optimizer.param_groups:
            group["eps"] = config.eps / math.sqrt(1 - config.beta2**step)


def check_finite(
    name: str, value: float, config: Config, state: LoopState, run: RunDirectory
) -> None:
    if math.isfinite(value):
        return
    kept = f"the last good checkpoint is {run.last}" if run.last.exists() else "none is saved yet"
    raise NonFiniteError(
        f"the {name} is {value} at step {state.step}; {kept}. Try a lower optimizer.lr or "
        f"optimizer.max_grad_norm, or model.gamma_init=0.1{or_noise(config)}"
    )


def rounding_errors(grad_norm: float, config: Config, state: LoopState) -> str:
    return (
        f"the gradient norm is {grad_norm:.1e} at step {state.step}: of one so large hardly "
        "anything but rounding errors is left when it is clipped. Try a lower model.gamma_init"
        f"{or_noise(config)}"
    )


def or_noise(config: Config) -> str:
    if not isinstance(config.task, PixelConfig):
        return ""
    return ", or task.init_noise=0.1 where all sequences begin alike"


def add(state: LoopState, score: Score, grad_norm: float) -> None:
    state.nll += score.nll
    state.correct += score.correct
    state.correct_named += score.correct_named
    state.count += score.count
    state.grad_norm += grad_norm


def averages(state: LoopState, task: Task) -> dict[str, float]:
    """Averages since the last line of metrics, and a new beginning."""
    values = task.metrics(Score(state.nll, state.correct, state.correct_named, state.count))
    steps = state.step - state.logged
    values |= {
        "grad_norm": state.grad_norm / steps,
        "epoch": state.step / task.steps_per_epoch,
        "seconds": round(state.seconds, 2),
    }
    state.nll, state.correct, state.correct_named, state.count = 0.0, 0, 0, 0
    state.grad_norm = 0.0
    state.logged = state.step
    return values


def progress_line(state: LoopState, task: Task, found: dict[str, dict[str, float]]) -> str:
    scores = "  ".join(f"{values[task.metric]:.4f} ({kind})" for kind, values in found.items())
    best = "  best so far" if state.best_step == state.step else ""
    epoch = state.step / task.steps_per_epoch
    minutes = state.seconds / 60
    return (
        f"step {state.step:6d}  epoch {epoch:6.2f}  {minutes:6.1f} min  "
        f"valid {task.metric} {scores}{best}"
    )


@torch.no_grad()
def draw(model: nn.Module, task: Task, device: torch.device) -> dict[str, Any]:
    model.eval()
    return task.figures(model, device)


def kernel_name(model: nn.Module, task: Task) -> str:
    """Which code runs the recurrence: recorded with every result."""
    lstms = [module for module in model.modules() if isinstance(module, BNLSTM)]
    return ", ".join(sorted({lstm.active_kernel(task.padded) for lstm in lstms}))


def save_last(
    run: RunDirectory,
    config: Config,
    task: Task,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: LoopState,
) -> None:
    training = {
        "optimizer": optimizer.state_dict(),
        "loop": dataclasses.asdict(state),
        "random": checkpoint.random_state(),
    }
    content = describe(config, task, model, state.step)
    checkpoint.save(run.last, content | {"calibrated": None, "training": training})


def save_best(
    run: RunDirectory,
    config: Config,
    task: Task,
    model: nn.Module,
    step: int,
    calibrated: int | None,
) -> None:
    checkpoint.save(run.best, describe(config, task, model, step) | {"calibrated": calibrated})


def describe(config: Config, task: Task, model: nn.Module, step: int) -> dict[str, Any]:
    return {
        "config": to_dict(config),
        "model": model.state_dict(),
        "task": task.state(),
        "data": task.fingerprint,
        "step": step,
    }


def restore(
    content: dict[str, Any],
    run: RunDirectory,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> LoopState:
    if "training" not in content:
        raise CheckpointError(f"{run.last} is a model without its training state: cannot resume")
    checkpoint.load_model(model, content, run.last)
    training = content["training"]
    optimizer.load_state_dict(training["optimizer"])
    checkpoint.restore_random_state(training["random"])
    return LoopState(**training["loop"])
