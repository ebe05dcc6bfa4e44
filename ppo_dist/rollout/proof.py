"""The proof that an engine which holds a model of its own loads new weights right."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from ppo_dist.protocols import NamedTensors, WeightsError

LOUDNESS = 0.3  # of the noise, in standard deviations of a parameter
LEAST = 0.02  # of the noise: norms begin as ones, and biases as zeros
TOLERANCE = 1e-3  # nats; of two implementations in fp32
ROUNDING = 2.0  # as often the error that rounding makes in the learners' own number format


def prove_loading(
    load: Callable[[int, NamedTensors], None],
    scores: Callable[[torch.Tensor], torch.Tensor],
    lm: PreTrainedModel,
) -> None:
    """Has an engine load weights far from those of `lm` (the learners' model, as it is on disk),
    embedding and head among them, and then its own, as version 0. Both times what it says of some
    tokens must be what they give in fp32: on average within 1e-3 nats, or twice the error that `lm`
    itself makes in its number format. In bf16 an update of training could not tell: it is smaller
    than that.

    `scores` takes tokens (B, T) and returns the log-probabilities of all but the first, (B, T−1).

    Raises:
        WeightsError: it says something else.
    """
    own = {name: p.detach().clone() for name, p in lm.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(lm.config.vocab_size, (4, 16), generator=generator)
    before, allowed_before = _expected(lm, tokens_BT)
    with torch.no_grad():
        for parameter in lm.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            size = max(LEAST, LOUDNESS * float(parameter.float().std(correction=0)))
            parameter.add_((size * noise).to(parameter.dtype))
    after, allowed_after = _expected(lm, tokens_BT)
    assert float((after - before).abs().mean()) > 4 * allowed_after, "not loud enough to tell"
    for version, expected, allowed, weights in (
        (-1, after, allowed_after, lm.named_parameters()),
        (0, before, allowed_before, own.items()),
    ):
        load(version, weights)
        gap = float((scores(tokens_BT) - expected).abs().mean())
        if not gap <= allowed:
            raise WeightsError(
                "the engine does not load new weights of this model right: its log-probabilities "
                f"are {gap:.3g} from the learners', where {allowed:.3g} is allowed"
            )


def _expected(lm: PreTrainedModel, tokens_BT: torch.Tensor) -> tuple[torch.Tensor, float]:
    """What the weights of a model say in fp32, and how far an engine may be from it on average."""
    dtype, rounded = lm.dtype, logprobs(lm, tokens_BT)
    exact = logprobs(lm.to(torch.float32), tokens_BT)
    lm.to(dtype)
    return exact, max(TOLERANCE, ROUNDING * float((rounded - exact).abs().mean()))


@torch.no_grad()
def logprobs(lm: PreTrainedModel, tokens_BT: torch.Tensor) -> torch.Tensor:
    """What a model says of all tokens but the first, (B, T−1), on the CPU."""
    logits = lm(input_ids=tokens_BT, use_cache=False).logits[:, :-1].float()
    picked: torch.Tensor = logits.log_softmax(-1).gather(-1, tokens_BT[:, 1:, None])[..., 0]
    return picked
