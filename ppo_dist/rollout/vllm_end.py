"""What runs in vLLM's own processes, where its model is: they import this file for `WorkerSide`.

New weights come bucket by bucket (rollout/handover.py) by vLLM's weight-transfer API, for which
`FileEngine` and `IpcEngine` are registered; the digest of what was loaded is told back.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import (
    IPCWeightTransferEngine,
    IPCWeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from ppo_dist import device
from ppo_dist.rollout.handover import HANDOVERS, digest_of
from ppo_dist.rollout.orphans import end_with_owner
from ppo_dist.transport.wire import Bucket, Part, of_all


@dataclass
class _Nothing(WeightTransferInitInfo):  # type: ignore[misc]
    """There is nothing to agree on."""


@dataclass
class _File(WeightTransferUpdateInfo):  # type: ignore[misc]
    """A bucket: the file of its bytes, and what is in them."""

    path: str
    parts: list[dict[str, Any]]
    digest: str


class FileEngine(WeightTransferEngine[_Nothing, _File]):  # type: ignore[misc]
    """vLLM's end on a CPU: takes buckets from files."""

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
        self.model.load_weights(bucket.tensors())
        self.digests.append(update_info.digest)

    def finish_weight_update(self) -> None:
        """See WeightTransferEngine."""
        finalize_layerwise_reload(self.model, self.model_config)
        _repack(self.model)

    def shutdown(self) -> None:
        """See WeightTransferEngine."""


class IpcEngine(IPCWeightTransferEngine):  # type: ignore[misc]
    """vLLM's end on a GPU: its own `ipc` engine, which keeps the digest of what it takes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.digests: list[str] = []

    def start_weight_update(self) -> None:
        """See WeightTransferEngine."""
        self.digests = []
        super().start_weight_update()

    def receive_weights(self, update_info: IPCWeightTransferUpdateInfo) -> None:
        """See WeightTransferEngine. A handle can be imported once: the sender counts."""
        named = zip(update_info.names, update_info.ipc_handles, strict=True)
        weights = [(name, device.imported(each, self.device)) for name, each in named]
        self.digests.append(digest_of([tensor for _, tensor in weights]))
        self.model.load_weights(weights)


class WorkerSide:
    """What vLLM's worker process can be asked beside what it knows itself."""

    def loaded(self) -> str:
        """The digest of the version that was loaded last."""
        return of_all(self.weight_transfer_engine.digests)  # type: ignore[attr-defined]

    def peak_memory(self) -> int | None:
        """See RolloutEngine, of one GPU."""
        return device.peak_memory()

    def begin_trace(self, file: str) -> None:
        """Traces what this process does; a file for each rank where there are several."""
        rank = self.rank  # type: ignore[attr-defined]
        self._trace = device.traced(Path(file).with_suffix(f".{rank}.json" if rank else ".json"))
        self._trace.__enter__()

    def end_trace(self) -> None:
        """Writes the trace."""
        self._trace.__exit__(None, None, None)


def _repack(model: torch.nn.Module) -> None:
    """vLLM on a CPU computes with a repacked copy of each linear layer, which for an output head
    that is tied to the embedding stays the old one when weights are loaded anew (vLLM 0.32).
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if hasattr(layer, "cpu_linear") and weight is not None and weight.numel():
            dispatch_cpu_unquantized_gemm(layer, remove_weight=False)


def _register(name: str, engine: type[WeightTransferEngine]) -> None:
    if name not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(name, engine)


_register(HANDOVERS["cpu"].backend, FileEngine)
_register(HANDOVERS["cuda"].backend, IpcEngine)
end_with_owner()  # this is one of vLLM's processes, or has no owner
