# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "torchvision>=0.26", "matplotlib>=3.10"]
# ///
"""ResNet on MNIST in one file: the network, its data, its training, its pictures.

    python resnet18_mnist.py --epochs 10        train, test on the 10,000, draw the pictures
    python resnet18_mnist.py evaluate           test the newest run's best network again
    python resnet18_mnist.py predict digit.png  read a digit from an image file
    python resnet18_mnist.py describe           each layer's shape, parameters and FLOPs

Measured with seed 0: 99.40 % of the 10,000 test images after ten epochs, in a quarter of an hour
on two CPU cores.

The sections, each a notebook cell, and the sections above that each one needs:

    0  Imports
    1  Network       the residual block, and five depths built from it       0
    2  Data          70,000 digits as tensors; a batch is an index           0
    3  Device        where to compute, and in which number format            0
    4  Recipe        every hyperparameter and its default                    0 1 2
    5  Training      an epoch, early stopping, checkpoints, the whole run    0 1 2 3 4
    6  Pictures      curves, confusion matrix, mistakes, feature maps        0 1 5
    7  Command line  train, evaluate, predict, describe                      all

Sources
    He, Zhang, Ren, Sun 2015a  Deep Residual Learning for Image Recognition  arXiv:1512.03385
    He, Zhang, Ren, Sun 2015b  Delving Deep into Rectifiers                  arXiv:1502.01852
    Ioffe, Szegedy 2015        Batch Normalization                           arXiv:1502.03167
    Goyal et al. 2017          Accurate, Large Minibatch SGD                 arXiv:1706.02677
    LeCun, Cortes, Burges      The MNIST Database      http://yann.lecun.com/exdb/mnist/
"""

# %% 0. Imports

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import io
import math
import os
import platform
import random
import shlex
import shutil
import sys
import time
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision import datasets
from torchvision.transforms.v2 import functional as TF


class UserError(Exception):
    """A mistake that the user can mend: the command line says it in one line and exits with 2."""


# %% 1. Network
#
# A plain network asks a stack of layers for a mapping H(x). A residual network asks it only for
# the difference to its input, F(x) = H(x) - x, and adds x again: y = F(x) + x (He 2015a, eq. 1).
# Where the identity is nearly right, small weights suffice, so a deeper network need not train
# worse than a shallower one, as plain networks do (fig. 1).
#
# The layers carry torchvision's names and order: a state dict fits both, and so do its logits.


