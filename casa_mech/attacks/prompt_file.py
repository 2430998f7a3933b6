"""The published wording of an attack's text, from a user's file: it is not ours to ship, and our own is not it."""

from __future__ import annotations

from pathlib import Path

from casa_mech.errors import InputError
from casa_mech.identity import digest_of

QUESTION, LETTERS = "{question}", "{letters}"
PROMPT_SLOTS = {
    "figstep": (),
    "figstep-text": (),
    "aiah-letters": (QUESTION, LETTERS),
    "aiah-word": (QUESTION,),
    "aiah-speech": (QUESTION,),
}
"""The attacks whose text can come from a file, with what it has to hold: `{question}` is the question with [word] for
its key word, `{letters}` the key word's letters. FigStep's text stands beside its picture as it is."""
OWN = "own"
"""The wording of a query whose text is the package's."""


def read_prompt(path: Path | str, attack: str) -> str:
    """The text of a file, for `attack`.

    Raises:
        InputError: an attack without a published text, no such file, not text, or one without a slot that it needs.
    """
    if attack not in PROMPT_SLOTS:
        raise InputError(f"--prompt-file is for {', '.join(PROMPT_SLOTS)}; leave it out for {attack}")
    if not Path(path).is_file():  # a pipe would be waited for
        raise InputError(f"no file with a text at {path}; check --prompt-file")
    try:
        text = Path(path).read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise InputError(f"{path} cannot be read as UTF-8 text ({reason}); check --prompt-file") from None
    missing = next((slot for slot in PROMPT_SLOTS[attack] if text.count(slot) != 1), None)
    if missing is not None or not text:
        needed = f"must hold {missing} exactly once" if missing else "is empty"
        raise InputError(f"{path}: the text of {attack} {needed}; write the published wording into it")
    return text


def wording_mark(prompt: str | None) -> str:
    """`Query.meta["prompt_wording"]`: "own", or "file" with the first letters of its text's digest."""
    return OWN if prompt is None else f"file {digest_of([prompt])[:12]}"
