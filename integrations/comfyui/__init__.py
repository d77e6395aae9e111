"""ComfyUI nodes for HART, VAR and VILA-U. ComfyUI imports this folder from custom_nodes and reads the two mappings."""

from .nodes import HartEdit, HartLoad, HartReconstruct, HartSample

NODE_CLASS_MAPPINGS = {
    "HartLoad": HartLoad,
    "HartSample": HartSample,
    "HartEdit": HartEdit,
    "HartReconstruct": HartReconstruct,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "HartLoad": "Load HART, VAR or VILA-U",
    "HartSample": "Sample (HART, VAR, VILA-U)",
    "HartEdit": "Edit picture (HART, VAR)",
    "HartReconstruct": "Reconstruct (HART, VAR, VILA-U)",
}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
