"""The plan: the shipped ones, one's own, and what is refused."""

from pathlib import Path

import pytest

from casa_mech.errors import InputError
from casa_mech.family.plan import Member, Plan, plan_text, read_plan
from casa_mech.organism.premises import ALL, Premises

KNOBS = tuple(Premises.model_fields)


def test_the_default_plan_varies_every_knob_alone_and_two_together() -> None:
    plan = read_plan()
    assert len(plan.members) >= 16
    assert len(plan.sizes.gate_seeds) == 3
    changed = [
        {knob for knob in KNOBS if getattr(member.premises, knob) != getattr(ALL, knob)} for member in plan.members
    ]
    assert all({knob} in changed for knob in KNOBS)
    assert {"unasked", "letter_code"} in changed
    premises = [member.premises for member in plan.members]
    assert Premises() in premises and Premises(letter_code="split") in premises
    assert sorted(member.seed for member in plan.members if member.premises == ALL) == [0, 1, 2]
    assert any(0 < member.premises.tolerance < ALL.tolerance for member in plan.members)
    assert any(member.mends for member in plan.members)


def test_a_file_is_a_plan_as_the_shipped_ones(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text(plan_text("default"))
    assert read_plan(str(tmp_path / "own.yaml")) == read_plan()
    (tmp_path / "two.yaml").write_text("members: [{name: a}, {name: b, start: none, knobs: [tolerance=0.2]}]")
    plan = read_plan(str(tmp_path / "two.yaml"))
    assert [member.premises.tolerance for member in plan.members] == [ALL.tolerance, 0.2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("members: []", "members"),
        ("members: [{name: a}, {name: a}]", "two members are called 'a'"),
        ("members: [{name: a/b}]", "name"),
        ("members: [{name: a, knobs: [colour=red]}]", "'colour=red' sets no knob"),
        ("members: [{name: a, knobs: [tolerance=7]}]", "tolerance"),
        ("members: [{name: a}]\nsize: {card: 3}", "no field 'size'"),
        ("members: [{name: a}]\nsizes: {audits: 3}", "no field 'audits'"),
        ("members: [", "no YAML"),
        ("- a", "expected members and sizes"),
    ],
)
def test_a_plan_that_cannot_be_used_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_plan(str(path))
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_members_are_chosen_by_name_in_the_order_of_the_plan() -> None:
    plan = Plan(members=(Member(name="a"), Member(name="b"), Member(name="c")))
    assert [member.name for member in plan.named(["c", "a"])] == ["a", "c"]
    assert len(plan.named([])) == 3
    with pytest.raises(InputError, match="no member 'd' in the plan; there are a, b, c"):
        plan.named(["d"])
    with pytest.raises(InputError, match="--plan elsewhere cannot be read"):
        read_plan("elsewhere")
