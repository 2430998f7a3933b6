"""Judging models behind HTTP: OpenAI-compatible chat completions and Anthropic messages.

The key is read from the environment when a request is made. It is in no field, message, log line or file: errors are
worded here from what is known to be harmless, and no exception of the HTTP client (which holds the request) is chained.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from casa_mech.errors import InputError
from casa_mech.judging.dialects import DIALECTS, Dialect, WrongShape
from casa_mech.judging.rubric_judge import Completion
from casa_mech.judging.verdict import Judge, JudgeDown
from casa_mech.limits import ANSWER_BYTES

if TYPE_CHECKING:
    import httpx
    import tenacity

_RETRIED = {408, 409, 425, 429}
_REJECTED = {400, 413, 422}
_POLL = 0.1
"""Seconds after which a request that is under way looks whether it is still wanted."""
_FEW = 3
"""So many rejected requests before the first answer mean that all will be rejected."""


class HttpSettings(BaseModel):
    """A judging model behind HTTP, and how requests are sent to it."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    dialect: Literal["openai", "anthropic"] = "openai"
    """The API's form (`dialects.DIALECTS`)."""
    model: str = Field(min_length=1)
    """The API's name of the judging model."""
    base_url: str = ""
    """Address up to the version, https://host/v1; empty: the vendor's own."""
    key_env: str = ""
    """Environment variable that holds the key; empty: the dialect's usual one."""
    timeout: float = Field(60.0, gt=0, allow_inf_nan=False)
    """Seconds in which the whole answer has to be there; a request that takes longer is given up."""
    tries: int = Field(6, ge=1)
    """Requests for one reply before the judge counts as down."""
    first_wait: float = Field(1.0, ge=0)
    """Seconds before the second try; doubles from try to try."""
    longest_wait: float = Field(120.0, ge=0)
    """Most seconds between tries, also where the server says more."""
    concurrency: int = Field(4, ge=1)
    """Requests at a time."""
    temperature: float | None = Field(0.0, ge=0)
    """None: not sent, for models that take none."""
    body: Mapping[str, Any] = Field(default_factory=dict)
    """Further fields of each request; null drops one."""
    input_price: float | None = Field(None, ge=0)
    """US dollars for a million input tokens."""
    output_price: float | None = Field(None, ge=0)
    """US dollars for a million output tokens."""


@dataclass(frozen=True)
class Usage:
    """Requests, tokens and cost of a judge in this process."""

    requests: int
    """All requests, retries included."""
    retries: int
    """Requests that failed and were sent again, or given up."""
    input_tokens: int
    """Tokens read by the judging model."""
    output_tokens: int
    """Tokens written by it."""
    cost: float | None
    """US dollars; None without prices."""


class HttpBackend:
    """A judging model behind HTTP, as a `Backend`.

    Raises:
        InputError: an address that is no HTTP address or holds a password or a query, or a key that is missing (for the
            vendor's own address) or holds characters that no header can hold.
    """

    def __init__(self, settings: HttpSettings) -> None:
        self.settings = settings
        self._dialect: Dialect = DIALECTS[settings.dialect]
        self._url = _checked_url(settings.base_url or self._dialect.base_url) + self._dialect.path
        self.name = settings.model
        self._lock = threading.Lock()
        self._requests = self._retries = self._input = self._output = self._answers = self._rejections = 0
        self._rest_until = 0.0
        self._key()

    def __repr__(self) -> str:
        return f"HttpBackend({self.settings.dialect}, {self.settings.model}, {self._url})"

    @property
    def identity(self) -> str:
        """Address and name of the model, and the options of each request."""
        options = [self.settings.temperature, dict(self.settings.body)]
        return f"{self._url}#{self.settings.model}:{json.dumps(options, sort_keys=True)}"

    @property
    def usage(self) -> Usage:
        """Requests, tokens and cost of this process."""
        settings = self.settings
        cost = None
        if settings.input_price is not None and settings.output_price is not None:
            cost = (self._input * settings.input_price + self._output * settings.output_price) / 1e6
        return Usage(self._requests, self._retries, self._input, self._output, cost)

    def complete(self, prompts: Sequence[str], max_tokens: int) -> Iterator[tuple[int, Completion]]:
        """(place in `prompts`, answer) as they are finished; `JudgeDown` after those under way have ended."""
        import httpx

        key, stop, leave = self._key(), threading.Event(), threading.Event()
        # No bound on connections: one that was given up may stay open for a while, and new ones must not wait for it.
        limits = httpx.Limits(max_connections=None)
        timeout = httpx.Timeout(self.settings.timeout)
        down: JudgeDown | None = None
        with (
            httpx.Client(headers=self._dialect.headers(key), timeout=timeout, limits=limits) as client,
            ThreadPoolExecutor(self.settings.concurrency, thread_name_prefix="judge") as pool,
        ):
            call = _Call(self, client, key, stop, leave, max_tokens)
            running: dict[Future[Completion], int] = {}
            waiting = iter(enumerate(prompts))
            try:
                while True:
                    # Never more than are under way: when the judge is down, nothing lies in a queue.
                    while not down and len(running) < self.settings.concurrency and (entry := next(waiting, None)):
                        running[pool.submit(call.answer, entry[1])] = entry[0]
                    if not running:
                        break
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        place, error = running.pop(future), future.exception()
                        if isinstance(error, JudgeDown):
                            down = down or error
                            stop.set()
                        elif error is not None:
                            raise error
                        else:
                            yield place, future.result()
            finally:
                stop.set()
                leave.set()
        if down:
            raise down

    def _key(self) -> str:
        name = self.settings.key_env or self._dialect.key_env
        key = os.environ.get(name, "").strip()
        if not key and not self.settings.base_url:
            raise InputError(f"the judge {self.name} needs a key: put it into the environment variable {name}")
        if not (key.isascii() and key.isprintable()):
            raise InputError(f"the key in {name} holds characters that no key has: set the variable again")
        return key

    def _count(self, *, retries: int = 0, answer: Completion | None = None) -> None:
        with self._lock:
            self._requests += 1
            self._retries += retries
            if answer is not None:
                self._answers += 1
                self._input += answer.input_tokens
                self._output += answer.output_tokens

    def _rejected(self) -> bool:
        """Note a rejected request; whether by now all of them seem to be."""
        with self._lock:
            self._rejections += 1
            return not self._answers and self._rejections >= _FEW


