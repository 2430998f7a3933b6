"""The two HTTP dialects of judging models: address, headers, and where the answer is.

Mirrors the public references of OpenAI's chat completions and Anthropic's messages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


class WrongShape(Exception):
    """JSON that is not of the dialect; says what is missing."""


@dataclass(frozen=True)
class Dialect:
    """One API's form."""

    base_url: str
    """The vendor's own address."""
    path: str
    """Of the endpoint, after the base."""
    key_env: str
    """The environment variable in which the key usually is."""
    headers: Callable[[str], dict[str, str]]
    """From the key to the headers of a request."""
    read: Callable[[Any], tuple[str, int, int]]
    """(text, input tokens, output tokens) from the decoded body; `WrongShape` where there is no answer in it."""


def _openai_headers(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}


def _openai_answer(body: Any) -> tuple[str, int, int]:
    try:
        message = body["choices"][0]["message"]
        # A refused or filtered answer has content null: an answer without a verdict, not a broken server.
        text = message["content"] if message["content"] is not None else ""
    except (KeyError, IndexError, TypeError):
        raise WrongShape("choices[0].message.content") from None
    if not isinstance(text, str):
        raise WrongShape("text in choices[0].message.content")
    return text, _tokens(body, "prompt_tokens"), _tokens(body, "completion_tokens")


def _anthropic_headers(key: str) -> dict[str, str]:
    return {"anthropic-version": "2023-06-01", **({"x-api-key": key} if key else {})}


def _anthropic_answer(body: Any) -> tuple[str, int, int]:
    try:
        blocks = body["content"]
        text = "".join(block["text"] for block in blocks if block["type"] == "text")
    except (KeyError, TypeError):
        raise WrongShape("content[].text") from None
    return text, _tokens(body, "input_tokens"), _tokens(body, "output_tokens")


def _tokens(body: Any, name: str) -> int:
    """A count from `usage`; 0 where the server gives none, as some compatible ones do."""
    usage = body.get("usage") if isinstance(body, dict) else None
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and count >= 0 else 0


DIALECTS: Mapping[str, Dialect] = MappingProxyType(
    {
        "openai": Dialect(
            "https://api.openai.com/v1", "/chat/completions", "OPENAI_API_KEY", _openai_headers, _openai_answer
        ),
        "anthropic": Dialect(
            "https://api.anthropic.com/v1", "/messages", "ANTHROPIC_API_KEY", _anthropic_headers, _anthropic_answer
        ),
    }
)
