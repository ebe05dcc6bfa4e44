"""What was measured, as Markdown."""

from __future__ import annotations

from tests.bench.work import Found

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
        f"* generation against the engine alone: "
        f"{own.more['generate alone'] / own.seconds['generate']:.0%}",
        f"* scoring, annotation and publishing: {beside:.0%} of the step",
        *learner(alone),
    ]
    return "\n".join(lines)


def learner(alone: Found) -> list[str]:
    """A learner against the machine and against its parts."""
    rate = alone.more["GFLOP"] / alone.seconds["update"]
    used, parts = alone.peak["learner"], alone.peak["parts"]
    return [
        f"* training against bare forward and backward passes of the same rows: "
        f"{alone.seconds['bare'] / alone.seconds['update']:.0%}",
        f"* model FLOPs: {rate:.0f} GFLOP/s, {rate / alone.more['gemm GFLOP/s']:.0%} of a large "
        f"matrix product's {alone.more['gemm GFLOP/s']:.0f}",
        f"* memory of a learner: {used / 1e9:.2f} GB, of its parts together: {parts / 1e9:.2f} "
        f"(activations {alone.peak['activations'] / 1e9:.2f})",
    ]


def small(found: Found) -> str:
    """W3: how much of a step is neither generating nor learning."""
    step = found.seconds["step"]
    overhead = min(found.more["idle rollout"], found.more["idle learner"])
    return (
        "### W3\n\n"
        f"* {60 / step:.1f} steps a minute ({step:.2f} s each, {found.tokens:.0f} tokens)\n"
        f"* of a step the busier of rollout worker and learner waits {overhead:.0%}: Python and Ray"
    )


def supervised(found: dict[str, Found]) -> str:
    """W4."""
    own, alone = found["own"], found["learner"]
    head = f"### W4\n\n* a step of 32 examples: {own.seconds['step']:.2f} s"
    return "\n".join([head, *learner(alone)])


def scaling(found: Found) -> str:
    """W5."""
    lines = ["### W5", "", "| workers, learners | seconds of the coordinator a step |", "|---|---|"]
    lines += [f"| {name} | {seconds:.2f} |" for name, seconds in found.more.items()]
    first, last = found.peak.values()
    lines += ["", f"* the driver's memory: {first / 1e6:.0f} MB after 100 steps, {last / 1e6:.0f} "]
    lines[-1] += "after 1,000"
    return "\n".join(lines)
