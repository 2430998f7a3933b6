"""Judges by name, as the command line names them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

from pydantic import ValidationError

from casa_mech.errors import InputError
from casa_mech.judging.judges import KeywordJudge, MicroWorldJudge
from casa_mech.judging.rubrics import RUBRICS, read_rubric
from casa_mech.judging.verdict import Judge

BackendKind = Literal["local", "openai", "anthropic"]
BACKENDS: tuple[BackendKind, ...] = ("local", "openai", "anthropic")
WITHOUT_MODEL = ("micro-world", "keyword")
JUDGES = (*WITHOUT_MODEL, "classifier", *RUBRICS)


def load_judge(
    name: str,
    backend: str = "local",
    model: str = "",
    *,
    positive: Sequence[str] = (),
    threshold: float = 0.5,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 8,
    **http: Any,
) -> Judge:
    """A judge by name.

    Args:
        name: micro-world, keyword, classifier, a rubric (yes-no, strong-reject, five-point, refusal), or the path of a
            rubric's JSON file.
        backend: for rubrics: local, openai or anthropic.
        model: the judging model: a directory or hub id, or the API's name for it.
        positive, threshold: of a classifier (see `ClassifierJudge`).
        device, dtype, batch_size: of local models.
        http: further fields of `HttpSettings`.

    Raises:
        InputError: an unknown name, backend or option, a missing model or key.
        ModelError: a model that cannot be loaded.
    """
    check_judge(name, backend, model)
    if name in WITHOUT_MODEL:
        return MicroWorldJudge() if name == "micro-world" else KeywordJudge()
    if name == "classifier":
        from casa_mech.judging.local import ClassifierJudge

        return ClassifierJudge(model, positive, threshold, device=device, dtype=dtype, batch_size=batch_size)
    from casa_mech.judging.rubric_judge import RubricJudge

    rubric = read_rubric(name) if name.endswith(".json") else RUBRICS[name]
    if backend == "local":
        from casa_mech.judging.local import LocalChat

        return RubricJudge(rubric, LocalChat(model, device, dtype, batch_size))
    from casa_mech.judging.http_api import HttpBackend, HttpSettings

    try:
        settings = HttpSettings(dialect=cast(Any, backend), model=model, **http)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        raise InputError(f"judge option {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return RubricJudge(rubric, HttpBackend(settings))


def check_judge(name: str, backend: str = "local", model: str = "") -> None:
    """Refuse what `load_judge` can refuse without torch and without a key.

    Raises:
        InputError: an unknown name or backend, no judging model, or a rubric's file that cannot be used.
    """
    if name in WITHOUT_MODEL and (model or backend != BACKENDS[0]):
        raise InputError(f"the judge {name} asks no model: leave out --judge-model and --backend, or name a rubric")
    if name in WITHOUT_MODEL:
        return
    if name not in JUDGES and not name.endswith(".json"):
        raise InputError(
            f"unknown judge {name!r}; judges: {', '.join(JUDGES)}, or a rubric of your own in a .json file"
        )
    if backend not in BACKENDS:
        raise InputError(f"unknown backend {backend!r}; backends: {', '.join(BACKENDS)}")
    if not model:
        raise InputError(f"the judge {name} asks a model: name it with --judge-model")
    if name.endswith(".json"):
        read_rubric(name)
