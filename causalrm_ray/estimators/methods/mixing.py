"""Methods that train on mixed rows: DivideMix (rows split by loss, labels refined) and SelectMix (doubtful rows relabelled).

begin of an epoch: targets [N, K], partners [N], shares [N] drawn -> batch: row and partner -> states mixed -> head -> risk

States are mixed, not inputs (manifold mixup, Verma et al. 2019, arXiv 1806.05236), so that token ids can be mixed as well.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from causalrm_ray.estimators.core.task import FitTask, Fitted
from causalrm_ray.estimators.core.training import Inputs, Objective, predict
from causalrm_ray.estimators.methods.observed import cool, minimise, observed, plain_risk, ramp_epochs
from causalrm_ray.estimators.methods.small_loss import Networks, twins
from causalrm_ray.estimators.nuisances.calibration import temperature
from causalrm_ray.estimators.nuisances.propensity import cross_fit_logits
from causalrm_ray.losses.label_noise import balance_penalty, clean_posterior, co_refined, sharpen
from causalrm_ray.losses.pointwise import bce, mse
from causalrm_ray.models.scorers.heads import Scorer

PARTNER = "partner_"
WARM_UP, PATIENCE = 5, 30  # epochs of DivideMix
THRESHOLD, SHARPNESS, CONCENTRATION, GUESSED = 0.5, 0.5, 4, 1.0  # of a clean label, a temperature, of Beta, a weight
FOLDS = 3  # of SelectMix


class MixedRows:
    """Rows with the partners that they are mixed with: x_i becomes share_i x_i + (1 - share_i) x_partner.

    `partner` [N] row numbers and `share` [N] in [0, 1] may be changed between epochs; at first nothing is mixed.
    """

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs
        self.partner = torch.arange(len(inputs))
        self.share = torch.ones(len(inputs))

    def __len__(self) -> int:
        return len(self._inputs)

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """The rows `index` [B], their partners under names that begin with PARTNER, and `share` [B]."""
        partners = self._inputs.batch(self.partner[index])
        return {
            **self._inputs.batch(index),
            **{PARTNER + name: value for name, value in partners.items()},
            "share": self.share[index],
        }

    def mixed(self, target: Tensor, index: Tensor) -> Tensor:
        """Targets [B] of the mixed rows `index` [B], from `target` [N] of all rows."""
        share = self.share[index]
        return share * target[index] + (1 - share) * target[self.partner[index]]


class MixingNetworks(Networks):
    """Scorers whose states are mixed in training, where the batch is of MixedRows; in evaluation partners are ignored."""

    def forward(self, **batch: Tensor) -> Tensor:
        """Logits [B, K]. Raises ValueError for a scorer without states and head."""
        share = batch.pop("share", None)
        own = {name: value for name, value in batch.items() if not name.startswith(PARTNER)}
        if not self.training or share is None:
            return super().forward(**own)
        partner = {name.removeprefix(PARTNER): value for name, value in batch.items() if name.startswith(PARTNER)}
        return torch.stack([_mix(module, own, partner, share) for module in self.scorers], dim=1)


def _mix(module: torch.nn.Module, own: dict[str, Tensor], partner: dict[str, Tensor], share: Tensor) -> Tensor:
    if not hasattr(module, "states"):
        raise ValueError(f"a scorer whose rows are mixed must have states and a linear head, got {type(module).__name__}")
    scorer = cast(Scorer, module)
    states = scorer.states(**own)
    share = share[:, None].to(states.dtype)
    return scorer.head(share * states + (1 - share) * scorer.states(**partner)).squeeze(-1).float()


def beta_draws(count: int, concentration: int, generator: torch.Generator) -> Tensor:
    """`count` draws of Beta(a, a), a = `concentration` >= 1 whole: the middle one of 2 a - 1 uniform draws."""
    return torch.rand(count, 2 * concentration - 1, generator=generator).median(dim=1).values


class Division:
    """DivideMix's rows in an epoch: which labels each of two networks keeps, what it learns, and with whom it is mixed."""

    def __init__(self, task: FitTask, networks: MixingNetworks, rows: Tensor, warm_up: int) -> None:
        self._problem, self._networks, self._rows, self._warm_up = task, networks, rows, warm_up
        self.inputs = MixedRows(task.inputs)
        self._target = task.observations.r[:, None].repeat(1, 2)
        self._kept = torch.ones(len(task.inputs), 2, dtype=torch.bool)
        self._generator = torch.Generator().manual_seed(task.settings.seed)
        self._warm = True

    @property
    def kept_share(self) -> float:
        """Share of the rows whose labels the first network keeps."""
        return float(self._kept[self._rows, 0].float().mean())

    def begin(self, epoch: int) -> None:
        """From epoch `warm_up` + 1 on: divide the rows again, refine and guess labels, draw partners and shares."""
        self._warm = epoch <= self._warm_up
        if self._warm:
            return
        rows, task = self._rows, self._problem
        r = task.observations.r[rows]
        logits = [predict(scorer, task.inputs, rows, shard=task.shard).float() for scorer in self._networks.scorers]
        prob = [torch.sigmoid(logit) for logit in logits]
        guess = sharpen((prob[0] + prob[1]) / 2, SHARPNESS)
        for k in range(2):  # each network's rows are divided by the other one's losses
            clean = clean_posterior(bce(logits[1 - k], r))
            kept = clean > THRESHOLD
            self._kept[rows, k] = kept
            self._target[rows, k] = torch.where(kept, co_refined(r, prob[k], clean, SHARPNESS), guess)
        share = beta_draws(len(rows), CONCENTRATION, self._generator)
        self.inputs.share[rows] = torch.maximum(share, 1 - share)
        self.inputs.partner[rows] = rows[torch.randperm(len(rows), generator=self._generator)]

    def risk(self, logit: Tensor, index: Tensor) -> Tensor:
        """Risk [B] of `logit` [B, 2], both networks' risks added."""
        return self._of(0, logit[:, 0], index) + self._of(1, logit[:, 1], index)

    def heldout_risk(self, logit: Tensor, index: Tensor) -> Tensor:
        """The first network's plain loss [M] of `logit` [M, 2] at its temperature, and the penalty that asks for both classes."""
        r = self._problem.observations.r[index]
        cooled = logit[:, 0] / temperature(logit[:, 0], r)
        return self._problem.loss(cooled, r) + balance_penalty(torch.sigmoid(cooled))

    def _of(self, k: int, logit: Tensor, index: Tensor) -> Tensor:
        if self._warm:
            return self._problem.loss(logit, self._problem.observations.r[index])
        target = self.inputs.mixed(self._target[:, k], index).to(logit.dtype)
        guessed = GUESSED * mse(logit, target)
        return torch.where(self._kept[index, k], bce(logit, target), guessed) + balance_penalty(torch.sigmoid(logit))


