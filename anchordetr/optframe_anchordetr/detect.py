"""Detection with the PyTorch module on pictures of any size."""

from collections.abc import Sequence

import torch
from PIL import Image

from optframe_anchordetr.images import normalised, standard_size
from optframe_anchordetr.model import AnchorDETR
from optframe_anchordetr.model.preprocess import pad_batch
from optframe_anchordetr.postprocess import Detection, detections


def detect(model: AnchorDETR, images: Sequence[Image.Image], top_k: int = 100) -> list[list[Detection]]:
    """Return each image's detections, boxes in its own pixels; all images go through the model in one padded batch.

    Images are resized as in training: short side 800, long side at most 1333. Runs on the model's device.
    """
    device = next(model.parameters()).device
    tensors = [torch.from_numpy(normalised(image, *standard_size(image))).to(device) for image in images]
    with torch.inference_mode():
        logits, boxes = (output.cpu().numpy() for output in model(*pad_batch(tensors)))
    return [detections(logits[i], boxes[i], image.size, top_k) for i, image in enumerate(images)]
