"""Rewards from a server: what is sent, what is believed, what is tried again, and for how long."""

from __future__ import annotations

import datetime
import ipaddress
import json
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ppo_dist.config import Config, InputError, RunError
from ppo_dist.config.load import dump, load, validated
from ppo_dist.config.reward import RemoteReward
from ppo_dist.rewards.remote import RemoteScores, _after_s, _pause_s, probe
from ppo_dist.types import Dropped, Prompt, Rollout, Score
from tests.conftest import raw_config
from tests.contract.suites import check_reward_source
from tests.reward_server import Behaviour, Handler, RewardServer, healthy

SECRET = "s3cr3t-t0ken"
ANSWER = "the-known-answer"


def section(url: str, **keys: Any) -> RemoteReward:
    quick = {"batch": 3, "concurrency": 2, "timeout_s": 5.0, "attempts": 3, "backoff_s": 0.01}
    return RemoteReward.model_validate({"kind": "remote", "url": url, **quick, **keys})


def remote(url: str, **keys: Any) -> RemoteScores:
    return RemoteScores(section(url, **keys))


def rollouts(count: int) -> list[Rollout]:
    """Every third has a reward of 0."""
    prompt = Prompt("p", "verifiable", "word>", np.array([3]), answer=ANSWER)
    none = np.zeros(0, np.float32)
    texts = ["x" * (2 + 2 * i + (i % 3 == 0)) for i in range(count)]
    return [
        Rollout(prompt, i, none.astype(np.int64), none, text, "eos", 0)
        for i, text in enumerate(texts)
    ]


def values(scores: list[Score | Dropped]) -> list[float | None]:
    return [score.value if isinstance(score, Score) else None for score in scores]


EXPECTED = [float(i % 3 != 0) for i in range(10)]


def failure(url: str, **keys: Any) -> str:
    """Why a run would end."""
    with pytest.raises(RunError) as error:
        remote(url, **keys).score(rollouts(2))
    assert str(error.value).startswith(f"reward server {url}: ")
    return str(error.value).removeprefix(f"reward server {url}: ")


def test_the_contract() -> None:
    with RewardServer() as server:
        check_reward_source(remote(server.url), rollouts(10))
        assert {s.source for s in remote(server.url).score(rollouts(2))} == {"remote"}
    check_reward_source(remote(server.url, on_failure="drop", attempts=1), rollouts(10))


def test_scores_are_in_the_order_of_rollouts_however_answers_arrive() -> None:
    lock, under_way, most = threading.Lock(), 0, 0

    def late(handler: Handler) -> None:
        """The first requests are answered last, each with its scores from behind."""
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.02 * (6 - len(handler.server.seen)))
        with lock:
            under_way -= 1
        scores = json.loads(handler.scores())
        handler.reply(json.dumps({**scores, "scores": scores["scores"][::-1]}).encode())

    with RewardServer(late) as server:
        found = remote(server.url, batch=2, concurrency=3).score(rollouts(10))
    assert values(found) == EXPECTED
    assert most == 3 and len(server.seen) == 5


def test_what_is_sent() -> None:
    with RewardServer() as server:
        remote(server.url, batch=2).score(rollouts(3))
    first, second = sorted(
        (json.loads(seen.body) for seen in server.seen), key=lambda r: -len(r["items"])
    )
    item = {"prompt": "word>", "response": "xxx", "answer": ANSWER}
    assert first["items"][0] == {"id": f"{first['id']}.0", **item}
    assert [len(request["items"]) for request in (first, second)] == [2, 1]
    ids = {item["id"] for request in (first, second) for item in request["items"]}
    assert len(ids) == 3 and first["id"] != second["id"]


def test_no_answer_leaves_without_needs_answer() -> None:
    with RewardServer() as server:
        remote(server.url, needs_answer=False).score(rollouts(3))
    (seen,) = server.seen
    assert ANSWER.encode() not in seen.body and b'"answer"' not in seen.body


def test_threads_do_not_meet() -> None:
    with RewardServer() as server, ThreadPoolExecutor(4) as pool:
        source = remote(server.url)
        found = list(pool.map(lambda n: values(source.score(rollouts(n))), [10, 9, 8, 7]))
    assert found == [EXPECTED[:n] for n in (10, 9, 8, 7)]


def status(code: int, **headers: str) -> Behaviour:
    return lambda handler: handler.reply(SECRET.encode(), code, **headers)


def reset(handler: Handler) -> None:
    linger = struct.pack("ii", 1, 0)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    handler.connection.close()
    handler.close_connection = True


