"""The training loop: losses of a stage, optimisers, averages, checkpoints, logs. It does not know what a stage does.

Of the random numbers and the order of the data nothing is saved but how many samples have been seen: see `draw`. Every
process takes the same steps at the same time; what one must tell the others, such as a signal to stop, is agreed upon
once a step. The device is never waited for within a step: what a step tells is read while the next one runs, and always
before anything is saved.
"""

import logging
import math
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from longlive.errors import InputError
from longlive.training.checkpoint import Checkpoints
from longlive.training.clock import Clock, Spans
from longlive.training.draw import Draw
from longlive.training.ema import EMA
from longlive.training.metrics import Metrics
from longlive.training.muon import Muon
from longlive.training.parallel import Group, like, local, whole
from longlive.training.stage import Stage

log = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """A loss or gradient that is NaN or infinite; the message names the tensor."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, and Muon for the matrices of the blocks where `muon_lr` is not 0. Learning rates rise linearly over
    `warmup_steps` and fall to `final_lr_ratio` of themselves at the end of training by a half cosine; a ratio of 1
    keeps them. Gradients are clipped to `max_grad_norm`."""

    lr: float
    muon_lr: float = 0.0
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = 0.01
    max_grad_norm: float = 10.0
    warmup_steps: int = 0
    final_lr_ratio: float = 1.0

    def share_at(self, step: int, num_steps: int) -> float:
        """The share of the learning rates in step number `step`, from 0, of `num_steps`."""
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        fall = 0.5 * (1 + math.cos(math.pi * step / num_steps))
        return warmup * (self.final_lr_ratio + (1 - self.final_lr_ratio) * fall)


@dataclass(frozen=True)
class EMAConfig:
    """decay: of the moving average, 0 = none; before step `start_step` the average is the weights themselves."""

    decay: float = 0.0
    start_step: int = 0


@dataclass(frozen=True)
class Norms:
    """Norms [N] of the gradients of the parameters `names`."""

    names: tuple[str, ...]
    values: Tensor


