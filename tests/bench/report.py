"""What was measured, as Markdown, and a figure."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from tests.bench.work import EACH, Found

BESIDE = ("score", "annotate", "publish")  # what is neither generating nor learning
STAGES = ("generate", *BESIDE, "update", "step")


def iteration(name: str, found: dict[str, Found]) -> str:
    """W1 or W2: stages beside the plain program's, and against what the parts take alone."""
    own, plain, alone = found["own"], found["plain"], found["learner"]
    step = own.seconds["step"]
    lines = [
        f"### {name}",
        "",
        "| stage | ours, s | share | plain, s | ratio |",
        "|---|---|---|---|---|",
    ]
    for stage in STAGES:
        mine, theirs = own.seconds[stage], plain.seconds.get(stage)
        other = f"{theirs:.2f} | {theirs / mine:.2f}" if theirs else " | "
        lines.append(f"| {stage} | {mine:.2f} | {mine / step:.0%} | {other} |")
    beside = sum(own.seconds[stage] for stage in BESIDE) / step
    speed = own.tokens / step, plain.tokens / plain.seconds["step"]
    lines += [
        "",
        f"* new tokens: {own.tokens:.0f} and {plain.tokens:.0f}, {speed[0]:.1f} and {speed[1]:.1f} "
        "a second of the step",
        beside_trl(own, found.get("trl")),
        f"* generation against the engine alone: {own.more['generation alone']:.0%} (median step)",
        f"* scoring, annotation and publishing: {beside:.1%} of the step",
        *moved(own),
        *learner(alone),
        machine(found),
    ]
    return "\n".join(lines)


def machine(found: dict[str, Found]) -> str:
    """Whether the machine was equally fast for all of them."""
    rates = [f"{name} {told.machine[0]:.0f}, {told.machine[1]:.0f}" for name, told in found.items()]
    return f"* GFLOP/s of a matrix product before and after each: {'; '.join(rates)}"


def beside_trl(own: Found, trl: Found | None) -> str:
    """TRL's whole iteration, or how to have it."""
    if trl is None:
        return "* TRL's PPOTrainer is measured as well where there is one: pip install 'trl<1.13'"
    step = trl.seconds["step"]
    return (
        f"* TRL {version('trl')}'s PPOTrainer: {step:.2f} s, ratio "
        f"{step / own.seconds['step']:.2f}; {trl.tokens:.0f} new tokens, "
        f"{trl.tokens / step:.1f} a second"
    )


def moved(found: Found) -> list[str]:
    """What a step takes beside its stages, what goes from process to process in it, and the
    processes' memory.
    """
    sizes = [
        f"{name.removeprefix('bytes of ')} {number / 1e6:.2f} MB"
        for name, number in found.more.items()
        if name.startswith("bytes of ")
    ]
    peaks = [f"{name} {number / 1e9:.2f} GB" for name, number in found.peak.items()]
    step = found.seconds["step"]
    rest = step - sum(found.seconds[stage] for stage in STAGES[:-1])
    return [
        f"* in no stage, which is the coordinator's: {rest:.2f} s, {rest / step:.1%} of the step",
        f"* moved in a step: {', '.join(sizes)}",
        f"* largest memory: {', '.join(peaks)}",
    ]


def learner(alone: Found) -> list[str]:
    """A learner against the machine and against its parts."""
    rate = alone.more["GFLOP"] / alone.seconds["update"]
    layer, large = alone.more["gemm GFLOP/s"], alone.more["large gemm GFLOP/s"]
    used, parts = alone.peak["learner"], alone.peak["parts"]
    return [
        f"* training against bare forward and backward passes of the same rows: "
        f"{alone.seconds['bare'] / alone.seconds['update']:.0%}",
        f"* model FLOPs: {rate:.0f} GFLOP/s, {rate / layer:.0%} of the {layer:.0f} of a product of "
        f"512 × 1,024 with 1,024 × 1,024, {rate / large:.0%} of the {large:.0f} of one of 2,048 × "
        "2,048",
        f"* memory of a learner: {used / 1e9:.2f} GB, {used / parts - 1:.1%} above its parts "
        f"together: {parts / 1e9:.2f} (activations {alone.peak['activations'] / 1e9:.2f})",
    ]


def small(found: Found) -> str:
    """W3: how much of a step is neither generating nor learning."""
    step = found.seconds["step"]
    overhead = min(found.more["idle rollout"], found.more["idle learner"])
    lines = [
        "### W3",
        "",
        f"* {60 / step:.1f} steps a minute ({step:.2f} s each, {found.tokens:.0f} tokens)",
        f"* the busier of rollout worker and learner waits {overhead:.0%} of a step: Python, Ray",
        f"* stages: {', '.join(f'{s} {found.seconds[s]:.2f} s' for s in STAGES[:-1])}",
        *moved(found),
        machine({"own": found}),
    ]
    return "\n".join(lines)


def supervised(found: dict[str, Found]) -> str:
    """W4."""
    own, alone = found["own"], found["learner"]
    head = f"### W4\n\n* a step of 32 examples: {own.seconds['step']:.2f} s"
    return "\n".join([head, *moved(own), *learner(alone), machine(found)])


def scaling(found: Found) -> str:
    """W5."""
    lines = ["### W5", "", "| workers, learners | coordinator, s a step | ms a sequence |"]
    lines.append("|---|---|---|")
    for name, seconds in found.more.items():
        each = 1000 * seconds / (EACH * int(name.split()[0]))
        lines.append(f"| {name} | {seconds:.4f} | {each:.3f} |")
    own = [(EACH * int(n.split()[0]), s) for n, s in found.more.items() if n.endswith("in process")]
    growth = np.polyfit(*np.log(np.array(own)).T, 1)[0]
    lines += ["", f"* in process: as sequences^{growth:.2f} (least squares of the logarithms)"]
    first, last = found.peak.values()
    lines += [f"* the driver's memory: {first / 1e6:.0f} MB after 100 steps, {last / 1e6:.0f} "]
    lines[-1] += "after 1,000"
    return "\n".join(lines)


def plot(found: Found, out: Path) -> None:
    """W5: seconds of the coordinator over the sequences of a step, and what grows with them."""
    figure, axis = plt.subplots(figsize=(5, 3.6))
    for kind, label in (("in process", "workers in its process"), ("actors", "Ray actors")):
        points = [(name.split()[0], s) for name, s in found.more.items() if name.endswith(kind)]
        sequences = [EACH * int(workers) for workers, _ in points]
        axis.loglog(sequences, [seconds for _, seconds in points], marker="o", label=label)
    count, seconds = sequences[-1], points[-1][1]
    axis.loglog(
        [4, 4096],
        [seconds * n / count for n in (4, 4096)],
        ":",
        color="grey",
        label="in proportion",
    )
    axis.set(xlabel="sequences of a step (4,000 tokens each)", ylabel="coordinator, s a step")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=120)
