"""One update: exactly weighted gradients over batches and processes, and the optimizer step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from pynar.training.config import TrainingConfig
from pynar.training.schedule import learning_rate
from pynar.training.seeds import PREPARATION, TRAINING, seed_device, seeds
from pynar.training.shards import Shards

__all__ = ["Losses", "Opaque", "Summary", "Updater", "make_optimizer"]


class Opaque:
    """Carries an example through the wrappers of Fabric and DDP unseen.

    They would copy it, and cast its counts, on the way to the model.
    """

    __slots__ = ("example",)

    def __init__(self, example: Any) -> None:
        self.example = example


class Losses(nn.Module):
    """The forward pass of training: an example in, the sum of every loss term out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, opaque: Opaque) -> dict[str, Tensor]:
        return self.model(opaque.example)


def make_optimizer(parameters: Iterable[nn.Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over the parameters.

    Fused, because that kernel alone can skip a step by a flag on the device, without the host
    waiting for the gradients in order to decide.
    """
    return torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        amsgrad=config.amsgrad,
        fused=True,
    )


@dataclass(frozen=True)
class Summary:
    """What happened since the last summary, over all processes."""

    losses: dict[str, float]  # means, of the updates that were not skipped
    loss: float  # their weighted sum
    counts: dict[str, float]
    grad_norm: float  # of the last update, before clipping
    target_tokens: float
    skipped: int  # updates, since training began
    streak: int  # consecutive skipped updates, now
    non_finite: dict[str, int]  # batches with a non-finite loss in the present streak, by term


class Updater:
    r"""Makes updates of the objective over all ranks :math:`r` and batches :math:`m`,

    .. math:: \sum_k w_k \frac{\sum_{r,m} \mathrm{sum}_{k,r,m}}{\sum_{r,m} \mathrm{count}_{k,r,m}}

    so that every token weighs the same wherever it lies. The counts come from `model.corrupt`,
    which all batches of the update pass before the first gradient is computed.

    A non-finite loss or gradient leaves weights and optimizer as they were. The decision and all
    figures stay on the device until `summary` reads them.
    """

    def __init__(self, fabric: Fabric, model: nn.Module, config: TrainingConfig) -> None:
        self._fabric, self._config = fabric, config
        self.model = cast(Any, model)  # has more than a module, see `pynar.training.train`
        self.terms = sorted(self.model.loss_weights)
        compiled: Any = torch.compile(model, dynamic=True) if config.compile else model
        root: Any = Losses(compiled)
        self.module = fabric.setup_module(root)
        # What is trained here, by name: all of it, or this process's shares.
        self._shards = Shards(root, model) if isinstance(root, FSDPModule) else None
        self._own = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if self._shards is not None:
            self._own = self._shards.own
        self.optimizer = make_optimizer(self._own.values(), config)
        # Fabric adds nothing to the optimizer but the scaler of fp16.
        self._stepper: Any = self.optimizer
        if self._shards is None:
            self._stepper = fabric.setup_optimizers(self.optimizer)
        self._generator = torch.Generator(fabric.device)
        self._scaler = getattr(fabric.strategy.precision, "scaler", None)
        weights = [self.model.loss_weights[term] for term in self.terms]
        self._weights = torch.tensor(weights, dtype=torch.float64, device=fabric.device)
        self._losses, self._counts, self._bad = (torch.zeros_like(self._weights) for _ in range(3))
        self._norm, self._streak, self._skipped = torch.zeros(3, device=fabric.device).unbind()
        self._tokens = 0

    @contextmanager
    def whole(self, *, only_first: bool = False) -> Iterator[None]:
        """Has the model hold all of its weights meanwhile; all processes must enter it together.

        For what uses the model outside of `self.forward`; with `only_first` on the first process
        alone. Where nothing is sharded it holds them anyway.
        """
        if self._shards is None:
            yield
            return
        with self._shards.whole(only_first=only_first):
            yield

    def end(self) -> None:
        """Leaves the model with all of its weights; no update can follow."""
        if self._shards is not None:
            self._shards.dissolve()

    def settle(self, batch: Any) -> None:
        """Lets DDP settle how it groups the gradients; to be called once, with any fixed batch.

        DDP regroups them after its first backward pass, and in which order three or more
        processes add a gradient up depends on its group: without this pass, the first update
        after resuming would differ in the last bits from that of an uninterrupted run. Nor may
        a parameter have no gradient, with DDP or FSDP.
        """
        if self._fabric.world_size == 1:
            return
        with torch.no_grad():
            buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        seed_device(self._fabric.device, 0)
        example = self.model.corrupt(batch.to(self._fabric.device), self._generator.manual_seed(0))
        with self.whole():
            if self._shards is None:
                self._fabric.backward(self.forward(example).sum())
            else:
                # Past FSDP, which would leave out what has no gradient without a word.
                with self._fabric.autocast():
                    losses = self.model(example)
                torch.stack([*losses.values()]).sum().backward()
            named = self.model.named_parameters()
            names = [name for name, p in named if p.requires_grad and p.grad is None]
        if names:
            raise ValueError(
                f"{type(self.model).__name__}: every parameter must take part in the losses when "
                f"training in several processes, got no gradient for {', '.join(names)}"
            )
        self.optimizer.zero_grad()
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)

    def update(self, number: int, batches: Sequence[Any]) -> None:
        """Makes update `number` with this process's `batches`, as many as on every process."""
        config, fabric = self._config, self._fabric
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, number)
        self._begin(number, batches[0])
        weights = self._weights_at(number)
        place = (config.seed, TRAINING, number, fabric.global_rank)
        noise, dropout = zip(*(seeds(*place, i) for i in range(len(batches))), strict=True)
        examples = [self._corrupt(*pair) for pair in zip(batches, noise, strict=True)]
        local = sum((self.counts(example) for example in examples), torch.zeros_like(self._counts))
        counts = self.reduce(local)
        # DDP takes the mean over processes, the objective is a sum over them.
        factors = weights * fabric.world_size / counts.clamp(min=1.0)
        sums, bad = torch.zeros_like(self._losses), torch.zeros_like(self._bad)
        for i, example in enumerate(examples):
            seed_device(fabric.device, dropout[i])
            more = i + 1 < len(examples)
            with fabric.no_backward_sync(self.module, enabled=more):
                losses = self.forward(example)
                finite = losses.detach().isfinite()
                # A non-finite loss may have finite gradients. Poisoned, they tell every process
                # through the sum of the gradients that the step must be skipped.
                poisoned = torch.where(finite, factors, torch.nan).to(losses.dtype)
                fabric.backward((losses * poisoned).sum())
            sums += losses.detach()
            bad += ~finite
        done = self._step()
        self._losses += torch.where(done, sums, 0.0)
        self._counts += torch.where(done, counts, 0.0)
        self._bad = torch.where(done, 0.0, self._bad + bad)

    def _begin(self, number: int, batch: Any) -> None:
        """Lets a model that trains in phases prepare for the next; all processes begin alike."""
        begin = getattr(self.model, "begin_update", None)
        if begin is None:
            return
        noise, other = seeds(self._config.seed, PREPARATION, number, self._fabric.global_rank, 0)
        seed_device(self._fabric.device, other)
        batch = batch.to(self._fabric.device)
        made: dict[str, nn.Parameter] = {}
        fits = getattr(self.model, "fits", None)
        needs = self.whole() if fits is None or fits(number) else nullcontext()
        with needs, torch.no_grad():
            changed = begin(number, batch, self._generator.manual_seed(noise))
            if changed and self._fabric.world_size > 1:
                made = dict(self.model.named_parameters())
                for parameter in made.values():
                    torch.distributed.broadcast(parameter, 0)
        if self._shards is not None:
            self._shards.keep(made)

    def _weights_at(self, number: int) -> Tensor:
        """The weight of every term in an update, `[terms]`; constant for most models."""
        at = getattr(self.model, "weights_at", None)
        if at is None:
            return self._weights
        weights = at(number)
        return torch.tensor([weights[term] for term in self.terms]).to(self._weights)

    def _corrupt(self, batch: Any, seed: int) -> Any:
        self._tokens += int(batch.target_lengths.sum())
        batch = batch.to(self._fabric.device)
        return self.model.corrupt(batch, self._generator.manual_seed(seed))

    def counts(self, example: Any) -> Tensor:
        """The counts of an example as fp64 `[terms]`."""
        self._check(example.counts, "counts of the example")
        counts = [torch.as_tensor(example.counts[term], dtype=torch.float64) for term in self.terms]
        return torch.stack(counts).to(self._fabric.device)

    def forward(self, example: Any) -> Tensor:
        """The loss sums of an example, `[terms]`, through the wrapped module."""
        losses = self.module(Opaque(example))
        self._check(losses, "losses")
        return torch.stack([losses[term] for term in self.terms])

    def _check(self, given: dict[str, Any], what: str) -> None:
        if sorted(given) != self.terms:
            raise ValueError(
                f"{type(self.model).__name__}: the {what} must have the terms of "
                f"`loss_weights`, {', '.join(self.terms)}, got {', '.join(sorted(given))}"
            )

    def reduce(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over all processes, in place."""
        if self._fabric.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def _step(self) -> Tensor:
        """Clips and steps where the gradient is finite; returns whether it was."""
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        if self._shards is not None:
            self._shards.take_gradients()
        parameters = self._own.values()
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self._shards is not None:
            norm = self.reduce(norm.square()).sqrt()
        done = norm.isfinite()
        if self._config.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self._config.clip_norm, norm)
        # The flag of the fused optimizer by which a gradient scaler, too, skips a step.
        self.optimizer.found_inf = (~done).float()  # type: ignore[attr-defined]
        self._stepper.step()
        self.optimizer.zero_grad()
        self._norm = norm
        self._streak = torch.where(done, 0.0, self._streak + 1)
        self._skipped = self._skipped + (~done)
        return done

    def streak(self) -> int:
        """How many updates in a row were skipped up to now; waits for the device."""
        return int(self._streak)

    def skipped(self) -> int:
        """How many updates were skipped since training began; waits for the device."""
        return int(self._skipped)

    def summary(self) -> Summary:
        """Reads the figures since the last call; this is where the host waits for the device."""
        tokens = torch.tensor([self._tokens], dtype=torch.float64, device=self._fabric.device)
        shared = self.reduce(torch.cat([self._losses, self._bad, tokens]))
        own = torch.stack([self._norm, self._streak, self._skipped]).double()
        values = torch.cat([shared, self._counts, own]).tolist()
        self._losses, self._counts = torch.zeros_like(self._losses), torch.zeros_like(self._counts)
        self._tokens = 0
        n = len(self.terms)
        sums, bad, counts = values[:n], values[n : 2 * n], values[2 * n + 1 : 3 * n + 1]
        norm, streak, skipped = values[3 * n + 1 :]
        means = [s / c if c else math.nan for s, c in zip(sums, counts, strict=True)]
        weights = self.model.loss_weights
        return Summary(
            losses=dict(zip(self.terms, means, strict=True)),
            loss=sum(weights[term] * mean for term, mean in zip(self.terms, means, strict=True)),
            counts=dict(zip(self.terms, counts, strict=True)),
            grad_norm=norm,
            target_tokens=values[2 * n],
            skipped=int(skipped),
            streak=int(streak),
            non_finite={t: int(b) for t, b in zip(self.terms, bad, strict=True) if b},
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What resuming needs, as tensors and as plain values; all processes must ask together.

        Of what is sharded the first process alone gets the tensors, on the host.
        """
        tensors: dict[str, Tensor] = {}
        states = {name: self.optimizer.state.get(own, {}) for name, own in self._own.items()}
        for kind in sorted({kind for state in states.values() for kind in state}):
            found = {name: state[kind] for name, state in states.items() if kind in state}
            if self._shards is not None and kind != "step":
                found = self._shards.gather(found, only_first=True, device="cpu")
            tensors |= {f"{kind}/{name}": tensor.contiguous() for name, tensor in found.items()}
        scaler = self._scaler.state_dict() if self._scaler is not None else {}
        return tensors, {"skipped": self.skipped(), "streak": self.streak(), **scaler}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Continues from what `state` returned."""
        for key, tensor in tensors.items():
            kind, name = key.split("/", 1)
            if self._shards is not None and kind != "step":
                tensor = self._shards.cut(name, tensor).clone()
            own = self._own[name]
            self.optimizer.state[own][kind] = tensor.to(own.device)
        self._skipped.fill_(values["skipped"])
        self._streak.fill_(values["streak"])
        if self._scaler is not None and "scale" in values:
            self._scaler.load_state_dict({k: values[k] for k in self._scaler.state_dict()})
