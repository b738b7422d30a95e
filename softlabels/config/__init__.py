"""Options, read and checked before anything runs: of dumps, students, teachers, and the small words in them.

Unknown keys are refused with the key that was probably meant.
"""

from softlabels.config.augmentation import AUGMENTATIONS, AugmentOptions
from softlabels.config.dumps import CombineOptions, DumpOptions, ImportOptions, Masking, RayOptions
from softlabels.config.identity import fingerprint, package_versions
from softlabels.config.losses import LAYER_LOSSES, PENALTIES, LossTerm, Phase, parse_losses
from softlabels.config.schedules import AdaptiveTemperature, Schedule, Temperature, parse_schedule, parse_temperature
from softlabels.config.several import JOINT_NAMES, Couple, JointOptions, MultiTaskOptions
from softlabels.config.strict import Strict, build_options, explain, refuse_doubled, suggest
from softlabels.config.students import EvaluateOptions, PruneOptions, StudentOptions
from softlabels.config.teachers import ASSISTANT, BASE, PRETRAINED, TEACHER, TeachableTask, TeacherTraining
from softlabels.config.values import parse_options, parse_value, read_yaml

__all__ = [
    "ASSISTANT",
    "AUGMENTATIONS",
    "BASE",
    "JOINT_NAMES",
    "LAYER_LOSSES",
    "PENALTIES",
    "PRETRAINED",
    "TEACHER",
    "AdaptiveTemperature",
    "AugmentOptions",
    "CombineOptions",
    "Couple",
    "DumpOptions",
    "EvaluateOptions",
    "ImportOptions",
    "JointOptions",
    "LossTerm",
    "Masking",
    "MultiTaskOptions",
    "Phase",
    "PruneOptions",
    "RayOptions",
    "Schedule",
    "Strict",
    "StudentOptions",
    "TeachableTask",
    "TeacherTraining",
    "Temperature",
    "build_options",
    "explain",
    "fingerprint",
    "package_versions",
    "parse_losses",
    "parse_options",
    "parse_schedule",
    "parse_temperature",
    "parse_value",
    "read_yaml",
    "refuse_doubled",
    "suggest",
]
