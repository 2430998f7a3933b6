"""`manifest.json`: all that is needed to run a study again, and how long it took."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from casa_mech.errors import RunError
from casa_mech.files import write_text
from casa_mech.identity import file_sha256
from casa_mech.study.settings import CLONE

PACKAGE = Path(__file__).parents[1]
ENVELOPES, ENVELOPE_FILE = "envelopes", "envelope.json"
"""Where a run folder has the envelopes of batches: a folder for each model, a file in it."""
PACKAGES = (
    "casa-mech", "torch", "transformers", "nnsight", "peft", "transformer-lens", "tokenizers", "safetensors", "numpy",
    "scipy", "scikit-learn", "statsmodels", "pandas", "pyarrow", "matplotlib", "pillow", "soundfile",
    "espeakng-loader", "papermill", "nbconvert",
)  # fmt: skip


class Manifest(BaseModel):
    """A run's record."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = 1
    """Of this record."""
    settings: dict[str, Any]
    """The study's settings, given and defaulted, with its sizes."""
    parameters: dict[str, Any]
    """Notebook parameters that were given, by notebook."""
    arguments: list[str]
    """The command line."""
    versions: dict[str, str]
    """Python, platform and packages."""
    git: dict[str, Any] | None
    """Commit, and whether the tree had changes; None outside a clone."""
    models: dict[str, dict[str, Any]]
    """Source, fingerprint and size of every model."""
    batch_envelopes: dict[str, dict[str, Any]] = {}
    """Of each model that runs in half precision: how far the batch moves its gate's v_s, log-odds and decisions
    (`casa_mech.evaluation.envelope`)."""
    data: dict[str, str]
    """SHA-256 of the shipped data files."""
    outputs: dict[str, str]
    """SHA-256 of the figures' numbers and the tables."""
    timings: dict[str, float]
    """Seconds by notebook and in all, and the peak memory of the largest process in bytes."""
    started: str
    """When, UTC."""
    finished: str
    """When, UTC."""

    def write(self, path: Path | str) -> None:
        """Write the manifest as JSON, whole or not at all."""
        write_text(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, path: Path | str) -> Manifest:
        """Read a manifest.

        Raises:
            RunError: missing, or not a manifest of this schema.
        """
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise RunError(f"{path} cannot be read as a manifest ({first}); run the study again") from None


def versions() -> dict[str, str]:
    """Versions of Python, the platform and the packages that results depend on."""
    installed = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "not installed"
    return installed


def git_state() -> dict[str, Any] | None:
    """Commit of the clone the package runs from and whether it has uncommitted changes; None when it is no clone."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(CLONE), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def data_hashes() -> dict[str, str]:
    """SHA-256 of the data files in the package (world, wrappers, published numbers), weights left out."""
    files = sorted(path for path in PACKAGE.rglob("*.json") if "weights" not in path.parts)
    return {path.relative_to(PACKAGE).as_posix(): file_sha256(path) for path in files}


def output_hashes(root: Path) -> dict[str, str]:
    """SHA-256 of the figures' numbers and the tables under a run folder."""
    files = sorted([*root.glob("figures/*.csv"), *root.glob("tables/*.parquet")])
    return {path.relative_to(root).as_posix(): file_sha256(path) for path in files}


def models_seen(root: Path) -> dict[str, dict[str, Any]]:
    """The records that notebooks wrote of each model that they loaded."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(root.glob("models/*.json"))}


def envelopes_seen(root: Path) -> dict[str, dict[str, Any]]:
    """The envelopes of batches that notebooks measured, by model."""
    files = sorted(root.glob(f"{ENVELOPES}/*/{ENVELOPE_FILE}"))
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in files}


def now() -> str:
    """The time, UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def peak_memory() -> float:
    """Peak resident memory of the largest process so far, this one or a finished child, in bytes."""
    try:
        import resource
    except ImportError:  # not on Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    processes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return float(unit * max(resource.getrusage(who).ru_maxrss for who in processes))
