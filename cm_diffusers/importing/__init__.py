from cm_diffusers.importing.published import import_checkpoint

__all__ = ["import_checkpoint"]
