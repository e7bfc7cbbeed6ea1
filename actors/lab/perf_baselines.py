"""The same work without this system, each in a process of its own like our roles: the baselines of `perf`.

RawVllm       vLLM's LLMEngine, stepped until all requests are done
PlainLearner  a GRPO step in plain torch
TokenReward   a reward that costs nothing, in our loop and in the others'
paused        suspends the processes that are not being measured
role_spans    when any of our roles worked, as reported by Ray
timeline      all that Ray ran meanwhile, for a viewer of traces
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import psutil
import ray
import torch
from transformers import AutoModelForCausalLM

from actors.cluster.wait import resolve
from actors.learner.rank import make_objective
from actors.learner.shares import groups_of
from actors.rollout.engine import EngineSettings
from actors.rollout.vllm_core import raw_engine, sampling_params
from causalrm_ray.config.train import LearnerConfig
from causalrm_ray.rl.advantage import grpo
from causalrm_ray.rl.experience import IMPORTANCE_CAP
from causalrm_ray.rl.policy_loss import importance_weight, kl_k3
from causalrm_ray.types import Completion, Request, Sampling, Scored

SPANS_WAIT_S = 30.0  # longest wait for Ray's reports, which come once a second


class RawVllm:
    """vLLM without this system, with the engine arguments and sampling parameters of our generator."""

    def __init__(self, settings: EngineSettings, sampling: Sampling) -> None:
        self._llm, self._eos = raw_engine(settings)
        self._sampling = sampling

    def generate(self, requests: Sequence[Request]) -> tuple[float, list[tuple[int, ...]]]:
        """Seconds from the first request to the last token, and the tokens, in the order of the requests."""
        began = time.perf_counter()
        for number, request in enumerate(requests):
            prompt = {"prompt_token_ids": list(request.prompt.token_ids)}
            self._llm.add_request(str(number), prompt, sampling_params(self._sampling, request.seed, self._eos))
        outputs = []
        while self._llm.has_unfinished_requests():
            outputs += [output for output in self._llm.step() if output.finished]
        seconds = time.perf_counter() - began
        self._llm.reset_prefix_cache()
        outputs.sort(key=lambda output: int(output.request_id))
        return seconds, [tuple(output.outputs[0].token_ids) for output in outputs]


class PlainLearner:
    """One GRPO step in plain torch: our learner's loss (k3 in it, clipped both ways, importance weights), one optimizer step.

    The loop as one would write it by hand, in a process as Python starts it (our ranks keep the memory that they free): the
    answers' logits only, log-probabilities by logsumexp, and no forward pass for the old policy, which is the new one before the
    only step. The loss's terms are the learner's own functions.
    """

    def __init__(self, model: str, config: LearnerConfig, temperature: float, max_new_tokens: int, rows: int) -> None:
        """`rows` go through the model together; an answer has at most `max_new_tokens`."""
        load = AutoModelForCausalLM.from_pretrained
        self._policy, self._reference = (load(model, dtype=torch.float32).eval() for _ in range(2))
        self._reference.requires_grad_(False)
        self._optimizer = torch.optim.AdamW(self._policy.parameters(), lr=config.lr, weight_decay=0.0)
        self._config, self._temperature, self._rows = config, temperature, rows
        self._objective = make_objective(config, max_new_tokens)

    def step(self, scored: Sequence[Scored]) -> float:
        """Train on a step's answers and return the seconds that it took."""
        began = time.perf_counter()
        advantages = self._advantages(scored)
        self._optimizer.zero_grad()
        for first in range(0, len(scored), self._rows):
            part = [answer.completion for answer in scored[first : first + self._rows]]
            self._loss(part, advantages[first : first + self._rows], len(scored)).backward()
        torch.nn.utils.clip_grad_norm_(self._policy.parameters(), self._config.max_grad_norm or math.inf)
        self._optimizer.step()
        return time.perf_counter() - began

    def weights(self) -> dict[str, torch.Tensor]:
        """The policy's parameters by name."""
        return {name: value.detach().clone() for name, value in self._policy.named_parameters()}

    def _advantages(self, scored: Sequence[Scored]) -> torch.Tensor:
        """Each answer's reward, less the penalty of a truncated one, against its group's: [N]."""
        groups = groups_of([answer.completion for answer in scored])
        cut = 0.0 if self._config.truncation == "mask" else self._config.truncation
        rewards = [answer.reward - cut * (answer.completion.stop_reason == "length") for answer in scored]
        return grpo(torch.tensor(rewards), torch.from_numpy(groups)).float()

    def _loss(self, part: Sequence[Completion], advantages_B: torch.Tensor, answers: int) -> torch.Tensor:
        rows = [torch.tensor(done.prompt.token_ids + done.token_ids) for done in part]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        starts = torch.tensor([len(done.prompt.token_ids) for done in part])
        lengths = torch.tensor([len(done.token_ids) for done in part])
        start = int(starts.min())
        places = torch.arange(start, ids.shape[1])
        mask = ((places >= starts[:, None]) & (places < (starts + lengths)[:, None])).float()
        rollout = torch.zeros_like(mask)
        rollout[mask.bool()] = torch.tensor([value for done in part for value in done.logprobs])
        new = self._logprobs(self._policy, ids, start)
        with torch.no_grad():
            reference = self._logprobs(self._reference, ids, start)
        old, objective = new.detach(), self._objective
        ratio = objective.algorithm.ratio(new, old, mask)
        policy = objective.algorithm.loss(new, ratio, advantages_B[:, None], objective.clip)
        loss = importance_weight(old, rollout, IMPORTANCE_CAP) * policy + self._config.kl.coefficient * kl_k3(new, reference)
        return ((loss * mask).sum(dim=1) / lengths).sum() / answers

    def _logprobs(self, model: torch.nn.Module, ids: torch.Tensor, start: int) -> torch.Tensor:
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - start + 1).logits[:, :-1]
        logits = logits / self._temperature if self._temperature != 1 else logits
        return logits.gather(-1, ids[:, start:, None])[..., 0] - torch.logsumexp(logits, dim=-1)


