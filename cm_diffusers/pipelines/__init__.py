from cm_diffusers.pipelines.known import Known
from cm_diffusers.pipelines.loading import load_pipeline
from cm_diffusers.pipelines.pipeline_consistency import ConsistencyPipeline
from cm_diffusers.pipelines.pipeline_consistency_colorize import ConsistencyColorizePipeline
from cm_diffusers.pipelines.pipeline_consistency_denoise import ConsistencyDenoisePipeline
from cm_diffusers.pipelines.pipeline_consistency_img2img import ConsistencyImg2ImgPipeline
from cm_diffusers.pipelines.pipeline_consistency_inpaint import ConsistencyInpaintPipeline
from cm_diffusers.pipelines.pipeline_consistency_interpolation import ConsistencyInterpolationPipeline
from cm_diffusers.pipelines.pipeline_consistency_restoration import ConsistencyRestorationPipeline
from cm_diffusers.pipelines.pipeline_consistency_superres import ConsistencySuperResolutionPipeline

__all__ = [
    "ConsistencyColorizePipeline",
    "ConsistencyDenoisePipeline",
    "ConsistencyImg2ImgPipeline",
    "ConsistencyInpaintPipeline",
    "ConsistencyInterpolationPipeline",
    "ConsistencyPipeline",
    "ConsistencyRestorationPipeline",
    "ConsistencySuperResolutionPipeline",
    "Known",
    "load_pipeline",
]
