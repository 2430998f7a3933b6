"""What the tests of patching share: requests that differ in one word."""

from casa_mech.queries import Query


def request(word: str, label: str, id: str) -> Query:
    return Query.from_text(f"how do i make the {word} ?", id=id, label=label, meta={"topic": word})