def conv3x3(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """3×3 convolution with padding 1: (N, in, H, W) → (N, out, ⌈H/stride⌉, ⌈W/stride⌉)."""
    # No bias: the batch norm behind it subtracts the mean, and a bias with it (Ioffe 2015, 3.2).
    return nn.Conv2d(in_planes, out_planes, 3, stride=stride, padding=1, bias=False)


def conv1x1(in_planes: int, out_planes: int, stride: int = 1) -> nn.Conv2d:
    """1×1 convolution, which mixes channels: (N, in, H, W) → (N, out, ⌈H/stride⌉, ⌈W/stride⌉)."""
    return nn.Conv2d(in_planes, out_planes, 1, stride=stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut around them (He 2015a, fig. 5 left).

    (N, inplanes, H, W) → (N, planes, ⌈H/stride⌉, ⌈W/stride⌉). Where the two shapes differ,
    ``downsample`` takes the shortcut from one to the other (eq. 2).
    """

    expansion = 1  # channels out of the block / planes

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample=None):
        super().__init__()
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(F(x) + shortcut(x)); through the shortcut the gradient passes unchanged."""
        residual = self.relu(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        shortcut = x if self.downsample is None else self.downsample(x)
        # The last ReLU comes after the sum: a residual must be able to subtract.
        return self.relu(residual + shortcut)


class Bottleneck(nn.Module):
    """1×1 to ``planes`` channels, 3×3 there, 1×1 to four times as many (fig. 5 right).

    It costs about what a BasicBlock on a quarter of its output channels costs: that makes 50
    layers and more affordable. (N, inplanes, H, W) → (N, 4·planes, ⌈H/stride⌉, ⌈W/stride⌉).
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


STEMS = ("imagenet", "cifar")


class ResNet(nn.Module):
    """A stem, four layers of ``layers`` blocks each, the mean of the last map, a linear classifier.

    The "imagenet" stem, a 7×7 with stride 2 and a max-pool, reduces each side to a quarter. The
    "cifar" stem, a 3×3 with stride 1, keeps every pixel of a small image, as the first layer of
    the paper's networks for CIFAR-10 does (He 2015a, 4.2).
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        layers: list[int],
        num_classes: int = 10,
        input_channels: int = 1,
        stem: str = "imagenet",
    ):
        super().__init__()
        if stem not in STEMS:
            raise ValueError(f"stem {stem!r} is none of {STEMS}")
        self.inplanes = 64  # channels that the next block receives
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
        outplanes, downsample = planes * block.expansion, None
        if stride != 1 or self.inplanes != outplanes:
            # A projection where the shape changes, the identity elsewhere (He 2015a, 4.1, B).
            projection = conv1x1(self.inplanes, outplanes, stride)
            downsample = nn.Sequential(projection, nn.BatchNorm2d(outplanes))
        first = block(self.inplanes, planes, stride, downsample)
        self.inplanes = outplanes
        return nn.Sequential(first, *(block(outplanes, planes) for _ in range(blocks - 1)))

    def get_feature_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return the output of the stem and of each layer for images (N, C, H, W), and their mean.

        The shapes are those of ResNet-18 for 1×28×28 ("imagenet") / for 3×32×32 ("cifar").
        """
        maps = {}
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


# Which block, and how many of it in each layer (He 2015a, table 1). All take num_classes,
# input_channels and stem.
resnet18 = partial(ResNet, BasicBlock, [2, 2, 2, 2])
resnet34 = partial(ResNet, BasicBlock, [3, 4, 6, 3])
resnet50 = partial(ResNet, Bottleneck, [3, 4, 6, 3])
resnet101 = partial(ResNet, Bottleneck, [3, 4, 23, 3])
resnet152 = partial(ResNet, Bottleneck, [3, 8, 36, 3])
MODELS = {"resnet18": resnet18, "resnet34": resnet34, "resnet50": resnet50}
MODELS |= {"resnet101": resnet101, "resnet152": resnet152}

Layer = namedtuple("Layer", "name shape parameters flops live")


@torch.no_grad()
def list_layers(model: nn.Module, image: Tensor) -> list[Layer]:
    """Send one image (1, C, H, W) through the model; return its layers in running order.

    Shapes are C×H×W. Parameters include those of the batch norm behind a layer. FLOPs are forward
    and count a multiply-add as two, where the paper counts one. ``live`` is the share of a
    layer's weights that the image can reach.
    """
    rows, counter = [], FlopCounterMode(display=False)
    model = copy.deepcopy(model).eval()  # a copy, which takes the hooks with it

    def add_row(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        parameters = sum(p.numel() for p in layer.parameters())
        if isinstance(layer, nn.BatchNorm2d):
            rows[-1] = rows[-1]._replace(parameters=rows[-1].parameters + parameters)
            return
        live = 1.0
        if isinstance(layer, nn.Conv2d):
            # A tap is dead that lies on the padding wherever the kernel stops. On a 1×1 map eight
            # of a 3×3's nine taps do: why small images want the small stem.
            window = layer.kernel_size, layer.dilation, layer.padding, layer.stride
            live = F.unfold(torch.ones_like(x[:, :1]), *window).amax(dim=2).mean().item()
        flops = counter.get_flop_counts().get(f"{type(model).__name__}.{name}", {})
        shape = "×".join(str(side) for side in y.shape[1:])
        rows.append(Layer(name, shape, parameters, sum(flops.values()), live))

    for name, part in model.named_modules():
        if not list(part.children()) and not isinstance(part, (nn.ReLU, nn.Identity)):
            part.register_forward_hook(lambda part, x, y, name=name: add_row(name, part, x[0], y))
    with counter:
        model(image)
    return rows


def visualize_model_architecture(model: ResNet, image_size: int | None = None) -> None:
    """Print the layers that an image of this size (default: 28 if gray, 32 if RGB) meets."""
    channels = model.conv1.in_channels
    size = image_size or (28 if channels == 1 else 32)
    rows = list_layers(model, model.conv1.weight.new_zeros(1, channels, size, size))
    parameters, flops = sum(row.parameters for row in rows), sum(row.flops for row in rows)
    live = sum(row.parameters * row.live for row in rows) / parameters
    print(f"{'layer':21}{'output':>10}{'parameters':>13}{'FLOPs':>15}{'live':>9}")
    print(f"{'input':21}{f'{channels}×{size}×{size}':>10}")
    for row in [*rows, Layer("total", "", parameters, flops, live)]:
        print("{:21}{:>10}{:13,}{:15,}{:9.1%}".format(*row))
    print("FLOPs: one image forward, a multiply-add counted as two.")
    print("live: share of the weights that can meet a pixel; the others meet only padding.")


# %% 2. Data
#
# MNIST is 55 MB of bytes: it lives as one uint8 tensor on the device that trains. A batch is an
# index into it, made float, augmented and normalised as a whole. With no Python per image and no
# worker process, the network never waits.

MNIST_MEAN, MNIST_STD = 0.1307, 0.3081  # of the 60,000 training images, pixels scaled to 0–1
INPUTS = {"gray28": (1, 28), "rgb32": (3, 32)}  # name → channels, pixels a side

# Images (N, 28, 28) uint8, light ink on dark ground, with labels (N,) int64 from 0 to 9.
Digits = namedtuple("Digits", "name train_images train_labels test_images test_labels")


class DataMissing(UserError):
    """None of MNIST's files is there, and none could be downloaded."""


def read_mnist(data_dir: str | Path) -> Digits:
    """Read MNIST from ``data_dir``/MNIST/raw; download, and check the MD5 of, what is missing.

    Raises DataMissing where there is nothing, UserError where something is damaged or missing.
    """
    raw = Path(data_dir, "MNIST", "raw")
    try:
        train, test = (datasets.MNIST(data_dir, part, download=True) for part in (True, False))
    except Exception as error:
        raise explain_failure(raw, error) from error
    for part, name in ((train, "train"), (test, "t10k")):
        count = max(len(part.targets), 1)  # none at all do not fit either
        if part.data.shape != (count, 28, 28) or part.targets.max() > 9:
            raise UserError(f"{name}-images and {name}-labels in {raw} do not fit each other")
    return Digits("mnist", train.data, train.targets, test.data, test.targets)


def explain_failure(raw: Path, error: Exception) -> UserError:
    """Find the file that made torchvision fail with ``error``."""
    mnist, missing = datasets.mnist, []
    for name, md5 in datasets.MNIST.resources:
        packed, unpacked = raw / name, raw / name.removesuffix(".gz")
        try:
            if unpacked.is_file():
                (mnist.read_image_file if "images" in name else mnist.read_label_file)(unpacked)
        except Exception:  # whatever torchvision makes of arbitrary bytes
            return UserError(f"{unpacked} is damaged: delete it, and it is made again")
        if not packed.is_file():
            missing.append(name)
        elif not mnist.check_integrity(packed, md5):
            return UserError(f"{packed} is damaged (wrong MD5) and cannot be downloaded")
    if isinstance(error, OSError) and error.strerror:
        return UserError(f"MNIST cannot be brought to {raw}: {error.strerror}")
    kind = UserError if any(raw.glob("*-ubyte*")) else DataMissing
    reason = str(error).strip().rpartition("\n")[2]
    return kind(f"MNIST cannot be downloaded ({reason}); put {', '.join(missing)} into {raw}")


def draw_synthetic_digits(seed: int, train_size: int = 6000, test_size: int = 1000) -> Digits:
    """Draw digits of random font, size, place, rotation and stroke, with matplotlib's fonts."""
    import matplotlib

    symbols = ("Display", "LastResort", "NonUni", "Siz", "cmex", "cmmi", "cmsy")  # hold no digits
    paths = sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf"))
    paths = [path for path in paths if not any(name in path.name for name in symbols)]
    fonts = [ImageFont.truetype(path, size) for path in paths for size in range(32, 51, 3)]
    rng = random.Random(seed)

    def draw(digit: int) -> Tensor:
        canvas = Image.new("L", (56, 56))  # twice too large: shrinking smooths the edges
        place, stroke = (rng.uniform(22, 34), rng.uniform(22, 34)), rng.randint(0, 2)
        pen = ImageDraw.Draw(canvas)
        pen.text(place, str(digit), 255, rng.choice(fonts), anchor="mm", stroke_width=stroke)
        canvas = canvas.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR)
        return TF.pil_to_tensor(canvas.reduce(2))[0]

    labels = torch.arange(train_size + test_size) % 10
    images = torch.stack([draw(digit) for digit in labels.tolist()])
    n = train_size
    return Digits("synthetic", images[:n], labels[:n], images[n:], labels[n:])


def load_digits(dataset: str, data_dir: str | Path, seed: int) -> Digits:
    """Load "mnist", "synthetic", or "auto": MNIST, and where it is missing synthetic digits."""
    if dataset != "synthetic":
        try:
            return read_mnist(data_dir)
        except DataMissing as error:
            if dataset == "mnist":
                raise
            print(f"WARNING: {error}.\nGoing on with SYNTHETIC digits.", file=sys.stderr)
    return draw_synthetic_digits(seed)


def split_by_class(labels: Tensor, val_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return shuffled indices (train, validation); each class has the same share in both."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = order[labels[order].argsort(stable=True)]
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    # Evenly spaced picks from a list that is sorted by class take from each class its share.
    held_out[by_class[torch.arange(val_size) * len(labels) // max(val_size, 1)]] = True
    return order[~held_out[order]], order[held_out[order]]


def rotate_and_shift(images: Tensor, draws: Tensor) -> Tensor:
    """Turn each image (N, C, H, W) by up to 10°, move it by up to a tenth of its side.

    Each by its own draw, a row of ``draws`` (N, 3) in [-1, 1): torchvision's transforms give one
    draw to a whole batch (its issue 8484). What moves in from outside is 0, background.
    """
    angle = draws[:, 0] * math.radians(10)
    cos, sin = angle.cos(), angle.sin()
    # theta takes an output pixel to the input pixel that it copies, in sides from -1 to 1.
    dx, dy = 0.2 * draws[:, 1:].T
    theta = torch.stack([cos, -sin, dx, sin, cos, dy], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


class Batches:
    """Digits on one device; iterating gives (images, labels) as a network wants them.

    ``images`` (N, 28, 28) uint8 become (batch_size, C, S, S) float, normalised, of the shape that
    ``input`` names. Order and augmentation depend on seed and epoch alone, so that an epoch can
    be repeated. The last, short batch is kept.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int = 128,
        input: str = "gray28",
        seed: int = 0,
        shuffle: bool = False,
        augment: bool = False,
    ):
        self.channels, size = INPUTS[input]
        # One channel is stored; three equal ones exist only in the batch at hand.
        self.images = TF.resize(images[:, None], [size, size], antialias=False)
        self.labels, self.seed, self.shuffle, self.augment = labels, seed, shuffle, augment
        self.epoch, self.cuts = 0, list(range(batch_size, len(labels), batch_size))
        if self.cuts and len(labels) - self.cuts[-1] == 1:
            self.cuts.pop()  # batch norm on a 1×1 map needs two images: a lone one joins the rest

    def __len__(self) -> int:
        return len(self.cuts) + 1

    def to(self, device: torch.device | str) -> Batches:
        """Move the images to ``device``, once for all batches to come."""
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of the next iteration."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n, device = len(self.labels), self.images.device
        # Drawn on the CPU, so that all devices see the same; seeds are a million epochs apart.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        self.epoch += 1
        order = torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n)
        draws = 2 * torch.rand(n, 3, generator=generator).to(device) - 1 if self.augment else None
        for index in order.to(device).tensor_split(self.cuts):
            x = self.images[index].float() / 255  # (N, 1, S, S)
            if self.augment:
                x = rotate_and_shift(x, draws[index])
            x = (x - MNIST_MEAN) / MNIST_STD
            yield x.expand(-1, self.channels, -1, -1), self.labels[index]


class MNISTDataLoader:
    """MNIST as three loaders: ``.train``, ``.val`` and ``.test``.

    ``val_size`` images (default: a twelfth, 5,000 of the 60,000) are held out of the training set.
    ``select_on="test"`` holds none out and makes ``.val`` the test set, as many scripts do.
    ``limit`` keeps so many of the training images.
    """

    def __init__(
        self,
        batch_size: int = 128,
        data_dir: str | Path = "data",
        dataset: str = "auto",
        input: str = "gray28",
        val_size: int | None = None,
        select_on: str = "val",
        limit: int | None = None,
        augment: bool = False,
        seed: int = 0,
    ):
        digits = load_digits(dataset, data_dir, seed)
        self.name, images, labels = digits[:3]
        val_size = len(labels) // 12 if val_size is None else val_size
        if select_on == "test":
            val_size = 0
        elif not 0 < val_size <= len(labels) - 2:
            raise UserError(f"--val-size {val_size} does not fit {len(labels)} training images")
        train, val = split_by_class(labels, val_size, seed)
        train, common = train[:limit], (batch_size, input, seed)
        self.train = Batches(images[train], labels[train], *common, shuffle=True, augment=augment)
        self.test = Batches(digits.test_images, digits.test_labels, *common)
        self.val = Batches(images[val], labels[val], *common) if val_size else self.test

    def get_data_loaders(self) -> tuple[Batches, Batches]:
        """Return (train, test)."""
        return self.train, self.test


# %% 3. Device
#
# bfloat16 keeps the exponent of float32 in half the bytes: hardware that multiplies it is faster,
# and gradients need no scaling against underflow, as they do in float16.


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """Return the named device ("cpu", "cuda", "cuda:1", "mps", "xpu"), or the best there is.

    Raises UserError for one that is not there.
    """
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
    return f"{device} ({name}, {torch.get_num_threads()} threads)"


def pick_precision(name: str, device: torch.device) -> str:
    """Turn "auto" into "bf16" where the device is known to compute it in hardware, or "fp32"."""
    if name != "auto":
        return name
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        fast = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    return "bf16" if fast else "fp32"


def autocast(device: torch.device | str, precision: str) -> torch.autocast:
    """Return the context in which convolutions compute in ``precision``; weights stay float32."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16")


# %% 4. Recipe

DATASETS, PRECISIONS = ("auto", "mnist", "synthetic"), ("auto", "fp32", "bf16")


def option(default, text: str, choices: tuple = (), low: float | None = None, high: float = 2**32):
    """Return a dataclass field that knows its help text and its values, low ≤ value < high."""
    limits = {"choices": choices, "low": low, "high": high}
    return field(default=default, metadata={"help": text, **limits})


@dataclass(frozen=True)
class Recipe:
    """All that decides the numbers of a run. Each field is a flag of the command line."""

    model: str = option("resnet18", "network", tuple(MODELS))
    input: str = option("gray28", "1×28×28 or 3×32×32 pixels", tuple(INPUTS))
    stem: str = option("auto", "auto: imagenet for gray28, cifar for rgb32", ("auto", *STEMS))
    dataset: str = option("auto", "auto: mnist, or synthetic if missing", DATASETS)
    val_size: int | None = option(None, "images held out to select on (default: a twelfth)", low=1)
    select_on: str = option("val", "the set that selects; test is optimistic", ("val", "test"))
    limit: int | None = option(None, "images to train on (default: all)", low=2)
    augment: bool = option(True, "turn images by up to 10°, shift them by a tenth of the side")
    epochs: int = option(10, "passes over the training images, at most", low=1)
    batch_size: int = option(128, "images a batch", low=2)
    accumulate: int = option(1, "batches whose gradients make one update", low=1)
    lr: float = option(0.01, "learning rate", low=0)
    momentum: float = option(0.9, "momentum of SGD", low=0, high=1)
    weight_decay: float = option(5e-4, "L2 penalty on all parameters", low=0)
    lr_factor: float = option(0.3, "factor to the learning rate at a plateau", low=0, high=1)
    lr_patience: int = option(0, "epochs without a lower loss that are no plateau yet", low=0)
    patience: int = option(5, "epochs without a lower loss before stopping", low=1)
    seed: int = option(0, "fixes split, initial weights, order and augmentation", low=0)
    precision: str = option("auto", "auto: bf16 where hardware computes it", PRECISIONS)

    def __post_init__(self):
        for setting in fields(self):
            value, limits = getattr(self, setting.name), setting.metadata
            if limits["choices"] and value not in limits["choices"]:
                choices = ", ".join(limits["choices"])
                raise UserError(f"{setting.name} is {value!r}, not one of {choices}")
            low, high = limits["low"], limits["high"]
            if low is not None and value is not None and not low <= value < high:
                raise UserError(f"{setting.name} is {value}, not from {low} to below {high}")

    def build_model(self) -> ResNet:
        """Return the network with fresh weights."""
        stem = {"gray28": "imagenet", "rgb32": "cifar"}[self.input]
        stem = stem if self.stem == "auto" else self.stem
        return MODELS[self.model](input_channels=INPUTS[self.input][0], stem=stem)

    def load_data(self, data_dir: str | Path = "data") -> MNISTDataLoader:
        """Return the images to train on, to select on and to test on."""
        names = ("batch_size", "dataset", "input", "val_size", "select_on", "limit", "augment")
        options = {name: getattr(self, name) for name in (*names, "seed")}
        return MNISTDataLoader(data_dir=data_dir, **options)


# %% 5. Training
#
# train_one_epoch() and evaluate() are the whole idea. ResNetTrainer repeats them, lowers the
# learning rate on a plateau, stops when nothing improves any more, and after each epoch writes
# down all that is needed to go on as if nothing had happened.


def mean_loss(losses: list[Tensor], sizes: list[int]) -> float:
    """Return the mean over the images of batches of these losses and sizes.

    Raises FloatingPointError that names the first step whose loss is not finite.
    """
    values = torch.stack(losses).cpu()
    if not values.isfinite().all():
        step = values.isfinite().int().argmin().item()
        raise FloatingPointError(f"the loss became {values[step].item()} at step {step + 1}")
    return (values * torch.tensor(sizes)).sum().item() / sum(sizes)


def train_one_epoch(
    model: nn.Module,
    loader,
    optimizer: torch.optim.Optimizer,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    accumulate: int = 1,
    title: str | None = None,
) -> dict[str, float]:
    """Go through the loader once; return loss (mean, nats), accuracy (%) and images_per_second.

    With a ``title`` it shows how it goes: one live line on a terminal, a line every 100 batches in
    a pipe. Raises FloatingPointError where the loss is no longer finite.
    """
    model.train()
    optimizer.zero_grad()
    sizes, losses, correct = [], [], []  # left on the device: no step waits for the one before
    started = shown = time.perf_counter()
    on_terminal = title and sys.stdout.isatty()
    for step, (images, labels) in enumerate(loader):
        images = images.to(device, non_blocking=True)  # (N, C, H, W)
        labels = labels.to(device, non_blocking=True)  # (N,)
        with autocast(device, precision):
            logits = model(images)  # (N, 10)
            loss = F.cross_entropy(logits, labels)
        # An update's gradient is the mean over its group of batches; the last group may be short.
        first = step // accumulate * accumulate
        group = min(accumulate, len(loader) - first)
        (loss / group).backward()
        if step + 1 == first + group:
            optimizer.step()
            optimizer.zero_grad()
        sizes.append(len(labels))
        losses.append(loss.detach())
        correct.append((logits.argmax(dim=1) == labels).sum())

        done, now = step + 1, time.perf_counter()
        if done % 100 == 0 or (on_terminal and now - shown > 0.2):
            shown, passed, so_far = now, now - started, mean_loss(losses, sizes)
            line = f"{title}  batch {done}/{len(loader)}  loss {so_far:.4f}  "
            line += f"{sum(sizes) / passed:,.0f} images/s  "
            line += f"{passed / done * (len(loader) - done):.0f} s left"
            if title:
                show_progress(line)
    return {
        "loss": mean_loss(losses, sizes),
        "accuracy": 100 * torch.stack(correct).sum().item() / sum(sizes),
        "images_per_second": sum(sizes) / (time.perf_counter() - started),
    }


def show_progress(line: str) -> None:
    """Print a line; on a terminal it takes the place of the one before."""
    if sys.stdout.isatty():
        columns = shutil.get_terminal_size().columns
        print(f"\r{line[: columns - 1]}\033[K", end="", flush=True)
    elif line:
        print(line, flush=True)


@torch.inference_mode()
def evaluate(
    model: nn.Module, loader, device: torch.device | str = "cpu", precision: str = "fp32"
) -> dict:
    """Return loss (nats), accuracy (%), predictions (N,), labels (N,), probabilities (N, 10)."""
    training = model.training
    model.eval()
    with autocast(device, precision):
        outputs = [(model(images.to(device)), labels) for images, labels in loader]
    model.train(training)
    logits, labels = (torch.cat(part).cpu() for part in zip(*outputs, strict=True))
    logits, predictions = logits.float(), logits.argmax(dim=1)
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


FORMAT = "resnet18_mnist checkpoint 1"


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that a kill at any moment leaves the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the new name on an empty file
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def save_checkpoint(path: Path, **content) -> None:
    """Write tensors, numbers, text, and lists and dicts of these."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    write_atomically(path, buffer.getbuffer())


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint onto the CPU. Raises UserError if it is missing, damaged or not ours."""
    checkpoint = None
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is None:  # torch.load does not look at the checksums
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # whatever zip, zlib and pickle make of arbitrary bytes
        raise UserError(f"{path} is damaged, or is no checkpoint") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{path} is damaged, or is no checkpoint of this program")
    return checkpoint


HEADER = "epoch  train loss       %   val loss       %        lr       s  images/s"
ROW = (
    "{epoch:5}{train_loss:12.4f}{train_accuracy:8.2f}{val_loss:11.4f}{val_accuracy:8.2f}"
    "{learning_rate:10.2g}{seconds:8.1f}{images_per_second:10,.0f}  {best}"
)


class ResNetTrainer:
    """Trains and tests a model: SGD, ReduceLROnPlateau, early stopping, checkpoints.

    ``model`` is any classifier; parameters with requires_grad=False stay as they are (statistics
    of batch norms do not). ``device`` None picks the best. Of ``recipe`` the fields of model and
    data are ignored. ``run_dir`` receives best.pt, last.pt and history.csv; None writes nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | str | None = None,
        recipe: Recipe | None = None,
        run_dir: Path | None = None,
        quiet: bool = False,
    ):
        self.recipe, self.run_dir, self.quiet = recipe or Recipe(), run_dir, quiet
        self.device = pick_device(device)
        self.precision = pick_precision(self.recipe.precision, self.device)
        # The layout that cuDNN and oneDNN prefer: it saves a transposition a convolution.
        self.model = model.to(self.device, memory_format=torch.channels_last)

    def train(self, train_loader, val_loader=None, resume: dict | None = None, **overrides) -> dict:
        """Train; end on the weights of the best epoch, in eval mode; return the history.

        Loaders are iterables of (images, labels) with a length; without a ``val_loader`` the
        training loss schedules and selects. ``resume`` is the content of a last.pt to go on from.
        ``overrides`` (num_epochs, learning_rate, and all of Recipe's names) win over the recipe.
        The history has a list for each quantity, with a value for each epoch.
        """
        names = {"num_epochs": "epochs", "learning_rate": "lr"}
        overrides = {names.get(name, name): value for name, value in overrides.items()}
        self.recipe = recipe = replace(self.recipe, **overrides)
        self.precision = pick_precision(recipe.precision, self.device)
        weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(
            weights, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay
        )
        self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer, factor=recipe.lr_factor, patience=recipe.lr_patience, threshold=0
        )
        self.rows, stopping = [], EarlyStopping(recipe.patience)
        if resume:
            self._restore(resume)
            for row in self.rows:  # which is all the memory that early stopping needs
                stopping.step(row["val_loss"])
        elif self.run_dir:
            self._save()  # so that a run killed in its first epoch can be resumed as well
        best_weights = copy.deepcopy(self.model.state_dict())
        for loader in (train_loader, val_loader):
            if isinstance(loader, Batches):
                loader.to(self.device)
        if not self.quiet:
            print(HEADER, flush=True)
        while len(self.rows) < recipe.epochs and not stopping.should_stop:
            row = self._train_and_validate(train_loader, val_loader)
            self.scheduler.step(row["val_loss"])
            row["best"] = stopping.step(row["val_loss"])
            self.rows.append(row)
            if row["best"]:
                best_weights = copy.deepcopy(self.model.state_dict())
            if self.run_dir:
                self._save()
            if not self.quiet:
                print(ROW.format(**{**row, "best": "best" * row["best"]}).rstrip(), flush=True)
        if stopping.should_stop and not self.quiet:
            print(f"stopped early: no lower loss for {recipe.patience} epochs")
        if self.run_dir:
            best_weights = load_checkpoint(self.run_dir / "best.pt")["model"]
        self.model.load_state_dict(best_weights)
        self.model.eval()
        return {name: [row[name] for row in self.rows] for name in self.rows[0]}

    def _train_and_validate(self, train_loader, val_loader) -> dict:
        epoch, started = len(self.rows) + 1, time.perf_counter()
        title = None if self.quiet else f"{epoch:5}/{self.recipe.epochs}"
        if hasattr(train_loader, "set_epoch"):
            train_loader.set_epoch(epoch)
        try:
            train = val = train_one_epoch(
                *(self.model, train_loader, self.optimizer, self.device, self.precision),
                *(self.recipe.accumulate, title),
            )
            if val_loader is not None:
                val = self.test(val_loader)
            if not math.isfinite(val["loss"]):
                raise FloatingPointError(f"the validation loss became {val['loss']}")
        except FloatingPointError as error:
            kept = f"{self.run_dir} keeps the last good weights; " if self.run_dir else ""
            raise UserError(f"epoch {epoch}: {error}; {kept}try a lower --lr") from error
        finally:
            if title:
                show_progress("")
        return {
            "epoch": epoch,
            "train_loss": train["loss"],
            "train_accuracy": train["accuracy"],
            "val_loss": val["loss"],
            "val_accuracy": val["accuracy"],
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds": time.perf_counter() - started,
            "images_per_second": train["images_per_second"],
        }

    def _save(self) -> None:
        """Write best.pt, history.csv, last.pt: a kill between two costs a repeat of the epoch."""
        latest = self.rows[-1] if self.rows else {}
        recipe, weights = asdict(self.recipe), self.model.state_dict()
        common = {"recipe": recipe, "metrics": latest, "model": weights}
        if latest.get("best"):
            save_checkpoint(self.run_dir / "best.pt", **common)
        table = io.StringIO()
        writer = csv.DictWriter(table, latest, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.run_dir / "history.csv", table.getvalue().encode())
        save_checkpoint(
            self.run_dir / "last.pt",
            **common,
            rows=self.rows,
            optimizer=self.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
            random_states=[module.get_rng_state() for module in self._random_modules()],
        )

    def _restore(self, checkpoint: dict) -> None:
        """Put all back as it was when this last.pt was written."""
        for name in ("model", "optimizer", "scheduler"):
            getattr(self, name).load_state_dict(checkpoint[name])
        self.rows = checkpoint["rows"]
        for module, state in zip(self._random_modules(), checkpoint["random_states"], strict=False):
            module.set_rng_state(state)

    def _random_modules(self) -> list:
        return [torch] + [torch.get_device_module(self.device)] * (self.device.type != "cpu")

    def test(self, test_loader) -> dict:
        """Return what evaluate() does: loss, accuracy, predictions, labels, probabilities."""
        return evaluate(self.model, test_loader, self.device, self.precision)


def train_model(model: nn.Module, train_loader, val_loader=None, device=None, **options) -> dict:
    """Train a model and return its history: ResNetTrainer.train() as a function."""
    return ResNetTrainer(model, device).train(train_loader, val_loader, **options)


# %% 6. Pictures
#
# Blue and vermilion, of Okabe and Ito's palette, differ to colour-blind eyes as well.

BLUE, VERMILION = "#0072B2", "#D55E00"


def subplots(rows: int, columns: int, width: float, height: float, title: str):
    """Return a figure (inches) with a title, and its axes (rows, columns)."""
    import matplotlib.pyplot as plt  # half a second that only pictures cost

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


def plot_curves(history: dict[str, list], title: str = ""):
    """Plot loss and accuracy by epoch, with the best epoch and the learning-rate drops."""
    epochs, rates = history["epoch"], history["learning_rate"]
    best_epoch = max(e for e, is_best in zip(epochs, history["best"], strict=True) if is_best)
    figure, axes = subplots(1, 2, 11, 4.2, title)
    for axis, name, unit in zip(
        axes[0], ("loss", "accuracy"), ("nats per image", "%"), strict=True
    ):
        axis.plot(epochs, history[f"train_{name}"], "o-", color=BLUE, label="training")
        axis.plot(epochs, history[f"val_{name}"], "s-", color=VERMILION, label="validation")
        best = history[f"val_{name}"][best_epoch - 1]
        axis.plot(best_epoch, best, "k*", ms=14, label=f"best epoch ({best_epoch})")
        for epoch, before, after in zip(epochs[1:], rates, rates[1:], strict=False):
            if after < before:
                axis.axvline(epoch - 0.5, color="gray", linestyle=":")
                where = {"transform": axis.get_xaxis_transform(), "rotation": 90}
                axis.text(epoch - 0.5, 0.5, f"lr {after:.1g}", **where, ha="right", va="center")
        axis.set(xlabel="epoch", ylabel=f"{name} ({unit})")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0, 0].set_yscale("log")
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
    axis.set(xlabel="predicted digit", ylabel="true digit")
    axis.set(xticks=range(10), yticks=range(10))
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


@torch.no_grad()
def plot_feature_maps(model: ResNet, image: Tensor, title: str = "", channels: int = 10):
    """Draw an image (1, C, S, S) and the first channels of what each part makes of it."""
    training = model.training
    maps = {"input": image, **model.eval().get_feature_maps(image)}
    model.train(training)
    del maps["pooled"]  # a vector
    figure, axes = subplots(len(maps), channels, channels, 1.25 * len(maps), title)
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
    model: ResNet, loader, results: dict, history: dict, run_dir: Path, title: str = ""
) -> None:
    """Save a run's pictures; ``results`` are what evaluate() returned for this loader."""
    images = torch.cat([batch[:, :1].cpu() for batch, _ in loader])
    labels, predictions = results["labels"], results["predictions"]
    sure = 100 * results["probabilities"].amax(dim=1)
    mistakes = (labels != predictions).nonzero().flatten()
    surest = mistakes[sure[mistakes].argsort(descending=True)][:40]

    def digits(chosen: Tensor, subtitle: str):
        captions = [f"true {labels[i]}, pred. {predictions[i]}\n{sure[i]:.1f} %" for i in chosen]
        wrong = (labels != predictions)[chosen].tolist()
        return plot_digits(images[chosen], captions, wrong, f"{title}\n{subtitle}")

    right = f"{results['accuracy']:.2f} % of {len(labels):,} test images right"
    first = next(iter(loader))[0][:1].to(next(model.parameters()).device)
    pictures = {
        "curves.png": plot_curves(history, title),
        "confusion_matrix.png": plot_confusion_matrix(labels, predictions, f"{title}\n{right}"),
        "predictions.png": digits(torch.arange(len(labels))[:40], "the first test images"),
        "mistakes.png": digits(surest, f"the most confident of {len(mistakes)} mistakes"),
        "feature_maps.png": plot_feature_maps(model, first, f"{title}\nfeature maps of a digit"),
    }
    for name, figure in pictures.items():
        save_figure(figure, run_dir / name)


# %% 7. Command line

RUNS = Path("runs")


def find_checkpoint(given: str | None, name: str) -> Path:
    """Return the checkpoint ``given`` as a file or as the folder of a run, or else the newest."""
    if given:
        return Path(given, name) if Path(given).is_dir() else Path(given)
    found = sorted(RUNS.glob(f"*/{name}"), key=os.path.getmtime)
    if not found:
        raise UserError(f"there is no run in {RUNS.resolve()}: train one, or name its folder")
    return found[-1]


def load_run(args: argparse.Namespace) -> tuple[ResNetTrainer, dict, Path]:
    """Return the network that a command names, ready to test, with its metrics and its file."""
    path = find_checkpoint(args.checkpoint, "best.pt")
    checkpoint = load_checkpoint(path)
    recipe = Recipe(**checkpoint["recipe"])
    model = recipe.build_model()
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise UserError(f"{path} holds the weights of another network") from error
    return ResNetTrainer(model, args.device, recipe), checkpoint["metrics"], path


def claim_run_dir(output_dir: str | None, name: str) -> Path:
    """Make the folder of a new run; refuse one that holds a run already."""
    number = 1
    while not output_dir and (RUNS / f"{name}-{number}").exists():
        number += 1
    folder = Path(output_dir or RUNS / f"{name}-{number}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "history.csv", "x"):  # of two runs that want it at once, one gets it
            return folder
    except FileExistsError:
        raise UserError(f"{folder} is taken: --resume it, or choose another") from None
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}") from error


def read_image(path: str) -> Tensor:
    """Read a picture of a digit and treat it as MNIST's digits were: (28, 28) uint8.

    The ink, dark or light, is cropped, fitted into 20×20 pixels and placed in 28×28 by its centre
    of mass, as the MNIST page has it. What looks like MNIST already is left as it is. Raises
    UserError for a file that cannot be read or shows no ink.
    """
    try:
        with Image.open(path) as file:
            picture = ImageOps.exif_transpose(file).convert("RGBA")
    except Exception as error:  # whatever Pillow makes of arbitrary bytes
        raise UserError(f"{path} cannot be read as an image") from error
    gray = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("L")
    pixels = TF.pil_to_tensor(gray)[0]
    paper = torch.cat([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]).median().item()
    if gray.size == (28, 28) and paper < 32:
        return pixels
    ink = ImageChops.difference(gray, Image.new("L", gray.size, paper))  # dark or light, now light
    darkest = ink.getextrema()[1]
    if darkest < 32:
        raise UserError(f"{path} shows no ink")
    ink = ink.point(lambda value: max(0, value - darkest // 5))  # no paper is quite even
    ink = ink.crop(ink.getbbox())
    size = [max(1, round(20 * side / max(ink.size))) for side in ink.size]
    digit = TF.pil_to_tensor(ImageOps.autocontrast(ink.resize(size)))[0]  # (h, w), one of them 20
    image, corner = torch.zeros(28, 28, dtype=torch.uint8), []
    for axis, side in enumerate(digit.shape):
        mass = digit.sum(dim=1 - axis).float()
        centre = (mass @ torch.arange(float(side)) / mass.sum()).item()
        corner.append(min(max(round(13.5 - centre), 0), 28 - side))
    image[corner[0] :, corner[1] :][: digit.shape[0], : digit.shape[1]] = digit
    return image


def make_report(recipe: Recipe, metrics: dict, results: dict) -> str:
    """Return how a network does on the test set, as text of 80 columns."""
    labels, hits = results["labels"], results["predictions"] == results["labels"]
    report = f"{recipe.model}, {recipe.input}, dataset {recipe.dataset}, seed {recipe.seed}\n"
    if metrics:
        part = "validation set" if recipe.select_on == "val" else "TEST SET, which is optimistic"
        report += f"epoch {metrics['epoch']}, selected on the {part}: "
        report += f"loss {metrics['val_loss']:.4f}, accuracy {metrics['val_accuracy']:.2f} %\n"
    report += f"test loss {results['loss']:.4f}, test accuracy {results['accuracy']:.2f} % "
    report += f"({hits.sum():,} of {len(labels):,} {recipe.dataset} images)\n\n"
    return report + classification_report(labels, results["predictions"]) + "\n"


def start_or_resume(args: argparse.Namespace, given: dict) -> tuple[Recipe, dict | None, Path]:
    """Return the recipe, and for a resumed run its last checkpoint and its folder."""
    if not args.resume:
        return Recipe(**given), None, None
    path = find_checkpoint(None if args.resume is True else args.resume, "last.pt")
    checkpoint = load_checkpoint(path)
    if "optimizer" not in checkpoint:
        raise UserError(f"{path} cannot be resumed; the last.pt of a run can")
    if args.output_dir:
        raise UserError("a resumed run stays in its folder: leave out --output-dir")
    for name in given.keys() - {"epochs", "patience"}:
        kept = checkpoint["recipe"][name]
        if given[name] != kept:
            raise UserError(
                f"{path.parent} keeps its {name} {kept}; epochs and patience may change"
            )
    return replace(Recipe(**checkpoint["recipe"]), **given), checkpoint, path.parent


def command_train(args: argparse.Namespace, given: dict) -> None:
    """Train a ResNet on MNIST, test it, and draw how it went."""
    device = pick_device(args.device)
    recipe, checkpoint, run_dir = start_or_resume(args, given)
    torch.manual_seed(recipe.seed)
    data = recipe.load_data(args.data_dir)
    recipe = replace(recipe, dataset=data.name)
    title = f"{recipe.model}, {recipe.input}, {recipe.dataset}"
    run_dir = run_dir or claim_run_dir(args.output_dir, title.replace(", ", "-"))
    trainer = ResNetTrainer(recipe.build_model(), device, recipe, run_dir, args.quiet)
    if not args.quiet:
        train, val, test = (f"{len(part.labels):,}" for part in (data.train, data.val, data.test))
        parameters = sum(p.numel() for p in trainer.model.parameters())
        print(f"device  {describe_device(device)}, {trainer.precision}")
        print(f"data    {data.name}: {train} to train, {val} to select, {test} to test")
        print(f"model   {recipe.model} for {recipe.input}: {parameters:,} parameters")
        print(f"run     {run_dir}\n", flush=True)
    try:
        history = trainer.train(data.train, data.val, resume=checkpoint)
    except KeyboardInterrupt:
        command = ["python", sys.argv[0], "--resume", str(run_dir), "--data-dir", args.data_dir]
        print(f"stopped; this goes on:  {shlex.join(command)}", file=sys.stderr)
        raise
    results = trainer.test(data.test.to(device))
    report = make_report(recipe, load_checkpoint(run_dir / "best.pt")["metrics"], results)
    write_atomically(run_dir / "report.txt", report.encode())
    print(report if args.quiet else f"\n{report}")
    visualize_results(trainer.model, data.test, results, history, run_dir, title)
    if not args.quiet:
        print(f"weights, history, report and pictures: {run_dir}")


def command_evaluate(args: argparse.Namespace, given: dict) -> None:
    """Report how the best network of a run does on the test set."""
    trainer, metrics, path = load_run(args)
    test = trainer.recipe.load_data(args.data_dir).test.to(trainer.device)
    print(f"{path} on {describe_device(trainer.device)}, {trainer.precision}\n")
    print(make_report(trainer.recipe, metrics, trainer.test(test)))


def command_predict(args: argparse.Namespace, given: dict) -> None:
    """Read digits from image files: print label and probability of each, save a picture."""
    trainer, _, path = load_run(args)
    digits = torch.stack([read_image(name) for name in args.images])
    unknown = torch.zeros(len(digits), dtype=torch.long)
    results = trainer.test(Batches(digits, unknown, input=trainer.recipe.input).to(trainer.device))
    captions = []
    best = results["probabilities"].max(dim=1)
    for name, probability, label in zip(args.images, best.values, best.indices, strict=True):
        print(f"{label}  {100 * probability:6.2f} %  {name}")
        captions.append(f"{Path(name).name}\n{label}, {100 * probability:.1f} %")
    title = f"as {trainer.recipe.model}, trained on {trainer.recipe.dataset}, saw and read them"
    figure = plot_digits(digits[:, None], captions, [False] * len(digits), title)
    save_figure(figure, path.with_name("predict.png"))
    print(f"what the network saw: {path.with_name('predict.png')}")


def command_describe(args: argparse.Namespace, given: dict) -> None:
    """Print each layer's output shape, parameters, FLOPs and share of live weights."""
    recipe = Recipe(**given)
    print(f"{recipe.model} for {recipe.input}")
    visualize_model_architecture(recipe.build_model(), INPUTS[recipe.input][1])


COMMANDS = {
    "train": command_train,
    "evaluate": command_evaluate,
    "predict": command_predict,
    "describe": command_describe,
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors take one line."""

    def error(self, message: str):
        """Raise UserError."""
        raise UserError(f"{message}; --help lists what there is")


def make_parser(command: str) -> argparse.ArgumentParser:
    """Return the parser of a command; the flags of a recipe are made from its fields."""
    parser = Parser(f"resnet18_mnist.py {command}", description=COMMANDS[command].__doc__)
    parser.epilog = "Other commands: " + ", ".join(name for name in COMMANDS if name != command)
    operands = {"evaluate": "[CHECKPOINT] ", "predict": "IMAGE... "}.get(command, "")
    parser.usage = f"%(prog)s {operands}[flags]"
    add = parser.add_argument
    flags = {"train": [f.name for f in fields(Recipe)], "describe": ["model", "input", "stem"]}
    for setting in fields(Recipe):
        if setting.name not in flags.get(command, ()):
            continue
        default, choices = setting.default, setting.metadata["choices"]
        kind = {"type": int if default is None else type(default), "choices": choices or None}
        kind["metavar"] = None if choices else "X" if isinstance(default, float) else "N"
        if isinstance(default, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        told = "" if default is None else f" (default: {default})"
        kind["help"] = setting.metadata["help"] + told
        add("--" + setting.name.replace("_", "-"), default=argparse.SUPPRESS, **kind)
    if command == "train":
        add("--output-dir", metavar="DIR", help="folder of the run (default: a new one in runs/)")
        resume = "go on with a run (default: the newest)"
        add("--resume", nargs="?", const=True, metavar="RUN", help=resume)
        add("--quiet", action="store_true", help="print the report only")
    if command == "evaluate":
        add("checkpoint", nargs="?", help="a file, or the folder of a run (default: the newest)")
    if command == "predict":
        add("images", nargs="+", metavar="IMAGE", help="file of an image of one digit")
        add("--checkpoint", help="a file, or the folder of a run (default: the newest)")
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
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has not
        sys.stdout.reconfigure(errors="replace")  # a terminal may not know ×
    try:
        args = make_parser(command).parse_args(arguments)
        show = getattr(args, "show", False)
        if not show:
            os.environ.setdefault("MPLBACKEND", "agg")  # there may be no screen
        names = {setting.name for setting in fields(Recipe)}
        COMMANDS[command](args, {k: v for k, v in vars(args).items() if k in names})
        if show:
            import matplotlib.pyplot as plt

            plt.show()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read our output, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
