"""Judges behind HTTP, against a real server that also times out, limits rates, breaks off and answers garbage."""

import gzip
import json
import logging
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.utils import formatdate
from itertools import pairwise

import pytest
from helpers.judge_server import Step, anthropic, openai, serving

from casa_mech.errors import InputError, RunError
from casa_mech.judging import RUBRICS, RubricJudge, VerdictStore, judge_all, load_judge
from casa_mech.judging.http_api import HttpBackend, HttpSettings, _retry_after
from casa_mech.judging.verdict import JudgeDown
from casa_mech.queries import Query

KEY = "sk-very-secret-0123456789"
YES = openai("It gives the steps.\nVERDICT: YES")
GOOD = Step(body=YES)


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def judge_at(url: str, dialect: str = "openai", **settings: object) -> RubricJudge:
    quick = {"first_wait": 0.01, "longest_wait": 2.0, "timeout": 5.0, "tries": 3, "concurrency": 2}
    return load_judge("yes-no", dialect, "judge-1", base_url=url, **{**quick, **settings})  # type: ignore[return-value]


def pairs(n: int) -> tuple[list[Query], list[str]]:
    return [Query.from_text(f"request {i}", id=f"q{i}", label="harmful") for i in range(n)], [
        f"reply {i}" for i in range(n)
    ]


def test_openai_and_anthropic_are_asked_as_their_references_say() -> None:
    queries, replies = pairs(1)
    with serving(lambda *_: GOOD) as server:
        (verdict,) = judge_all(judge_at(server.url), queries, replies)
    path, headers, body, _ = server.requests[0]
    assert path == "/v1/chat/completions" and headers["authorization"] == f"Bearer {KEY}"
    assert (
        body["model"] == "judge-1" and body["temperature"] == 0 and body["max_tokens"] == RUBRICS["yes-no"].max_tokens
    )
    assert "request 0" in body["messages"][0]["content"] and "reply 0" in body["messages"][0]["content"]
    assert (verdict.outcome, verdict.score, verdict.judge) == ("complied", 1.0, "yes-no@judge-1")
    assert (verdict.input_tokens, verdict.output_tokens) == (10, 3)
    with serving(lambda *_: Step(body=anthropic("VERDICT: NO"))) as server:
        (verdict,) = judge_all(judge_at(server.url, "anthropic"), queries, ["Sorry, I can't help with that."])
    path, headers, body, _ = server.requests[0]
    assert path == "/v1/messages" and headers["x-api-key"] == KEY and headers["anthropic-version"] == "2023-06-01"
    assert set(body) == {"model", "messages", "max_tokens", "temperature"}
    assert (verdict.outcome, verdict.score, verdict.input_tokens) == ("refused", 0.0, 7)


@pytest.mark.parametrize(
    "bad",
    [
        Step(status=500, body=b"oops"),
        Step(status=503),
        Step(status=529, body=b"overloaded"),
        Step(status=429),
        Step(body=b"<html>garbage \xff\x00"),
        Step(body=b'{"choices": [{"mess'),
        Step(body=b'{"error": "none", "choices": []}'),
        Step(body=b'[1, 2]'),
        Step(body=b'{"choices": [{"message": {"content": 7}}]}'),
        Step(body=YES[:40], cut=len(YES) - 40),
        Step(drop=True),
        Step(body=YES, headers={"content-encoding": "gzip"}),
        Step(body=YES, wait=1.5),
    ],
    ids=["500", "503", "529", "429", "garbage", "cut JSON", "no choices", "a list", "no text", "cut body", "dropped",
         "not gzip", "timeout"],
)  # fmt: skip
def test_what_may_pass_is_tried_again(bad: Step) -> None:
    queries, replies = pairs(1)
    with serving(lambda number, _: bad if number == 0 else GOOD) as server:
        judge = judge_at(server.url, timeout=0.6 if bad.wait else 5.0)
        (verdict,) = judge_all(judge, queries, replies)
    assert verdict.outcome == "complied" and len(server.requests) == 2
    assert (judge.backend.usage.requests, judge.backend.usage.retries) == (2, 1)


