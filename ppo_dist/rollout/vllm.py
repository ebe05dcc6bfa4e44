"""The `vllm` engine. vLLM runs its model in processes of its own (rollout/vllm_end.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from vllm.config import WeightTransferConfig

from ppo_dist import device
from ppo_dist.config.workers import VllmEngine as VllmSection
from ppo_dist.device import DeviceKind
from ppo_dist.protocols import NamedTensors, WeightsError
from ppo_dist.rollout import vllm_end
from ppo_dist.rollout.handover import HANDOVERS
from ppo_dist.rollout.orphans import own_processes
from ppo_dist.rollout.sampling import seed
from ppo_dist.transport.wire import of_all
from ppo_dist.types import Chunk, Request, Rollout, Sampling

SEEDS = 2**62  # vLLM's are 64-bit and signed, and it adds the index of a response


def open_llm(
    model_path: str,
    section: VllmSection,
    dtype: Literal["fp32", "bf16"],
    threads: int,
    kind: DeviceKind,
    trust_remote_code: bool = False,
    sleeps: bool = False,
) -> Any:
    """vLLM's `LLM` with the model as it is on disk, ready for `VllmEngine`; one that `sleeps` where
    the device supports it.
    """
    own_processes()
    device.before_vllm(kind, threads, section.kv_cache_gb)
    from vllm import LLM

    return LLM(
        model=model_path,
        skip_tokenizer_init=True,
        trust_remote_code=trust_remote_code,
        dtype={"fp32": "float32", "bf16": "bfloat16"}[dtype],
        tensor_parallel_size=section.tensor_parallel,
        max_model_len=section.max_model_tokens,
        enable_prefix_caching=section.prefix_caching,
        enforce_eager=not section.compile,
        logprobs_mode="processed_logprobs",
        worker_extension_cls=f"{vllm_end.__name__}.{vllm_end.WorkerSide.__name__}",
        weight_transfer_config=WeightTransferConfig(backend=HANDOVERS[kind].backend),
        disable_log_stats=True,
        distributed_executor_backend="mp" if section.tensor_parallel > 1 else None,  # on one node
        **device.vllm_settings(kind, section.memory_share, sleeps),
    )


def parameters(
    sampling: Sampling, stops: Sequence[int], first_seed: int, responses: int = 1
) -> Any:
    """vLLM's `SamplingParams` for all responses to a prompt: response i gets the seed plus i."""
    from vllm import SamplingParams

    return SamplingParams(
        n=responses,
        seed=first_seed % SEEDS,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_new_tokens,
        stop_token_ids=list(stops),
        logprobs=0,
        detokenize=False,
    )


