"""Numbers on timm's models that only ``reset_classifier`` reads follow a cut."""

import copy

import pytest
import torch

from lightning_prune import load_state_dict_, prune_filters

timm = pytest.importorskip("timm")

MODELS = {
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 1},
    "deit_tiny_distilled_patch16_224": {"img_size": 32, "depth": 1},
    "resnet18": {},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "mobilenetv3_small_050": {},
    "vgg11": {},
    "regnetx_002": {},
}
IMAGE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODELS)
def test_the_classifier_of_a_slim_model_is_replaced(name):
    """A new classifier fits the slim features; numbers are what the outputs show, also in a model that was loaded."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **MODELS[name]).eval()
    other = copy.deepcopy(model)
    prune_filters(model, IMAGE, 0.34, progress=False)
    load_state_dict_(other, model.state_dict())
    for slim in (model, other):
        features = slim.forward_features(IMAGE)
        assert slim.num_features in features.shape
        assert slim.head_hidden_size == slim.forward_head(features, pre_logits=True).shape[1]
        slim.reset_classifier(7)
        assert slim(IMAGE).shape == (1, 7)