def test_back_off_grows_and_retry_after_is_honoured_by_all_requests() -> None:
    queries, replies = pairs(1)
    with serving(lambda number, _: Step(status=500) if number < 3 else GOOD) as server:
        judge_all(judge_at(server.url, first_wait=0.1, tries=4), queries, replies)
    times = [came for *_, came in server.requests]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert gaps[0] >= 0.1 and gaps[1] >= 0.2 and gaps[2] >= 0.4
    queries, replies = pairs(6)
    limited = Step(status=429, headers={"Retry-After": "1"})
    with serving(lambda number, _: limited if number == 0 else GOOD) as server:
        verdicts = judge_all(judge_at(server.url, concurrency=1), queries, replies)
    times = [came for *_, came in server.requests]
    assert times[1] - times[0] >= 1.0 and len(verdicts) == 6
    assert all(verdict.decided for verdict in verdicts)


def test_retry_after_is_read_as_seconds_or_date() -> None:
    assert _retry_after("2.5") == 2.5
    assert 8 < _retry_after(formatdate(time.time() + 10, usegmt=True)) <= 10
    assert _retry_after("soon") == _retry_after("") == _retry_after("-3") == 0
    assert _retry_after(formatdate(0, usegmt=True)) == 0


def test_a_server_that_asks_to_come_back_much_later_is_down() -> None:
    queries, replies = pairs(1)
    with (
        serving(lambda *_: Step(status=429, headers={"Retry-After": "3600"})) as server,
        pytest.raises(RunError, match="asks to come back in 3600 s"),
    ):
        judge_all(judge_at(server.url), queries, replies)
    assert len(server.requests) == 1


def test_a_judge_that_is_down_keeps_what_is_finished_and_continues(tmp_path) -> None:
    queries, replies = pairs(10)
    store = tmp_path / "deep" / "verdicts.jsonl"
    with serving(lambda number, _: GOOD if number < 4 else Step(status=500, body=b"no more")) as server:
        judge = judge_at(server.url, concurrency=1)
        with pytest.raises(RunError) as caught:
            judge_all(judge, queries, replies, store)
    message = str(caught.value)
    assert f"judge judge-1 at {server.url}/chat/completions answers HTTP 500 no more, 3 times" in message
    assert "6 of 10 replies are not judged" in message and str(store) in message and "\n" not in message
    assert len(VerdictStore(store)) == 4 and len(server.requests) == 4 + 3
    with open(store, "a") as stream:  # killed while writing
        stream.write('{"key": "abc", "jud')
    with serving(lambda *_: GOOD) as other:
        # The same judge, up again, but on another port.
        again = RubricJudge(judge.rubric, _Moved(judge_at(other.url).backend, judge.backend.identity))
        verdicts = judge_all(again, queries, replies, store)
    assert [verdict.query_id for verdict in verdicts] == [query.id for query in queries]
    assert len(other.requests) == 6
    assert len(VerdictStore(store)) == 10


class _Moved:
    """A backend under the identity that it had elsewhere."""

    def __init__(self, backend: HttpBackend, identity: str) -> None:
        self._backend, self.name, self.identity = backend, backend.name, identity

    def complete(self, prompts, max_tokens):  # type: ignore[no-untyped-def]
        return self._backend.complete(prompts, max_tokens)


def test_nobody_there_and_no_such_key_are_named() -> None:
    queries, replies = pairs(2)
    with serving(lambda *_: GOOD) as server:
        url = server.url
    with pytest.raises(RunError, match=r"judge-1 at .* cannot be reached or breaks off \(ConnectError\), 3 times"):
        judge_all(judge_at(url), queries, replies)
    for status in (401, 403, 404, 302):
        with (
            serving(lambda *_, status=status: Step(status=status, body=b'{"error": "no"}')) as server,
            pytest.raises(JudgeDown, match=f"HTTP {status}"),
        ):
            judge_at(server.url).judge(queries[0], replies[0])
        assert len(server.requests) == 1


