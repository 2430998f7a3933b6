"""What a study is about: its prompts, their attacks, the training set, the judge. `read_plan` reads a plan."""

from casa_mech.plan.data import Pair, StudyData
from casa_mech.plan.own_data import OwnData
from casa_mech.plan.records import WORLD, StudyPlan, plan_names, read_plan
from casa_mech.plan.world_data import WorldData, world_data

__all__ = ["WORLD", "OwnData", "Pair", "StudyData", "StudyPlan", "WorldData", "plan_names", "read_plan", "world_data"]
