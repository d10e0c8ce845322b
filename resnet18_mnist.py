# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "matplotlib>=3.10"]
# ///
"""ResNet on MNIST in one file: the network, its data, its training, its pictures.

    python resnet18_mnist.py --epochs 10        train, test on the 10,000, draw the pictures
    python resnet18_mnist.py evaluate           test the newest run's best network again
    python resnet18_mnist.py predict digit.png  read a digit from an image file
    python resnet18_mnist.py describe           each layer's shape, parameters and FLOPs

Measured on 10,000 test images, three seeds each: 99.43 ± 0.06 % after ten epochs; 99.55 ± 0.03 %
after six with --recipe fast, which takes five to eight minutes on two CPU cores.

The sections, each a notebook cell, and the sections above that each one needs:

    0  Imports       and errors that the user can mend
    1  Network       the residual block, and five depths built from it       0
    2  Data          70,000 digits as tensors; a batch is an index           0
    3  Device        where to compute, how, and with how many processes      0
    4  Recipe        every hyperparameter and its default                    0 to 2
    5  Training      an epoch, early stopping, checkpoints, the whole run    0 to 4
    6  Pictures      curves, confusion matrix, mistakes, feature maps        0 to 5
    7  Own digits    from image files and from Kaggle's tables               0 to 5
    8  Other nets    to compare with, and weights to start from              0 to 5
    9  Command line  train, evaluate, predict, describe                      0 to 8

Whoever stops after section 5 has read the whole idea.

Sources
    He, Zhang, Ren, Sun 2015a  Deep Residual Learning for Image Recognition  arXiv:1512.03385
    He, Zhang, Ren, Sun 2015b  Delving Deep into Rectifiers                  arXiv:1502.01852
    Simard et al. 2003         Best Practices for Convolutional Neural Networks
    Ioffe, Szegedy 2015        Batch Normalization                           arXiv:1502.03167
    Goyal et al. 2017          Accurate, Large Minibatch SGD                 arXiv:1706.02677
    Izmailov et al. 2018       Averaging Weights Leads to Wider Optima       arXiv:1803.05407
    Otsu 1979                  A Threshold Selection Method from Gray-Level Histograms
    LeCun, Cortes, Burges      The MNIST Database      http://yann.lecun.com/exdb/mnist/
    LeCun et al. 1998          Gradient-Based Learning Applied to Document Recognition
"""

# %% 0. Imports

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import ctypes
import io
import itertools
import math
import os
import platform
import random
import re
import shlex
import shutil
import statistics
import sys
import textwrap
import time
import warnings
import zipfile
from collections import OrderedDict, namedtuple
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps, ImageStat
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets, models
from torchvision.transforms.v2 import functional as TF


class UserError(Exception):
    """A mistake that the user can mend: the command line says it in one line and exits with 2."""


@contextlib.contextmanager
def explaining(message: str, errors=Exception) -> Iterator[None]:
    """Turn these errors into a UserError with this message, and the system's reason if any."""
    try:
        yield
    except errors as error:
        why = getattr(error, "strerror", None)
        raise UserError(f"{message}: {why}" if why else message) from error


# %% 1. Network
#
# A plain network asks a stack of layers for a mapping H(x). A residual network asks it only for
# the difference to its input, F(x) = H(x) - x, and adds x again: y = F(x) + x (He 2015a, eq. 1).
# Where the identity is nearly right, small weights suffice, so a deeper network need not train
# worse than a shallower one, as plain networks do (fig. 1).
#
# Layers have torchvision's names and order, so that weights go from one to the other as they are.


class Conv3x3(nn.Conv2d):
    """nn.Conv2d, computed faster in training where the kernel has only one position."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of x (N, in, H, W)."""
        height, width = x.shape[2:]
        one_position = max(height, width) <= self.stride[0]
        if not (self.training and one_position):
            return super().forward(x)
        # On a 1×1 map, or with stride 2 on 2×2, most of the nine taps meet only padding. Without
        # them the sum is a matrix product of the same terms, and faster. In eval mode it stays the
        # convolution, so that the logits are torchvision's to the last bit.
        taps = self.weight[:, :, 1 : 1 + height, 1 : 1 + width]
        return F.linear(x.flatten(1), taps.flatten(1))[:, :, None, None]


