"""TensorRT and TensorRT-RTX: NVRTC, plugin creators, calibrators, backends."""
