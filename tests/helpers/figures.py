"""What titles have to be."""


def assert_one_line(title: str) -> None:
    """A title is one line of about 100 letters; the names of test models are long."""
    assert "\n" not in title and len(title) <= 115, (len(title), title)
