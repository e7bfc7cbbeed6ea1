"""The one training loop of every scorer: AdamW, early stopping, the best epoch restored, over one process or many.

epoch:  seeded permutation -> global batches -> this rank's slice -> risk -> step      (gradients averaged by DDP)
        validation risk over all ranks -> the same stop decision on each of them
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

Risk = Callable[[Tensor, Tensor], Tensor]  # (logit [B], row numbers [B]) -> per-row risk [B]


class Calling(nn.Module):
    """A module whose forward is the `method` of another."""

    def __init__(self, module: nn.Module, method: str) -> None:
        super().__init__()
        self.module, self._method = module, method

    def forward(self, **batch: Tensor) -> Tensor:
        """What the method gives for a batch."""
        return getattr(self.module, self._method)(**batch)


class Inputs(Protocol):
    """What a scorer reads: N rows, of which any B make a batch (see data.collate)."""

    def __len__(self) -> int: ...

    def batch(self, index: Tensor) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Objective:
    """A mean of per-row risks: `rows` [M] are row numbers in the whole log, `risk` maps their logits to risks.

    As what is trained on, `begin` is called with the number of each epoch before it, for risks that follow a schedule. As what
    validates, `since` >= 1 is the first epoch that may be the best one (the last epoch, where fewer are run).
    """

    rows: Tensor
    risk: Risk
    begin: Callable[[int], None] | None = None
    since: int = 1


@dataclass(frozen=True)
class FitSettings:
    """How to train.

    `epochs` >= 1 passes at most; `lr` > 0; `batch_size` >= 1 rows per step over all ranks; stop after `patience` >= 1 epochs
    without a lower validation risk. `bf16` computes outputs in bfloat16 (half the time where the processor has it); weights,
    their moments and risks stay in float32.
    """

    epochs: int
    lr: float
    batch_size: int
    patience: int = 2
    weight_decay: float = 0.01
    seed: int = 0
    bf16: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.lr <= 0:
            raise ValueError(f"lr must be above 0, got {self.lr}")


@dataclass(frozen=True)
class Shard:
    """This process's part of the work. Above one process, torch.distributed is up, and `wrap` puts a module into DDP."""

    rank: int = 0
    world_size: int = 1
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module

    def take(self, index: Tensor) -> Tensor:
        """This rank's slice of a global list of rows."""
        return index[self.rank :: self.world_size]

    def sum(self, value: Tensor) -> Tensor:
        """`value` added up over the ranks."""
        if self.world_size == 1:
            return value
        total = value.cuda() if dist.get_backend() == "nccl" else value
        dist.all_reduce(total)
        return total.cpu()


SINGLE = Shard()


@dataclass(frozen=True)
class Epoch:
    """Mean risks of one pass; `number` counts from 1."""

    number: int
    train_risk: float
    validation_risk: float


@dataclass(frozen=True)
class FitReport:
    """All epochs that ran, and the one whose weights were kept."""

    epochs: tuple[Epoch, ...]
    best: Epoch


def seeded(make_module: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A fresh module whose random start depends on `seed` only."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make_module()


def fit(
    module: nn.Module,
    inputs: Inputs,
    train: Objective,
    validation: Objective,
    settings: FitSettings,
    shard: Shard = SINGLE,
) -> FitReport:
    """Train `module` in place on `train`, and leave it with the weights of the epoch of lowest `validation` risk.

    `module` is bare; `shard.wrap` makes of it what several processes train.

    Gradients do not depend on the number of ranks: each takes index[rank::world_size] of a global batch of B rows and
    minimises world_size / B * sum of its risks, which DDP averages. The same seed and ranks give the same weights.
    Raises ValueError for an empty objective, FloatingPointError that names the epoch for a risk that is not finite.
    """
    for name, objective in (("train", train), ("validation", validation)):
        if len(objective.rows) == 0:
            raise ValueError(f"{name} must hold at least one row, got none")
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    wrapped = shard.wrap(module)
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    order = torch.Generator().manual_seed(settings.seed)
    first = min(validation.since, settings.epochs)
    epochs: list[Epoch] = []
    best_state: dict[str, Tensor] = {}
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed + shard.rank)  # dropout: its own on every rank
        for number in range(1, settings.epochs + 1):
            if train.begin is not None:
                train.begin(number)
            train_risk = _train_epoch(wrapped, inputs, train, settings, optimizer, order, shard)
            epoch = Epoch(number, train_risk, mean_risk(module, inputs, validation, shard=shard, bf16=settings.bf16))
            if not torch.isfinite(torch.tensor([epoch.train_risk, epoch.validation_risk])).all():
                raise FloatingPointError(f"risk must be finite, got {epoch}")
            epochs.append(epoch)
            if number < first:
                continue
            best = min(epochs[first - 1 :], key=lambda past: past.validation_risk)
            if best is epoch:
                best_state = {name: value.detach().clone() for name, value in module.state_dict().items()}
            elif number - best.number >= settings.patience:
                break
    module.load_state_dict(best_state)
    return FitReport(tuple(epochs), min(epochs[first - 1 :], key=lambda past: past.validation_risk))