def hang_up(handler: Handler) -> None:
    handler.close_connection = True


def cut_off(handler: Handler) -> None:
    handler.reply(handler.scores(), Content_Length="9999")
    handler.close_connection = True


def not_http(handler: Handler) -> None:
    handler.wfile.write(f"{SECRET}\r\n\r\n".encode())
    handler.close_connection = True


def body(text: str) -> Behaviour:
    return lambda handler: handler.reply(text.encode())


def score(text: str) -> Behaviour:
    """The right answer but for its first number."""
    return lambda handler: handler.reply(
        re.sub(rb'"score": [^}]+', f'"score": {text}'.encode(), handler.scores(), count=1)
    )


def changed(change: Callable[[dict[str, Any]], Any]) -> Behaviour:
    def behave(handler: Handler) -> None:
        answer = json.loads(handler.scores())
        change(answer)
        handler.reply(json.dumps(answer).encode())

    return behave


TRANSIENT = {
    "status 500 Internal Server Error": status(500),
    "status 502 Bad Gateway": status(502),
    "status 503 Service Unavailable": status(503, Retry_After="soon"),
    "status 599": status(599),
    "status 408 Request Timeout": status(408),
    "status 429 Too Many Requests": status(429),
    "the connection broke (ClientOSError)": reset,
    "the connection broke (ServerDisconnectedError)": hang_up,
    "the connection broke (ClientPayloadError)": cut_off,
    "the connection broke (ClientResponseError)": not_http,
}
WRONG = {
    "(as a whole: Invalid JSON": body("<html>busy</html>"),
    "(as a whole: Invalid": lambda handler: handler.reply(b"\xff\xfe"),
    "(as a whole: Invalid JSON: recursion": body("[" * 100_000),
    "(as a whole: Input should be an object)": body("[]"),
    "(scores: Field required)": changed(lambda a: a.pop("scores")),
    "(id: Field required)": changed(lambda a: a.pop("id")),
    "(id: Input should be a valid string)": changed(lambda a: a.update(id=7)),
    "the answer to another request": changed(lambda a: a.update(id="0" * 16)),
    "1 scores for 2 responses": changed(lambda a: a["scores"].pop()),
    "3 scores for 2 responses": changed(lambda a: a["scores"].append(a["scores"][0])),
    "scores of other responses": changed(lambda a: a["scores"][1].update(id="0" * 16 + ".1")),
    "scores of other responses than": changed(lambda a: a["scores"][1].update(a["scores"][0])),
    "(scores.0.id: Field required)": changed(lambda a: a["scores"][0].pop("id")),
    "(scores.0.score: Field required)": changed(lambda a: a["scores"][0].pop("score")),
    **{f"(scores.0.score: Input should be {what})": score(text) for text, what in (
        ("NaN", "a finite number"), ("-Infinity", "a finite number"), ("1e999", "a finite number"),
    )},
    **{f"(scores.0.score: Input should be a valid number){text}": score(text) for text in (
        '"1.0"', "true", "null", "[1]"
    )},
}  # fmt: skip
FINAL = {
    "status 400 Bad Request": status(400),
    "status 401 Unauthorized": status(401),
    "status 404 Not Found": status(404),
    "status 204 No Content": lambda handler: handler.reply(b"", 204),
    "an answer of more than 1000 bytes (max_response_bytes)": body("[" + "1," * 1000),
}


@pytest.mark.parametrize("reason", [*TRANSIENT, *WRONG])
def test_another_try_may_help(reason: str) -> None:
    """Twice wrong, then right: nobody notices. Never right: it is tried so often, and no more."""
    wrong = {**TRANSIENT, **WRONG}[reason]
    with RewardServer(lambda h: healthy(h) if h.tries == 3 else wrong(h)) as server:
        assert values(remote(server.url).score(rollouts(4))) == EXPECTED[:4]
        assert len({seen.id for seen in server.seen}) == 2 and len(server.seen) == 6
    with RewardServer(wrong) as server:
        found = failure(server.url)
        assert reason.split(")")[0] in found and found.endswith(", asked 3 times")
        assert SECRET not in found and len(server.seen) == 3


@pytest.mark.parametrize("reason", FINAL)
def test_another_try_would_not_help(reason: str) -> None:
    with RewardServer(FINAL[reason]) as server:
        assert failure(server.url, max_response_bytes=1000) == reason
        assert len(server.seen) == 1


