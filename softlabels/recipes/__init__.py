"""Recipes: a YAML file that describes one experiment from corpus to student, as a checked `Recipe`.

Unknown keys are refused with the key that was probably meant.
"""

from softlabels.recipes.federated import FederatedRecipe
from softlabels.recipes.multitask import MultiTaskRecipe
from softlabels.recipes.parts import (
    Assistant,
    CompressStep,
    CorpusChoice,
    Pretraining,
    StudentEntry,
    TeacherChoice,
    alone_options,
    on_labels_alone,
    plain_options,
)
from softlabels.recipes.reading import (
    joint_of_recipe,
    read_experiment,
    read_recipe,
    recipes_folder,
    set_key,
    student_of_recipe,
    tasks_of_recipe,
)
from softlabels.recipes.recipe import Recipe

__all__ = [
    "Assistant",
    "CompressStep",
    "CorpusChoice",
    "FederatedRecipe",
    "MultiTaskRecipe",
    "Pretraining",
    "Recipe",
    "StudentEntry",
    "TeacherChoice",
    "alone_options",
    "joint_of_recipe",
    "on_labels_alone",
    "plain_options",
    "read_experiment",
    "read_recipe",
    "recipes_folder",
    "set_key",
    "student_of_recipe",
    "tasks_of_recipe",
]