def _train_epoch(
    module: nn.Module,
    inputs: Inputs,
    objective: Objective,
    settings: FitSettings,
    optimizer: torch.optim.Optimizer,
    order: torch.Generator,
    shard: Shard,
) -> float:
    module.train()
    total = torch.zeros((), dtype=torch.float64)
    rows = objective.rows[torch.randperm(len(objective.rows), generator=order)]
    for batch in rows.split(settings.batch_size):
        index, share = shard.take(batch), shard.world_size / len(batch)
        if len(index) == 0:  # the last batch is shorter than the ranks are many; DDP still needs this one's backward
            index, share = batch[:1], 0.0
        risk = objective.risk(outputs(module, inputs, index, settings.bf16), index).sum()
        optimizer.zero_grad(set_to_none=True)
        (share * risk).backward()
        optimizer.step()
        total += risk.detach().double() * (share > 0)
    return float(shard.sum(total)) / len(rows)


def mean_risk(
    module: nn.Module, inputs: Inputs, objective: Objective, batch_size: int = 512, shard: Shard = SINGLE, bf16: bool = False
) -> float:
    """Mean of `objective` over its rows, in evaluation mode; each rank computes its slice and all get the whole."""
    rows = shard.take(objective.rows)
    logit = predict(module, inputs, rows, batch_size, bf16=bf16)
    return float(shard.sum(objective.risk(logit, rows).double().sum())) / len(objective.rows)


def predict(
    module: nn.Module,
    inputs: Inputs,
    index: Tensor | None = None,
    batch_size: int = 512,
    shard: Shard = SINGLE,
    bf16: bool = False,
) -> Tensor:
    """Outputs [M, ...] of the rows `index` [M] (all rows where none are given), in evaluation mode and without gradients.

    With more ranks than one, each computes its slice and all get every output.
    """
    index = torch.arange(len(inputs)) if index is None else index
    was_training = module.training
    module.eval()
    with torch.no_grad():
        rows = shard.take(index)
        # A rank without rows computes one all the same: it must know the shape of an output.
        own_rows = rows if len(rows) else index[:1]
        parts = [outputs(module, inputs, part, bf16) for part in own_rows.split(batch_size) if len(part)]
    module.train(was_training)
    own = torch.cat(parts)[: len(rows)] if parts else torch.zeros(0)
    if shard.world_size == 1:
        return own
    logit = own.new_zeros(len(index), *own.shape[1:])
    logit[shard.rank :: shard.world_size] = own
    return shard.sum(logit)


def device_of(module: nn.Module) -> torch.device:
    """Where `module` lies, by its first parameter or buffer: trees have buffers only."""
    return next(itertools.chain(module.parameters(), module.buffers())).device


def outputs(module: nn.Module, inputs: Inputs, index: Tensor, bf16: bool = False) -> Tensor:
    """What `module` gives for the rows `index` [B]: [B, ...] of single precision or more, on the CPU."""
    device = device_of(module)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        logit = module(**{name: value.to(device) for name, value in inputs.batch(index).items()})
    if logit.shape[:1] != index.shape:
        raise ValueError(f"a module must return one output per row, got shape {tuple(logit.shape)} for {len(index)} rows")
    return logit.to("cpu", torch.promote_types(logit.dtype, torch.float32))
