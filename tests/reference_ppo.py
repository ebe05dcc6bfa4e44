"""One PPO + supervised run in plain float64 torch: no packing, no Ray, no DeepSpeed, nothing of
ppo_dist but its records. What the system must agree with.

Written from the formulas, one sequence at a time, in the order in which they are derived; nothing
here is fast. Legend as in ppo_dist/types.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import AutoModel, AutoModelForCausalLM

from ppo_dist.config.data import Lora
from ppo_dist.models.lora import add_adapters
from ppo_dist.types import Rollout

LORA, SEED = Lora(rank=4, alpha=8), 3


@dataclass(frozen=True)
class Settings:
    """What a step depends on; names as in the config."""

    lr: float
    critic_lr: float
    mu: float
    policy_coef: float = 1.0
    value_coef: float = 0.5
    clip: float = 0.2
    value_clip: float = 0.2
    kl_coef: float = 0.0  # in the reward (k1)
    kl_loss_coef: float = 0.0  # in the loss (k2)
    entropy_coef: float = 0.0
    gamma: float = 1.0
    lam: float = 0.95
    temperature: float = 1.0
    max_grad_norm: float = 0.0
    critic_max_grad_norm: float = 0.0


@dataclass(eq=False)
class Sequence64:
    """A prompt, a response, and what the step found out about them."""

    tokens: list[int]
    prompt: int
    score: float = 0.0
    logprobs: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    reference: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    values: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    advantages: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    returns: torch.Tensor = field(default_factory=lambda: torch.zeros(0))

    @classmethod
    def of(cls, rollout: Rollout, score: float) -> Sequence64:
        """The sequence of a rollout."""
        prompt = rollout.prompt.tokens_P.tolist()
        return cls(prompt + rollout.tokens_R.tolist(), len(prompt), score)


class ReferenceTrainer:
    """Policy, reference and critic with SGD, all in float64. Variants: `lora` trains adapters of
    the policy, `shared` has the critic's head on the policy's trunk.
    """

    def __init__(self, folder: str, settings: Settings, variant: str = "plain") -> None:
        def causal() -> torch.nn.Module:
            return AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float64, attn_implementation="eager"
            ).eval()

        self.settings, self.variant = settings, variant
        self.policy, self.reference = causal(), causal()
        if variant == "lora":  # the same beginning, drawn in fp32
            drawn = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            add_adapters(drawn, LORA, SEED)
            self.policy = drawn.double().eval()
        self.trunk = self.policy.base_model
        if variant != "shared":
            self.trunk = AutoModel.from_pretrained(
                folder, dtype=torch.float64, attn_implementation="eager"
            ).eval()
        self.head = torch.zeros(1, self.trunk.config.hidden_size, dtype=torch.float64)
        self.head.requires_grad_(True)

    def step(
        self, rollouts: list[Sequence64], updates: Sequence[tuple[list[int], list[Sequence64]]]
    ) -> None:
        """One step: annotate, advantages, then an update for each (rollout indices, labelled)."""
        with torch.no_grad():
            self._advantages(rollouts)
        for members, labelled in updates:
            self._update([rollouts[i] for i in members], labelled)

    # ── before the updates ────────────────────────────────────────────────────────────────────────

    def _advantages(self, rollouts: list[Sequence64]) -> None:
        s = self.settings
        for q in rollouts:
            q.logprobs = self._logprobs(self.policy, q, s.temperature)
            q.values = self._values(q)
            q.reference = self._logprobs(self.reference, q, s.temperature)
            rewards = -s.kl_coef * (q.logprobs - q.reference)
            rewards[-1] += q.score
            q.advantages = torch.zeros_like(rewards)
            next_value, next_advantage = 0.0, 0.0
            for t in reversed(range(len(rewards))):
                delta = rewards[t] + s.gamma * next_value - q.values[t]
                q.advantages[t] = delta + s.gamma * s.lam * next_advantage
                next_value, next_advantage = q.values[t], q.advantages[t]
            q.returns = q.advantages + q.values
        if not rollouts:
            return
        every = torch.cat([q.advantages for q in rollouts])
        mean = every.sum() / len(every)
        deviation = (((every - mean) ** 2).sum() / (len(every) - 1)).sqrt()
        for q in rollouts:
            q.advantages = (q.advantages - mean) / deviation

    # ── one optimizer step ────────────────────────────────────────────────────────────────────────

    def _update(self, rollouts: list[Sequence64], labelled: list[Sequence64]) -> None:
        s = self.settings
        n_policy = sum(len(q.tokens) - q.prompt for q in rollouts)
        n_ce = sum(len(q.tokens) - q.prompt for q in labelled)
        for q in rollouts:
            table = self._table(self.policy, q, s.temperature)
            logprobs = self._chosen(table, q)
            ratio = (logprobs - q.logprobs).exp()
            clipped = ratio.clamp(1 - s.clip, 1 + s.clip)
            objective = torch.minimum(ratio * q.advantages, clipped * q.advantages)
            entropy = -(table.exp() * table).sum(-1)
            kl = 0.5 * (logprobs - q.reference) ** 2
            loss = (
                -s.policy_coef * objective.sum()
                + s.kl_loss_coef * kl.sum()
                - s.entropy_coef * entropy.sum()
            )
            (loss / n_policy).backward()
            values = self._values(q)
            near = q.values + (values - q.values).clamp(-s.value_clip, s.value_clip)
            worse = torch.maximum((values - q.returns) ** 2, (near - q.returns) ** 2)
            (s.value_coef * 0.5 * worse.sum() / n_policy).backward()
        for q in labelled:
            logprobs = self._logprobs(self.policy, q, 1.0)
            p = logprobs.detach().exp()
            weights = p * (1 - p) if self.variant == "phi" else torch.ones_like(p)
            (s.mu * -(weights * logprobs).sum() / n_ce).backward()
        policy, trunk = list(self.policy.parameters()), list(self.trunk.parameters())
        if self.variant == "shared":
            self._descend(policy, s.lr, 0.0)
            self._descend([self.head], s.critic_lr, 0.0)
        else:
            self._descend(policy, s.lr, s.max_grad_norm)
            self._descend([*trunk, self.head], s.critic_lr, s.critic_max_grad_norm)

    def _descend(self, parameters: list[torch.Tensor], lr: float, limit: float) -> None:
        live = [p for p in parameters if p.grad is not None]
        norm = sum(float((p.grad**2).sum()) for p in live) ** 0.5
        scale = limit / (norm + 1e-6) if limit and norm > limit else 1.0
        with torch.no_grad():
            for p in live:
                p -= lr * scale * p.grad
                p.grad = None

    # ── the models ────────────────────────────────────────────────────────────────────────────────

    def _logprobs(self, lm: torch.nn.Module, q: Sequence64, temperature: float) -> torch.Tensor:
        return self._chosen(self._table(lm, q, temperature), q)

    def _table(self, lm: torch.nn.Module, q: Sequence64, temperature: float) -> torch.Tensor:
        """log-probabilities of every token at each response position."""
        logits = lm(torch.tensor([q.tokens])).logits[0, q.prompt - 1 : -1] / temperature
        return logits.log_softmax(-1)

    def _chosen(self, table: torch.Tensor, q: Sequence64) -> torch.Tensor:
        targets = torch.tensor(q.tokens[q.prompt :])
        return table.gather(-1, targets[:, None])[:, 0]

    def _values(self, q: Sequence64) -> torch.Tensor:
        hidden = self.trunk(torch.tensor([q.tokens])).last_hidden_state[0]
        return (hidden[q.prompt - 1 : -1] @ self.head.T)[:, 0]

    def parameters(self) -> dict[str, torch.Tensor]:
        """By the names that they have in the system."""
        policy = {f"policy.{n}": p for n, p in self.policy.named_parameters()}
        if self.variant == "lora":
            policy = {f"policy.{n}": p for n, p in self._merged()}
        critic = {f"critic.trunk.{n}": p for n, p in self.trunk.named_parameters()}
        every = {**policy, **critic, "critic.head.weight": self.head}
        if self.variant == "shared":
            every = {**policy, "value_head.weight": self.head}
        return {name: p.detach().clone() for name, p in every.items()}

    def _merged(self) -> list[tuple[str, torch.Tensor]]:
        """As peft itself merges them."""
        made = []
        for name, p in self.policy.named_parameters():
            if ".lora_" in name:
                continue
            delta = 0.0
            if name.endswith(".base_layer.weight"):
                layer = self.policy.get_submodule(name.removesuffix(".base_layer.weight"))
                delta = layer.get_delta_weight("default")
            made.append((name.replace(".base_layer", ""), p + delta))
        return made
