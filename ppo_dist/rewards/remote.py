"""Rewards from a server, over HTTP.

Responses go out in batches, one POST each, JSON both ways:

    {"id": "4be0", "items": [{"id": "4be0.0", "prompt": "hello>", "response": "olleh",
                              "answer": "olleh"}, …]}
    {"id": "4be0", "scores": [{"id": "4be0.0", "score": 1.0}, …]}

`answer` is there with `needs_answer` alone. An answer has status 200, the request's id and one
finite number for each of its items, in any order; whatever else is in it is ignored. A request that
is made again has the same ids, so that a server may remember what it found. One without items is
made before a run starts: its answer has no scores. A server that is busy may say so with status 429
or 503, and with `Retry-After` when to come again. With `token_env` there is a header
`Authorization: Bearer …`. Proxies and passwords of the environment (`HTTP_PROXY`, `.netrc`) are not
used.

What a server wrote is never repeated in an error: it may hold the token or what was sent.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import ssl
import time
from collections.abc import Sequence
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import Any

import aiohttp
from pydantic import BaseModel, ConfigDict, ValidationError

from ppo_dist.config.base import InputError, RunError
from ppo_dist.config.reward import RemoteReward
from ppo_dist.types import Dropped, Rollout, Score

TRANSIENT = (408, 425, 429)  # and all from 500 on
PROBE_S, PROBE_ATTEMPTS = 5.0, 2
CHUNK = 65_536
DICE = random.SystemRandom()  # whatever else is random in a run stays as it is


class RemoteScores:
    """A RewardSource that asks a server, several batches at a time."""

    def __init__(self, section: RemoteReward) -> None:
        self._section = section

    def score(self, rollouts: Sequence[Rollout]) -> list[Score | Dropped]:
        """See RewardSource.

        Raises:
            RunError: a batch got no usable answer, and `on_failure` is fail.
            InputError: the token or the authorities to trust cannot be read.
        """
        size = self._section.batch
        batches = [rollouts[i : i + size] for i in range(0, len(rollouts), size)]
        found = asyncio.run(self.ask(batches)) if batches else []
        return [score for scores in found for score in scores]

    async def ask(self, batches: Sequence[Sequence[Rollout]]) -> list[list[Score | Dropped]]:
        """The scores of each batch. Raises as `score` does, and then asks for no more."""
        section = self._section
        headers, tls = _headers(section), _tls(section)
        async with aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=section.concurrency, ssl=tls),
            timeout=aiohttp.ClientTimeout(total=section.timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # a small answer could become a large one
        ) as session:
            slots = asyncio.Semaphore(section.concurrency)
            return await asyncio.gather(*(self._judged(session, slots, b) for b in batches))

    async def _judged(
        self, session: aiohttp.ClientSession, slots: asyncio.Semaphore, batch: Sequence[Rollout]
    ) -> list[Score | Dropped]:
        section = self._section
        try:
            async with slots:
                values = await self._insisted(session, _request(batch, section.needs_answer))
        except NoAnswer as failure:
            reason = f"reward server {section.url}: {failure}"
            if section.on_failure == "fail":
                raise RunError(reason) from None
            return [Dropped(reason) for _ in batch]
        return [Score(value, section.kind) for value in values]

    async def _insisted(
        self, session: aiohttp.ClientSession, request: dict[str, Any]
    ) -> list[float]:
        """The numbers of a request that is made until it is answered, or has failed for good."""
        attempt = 1
        while True:
            try:
                return await self._once(session, request)
            except NoAnswer as failure:
                if not failure.again or self._section.attempts == 1:
                    raise
                if attempt == self._section.attempts:
                    raise NoAnswer(f"{failure}, asked {attempt} times") from None
                pause_s = _pause_s(self._section, attempt, failure.after_s)
            await asyncio.sleep(pause_s)
            attempt += 1

    async def _once(self, session: aiohttp.ClientSession, request: dict[str, Any]) -> list[float]:
        section = self._section
        try:
            async with session.post(section.url, json=request, allow_redirects=False) as response:
                _check_status(response)
                body = await _body(response, section.max_response_bytes)
        except TimeoutError:
            raise NoAnswer(f"no answer within {section.timeout_s:g} s", again=True) from None
        except aiohttp.ClientConnectorCertificateError as error:
            raise NoAnswer(f"its certificate is not trusted ({_untrusted(error)})") from None
        except aiohttp.ClientSSLError as error:
            raise NoAnswer(f"TLS failed ({_why(error)})") from None
        except aiohttp.ClientConnectorError as error:
            raise NoAnswer(f"cannot be reached ({_why(error)})", again=True) from None
        except (aiohttp.ClientError, OSError) as error:  # reset, cut off, or not HTTP
            reason = f"the connection broke ({type(error).__name__})"
            raise NoAnswer(reason, again=True) from None
        return _numbers(body, request)


def probe(section: RemoteReward) -> None:
    """Asks a server for no scores, soon, and at most twice.

    Raises:
        RunError: it gives no usable answer.
        InputError: the token or the authorities to trust cannot be read.
    """
    quick = {
        "timeout_s": min(section.timeout_s, PROBE_S),
        "attempts": min(section.attempts, PROBE_ATTEMPTS),
        "on_failure": "fail",
    }
    asyncio.run(RemoteScores(section.model_copy(update=quick)).ask([[]]))


class NoAnswer(Exception):
    """Why a request got no usable answer, whether to make it `again`, and not before when."""

    def __init__(self, reason: str, again: bool = False, after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.again, self.after_s = again, after_s


class Item(BaseModel):
    """The score of one item."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    id: str
    score: float


