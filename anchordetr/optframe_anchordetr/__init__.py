"""Anchor DETR for optframe: model, export, graph passes, plugin ops, evaluation."""