def test_an_answer_without_end_is_not_read() -> None:
    sent = 0

    def endless(handler: Handler) -> None:
        nonlocal sent
        handler.send_response(200)
        handler.end_headers()
        for _ in range(500):  # long enough
            handler.wfile.write(b" " * 100_000)
            sent += 100_000

    with RewardServer(endless) as server:
        assert "more than 500000 bytes" in failure(server.url, max_response_bytes=500_000)
    assert sent < 20_000_000, "what the sockets hold, and no more"


def test_a_redirect_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE", SECRET)
    with RewardServer() as other, RewardServer(status(307, Location=other.url)) as server:
        found = failure(server.url, token_env="JUDGE")
        assert found == "status 307: redirects are not followed"
        assert len(server.seen) == 1 and not other.seen


def test_a_closed_port() -> None:
    with RewardServer() as server:
        pass
    assert failure(server.url) == "cannot be reached (Connection refused), asked 3 times"


def drip(handler: Handler) -> None:
    """Never silent for long, never done."""
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.02)


@pytest.mark.parametrize("slow", [lambda handler: time.sleep(0.5), drip], ids=["silent", "drip"])
def test_the_time_of_a_step_is_bounded(slow: Behaviour) -> None:
    keys = {"timeout_s": 0.1, "attempts": 2, "backoff_s": 9.0, "max_pause_s": 0.1}
    with RewardServer(slow) as server:
        begin = time.monotonic()
        assert failure(server.url, **keys) == "no answer within 0.1 s, asked 2 times"
        found = remote(server.url, on_failure="drop", **keys).score(rollouts(10))
        seconds = time.monotonic() - begin
    assert values(found) == [None] * 10
    assert seconds < (1 + 2) * (2 * 0.1 + 0.1) + 0.5, "1 round, then 2 of 2 batches"


def test_the_server_says_when_to_come_again() -> None:
    times: list[float] = []

    def busy(handler: Handler) -> None:
        times.append(time.monotonic())
        status(429, Retry_After="60")(handler) if handler.tries == 1 else healthy(handler)

    with RewardServer(busy) as server:
        remote(server.url, max_pause_s=0.3).score(rollouts(1))
    assert 0.3 <= times[1] - times[0] < 1.0, "longer than the first pause alone, up to the limit"


def test_pauses() -> None:
    made = section("http://localhost/", backoff_s=1.0, max_pause_s=5.0)
    for attempt, after_s, low, high in (
        (1, 0, 0, 1),
        (3, 0, 0, 4),
        (9, 0, 0, 5),
        (1, 3, 3, 4),
        (1, 60, 5, 5),
    ):
        drawn = [_pause_s(made, attempt, after_s) for _ in range(200)]
        assert low <= min(drawn) and max(drawn) <= high
        assert low == high or max(drawn) - min(drawn) > 0.8 * (high - low), "they do not meet"
    now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=90)
    assert 85 < _after_s(now.strftime("%a, %d %b %Y %H:%M:%S GMT")) <= 90
    texts = (
        "",
        "-5",
        "soon",
        "²",
        "Mon, 01 Jan 1990 00:00:00 GMT",
        "Mon, 01 Jan 0000 00:00:00 GMT",
    )
    assert [_after_s(text) for text in texts] == [0.0] * 6


def test_a_failed_batch_is_dropped_alone() -> None:
    def choosy(handler: Handler) -> None:
        spoiled = any(len(item["response"]) == 10 for item in handler.asked["items"])
        status(422)(handler) if spoiled else healthy(handler)

    with RewardServer(choosy) as server:
        found = remote(server.url, on_failure="drop").score(rollouts(10))
        reason = f"reward server {server.url}: status 422 Unprocessable"
        with pytest.raises(RunError, match=re.escape(reason)):
            remote(server.url).score(rollouts(10))
    assert values(found) == [*EXPECTED[:3], None, None, None, *EXPECTED[6:]]
    dropped = [each for each in found if isinstance(each, Dropped)]
    assert len(dropped) == 3 and all(each.reason.startswith(reason) for each in dropped)


def test_after_a_failure_nothing_more_is_asked() -> None:
    with RewardServer(status(400)) as server, pytest.raises(RunError):
        remote(server.url, batch=1).score(rollouts(10))
    assert len(server.seen) < 6


def echo(handler: Handler) -> None:
    """An error page that repeats everything."""
    secret = handler.headers["Authorization"]
    handler.reply(f"{secret} {handler.asked}".encode(), 400, X_Echo=secret, Location=secret)