class Answer(BaseModel):
    """What a server answers."""

    model_config = ConfigDict(strict=True)
    id: str
    scores: list[Item]


def _request(batch: Sequence[Rollout], needs_answer: bool) -> dict[str, Any]:
    number = secrets.token_hex(8)
    items: list[dict[str, str | None]] = []
    for i, rollout in enumerate(batch):
        texts = {"prompt": rollout.prompt.text, "response": rollout.text}
        answer = {"answer": rollout.prompt.answer} if needs_answer else {}
        items.append({"id": f"{number}.{i}", **texts, **answer})
    return {"id": number, "items": items}


def _numbers(body: bytes, request: dict[str, Any]) -> list[float]:
    """One number for each item of a request, in its order."""
    try:
        answer = Answer.model_validate_json(body)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, fault["loc"])) or "as a whole"
        raise NoAnswer(f"a malformed answer ({where}: {fault['msg']})", again=True) from None
    asked = [item["id"] for item in request["items"]]
    found = {item.id: item.score for item in answer.scores}
    if answer.id != request["id"]:
        raise NoAnswer("the answer to another request", again=True)
    if len(answer.scores) != len(asked):
        reason = f"{len(answer.scores)} scores for {len(asked)} responses"
        raise NoAnswer(reason, again=True)
    if found.keys() != set(asked):
        raise NoAnswer("scores of other responses than were asked for", again=True)
    return [found[name] for name in asked]


def _check_status(response: aiohttp.ClientResponse) -> None:
    status = response.status
    if status == HTTPStatus.OK:
        return
    if 300 <= status < 400:
        raise NoAnswer(f"status {status}: redirects are not followed")
    name = HTTPStatus(status).phrase if status in set(HTTPStatus) else ""
    again = status in TRANSIENT or status >= 500
    after_s = _after_s(response.headers.get("Retry-After", ""))
    raise NoAnswer(f"status {status} {name}".rstrip(), again, after_s)


async def _body(response: aiohttp.ClientResponse, limit: int) -> bytes:
    body = bytearray()
    async for chunk in response.content.iter_chunked(CHUNK):
        body += chunk
        if len(body) > limit:
            response.close()
            raise NoAnswer(f"an answer of more than {limit} bytes (max_response_bytes)")
    return bytes(body)


def _pause_s(section: RemoteReward, attempt: int, after_s: float) -> float:
    """Drawn, so that requests that failed together do not come back together; not before the server
    wants it, and never longer than the limit.

    Source: "full jitter", Brooker 2015, "Exponential Backoff And Jitter" (AWS Architecture Blog).
    """
    longest = after_s + section.backoff_s * 2 ** (attempt - 1)
    return DICE.uniform(min(after_s, section.max_pause_s), min(longest, section.max_pause_s))


def _after_s(value: str) -> float:
    """A `Retry-After`: seconds, or a date."""
    if value.isascii() and value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _why(error: aiohttp.ClientConnectorError) -> str:
    """What the operating system or the TLS library says of it."""
    cause = error.os_error
    if isinstance(cause, ssl.SSLError):
        return str(cause.reason)
    number = cause.errno or 0  # those of name resolution are none of the operating system's
    return os.strerror(number) if number > 0 else str(cause.strerror or cause)


def _untrusted(error: aiohttp.ClientConnectorCertificateError) -> str:
    cause = error.certificate_error
    return cause.verify_message if isinstance(cause, ssl.SSLCertVerificationError) else str(cause)


def _headers(section: RemoteReward) -> dict[str, str]:
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
    if section.token_env is None:
        return headers
    token = os.environ.get(section.token_env, "").strip()
    where = f"reward server {section.url}: the environment variable {section.token_env} (token_env)"
    if not token:
        raise InputError(f"{where} is not set")
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise InputError(f"{where} holds no token: it has white space or other signs in it")
    return headers | {"Authorization": f"Bearer {token}"}


def _tls(section: RemoteReward) -> ssl.SSLContext | bool:
    """What checks certificate and host name."""
    if not section.url.startswith("https:"):
        return True
    try:
        return ssl.create_default_context(cafile=section.ca_file)
    except OSError as error:
        raise InputError(
            f"{section.ca_file}: cannot be used as ca_file: {error.args[-1]}"
        ) from None
