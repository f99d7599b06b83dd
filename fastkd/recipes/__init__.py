"""What a distillation step is made of. Torch and transformers, nothing else.

A recipe = what is read x what the teacher says of it x what is learnt: see recipe.py.
"""

from fastkd.recipes.hidden import Hidden
from fastkd.recipes.lm import LM, find_head, shifts_labels
from fastkd.recipes.objectives import Distil, Plus
from fastkd.recipes.recipe import Batch, Learnt, Objective, Outputs, Recipe, Teacher, train
from fastkd.recipes.rollouts import OnPolicy, generate
from fastkd.recipes.schedules import Constant, Cosine, Linear, Moving, Steps, taid
from fastkd.recipes.teachers import Mixture, Prompted

__all__ = [
    "LM",
    "Batch",
    "Constant",
    "Cosine",
    "Distil",
    "Hidden",
    "Learnt",
    "Linear",
    "Mixture",
    "Moving",
    "Objective",
    "OnPolicy",
    "Outputs",
    "Plus",
    "Prompted",
    "Recipe",
    "Steps",
    "Teacher",
    "find_head",
    "generate",
    "shifts_labels",
    "taid",
    "train",
]
