"""What each metric means, as a Markdown page: `python -m ppo_dist.tracking.reference`."""

from __future__ import annotations

import sys

HEAD = """# Metrics

Every key of a row in `metrics.jsonl`, in W&B under the same name. A row is one step; `null` means
that there was nothing to count. What a run's config has nothing to do with is left out of its rows,
and they all have the same keys, but for workers that are added. In names `ORIGIN` is labelled,
verifiable or unlabelled, `SET` held_out or test, `WORKER` a role and a number, as in rollout-0,
learner-3, reward-0. Where tokens are counted, it is those that the loss in question is on.

Made by `python -m ppo_dist.tracking.reference`; a test compares.
"""
SECTIONS = {
    "eval": "Of prompts that are never learned from; responses greedy but where it says sampled.",
    "reward": "What responses were given; what is made of that: `scale`, `clipped_rate`.",
    "policy": "Of the step's updates that were made, over tokens that their policy loss is on.",
    "critic": "Of the critic, in the step's updates.",
    "objective": "What rewards become before the policy learns from them.",
    "sup": "The supervised loss: labelled examples, and pseudo-labels in the run's own part.",
    "semi": "How labelled and unlabelled data are mixed in this step.",
    "pseudo": "Votes on unlabelled prompts, and responses that are imitated like labels.",
    "guard": "Whether what is learned from unlabelled prompts still holds on labelled ones.",
    "rollout": "The responses that came to this step, whenever they were written.",
    "perf": "How well machines are used.",
    "timing_s": "Seconds by stage, on the coordinator's clock; idle ones on the workers'.",
    "system": "What each worker's process took for the step, with those that it started.",
}
MEANINGS = {
    "eval/SET/accuracy": "share of greedy responses with a reward of at least 1",
    "eval/SET/reward": "mean reward of the greedy responses",
    "eval/SET/sampled_accuracy": "share of sampled responses (`eval.samples`) with at least 1",
    "eval/SET/nll": "of the labelled responses, nats per token",
    "eval/SET/dropped": "responses that a reward server gave no score",
    "reward/ORIGIN/mean": "mean reward of responses to these prompts",
    "reward/faults": "responses whose reward, or a part of it, failed and counts as 0",
    "reward/dropped": "responses left out, since a reward server gave no score",
    "reward/scale": "running deviation that rewards are divided by",
    "reward/clipped_rate": "share of rewards cut off at `algorithm.reward.clip`",
    "policy/loss": "the policy loss: −min(r·A, clip(r)·A) in the common case",
    "policy/approx_kl": "KL to the policy before the step's updates, k3: r − 1 − log r, ≥ 0",
    "policy/approx_kl_k1": "the same, k1: −log r",
    "policy/clip_fraction": "share of tokens whose ratio was clipped",
    "policy/entropy": "nats per token at the sampling temperature",
    "policy/grad_norm": "before clipping, mean of the updates",
    "policy/lr": "learning rate",
    "policy/kl_loss": "the KL term in the loss (`algorithm.kl` in the loss)",
    "policy/correction_mean": "mean weight that corrects for the policy that wrote",
    "policy/correction_cut_rate": "share of tokens whose weight was cut off",
    "critic/loss": "the value loss",
    "critic/explained_variance": "1 − Var(return − value) / Var(return) over all response tokens",
    "critic/clip_fraction": "share of tokens whose value was clipped",
    "critic/grad_norm": "before clipping, mean of the updates",
    "critic/lr": "learning rate",
    "objective/kl": "log-ratio of policy to reference, summed over a response, mean",
    "objective/kl_coef": "coefficient of the KL penalty or term",
    "objective/advantage_std": "deviation of the advantages; 0 where there is nothing to learn",
    "sup/loss": "nats per token",
    "sup/accuracy": "share of tokens that are the policy's first choice",
    "sup/tokens": "how many, over all updates",
    "semi/mu": "coefficient of the supervised loss (`mix.schedule`)",
    "semi/labelled_share": "supervised tokens among supervised and policy loss tokens",
    "semi/policy_tokens/ORIGIN": "tokens that the policy loss is on, by origin of the prompt",
    "semi/admitted_share": "share of unlabelled prompts that the gate admitted",
    "pseudo/vote_share": "share of the most frequent answer, mean over prompts",
    "pseudo/vote_margin": "its lead over the next answer, as a share",
    "pseudo/vote_entropy": "of the answers' shares; 0 where all agree, as in a collapse",
    "pseudo/abstain_rate": "share of prompts without a majority: ties, or no answer",
    "pseudo/accept_rate": "share of prompts from which a pseudo-label was taken",
    "pseudo/size": "pseudo-labels kept",
    "pseudo/age": "their mean age in steps",
    "pseudo/weight": "weight of their tokens in the supervised loss",
    "pseudo/tokens": "tokens of those imitated in this step",
    "pseudo/label_accuracy_probe": "how often an admitted vote is right, on labelled prompts "
    "treated as unlabelled (`semi.probe`)",
    "pseudo/label_accuracy_probe_all": "the same, admitted or not",
    "pseudo/reward_accuracy_probe": "how often reward and true answer say the same of a response",
    "guard/action": "0 none, 1 warn, 2 raise_mu, 3 freeze, 4 roll_back, 5 stop",
    "guard/gap": "unlabelled prompts' mean reward since the last evaluation less accuracy",
    "guard/skipped_updates": "updates not made, since a gradient was not finite",
    "rollout/tokens": "tokens in them",
    "rollout/length_mean": "tokens per response",
    "rollout/truncated_rate": "share that was cut off at `rollout.max_new_tokens`",
    "rollout/logprob_gap": "log-probability by learner less by rollout worker: mean size",
    "rollout/version_lag": "versions between the policy that wrote and the one that learns",
    "rollout/dropped": "responses thrown away as too old, or since unlabelled ones are frozen",
    "perf/tokens_per_s": "response and supervised tokens per second of the step",
    "perf/learner_mfu": "learners' FLOP/s as a share of a large matrix product's on the device",
    "perf/idle_rollout_share": "share of the step that rollout workers had nothing to do",
    "perf/idle_learner_share": "the same of learners",
    "timing_s/generate": "waiting for responses",
    "timing_s/score": "rewards, votes, gate",
    "timing_s/annotate": "log-probabilities of policy and reference, values of the critic",
    "timing_s/update": "forward, backward, optimizer",
    "timing_s/publish": "weights to the rollout workers",
    "timing_s/evaluate": "the evaluation after this step",
    "timing_s/save": "the checkpoint before this step",
    "timing_s/step": "all of it, but for evaluate, save, and weights sent for them",
    "timing_s/idle_rollout": "rollout workers with nothing to do, mean",
    "timing_s/idle_learner": "learners with nothing to do, mean",
    "system/WORKER/busy_s": "seconds at work",
    "system/WORKER/cores": "CPU cores in use on average",
    "system/WORKER/memory_gb": "memory; on a CPU with what it keeps of what it has freed",
    "system/WORKER/gpu_memory_gb": "most of a GPU's memory that it had; null on a CPU",
}


def reference() -> str:
    """All groups, a table each."""
    lines = [HEAD]
    for group, words in SECTIONS.items():
        lines += [f"## {group}", "", words, "", "| key | meaning |", "|---|---|"]
        own = [key for key in MEANINGS if key.split("/")[0] == group]
        lines += [*(f"| `{key}` | {MEANINGS[key]} |" for key in own), ""]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.stdout.write(reference())