def conv3x3(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """3×3 convolution with padding 1: (N, in, H, W) → (N, out, ⌈H/stride⌉, ⌈W/stride⌉)."""
    # No bias: the batch norm behind it subtracts the mean, and a bias with it (Ioffe 2015, 3.2).
    return Conv3x3(in_planes, out_planes, 3, stride=stride, padding=1, bias=False)


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """1×1 convolution, which mixes channels: (N, in, H, W) → (N, out, ⌈H/stride⌉, ⌈W/stride⌉)."""
    return nn.Conv2d(in_planes, out_planes, 1, stride=stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut around them (He 2015a, fig. 5 left).

    (N, inplanes, H, W) → (N, planes, ⌈H/stride⌉, ⌈W/stride⌉): "planes" are channels. Where the
    two shapes differ, the module ``downsample`` takes the shortcut from one to the other (eq. 2).
    """

    expansion = 1  # channels that leave the block, divided by planes

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample=None):
        super().__init__()
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(F(x) + shortcut(x)); an identity shortcut hands the gradient on as it is."""
        residual = self.relu(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        shortcut = x if self.downsample is None else self.downsample(x)
        # The last ReLU comes after the sum: a residual must be able to subtract.
        return self.relu(residual + shortcut)


class Bottleneck(nn.Module):
    """1×1 to ``planes`` channels, 3×3 there, 1×1 to four times as many (fig. 5 right).

    On 256 channels it costs about what a BasicBlock costs on 64: that makes 50 layers and more
    affordable. (N, inplanes, H, W) → (N, 4·planes, ⌈H/stride⌉, ⌈W/stride⌉).
    """

    expansion = 4

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample=None):
        super().__init__()
        self.conv1 = conv1x1(inplanes, planes)
        self.bn1 = nn.BatchNorm2d(planes)
        # The original network strides in the first 1×1, which skips three pixels of four; the 3×3
        # reads all of them (Goyal 2017, 5.1).
        self.conv2 = conv3x3(planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = conv1x1(planes, planes * self.expansion)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(F(x) + shortcut(x))."""
        residual = self.relu(self.bn1(self.conv1(x)))
        residual = self.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(residual + shortcut)


def no_shortcut(x: Tensor) -> float:
    """In place of ``downsample`` it makes a network plain: nothing is added (fig. 3 middle)."""
    return 0.0


STEMS = ("imagenet", "cifar")


class ResNet(nn.Module):
    """A stem, four stages of blocks, the mean of the last map, a linear classifier.

    The stages are layer1 to layer4, as in torchvision; ``layers`` are their numbers of blocks.
    The "imagenet" stem, a 7×7 with stride 2 and a max-pool, reduces each side to a quarter. The
    "cifar" stem, a 3×3 with stride 1, keeps every pixel of a small image, as the first layer of
    the paper's networks for CIFAR-10 does (He 2015a, 4.2). With ``plain`` the same layers have no
    shortcuts, and no projections, to show what these do.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: list[int],
        num_classes: int = 10,
        input_channels: int = 1,
        stem: str = "imagenet",
        plain: bool = False,
    ):
        super().__init__()
        if stem not in STEMS:
            raise ValueError(f"stem {stem!r} is none of {STEMS}")
        self.inplanes = 64  # channels that the next block receives
        self.plain = plain
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(input_channels, 64, 7, stride=2, padding=3, bias=False)
        else:
            self.conv1 = conv3x3(input_channels, 64)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1) if stem == "imagenet" else nn.Identity()
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], stride=2)
        self.layer3 = self._make_layer(block, 256, layers[2], stride=2)
        self.layer4 = self._make_layer(block, 512, layers[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        for module in self.modules():  # batch norms begin at weight 1 and bias 0 by themselves
            if isinstance(module, nn.Conv2d):
                # A variance of 2/fan-out keeps a gradient's size through ReLUs (He 2015b, 2.2).
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _make_layer(self, block, planes: int, blocks: int, stride: int = 1) -> nn.Sequential:
        outplanes = planes * block.expansion
        shortcut = no_shortcut if self.plain else None  # None is the identity
        downsample = shortcut
        if not self.plain and (stride != 1 or self.inplanes != outplanes):
            # A projection where the shape changes, the identity elsewhere (He 2015a, 4.1, B).
            projection = conv1x1(self.inplanes, outplanes, stride)
            downsample = nn.Sequential(projection, nn.BatchNorm2d(outplanes))
        first = block(self.inplanes, planes, stride, downsample)
        self.inplanes = outplanes
        others = (block(outplanes, planes, downsample=shortcut) for _ in range(blocks - 1))
        return nn.Sequential(first, *others)

    def get_feature_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return what stem, stages and pooling make of images (N, C, H, W), by their names."""
        maps = {}  # the shapes: of ResNet-18 for 1×28×28 ("imagenet") / for 3×32×32 ("cifar")
        x = self.relu(self.bn1(self.conv1(images)))  # (N, 64, 14, 14) / (N, 64, 32, 32)
        maps["stem"] = x = self.maxpool(x)  #          (N, 64, 7, 7)   / (N, 64, 32, 32)
        maps["layer1"] = x = self.layer1(x)  #         (N, 64, 7, 7)   / (N, 64, 32, 32)
        maps["layer2"] = x = self.layer2(x)  #         (N, 128, 4, 4)  / (N, 128, 16, 16)
        maps["layer3"] = x = self.layer3(x)  #         (N, 256, 2, 2)  / (N, 256, 8, 8)
        maps["layer4"] = x = self.layer4(x)  #         (N, 512, 1, 1)  / (N, 512, 4, 4)
        maps["pooled"] = torch.flatten(self.avgpool(x), 1)  #            (N, 512)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits: (N, C, H, W) → (N, num_classes)."""
        return self.fc(self.get_feature_maps(images)["pooled"])


# Which block, and how many of it in each stage (He 2015a, table 1). All take num_classes,
# input_channels, stem and plain.
resnet18 = partial(ResNet, BasicBlock, [2, 2, 2, 2])
resnet34 = partial(ResNet, BasicBlock, [3, 4, 6, 3])
resnet50 = partial(ResNet, Bottleneck, [3, 4, 6, 3])
resnet101 = partial(ResNet, Bottleneck, [3, 4, 23, 3])
resnet152 = partial(ResNet, Bottleneck, [3, 8, 36, 3])
DEPTHS = {18: resnet18, 34: resnet34, 50: resnet50, 101: resnet101, 152: resnet152}
MODELS = {f"resnet{depth}": build for depth, build in DEPTHS.items()}


def first_conv(model: nn.Module) -> tuple[str, nn.Conv2d]:
    """Return the convolution that meets the image, with its name."""
    return next((n, part) for n, part in model.named_modules() if isinstance(part, nn.Conv2d))


Layer = namedtuple("Layer", "name shape parameters flops live")


@torch.no_grad()
def list_layers(model: nn.Module, image: Tensor) -> list[Layer]:
    """Send one image (1, C, H, W) through the model; return its layers in running order.

    Shapes are C×H×W. Parameters include those of the batch norm behind a layer. FLOPs are forward
    and count a multiply-add as two, where the paper counts one. ``live`` is the share of a
    layer's weights that the image can reach.
    """
    rows, calls, counter = [], [], FlopCounterMode(display=False)
    model = copy.deepcopy(model).eval()  # the hooks go on a copy
    for name, part in model.named_modules():
        leaf = not list(part.children())
        if leaf and (list(part.parameters()) or "Pool" in type(part).__name__):
            part.register_forward_hook(lambda *call, name=name: calls.append((name, *call)))
    with counter:
        model(image)
    for name, layer, (x, *_), y in calls:
        parameters = sum(p.numel() for p in layer.parameters())
        if isinstance(layer, nn.BatchNorm2d) and rows:
            rows[-1] = rows[-1]._replace(parameters=rows[-1].parameters + parameters)
            continue
        live = 1.0
        if isinstance(layer, nn.Conv2d):
            # A weight is dead if it meets padding at every position of the kernel, as eight of
            # nine do on a 1×1 map.
            window = layer.kernel_size, layer.dilation, layer.padding, layer.stride
            live = F.unfold(torch.ones_like(x[:, :1]), *window).amax(dim=2).mean().item()
        flops = counter.get_flop_counts().get(f"{type(model).__name__}.{name}", {})
        shape = "×".join(str(side) for side in y.shape[1:])
        rows.append(Layer(name, shape, parameters, sum(flops.values()), live))
    parameters = sum(p.numel() for p in model.parameters()) - sum(row.parameters for row in rows)
    flops = counter.get_total_flops() - sum(row.flops for row in rows)
    if parameters or flops:  # of an attention's own matrices, say, which are no module
        rows.append(Layer("outside of layers", "", parameters, flops, 1.0))
    return rows


def visualize_model_architecture(model: nn.Module, image_size: int | None = None) -> None:
    """Print the layers that an image of this size (default: 28 if gray, 32 if RGB) meets."""
    weight = first_conv(model)[1].weight
    channels = weight.shape[1]
    size = image_size or (28 if channels == 1 else 32)
    rows = list_layers(model, weight.new_zeros(1, channels, size, size))
    parameters, flops = sum(row.parameters for row in rows), sum(row.flops for row in rows)
    live = sum(row.parameters * row.live for row in rows) / parameters
    width = max(21, *(len(row.name) for row in rows))
    print(f"{'layer':{width}}{'output':>10}{'parameters':>13}{'FLOPs':>15}{'live':>9}")
    print(f"{'input':{width}}{f'{channels}×{size}×{size}':>10}")
    for name, shape, *counts in [*rows, Layer("total", "", parameters, flops, live)]:
        print(f"{name:{width}}{shape:>10}" + "{:13,}{:15,}{:9.1%}".format(*counts))
    print("FLOPs: one image forward, a multiply-add counted as two.")
    print("live: share of the weights that can meet a pixel; the others meet only padding.")


# %% 2. Data
#
# MNIST is 55 MB of bytes: it lives as uint8 tensors on the device that trains. A batch is an index
# into them, made float, augmented and normalised as a whole. With no Python per image and no
# worker process, making a batch takes little next to training on it.

# Channels, and pixels a side. Of 56 pixels the 7×7 stem leaves 14 a side, of 28 only 7.
INPUTS = {"gray28": (1, 28), "gray56": (1, 56), "rgb32": (3, 32), "rgb224": (3, 224)}
# Mean and deviation of pixels scaled to 0–1: of MNIST's 60,000 training images, and of the 42,000
# in Kaggle's train.csv.
STATISTICS = {"mnist": (0.1307, 0.3081), "kaggle": (0.1310, 0.3085), "none": (0.0, 1.0)}

TEST_BATCH = 250  # images a batch, where no gradients are kept: the fastest that was measured

# Images (N, 28, 28) uint8, light ink on dark ground, with labels (N,) int64 from 0 to 9.
Digits = namedtuple("Digits", "name train_images train_labels test_images test_labels")


def read_mnist(data_dir: str | Path) -> Digits:
    """Read ``data_dir``/MNIST/raw, download what is missing; UserError where a file is damaged."""
    raw, mnist, parts = Path(data_dir, "MNIST", "raw"), datasets.mnist, []
    # Images and labels to train on, then to test on.
    files = [raw / name.removesuffix(".gz") for name, _ in datasets.MNIST.resources]
    try:
        if not all(path.is_file() for path in files):
            datasets.MNIST(data_dir, download=True)
    except Exception as error:
        if getattr(error, "filename", None):  # a folder that cannot be written, say
            raise
        why = str(error).strip().rpartition("\n")[2]
        bad = [n for n, md5 in datasets.MNIST.resources if not mnist.check_integrity(raw / n, md5)]
        what = f"missing or damaged in {raw}: {', '.join(bad)}"
        raise UserError(f"MNIST cannot be downloaded ({why}); {what}") from error
    for path in files:
        read = mnist.read_image_file if "images" in path.name else mnist.read_label_file
        with explaining(f"{path} is damaged: delete it, and it is made again"):
            parts.append(read(path))
    for name, images, labels in (("train", *parts[:2]), ("t10k", *parts[2:])):
        if images.shape != (len(labels), 28, 28) or not len(labels) or labels.max() > 9:
            raise UserError(f"{name}-images and {name}-labels in {raw} do not fit each other")
    return Digits("mnist", *parts)


def split_by_class(labels: Tensor, val_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return shuffled indices (train, validation); each class has the same share in both."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = order[labels[order].argsort(stable=True)]
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    # In a list sorted by class, every twelfth image, say, makes a twelfth of each class.
    held_out[by_class[torch.arange(val_size) * len(labels) // max(val_size, 1)]] = True
    return order[~held_out[order]], order[held_out[order]]


Distortion = namedtuple("Distortion", "rotate shift stretch elastic", defaults=(0, 0, 0, 0))


def distort(images: Tensor, draws: list[Tensor], by: Distortion) -> Tensor:
    """Turn, move, stretch and bend each image (N, C, H, W), at random and by so much at most.

    ``by`` has degrees, and parts of the side for the rest. Each image has draws of its own in
    [-1, 1), in the rows of (N, 3), (N, 3), (N, 72): torchvision's transforms give one to a whole
    batch (its issue 8484). What moves in from outside is 0, background.
    """
    move, stretch, pull = draws
    angle = move[:, 0] * math.radians(by.rotate)
    cos, sin = angle.cos(), angle.sin()
    # theta = [cos -sin dx; sin cos dy] maps the place of an output pixel to that of the input
    # pixel that it copies; places go from -1 to 1 across the image.
    dx, dy = 2 * by.shift * move[:, 1:].T
    wide, slant, high = by.stretch * stretch.T
    theta = torch.stack([cos + wide, slant - sin, dx, sin, cos + high, dy], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    if by.elastic:
        # Pull at 6×6 points, and bend what lies between. Simard et al. 2003 draw for every pixel
        # and smooth what they drew.
        pull = 2 * by.elastic * pull.view(-1, 2, 6, 6)
        bend = F.interpolate(pull, size=images.shape[2:], mode="bilinear")
        grid = grid + bend.permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, align_corners=False)


class Batches:
    """Digits on one device; iterating gives (images, labels) as a network wants them.

    ``images`` (N, 28, 28) uint8 become (batch_size, C, S, S) float, of the shape that ``input``
    names and normalised; ``augment`` distorts them. Order and augmentation are drawn from torch's
    own random numbers, as in a DataLoader. The last batch may be shorter, or a little longer.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int = 128,
        input: str = "gray28",
        normalize: str = "mnist",
        shuffle: bool = False,
        augment: Distortion | None = None,
    ):
        self.images, self.labels = images[:, None], labels  # (N, 1, 28, 28), (N,)
        self.channels, self.size = INPUTS[input]
        self.mean, self.std = STATISTICS[normalize]
        self.batch_size, self.shuffle, self.augment = batch_size, shuffle, augment
        self.rank, self.ranks = 0, 1  # this process, and how many share a batch (section 3)

    def __len__(self) -> int:
        return len(self._cuts()) + 1

    def to(self, device: torch.device | str, rank: int = 0, ranks: int = 1) -> Batches:
        """Move the images to ``device``, once for all batches to come.

        Of ``ranks`` processes, each then gets its own part of every batch, if all have seeded
        torch's random numbers alike, as ResNetTrainer does for each epoch.
        """
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        self.rank, self.ranks = rank, ranks
        return self

    def _cuts(self) -> list[int]:
        """Return where, in the order of an epoch, a new batch begins."""
        cuts = list(range(self.batch_size, len(self.labels), self.batch_size))
        # Batch norm on a 1×1 map needs two images: a last batch with fewer joins the one before.
        if cuts and len(self.labels) - cuts[-1] < 2 * self.ranks:
            cuts.pop()
        return cuts

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n, device = len(self.labels), self.images.device
        # Drawn on the CPU, so that all devices see the same.
        order = torch.randperm(n) if self.shuffle else torch.arange(n)
        counts = (3, 3, 72) if self.augment else ()  # what distort() asks for
        draws = [(2 * torch.rand(n, k) - 1).to(device) for k in counts]
        for index in order.to(device).tensor_split(self._cuts()):
            index = index.tensor_split(self.ranks)[self.rank]
            x = TF.resize(self.images[index], [self.size, self.size], antialias=False)
            x = x.float() / 255  # (N, 1, S, S)
            if self.augment:
                x = distort(x, [part[index] for part in draws], self.augment)
            x = (x - self.mean) / self.std
            yield x.expand(-1, self.channels, -1, -1), self.labels[index]


class MNISTDataLoader:
    """MNIST as three loaders: ``.train``, ``.val`` and ``.test``.

    ``val_size`` images (default: a twelfth, 5,000 of the 60,000) are held out of the training set.
    ``select_on="test"`` holds none out and makes ``.val`` the test set, as many scripts do; where
    there are no test labels, ``.test`` is ``.val`` and ``.unlabelled`` the test images (or None).
    ``limit`` keeps so many training images, ``augment`` distorts them (True: a little), ``seed``
    decides which are held out.
    """

    def __init__(
        self,
        batch_size: int = 128,
        data_dir: str | Path = "data",
        dataset: str | Digits = "auto",
        input: str = "gray28",
        normalize: str = "mnist",
        val_size: int | None = None,
        select_on: str = "val",
        limit: int | None = None,
        augment: bool | Distortion = False,
        seed: int = 0,
    ):
        digits = load_digits(dataset, data_dir, seed) if isinstance(dataset, str) else dataset
        self.name, images, labels, *test = digits
        on_test, labelled = select_on == "test", test[1] is not None
        if on_test and not labelled:
            raise UserError(f"{self.name} has no test labels to select on")
        val_size = len(labels) // 12 if val_size is None else val_size
        if not on_test and not 0 < val_size <= len(labels) - 2:
            raise UserError(f"--val-size {val_size} does not fit {len(labels)} training images")
        train, val = split_by_class(labels, 0 if on_test else val_size, seed)
        train, make = train[:limit], partial(Batches, input=input, normalize=normalize)
        augment = Distortion(10, 0.1) if augment is True else augment or None
        self.train = make(images[train], labels[train], batch_size, shuffle=True, augment=augment)
        self.val = make(images[val], labels[val], TEST_BATCH)
        self.test = make(*test, TEST_BATCH) if labelled else self.val
        self.val = self.test if on_test else self.val
        self.unlabelled = None if labelled else test[0]

    def get_data_loaders(self) -> tuple[Batches, Batches]:
        """Return (train, test)."""
        return self.train, self.test


def load_digits(dataset: str, data_dir: str | Path, seed: int) -> Digits:
    """Load "mnist", "synthetic" or "auto": MNIST, or synthetic digits if there is nothing of it."""
    if dataset not in ("auto", "mnist", "synthetic"):
        raise ValueError(f"dataset {dataset!r} is none of auto, mnist, synthetic")
    if dataset != "synthetic":
        try:
            return read_mnist(data_dir)
        except UserError as error:
            if dataset == "mnist" or any(Path(data_dir, "MNIST", "raw").glob("*-ubyte*")):
                raise
            print(f"WARNING: {error}.\nGoing on with SYNTHETIC digits.", file=sys.stderr)
    return draw_synthetic_digits(seed)


def draw_synthetic_digits(seed: int, train_size: int = 6000, test_size: int = 1000) -> Digits:
    """Draw digits of random font, size, place, rotation and stroke, with matplotlib's fonts."""
    import matplotlib

    symbols = ("Display", "LastResort", "NonUni", "Siz", "cmex", "cmmi", "cmsy")  # hold no digits
    paths = sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf"))
    paths = [path for path in paths if not any(name in path.name for name in symbols)]
    fonts = [ImageFont.truetype(path, size) for path in paths for size in range(32, 51, 3)]
    rng = random.Random(seed)

    def draw(digit: int) -> Tensor:
        canvas = Image.new("L", (56, 56))  # twice the size: shrinking smooths the edges
        place, stroke = (rng.uniform(22, 34), rng.uniform(22, 34)), rng.randint(0, 2)
        pen = ImageDraw.Draw(canvas)
        pen.text(place, str(digit), 255, rng.choice(fonts), anchor="mm", stroke_width=stroke)
        canvas = canvas.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR)
        return TF.pil_to_tensor(canvas.reduce(2))[0]

    labels = torch.arange(train_size + test_size) % 10
    images = torch.stack([draw(digit) for digit in labels.tolist()])
    n = train_size
    return Digits("synthetic", images[:n], labels[:n], images[n:], labels[n:])


# %% 3. Device
#
# bfloat16 keeps the exponent of float32 in half the bytes: hardware that multiplies it is faster,
# and gradients need no scaling against underflow, as they do in float16.


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """Return the named device ("cpu", "cuda:1", "mps", "xpu") or the best; else UserError."""
    present = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    present += ["mps"] * torch.backends.mps.is_available()
    present += [f"xpu:{i}" for i in range(torch.xpu.device_count())] + ["cpu"]
    for device in present:
        if name is None or str(name) in (device, device.partition(":")[0], f"{device}:0"):
            return torch.device(device)
    raise UserError(f"there is no device {str(name)!r} here; there is {', '.join(present)}")


def describe_device(device: torch.device) -> str:
    """Return the device with the name that its maker gave it."""
    if device.type in ("cuda", "xpu"):
        return f"{device} ({getattr(torch, device.type).get_device_name(device)})"
    name = torch.cpu.get_capabilities().get("cpu_name") or platform.machine()
    return f"{device} ({name}, threads: {torch.get_num_threads()})"


def pick_precision(name: str, device: torch.device) -> str:
    """Turn "auto" into "bf16" where the device is known to compute it in hardware, or "fp32"."""
    if name != "auto":
        return name
    has = torch.cpu.get_capabilities()
    fast = device.type == "cpu" and (has.get("avx512_bf16") or has.get("amx_bf16"))
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    return "bf16" if fast else "fp32"


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    """Return the context in which convolutions compute in ``precision``; weights stay float32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16")


def keep_freed_memory() -> None:
    """Let the C library keep what was freed for the next step, where it is glibc.

    glibc gives large blocks back to the system; fetching them anew, page by page, adds an eighth to
    a step on 32×32 maps (README, Speed).
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
        mallopt(-4, 0)  # M_MMAP_MAX: no block comes from the system directly


# torchrun starts a program several times, perhaps on several machines. Each process, a "rank",
# trains on its part of every batch; DistributedDataParallel averages their gradients, so that all
# take the same step. What else they have to tell each other is here.


def join_ranks(device: torch.device) -> torch.device:
    """Join the processes that torchrun started, if it did; return this one's device."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return device
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"torchrun works with --device cpu or cuda here, not with {device}")
    if device.type == "cuda":
        device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def is_distributed() -> bool:
    """Return whether this is one of several processes that train together."""
    return dist.is_available() and dist.is_initialized()


def rank_and_ranks() -> tuple[int, int]:
    """Return which process this is, and how many there are: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def gather(content) -> list:
    """Return what each rank gave: numbers, text, tensors on the CPU, or lists of these."""
    contents = [content] * rank_and_ranks()[1]
    if is_distributed():
        dist.all_gather_object(contents, content)
    return contents


def weigh(images: int, device: torch.device | str) -> Tensor | float:
    """Return a factor for this rank's loss: with it, the mean over ranks is one over images."""
    if not is_distributed():
        return 1.0
    total = torch.full((), float(images), device=device)
    dist.all_reduce(total)
    return images * dist.get_world_size() / total


# %% 4. Recipe
#
# A recipe is every choice that decides the numbers of a run. In Recipe below each line has a name,
# its default and its meaning; option() turns them into flags of the command line.

DATASETS = ("auto", "mnist", "synthetic", "kaggle")
SCHEDULERS = ("plateau", "step", "cosine", "onecycle", "none")
PER_UPDATE = ("cosine", "onecycle")  # these change the rate within an epoch
OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "nesterov": partial(torch.optim.SGD, nesterov=True),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}


def option(default, text: str, choices=(), low: float | None = None, high: float = 2**32, **flag):
    """Return a field with its help and flag; values are of ``choices``, or low ≤ value < high."""
    if isinstance(default, bool):
        flag["action"] = argparse.BooleanOptionalAction
    elif choices:
        flag["choices"] = choices
    else:
        kind = flag.setdefault("type", type(default))
        flag.setdefault("metavar", {int: "N", float: "X", str: "NAME"}[kind])
    told = "" if default in (None, ()) else f" (default: {default})"
    flag |= {"help": text + told, "default": argparse.SUPPRESS}
    return field(default=default, metadata={"flag": flag, "limits": (choices, low, high)})


@dataclass(frozen=True)
class Recipe:
    """All that decides the numbers of a run. Each field is a flag of the command line."""

    model: str = option("resnet18", "network: resnet18, 34, 50, 101, 152, lenet5, simple_cnn, ...")
    input: str = option("gray28", "gray or RGB, and pixels a side, as resized", tuple(INPUTS))
    stem: str = option("auto", "auto: cifar for rgb32, else imagenet", ("auto", *STEMS))
    plain: bool = option(False, "the same layers without shortcuts, to see what these do")
    weights: str | None = option(None, "start from: imagenet, or a file", type=str, metavar="FILE")
    freeze: Sequence[str] = option((), "what stays as it is: conv1 bn1 ...", type=str, nargs="+")
    dataset: str = option("auto", "auto: mnist, or synthetic if missing", DATASETS)
    normalize: str = option("mnist", "statistics that pixels are normalised by", tuple(STATISTICS))
    val_size: int | None = option(None, "images to select on (default: a twelfth)", low=1, type=int)
    select_on: str = option("val", "the set that selects; test is optimistic", ("val", "test"))
    limit: int | None = option(None, "images to train on (default: all)", low=2, type=int)
    augment: bool = option(True, "distort the training images, as the next four say")
    rotate: float = option(10.0, "degrees to turn them by, at most", low=0, high=181)
    shift: float = option(0.1, "part of the side to shift them by, at most", low=0, high=1)
    stretch: float = option(0.0, "part to stretch and slant them by, at most", low=0, high=1)
    elastic: float = option(0.0, "part of the side to bend them by, at most", low=0, high=1)
    epochs: int = option(10, "passes over the training images (early stopping may end it)", low=1)
    batch_size: int = option(128, "images a batch, over all processes", low=2)
    accumulate: int = option(1, "batches whose gradients make one update", low=1)
    label_smoothing: float = option(0.0, "probability given to all digits alike", low=0, high=1)
    optimizer: str = option("sgd", "what turns a gradient into an update", tuple(OPTIMIZERS))
    lr: float = option(0.01, "learning rate; the highest, for onecycle", low=0)
    momentum: float = option(0.9, "momentum of sgd and nesterov", low=0, high=1)
    weight_decay: float = option(5e-4, "weight decay, of all parameters", low=0)
    scheduler: str = option("plateau", "what changes the learning rate", SCHEDULERS)
    lr_factor: float = option(0.3, "factor of lr at a plateau or a step", low=0, high=1)
    lr_patience: int = option(0, "plateau: bad epochs before the rate falls", low=0)
    lr_step: int = option(5, "step: epochs from one to the next", low=1)
    ema: float = option(0.0, "decay of a running mean of the weights; 0: no mean", low=0, high=1)
    patience: int = option(5, "bad epochs, without a lower loss, that end the run", low=1)
    tta: bool = option(False, "test an image and its shifts by a pixel, and take the mean")
    test_train: bool = option(False, "after each epoch, test on the training images too")
    seed: int = option(0, "fixes split, initial weights, order and augmentation", low=0)
    precision: str = option("auto", "auto: bf16 where that is fast", ("auto", "fp32", "bf16"))
    compile: bool = option(False, "let torch.compile translate the network that trains")
    deterministic: bool = option(False, "the same numbers again on a GPU too, more slowly")

    def __post_init__(self):
        if self.optimizer == "nesterov" and not self.momentum:
            raise UserError("nesterov needs a momentum above 0")
        for setting in fields(self):
            value, (choices, low, high) = getattr(self, setting.name), setting.metadata["limits"]
            kind = setting.metadata["flag"].get("type", type(setting.default))
            numbers = (int, float) if kind is float else kind
            parts = value if isinstance(setting.default, tuple) else [value]
            if value != setting.default and not all(isinstance(part, numbers) for part in parts):
                raise UserError(f"{setting.name} is {value!r}, not {kind.__name__}")
            if choices and value not in choices:
                raise UserError(f"{setting.name} is {value!r}, not one of {', '.join(choices)}")
            if low is not None and value is not None and not low <= value < high:
                raise UserError(f"{setting.name} is {value}, not from {low} to below {high}")


# Ways in which ResNets are trained on MNIST (README, Recipes); what is not named has its default.
# A patience of 99 switches early stopping off.
# fmt: off
RECIPES = {
    "plateau":   Recipe(),
    "rgb32":     Recipe(input="rgb32", augment=False, scheduler="none", patience=99),
    "adam":      Recipe(normalize="none", augment=False, optimizer="adam", lr=0.001,
                        weight_decay=0.0, scheduler="none", patience=99, test_train=True),
    "kaggle":    Recipe(dataset="kaggle", normalize="kaggle", val_size=4200, shift=0.0, epochs=15,
                        batch_size=32, optimizer="adam", lr=0.01, weight_decay=0.0,
                        scheduler="step", lr_step=5, lr_factor=0.05, patience=10),
    "augmented": Recipe(optimizer="adam", lr=0.001, weight_decay=1e-4, scheduler="step",
                        lr_step=7, lr_factor=0.1, patience=99),
    "fast":      Recipe(rotate=6.0, shift=0.05, stretch=0.06, epochs=6, batch_size=256,
                        optimizer="nesterov", lr=0.2, scheduler="onecycle", patience=99),
    "best":      Recipe(input="gray56", stretch=0.1, elastic=0.03, optimizer="nesterov", lr=0.1,
                        scheduler="onecycle", tta=True, patience=99),
}
# fmt: on


# %% 5. Training
#
# train_one_epoch() and evaluate() are its core. ResNetTrainer repeats them, lowers the
# learning rate on a plateau, stops when nothing improves any more, and after each epoch writes
# down all that is needed to go on as if nothing had happened.


def check_finite(losses: list[Tensor]) -> Tensor:
    """Return the losses as one tensor; raise FloatingPointError if one is not finite."""
    values = torch.stack(losses).cpu()
    if not values.isfinite().all():
        step = values.isfinite().int().argmin().item()
        raise FloatingPointError(f"the loss became {values[step].item()} at step {step + 1}")
    return values


def set_training(model: nn.Module) -> None:
    """Set a model to training, but keep the statistics of batch norms with frozen parameters."""
    model.train()
    for layer in model.modules():
        if hasattr(layer, "running_mean") and not all(p.requires_grad for p in layer.parameters()):
            layer.eval()


def train_one_epoch(
    model: nn.Module,
    loader,
    optimizer: torch.optim.Optimizer,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    accumulate: int = 1,
    label_smoothing: float = 0,
    title: str | None = None,
) -> dict:
    """Go through the loader once; return loss (mean, nats), accuracy (%) and images_per_second.

    Loss and accuracy are of the batches as the model met them, still learning: they may be worse
    than in a test right after. Also returns batch_losses, of every 50th batch. With a ``title`` it
    shows how it goes: one live line on a terminal, a line every 100 batches in a pipe.

    Raises FloatingPointError where a loss is no longer finite.
    """
    set_training(model)
    optimizer.zero_grad()
    # Left on the device, so that only a check of them (below) waits for the steps before.
    sizes, losses, correct = [], [], []
    started = shown = time.perf_counter()
    for step, (images, labels) in enumerate(loader):
        images, labels = images.to(device), labels.to(device)  # (N, C, H, W), (N,)
        with autocast(device, precision):
            logits = model(images)  # (N, 10)
            loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        # An update's gradient is the mean over its group of batches; the last group may be short.
        group = min(accumulate, len(loader) - step // accumulate * accumulate)
        (loss / group * weigh(len(labels), device)).backward()
        if (step + 1) % accumulate == 0 or step + 1 == len(loader):
            optimizer.step()
            optimizer.zero_grad()
        sizes.append(len(labels))
        losses.append(loss.detach())
        correct.append((logits.argmax(dim=1) == labels).sum())

        now = time.perf_counter()
        if (step + 1) % 100 == 0 or (title and sys.stdout.isatty() and now - shown > 0.2):
            shown, loss_so_far = now, check_finite(losses).mean()
            if title:
                seen = sum(sizes) * rank_and_ranks()[1]  # each rank has as many
                elapsed = now - started
                left = elapsed * (len(loader) / (step + 1) - 1)
                line = f"{title}  batch {step + 1}/{len(loader)}  loss {loss_so_far:.4f}  "
                show_progress(f"{line}{seen / elapsed:,.0f} images/s  {left:.0f} s left")
    counts = torch.tensor(sizes)  # (steps,), as are the others
    table = torch.stack([check_finite(losses) * counts, torch.stack(correct).cpu(), counts])
    losses, correct, counts = sum(gather(table))  # over the ranks
    return {
        "loss": (losses.sum() / counts.sum()).item(),
        "accuracy": (100 * correct.sum() / counts.sum()).item(),
        "batch_losses": (losses / counts)[::50].tolist(),
        "images_per_second": counts.sum().item() / (time.perf_counter() - started),
    }


@torch.no_grad()
def measure_statistics(
    model: nn.Module, loader, device: torch.device | str = "cpu", precision: str = "fp32"
) -> None:
    """Set the running statistics of batch norms to their mean over the loader's first 50 batches.

    Weights that are a mean of others compute maps that none of these did (Izmailov 2018, 3.2).
    """
    set_training(model)  # torch's update_bn() would measure those of frozen ones as well
    norms = {m: m.momentum for m in model.modules() if hasattr(m, "running_mean") and m.training}
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all that comes
    with autocast(device, precision):
        for images, _ in itertools.islice(loader, 50):
            model(images.to(device))
    for norm, momentum in norms.items():
        norm.momentum = momentum


def show_progress(line: str) -> None:
    """Print a line; on a terminal it takes the place of the one before."""
    if sys.stdout.isatty():
        columns = shutil.get_terminal_size().columns
        print(f"\r{line[: columns - 1]}\033[K", end="", flush=True)
    elif line:
        print(line, flush=True)


def average_shifts(model: nn.Module, images: Tensor) -> Tensor:
    """Return the mean log-probabilities of each image and its eight shifts by a pixel.

    A stride keeps every second place only, so an image moved by a pixel gets another answer; the
    mean of nine is steadier, and takes nine times as long.
    """
    height, width = images.shape[2:]
    wide = F.pad(images, (1, 1, 1, 1), mode="replicate")
    views = [wide[:, :, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    return torch.stack([model(view).float().log_softmax(dim=1) for view in views]).mean(dim=0)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    tta: bool = False,
) -> dict:
    """Return loss (nats), accuracy (%), predictions (N,), labels (N,), probabilities (N, 10).

    ``tta`` is test-time augmentation: the answer to an image is average_shifts().
    """
    was_training = model.training
    model.eval()
    answer = partial(average_shifts, model) if tta else model
    with autocast(device, precision):
        batches = [(answer(images.to(device)), labels) for images, labels in loader]
    model.train(was_training)
    batches = [(logits.float().cpu(), labels.cpu()) for logits, labels in batches]
    if getattr(loader, "ranks", 1) > 1:  # each has its part of every batch, in their order
        batches = [part for batch in zip(*gather(batches), strict=True) for part in batch]
    logits, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    predictions = logits.argmax(dim=1)
    return {
        "loss": F.cross_entropy(logits, labels).item(),
        "accuracy": 100 * (predictions == labels).sum().item() / len(labels),
        "predictions": predictions,
        "labels": labels,
        "probabilities": logits.softmax(dim=1),
    }


def compute_accuracy(model: nn.Module, loader, device: torch.device | str = "cpu") -> float:
    """Return how many of the loader's images the model labels correctly, in %."""
    return evaluate(model.to(device), loader, device)["accuracy"]


class EarlyStopping:
    """Says when ``patience`` epochs have passed without a lower loss."""

    def __init__(self, patience: int):
        self.patience, self.best_loss, self.bad_epochs = patience, math.inf, 0

    def step(self, loss: float) -> bool:
        """Take an epoch's loss; return whether it is the lowest so far."""
        better = loss < self.best_loss
        self.best_loss = min(loss, self.best_loss)
        self.bad_epochs = 0 if better else self.bad_epochs + 1
        return better

    @property
    def should_stop(self) -> bool:
        """Whether patience has run out."""
        return self.bad_epochs >= self.patience


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimizer for those parameters that are not frozen."""
    weights = [p for p in model.parameters() if p.requires_grad]
    options = {"momentum": recipe.momentum} if recipe.optimizer in ("sgd", "nesterov") else {}
    kind = OPTIMIZERS[recipe.optimizer]
    return kind(weights, lr=recipe.lr, weight_decay=recipe.weight_decay, **options)


def make_scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, updates_per_epoch: int):
    """Return the recipe's scheduler; those in PER_UPDATE step at each update, others each epoch."""
    kinds, updates = torch.optim.lr_scheduler, recipe.epochs * updates_per_epoch
    if recipe.scheduler == "plateau":
        options = {"factor": recipe.lr_factor, "patience": recipe.lr_patience, "threshold": 0}
        return kinds.ReduceLROnPlateau(optimizer, **options)
    if recipe.scheduler == "step":
        return kinds.StepLR(optimizer, recipe.lr_step, recipe.lr_factor)
    if recipe.scheduler == "cosine":
        return kinds.CosineAnnealingLR(optimizer, updates)
    if recipe.scheduler == "onecycle":
        return kinds.OneCycleLR(optimizer, recipe.lr, total_steps=updates, cycle_momentum=False)
    return kinds.ConstantLR(optimizer, factor=1)


FORMAT = "resnet18_mnist checkpoint 2"
HEADER = "epoch  train loss       %   val loss       %        lr       s  images/s"
ROW = (
    "{epoch:5}{train_loss:12.4f}{train_accuracy:8.2f}{val_loss:11.4f}{val_accuracy:8.2f}"
    "{learning_rate:10.2g}{seconds:8.1f}{images_per_second:10,.0f}  {best}"
)


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that a kill at any moment leaves the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explaining(f"cannot write {path}", OSError):
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # else a power cut may leave the new name on an empty file
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, **content) -> None:
    """Write tensors, numbers, text, and lists and dicts of these."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    write_atomically(path, buffer.getbuffer())


def read_tensors(path: str | Path) -> object:
    """Read onto the CPU what torch.save() wrote, and run no code in it; UserError if damaged."""
    try:
        if zipfile.is_zipfile(path):  # torch.load does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                packed = any(entry.compress_type for entry in archive.infolist())
                if packed or archive.testzip():  # torch.save packs nothing; a bomb would
                    raise zipfile.BadZipFile
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what is about to be refused
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # whatever zip, zlib and pickle make of arbitrary bytes
        raise UserError(f"{path} is damaged, or holds no weights") from error


def only_weights(state: dict) -> dict[str, Tensor]:
    """Return what a state dict has of real, dense tensors."""
    tensors = {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, Tensor)}
    return {k: v for k, v in tensors.items() if v.layout is torch.strided and not v.is_complex()}


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint of ours onto the CPU, its recipe as a Recipe; UserError if damaged."""
    checkpoint = read_tensors(path)
    with explaining(f"{path} is damaged, or of another version of this program"):
        rows, weights = [*checkpoint["rows"]], checkpoint["model"]
        # What cannot be printed is damaged.
        sound = all(ROW.format(**row) and math.isfinite(sum(row["batch_losses"])) for row in rows)
        if not sound or checkpoint["format"] != FORMAT or len(only_weights(weights)) < len(weights):
            raise ValueError
        return {**checkpoint, "rows": rows, "recipe": Recipe(**checkpoint["recipe"])}


class ResNetTrainer:
    """Trains and tests a model: optimizer, scheduler, early stopping, checkpoints.

    ``model`` is any classifier; parameters with requires_grad=False stay as they are. ``device``
    None picks the best. Of ``recipe`` the fields of model and data are ignored. The folder
    ``run_dir`` receives best.pt, last.pt and history.csv; None writes nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | str | None = None,
        recipe: Recipe | None = None,
        run_dir: str | Path | None = None,
        quiet: bool = False,
    ):
        self.recipe, self.quiet = recipe or Recipe(), quiet
        self.run_dir = Path(run_dir) if run_dir else None
        self.device = pick_device(device)
        self.precision = pick_precision(self.recipe.precision, self.device)
        # The layout that cuDNN and oneDNN prefer: it saves a transposition a convolution. On mps
        # gradients through it were wrong (PyTorch's issue 175189).
        layout = torch.preserve_format if self.device.type == "mps" else torch.channels_last
        self.model, self.average = model.to(self.device, memory_format=layout), None

    @property
    def tested(self) -> nn.Module:
        """The network to test and keep: the model, or with ema in training, its running mean."""
        return self.average.module if self.average else self.model

    def train(self, train_loader, val_loader=None, resume: dict | None = None, **overrides) -> dict:
        """Train; end on the weights of the best epoch, in eval mode; return the history.

        Loaders are iterables of (images, labels) with a length; without a ``val_loader`` the
        training loss schedules and selects. ``resume`` is the content of run_dir's last.pt, to go
        on from. ``overrides`` (num_epochs, learning_rate, all of Recipe's names) change the recipe.
        The history has a list for each quantity, with a value for each epoch.
        """
        names = {"num_epochs": "epochs", "learning_rate": "lr"}
        overrides = {names.get(name, name): value for name, value in overrides.items()}
        self.recipe = recipe = replace(self.recipe, **overrides)
        network = self._prepare(train_loader, val_loader)
        if resume:
            with explaining(f"{self.run_dir}/last.pt is damaged, or of another network"):
                for name, part in self.parts.items():
                    part.load_state_dict(resume[name])
                self.rows = [dict(row) for row in resume["rows"]]
        stopping = EarlyStopping(recipe.patience)
        for row in self.rows:  # of a resumed run: all the memory that early stopping needs
            stopping.step(row["val_loss"])
        if self.run_dir:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            for part in self.run_dir.glob(".*.*.[0-9]*.tmp"):  # left by a kill in a write
                part.unlink()
            self._save()  # so that a run killed in its first epoch can be resumed as well
        best_weights = None if self.run_dir else copy.deepcopy(self.tested.state_dict())
        if not self.quiet:
            print(HEADER, flush=True)
        while len(self.rows) < recipe.epochs and not stopping.should_stop:
            row = self._train_and_validate(network, train_loader, val_loader)
            if recipe.scheduler == "plateau":
                self.scheduler.step(row["val_loss"])
            elif recipe.scheduler == "step":
                self.scheduler.step()
            row["best"] = stopping.step(row["val_loss"])
            self.rows.append(row)
            if self.run_dir:
                self._save()
            elif row["best"]:
                best_weights = copy.deepcopy(self.tested.state_dict())
            if not self.quiet:
                print(ROW.format(**{**row, "best": "best" * row["best"]}).rstrip(), flush=True)
        if len(self.rows) < recipe.epochs and not self.quiet:
            print(f"stopped early: no lower loss for {recipe.patience} epochs")
        kept = load_checkpoint(self.run_dir / "best.pt")["model"] if self.run_dir else None
        self.model.load_state_dict(gather(kept)[0] or best_weights)  # the first rank has the folder
        self.model.eval()
        self.average = None  # the model has become what was tested
        return {name: [row[name] for row in self.rows] for name in self.rows[0]}

    def _prepare(self, *loaders) -> nn.Module:
        """Make all that the recipe asks for, and rows, a dict an epoch; return what is trained."""
        recipe, network = self.recipe, self.model
        self.precision = pick_precision(recipe.precision, self.device)
        if recipe.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS looks for it
            torch.use_deterministic_algorithms(True)
        for loader in loaders:
            if isinstance(loader, Batches):
                loader.to(self.device, *rank_and_ranks())
        self.rows, self.average = [], None
        self.optimizer = make_optimizer(self.model, recipe)
        updates = math.ceil(len(loaders[0]) / recipe.accumulate)
        self.scheduler = make_scheduler(self.optimizer, recipe, updates)
        self.parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        after_update = self.optimizer.register_step_post_hook
        if recipe.scheduler in PER_UPDATE:
            after_update(lambda *_: self.scheduler.step())
        if recipe.ema:
            decay = get_ema_multi_avg_fn(recipe.ema)
            self.average = AveragedModel(self.model, multi_avg_fn=decay)
            self.parts["average"] = self.average
            after_update(lambda *_: self.average.update_parameters(self.model))
        if is_distributed():
            network = DistributedDataParallel(network)
        return torch.compile(network) if recipe.compile else network

    @torch.random.fork_rng(devices=[])  # undoes the seeding below, so that later draws differ
    def _train_and_validate(self, network: nn.Module, train_loader, val_loader) -> dict:
        epoch, started, recipe = len(self.rows) + 1, time.perf_counter(), self.recipe
        learning_rate = self.optimizer.param_groups[0]["lr"]
        title = None if self.quiet else f"{epoch:5}/{recipe.epochs}"
        where = self.device, self.precision
        how = (*where, recipe.accumulate, recipe.label_smoothing, title)
        # Order, augmentation and dropout of an epoch depend on seed and epoch alone: a resumed run
        # need not know what was drawn before. Two seeds are a million epochs apart.
        torch.manual_seed(recipe.seed * 1_000_003 + epoch)
        for part in (train_loader, getattr(train_loader, "sampler", None)):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        try:
            train = val = train_one_epoch(network, train_loader, self.optimizer, *how)
            if self.average:
                measure_statistics(self.tested, train_loader, *where)
            # Each rank has normalised by its own part of the batches, as DistributedDataParallel
            # has it; the first one's running statistics count.
            for statistic in self.tested.buffers() if is_distributed() else ():
                dist.broadcast(statistic, 0)
            if val_loader is not None:
                val = evaluate(self.tested, val_loader, *where)  # without tta, which takes long
            after = None
            if recipe.test_train:
                as_they_are = copy.copy(train_loader)
                if isinstance(as_they_are, Batches):
                    as_they_are.augment, as_they_are.shuffle = None, False
                after = evaluate(self.tested, as_they_are, *where)["accuracy"]
            if not math.isfinite(val["loss"]):
                raise FloatingPointError(f"the validation loss became {val['loss']}")
        except FloatingPointError as error:
            kept = f"{self.run_dir} keeps the last good weights; " if self.run_dir else ""
            raise UserError(f"epoch {epoch}: {error}; {kept}try a lower --lr") from error
        finally:
            if title:
                show_progress("")
        row = {"epoch": epoch, "train_loss": train["loss"], "train_accuracy": train["accuracy"]}
        row |= {"val_loss": val["loss"], "val_accuracy": val["accuracy"]}
        row |= {"learning_rate": learning_rate, "seconds": time.perf_counter() - started}
        row |= {"images_per_second": train["images_per_second"], "train_accuracy_after": after}
        return {**row, "batch_losses": train["batch_losses"]}

    def _save(self) -> None:
        """Write best.pt, history.csv, last.pt: a kill between two costs a repeat of the epoch."""
        latest = self.rows[-1] if self.rows else {}
        common = {"recipe": asdict(self.recipe), "rows": self.rows}
        if latest.get("best"):
            tested = self.tested.state_dict()
            save_checkpoint(self.run_dir / "best.pt", **common, model=tested)
        table = io.StringIO()
        writer = csv.DictWriter(table, latest, lineterminator="\n")
        writer.writeheader()
        for row in self.rows:
            losses = " ".join(f"{loss:.4f}" for loss in row["batch_losses"])
            writer.writerow({**row, "batch_losses": losses})
        write_atomically(self.run_dir / "history.csv", table.getvalue().encode())
        state = {name: part.state_dict() for name, part in self.parts.items()}
        save_checkpoint(self.run_dir / "last.pt", **common, **state)

    def test(self, test_loader) -> dict:
        """Return what evaluate() does: loss, accuracy, predictions, labels, probabilities."""
        return evaluate(self.tested, test_loader, self.device, self.precision, self.recipe.tta)


def train_model(model: nn.Module, train_loader, val_loader=None, device=None, **options) -> dict:
    """Train a model and return its history: ResNetTrainer.train() as a function."""
    return ResNetTrainer(model, device).train(train_loader, val_loader, **options)


# %% 6. Pictures
#
# The colours of Okabe and Ito's palette differ to colour-blind eyes as well.

BLUE, VERMILION = "#0072B2", "#D55E00"
PALETTE = (BLUE, VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def subplots(rows: int, columns: int, width: float, height: float, title: str):
    """Return a figure of width × height inches with a title, and its axes (rows, columns)."""
    import matplotlib.pyplot as plt  # here, since only pictures need it

    size = (width, height)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    figure.suptitle(title, parse_math=False)
    return figure, axes


def confusion_matrix(labels: Tensor, predictions: Tensor) -> Tensor:
    """Return how often each digit (row) was taken for each digit (column): (10, 10)."""
    return torch.bincount(labels * 10 + predictions, minlength=100).view(10, 10)


def classification_report(labels: Tensor, predictions: Tensor) -> str:
    """Return precision, recall and F1 (%) of each digit, and the confusion matrix, as text.

    The macro average counts each digit once, the weighted one each image. The precision of a
    digit that was never predicted is 0.
    """
    matrix = confusion_matrix(labels, predictions)
    hits, images, predicted = matrix.diag(), matrix.sum(dim=1), matrix.sum(dim=0)
    precision, recall = hits / predicted.clamp(min=1), hits / images.clamp(min=1)
    f1 = 2 * hits / (images + predicted).clamp(min=1)
    scores = 100 * torch.stack([precision, recall, f1], dim=1)  # (10, 3)
    rows = list(zip(range(10), scores, images, strict=True))
    rows += [("macro", scores.mean(dim=0), images.sum())]
    rows += [("weighted", images / images.sum() @ scores, images.sum())]
    lines = ["digit     precision    recall        F1    images"]
    lines += ["{:<9}{:10.2f}{:10.2f}{:10.2f}{:10,}".format(name, *s, n) for name, s, n in rows]
    lines += ["", "true   predicted " + "".join(f"{digit:6}" for digit in range(10))]
    for digit, counts in enumerate(matrix.tolist()):
        lines.append(f"{digit:4}{'':13}" + "".join(f"{count:6}" for count in counts))
    return "\n".join(lines)


def use_log_scale(axis, name: str, form="{x:,g}") -> None:
    """Give the x or y axis a logarithmic scale with plain numbers, also within a decade."""
    axis.set(**{f"{name}scale": "log"})
    scale = getattr(axis, f"{name}axis")
    low, high = scale.get_view_interval()
    ticks = (1, 3) if high > 20 * low else (1, 1.5, 2, 3, 5, 7)  # in each decade
    scale.get_major_locator().set_params(subs=ticks)
    scale.set_major_formatter(form)
    axis.minorticks_off()


def plot_curves(history: dict[str, list], title: str = ""):
    """Plot loss and accuracy by epoch, with the best epoch and the learning-rate drops."""
    epochs, rates = history["epoch"], history["learning_rate"]
    best_epoch = max(e for e, is_best in zip(epochs, history["best"], strict=True) if is_best)
    figure, axes = subplots(1, 2, 11, 4.2, title)
    units = {"loss": "nats per image", "accuracy": "%"}
    for axis, (name, unit) in zip(axes[0], units.items(), strict=True):
        axis.plot(epochs, history[f"train_{name}"], "o-", color=BLUE, label="training")
        axis.plot(epochs, history[f"val_{name}"], "s-", color=VERMILION, label="validation")
        best = history[f"val_{name}"][best_epoch - 1]
        axis.plot(best_epoch, best, "k*", ms=14, label=f"best epoch ({best_epoch})")
        smooth = len(set(rates)) == len(rates) > 3  # no drops, but a rate that changes all the time
        for epoch, before, after in zip(epochs[1:], rates, rates[1:], strict=False):
            if after < before and not smooth:
                axis.axvline(epoch - 0.5, color="gray", linestyle=":")
                above = {"transform": axis.get_xaxis_transform(), "rotation": 90, "ha": "center"}
                axis.text(epoch - 0.5, 1.02, f"lr {after:.2g}", **above, fontsize=8)
        axis.set(xlabel="epoch", ylabel=f"{name} ({unit})")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    axes[0, 0].legend()
    use_log_scale(axes[0, 0], "y")
    return figure


def gradient_norms(model: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    """Return the length of the loss's gradient in each layer but projections, in their order."""
    F.cross_entropy(model.train()(images), labels).backward()
    layers = {k: p for k, p in model.named_parameters() if p.dim() > 1 and "downsample" not in k}
    return [p.grad.norm().item() for p in layers.values() if p.grad is not None]


def plot_comparison(runs: dict[str, tuple[list[dict], list[float]]]):
    """Draw runs, each with its rows and gradient norms, as accuracy by time, loss, and norms."""
    figure, (axes,) = subplots(1, 3, 13, 4.4, "")
    for place, (name, (rows, norms)) in enumerate(runs.items()):
        look = {"color": PALETTE[place % 7], "marker": "osD^vP*"[place % 7], "ms": 4}
        # A name may hold bytes that are no text, and between two dollars would be a formula.
        look["label"] = name.encode(errors="replace").decode().replace("$", r"\$")
        seconds = list(itertools.accumulate(row["seconds"] for row in rows))
        errors = [max(0.01, 100 - row["val_accuracy"]) for row in rows]  # 0 has no logarithm
        # First epochs may be so far off that the others would be hard to tell apart.
        shown = [e if e <= max(1, 10 * errors[-1]) else math.nan for e in errors]
        axes[0].plot(seconds, shown, **look)
        axes[1].plot(range(1, len(rows) + 1), [row["train_loss"] for row in rows], **look)
        axes[2].plot(range(1, len(norms) + 1), norms, **look)
    axes[0].set(xlabel="time of training and validation (s)", ylabel="validation accuracy (%)")
    axes[1].set(xlabel="epoch", ylabel="training loss (nats per image)")
    axes[2].set(xlabel="layer, from the image", ylabel="gradient norm before the first step")
    for axis in axes[1:]:
        use_log_scale(axis, "y")
        axis.xaxis.get_major_locator().set_params(integer=True)
    use_log_scale(axes[0], "x")
    use_log_scale(axes[0], "y", lambda error, _: f"{100 - error:g}")
    axes[0].invert_yaxis()  # few errors are high accuracy
    for axis in axes:
        axis.grid(alpha=0.3)
    handles = axes[1].get_lines()
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(runs)), fontsize=8)
    return figure


def plot_confusion_matrix(labels: Tensor, predictions: Tensor, title: str = ""):
    """Draw the counts of true against predicted digits."""
    matrix = confusion_matrix(labels, predictions)
    shade = matrix.float().log1p()  # mistakes are a thousandth of the diagonal
    figure, ((axis,),) = subplots(1, 1, 6.4, 6.8, title)
    axis.imshow(shade.numpy(), cmap="Blues")
    for true, predicted in matrix.nonzero().tolist():
        colour = "white" if shade[true, predicted] > 0.6 * shade.max() else "black"
        count = f"{matrix[true, predicted]:,}"
        axis.text(predicted, true, count, color=colour, ha="center", va="center")
    axis.set(xlabel="predicted digit", ylabel="true digit", xticks=range(10), yticks=range(10))
    return figure


def plot_digits(images: Tensor, captions: list[str], wrong: list[bool], title: str = ""):
    """Draw the first 40 images (N, 1, S, S); the captions of those that are wrong are vermilion."""
    rows = max(1, math.ceil(min(len(images), 40) / 8))
    figure, axes = subplots(rows, 8, 10, 1.65 * rows + 0.7, title)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, caption, is_wrong in zip(axes.flat, images, captions, wrong, strict=False):
        axis.imshow(image[0].numpy(), cmap="gray")
        colour = VERMILION if is_wrong else "black"
        axis.set_title(caption, fontsize=8, color=colour, parse_math=False)
    return figure


def plot_readings(names: list, pictures: list, digits: list, probabilities: Tensor, title: str):
    """Draw, of the first ten pictures, each beside what the network saw and its probabilities."""
    rows = min(len(pictures), 10)
    figure, axes = subplots(rows, 3, 8, 1.7 * rows + 1.1, title)
    drawn = zip(axes, names, pictures, digits, probabilities.tolist(), strict=False)
    for row, name, picture, digit, p in drawn:
        for axis, image in zip(row, (picture, digit.numpy()), strict=False):
            axis.imshow(image, cmap="gray")
            axis.axis("off")
        shown = Path(name).name.encode(errors="replace").decode()[-28:]
        row[0].set_title(shown, fontsize=8, parse_math=False)
        row[1].set_title("as the network saw it", fontsize=8)
        read = p.index(max(p))
        colours = [BLUE if place == read else "silver" for place in range(10)]
        row[2].bar(range(10), [100 * probability for probability in p], color=colours)
        row[2].set(xticks=range(10), ylim=(0, 100), yticks=(0, 50, 100), ylabel="probability (%)")
        row[2].set_title(f"read as {read}, {100 * p[read]:.1f} %", fontsize=8)
    axes[-1, 2].set_xlabel("digit")
    return figure


@torch.no_grad()
def plot_feature_maps(model: nn.Module, image: Tensor, title: str = ""):
    """Draw an image (1, C, S, S) and the first channels of what each part makes of it."""
    maps = {"input": image, **copy.deepcopy(model).eval().get_feature_maps(image)}
    del maps["pooled"]  # a vector
    figure, axes = subplots(len(maps), 10, 10, 1.25 * len(maps), title)
    for row, (name, features) in zip(axes, maps.items(), strict=True):
        features = features[0].float().cpu().numpy()
        for axis in row:
            axis.axis("off")
        for axis, feature in zip(row, features, strict=False):
            # One scale for a row, so that its channels can be compared.
            shades = "gray" if name == "input" else "viridis"
            axis.imshow(feature, cmap=shades, vmin=features.min(), vmax=features.max())
        row[0].set_title(f"{name}  {'×'.join(map(str, features.shape))}", fontsize=9, loc="left")
    return figure


def save_figure(figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getbuffer())


def visualize_results(
    model: nn.Module, loader, results: dict, history: dict, run_dir: str | Path, title: str = ""
) -> None:
    """Save a run's pictures; ``results`` are what evaluate() returned for this loader.

    Raises UserError if they are not, or if the loader shuffles.
    """
    ours = isinstance(loader, Batches)
    parts = [(loader.images, loader.labels)] if ours else [(x[:, :1], y) for x, y in loader]
    images, labels = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    predictions = results["predictions"]
    if not torch.equal(labels, results["labels"]):
        raise UserError("the results are of other images than the loader's, or in another order")
    sure = 100 * results["probabilities"].amax(dim=1)
    mistakes = (labels != predictions).nonzero().flatten()
    surest = mistakes[sure[mistakes].argsort(descending=True)][:40]

    def digits(chosen: Tensor, subtitle: str):
        captions = [f"true {labels[i]}, pred. {predictions[i]}\n{sure[i]:.1f} %" for i in chosen]
        wrong = (labels != predictions)[chosen].tolist()
        return plot_digits(images[chosen], captions, wrong, f"{title}\n{subtitle}")

    right = f"{results['accuracy']:.2f} % of {len(labels):,} images right"
    pictures = {
        "curves.png": plot_curves(history, title),
        "confusion_matrix.png": plot_confusion_matrix(labels, predictions, f"{title}\n{right}"),
        "predictions.png": digits(torch.arange(len(labels))[:40], "the first images"),
        "mistakes.png": digits(surest, f"the most confident of {len(mistakes)} mistakes"),
    }
    if hasattr(model, "get_feature_maps"):
        first = next(iter(loader))[0][:1].to(next(model.parameters()).device)
        figure = plot_feature_maps(model, first, f"{title}\nfeature maps of a digit")
        pictures["feature_maps.png"] = figure
    for name, figure in pictures.items():
        save_figure(figure, Path(run_dir, name))


# %% 7. Own digits
#
# Digits from elsewhere, made what MNIST's are: uint8, 28×28, light ink on dark ground.


def open_image(path: str | Path) -> Image.Image:
    """Open a picture of any kind, upright, in RGB, of 128 pixels at most on its longer side.

    What is transparent becomes white, or black where the rest is bright. Raises UserError.
    """
    with explaining(f"{path} cannot be read as an image"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file)
        if picture.mode[0] in "IF":  # 16 bits and more, which Pillow would cut off at 255
            levels = TF.pil_to_tensor(picture.convert("F")).double().nan_to_num()
            levels = (levels - levels.min()) / (levels.max() - levels.min()).clamp(1e-9)
            picture = TF.to_pil_image((255 * levels).byte())
        picture = picture.convert("RGBA")
    brightness = ImageStat.Stat(picture.convert("L"), picture.getchannel("A")).mean[0]
    ground = Image.new("RGBA", picture.size, "black" if brightness > 128 else "white")
    picture = Image.alpha_composite(ground, picture).convert("RGB")
    if max(picture.size) > 128:  # noise is finer than strokes
        picture = picture.filter(ImageFilter.GaussianBlur(max(picture.size) / 200))
        picture.thumbnail((128, 128))
    return picture


def find_ink(picture: Image.Image) -> Tensor:
    """Return the ink at each pixel, (H, W) from 0 to 1; all 0 on a page without any."""
    colours = TF.pil_to_tensor(picture).float()  # (3, H, W)
    _, height, width = colours.shape
    if min(height, width) < 3:
        return torch.zeros(height, width)
    # Paper is a smooth surface in each colour, since light is uneven: a polynomial of second
    # degree through the margin, then through all that is near it. Ink is what differs.
    v = torch.linspace(-1, 1, height)[:, None].expand(height, width)
    u = torch.linspace(-1, 1, width).expand(height, width)
    terms = torch.stack([torch.ones_like(u), u, v, u * u, u * v, v * v], dim=-1)
    is_paper = torch.maximum(u.abs(), v.abs()) > 0.9
    for _ in range(6):
        surface = torch.linalg.lstsq(terms[is_paper], colours[:, is_paper].T, driver="gelsd")
        difference = (colours - (terms @ surface.solution).permute(2, 0, 1)).abs().amax(dim=0)
        is_paper = difference <= max(8, 2.5 * difference[is_paper].median().item())
    # Otsu 1979: the threshold that leaves the largest variance between what it parts.
    counts = torch.histc(difference, 256, 0, 256)
    below = counts.cumsum(dim=0)
    sums = (counts * torch.arange(0.5, 256)).cumsum(dim=0)
    above = difference.numel() - below
    means = sums / below.clamp(min=1), (sums[-1] - sums) / above.clamp(min=1)
    threshold = (below * above * (means[1] - means[0]) ** 2).argmax().item() + 1
    ink, paper = difference[difference >= threshold], difference[difference < threshold]
    if len(ink) < 2 or ink.mean() < max(24, 4 * paper.std().item()):
        return torch.zeros(height, width)
    mask = drop_specks(drop_squares(difference >= threshold))
    near = F.max_pool2d(mask[None].float(), 3, 1, padding=1)[0]
    return ((difference - threshold / 2) / (ink.mean() - threshold / 2)).clamp(0, 1) * near


def drop_squares(mask: Tensor) -> Tensor:
    """Remove the lines of squared paper: rows and columns of ink from edge to edge."""
    lines = [mask.float().mean(dim=1 - axis) > 0.9 for axis in (0, 1)]  # (H,), (W,)
    if all((line[1:] & ~line[:-1]).sum() + line[0] > 1 for line in lines):
        near = [F.max_pool1d(line[None].float(), 3, 1, padding=1)[0] > 0 for line in lines]
        return mask & ~near[0][:, None] & ~near[1]
    return mask


def drop_specks(mask: Tensor) -> Tensor:
    """Keep the connected parts of a mask (H, W) that have a twentieth of the largest or more."""
    part = torch.arange(1.0, mask.numel() + 1).view(1, *mask.shape) * mask  # each pixel its own
    while not torch.equal(part, grown := F.max_pool2d(part, 3, 1, padding=1) * mask):
        part = grown  # the larger number spreads
    sizes = part.long().flatten().bincount()
    sizes[0] = 0
    return (sizes * 20 >= sizes.max())[part[0].long()] & mask


def read_image(path: str | Path) -> tuple[Image.Image, Tensor]:
    """Read a picture of a digit; return it, and what MNIST would have made of it: (28, 28) uint8.

    The ink is cropped, fitted into 20×20 pixels and placed in 28×28 by its centre of mass, as the
    MNIST page has it. What looks like MNIST already is left as it is. Raises UserError for a file
    that cannot be read or shows no ink.
    """
    picture = open_image(path)
    pixels = TF.pil_to_tensor(picture.convert("L"))[0]
    edge = torch.cat([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    if picture.size == (28, 28) and edge.median() < 32 <= pixels.max():
        return picture, pixels
    ink = find_ink(picture)
    if not (ink > 0.5).any():
        raise UserError(f"{path} shows no ink")
    rows, columns = ((ink > 0.5).any(dim=1 - axis).nonzero() for axis in (0, 1))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    size = [max(1, round(20 * side / max(ink.shape))) for side in ink.shape]
    digit = TF.resize(ink[None], size, antialias=True)[0]  # (h, w), one of them 20
    digit = (255 * digit / digit.max()).round().byte()
    places = torch.cartesian_prod(*map(torch.arange, digit.shape)).float()  # (h·w, 2)
    corner = (13.5 - digit.flatten().float() @ places / digit.sum()).round().clamp(min=0)
    top, left = torch.minimum(corner, 28 - torch.tensor(digit.shape)).int().tolist()
    return picture, TF.crop(digit[None], -top, -left, 28, 28)[0]  # which pads with 0


def read_kaggle(path: str | Path, labelled: bool) -> tuple[Tensor, Tensor | None]:
    """Read a CSV of Kaggle's Digit Recognizer: images (N, 28, 28) uint8 and, if any, labels (N,).

    Raises UserError that names the file, and row and column of what is wrong in it.
    """
    columns = ["label"] * labelled + [f"pixel{number}" for number in range(784)]
    digits, levels = ({str(value): value for value in range(n)} for n in (10, 256))
    allowed = [digits] * labelled + [levels] * 784
    csv.field_size_limit(2**30)  # a cell that is too long is to be named too
    table, text = bytearray(), {"newline": "", "encoding": "utf-8-sig", "errors": "replace"}
    with explaining(f"cannot read {path}", (OSError, csv.Error)), open(path, **text) as file:
        rows = csv.reader(file)
        if next(rows, None) != columns:
            raise UserError(f"{path}, row 1: the columns are not {', '.join(columns[:3])} ...")
        for cells in filter(None, rows):
            where = f"{path}, row {rows.line_num}"
            if len(cells) != len(columns):
                raise UserError(f"{where}: {len(cells)} columns, not {len(columns)}")
            row = [values.get(cell) for values, cell in zip(allowed, cells, strict=True)]
            if None in row:
                at = row.index(None)
                wrong = f"{cells[at][:20]!r} is not from 0 to {len(allowed[at]) - 1}"
                raise UserError(f"{where}, column {columns[at]}: {wrong}")
            table += bytes(row)
    if not table:
        raise UserError(f"{path} holds no digit")
    numbers = torch.frombuffer(table, dtype=torch.uint8).view(-1, len(columns))
    labels = numbers[:, 0].long() if labelled else None
    return numbers[:, -784:].reshape(-1, 28, 28), labels


def as_loader(trainer: ResNetTrainer, images: Tensor) -> Batches:
    """Return images (N, 28, 28) uint8 as the trainer's network wants them; the labels say 0."""
    recipe, labels = trainer.recipe, torch.zeros(len(images), dtype=torch.long)
    batches = Batches(images, labels, input=recipe.input, normalize=recipe.normalize)
    return batches.to(trainer.device)


def write_solution(trainer: ResNetTrainer, images: Tensor, solution: Path) -> None:
    """Label images (N, 28, 28) in the format of the competition: ImageId (from 1), Label."""
    labels = trainer.test(as_loader(trainer, images))["predictions"].tolist()
    lines = [f"{number},{label}\n" for number, label in enumerate(labels, start=1)]
    write_atomically(solution, "".join(["ImageId,Label\n", *lines]).encode())
    print(f"labels of {len(labels):,} images: {solution}")


# %% 8. Other networks
#
# What a ResNet is compared with, what training can start from, and what it leaves as it is.


def lenet5(num_classes: int = 10, input_channels: int = 1) -> nn.Sequential:
    """LeNet-5 (LeCun 1998, II.B): (N, C, H, W) → (N, num_classes). Layers have the paper's names.

    Simpler than there: each map of C3 reads all maps of S2, subsampling has no weights, the tanh
    no scale, and the output is linear.
    """
    layers = OrderedDict(
        C1=nn.Conv2d(input_channels, 6, 5, padding=2),  # (N, 6, 28, 28)
        S2=nn.Sequential(nn.Tanh(), nn.AvgPool2d(2)),  # (N, 6, 14, 14)
        C3=nn.Conv2d(6, 16, 5),  # (N, 16, 10, 10)
        S4=nn.Sequential(nn.Tanh(), nn.AdaptiveAvgPool2d(5), nn.Flatten()),  # (N, 16·5·5)
        C5=nn.Linear(400, 120),  # on a 5×5 map, a 5×5 convolution
        tanh5=nn.Tanh(),
        F6=nn.Linear(120, 84),
        tanh6=nn.Tanh(),
        output=nn.Linear(84, num_classes),
    )
    return nn.Sequential(layers)


def simple_cnn(num_classes: int = 10, input_channels: int = 1) -> nn.Sequential:
    """Three 3×3 convolutions with ReLUs and max-pools, and two linear layers."""
    layers = OrderedDict(
        conv1=nn.Conv2d(input_channels, 16, 3, padding=1),
        pool1=nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)),  # (N, 16, 14, 14)
        conv2=nn.Conv2d(16, 32, 3, padding=1),
        pool2=nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)),  # (N, 32, 7, 7)
        conv3=nn.Conv2d(32, 64, 3, padding=1),
        pool3=nn.Sequential(nn.ReLU(), nn.AdaptiveMaxPool2d(3), nn.Flatten()),  # (N, 64·3·3)
        fc1=nn.Linear(576, 64),
        relu4=nn.ReLU(),
        fc2=nn.Linear(64, num_classes),
    )
    return nn.Sequential(layers)


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """Adapt filters (K, C, h, w) to so many channels: a gray image gets the answer as before."""
    if weight.shape[1] == channels:
        return weight.detach()
    return weight.detach().sum(dim=1, keepdim=True).repeat(1, channels, 1, 1) / channels


def build_model(recipe: Recipe) -> nn.Module:
    """Return the recipe's network with fresh weights; UserError if there is none for its input."""
    name, (channels, size) = recipe.model, INPUTS[recipe.input]
    if name in MODELS:
        stem = "cifar" if recipe.input == "rgb32" else "imagenet"
        stem = stem if recipe.stem == "auto" else recipe.stem
        return MODELS[name](input_channels=channels, stem=stem, plain=recipe.plain)
    if recipe.stem != "auto" or recipe.plain:
        raise UserError(f"--stem and --plain are for ResNets, which {name} is not")
    if name in ("lenet5", "simple_cnn"):
        return {"lenet5": lenet5, "simple_cnn": simple_cnn}[name](input_channels=channels)
    if name not in models.list_models(models):
        known = ", ".join([*MODELS, "lenet5", "simple_cnn"])
        raise UserError(f"there is no model {name!r}; there is {known}, and torchvision.models")
    auxiliary = name in ("googlenet", "inception_v3")  # more than one output in training
    options = {"aux_logits": False, "init_weights": True} if auxiliary else {}
    model = models.get_model(name, num_classes=10, **options)
    conv = first_conv(model)[1]
    conv.in_channels, conv.weight = channels, nn.Parameter(adapt_channels(conv.weight, channels))
    why = f"{name} cannot take {size}×{size} pixels; try {'rgb32 or ' * (size < 32)}rgb224"
    with torch.no_grad(), explaining(why, (RuntimeError, AssertionError)):
        copy.deepcopy(model).eval()(torch.zeros(1, channels, size, size))
    return model


def plain_name(key: str) -> str:
    """Return a weight's name without what wrappers put before it and old DenseNets put into it."""
    key = re.sub(r"^((_orig_mod|module)\.)+", "", key)
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)", r"\1\2", key)


