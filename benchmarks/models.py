"""The CIFAR-10 and MNIST networks of the papers, with module names that read like theirs; knows nothing of pruning."""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ResNet", "lenet_300_100", "lenet_5", "resnet_cifar", "vgg16_cifar"]

VGG16_WIDTHS = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
VGG16_POOLED = (2, 4, 7, 10, 13)  # max pooling follows these convolutions


def vgg16_cifar(num_classes: int = 10) -> nn.Sequential:
    """VGG-16 for 32x32 images: `conv1` ... `conv13` with BatchNorm, `fc1` of 512 neurons, `fc2` for the classes.

    References:
        Simonyan & Zisserman, Very Deep Convolutional Networks, ICLR 2015 (arXiv:1409.1556), as adapted to CIFAR-10 by
        Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017, sec. 4.1 (arXiv:1608.08710).
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for number, width in enumerate(VGG16_WIDTHS, start=1):
        layers[f"conv{number}"] = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        layers[f"bn{number}"] = nn.BatchNorm2d(width)
        layers[f"relu{number}"] = nn.ReLU(inplace=True)
        if number in VGG16_POOLED:
            layers[f"pool{number}"] = nn.MaxPool2d(2)
        channels = width
    layers["flatten"] = nn.Flatten()
    layers["fc1"] = nn.Linear(channels, 512)
    layers["relu_fc1"] = nn.ReLU(inplace=True)
    layers["fc2"] = nn.Linear(512, num_classes)
    return nn.Sequential(layers)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside an option-A shortcut: every second pixel, the new channels filled with zeros."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.padding = (out_channels - in_channels) // 2  # zero channels on either side

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.padding:
            x = F.pad(x, (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(residual + x)


class ResNet(nn.Module):
    """ResNet of depth 6n + 2 for 32x32 images; the n blocks of stage s are `layer{s}.0` ... `layer{s}.{n-1}`.

    References:
        He et al., Deep Residual Learning for Image Recognition, CVPR 2016, sec. 4.2 (arXiv:1512.03385).
    """

    def __init__(self, blocks: int, num_classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def resnet_cifar(depth: int, num_classes: int = 10) -> ResNet:
    """ResNet-20, -32, -44, -56, -110, ... for 32x32 images.

    Raises:
        ValueError: If ``depth`` is not 6n + 2.
    """
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"resnet_cifar({depth}): the depth must be 6n + 2, such as 20, 56 or 110.")
    return ResNet((depth - 2) // 6, num_classes)


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(BasicBlock(out_channels, out_channels, stride=1) for _ in range(blocks - 1)))


def lenet_300_100() -> nn.Sequential:
    """LeNet-300-100 for MNIST: `fc1`, `fc2`, `fc3`, with 266,200 weights.

    References:
        LeCun et al., Gradient-Based Learning Applied to Document Recognition, Proc. IEEE 1998.
    """
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            fc1=nn.Linear(784, 300),
            relu1=nn.ReLU(),
            fc2=nn.Linear(300, 100),
            relu2=nn.ReLU(),
            fc3=nn.Linear(100, 10),
        )
    )


def lenet_5() -> nn.Sequential:
    """LeNet-5 for MNIST, as Caffe has it and Han et al. prune it: 430,500 weights.

    References:
        Han et al., Learning both Weights and Connections for Efficient Neural Networks, NIPS 2015, Table 4.
    """
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 20, 5),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, 5),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            fc1=nn.Linear(800, 500),
            relu=nn.ReLU(),
            fc2=nn.Linear(500, 10),
        )
    )
