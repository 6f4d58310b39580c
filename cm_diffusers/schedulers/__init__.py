from cm_diffusers.schedulers.scheduling_consistency import ConsistencyScheduler, ConsistencySchedulerOutput

__all__ = ["ConsistencyScheduler", "ConsistencySchedulerOutput"]