def imagenet_weights(name: str) -> dict[str, Tensor]:
    """Return torchvision's weights for a model, downloaded or from its cache."""
    try:
        weights = models.get_model_weights(name).DEFAULT
        return weights.get_state_dict(progress=False, check_hash=True)
    except ValueError as error:
        raise UserError(f"torchvision has no ImageNet weights for {name}") from error
    except (OSError, RuntimeError) as error:
        why = f"{weights.url} cannot be downloaded ({error})"
        raise UserError(f"{why}; get it elsewhere: --weights {Path(weights.url).name}") from error


def load_weights(model: nn.Module, name: str, source: str) -> tuple[str, list[str]]:
    """Give the model, of that name, weights to start from.

    ``source`` is "imagenet" for torchvision's, or a file: of this program, or a state dict. The
    first convolution is adapted to the channels; what does not fit, such as a head for other
    classes, stays fresh. Returns what became of which, in words, and the names of the fresh.
    """
    state = imagenet_weights(name) if source == "imagenet" else read_tensors(source)
    state = state if isinstance(state, dict) else {}
    for key in ("model", "state_dict", "model_state_dict"):  # where checkpoints have it
        state = state[key] if isinstance(state.get(key), dict) else state
    state = {plain_name(key): value for key, value in only_weights(state).items()}
    own, first = model.state_dict(), f"{first_conv(model)[0]}.weight"
    adapted = first in state and state[first].dim() == 4 and state[first].shape != own[first].shape
    if adapted:
        state[first] = adapt_channels(state[first], own[first].shape[1])
    fits = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    fresh = [key for key in own if key not in fits and "num_batches_tracked" not in key]
    if not fits:
        raise UserError(f"{source} holds no weights of {name}")
    own.update(fits)  # with the version that MNASNet looks for
    model.load_state_dict(own)
    report = f"{len(fits)} of {len(state)} tensors of {source} loaded"
    if adapted and first in fits:
        report += f"; {first} adapted to {own[first].shape[1]} channel(s)"
    return report + (f"; left fresh: {', '.join(fresh)}" if fresh else ""), fresh