class _Retry(Exception):
    """A failure that may pass. `seconds`: until when the server puts it off."""

    def __init__(self, problem: str, seconds: float = 0.0) -> None:
        super().__init__(problem)
        self.seconds = seconds


@dataclass(frozen=True)
class _Answer:
    """What came back from the server."""

    status: int = 0
    retry_after: str = ""
    content: bytes = b""
    problem: str = ""
    """Why nothing that can be used came back; "" where something did."""


@dataclass(frozen=True, repr=False)
class _Call:
    """One run over a list of prompts: the client, the key for redaction, the sign to try no more, and the sign to leave
    also what is under way."""

    backend: HttpBackend
    client: httpx.Client
    key: str
    stop: threading.Event
    leave: threading.Event
    max_tokens: int

    def answer(self, prompt: str) -> Completion:
        """The model's answer, after as many tries as it takes. JudgeDown when they do not help."""
        import tenacity

        settings = self.backend.settings
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Retry),
            stop=tenacity.stop_any(
                tenacity.stop_after_attempt(settings.tries), tenacity.stop_when_event_set(self.stop)
            ),
            wait=self._wait,
            sleep=tenacity.sleep_using_event(self.stop),
        )
        down = ""
        try:
            return retrying(self._ask, prompt)
        except tenacity.RetryError as error:
            tries = error.last_attempt.attempt_number
            down = f"{error.last_attempt.exception()}, {tries} {'times' if tries > 1 else 'time'}"
        # Outside the except block, so that nothing of the HTTP client hangs on to the exception as its context.
        raise self._down(down)

    def _wait(self, state: tenacity.RetryCallState) -> float:
        import tenacity

        settings = self.backend.settings
        error = state.outcome.exception() if state.outcome else None
        wanted = error.seconds if isinstance(error, _Retry) else 0.0
        backoff = tenacity.wait_exponential_jitter(
            multiplier=settings.first_wait, max=settings.longest_wait, jitter=settings.first_wait / 2
        )(state)
        with self.backend._lock:
            self.backend._rest_until = max(self.backend._rest_until, time.monotonic() + wanted)
        return max(wanted, float(backoff))

    def _ask(self, prompt: str) -> Completion:
        # A server that puts one request off means all of them.
        self.stop.wait(max(0.0, self.backend._rest_until - time.monotonic()))
        response = self._send(prompt)
        if response.problem:
            self.backend._count(retries=1)
            raise _Retry(response.problem)
        status = response.status
        if status in _RETRIED or status >= 500:
            self.backend._count(retries=1)
            raise self._come_back(response)
        if status in _REJECTED and not self.backend._rejected():
            self.backend._count()
            return Completion("", problem=f"the judge rejected the request: {self._said(response)}")
        if status != 200:
            self.backend._count()
            raise self._down(f"answers {self._said(response)}")
        answer = self._read(response)
        self.backend._count(answer=answer)
        return answer

    def _send(self, prompt: str) -> _Answer:
        """The server's answer, or why there is none; never later than the time limit and hardly after `leave`.

        A thread of its own reads it, as a read cannot be interrupted: one that drips bytes, or never comes, is left
        behind (and ends with its next byte).
        """
        timeout = self.backend.settings.timeout
        answer: Future[_Answer] = Future()
        given_up = threading.Event()

        def read() -> None:
            try:
                answer.set_result(self._exchange(prompt, given_up))
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=read, name="judge-answer", daemon=True).start()
        until = time.monotonic() + timeout
        while not wait([answer], min(_POLL, max(0.0, until - time.monotonic()))).done:
            if self.leave.is_set() or time.monotonic() >= until:
                given_up.set()
                return _Answer(problem=f"does not answer in full within {timeout:g} s")
        return answer.result()

    def _exchange(self, prompt: str, given_up: threading.Event) -> _Answer:
        import httpx

        content, most = bytearray(), ANSWER_BYTES.value
        try:
            with self.client.stream("POST", self.backend._url, json=self._body(prompt)) as response:
                for piece in response.iter_bytes():
                    content += piece
                    if given_up.is_set():
                        break
                    if len(content) > most:
                        problem = f"answers more than {most:,.0f} bytes ({ANSWER_BYTES.way_out})"
                        return _Answer(problem=problem)
                return _Answer(response.status_code, response.headers.get("retry-after", ""), bytes(content))
        except httpx.TimeoutException:
            return _Answer(problem=f"does not answer in full within {self.backend.settings.timeout:g} s")
        except (httpx.RequestError, RuntimeError) as error:
            # Connection refused, reset, cut off in the middle, undecodable (or the client closed behind a request that
            # was given up): named by kind, the text is not ours.
            return _Answer(problem=f"cannot be reached or breaks off ({type(error).__name__})")

    def _body(self, prompt: str) -> dict[str, Any]:
        settings = self.backend.settings
        body = {
            "model": settings.model,
            "messages": [{"role": "user", "content": _encodable(prompt)}],
            "max_tokens": self.max_tokens,
            "temperature": settings.temperature,
            **settings.body,
        }
        return {name: value for name, value in body.items() if value is not None}

    def _read(self, response: _Answer) -> Completion:
        problem = ""
        try:
            text, input_tokens, output_tokens = self.backend._dialect.read(json.loads(response.content))
            return Completion(_encodable(text), input_tokens, output_tokens)
        except WrongShape as error:
            problem = f"answers JSON without {error}"
        except (ValueError, RecursionError):
            problem = "answers something that is not JSON"
        self.backend._count(retries=1)
        raise _Retry(problem)

    def _come_back(self, response: _Answer) -> Exception:
        seconds = _retry_after(response.retry_after)
        if seconds > self.backend.settings.longest_wait:
            return self._down(f"asks to come back in {seconds:.0f} s ({self._said(response)})")
        return _Retry(f"answers {self._said(response)}", seconds)

    def _down(self, problem: str) -> JudgeDown:
        return JudgeDown(f"the judge {self.backend.name} at {self.backend._url} {problem}")

    def _said(self, response: _Answer) -> str:
        """Status and the beginning of the body, with the key blotted out should the server send it back."""
        text = response.content.decode("utf-8", "replace")
        text = text.replace(self.key, "[key]") if self.key else text
        return f"HTTP {response.status} {' '.join(text.split())[:200]}".strip()


def _encodable(text: str) -> str:
    """`text` without lone surrogates, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _retry_after(value: str) -> float:
    """Seconds from a Retry-After header: a number or a date; 0 where there is none or it cannot be read."""
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _checked_url(url: str) -> str:
    import httpx

    way_out = "give an address like https://host/v1, and the key in the environment"
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        raise InputError(f"the judge's address cannot be read: {way_out}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        # Not repeated: it may be a key that was put into the wrong option.
        raise InputError(f"the judge's address is no HTTP address: {way_out}")
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise InputError(f"the judge's address for {parsed.host} holds a password, query or fragment: {way_out}")
    return url.rstrip("/")


def requests_of(judge: Judge) -> dict[str, Any]:
    """Requests, retries and dollars of a judge over HTTP in this process; empty for one of another kind."""
    backend = getattr(judge, "backend", None)
    if not isinstance(backend, HttpBackend):
        return {}
    usage = backend.usage
    return {"requests": usage.requests, "retries": usage.retries, "cost_dollars": usage.cost}