def fit_dividemix(task: FitTask) -> Fitted:
    """DivideMix for rows that cannot be augmented; the first of its two scorers.

    Kept: two networks; a mixture of two Gaussians on the losses of one divides the rows of the other; labels kept are refined,
    those given up are guessed by both networks, and sharpened; MixMatch with cross-entropy on the former, squared error on the
    latter, and the penalty that asks for both classes. Other: no augmented copies, so labels are refined and guessed once an
    epoch rather than in every step; states are mixed; each row draws its share; guessed rows weigh GUESSED, with no ramp.
    The plain warm-up takes WARM_UP epochs (fewer in a short fit), after which epochs compete: by the plain loss and that same
    penalty on held-out feedback, at the temperature that suits it, since sharpened labels make predictions too sure; the scorer
    is given that temperature. As the division unsettles a fit at first, PATIENCE epochs must pass without a better one (half
    of them all in a short fit). The first network serves, so that one scorer is served; as published the two are averaged.
    """
    rows, warm_up = observed(task, task.train), ramp_epochs(task.settings, WARM_UP)
    first, second = twins(task)
    networks = MixingNetworks(first, second)
    division = Division(task, networks, rows, warm_up)
    train = Objective(rows, division.risk, division.begin, since=warm_up + 1)
    heldout = Objective(observed(task, task.heldout), division.heldout_risk, since=train.since)
    patience = max(task.settings.patience, ramp_epochs(task.settings, PATIENCE))
    patient = replace(task, settings=replace(task.settings, patience=patience))
    report = minimise(patient, networks, train, heldout, division.inputs)
    return Fitted(first, report, {"kept_share": division.kept_share, "temperature": cool(task, first)})


def fit_selectmix(task: FitTask) -> Fitted:
    """SelectMix: rows whose label disagrees with an out-of-fold prediction are mixed with trusted rows of either class.

    FOLDS scorers, each trained without a fold, predict it. A row is doubted where the predicted class is not the given one; the
    others are trusted, the surer half of each class as partners. In every epoch a doubted row is mixed with a partner drawn from
    its given or its predicted class by even chance, by a share drawn evenly, and its label alike.
    Trusted rows are left as they are. Held-out rows decide by the labels that mixing would give them on average. The paper
    (cross-validation, confident peers of a row's potential classes, soft labels of all classes involved) was at hand in its
    abstract only: the numbers, the halves, the even chance and the stopping are ours.
    """
    rows, heldout, r = observed(task, task.train), observed(task, task.heldout), task.observations.r
    plain = plain_risk(task)
    logit, _ = cross_fit_logits(replace(task, heldout=heldout), lambda part: Objective(part, plain), rows, FOLDS)
    doubted = (logit > 0) != (r == 1)
    pools = [_surest(rows[~doubted[rows] & (r[rows] == k)], logit) for k in range(2)]
    inputs, generator = MixedRows(task.inputs), torch.Generator().manual_seed(task.settings.seed)
    average = torch.where(doubted, 0.25 + 0.5 * r, r)  # the share is a half on average, and so is the partner's label

    def begin(epoch: int) -> None:
        doubtful = rows[doubted[rows]]
        second = torch.rand(len(doubtful), generator=generator) < 0.5
        for pool, part in zip(pools, (doubtful[~second], doubtful[second]), strict=True):
            if len(pool):
                inputs.partner[part] = pool[torch.randint(len(pool), (len(part),), generator=generator)]
                inputs.share[part] = beta_draws(len(part), 1, generator)

    def risk(output: Tensor, index: Tensor) -> Tensor:
        return task.loss(output[:, 0], inputs.mixed(r, index))

    def heldout_risk(output: Tensor, index: Tensor) -> Tensor:
        return task.loss(output[:, 0], average[index])

    scorer = task.scorer()
    train = Objective(rows, risk, begin)
    report = minimise(task, MixingNetworks(scorer), train, Objective(heldout, heldout_risk), inputs=inputs)
    return Fitted(scorer, report, {"doubted_share": float(doubted[rows].float().mean())})


def _surest(rows: Tensor, logit: Tensor) -> Tensor:
    """The half of `rows` [M] of largest |logit|, rounded up."""
    return rows[logit[rows].abs().argsort(descending=True, stable=True)[: (len(rows) + 1) // 2]]
