from cm_diffusers.evaluation.clip_score import ClipScore, load_clip
from cm_diffusers.evaluation.evaluate import Evaluator
from cm_diffusers.evaluation.features import Features, load_features
from cm_diffusers.evaluation.metrics import all_metrics, frechet_distance
from cm_diffusers.evaluation.prompts import Prompts
from cm_diffusers.evaluation.reference import Reference
from cm_diffusers.evaluation.results import Protocol, Report, Result
from cm_diffusers.evaluation.sampling import Sampler, student_sampler, teacher_sampler
from cm_diffusers.evaluation.text_sampling import text_student_sampler, text_teacher_sampler
from cm_diffusers.evaluation.timestep_search import search_levels, store_levels

__all__ = [
    "ClipScore",
    "Evaluator",
    "Features",
    "Prompts",
    "Protocol",
    "Reference",
    "Report",
    "Result",
    "Sampler",
    "all_metrics",
    "frechet_distance",
    "load_clip",
    "load_features",
    "search_levels",
    "store_levels",
    "student_sampler",
    "teacher_sampler",
    "text_student_sampler",
    "text_teacher_sampler",
]
