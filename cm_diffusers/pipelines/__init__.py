from cm_diffusers.pipelines.pipeline_consistency import ConsistencyPipeline
from cm_diffusers.pipelines.pipeline_consistency_inpaint import ConsistencyInpaintPipeline

__all__ = ["ConsistencyInpaintPipeline", "ConsistencyPipeline"]
