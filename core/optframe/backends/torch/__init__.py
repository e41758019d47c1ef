"""The backend `torch`: an ONNX graph as a list of torch calls, on the CPU or as one CUDA graph with plugin kernels.

Why a translation of its own, judged in November 2026 over the ops that the pipelines leave and the models that we test
on (silero-vad, magika, PP-OCR, ddddocr, sentence transformers, ViT, ConvNeXt, Anchor DETR in FP32, FP16 and INT8):

- onnx2torch 1.5.15 (August 2024, the last one): 110 op types, but no If, Loop, Scan, LSTM, GRU, QuantizeLinear,
  DequantizeLinear, CastLike, GlobalMaxPool, Size, Trilu or GroupNormalization; no model-local functions; shapes are
  computed on the device in each run, which no CUDA graph can hold.
- onnx2pytorch 0.6.0: fewer ops, opsets around 9 to 13, modules that keep state between runs.
- onnx-pytorch 0.1.5 (2021): writes Python source from the graph; unmaintained, opset 9 to 12.

None keeps shape arithmetic on the host or knows plugin ops, and that, not the table of ops, is most of the work here.
"""
