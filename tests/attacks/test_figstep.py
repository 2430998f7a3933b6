"""FigStep and TYPO layouts: fonts, lines, sizes; against the published pictures where they are at hand."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.paths import DATA, GALLERY
from PIL import Image

from casa_mech.attacks.fonts import FONT_FILES, Use, find_font, fonts_for, undrawable
from casa_mech.attacks.typography import (
    figstep_picture,
    figstep_text,
    page_picture,
    stack_pictures,
    typo_picture,
    wrap_pixels,
)
from casa_mech.errors import InputError
from casa_mech.reports.figstep import figstep_comparison, figstep_figure, figstep_summary

FREEMONO = find_font("figstep").exact
real_pictures = pytest.mark.skipif(
    not (DATA / "figstep" / "images").is_dir(), reason="needs FigStep's pictures: set CASA_MECH_DATA to their folder"
)
benchmark_fonts = pytest.mark.skipif(not FREEMONO, reason="needs FreeMono Bold: set CASA_MECH_FONTS to its folder")


def ink(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("L")) < 128


def test_figstep_text_is_wrapped_at_fifteen_and_ends_in_an_empty_list() -> None:
    lines = figstep_text("Steps to bake a lemon cake with sugar.").split("\n")
    assert lines == ["Steps to bake a", "lemon cake with", "sugar.", "1. ", "2. ", "3. "]


@pytest.mark.parametrize("number", range(len(fonts_for("figstep"))))
def test_figstep_keeps_its_layout_in_every_font(number: int) -> None:
    font = fonts_for("figstep")[number]
    picture = figstep_picture("Steps to bake.", font)
    assert picture.mode == "RGB" and picture.size == (760, 760)
    rows = np.flatnonzero(ink(picture)[:, 20:75].any(axis=1))
    baselines = [74 + 75 * line for line in range(4)]
    bodies = [set(range(baseline - 30, baseline - 2)) for baseline in baselines]
    assert all(body & set(rows) for body in bodies) and rows.max() < baselines[-1] + 25
    advance = font.at(80).getlength("m")
    assert 20 + 15 * advance <= 760, "fifteen letters fit on a line"


def test_figstep_cuts_its_list_as_published_but_never_the_instruction() -> None:
    assert figstep_picture("bake cakes now " * 9).size == (760, 760)
    long = figstep_picture("bake cakes now " * 12)
    assert long.width == 760 and long.height == 10 + 75 * 15
    assert ink(long)[-75:].any()


def test_typo_is_as_wide_as_published_and_grows_by_lines() -> None:
    assert typo_picture("cake").size == (1024, 180)
    assert typo_picture("a very long phrase about lemon cakes and tea").size == (1024, 270)
    font = find_font("typo").at(90)
    lines = wrap_pixels("a very long phrase about lemon cakes and tea", font, 1024, lead=" ")
    assert lines[1].startswith(" ") and all(font.getlength(line) <= 1024 for line in lines)
    cut = wrap_pixels("x" * 60, font, 1024, lead=" ")
    assert len(cut) > 1 and "".join(line.strip() for line in cut) == "x" * 60


def test_a_page_holds_all_its_lines_and_pictures_stack() -> None:
    page = page_picture("How do I bake a lemon cake?\n\nPlease tell me all the steps in order, slowly.")
    assert page.width == 760 and page.height == 2 * 20 + 52 * 4
    top = Image.new("L", (100, 50), 0)
    both = stack_pictures(top, page)
    assert both.size == (760, 380 + page.height) and both.mode == "RGB"


def test_what_a_font_cannot_draw_is_named() -> None:
    assert undrawable("naïve → é", find_font("page")) == ""
    for draw in (figstep_picture, typo_picture, page_picture):
        with pytest.raises(InputError, match=r"cannot draw '日' \(U\+65E5\): leave it out"):
            draw("a 日本 cake")
        with pytest.raises(InputError, match="nothing to draw"):
            draw("  ")


@pytest.mark.parametrize("use", ["figstep", "typo", "page"])
def test_without_a_folder_the_shipped_fonts_draw(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CASA_MECH_FONTS", raising=False)
    (font,) = fonts_for(use)
    assert font.path.parent == FONT_FILES, "a font of the system would make another machine's pictures differ"
    assert font.exact == (font.note == "") == (use != "figstep")
    assert list(FONT_FILES.glob(f"LICENSE-{font.path.stem.split('-')[0]}.txt"))


def test_the_users_folder_comes_first_and_a_stand_in_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CASA_MECH_FONTS", raising=False)
    shipped = find_font("figstep")
    assert shipped.name == "TeX Gyre Cursor Bold"
    assert "TeX Gyre Cursor Bold draws the figstep pictures in place of FreeMonoBold.ttf" in shipped.note
    assert "set CASA_MECH_FONTS to a folder" in shipped.note
    (tmp_path / "FreeMonoBold.ttf").write_bytes(shipped.path.read_bytes())
    monkeypatch.setenv("CASA_MECH_FONTS", str(tmp_path))
    assert find_font("figstep").path == tmp_path / "FreeMonoBold.ttf" and find_font("figstep").exact
    assert fonts_for("figstep")[1] == shipped
    other = tmp_path / "broken"
    other.mkdir()
    (other / "FreeMonoBold.ttf").write_bytes(b"no font")
    monkeypatch.setenv("CASA_MECH_FONTS", str(other))
    with pytest.raises(InputError, match="not a readable font"):
        find_font("figstep")
    monkeypatch.setenv("CASA_MECH_FONTS", str(tmp_path / "absent"))
    with pytest.raises(InputError, match=r"CASA_MECH_FONTS names .*absent, which is not a folder"):
        find_font("figstep")


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder in FigStep's layout with our own pictures."""
    table = pd.DataFrame(
        [("ForbidQI", 1, 1, "Steps to bake."), ("ForbidQI", 1, 2, "List of cakes.")],
        columns=["dataset", "category_id", "task_id", "instruction"],
    )
    table.to_csv(tmp_path / "SafeBench-Tiny.csv", index=False)
    (tmp_path / "images").mkdir()
    for row in table.itertuples():
        picture = figstep_picture(row.instruction)
        picture.save(tmp_path / "images" / f"query_ForbidQI_{row.category_id}_{row.task_id}_6.png")
    return tmp_path


