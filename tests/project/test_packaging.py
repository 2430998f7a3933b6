"""The set-up files agree with each other: pyproject.toml, constraints.txt and environment.yml."""

import re
import tomllib

import pytest
import yaml
from helpers.paths import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def _pins(lines: list[str]) -> dict[str, str]:
    pairs = (line.strip().split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.fixture(scope="module")
def requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + project["optional-dependencies"]["dev"]
    return [Requirement(line) for line in lines]


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


def test_cited_version_is_the_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == project["version"]


def test_nothing_of_ours_runs_when_somebody_imports_torch() -> None:
    entry_points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert set(entry_points) == {"transformer_lens.architectures"}
