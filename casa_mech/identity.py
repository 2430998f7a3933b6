"""Digests that tell models, files, queries and settings apart, and find again what was made from them.

What has one digest is taken for one thing: pictures, clips and files are therefore known by their content, never by
their path. Random draws are derived from some of these digests (the seed of each group of sampled replies, in
`casa_mech.evaluation.reply_parts`), so the functions keep their values from release to release.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from casa_mech.errors import InputError

# For the annotations alone: everything may import this module, `casa_mech.queries` too.
if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

    from casa_mech.queries.query import Example, Part, Query

SHORT = 16
"""Hex digits of a digest in the name of a file or folder."""


def digest_of(pieces: str | Iterable[str | bytes]) -> str:
    """SHA-256 of texts (UTF-8) and bytes, one after the other, in hex."""
    digest = hashlib.sha256()
    for piece in [pieces] if isinstance(pieces, str) else pieces:
        digest.update(piece.encode("utf-8", "surrogatepass") if isinstance(piece, str) else piece)
    return digest.hexdigest()


def json_digest(value: Any) -> str:
    """SHA-256 of JSON values, in hex; the order of keys makes no difference."""
    return digest_of(json.dumps(value, sort_keys=True))


def key_digest(key: Mapping[str, Any]) -> str:
    """The first `SHORT` digits of `json_digest`: the name of what is kept under `key`."""
    return json_digest(dict(key))[:SHORT]


def file_sha256(path: Path | str) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def folder_sha256(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder`, by its path in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def weights_digest(modules: Iterable[nn.Module]) -> str:
    """SHA-256 over names, shapes and a sample of the values of the modules' weights as they are now.

    About 1,024 values of each tensor are read, evenly spaced: two trainings never agree in all of them, and a large
    model takes a second. What changes only a few rows of a large tensor has to be given as a module of its own.
    """
    return digest_of(piece for module in modules for piece in _weights(module))


def _weights(module: nn.Module) -> Iterable[str | bytes]:
    for name, value in sorted(module.state_dict().items()):
        flat = value.detach().reshape(-1)
        yield f"{name} {list(value.shape)}"
        yield flat[:: max(1, flat.numel() // 1024)].float().cpu().numpy().tobytes()


def adapted_fingerprint(fingerprint: str, model: nn.Module) -> str:
    """The `fingerprint` of a model; where LoRA is at work in it, a digest of that and of the LoRA's weights."""
    weights = list(_lora_weights(model))
    return digest_of([fingerprint, *weights]) if weights else fingerprint


def _lora_weights(model: nn.Module) -> Iterable[str | bytes]:
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and not module.disable_adapters:
            for key, value in sorted(module.state_dict().items()):
                if "lora_" in key:
                    flat = value.detach().reshape(-1)
                    yield f"{name} {key}"
                    yield flat[:: max(1, len(flat) // 64)].float().cpu().numpy().tobytes()


def part_identity(part: Part, query_id: str = "") -> list[str]:
    """A part as JSON values: its kind, then its text or the digest of its picture or clip.

    Raises:
        InputError: its file is not there; the message names the query.
    """
    if part.kind == "text":
        return ["text", part.text]
    if part.kind == "image":
        return ["image", _media_digest(part.image, query_id)]
    return ["audio", str(part.rate), _media_digest(part.audio, query_id)]


def query_digest(query: Query) -> str:
    """SHA-256 of what the model is given: the query with the bytes, pixels and samples of its media; and of its id.

    The label and `meta`, which the model does not see, are left out.

    Raises:
        InputError: a picture or clip whose file is not there.
    """
    turns = [
        [turn.role, turn.safety_token, [part_identity(part, query.id) for part in turn.parts]] for turn in query.history
    ]
    parts = [part_identity(part, query.id) for part in query.parts]
    return json_digest([query.id, query.system, query.prefill, turns, parts])


def queries_digest(queries: Sequence[Query]) -> str:
    """SHA-256 of queries in their order, each with its media, its label and its `meta`, which judges read.

    Raises:
        InputError: as `query_digest`.
    """
    known = ([query_digest(query), query.label, sorted(query.meta.items())] for query in queries)
    return digest_of(json.dumps(entry) for entry in known)


def examples_digest(examples: Sequence[Example]) -> str:
    """SHA-256 of training examples, which are text, in their order."""
    return digest_of(map(_example, examples))


def _example(example: Example) -> str:
    query = example.query
    turns = [[turn.role, *(getattr(part, "text", "") for part in turn.parts)] for turn in query.history]
    return repr((query.text, query.label, query.system, turns, example.reply))


def _media_digest(media: Path | Image.Image | np.ndarray, query_id: str) -> str:
    """SHA-256 of a file's bytes, or of pixels or samples with their shape and type."""
    if isinstance(media, Path):
        if not media.is_file():
            raise InputError(f"query {query_id!r}: no file {media}; check the path")
        return file_sha256(media)
    array = np.ascontiguousarray(np.asarray(media))
    return digest_of([f"{array.shape} {array.dtype} ", array.tobytes()])
