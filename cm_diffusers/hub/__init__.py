from cm_diffusers.hub.card import render_card
from cm_diffusers.hub.export import export_to_diffusers, export_to_onnx
from cm_diffusers.hub.push import push_to_hub

__all__ = ["export_to_diffusers", "export_to_onnx", "push_to_hub", "render_card"]