class TokenReward:
    """Stands for the reward role."""

    def score(self, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[np.ndarray, int]:
        """`token_reward` of each prompt and answer, and a version."""
        return np.array([token_reward([*prompt, *answer]) for prompt, answer in rows], dtype=np.float32), 1


def token_reward(token_ids: Sequence[int]) -> float:
    """A trivial function of the last ten token ids, in [0, 1)."""
    last = token_ids[-10:]
    return sum(token % 7 for token in last) / (7 * len(last))


def processes_of(roles: Sequence[Any], timeout_s: float) -> list[psutil.Process]:
    """The processes behind handles on roles, those on this machine; each has answered, so none is still starting."""
    where = [role.__ray_call__.remote(lambda _: (ray.get_runtime_context().get_node_id(), os.getpid())) for role in roles]
    here = ray.get_runtime_context().get_node_id()
    return [psutil.Process(pid) for node, pid in resolve(where, "find the processes", timeout_s) if node == here]


@contextmanager
def paused(processes: Sequence[psutil.Process]) -> Iterator[None]:
    """Suspend `processes` while the block lasts. Even an idle one wakes 150 to 1,500 times a second, for Ray and for gloo."""
    with ExitStack() as resumed:
        for process in processes:
            process.suspend()
            resumed.callback(process.resume)
        yield


def timeline(begin: float, end: float) -> list[dict[str, Any]]:
    """What Ray has reported so far that began within [begin, end], epoch seconds: events of Chrome's trace format."""
    events: list[dict[str, Any]] = ray.timeline() or []
    return [event for event in events if begin <= event.get("ts", 0) / 1e6 <= end]


def role_spans(begin: float, end: float, calls: int) -> list[tuple[float, float]]:
    """(begin, end), epoch seconds, of all executions of tasks and actor methods that began within [begin, end].

    Ray reports once a second: waits until it has reported at least `calls` of them. Raises TimeoutError.
    """
    deadline = time.monotonic() + SPANS_WAIT_S
    while True:
        events = [event for event in timeline(begin, end) if event["cat"] == "task:execute"]
        spans = [(event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6) for event in events]
        if len(spans) >= calls:
            return spans
        if time.monotonic() > deadline:
            raise TimeoutError(f"Ray must report {calls} executions within {SPANS_WAIT_S:g} s, got {len(spans)}")
        time.sleep(0.2)
