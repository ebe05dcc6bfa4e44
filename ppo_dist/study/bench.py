"""`ppo-dist bench`: how fast responses are written, against the libraries' own ways.

Each round is done by a process of its own, one contender after the other and then the first again:
a machine that is not always as fast is so for all. What a process does first, with a quarter of the
prompts, does not count.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ppo_dist.config import InputError
from ppo_dist.config.workers import VllmEngine
from ppo_dist.data.chunks import chunks
from ppo_dist.device import DTYPES, available, prepare
from ppo_dist.protocols import RolloutEngine
from ppo_dist.rollout.sampling import seed
from ppo_dist.types import Chunk, Prompt, Sampling

Run = Callable[["Job", int], list[int]]  # the lengths of all responses of a round
CONTENDERS = ("transformers", "hf", "vllm-alone", "vllm")
AGAINST = {"hf": "transformers", "vllm": "vllm-alone"}


@dataclass(frozen=True)
class Job:
    """Responses to random prompts. `ends` tokens of the vocabulary, chosen at random, end one, so
    that lengths are mixed: about geometric, with the mean that this share gives.

    Example: Job(model="models/smollm2-135m", sequences=128, slots=32, prompt_tokens=48,
    max_new_tokens=256, ends=0.015, dtype="fp32", threads=2, repeats=3)
    """

    model: str
    sequences: int
    slots: int
    prompt_tokens: int
    max_new_tokens: int
    ends: float
    dtype: Literal["fp32", "bf16"]
    threads: int
    repeats: int


@dataclass(frozen=True)
class Round:
    """How long it took to write all responses, and their lengths in tokens.

    Example: Round(seconds=51.2, lengths=[17, 256, 3])
    """

    seconds: float
    lengths: list[int]

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return sum(self.lengths) / self.seconds


def bench_rollout(job: Job, contenders: list[str], console: Console) -> int:
    """Prints tokens per second of each contender, and ours against the library's own way. Returns
    the exit code.

    Raises:
        InputError: a contender is not known.
    """
    unknown = set(contenders) - set(CONTENDERS)
    if unknown:
        raise InputError(f"{min(unknown)} is not one of {', '.join(CONTENDERS)}")
    found: dict[str, list[Round]] = {name: [] for name in contenders}
    for number in range(1, job.repeats + 1):
        for name in contenders:
            try:
                found[name].append(_found(name, job, number))
            except subprocess.CalledProcessError as error:
                console.print(f"{name}: failed\n{error.stderr[-2000:]}", markup=False)
                return 1
            console.print(f"{name}: {found[name][-1].speed:.0f} tokens/s")
    table = Table("", "tokens/s", "median seconds", "tokens", "lengths", "ratio")
    for name, rounds in found.items():
        seconds = statistics.median(r.seconds for r in rounds)
        against = AGAINST.get(name, "")
        ratio = ""
        if against in found:
            ratio = f"{_speed(rounds) / _speed(found[against]):.2f} x {against}"
        last = rounds[-1].lengths
        spread = f"{min(last)} to {max(last)}, mean {statistics.mean(last):.0f}"
        row = (name, f"{_speed(rounds):.0f}", f"{seconds:.1f}", str(sum(last)), spread, ratio)
        table.add_row(*row)
    console.print(table)
    return 0


def _speed(rounds: list[Round]) -> float:
    return statistics.median(r.speed for r in rounds)


def _found(name: str, job: Job, number: int) -> Round:
    """What a contender measures, in a process of its own; it may print what it likes."""
    with tempfile.TemporaryDirectory(prefix="ppo_dist-bench-") as folder:
        out = Path(folder) / "found.json"
        module, work = "ppo_dist.study.bench", json.dumps(asdict(job))
        environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", module, name, work, str(number), str(out)]
        subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        return Round(**json.loads(out.read_text()))


def _prompts(job: Job, vocabulary: int) -> list[Prompt]:
    generator = np.random.default_rng(0)
    lengths = generator.integers(job.prompt_tokens // 2, job.prompt_tokens + 1, job.sequences)
    return [
        Prompt(f"p:{i}", "verifiable", "", generator.integers(0, vocabulary, length))
        for i, length in enumerate(lengths)
    ]


def _stops(job: Job, vocabulary: int) -> list[int]:
    count = max(1, round(job.ends * vocabulary))
    chosen = np.random.default_rng(1).choice(vocabulary, count, replace=False)
    return sorted(int(token) for token in chosen)


def _chunk(job: Job, vocabulary: int, number: int) -> Chunk:
    sampling = Sampling(1.0, job.max_new_tokens, number, "train")
    (chunk,) = chunks(_prompts(job, vocabulary), 1, job.sequences, 0, 0, sampling)
    return chunk


def _vllm_section(job: Job) -> VllmEngine:
    return VllmEngine(kind="vllm", max_model_tokens=job.prompt_tokens + job.max_new_tokens)


def _hf(job: Job) -> Run:
    from ppo_dist.models.policy import load_policy
    from ppo_dist.rollout.hf import HfEngine

    where = prepare(available(), job.threads)
    lm = load_policy(job.model, DTYPES[job.dtype])
    stops = frozenset(_stops(job, lm.config.vocab_size))
    made = HfEngine(lm, _tokenizer(job), stops, where, job.slots)
    return lambda job, number: _lengths(made, job, lm.config.vocab_size, number)


def _vllm(job: Job) -> Run:
    from ppo_dist.rollout import vllm

    llm = vllm.open_llm(job.model, _vllm_section(job), job.dtype, job.threads, available())
    vocabulary = _vocabulary(job)
    stops = frozenset(_stops(job, vocabulary))
    made = vllm.VllmEngine(llm, _tokenizer(job), stops, 2**28, available())
    return lambda job, number: _lengths(made, job, vocabulary, number)


def _lengths(made: RolloutEngine, job: Job, vocabulary: int, number: int) -> list[int]:
    return [len(r.tokens_R) for r in made.generate(_chunk(job, vocabulary, number))]


def _transformers(job: Job) -> Run:
    """`generate` in batches of as many sequences as ours decodes at a time."""
    from transformers import AutoModelForCausalLM

    where = prepare(available(), job.threads)
    lm = AutoModelForCausalLM.from_pretrained(
        job.model, dtype=DTYPES[job.dtype], use_safetensors=True, trust_remote_code=False
    )
    lm = lm.eval().to(where)
    vocabulary = _vocabulary(job)
    stops = _stops(job, vocabulary)

    def run(job: Job, number: int) -> list[int]:
        torch.manual_seed(number)
        ordered = sorted(_prompts(job, vocabulary), key=lambda p: -len(p.tokens_P))
        lengths: list[int] = []
        for begin in range(0, len(ordered), job.slots):
            batch = [torch.from_numpy(p.tokens_P) for p in ordered[begin : begin + job.slots]]
            width = max(map(len, batch))
            tokens = torch.stack([torch.nn.functional.pad(t, (width - len(t), 0)) for t in batch])
            mask = torch.stack(
                [torch.nn.functional.pad(torch.ones_like(t), (width - len(t), 0)) for t in batch]
            )
            out = lm.generate(
                tokens.to(lm.device),
                attention_mask=mask.to(lm.device),
                do_sample=True,
                top_k=0,
                max_new_tokens=job.max_new_tokens,
                eos_token_id=stops,
                pad_token_id=stops[0],
            )
            for row in out[:, width:].tolist():
                ends = [n for n, token in enumerate(row) if token in set(stops)]
                lengths.append(ends[0] + 1 if ends else len(row))
        return lengths

    return run


def _vllm_alone(job: Job) -> Run:
    """`LLM.generate` with the settings of our engine's one, all prompts at once, and its seeds: the
    responses are the same.
    """
    from ppo_dist.rollout import vllm

    llm = vllm.open_llm(job.model, _vllm_section(job), job.dtype, job.threads, available())
    vocabulary = _vocabulary(job)
    stops = _stops(job, vocabulary)

    def run(job: Job, number: int) -> list[int]:
        chunk = _chunk(job, vocabulary, number)
        prompts = [{"prompt_token_ids": r.prompt.tokens_P.tolist()} for r in chunk.requests]
        seeds = [seed(chunk.sampling, chunk.step, r.prompt.uid, 0) for r in chunk.requests]
        asked = [vllm.parameters(chunk.sampling, stops, own) for own in seeds]
        outputs = llm.generate(prompts, asked, use_tqdm=False)
        return [len(output.outputs[0].token_ids) for output in outputs]

    return run


def _vocabulary(job: Job) -> int:
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(job.model, trust_remote_code=False).vocab_size)


def _tokenizer(job: Job) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(job.model, trust_remote_code=False)


def _main(name: str, job: Job, number: int, out: Path) -> None:
    start = {"transformers": _transformers, "hf": _hf, "vllm": _vllm, "vllm-alone": _vllm_alone}
    run = start[name](job)
    run(replace(job, sequences=max(1, job.sequences // 4)), 0)
    begin = time.perf_counter()
    lengths = run(job, number)
    out.write_text(json.dumps(asdict(Round(time.perf_counter() - begin, lengths))))


if __name__ == "__main__":
    _main(sys.argv[1], Job(**json.loads(sys.argv[2])), int(sys.argv[3]), Path(sys.argv[4]))
