"""The package shows what there is, loads it when it is used, and imports in one direction."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import probes

ROOT = Path(probes.__file__).parent
SUBPACKAGES = ("activations", "linear", "detector", "gate", "lens", "prefill")
"""Each may import those before it."""
HEAVY = ("torch", "transformers", "transformer_lens", "matplotlib", "pandas", "casa_mech")


@pytest.mark.parametrize("name", ["probes", *(f"probes.{name}" for name in SUBPACKAGES)])
def test_every_public_name_is_there(name: str) -> None:
    package = importlib.import_module(name)
    assert package.__doc__ and len(package.__doc__.splitlines()) > 3
    stub = ast.parse(Path(str(package.__file__) + "i").read_text(encoding="utf-8"))
    declared = next(ast.literal_eval(node.value) for node in stub.body if isinstance(node, ast.Assign))
    assert sorted(declared) == sorted(package.__all__) and set(declared) <= set(dir(package))
    for public in package.__all__:
        assert getattr(package, public) is not None


def test_tab_completion_sees_the_names() -> None:
    """In a fresh interpreter, before anything was used."""
    code = "import casa_mech, probes; print(*dir(casa_mech), '|', *dir(probes))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    ours, theirs = (part.split() for part in done.stdout.split("|"))
    assert {"load", "Query", "Casa", "__version__", "__doc__"} <= set(ours)
    assert {"train", "collect", "steer", "linear", "__version__", "__doc__"} <= set(theirs)


def test_importing_costs_nothing() -> None:
    code = (
        "import sys, probes\n"
        f"import {', '.join(f'probes.{name}' for name in SUBPACKAGES)}\n"
        f"print([name for name in {HEAVY} if name in sys.modules], probes.__version__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[]", probes.__version__]
    assert (ROOT / "py.typed").exists()


def test_an_import_leaves_transformer_lens_alone() -> None:
    code = (
        "from transformer_lens.factories import architecture_adapter_factory as factory\n"
        "from transformer_lens.utilities import architectures, hf_utils\n"
        "before = dict(factory.SUPPORTED_ARCHITECTURES), set(architectures.MULTIMODAL_ARCHITECTURES)\n"
        "read = hf_utils.autoconfig_with_remote_post_init_compat\n"
        "import probes\n"
        "for name in probes.lens.__all__: getattr(probes.lens, name)\n"
        "assert before == (dict(factory.SUPPORTED_ARCHITECTURES), set(architectures.MULTIMODAL_ARCHITECTURES))\n"
        "assert read is hf_utils.autoconfig_with_remote_post_init_compat\n"
        "probes.register()\n"
        "assert read is not hf_utils.autoconfig_with_remote_post_init_compat\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_imports_go_one_way() -> None:
    forbidden = {f"casa_mech.{name}" for name in ("study", "reports", "compare", "cli", "timing", "evaluation")}
    for place, subpackage in enumerate(SUBPACKAGES):
        later = {f"probes.{name}" for name in SUBPACKAGES[place + 1 :]}
        for path in (ROOT / subpackage).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                module = node.module if isinstance(node, ast.ImportFrom) else None
                prefix = ".".join((module or "").split(".")[:2])
                assert prefix not in forbidden | later, f"{path} imports {module}"
