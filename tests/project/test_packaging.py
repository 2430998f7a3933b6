"""The set-up files agree with each other and with what the packages import; importing `casa_mech` is light."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from helpers.paths import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import casa_mech
from casa_mech.errors import EXTRAS as EXTRA_OF

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
MODULES = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn"}
"""Modules of other names than their distributions."""


def _pins(lines: list[str]) -> dict[str, str]:
    pairs = (line.strip().split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.fixture(scope="module")
def requirements() -> list[Requirement]:
    lines = PROJECT["dependencies"] + [line for extra in EXTRAS.values() for line in extra]
    return [Requirement(line) for line in lines if not line.startswith("casa-mech[")]


@pytest.fixture(scope="module")
def constraints() -> dict[str, str]:
    return _pins((ROOT / "constraints.txt").read_text().splitlines())


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    content = yaml.safe_load((ROOT / "environment.yml").read_text())
    (pip,) = (entry["pip"] for entry in content["dependencies"] if isinstance(entry, dict))
    return _pins(pip)


def test_every_constraint_is_a_plain_pin() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    odd = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)]
    assert not odd, f"not a plain name==version: {odd}"


def test_constraints_satisfy_pyproject(requirements: list[Requirement], constraints: dict[str, str]) -> None:
    for requirement in requirements:
        version = constraints[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} does not admit {version}"


def test_environment_lists_the_direct_dependencies_at_the_pinned_versions(
    requirements: list[Requirement], constraints: dict[str, str], environment: dict[str, str]
) -> None:
    direct = {canonicalize_name(requirement.name) for requirement in requirements}
    assert set(environment) == direct
    assert environment == {name: constraints[name] for name in direct}


def test_makefile_installs_the_pinned_torch_first(constraints: dict[str, str]) -> None:
    assert f"TORCH := torch=={constraints['torch']}" in (ROOT / "Makefile").read_text()


def test_make_and_all_install_every_extra() -> None:
    assert "--editable '.[all]'" in (ROOT / "Makefile").read_text()
    named = {name for line in EXTRAS["all"] + EXTRAS["study"] for name in Requirement(line).extras}
    assert set(EXTRAS) - {"all"} == named


def test_cited_version_is_the_packages() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == casa_mech.__version__


def test_nothing_of_ours_runs_when_somebody_imports_torch() -> None:
    assert set(PROJECT["entry-points"]) == {"transformer_lens.architectures"}


def _imported(tree: ast.AST) -> set[str]:
    """Top-level names of what a file imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"casa_mech", "probes"}


def _distributions(lines: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in lines}


def test_each_import_has_its_dependency_and_each_dependency_its_import(requirements: list[Requirement]) -> None:
    files = [path for package in ("casa_mech", "probes") for path in (ROOT / package).rglob("*.py")]
    modules = {name for path in files for name in _imported(ast.parse(path.read_text(encoding="utf-8")))}
    imported = {canonicalize_name(MODULES.get(name, name)) for name in modules}
    assert imported <= {canonicalize_name(requirement.name) for requirement in requirements}
    assert _distributions(PROJECT["dependencies"]) <= imported, "a core dependency that nothing imports"


EXTRA_ONLY = {
    "study": (
        "casa_mech/reports",
        "casa_mech/study",
        "casa_mech/audit",
        "casa_mech/figures.py",
        "probes/gate/plots.py",
        "probes/linear/plots.py",
    ),
    "lens": ("probes/lens",),
    "judges": ("casa_mech/judging",),
    "hub": ("casa_mech/queries",),
}


@pytest.mark.parametrize("extra", EXTRA_ONLY)
def test_the_core_does_not_import_what_an_extra_brings(extra: str) -> None:
    brought = _distributions([line for line in EXTRAS[extra] if not line.startswith("casa-mech[")])
    for package in ("casa_mech", "probes"):
        for path in (ROOT / package).rglob("*.py"):
            names = {canonicalize_name(name) for name in _imported(ast.parse(path.read_text(encoding="utf-8")))}
            where = path.relative_to(ROOT).as_posix()
            assert not names & brought or where.startswith(EXTRA_ONLY[extra]), f"{where}: {names & brought}"


def test_errors_name_the_extra_that_brings_a_module() -> None:
    for module, extra in EXTRA_OF.items():
        assert canonicalize_name(module) in _distributions(EXTRAS[extra])


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        ("matplotlib", ["figstep", "."], "study"),
        ("nbformat", ["run", "--only", "02", "--profile", "smoke"], "study"),
    ],
)
def test_a_command_without_its_extra_is_one_line(
    missing: str, arguments: list[str], extra: str, tmp_path: Path
) -> None:
    code = f"import sys; sys.modules[{missing!r}] = None; from casa_mech.cli import main; main({arguments!r})"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        f"casa-mech: this needs {missing}, which is not installed: pip install 'casa-mech[{extra}]'"
    )


@pytest.mark.parametrize("package", ["casa_mech", "probes"])
def test_importing_a_package_loads_no_model_library(package: str) -> None:
    code = (
        f"import sys, {package}; heavy = {{'torch', 'transformers', 'pandas', 'sklearn', 'matplotlib'}};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["casa_mech"])
def test_a_package_shows_the_names_that_users_need(package: str) -> None:
    module = import_module(package)
    assert module.__doc__ and (Path(module.__file__ or "").parent / "py.typed").is_file()
    names = list(module.__all__)
    assert 10 <= len(names) <= 26 and "__version__" in names and len(names) == len(set(names))
    assert all(getattr(module, name) is not None for name in names) and set(names) - {"__version__"} <= set(dir(module))


def test_every_module_has_its_layer() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = {name for layer in contracts[0]["layers"] for name in layer.split(" | ")}
    paths = [
        path for path in (ROOT / "casa_mech").iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    ]
    modules = {f"casa_mech.{path.stem}" for path in paths if path.stem not in ("__init__", "__main__")}
    assert layers == modules | {"probes"}
    text = (ROOT / "docs" / "architecture.md").read_text()
    missing = [name for name in modules if f"`{name.replace('.', '/')}" not in text]
    assert not missing, f"docs/architecture.md does not mention {missing}"