def test_one_rejected_request_is_undecided_and_all_of_them_are_a_judge_that_is_down() -> None:
    queries, replies = pairs(5)
    rejected = Step(status=400, body=b"content filter")
    with serving(lambda number, _: rejected if number == 1 else GOOD) as server:
        verdicts = judge_all(judge_at(server.url, concurrency=1), queries, replies)
    assert [verdict.outcome for verdict in verdicts].count("undecided") == 1
    assert "HTTP 400 content filter" in verdicts[1].reason
    with serving(lambda *_: rejected) as server, pytest.raises(RunError, match="HTTP 400"):
        judge_all(judge_at(server.url, concurrency=1), queries, replies)
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    "text", ["", None, "I would rather not say.", "VERDICT: YES\nVERDICT: NO", "\ud800 yes, maybe"]
)
def test_an_answer_without_a_verdict_is_undecided_and_never_safe(text: str | None, tmp_path) -> None:
    queries, replies = pairs(1)
    with serving(lambda *_: Step(body=openai(text))) as server:
        judge = judge_at(server.url)
        (verdict,) = judge_all(judge, queries, replies, tmp_path / "v.jsonl")
        assert (verdict.outcome, verdict.score) == ("undecided", None)
        assert not (verdict.refused or verdict.complied or verdict.decided)
        judge_all(judge, queries, replies, tmp_path / "v.jsonl")
        assert len(server.requests) == 1, "stored"
        judge_all(judge, queries, replies, tmp_path / "v.jsonl", retry_undecided=True)
        assert len(server.requests) == 2


def test_requests_at_a_time_are_limited_and_used() -> None:
    queries, replies = pairs(12)
    with serving(lambda *_: Step(body=YES, wait=0.05)) as server:
        judge_all(judge_at(server.url, concurrency=4), queries, replies)
    assert server.busiest == 4


def test_cost_and_tokens_are_counted() -> None:
    queries, replies = pairs(4)
    with serving(lambda *_: Step(body=openai("VERDICT: YES", 1000, 50))) as server:
        judge = judge_at(server.url, input_price=2.0, output_price=8.0)
        judge_all(judge, queries, replies)
        assert judge.backend.usage.cost == pytest.approx((4000 * 2.0 + 200 * 8.0) / 1e6)
        assert (judge.backend.usage.input_tokens, judge.backend.usage.output_tokens) == (4000, 200)
        unpriced = judge_at(server.url)
        assert unpriced.backend.usage.cost is None
    no_usage = json.dumps({"choices": [{"message": {"content": "VERDICT: YES"}}]}).encode()
    with serving(lambda *_: Step(body=no_usage)) as server:
        assert judge_at(server.url).judge(queries[0], "x").input_tokens == 0


