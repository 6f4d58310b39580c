from cm_diffusers.evaluation.evaluate import Evaluator
from cm_diffusers.evaluation.features import Features, load_features
from cm_diffusers.evaluation.metrics import all_metrics, frechet_distance
from cm_diffusers.evaluation.reference import Reference
from cm_diffusers.evaluation.results import Protocol, Report, Result
from cm_diffusers.evaluation.sampling import Sampler, student_sampler, teacher_sampler

__all__ = [
    "Evaluator",
    "Features",
    "Protocol",
    "Reference",
    "Report",
    "Result",
    "Sampler",
    "all_metrics",
    "frechet_distance",
    "load_features",
    "student_sampler",
    "teacher_sampler",
]