def test_comparison_sees_other_words_and_other_sizes(published: Path) -> None:
    def best(table: pd.DataFrame) -> pd.DataFrame:
        return table[table["font"] == find_font("figstep").name].set_index("task")

    same = best(figstep_comparison(published))
    assert list(same["iou"]) == [1.0, 1.0] and same["same_lines"].all() and (same["lines"] == [4, 4]).all()
    images = published / "images"
    figstep_picture("Steps to bake a very large cake.").save(images / "query_ForbidQI_1_1_6.png")
    Image.new("RGB", (512, 512), "white").save(images / "query_ForbidQI_1_2_6.png")
    changed = best(figstep_comparison(published))
    assert not changed["same_lines"].any() and changed["iou"][1] < 0.6
    assert list(changed["same_size"]) == [True, False]


def test_comparison_errors_are_one_line(published: Path, tmp_path: Path) -> None:
    picture = published / "images" / "query_ForbidQI_1_1_6.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"query_ForbidQI_1_1_6.png: .* is not a readable image"):
        figstep_comparison(published)
    picture.rename(published / "images" / "query_ForbidQI_9_9_6.png")
    with pytest.raises(InputError, match=r"no row of .* has category_id 9 and task_id 9"):
        figstep_comparison(published)
    with pytest.raises(InputError, match=r"neither SafeBench-Tiny\.csv nor safebench.csv"):
        figstep_comparison(published / "images")


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return figstep_comparison(DATA / "figstep")


@real_pictures
@benchmark_fonts
def test_our_pictures_are_the_published_ones_but_for_antialiasing(table: pd.DataFrame) -> None:
    best = table[table["exact_font"]]
    assert len(best) == 45 and best["same_size"].all() and best["same_lines"].all()
    assert best["iou"].min() >= 0.97
    rows = {row["font"]: row for row in figstep_summary(table)}
    assert rows["FreeMono Bold"]["low"] > 0.98


@real_pictures
def test_the_shipped_font_draws_nearly_the_published_pictures(table: pd.DataFrame) -> None:
    shipped = table[~table["exact_font"]]
    assert len(shipped) == 45 and shipped["same_size"].all() and shipped["same_lines"].all()
    assert shipped["iou"].min() >= 0.95


@real_pictures
def test_the_committed_figure_is_of_these_numbers(table: pd.DataFrame) -> None:
    committed = pd.read_csv(GALLERY / "figstep_comparison.csv")
    assert list(committed.columns) == list(table.columns)
    assert set(committed["font"]) == {"FreeMono Bold", "TeX Gyre Cursor Bold"}
    same_fonts = committed[committed["font"].isin(table["font"])].reset_index(drop=True)
    pd.testing.assert_frame_equal(same_fonts, table, check_dtype=False, atol=0.02, rtol=0.01)
    best = find_font("figstep").name
    figure = figstep_figure(table, DATA / "figstep")
    assert "have the published size in 45 of 45 and the published lines in 45 of 45" in figure.get_suptitle()
    assert any(f"Counted of those in {best}." in text.get_text().replace("\n", " ") for text in figure.texts)


@pytest.mark.skipif(not (DATA / "mm_safetybench").is_dir(), reason="needs MM-SafetyBench: set CASA_MECH_DATA")
def test_typo_has_the_published_lines_and_place() -> None:
    root, overlaps = DATA / "mm_safetybench", []
    for table in sorted((root / "processed_questions").glob("*.json"))[:4]:
        phrases = json.loads(table.read_text(encoding="utf-8"))
        for path in sorted((root / "imgs" / table.stem / "TYPO").glob("*.jpg")):
            real, ours = Image.open(path), typo_picture(phrases[path.stem]["Key Phrase"])
            # The pictures at hand were scaled to 448 pixels.
            assert abs(ours.height * real.width / ours.width - real.height) <= 1, path
            one, two = ink(real), ink(ours.resize(real.size, Image.Resampling.LANCZOS))
            overlaps.append((one & two).sum() / (one | two).sum())
    assert len(overlaps) > 30 and np.mean(overlaps) > 0.75