def test_the_key_is_in_no_output_exception_repr_log_or_file(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    queries, replies = pairs(3)

    def echo(number: int, _: object) -> Step:  # servers do send keys back: "incorrect API key provided: sk-..."
        return GOOD if number == 0 else Step(status=401, body=f"wrong key {KEY}".encode())

    seen = []
    for bad in (echo, lambda *_: Step(status=500, body=KEY.encode()), lambda *_: Step(drop=True)):
        with serving(bad) as server:
            judge = judge_at(server.url, concurrency=1)
            with pytest.raises(RunError) as caught:
                judge_all(judge, queries, replies, tmp_path / "v.jsonl")
        error: BaseException | None = caught.value
        while error is not None:
            seen += [repr(error), str(error), repr(vars(error)), "".join(traceback.format_exception(error))]
            error = error.__cause__ or error.__context__
        seen += [
            repr(judge),
            repr(judge.backend),
            repr(vars(judge.backend)),
            judge.identity,
            str(judge.backend.settings),
        ]
    seen += [record.getMessage() + repr(record.args) for record in caplog.records]
    seen += [path.read_text() for path in tmp_path.iterdir()]
    assert "[key]" in "".join(seen)
    assert not [text for text in seen if KEY in text]


def test_settings_that_cannot_work_are_refused_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-bad\nkey")
    with pytest.raises(InputError, match="OPENAI_API_KEY holds characters") as caught:
        HttpBackend(HttpSettings(model="m"))
    assert "sk-bad" not in str(caught.value)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(InputError, match="environment variable OPENAI_API_KEY"):
        HttpBackend(HttpSettings(model="m"))
    with pytest.raises(InputError, match="environment variable MY_KEY"):
        load_judge("yes-no", "openai", "m", key_env="MY_KEY")
    for url in (
        "ftp://host/v1",
        "sk-a-key-in-the-wrong-place",
        "https://me:secret@host/v1",
        "https://host/v1?key=secret",
    ):
        with pytest.raises(InputError, match="address") as caught:
            HttpBackend(HttpSettings(model="m", base_url=url))
        assert "secret" not in str(caught.value) and "sk-" not in str(caught.value)
    with pytest.raises(InputError, match="judge option timeout"):
        load_judge("yes-no", "openai", "m", timeout=0)


def test_a_compatible_server_of_ones_own_needs_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    queries, replies = pairs(1)
    with serving(lambda *_: GOOD) as server:
        judge = judge_at(server.url, temperature=None, body={"max_tokens": None, "max_completion_tokens": 9})
        judge_all(judge, queries, replies)
    assert "authorization" not in server.requests[0][1]
    assert set(server.requests[0][2]) == {"model", "messages", "max_completion_tokens"}


def _dripping(
    piece: bytes, head: bytes = b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n"
) -> Callable[[socket.socket], None]:
    """What a server does that sends `head`, and then `piece` again and again, a little while apart."""

    def answer(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(piece)
            time.sleep(0.05)

    return answer


@contextmanager
def raw_server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of a server that reads a request and then does as `answer` says with the connection."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    def talk(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.recv(65_536)
            answer(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "answer",
    [_dripping(b" "), _dripping(b"x", b"HTTP/1.1 200 OK\r\nx-drip: "), lambda _: time.sleep(30)],
    ids=["body", "headers", "nothing"],
)
def test_the_time_limit_holds_for_the_whole_answer(answer: Callable[[socket.socket], None]) -> None:
    queries, replies = pairs(2)
    began = time.monotonic()
    with raw_server(answer) as url, pytest.raises(RunError, match=r"does not answer in full within 0.5 s, 2 times"):
        judge_all(judge_at(url, timeout=0.5, tries=2), queries, replies)
    assert time.monotonic() - began < 4


def test_an_answer_of_gigabytes_is_not_taken_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASA_MECH_MAX_ANSWER_BYTES", "200000")
    queries, replies = pairs(1)
    sent = []

    def endless(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 3000000000\r\n\r\n")
        while True:
            sent.append(connection.send(b"x" * 65_536))

    with raw_server(endless) as url, pytest.raises(RunError, match="answers more than 200,000 bytes") as caught:
        judge_all(judge_at(url, tries=1), queries, replies)
    assert "CASA_MECH_MAX_ANSWER_BYTES" in str(caught.value) and sum(sent) < 50_000_000
    bomb = gzip.compress(b" " * 5_000_000)
    with (
        serving(lambda *_: Step(body=bomb, headers={"content-encoding": "gzip"})) as server,
        pytest.raises(RunError, match="answers more than 200,000 bytes"),
    ):
        judge_all(judge_at(server.url, tries=1), queries, replies)


def test_json_that_is_nested_deep_is_no_traceback() -> None:
    queries, replies = pairs(1)
    with (
        serving(lambda *_: Step(body=b"[" * 100_000)) as server,
        pytest.raises(RunError, match="answers something that is not JSON"),
    ):
        judge_all(judge_at(server.url, tries=1), queries, replies)


def test_an_interruption_is_obeyed_at_once_and_keeps_what_is_finished(tmp_path) -> None:
    queries, replies = pairs(4)
    store = tmp_path / "verdicts.jsonl"
    main = threading.get_ident()

    def interrupt() -> None:
        while not store.exists():
            time.sleep(0.01)
        time.sleep(0.3)
        signal.pthread_kill(main, signal.SIGINT)
        times.append(time.monotonic())

    times: list[float] = []
    threading.Thread(target=interrupt, daemon=True).start()
    with (
        serving(lambda number, _: Step(body=YES, wait=0.0 if number == 0 else 20.0)) as server,
        pytest.raises(KeyboardInterrupt),
    ):
        judge_all(judge_at(server.url, timeout=60, concurrency=2), queries, replies, store)
        pytest.fail("it was not interrupted")
    assert time.monotonic() - times[0] < 1.5
    assert len(VerdictStore(store)) == 1
