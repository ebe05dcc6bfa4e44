"""The `vllm` engine: the only file that imports vLLM.

vLLM runs its model in processes of its own, which import this file too (`WorkerSide`). New weights
go there bucket by bucket through a file in shared memory, by vLLM's own weight-transfer API, for
which `BucketEngine` is registered; each bucket's digest is checked there, and what was loaded is
told back.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from ppo_dist import device
from ppo_dist.config.workers import VllmEngine as VllmSection
from ppo_dist.device import DeviceKind
from ppo_dist.protocols import NamedTensors, WeightsError
from ppo_dist.rollout.sampling import seed
from ppo_dist.transport.wire import Bucket, Part, buckets, of_all
from ppo_dist.types import Chunk, Request, Rollout, Sampling

BACKEND = "ppo_dist"
SEEDS = 2**62  # vLLM's are 64-bit and signed, and it adds the index of a response
LOUDNESS = 0.3  # of the noise that proves loading, in standard deviations of a parameter
SHARED_MEMORY = Path("/dev/shm")


@dataclass
class _Nothing(WeightTransferInitInfo):  # type: ignore[misc]
    """There is nothing to agree on."""


@dataclass
class _File(WeightTransferUpdateInfo):  # type: ignore[misc]
    """A bucket: the file of its bytes, and what is in them."""

    path: str
    parts: list[dict[str, Any]]
    digest: str


class BucketEngine(WeightTransferEngine[_Nothing, _File]):  # type: ignore[misc]
    """vLLM's end: takes buckets from files."""

    init_info_cls = _Nothing
    update_info_cls = _File

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.digests: list[str] = []

    def init_transfer_engine(self, init_info: _Nothing) -> None:
        """See WeightTransferEngine."""

    def start_weight_update(self) -> None:
        """See WeightTransferEngine."""
        self.digests = []
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: _File) -> None:
        """See WeightTransferEngine. Raises WeightsError if the bytes are not those sent."""
        raw = np.fromfile(update_info.path, np.uint8)
        parts = tuple(Part(**{**p, "shape": tuple(p["shape"])}) for p in update_info.parts)
        bucket = Bucket(parts, raw, update_info.digest)
        bucket.check()
        self.model.load_weights((name, t.to(self.device)) for name, t in bucket.tensors())
        self.digests.append(update_info.digest)

    def finish_weight_update(self) -> None:
        """See WeightTransferEngine."""
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            _repack(self.model)

    def shutdown(self) -> None:
        """See WeightTransferEngine."""


class WorkerSide:
    """What vLLM's worker process can be asked beside what it knows itself."""

    def loaded(self) -> str:
        """The digest of the version that was loaded last."""
        return of_all(self.weight_transfer_engine.digests)  # type: ignore[attr-defined]


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, BucketEngine)


def open_llm(
    model_path: str,
    section: VllmSection,
    dtype: Literal["fp32", "bf16"],
    threads: int,
    kind: DeviceKind,
    trust_remote_code: bool = False,
) -> Any:
    """vLLM's `LLM` with the model as it is on disk, ready for `VllmEngine`."""
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
        worker_extension_cls=f"{__name__}.{WorkerSide.__name__}",
        weight_transfer_config=WeightTransferConfig(backend=BACKEND),
        disable_log_stats=True,
        **device.vllm_memory(kind, section.memory_share),
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
    ) -> None:
        self._llm, self._tokenizer = llm, tokenizer
        self._stops, self._bucket_bytes = sorted(stops), bucket_bytes
        self._llm.collective_rpc("init_weight_transfer_engine", args=({},))
        self._version: int | None = 0  # the model as it was read from disk

    def prove_loading(self, lm: PreTrainedModel, tolerance: float) -> None:
        """Loads weights far from those of `lm` (the learners' model, as it is on disk), embedding
        and head among them, and then its own, as version 0; both times what vLLM says of some
        tokens must be what `lm` says, within `tolerance` nats on average. In bf16 an update of
        training could not tell: it is smaller than the noise.

        Raises:
            WeightsError: it says something else.
        """
        own = {name: p.detach().clone() for name, p in lm.named_parameters()}
        generator = torch.Generator().manual_seed(0)
        tokens_BT = torch.randint(lm.config.vocab_size, (4, 16), generator=generator)
        before = _logprobs(lm, tokens_BT)
        with torch.no_grad():
            for parameter in lm.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((LOUDNESS * parameter.float().std() * noise).to(parameter.dtype))
        after = _logprobs(lm, tokens_BT)
        assert float((after - before).abs().mean()) > 4 * tolerance, "not loud enough to tell"
        for version, expected, weights in (
            (-1, after, lm.named_parameters()),
            (0, before, own.items()),
        ):
            self.load(version, weights)
            gap = float((self._scores(tokens_BT) - expected).abs().mean())
            if gap > tolerance:
                raise WeightsError(
                    "vLLM does not load new weights of this model right: its log-probabilities are "
                    f"{gap:.3g} from the learners', where {tolerance:g} is allowed"
                )

    def _scores(self, tokens_BT: torch.Tensor) -> torch.Tensor:
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
        """
        self._version = None  # until all of it is there
        sent: list[str] = []
        self._llm.collective_rpc("start_weight_update")
        for bucket in buckets(weights, self._bucket_bytes):
            with _shared(bucket) as path:
                about = {
                    "path": path,
                    "parts": [asdict(part) for part in bucket.parts],
                    "digest": bucket.digest,
                }
                self._llm.collective_rpc("update_weights", args=(about,))
            sent.append(bucket.digest)
        self._llm.collective_rpc("finish_weight_update")
        for loaded in self._llm.collective_rpc("loaded"):
            if loaded != of_all(sent):
                raise WeightsError(f"version {version}: vLLM loaded something else")
        self._llm.reset_prefix_cache()  # it holds keys and values of the old weights
        self._version = version

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
                seed(chunk.sampling, chunk.step, r.prompt.uid, r.indices[0]),
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


@torch.no_grad()
def _logprobs(lm: PreTrainedModel, tokens_BT: torch.Tensor) -> torch.Tensor:
    """Of all tokens but the first, (B, T−1), on the CPU."""
    logits = lm(input_ids=tokens_BT, use_cache=False).logits[:, :-1].float()
    picked: torch.Tensor = logits.log_softmax(-1).gather(-1, tokens_BT[:, 1:, None])[..., 0]
    return picked


def _repack(model: torch.nn.Module) -> None:
    """vLLM on a CPU computes with a repacked copy of each linear layer, which for an output head
    that is tied to the embedding stays the old one when weights are loaded anew (vLLM 0.32).
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if hasattr(layer, "cpu_linear") and weight is not None and weight.numel():
            dispatch_cpu_unquantized_gemm(layer, remove_weight=False)


@contextmanager
def _shared(bucket: Bucket) -> Iterator[str]:
    """A file of a bucket's bytes that lives in memory where there is such a place."""
    folder = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    with tempfile.NamedTemporaryFile(prefix="ppo_dist-", dir=folder) as file:
        bucket.raw.tofile(file)
        file.flush()
        yield file.name