def freeze(model: nn.Module, parts: Sequence[str], fresh: list[str]) -> None:
    """Freeze the named parts. Raises UserError for one that is not there, or is left fresh."""
    known = ", ".join(name for name, _ in model.named_children())
    for name in parts:
        with explaining(f"there is no part {name!r} to freeze; there is {known}", AttributeError):
            model.get_submodule(name).requires_grad_(False)
        if any(key.startswith(f"{name}.") for key in fresh):
            raise UserError(f"{name} got no weights: frozen, it would stay random")
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("with all of it frozen, nothing is left to train")


# %% 9. Command line

RUNS = Path("runs")


def find_checkpoint(given: str | None, name: str) -> Path:
    """Return the checkpoint ``given`` as a file or as the folder of a run, or else the newest."""
    if given is not None:
        return Path(given, name) if Path(given).is_dir() else Path(given)
    found = sorted(RUNS.glob(f"*/{name}"), key=os.path.getmtime)
    if not found:
        raise UserError(f"there is no run in {RUNS.resolve()}: train one, or name its folder")
    return found[-1]


def load_run(run: str | None, device: str | None, given: dict) -> tuple[ResNetTrainer, dict, Path]:
    """Return the network of a run, ready to test, with its checkpoint and the path of that."""
    path = find_checkpoint(run, "best.pt")
    checkpoint = load_checkpoint(path)
    recipe, model = checkpoint["recipe"], build_model(checkpoint["recipe"])
    with explaining(f"{path} holds the weights of another network", (TypeError, RuntimeError)):
        model.load_state_dict(checkpoint["model"])
    return ResNetTrainer(model, device, replace(recipe, **given)), checkpoint, path


