"""A full disk while a gate is trained and saved: one line, nothing half-written, and the same call goes on."""

from pathlib import Path

import pytest
from helpers.casa import SETTINGS, examples, stir
from helpers.full_disk import files_of_at_most

from casa_mech.casa import Casa
from casa_mech.defenses.training import train_defense
from casa_mech.errors import RunError
from casa_mech.files import TEMPORARY, writing
from casa_mech.omni import Omni


def check(error: RunError, folder: Path) -> None:
    """One line that names a path in `folder`, which holds nothing half-written."""
    assert "cannot write" in str(error) or "no space left" in str(error)
    assert str(folder) in str(error) and "\n" not in str(error)
    assert not list(folder.rglob(f"{TEMPORARY}*"))


def test_training_stops_with_one_line_and_goes_on(tiny_omni: Omni, tmp_path: Path) -> None:
    options = {**SETTINGS.model_dump(include={"max_steps", "batch_size", "checkpoint_every"}), "precision": "full"}
    with files_of_at_most(20_000), pytest.raises(RunError) as caught:
        train_defense("casa", tiny_omni, examples(), tmp_path / "gate", progress=False, **options)
    check(caught.value, tmp_path / "gate")
    with train_defense("casa", tiny_omni, examples(), tmp_path / "gate", progress=False, **options) as defense:
        assert defense.casa.training is not None and defense.casa.training.steps == 8
    assert (tmp_path / "gate" / "casa_config.json").is_file()


def test_a_later_checkpoint_that_cannot_be_written_leaves_the_earlier_one(
    tiny_omni: Omni, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from casa_mech.casa import checkpoint, trainer

    save, calls = checkpoint.save_file, []

    def full(*arguments: object, **options: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            with files_of_at_most(100):
                save(*arguments, **options)
        save(*arguments, **options)

    casa = Casa.attach(tiny_omni)
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunError) as caught:
        casa.train(examples(), SETTINGS, tmp_path, progress=False)
    check(caught.value, tmp_path)
    log = casa.train(examples(), SETTINGS, tmp_path, resume=True, progress=False)
    assert [row["step"] for row in log] == list(range(1, 9)) and trainer.FILE in {
        path.name for path in tmp_path.iterdir()
    }


def test_metrics_that_cannot_be_written_are_no_traceback(tiny_omni: Omni, tmp_path: Path) -> None:
    casa = Casa.attach(tiny_omni)
    with files_of_at_most(10), pytest.raises(RunError) as caught:
        casa.train(examples(), SETTINGS, tmp_path, progress=False)
    check(caught.value, tmp_path)


def test_saving_leaves_what_was_there(tiny_omni: Omni, tmp_path: Path) -> None:
    casa = stir(Casa.attach(tiny_omni))
    casa.save_pretrained(tmp_path / "gate")
    before = {path.name: path.read_bytes() for path in (tmp_path / "gate").iterdir()}
    stir(casa)
    with files_of_at_most(5_000), pytest.raises(RunError) as caught:
        casa.save_pretrained(tmp_path / "gate")
    check(caught.value, tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "gate").iterdir()} == before


def test_an_error_of_safetensors_is_told_from_the_systems_number(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no space left on the disk of .*free some"), writing(tmp_path / "a"):
        raise _SafetensorError("I/O error: No space left on device (os error 28)")
    with pytest.raises(_SafetensorError, match="header"), writing(tmp_path / "a"):
        raise _SafetensorError("invalid header")


class _SafetensorError(Exception):
    pass