class Network:
    """What is trained: a module, the optimiser of its trainable parameters, and their average.

    parameters: by name, in float32. FSDP casts them for each pass; a module that is not sharded is given copies of them
    in the compute type, whose gradients they take over.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: OptimizerConfig,
        ema: EMAConfig = EMAConfig(),
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.module = module
        self.config = optimizer
        self.ema_config = ema
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._copies: dict[str, nn.Parameter] = {}
        if compute_dtype != torch.float32 and not any(isinstance(p, DTensor) for p in self.parameters.values()):
            self._copies = self.parameters
            self.parameters = {name: nn.Parameter(p.detach()) for name, p in self._copies.items()}
            for copy in self._copies.values():
                copy.data = copy.detach().to(compute_dtype)
        matrices = self._block_matrices() if optimizer.muon_lr else {}
        self.muon = Muon(matrices.values(), optimizer.muon_lr, optimizer.weight_decay) if matrices else None
        others = [parameter for name, parameter in self.parameters.items() if name not in matrices]
        self.optimizer = torch.optim.AdamW(
            others, lr=optimizer.lr, betas=optimizer.betas, weight_decay=optimizer.weight_decay, fused=True
        )
        for parameter in others:  # there from the start, to be loaded into
            zeros = {name: torch.zeros_like(parameter.detach()) for name in ("exp_avg", "exp_avg_sq")}
            step = torch.zeros((), device=local(parameter.detach()).device)
            self.optimizer.state[parameter] = {"step": step, **zeros}
        self.ema = EMA(self._local_parameters(), ema.decay) if ema.decay else None

    def take_gradients(self) -> None:
        """Add the gradients of a backward pass to those of the parameters, in float32."""
        first: tuple[list[Tensor], list[Tensor]] = ([], [])
        later: tuple[list[Tensor], list[Tensor]] = ([], [])
        for name, copy in self._copies.items():
            if copy.grad is None:
                continue
            parameter = self.parameters[name]
            sums, added = first if parameter.grad is None else later
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            sums.append(parameter.grad)
            added.append(copy.grad)
            copy.grad = None
        if first[0]:
            torch._foreach_copy_(*first)
        if later[0]:
            torch._foreach_add_(*later)

    def update(self, step: int, num_steps: int) -> Norms:
        """Clip the gradients, change the weights, clear the gradients; returns the norms before clipping.

        step: number of the step, from 0. Where a norm is no number, the weights are none either from now on.
        """
        config = self.config
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        norms = whole(torch.stack(torch._foreach_norm(list(gradients.values()))))
        nn.utils.clip_grads_with_norm_(self.parameters.values(), config.max_grad_norm, norms.norm())
        share = config.share_at(step, num_steps)
        for optimizer, lr in ((self.optimizer, config.lr), (self.muon, config.muon_lr)):
            if optimizer is not None:
                for group in optimizer.param_groups:
                    group["lr"] = lr * share
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        self._write_copies()
        if self.ema is not None:
            if step + 1 >= self.ema_config.start_step:
                self.ema.update(self._local_parameters())
            else:
                self.ema.reset(self._local_parameters())
        return Norms(tuple(gradients), norms)

    @torch.no_grad()
    def _write_copies(self) -> None:
        if self._copies:
            torch._foreach_copy_(list(self._copies.values()), list(self.parameters.values()))

    def _block_matrices(self) -> dict[str, nn.Parameter]:
        """The parameters that are matrices of blocks. Raises InputError where they are sharded."""
        found = {name: p for name, p in self.parameters.items() if name.startswith("blocks.") and p.ndim == 2}
        if any(isinstance(p, DTensor) for p in found.values()):
            raise InputError(f"muon_lr={self.config.muon_lr}: Muon needs whole matrices, and so a single process")
        return found

    def _local_parameters(self) -> list[Tensor]:
        return [local(parameter.detach()) for parameter in self.parameters.values()]

    def _average(self) -> dict[str, Tensor]:
        """The averaged parameters by name, sharded as they are."""
        assert self.ema is not None
        return {
            name: like(parameter.detach(), shadow)
            for (name, parameter), shadow in zip(self.parameters.items(), self.ema.shadow, strict=True)
        }

    @property
    def averaged(self) -> dict[str, Tensor]:
        """All parameters by name, trainable ones averaged where there is an average."""
        values: dict[str, Tensor] = dict(self.module.named_parameters())
        return values if self.ema is None else values | self._average()

    def state(self) -> dict[str, Any]:
        """Everything that training changes, sharded as it is and in place."""
        state: dict[str, Any] = {
            "weights": {name: parameter.detach() for name, parameter in self.parameters.items()},
            "optimizer": {name: self._moments(parameter) for name, parameter in self.parameters.items()},
        }
        if self.ema is not None:
            state["ema"] = self._average()
        return state

    def _moments(self, parameter: Tensor) -> dict[str, Any]:
        """What an optimiser keeps of a parameter."""
        optimizer = self.muon if self.muon is not None and parameter in self.muon.state else self.optimizer
        return optimizer.state[parameter]

    def restored(self) -> None:
        """What `state()` refers to has been overwritten."""
        self._write_copies()


@dataclass(frozen=True)
class TrainerConfig:
    """batch_size: samples of a process in a micro-batch; num_rounds: micro-batches in a step; save_interval and
    sample_interval: in steps, 0 = never, though the last step is always saved."""

    num_steps: int
    seed: int = 0
    batch_size: int = 1
    num_rounds: int = 1
    save_interval: int = 0
    sample_interval: int = 0


@dataclass
class Progress:
    """How far training has come. num_seen: samples drawn so far, by all processes."""

    step: int = 0
    num_seen: int = 0


@dataclass(frozen=True)
class Report:
    """What a step tells, on its way from the device.

    step: its number, from 1; means: names of values to log; gradients: names of the gradients of every network updated;
    numbers: the values, then the gradients' norms.
    """

    step: int
    means: tuple[str, ...]
    gradients: Mapping[str, tuple[str, ...]]
    numbers: Tensor
    spans: Spans
    num_frames: int
    num_seen: int


@dataclass
class Trainer:
    """Everything a run needs. sample: makes sample videos after a step, on every process. metrics: on the main one."""

    stage: Stage
    networks: Mapping[str, Network]
    config: TrainerConfig
    group: Group
    checkpoints: Checkpoints
    metrics: Metrics | None
    clock: Clock
    sample: Callable[[int], None] | None = None
    progress: Progress = field(default_factory=Progress)

    @property
    def num_samples(self) -> int:
        """Samples in a micro-batch of all processes."""
        return self.config.batch_size * self.group.world_size

    def fit(self) -> bool:
        """Train to the end, or until a signal asks to stop; saves. Returns whether training is complete.

        After Ctrl-C raises KeyboardInterrupt, as that is what the caller expects, when all is saved.
        """
        config, progress = self.config, self.progress
        with (
            _stop_signals() as stop,
            logging_redirect_tqdm(),
            tqdm(total=config.num_steps, initial=progress.step, unit="step", disable=not self.group.is_main) as bar,
        ):
            saved = progress.step
            unread: list[Report] = []
            while progress.step < config.num_steps and not self.group.any(stop.number is not None):
                unread.append(self.step())
                progress.step += 1
                is_saved = config.save_interval > 0 and progress.step % config.save_interval == 0
                is_sampled = config.sample_interval > 0 and progress.step % config.sample_interval == 0
                self._log(unread, bar, num_left=0 if is_saved or is_sampled else 1)
                if is_saved:
                    self.save()
                    saved = progress.step
                if is_sampled and self.sample is not None:
                    self.sample(progress.step)
            self._log(unread, bar)
            if saved != progress.step:
                self.save()
            self.checkpoints.wait()
        if stop.number == signal.SIGINT:
            raise KeyboardInterrupt
        return progress.step >= config.num_steps

    def save(self) -> None:
        """Start saving a checkpoint; training may go on at once."""
        self.checkpoints.save(self.progress.step, self._state())

    def resume(self, checkpoint: Path) -> None:
        """Go on from a checkpoint.

        In another number of processes or with another `batch_size`, what a stage keeps of its samples is lost.
        """
        counts: dict[str, Any] = {"progress": self._counts(), "stage": {"values": {}}}
        keys = self.checkpoints.keys(checkpoint)
        prefix = "stage.values."
        counts["stage"]["values"] = {key.removeprefix(prefix): 0 for key in keys if key.startswith(prefix)}
        self.checkpoints.load(checkpoint, counts)
        state = {"networks": {name: network.state() for name, network in self.networks.items()}}
        self.checkpoints.load(checkpoint, state)
        found = counts["progress"]
        for network in self.networks.values():
            network.restored()
        self.progress.step, self.progress.num_seen = found["step"], found["num_seen"]

        def fill(samples: dict[str, Tensor]) -> None:
            self.checkpoints.load(checkpoint, {"stage": {"samples": self._shared(samples)}})

        fits = found["num_samples"] == self.num_samples
        if not fits:
            log.warning("The checkpoint is of %d samples at a time, now %d.", found["num_samples"], self.num_samples)
        self.stage.restore(counts["stage"]["values"], self.config.batch_size, fill if fits else None)
        for name in self.networks:
            self.stage.updated(name)

    def _log(self, unread: list[Report], bar: "tqdm[Any]", num_left: int = 0) -> None:
        """Read the oldest reports and tell what they say; the newest `num_left` may still be on their way."""
        while len(unread) > num_left:
            report = unread.pop(0)
            values = self.read(report)
            bar.set_postfix({name: f"{values[f'{name}/loss']:.4g}" for name in report.gradients})
            bar.update()
            if self.metrics is not None:
                self.metrics.log(report.step, values)

    def step(self) -> Report:
        """Queue one update of every network that is due."""
        config, progress, group = self.config, self.progress, self.group
        due = self.stage.due(progress.step)
        sums: dict[str, Tensor] = {}
        num_frames = 0
        with self.clock.part("step"):
            for round_number in range(config.num_rounds):
                draw = self._draw()
                progress.num_seen += self.num_samples
                for name in due:
                    module = self.networks[name].module
                    if isinstance(module, FSDPModule):
                        module.set_requires_gradient_sync(round_number == config.num_rounds - 1)
                    loss = self.stage.loss(name, draw)
                    with self.clock.part(f"{name}_backward"):
                        (loss.value / config.num_rounds).backward()
                        self.networks[name].take_gradients()
                    num_frames += loss.num_frames
                    for key, value in {"loss": loss.value.detach(), **loss.metrics}.items():
                        label = f"{name}/{key}"
                        sums[label] = sums.get(label, torch.zeros((), device=group.device)) + value.float()
            means = self.group.mean(torch.stack(list(sums.values()))) / config.num_rounds
            norms = {name: self._update(name) for name in due}
            numbers = torch.cat([means, *(found.values for found in norms.values())]).to("cpu", non_blocking=True)
        gradients = {name: found.names for name, found in norms.items()}
        spans, num_seen = self.clock.take(), progress.num_seen
        return Report(progress.step + 1, tuple(sums), gradients, numbers, spans, num_frames, num_seen)

    def _update(self, name: str) -> Norms:
        with self.clock.part("optimizer"):
            norms = self.networks[name].update(self.progress.step, self.config.num_steps)
        self.stage.updated(name)
        return norms

    def read(self, report: Report) -> dict[str, float]:
        """What there is to log of a step. Raises NonFiniteError for a loss or gradient that is no number."""
        seconds = report.spans.seconds()  # all that the step told has come by now
        numbers = iter(report.numbers.tolist())
        values = dict(zip(report.means, numbers, strict=False))
        norms = {name: dict(zip(parameters, numbers, strict=False)) for name, parameters in report.gradients.items()}
        for name in norms:
            if not math.isfinite(values[f"{name}/loss"]):
                raise self._broken(report.step, f"{name}: loss")
        for name, found in norms.items():
            values[f"{name}/grad_norm"] = math.hypot(*found.values())
            bad = [parameter for parameter, norm in found.items() if not math.isfinite(norm)]
            if bad:
                raise self._broken(report.step, f"{name}: gradient of {', '.join(bad[:3])}")
        values |= {f"time/{name}_s": spent for name, spent in seconds.items()}
        values["throughput/latents_per_second"] = report.num_frames * self.group.world_size / seconds["step"]
        if self.group.device.type == "cuda":
            values["memory/peak_gb"] = torch.cuda.max_memory_allocated(self.group.device) / 1e9
        return values | {"data/samples": float(report.num_seen)}

    def _broken(self, step: int, what: str) -> NonFiniteError:
        """What is no number, and what is left."""
        last = self.checkpoints.latest()
        kept = "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"
        return NonFiniteError(f"step {step}: {what} is NaN or infinite; {kept}")

    def _draw(self) -> Draw:
        config, group = self.config, self.group
        offset = group.rank * config.batch_size
        return Draw(config.seed, self.progress.num_seen, self.num_samples, offset, config.batch_size, group.device)

    def _state(self) -> dict[str, Any]:
        stage = self.stage.state()
        samples = {name: _unshared(tensor) for name, tensor in stage["samples"].items()}
        return {
            "networks": {name: network.state() for name, network in self.networks.items()},
            "stage": {"values": stage["values"], "samples": self._shared(samples)},
            "progress": self._counts(),
        }

    def _counts(self) -> dict[str, Any]:
        return {
            "step": self.progress.step,
            "num_seen": self.progress.num_seen,
            "num_samples": self.num_samples,
        }

    def _shared(self, samples: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.group.by_sample(tensor) for name, tensor in samples.items()}


def _unshared(tensor: Tensor) -> Tensor:
    """The tensor with memory of its own: the library cannot save DTensors that are a part of something larger."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


@dataclass
class _Stop:
    number: int | None = None


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """Turn the first SIGTERM or Ctrl-C into a request to stop; the next one stops at once."""
    stop = _Stop()

    def ask(number: int, frame: FrameType | None) -> None:
        log.warning("%s: saving after this step, then stopping", signal.Signals(number).name)
        stop.number = number
        restore()

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    for number in handlers:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        restore()