class VllmEngine:
    """See RolloutEngine. Tokens in, tokens out; each response has a seed of its own."""

    def __init__(
        self,
        llm: Any,
        tokenizer: PreTrainedTokenizerBase,
        stops: frozenset[int],
        bucket_bytes: int,
        kind: DeviceKind,
    ) -> None:
        self._kind, self._handover = kind, HANDOVERS[kind]
        self._llm, self._tokenizer = llm, tokenizer
        self._stops, self._bucket_bytes = sorted(stops), bucket_bytes
        self._llm.collective_rpc("init_weight_transfer_engine", args=({},))
        self._sleeps = llm.llm_engine.vllm_config.model_config.enable_sleep_mode
        self._version: int | None = 0  # the model as it was read from disk
        self._names: frozenset[str] = frozenset()  # of all parameters, once they came

    def scores(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of all tokens but the first, (B, T−1)."""
        from vllm import SamplingParams

        ask = SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False)
        prompts = [{"prompt_token_ids": tokens} for tokens in tokens_BT.tolist()]
        outputs = self._llm.generate(prompts, ask, use_tqdm=False)
        return torch.tensor(
            [
                [
                    found[token].logprob
                    for token, found in zip(
                        prompt["prompt_token_ids"][1:], output.prompt_logprobs[1:], strict=True
                    )
                ]
                for prompt, output in zip(prompts, outputs, strict=True)
            ]
        )

    def load(self, version: int, weights: NamedTensors) -> None:
        """Replaces every parameter.

        Raises:
            WeightsError: vLLM did not load what was sent.
            RuntimeError: not all of it came. vLLM would mix it with what comes next: the engine
                is of no more use.
        """
        self._version = None  # until all of it is there
        sent: list[str] = []
        self._llm.collective_rpc("start_weight_update")
        try:
            for update, digest in self._handover.updates(self._all(weights), self._bucket_bytes):
                self._llm.collective_rpc("update_weights", args=(update,))
                sent.append(digest)
        except WeightsError as error:
            raise RuntimeError(f"half of version {version} is loaded: {error}") from error
        self._llm.collective_rpc("finish_weight_update")
        for loaded in self._llm.collective_rpc("loaded"):
            if loaded != of_all(sent):
                raise WeightsError(f"version {version}: vLLM loaded something else")
        self._llm.reset_prefix_cache()  # it holds keys and values of the old weights
        self._version = version

    def _all(self, weights: NamedTensors) -> NamedTensors:
        """The same weights, all that came the first time: vLLM would keep what it is not sent.

        Raises:
            WeightsError: some are missing.
        """
        names = set()
        for name, tensor in weights:
            names.add(name)
            yield name, tensor
        if missing := self._names - names:
            raise WeightsError(f"{', '.join(sorted(missing))}: not sent")
        self._names = frozenset(names)

    def sleep(self) -> None:
        """See RolloutEngine. The weights wait in the CPU's memory, the KV cache is dropped."""
        if self._sleeps:
            self._llm.sleep(level=1)
            device.free_cache(torch.device(self._kind))  # of the buckets that were handed over

    def wake(self) -> None:
        """See RolloutEngine."""
        if self._sleeps:
            self._llm.wake_up()

    def peak_memory(self) -> int | None:
        """See RolloutEngine. It computes in processes of its own: that of the fullest GPU."""
        found = self._llm.collective_rpc("peak_memory")
        return max((most for most in found if most is not None), default=None)

    @contextlib.contextmanager
    def traced(self, file: Path) -> Iterator[None]:
        """See RolloutEngine: of vLLM's processes, where the model is."""
        self._llm.collective_rpc("begin_trace", args=(str(file.absolute()),))
        try:
            yield
        finally:
            self._llm.collective_rpc("end_trace")

    def generate(self, chunk: Chunk) -> list[Rollout]:
        """See RolloutEngine.

        Raises:
            ValueError: the chunk asks for a version that is not loaded.
        """
        if chunk.version != self._version:
            raise ValueError(
                f"asked for version {chunk.version}, version {self._version} is loaded"
            )
        prompts = [{"prompt_token_ids": r.prompt.tokens_P.tolist()} for r in chunk.requests]
        asked = [
            parameters(
                chunk.sampling,
                self._stops,
                seed(chunk.sampling, chunk.step, r.prompt.uid, 0) + r.indices[0],
                len(r.indices),
            )
            for r in chunk.requests
        ]
        outputs = self._llm.generate(prompts, asked, use_tqdm=False)
        return [
            self._rollout(request, index, completion, chunk.version)
            for request, output in zip(chunk.requests, outputs, strict=True)
            for index, completion in zip(request.indices, output.outputs, strict=True)
        ]

    def _rollout(self, request: Request, index: int, completion: Any, version: int) -> Rollout:
        tokens_R = np.array(completion.token_ids, np.int64)
        logprobs = [
            found[token].logprob
            for token, found in zip(completion.token_ids, completion.logprobs, strict=True)
        ]
        return Rollout(
            prompt=request.prompt,
            index=index,
            tokens_R=tokens_R,
            logprobs_R=np.array(logprobs, np.float32),
            text=self._tokenizer.decode(tokens_R, skip_special_tokens=True),
            finish="eos" if completion.finish_reason == "stop" else "length",
            version=version,
        )
