"""The loop inside `fit`: the state of one training run and what happens at each step of it.

The samples of every step are settled beforehand (`batches.py`), so the state that a journal must keep is small: the
step, the trained parameters and their best values, the optimizer, the schedule, the random states of every process
(for dropout) and the history.
"""

import dataclasses
import math
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from .batches import draw
from .fit_report import FitReport
from .journal import Journal
from .schedules import SCHEDULES
from .sharding import Shard, put, whole
from .undisturbed import get_random_states, set_random_states


Loss = Callable[[nn.Module, Tensor], Tensor]
PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Loop:
    """One call of `fit`.

    Args:
        model: on `device`.
        parameters: those to train, by name.
        tokens: int64 (samples, length), on the CPU.
        loss: as for `fit`.
        settings: the keyword arguments of `fit`, with `micro_batch_size` a number.
        shard: makes the sharded copy of the model to train in its place; `None` trains `model` itself.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: dict[str, nn.Parameter],
        tokens: Tensor,
        loss: Loss,
        settings: dict[str, Any],
        accelerator: Accelerator,
        device: torch.device,
        journal: Journal | None,
        shard: Shard | None,
    ):
        self.bare, self.parameters, self.tokens, self.loss = model, parameters, tokens, loss
        self.settings, self.accelerator, self.device, self.journal = settings, accelerator, device, journal
        self.results, self.shard = parameters, shard  # what the caller has in the end, other tensors if sharded
        self.dtype = PRECISIONS[accelerator.mixed_precision]
        self.rank, self.processes = accelerator.process_index, accelerator.num_processes
        steps, batch_size, micro = settings["steps"], settings["batch_size"], settings["micro_batch_size"]
        self.held, order = draw(len(tokens), settings["held_out"], steps, batch_size, settings["seed"])
        self.order = order.view(steps, -1, self.processes, micro)[:, :, self.rank]  # (steps, micro-batches, micro)

        self.report, self.finished, self.start = FitReport(), False, time.perf_counter()
        self.step = 0
        self.stale = 0  # evaluations since the best one
        self.best: dict[str, Tensor] | None = None
        self.losses: list[float] = []  # since the last row of the history

    def run(self) -> FitReport:
        """Train from the journal's entry or from the start; see `fit`."""
        self._prepare()
        try:
            if not self._resume():
                self._evaluate()
            if not self.finished:
                self._train()
        except FloatingPointError:
            self._end_with_best()
            if self.journal is not None and self.accelerator.is_main_process:
                self.journal.remove()
            raise
        return self.report

    def _prepare(self) -> None:
        """Seeds, the model sharded or wrapped for data parallelism, the optimizer and its schedule."""
        s = self.settings
        random.seed(s["seed"] + self.rank)
        torch.manual_seed(s["seed"] + self.rank)
        self.model = self.bare
        if self.shard is not None:
            self.model = self.bare = self.shard(self.bare)
            self.parameters = {name: p for name, p in self.bare.named_parameters() if name in self.results}
        elif self.processes > 1:
            index = None if self.device.type == "cpu" else [self.device.index]
            self.model = DistributedDataParallel(self.bare, device_ids=index)
        self.adamw = torch.optim.AdamW(self._groups(), lr=s["learning_rate"])
        warmup = min(s["warmup_steps"], s["steps"] // 5)
        self.schedule = LambdaLR(self.adamw, partial(SCHEDULES[s["schedule"]], warmup=warmup, steps=s["steps"]))
        self.optimizer = self.accelerator.prepare_optimizer(self.adamw, device_placement=False)

    def _groups(self) -> list[dict[str, Any]]:
        """The parameters by what AdamW does to them: matrices decay, submodules may have rates of their own."""
        s, groups = self.settings, {}
        rates = s["rates"] or {}
        for name, parameter in self.parameters.items():
            factor = next((rate for path, rate in rates.items() if name.startswith(f"{path}.")), 1.0)
            groups.setdefault((factor, parameter.dim() > 1), []).append(parameter)
        ordered = sorted(groups.items(), key=lambda group: (group[0][0] != 1, not group[0][1]))
        decays = {True: s["weight_decay"], False: 0.0}
        return [
            {"params": group, "weight_decay": decays[decayed], "lr": factor * s["learning_rate"]}
            for (factor, decayed), group in ordered
        ]

    def _train(self) -> None:
        s, quiet = self.settings, None if self.accelerator.is_main_process else True
        self.bare.train()
        with tqdm(total=s["steps"], initial=self.step, desc=s["description"], unit="step", disable=quiet) as progress:
            while self.step < s["steps"] and not self._out_of_patience():
                rate = self.schedule.get_last_lr()[0]
                self._before_step()
                mean = self._optimizer_step(self.order[self.step])
                self.losses.append(mean)
                self.step += 1
                if self.step % s["evaluate_every"] == 0 or self.step == s["steps"]:
                    self._evaluate(rate)
                figures = {"loss": mean, "held_out": self.report.history[-1]["held_out"], "learning_rate": rate}
                progress.set_postfix({key: f"{value:.4g}" for key, value in figures.items() if value is not None})
                progress.update()
                if self.step % s["journal_every"] == 0 and self.step < s["steps"]:
                    self._write()
        self._end_with_best()
        if self.best is None:
            self.report.best_step = self.step
        self.finished = True
        self._write()

    def _before_step(self) -> None:
        """What depends on the number of the step alone, so that it is the same in a run that goes on."""
        s = self.settings
        if s["schedule"] == "two_stage" and 2 * self.step >= s["steps"]:
            for group in self.adamw.param_groups:
                group["weight_decay"] = 0.0
        if s["before_step"] is not None:
            s["before_step"](self.step)

    def _optimizer_step(self, micro_batches: Tensor) -> float:
        """One step on samples (micro-batches, micro); returns the mean loss over all processes."""
        accelerator, total = self.accelerator, 0.0
        for rows in micro_batches:
            with accelerator.accumulate(self.model):
                value = self._loss(self.model, rows)
                accelerator.backward(value)
            total = total + value.detach()
        mean = self._sum(float(total)) / (len(micro_batches) * self.processes)
        self._check_finite(mean, "training loss", self.step + 1)
        limit = self.settings["max_grad_norm"]
        norm = accelerator.clip_grad_norm_(self.parameters.values(), math.inf if limit is None else limit)
        if accelerator.scaler is None:  # a gradient scaler skips such steps on its own
            self._check_finite(float(whole(norm)), "norm of the gradient", self.step + 1)
        self.optimizer.step()
        if not self.optimizer.step_was_skipped:
            self.schedule.step()
        self.optimizer.zero_grad()
        return mean

    def _loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            return self.loss(model, self.tokens[rows].to(self.device))

    def _check_finite(self, value: float, what: str, step: int) -> None:
        if math.isfinite(value):
            return
        if step == 0:
            raise FloatingPointError(
                f"the {what} is {value} before training: the model is damaged, which training cannot mend"
            )
        rate = self.settings["learning_rate"]
        raise FloatingPointError(
            f"the {what} is {value} at step {step} of {self.settings['steps']}; lower learning_rate (now {rate:g})"
        )

    @torch.no_grad()
    def _evaluate(self, rate: float = 0.0) -> None:
        """Add a row to the history, and keep the parameters if they are the best so far."""
        report, held_out = self.report, None
        if len(self.held):
            self.bare.eval()
            total = sum(float(self._loss(self.bare, rows)) * weight for rows, weight in self._held_out())
            held_out = self._sum(total) / len(self.held)
            self.bare.train()
            self._check_finite(held_out, "held-out loss", self.step)
            if self.step == 0:
                report.held_out_before = held_out
            self.stale += 1
            if report.held_out_after is None or held_out < report.held_out_after:
                report.held_out_after, report.best_step, self.stale = held_out, self.step, 0
                self.best = self._keep()
        mean = sum(self.losses) / len(self.losses) if self.losses else None
        report.history.append({"step": self.step, "loss": mean, "held_out": held_out, "learning_rate": rate})
        self.losses = []

    def _held_out(self) -> list[tuple[Tensor, int]]:
        """The held-out samples of this process in micro-batches, with their weights.

        There are as many in every process, because a sharded model is gathered by all of them at once.
        """
        micro = self.settings["micro_batch_size"]
        batches = [(rows, len(rows)) for rows in self.held[self.rank :: self.processes].split(micro) if len(rows)]
        most = math.ceil(math.ceil(len(self.held) / self.processes) / micro)
        return batches + [(self.held[:1], 0)] * (most - len(batches))

    def _out_of_patience(self) -> bool:
        patience = self.settings["patience"]
        return patience is not None and self.stale >= patience

    def _sum(self, value: float) -> float:
        """The sum over all processes."""
        if self.processes == 1:
            return value
        return float(self.accelerator.reduce(torch.tensor(value, device=self.device, dtype=torch.float64)))

    def _keep(self) -> dict[str, Tensor]:
        """The values of the parameters, by name: copies, or of a sharded model those of the caller's, set to them."""
        if self.shard is None:
            return {name: whole(p) for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            put(whole(parameter), self.results[name])
        return {name: p.detach() for name, p in self.results.items()}

    def _end_with_best(self) -> None:
        """Leave the best parameters in the caller's model, or without held-out samples the last ones."""
        if self.shard is None:
            self._restore(self.parameters, self.best)
        elif self.best is None:
            self._keep()

    def _restore(self, parameters: dict[str, nn.Parameter], values: dict[str, Tensor] | None) -> None:
        for name, value in (values or {}).items():
            put(value, parameters[name])

    def _write(self) -> None:
        """Bring the report up to date, and put everything needed to go on into the journal."""
        now = time.perf_counter()
        self.report.seconds += now - self.start
        self.start, self.report.steps = now, self.step
        self.report.tokens = self.step * self.settings["batch_size"] * self.tokens.shape[1]
        if self.journal is None:
            return
        states, main = gather_object([get_random_states(self.device)]), self.accelerator.is_main_process
        current = self.results if self.finished else self.parameters
        values = {name: whole(p, keep=main) for name, p in current.items()}
        optimizer = None if self.finished else self._optimizer_state(keep=main)
        if main:
            scaler = self.accelerator.scaler
            entry = {
                "finished": self.finished,
                "step": self.step,
                "stale": self.stale,
                "losses": self.losses,
                "report": dataclasses.asdict(self.report),
                "parameters": values,
            }
            state = {
                "best": self.best,
                "optimizer": optimizer,
                "schedule": self.schedule.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "random": states,
            }
            self.journal.write(entry if self.finished else entry | state)
        self.accelerator.wait_for_everyone()

    def _optimizer_state(self, keep: bool) -> dict[str, Any]:
        """AdamW's state with whole tensors, where they are to be kept."""
        found = self.adamw.state_dict()
        if self.shard is None:
            return found
        moments = {i: {key: whole(t, keep) for key, t in state.items()} for i, state in found["state"].items()}
        return found | {"state": moments}

    def _resume(self) -> bool:
        """Take up the journal's entry, if there is one; one process after the other, since each holds all of it."""
        if self.journal is None:
            return False
        found = False
        for turn in range(self.processes):
            if turn == self.rank and (entry := self.journal.read()) is not None:
                self._take_up(entry)
                found = True
            self.accelerator.wait_for_everyone()
        return found

    def _take_up(self, entry: dict[str, Any]) -> None:
        for name in ("finished", "step", "stale", "losses"):
            setattr(self, name, entry[name])
        self.report = FitReport(**entry["report"] | {"resumed_from": self.step})
        self._restore(self.results if self.finished else self.parameters, entry["parameters"])
        if self.finished:
            return
        self.best = entry["best"]
        if self.shard is not None and self.best is not None:
            self._restore(self.results, self.best)
            self.best = {name: p.detach() for name, p in self.results.items()}
        trained = [p for group in self.adamw.param_groups for p in group["params"]]
        for i, state in entry["optimizer"]["state"].items():
            for key in ("exp_avg", "exp_avg_sq"):
                moment = torch.empty_like(trained[i].detach())
                put(state[key], moment)
                state[key] = moment
        self.adamw.load_state_dict(entry["optimizer"])
        self.schedule.load_state_dict(entry["schedule"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(entry["scaler"])
        set_random_states(entry["random"][self.rank], self.device)
