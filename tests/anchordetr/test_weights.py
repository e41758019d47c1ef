"""The seeded weights against values of the reference recipe, and against what they are for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from optframe_anchordetr.model import AnchorDETR, build
from optframe_anchordetr.weights import load_seeded_weights, seeded_state_dict, seeded_tensor

# First and last element of entries of each kind, from the reference recipe.
ENDS = {
    "backbone.body.conv1.weight": (-0.02309851348400116, 0.06365308165550232),
    "backbone.body.bn1.running_var": (1.472132682800293, 0.5517617464065552),
    "backbone.body.bn1.running_mean": (0.033277902752161026, 0.03133365139365196),
    "backbone.body.bn1.bias": (0.007021694909781218, 0.08230007439851761),
    "transformer.position.weight": (0.4318605959415436, 0.7022528648376465),
    "transformer.pattern.weight": (-0.47616779804229736, -0.9314442276954651),
    "transformer.adapt_pos1d.0.weight": (0.1061970591545105, -0.1701444536447525),
    "transformer.bbox_embed.5.layers.2.weight": (0.3761760890483856, 0.39167043566703796),
    "transformer.encoder_layers.0.self_attn.in_proj_weight": (0.018543697893619537, 0.11066687852144241),
    "transformer.encoder_layers.0.norm1.weight": (0.9971882104873657, 0.9694091081619263),
    "transformer.encoder_layers.0.ffn.linear1.weight": (0.0724216178059578, -0.008545859716832638),
}
# SHA-256 over the names and bytes of all entries in order of their names.
DIGESTS = {
    "r50-dc5": "f5f6fd5979cbd1cb45dbe5be247c315cfc06649213588415bc307d58bb959134",
    "r101-c5": "fb6f040dced6d74fe996b4faf0c7b951d5455837477a96893d881bc4152c3a69",
    "r50-dc5-mha": "f781b50a05d8a10d5911500d62317a9769bd77185353855dd5785103f45e0df7",
}


@pytest.mark.parametrize("name", ENDS)
def test_tensors_of_each_kind(name: str, state_dict_shapes: Mapping[str, Mapping[str, list[int]]]) -> None:
    shape = tuple(state_dict_shapes["r50-dc5"][name])
    tensor = seeded_tensor(name, shape)
    assert tensor.dtype == np.float32
    assert tensor.shape == shape
    assert (tensor.flat[0], tensor.flat[-1]) == ENDS[name]


@pytest.mark.parametrize("variant", DIGESTS)
def test_every_bit_of_a_variant(variant: str, state_dict_shapes: Mapping[str, Mapping[str, list[int]]]) -> None:
    state = seeded_state_dict({name: tuple(shape) for name, shape in state_dict_shapes[variant].items()})
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].tobytes())
    assert digest.hexdigest() == DIGESTS[variant]


def test_loading_fills_every_entry(seeded_model: AnchorDETR) -> None:
    twin = build(seeded_model.config)
    load_seeded_weights(twin)
    for name, tensor in twin.state_dict().items():
        assert torch.equal(tensor, seeded_model.state_dict()[name]), name
    final = seeded_tensor("transformer.class_embed.5.weight", (91, 256))
    assert np.array_equal(twin.transformer.class_embed[0].weight.detach(), final)


def test_keys_have_their_querys_weights() -> None:
    rcda = seeded_tensor("a.in_proj_weight", (20, 4)).reshape(5, 4, 4)
    plain = seeded_tensor("a.in_proj_weight", (12, 4)).reshape(3, 4, 4)
    assert np.array_equal(rcda[:2], rcda[2:4])
    assert np.array_equal(plain[0], plain[1])
    assert not np.array_equal(rcda[0], rcda[1])
