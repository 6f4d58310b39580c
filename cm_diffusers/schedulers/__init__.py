from cm_diffusers.schedulers.scheduling_consistency import ConsistencyScheduler, ConsistencySchedulerOutput
from cm_diffusers.schedulers.scheduling_edm import ScaledTimeEDMScheduler

__all__ = ["ConsistencyScheduler", "ConsistencySchedulerOutput", "ScaledTimeEDMScheduler"]
