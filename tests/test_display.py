"""HTML for notebooks: what a prompt says is shown and never run, media are bounded, plain text stays plain."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
import wave
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.page import ATTACK, Page, shown
from PIL import Image

from casa_mech.display import (
    LETTERS,
    PIXELS,
    ROWS,
    SECONDS,
    TOKENS,
    Html,
    clip_html,
    html,
    picture_html,
    table_html,
    text_html,
    tokens_html,
)
from casa_mech.queries import AudioPart, ImagePart, Query, Reply, TextPart, Turn
from casa_mech.queries.html import MEDIA


def content_of(uri: str | None) -> io.BytesIO:
    assert uri is not None
    return io.BytesIO(base64.b64decode(uri.partition(",")[2]))


def test_values_are_escaped_once_and_html_is_not_escaped_again() -> None:
    inner = text_html(ATTACK)
    assert Page(inner).text.strip() == ATTACK
    assert isinstance(inner, Html) and inner._repr_html_() == inner
    outer = html("table", table=inner, caption=ATTACK, left=0)
    page = Page(outer)
    page.assert_harmless()
    assert page.text.count(ATTACK) == 2 and "49" not in page.text


def test_colours_are_the_pages_own() -> None:
    """No opaque colour of text or ground but in the tints: what is readable on light is readable on dark."""
    parts = [
        text_html("a"),
        tokens_html(["a", "b"], [0.2, 0.8]),
        picture_html(Image.new("RGB", (9, 9)), np.ones((1, 1))),
        clip_html(np.ones(99), 16_000, np.ones(3)),
        Reply(query_id="q", text="a", safety_token="unsafe", v_s=0.5)._repr_html_(),
    ]
    for part in parts:
        for style in re.findall(r'style="([^"]*)"', part):
            assert not re.search(r"(?<![-\w])color\s*:|background(-color)?:(?!rgba|currentColor)|#[0-9a-f]{3}", style)
        assert set(re.findall(r'(?:stroke|fill)="([^"]*)"', part)) <= {"currentColor", "none", "rgb(213,94,0)"}


def test_a_long_text_and_table_and_prompt_say_what_is_left_out() -> None:
    page = Page(text_html("x" * (LETTERS + 7)))
    assert page.text.count("x") == LETTERS and "7 more letters" in page.text
    frame = pd.DataFrame({"<b>name</b>": [f"<i>{row}</i>" for row in range(ROWS + 3)]})
    page = Page(table_html(frame, "numbers"))
    assert "<i>0</i>" in page.text and "<b>name</b>" in page.text and f"<i>{ROWS}</i>" not in page.text
    assert "3 more rows" in page.text and not page.named("b")
    page = Page(tokens_html(["a"] * (TOKENS + 5), [1 / (TOKENS + 5)] * (TOKENS + 5)))
    assert len(page.named("span")) == TOKENS + 1 and "5 more tokens" in page.text


def test_tints_go_with_the_weights() -> None:
    spans = Page(tokens_html(["no", "half", "\n"], [0.0, 0.25, 0.5])).named("span")
    tints = [float(re.search(r"213,94,0,([\d.]+)", span["style"] or "")[1]) for span in spans]  # type: ignore[index]
    assert tints == [0.0, pytest.approx(0.425), pytest.approx(0.85)]
    assert [span["title"] for span in spans] == ["0.0 %", "25.0 %", "50.0 %"]
    overlay = Page(picture_html(Image.new("RGB", (60, 30)), np.array([[0.0, 0.1, 0.2]]))).named("img")[1]
    tint = np.asarray(Image.open(content_of(overlay["src"])))
    assert tint.shape == (1, 3, 4) and tint[0, :, 3].tolist() == [0, 95, 190]
    bars = Page(clip_html(np.ones(100), 100, np.array([0.0, 2.0, 1.0, 1.0]))).named("rect")
    assert [float(bar["fill-opacity"] or 0) for bar in bars] == [0, 0.75, 0.375, 0.375]
    assert [float(bar["x"] or 0) for bar in bars] == [0, 150, 300, 450]


def test_pictures_and_clips_are_bounded() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (900, 3000, 3), dtype=np.uint8)
    page = Page(picture_html(Image.fromarray(noise)))
    picture = Image.open(content_of(page.named("img")[0]["src"]))
    assert picture.size == (PIXELS, 108) and "3000 × 900 pixels" in page.text
    page = Page(clip_html(0.1 * np.ones(40 * 8000), 8000))
    with wave.open(content_of(page.named("audio")[0]["src"])) as clip:
        assert (clip.getnframes(), clip.getframerate(), clip.getnchannels()) == (int(8000 * SECONDS), 8000, 1)
    assert "the first 15 of 40.0 s" in page.text


def test_a_query_shows_its_conversation_by_role(mixed_queries: list[Query]) -> None:
    page = shown(mixed_queries[3])
    (image,), (audio,) = page.named("img"), page.named("audio")
    assert np.asarray(Image.open(content_of(image["src"]))).shape == (28, 84, 3)
    with wave.open(content_of(audio["src"])) as clip:
        assert clip.getnframes() == 9000
    turns = (
        Turn(role="user", parts=(TextPart(text="first"),)),
        Turn(role="assistant", parts=(TextPart(text="second"),), safety_token="safe"),
    )
    query = Query.from_text("third", id="talk", system="be kind", history=turns, prefill="sure ,", label="benign")
    said = "system be kind user first assistant safe second user third prefill sure ,"
    assert shown(query).words == f"talk · benign · user · text {said}"


def test_of_many_media_the_first_are_shown(mixed_queries: list[Query]) -> None:
    picture = mixed_queries[1].parts[0]
    page = shown(Query(id="album", parts=(picture,) * (MEDIA + 2)))
    assert len(page.named("img")) == MEDIA and page.text.count("one more medium (image)") == 2


def test_a_prompt_that_holds_a_script_is_shown() -> None:
    meta = {"attack": f"{ATTACK} 3"}
    query = Query.from_text(ATTACK, id=f"{ATTACK} 1", source=f"{ATTACK} 2", system=ATTACK, prefill=ATTACK, meta=meta)
    assert shown(query).text.count(ATTACK) == 6
    reply = Reply(query_id=ATTACK, text=ATTACK, safety_token="unsafe", v_s=0.9)
    assert shown(reply).text.count(ATTACK) == 2


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_a_medium_that_cannot_be_read_is_a_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "<b>not media.png"
    path.write_text("no medium")
    part = ImagePart(image=path) if kind == "image" else AudioPart(audio=path)
    page = shown(Query(id="q", parts=(part, TextPart(text="what is it ?"))))
    assert "<b>not media.png is not" in page.text and "what is it ?" in page.text


def test_a_reply_shows_what_the_gate_decided_and_whether_it_refuses() -> None:
    logits = {"raw_logit_safe": -1.0, "raw_logit_unsafe": 2.0, "logit_safe": -1.0, "logit_unsafe": 7.5}
    text = "sorry, i can not help with that ."
    page = shown(Reply(query_id="q7", text=text, safety_token="unsafe", v_s=0.934, tokens=9, **logits))
    assert "unsafe" in page.text and "v_s 0.93" in page.text and text in page.text and "q7" in page.text
    assert "-1.0 and 2.0 of the language model, -1.0 and 7.5 behind the gate" in page.text
    assert "refuses by its words: “sorry”" in page.text
    plain = shown(Reply(query_id="q7", text="sure, first mix it ."))
    assert "v_s" not in plain.text and "logits" not in plain.text and "no words of a refusal" in plain.text


def test_records_stay_plain_text_elsewhere(mixed_queries: list[Query]) -> None:
    reply = Reply(query_id="q", text="sure", safety_token="safe", v_s=0.1)
    for record in (*mixed_queries, reply):
        assert "data:" not in repr(record) and "<div" not in repr(record)


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium")
def test_nothing_runs_in_a_browser(tmp_path: Path) -> None:
    bait = """<script>document.title = "run"</script><img src=x onerror='document.title = "run"'>"""
    records = [Query.from_text(bait, id=bait), Reply(query_id=bait, text=bait)]
    shown_html = "".join(record._repr_html_() for record in records)
    titles = {}
    for name, body in (("shown", shown_html), ("bare", bait)):
        page = tmp_path / f"{name}.html"
        page.write_text(f"<!doctype html><meta charset=utf-8><title>quiet</title><body>{body}", encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom"]
        done = subprocess.run([str(BROWSER), *options, page.as_uri()], capture_output=True, text=True, timeout=120)
        titles[name] = re.search("<title>(.*?)</title>", done.stdout)[1]  # type: ignore[index]
    assert titles == {"shown": "quiet", "bare": "run"}
