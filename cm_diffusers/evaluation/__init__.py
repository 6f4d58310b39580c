from cm_diffusers.evaluation.metrics import frechet_distance

__all__ = ["frechet_distance"]