def claim_run_dir(output_dir: str | None, name: str) -> Path:
    """Make the folder of a new run; refuse one that holds a run already."""
    numbered = (RUNS / f"{name}-{number}" for number in itertools.count(1))
    folder = Path(output_dir or next(path for path in numbered if not path.exists()))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        results = ("best.pt", "last.pt", "report.txt", "solution.csv")
        if any((folder / name).exists() for name in results):
            raise FileExistsError
        (folder / "history.csv").touch(exist_ok=False)  # of two runs at once, one gets it
    except FileExistsError as error:
        raise UserError(f"{folder} is taken: choose another, or --resume the run in it") from error
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from error
    return folder


def load_data(recipe: Recipe, data_dir: str) -> MNISTDataLoader:
    """Return the recipe's images: to train on, to select on and to test on."""
    names = ("batch_size", "input", "normalize", "val_size", "select_on", "limit", "seed")
    options = {name: getattr(recipe, name) for name in names}
    strength = [getattr(recipe, name) for name in Distortion._fields]
    options["augment"] = recipe.augment and any(strength) and Distortion(*strength)
    digits = recipe.dataset
    if digits == "kaggle":
        train = read_kaggle(Path(data_dir, "train.csv"), labelled=True)
        test = Path(data_dir, "test.csv")
        test = read_kaggle(test, labelled=False) if test.exists() else (None, None)
        digits = Digits("kaggle", *train, *test)
    return MNISTDataLoader(data_dir=data_dir, dataset=digits, **options)