def test_the_token_is_sent_and_never_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JUDGE", f"{SECRET}\n")
    caplog.set_level(0)
    with RewardServer(echo) as server:
        keys = {"token_env": "JUDGE"}
        told = failure(server.url, **keys)
        (dropped,) = remote(server.url, on_failure="drop", **keys).score(rollouts(1))
        raw = raw_config(tmp_path, reward={"verifiable": dict(section(server.url, **keys))})
    assert {s.headers["Authorization"] for s in server.seen} == {f"Bearer {SECRET}"}
    kept = [told, str(dropped), repr(remote(server.url, **keys)), dump(Config.model_validate(raw))]
    assert not any(SECRET in text for text in [*kept, caplog.text])
    for value in ("", " ", "two words", "line\nbreak", "ü"):
        monkeypatch.setenv("JUDGE", value)
        with pytest.raises(InputError, match=r"variable JUDGE \(token_env\)") as error:
            remote(server.url, **keys).score(rollouts(1))
        assert not value.strip() or value not in str(error.value)


def certificate(folder: Path, name: str) -> Path:
    """A self-signed certificate of a host, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    own = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(own)
        .issuer_name(own)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(name))]), False
        )
        .sign(key, hashes.SHA256())
    )
    path = folder / f"{name}.pem"
    formats = (
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM) + key.private_bytes(*formats))
    return path


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("tls")
    yield certificate(folder, "127.0.0.1"), certificate(folder, "127.0.0.9")


def serving(path: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context


def test_tls(certificates: tuple[Path, Path], tmp_path: Path) -> None:
    right, wrong = certificates
    with RewardServer(tls=serving(right)) as server:
        found = failure(server.url)
        assert found == "its certificate is not trusted (self-signed certificate)"
        assert "not trusted" in failure(server.url, ca_file=str(wrong))
        assert values(remote(server.url, ca_file=str(right)).score(rollouts(4))) == EXPECTED[:4]
        assert len(server.seen) == 2, "nothing was sent to a server that is not trusted"
        for bad in ("nowhere.pem", str(Path(__file__))):
            with pytest.raises(InputError, match="cannot be used as ca_file"):
                remote(server.url, ca_file=bad).score(rollouts(1))
    with RewardServer(tls=serving(wrong)) as server:
        found = failure(server.url, ca_file=str(wrong))
        assert "not trusted" in found and "IP address mismatch" in found and not server.seen
    with RewardServer() as server:
        assert failure(server.url.replace("http", "https")).startswith("TLS failed (")


def test_a_probe_asks_for_nothing() -> None:
    with RewardServer() as server:
        probe(section(server.url))
    assert [json.loads(seen.body)["items"] for seen in server.seen] == [[]]
    told = "status 503 Service Unavailable, asked 2 times"
    with RewardServer(status(503)) as server, pytest.raises(RunError, match=told):
        probe(section(server.url, attempts=9, on_failure="drop"))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"url": "judge.example/score"}, "url: must be an address"),
        ({"url": "ftp://judge.example"}, "url: must be an address"),
        ({"url": "https://judge example/"}, "url: must be an address"),
        ({"url": "https://judge.example:pass"}, "url: must be an address"),
        ({"url": "https://me:pass@judge.example"}, "url: must hold no user or password"),
        ({"url": "http://judge.example", "token_env": "T"}, "token_env would be read on its way"),
        ({"url": "http://judge.example", "ca_file": "x"}, "ca_file has no effect on http"),
        ({"url": "http://judge.example", "attempts": 0}, "attempts: "),
        ({"url": "http://judge.example", "verify": False}, "verify: unknown key"),
        ({}, "url: required"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_keys(tmp_path: Path, keys: dict[str, Any], told: str) -> None:
    raw = raw_config(tmp_path, reward={"verifiable": {"kind": "remote", **keys}})
    with pytest.raises(InputError) as error:
        validated(Config, raw, "mine.yaml")
    assert str(error.value).startswith("mine.yaml: reward.verifiable") and told in str(error.value)
    assert "pass" not in str(error.value).replace("password", "")


def test_an_unlabelled_prompt_has_no_answer_to_send(tmp_path: Path) -> None:
    judge = {"kind": "remote", "url": "https://judge.example/"}
    raw = raw_config(tmp_path, reward={"unlabelled": judge})
    with pytest.raises(InputError, match=r"reward\.unlabelled must not see an answer: .* remote"):
        validated(Config, raw, "mine.yaml")
    judge["needs_answer"] = False
    parts = [{"weight": 1, "reward": "vote"}, {"weight": 1, "reward": judge}]
    raw = raw_config(tmp_path, reward={"unlabelled": {"kind": "weighted", "parts": parts}})
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(raw))
    assert load(path).reward.unlabelled.parts[1].reward.needs_answer is False
