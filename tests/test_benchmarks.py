"""What the benchmarks stand on: their networks, their batches and their reading of a data folder."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.data import Batches, augment, cifar10
from benchmarks.han2015 import KEPT, left
from benchmarks.han2015_imagenet import KEPT as IMAGENET_KEPT
from benchmarks.han2015_imagenet import NETWORKS
from benchmarks.lottery import LAYERS, ROUNDS
from benchmarks.models import lenet_5, lenet_300_100, resnet_cifar
from lightning_prune import prune_weights

LOAD = """
import numpy as np

CIFAR10_MEAN, CIFAR10_STD = (0.5, 0.0, 0.0), (0.5, 1.0, 1.0)


def cifar10(split, parts=None):
    return np.full((2, 32, 32, 3), 255, dtype=np.uint8), np.arange(2)
"""


def test_augment_is_a_mirrored_crop_of_each_padded_image():
    """The batched index arithmetic gives what padding, cropping and mirroring image by image gives."""
    images = torch.randn(20, 3, 8, 8)
    augmented = augment(images, padding=2, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    top, left = torch.randint(0, 5, (2, 20, 1), generator=generator).tolist()
    mirrored = torch.rand(20, generator=generator) < 0.5
    assert 0 < mirrored.sum() < 20
    for n, padded in enumerate(F.pad(images, (2, 2, 2, 2))):
        crop = padded[:, top[n][0] :, left[n][0] :][:, :8, :8]
        assert torch.equal(augmented[n], crop.flip(-1) if mirrored[n] else crop)


def test_training_batches_visit_every_image_once_and_differently_each_pass():
    """A pass shows each image once; the next pass shows them in another order; equal seeds give equal passes."""
    images, labels = torch.randn(10, 1, 4, 4), torch.arange(10)
    batches = Batches(images, labels, batch_size=4, train=True, seed=3)
    passes = [torch.cat([seen for _, seen in batches]) for _ in range(2)]
    assert len(batches) == 3
    assert all(torch.equal(seen.sort().values, labels) for seen in passes)
    assert not torch.equal(*passes)
    again = Batches(images, labels, batch_size=4, train=True, seed=3)
    assert torch.equal(torch.cat([seen for _, seen in again]), passes[0])


def test_test_batches_are_the_images_as_they_are():
    """Without training, images come in order and untouched."""
    images, labels = torch.randn(5, 1, 4, 4), torch.arange(5)
    assert torch.equal(torch.cat([seen for seen, _ in Batches(images, labels, batch_size=2)]), images)


def test_cifar10_is_normalised_by_the_folder(tmp_path):
    """The folder's mean and deviation are applied channel by channel to images scaled to [0, 1]."""
    (tmp_path / "load.py").write_text(LOAD)
    images, labels = cifar10(tmp_path, "test")
    assert images.shape == (2, 3, 32, 32)
    assert torch.equal(images, torch.ones_like(images))
    assert labels.tolist() == [0, 1]


def test_a_folder_without_a_loader_is_refused(tmp_path):
    """A wrong --data says what is missing and where its interface is written down."""
    with pytest.raises(FileNotFoundError, match="no load.py there"):
        cifar10(tmp_path, "test")


def test_resnet_of_an_impossible_depth_is_refused():
    """Depths are 6n + 2."""
    with pytest.raises(ValueError, match="6n \\+ 2"):
        resnet_cifar(57)


@pytest.mark.parametrize(
    "make, name, weights, kept",
    [(lenet_300_100, "LeNet-300-100", 266_200, 21_776), (lenet_5, "LeNet-5", 430_500, 36_280)],
)
def test_lenets_are_those_of_han(make, name, weights, kept):
    """LeNet-300-100 has 267K and LeNet-5 431K weights, of which the paper's rates leave 22K and 36K."""
    net = make()
    assert sum(p.numel() for p in net.parameters() if p.dim() > 1) == weights
    prune_weights(net, {layer: 1 - share for layer, share in KEPT[name].items()}, scope="global")
    assert left(net) == pytest.approx(kept / weights, rel=1e-4)


def test_rounds_of_the_lottery_are_those_of_the_paper():
    """After 3, 7, 12, 15 and 18 rounds 51.3, 21.1, 7.0, 3.6 and 1.9 % of LeNet-300-100's weights are left."""
    sizes = {"net.fc1": 784 * 300, "net.fc2": 300 * 100, "net.fc3": 100 * 10}
    for number, told in ROUNDS.items():
        stays = sum(size * LAYERS[layer] ** number for layer, size in sizes.items())
        assert round(100 * stays / sum(sizes.values()), 1) == float(told)


@pytest.mark.parametrize(
    ("name", "parameters", "left"), [("AlexNet", 60_965_224, 6.7e6), ("VGG-16", 138_357_544, 10.3e6)]
)
def test_networks_of_imagenet_are_those_of_han(name, parameters, left):
    """As many parameters as Caffe's AlexNet and VGG-16 have; the rates of the layers leave what the paper reports."""
    with torch.device("meta"):
        net = NETWORKS[name][0]()
    assert sum(p.numel() for p in net.parameters()) == parameters
    kept = sum(share * net.get_submodule(layer).weight.numel() for layer, share in IMAGENET_KEPT[name].items())
    assert kept == pytest.approx(left, rel=0.03)  # the paper's rates are whole percents