def make_report(recipe: Recipe, rows: list[dict], results: dict) -> str:
    """Return how a network, trained for these epochs, does on the test set: text of 80 columns."""
    labels, correct = results["labels"], results["predictions"] == results["labels"]
    tested = "validation" if recipe.dataset == "kaggle" else "test"  # its test has no labels
    how = f"seed {recipe.seed}{', tta' * recipe.tta}"
    report = f"{recipe.model}, {recipe.input}, dataset {recipe.dataset}, {how}\n"
    for row in rows[-1:]:
        part = "validation set" if recipe.select_on == "val" else "TEST SET, which is optimistic"
        report += f"epoch {row['epoch']}, {'not ' * (not row['best'])}selected on the {part}: "
        report += f"loss {row['val_loss']:.4f}, accuracy {row['val_accuracy']:.2f} %\n"
    report += f"{tested} loss {results['loss']:.4f}, {tested} accuracy {results['accuracy']:.2f} % "
    report += f"({correct.sum():,} of {len(labels):,} {recipe.dataset} images)\n\n"
    return report + classification_report(labels, results["predictions"]) + "\n"


def list_recipes() -> None:
    """Print each recipe with what it changes."""
    for name, recipe in RECIPES.items():
        changes = asdict(recipe).items() - asdict(Recipe()).items()
        text = ", ".join(f"{key} {value}" for key, value in sorted(changes)) or "the defaults"
        print(textwrap.fill(f"{name:11}{text}", 79, subsequent_indent=" " * 11))


