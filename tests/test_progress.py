"""Bars are shown where a person watches, and on request."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest

from casa_mech.progress import is_watched, progress_bar


@pytest.fixture(autouse=True)
def no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", None)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)


def terminal(monkeypatch: pytest.MonkeyPatch, is_one: bool) -> io.StringIO:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: is_one, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_a_terminal_and_a_kernel_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal(monkeypatch, False)
    assert not is_watched() and progress_bar(3, "work").disable
    kernel = SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setitem(sys.modules, "IPython", kernel)
    assert is_watched()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert not is_watched()
    terminal(monkeypatch, True)
    assert is_watched() and not progress_bar(3, "work").disable
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert not is_watched()


def test_what_was_asked_for_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = terminal(monkeypatch, False)
    with progress_bar(2, "collect", True) as bar:
        bar.update(2)
    assert "collect: 100%" in stream.getvalue()
    terminal(monkeypatch, True)
    assert progress_bar(2, "collect", False).disable


def test_quick_work_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = terminal(monkeypatch, True)
    with progress_bar(2, "collect") as bar:
        bar.update(2)
    assert "collect" not in stream.getvalue()
