"""Every Python and shell block of the README and the docs runs, in the order of its page and in a folder of its own.

A comment above a block takes it out of that: of `<!-- hub -->` and `<!-- gpu -->` blocks the imports run alone,
`<!-- parsed only: WHY -->` shell blocks are parsed by the command line.
"""

import ast
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from helpers.paths import ROOT

from casa_mech.cli import main
from casa_mech.cli.app import app
from casa_mech.plan.records import StudyPlan, parsed

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(
    r"(?:<!-- (?P<mark>[^>]*?) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
SHORTER = ((r"max_steps=\d+", "max_steps=2"), (r"training_examples\(\d+", "training_examples(64"))
"""What makes a block quick: fewer steps and examples than a reader would take."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    code: str
    mark: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The page's blocks of Python and shell, in their order."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(match["language"], match["code"], match["mark"] or "", text.count("\n", 0, match.start("code")) + 1)
        for match in _BLOCK.finditer(text)
    ]
    for block in found:
        if block.language == "yaml":  # study plans alone
            parsed(block.code, f"{page}:{block.line}", page.parent, StudyPlan)
    unknown = [block for block in found if block.language not in ("python", "sh", "text", "yaml")]
    assert not unknown, f"{page}:{unknown[0].line}: a block of {unknown[0].language}, which no test runs"
    return [block for block in found if block.language not in ("text", "yaml")]


def commands(code: str) -> list[list[str]]:
    """The words of each command, comments left out."""
    return [words for line in code.replace("\\\n", " ").splitlines() if (words := shlex.split(line, comments=True))]


def parse_command(arguments: list[str]) -> None:
    """Raises what the command line raises for arguments that it does not take; runs nothing."""
    command, rest = typer.main.get_command(app), list(arguments)
    while rest and hasattr(command, "commands"):
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_context(" ".join(arguments[: len(arguments) - len(rest)]), rest)


def run_command(words: list[str], mark: str) -> None:
    """Run, or parse, one command of a shell block."""
    program, *arguments = words
    if program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert arguments[0] in targets
    elif program == "casa-mech" and mark.startswith("parsed only"):
        parse_command(arguments)
    elif program == "casa-mech":
        main(arguments)
    else:
        assert mark.startswith("parsed only") and program in ("git", "pip", "pipx", "python"), f"{words}: not run"


def run_python(block: Block, page: Path, names: dict[str, object]) -> None:
    """Run a block among `names`, or make its imports only."""
    code = block.code
    for pattern, shorter in SHORTER:
        code = re.sub(pattern, shorter, code)
    tree = ast.parse(code)
    if block.mark in ("hub", "gpu"):
        tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    ast.increment_lineno(tree, block.line - 1)
    exec(compile(tree, str(page), "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CASA_MECH_DATA", raising=False)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python":
            run_python(block, page, names)
            continue
        for words in commands(block.code):
            try:
                run_command(words, block.mark)
            except SystemExit as end:
                assert not end.code, f"{page.name}:{block.line}: {shlex.join(words)}"


def test_a_wrong_option_is_seen() -> None:
    with pytest.raises(Exception, match="--no-such-option"):
        parse_command(["evaluate", "--queries", "a.csv", "--no-such-option"])
    with pytest.raises(Exception, match="Missing parameter: queries"):
        parse_command(["evaluate", "--column", "goal"])


def test_the_readme_is_short_and_links_to_what_is_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    links = [link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]
    missing = [link for link in links if not (ROOT / link).exists()]
    assert links and not missing