def start_or_resume(args: argparse.Namespace, given: dict) -> tuple[Recipe, dict, Path | None]:
    """Return the recipe, and for a resumed run its last checkpoint and its folder."""
    if args.resume is None:
        base = RECIPES[args.recipe or "plateau"]
        if not given.get("augment", base.augment) and given.keys() & set(Distortion._fields):
            raise UserError("images are distorted with --augment only, which is off here")
        return replace(base, **given), {}, None
    if args.recipe or args.output_dir:
        raise UserError("a resumed run keeps its recipe and folder: no --recipe, no --output-dir")
    path = find_checkpoint(None if args.resume is True else args.resume, "last.pt")
    checkpoint = load_checkpoint(path)
    if "optimizer" not in checkpoint:
        raise UserError(f"{path} cannot be resumed; the last.pt of a run can")
    recipe = checkpoint["recipe"]
    free = {"patience"} if recipe.scheduler in PER_UPDATE else {"epochs", "patience"}
    if given.get("dataset") == "auto":
        del given["dataset"]  # which was settled at the start
    for name in given.keys() - free:
        kept = getattr(recipe, name)
        if given[name] != kept:
            may = " and ".join(sorted(free))
            raise UserError(f"{path.parent} keeps its {name} {kept}; only {may} may change")
    return replace(recipe, **given), checkpoint, path.parent


