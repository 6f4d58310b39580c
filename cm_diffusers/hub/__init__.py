from cm_diffusers.hub.card import render_card
from cm_diffusers.hub.push import push_to_hub

__all__ = ["push_to_hub", "render_card"]
