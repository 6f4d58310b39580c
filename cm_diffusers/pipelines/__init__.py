from cm_diffusers.pipelines.pipeline_consistency import ConsistencyPipeline

__all__ = ["ConsistencyPipeline"]