def command_train(args: argparse.Namespace, given: dict) -> None:
    """Train a ResNet on MNIST, test it, and draw how it went."""
    if args.recipe == "list":
        return list_recipes()
    device = join_ranks(pick_device(args.device))
    rank, ranks = rank_and_ranks()
    args.quiet = args.quiet or rank > 0
    recipe, checkpoint, run_dir = start_or_resume(args, given)
    torch.manual_seed(recipe.seed)
    model, loaded = build_model(recipe), ""
    fresh = [] if checkpoint else list(model.state_dict())
    if recipe.weights is not None and not checkpoint:
        loaded, fresh = load_weights(model, recipe.model, recipe.weights)
    freeze(model, recipe.freeze, fresh)
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0  # a machine's first process downloads
    data = load_data(recipe, args.data_dir) if first else None
    gather(None)  # the others wait for it
    data = data or load_data(recipe, args.data_dir)
    if min(recipe.batch_size, len(data.train.labels)) < 2 * ranks:
        raise UserError(f"each of {ranks} processes needs two images of every batch")
    recipe = replace(recipe, dataset=data.name)
    name = f"{recipe.model}-{recipe.input}-{recipe.dataset}"
    run_dir = None if rank else run_dir or claim_run_dir(args.output_dir, name)
    trainer = ResNetTrainer(model, device, recipe, run_dir, args.quiet)
    if not args.quiet:
        train, val, test = (f"{len(part.labels):,}" for part in (data.train, data.val, data.test))
        parameters = sum(p.numel() for p in model.parameters())
        processes = f", {ranks} processes" if ranks > 1 else ""
        print(f"device  {describe_device(device)}, {trainer.precision}{processes}")
        print(f"data    {data.name}: {train} to train, {val} to select, {test} to test")
        print(f"model   {recipe.model} for {recipe.input}: {parameters:,} parameters")
        if loaded:
            print(f"weights {loaded}")
        print(f"run     {run_dir}\n", flush=True)
    try:
        history = trainer.train(data.train, data.val, resume=checkpoint)
        finish_run(trainer, data, history)
    except KeyboardInterrupt:
        if run_dir:
            command = ["python", sys.argv[0], f"--resume={run_dir}", f"--data-dir={args.data_dir}"]
            print(f"stopped; this goes on:  {shlex.join(command)}", file=sys.stderr)
        raise


def finish_run(trainer: ResNetTrainer, data: MNISTDataLoader, history: dict) -> None:
    """Test a trained network; write its report, pictures and, of Kaggle's files, the solution."""
    recipe, run_dir = trainer.recipe, trainer.run_dir
    if not run_dir:  # of several processes, the first one tests and writes
        return
    results = trainer.test(data.test.to(trainer.device))
    rows = load_checkpoint(run_dir / "best.pt")["rows"]
    report = make_report(recipe, rows, results)
    write_atomically(run_dir / "report.txt", report.encode())
    print(report if trainer.quiet else f"\n{report}")
    if data.unlabelled is not None:
        write_solution(trainer, data.unlabelled, run_dir / "solution.csv")
    title = f"{recipe.model}, {recipe.input}, {recipe.dataset}"
    visualize_results(trainer.model, data.test, results, history, run_dir, title)
    if not trainer.quiet:
        print(f"weights, history, report and pictures: {run_dir}")


def command_evaluate(args: argparse.Namespace, given: dict) -> None:
    """Report how the best networks of runs do on the test set; of several also a table."""
    table = [("model", "input", "parameters", "MFLOPs", "s/epoch", "accuracy", "run")]
    curves = {}
    for run in args.runs or [None]:
        trainer, checkpoint, path = load_run(run, args.device, given)
        recipe, last = trainer.recipe, path.with_name("last.pt")
        data = load_data(recipe, args.data_dir)
        print(f"{path} on {describe_device(trainer.device)}, {trainer.precision}\n")
        results = trainer.test(data.test.to(trainer.device))
        own = [] if "average" in checkpoint else checkpoint["rows"]  # those are of the mean
        print(make_report(recipe, own, results))
        if len(args.runs) < 2:
            return
        rows = load_checkpoint(last)["rows"] if last.exists() else checkpoint["rows"]
        layers = list_layers(trainer.model, next(iter(data.test))[0][:1])
        seconds = statistics.median(row["seconds"] for row in rows) if rows else math.nan
        parameters, flops = (sum(layer[i] for layer in layers) for i in (2, 3))
        counts = f"{parameters:,}", f"{flops / 1e6:,.1f}", f"{seconds:.1f}"
        name = f"{recipe.model}{', plain' * recipe.plain}{', tta' * recipe.tta}"
        table += [(name, recipe.input, *counts, f"{results['accuracy']:.2f} %", path)]
        torch.manual_seed(0)
        batch = next(iter(data.train))  # the same for all
        torch.manual_seed(recipe.seed)
        norms = [] if recipe.weights else gradient_norms(build_model(recipe), *batch)
        curves[str(path.parent if path.name == "best.pt" else path)] = rows, norms
    for line in table:
        print("{:20} {:7}{:>12}{:>9}{:>9}{:>10}  {}".format(*map(str, line)))
    picture = find_checkpoint(args.runs[0], "best.pt").with_name("comparison.png")
    save_figure(plot_comparison(curves), picture)
    print(f"accuracy against time, training loss, gradients: {picture}")


def command_predict(args: argparse.Namespace, given: dict) -> None:
    """Read digits from image files, or from Kaggle's test.csv: label and probability of each."""
    if bool(args.images) == bool(args.kaggle):
        raise UserError("predict takes image files, or --kaggle and a test.csv")
    trainer, _, path = load_run(args.checkpoint, args.device, given)
    if args.kaggle:
        images, _ = read_kaggle(args.kaggle, labelled=False)
        return write_solution(trainer, images, path.with_name("solution.csv"))
    pictures, digits = zip(*map(read_image, args.images), strict=True)
    results = trainer.test(as_loader(trainer, torch.stack(digits)))
    for name, probabilities in zip(args.images, results["probabilities"], strict=True):
        print(f"{probabilities.argmax()}  {100 * probabilities.max():6.2f} %  {name}")
    title = f"{trainer.recipe.model}, trained on {trainer.recipe.dataset}"
    figure = plot_readings(args.images, pictures, digits, results["probabilities"], title)
    save_figure(figure, path.with_name("predict.png"))
    print(f"what the network saw: {path.with_name('predict.png')}")


def command_describe(args: argparse.Namespace, given: dict) -> None:
    """Print each layer's output shape, parameters, FLOPs and share of live weights."""
    recipe = Recipe(**given)
    model = build_model(recipe)
    print(f"{recipe.model} for {recipe.input}")
    visualize_model_architecture(model, INPUTS[recipe.input][1])


COMMANDS = {
    "train": command_train,
    "evaluate": command_evaluate,
    "predict": command_predict,
    "describe": command_describe,
}


def make_parser(command: str) -> argparse.ArgumentParser:
    """Return the parser of a command; the flags of a recipe are made from its fields."""
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    parser.prog, parser.description = f"resnet18_mnist.py {command}", COMMANDS[command].__doc__
    parser.epilog = "Other commands: " + ", ".join(name for name in COMMANDS if name != command)
    operands = {"evaluate": "[RUN ...] ", "predict": "[IMAGE ...] "}.get(command, "")
    parser.usage = f"%(prog)s {operands}[flags]"
    add = parser.add_argument
    of_network = ("model", "input", "stem", "plain")
    for setting in fields(Recipe):
        if command == "train" or (command == "describe" and setting.name in of_network):
            add("--" + setting.name.replace("_", "-"), **setting.metadata["flag"])
    if command == "train":
        named = "named settings (list shows them); flags given beside it win"
        add("--recipe", choices=(*RECIPES, "list"), help=named)
        add("--output-dir", metavar="DIR", help="folder of the run (default: a new one in runs/)")
        resume = "go on with a run (default: the newest)"
        add("--resume", nargs="?", const=True, metavar="RUN", help=resume)
        add("--quiet", action="store_true", help="print the report only")
    if command == "evaluate":
        add("runs", nargs="*", help="folders or checkpoints of runs (default: the newest)")
    if command == "predict":
        add("images", nargs="*", metavar="IMAGE", help="file of an image of one digit")
        add("--kaggle", metavar="FILE", help="a test.csv, to make a solution.csv of")
        add("--checkpoint", help="a file, or the folder of a run (default: the newest)")
    if command in ("evaluate", "predict"):
        tta = {"action": argparse.BooleanOptionalAction, "default": argparse.SUPPRESS}
        add("--tta", **tta, help="mean of an image and its shifts (default: as the run has it)")
    if command in ("train", "evaluate"):
        add("--data-dir", default="data", metavar="DIR", help="where MNIST is (default: data)")
    if command in ("train", "predict"):
        add("--show", action="store_true", help="show the pictures in windows as well")
    if command != "describe":
        add("--device", help="cpu, cuda, cuda:1, mps or xpu (default: the best there is)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "train"
    if sys.stdout is None:  # closed, as >&- does
        sys.stdout = io.StringIO()
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="replace")  # a terminal may not know ×
    try:
        args, unknown = make_parser(command).parse_known_args(arguments)
        if unknown:
            raise UserError(f"{' '.join(unknown)} is not known; --help lists what there is")
        show = getattr(args, "show", False)
        if not show and "IPython" not in sys.modules:
            os.environ["MPLBACKEND"] = "agg"  # there may be no screen
        given = {s.name: getattr(args, s.name) for s in fields(Recipe) if hasattr(args, s.name)}
        keep_freed_memory()
        COMMANDS[command](args, given)
        if show:
            import matplotlib.pyplot as plt

            plt.show()
        sys.stdout.flush()
        if is_distributed():  # after an error there might be nobody to wait for
            dist.destroy_process_group()
    except BrokenPipeError:  # whoever read our output, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError, argparse.ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if re.search("out of memory|can't allocate memory", str(error)):
            print("error: out of memory; a smaller --batch-size needs less", file=sys.stderr)
        elif "deterministic" in str(error):
            print(f"error: --deterministic: {str(error).partition('. ')[0]}", file=sys.stderr)
        elif is_distributed() and re.search("by peer|NCCL", str(error)):
            print("error: another process of this job has ended", file=sys.stderr)
        else:
            raise
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


# In a notebook, whose cells are __main__ too, nothing starts by itself.
if __name__ == "__main__" and "kernel_launcher" not in sys.argv[0]:
    sys.exit(main())
