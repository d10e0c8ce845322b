# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "torchvision>=0.19", "matplotlib>=3.7"]
# ///
"""ResNet on MNIST in one file: the network, the data, the training loop, the pictures.

    python resnet18_mnist.py --epochs 10        train, test on 10,000 digits, draw the pictures
    python resnet18_mnist.py evaluate           test the newest run's best network again
    python resnet18_mnist.py predict digit.png  read a digit from a photo or a drawing
    python resnet18_mnist.py describe           each layer's shape, parameters and FLOPs

Sections 1 to 5, ending at line 688, show ResNet and its training. Each section is a notebook cell:
    1  Network         the residual block, and five depths built from it
    2  Recipe          every setting of a run, with its default
    3  Data            70,000 digits as tensors, from which batches are made
    4  Device          where to compute, in which precision; a faster convolution
    5  Training        the loop, evaluation, early stopping, checkpoints
    6  Report          and pictures: curves, mistakes, feature maps, a table of the layers
    7  Other digits    synthetic ones, Kaggle's tables, your own images
    8  Other networks  LeNet-5, plain networks; weights from files and runs
    9  Command line    train, evaluate, predict, describe

Sources: He 2015a, Deep Residual Learning for Image Recognition, arXiv:1512.03385. He 2015b, Delving
Deep into Rectifiers, arXiv:1502.01852. Ioffe 2015, Batch Normalization, arXiv:1502.03167. Goyal
2017, Large Minibatch SGD, arXiv:1706.02677. Otsu 1979, A Threshold Selection Method. LeCun 1998,
Gradient-Based Learning Applied to Document Recognition.
"""

import argparse
import csv
import ctypes
import glob
import math
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, distributed, nn
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import ConstantLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torchvision import datasets, models
from torchvision.transforms.v2 import functional as TF

# %% 1. Network
# In a plain network, a few layers learn a mapping H(x). In a residual network, they learn only its
# difference from their input, F(x) = H(x) - x, and x is added back: y = F(x) + x (He 2015a, eq. 1).
# Where H is nearly the identity, small weights are enough. More layers, which harm plain networks
# (fig. 1), need not harm residual ones. State dicts are interchangeable with torchvision's.


def conv3x3(inplanes: int, outplanes: int, stride: int = 1) -> nn.Conv2d:
    """3×3 convolution with padding 1: (N, in, H, W) → (N, out, ⌈H/stride⌉, ⌈W/stride⌉)."""
    # No bias: the batch norm after it subtracts the mean, and any bias with it (Ioffe 2015, 3.2).
    return nn.Conv2d(inplanes, outplanes, 3, stride=stride, padding=1, bias=False)


def make_shortcut(inplanes: int, outplanes: int, stride: int) -> nn.Module:
    """Return the identity or, where the shape changes, a projection (He 2015a, eq. 2, option B)."""
    if stride == 1 and inplanes == outplanes:
        return nn.Identity()
    # 1×1, which mixes channels. With stride 2 it skips pixels, but the other path sees all of them.
    projection = nn.Conv2d(inplanes, outplanes, 1, stride=stride, bias=False)
    return nn.Sequential(projection, nn.BatchNorm2d(outplanes))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut around them (He 2015a, fig. 5 left).

    (N, inplanes, H, W) → (N, outplanes, ⌈H/stride⌉, ⌈W/stride⌉); planes are channels.
    """

    def __init__(self, inplanes: int, outplanes: int, stride: int = 1):
        super().__init__()
        self.conv1 = conv3x3(inplanes, outplanes, stride)
        self.bn1 = nn.BatchNorm2d(outplanes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(outplanes, outplanes)
        self.bn2 = nn.BatchNorm2d(outplanes)
        self.downsample = make_shortcut(inplanes, outplanes, stride)  # torchvision's name for it

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(F(x) + shortcut(x)); along the shortcut, gradients skip these layers."""
        residual = self.relu(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        # The last ReLU comes after the sum: if it came before, the residual could only add.
        return self.relu(residual + self.downsample(x))


class Bottleneck(nn.Module):
    """1×1 down to a quarter of ``outplanes``, 3×3 there, 1×1 up to all of them (fig. 5 right).

    On 256 channels it costs about as much as a BasicBlock on 64, which makes 50 layers and more
    affordable. (N, inplanes, H, W) → (N, outplanes, ⌈H/stride⌉, ⌈W/stride⌉).
    """

    def __init__(self, inplanes: int, outplanes: int, stride: int = 1):
        super().__init__()
        planes = outplanes // 4
        self.conv1 = nn.Conv2d(inplanes, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        # The paper has the stride on the 1×1 above; there, it would skip pixels (Goyal 2017, 5.1).
        self.conv2 = conv3x3(planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outplanes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outplanes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = make_shortcut(inplanes, outplanes, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(F(x) + shortcut(x))."""
        residual = self.relu(self.bn1(self.conv1(x)))
        residual = self.relu(self.bn2(self.conv2(residual)))
        residual = self.bn3(self.conv3(residual))
        return self.relu(residual + self.downsample(x))


class ResNet(nn.Module):
    """A stem (convolution, pool), four stages of blocks, global average pooling, a linear layer.

    ``layers`` has the number of blocks in each stage, layer1 to layer4. ``width``, the number of
    layer1's output channels, doubles from stage to stage. The stem "imagenet" shrinks 28×28 to 7×7,
    so the rest is cheap; "cifar" keeps the image's size, as for CIFAR-10 (He 2015a, 4.2).
    """

    def __init__(self, block, layers, num_classes=10, input_channels=1, stem="imagenet", *, width):
        super().__init__()
        if stem == "imagenet":
            self.conv1 = nn.Conv2d(input_channels, 64, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        elif stem == "cifar":
            self.conv1 = conv3x3(input_channels, 64)
            self.maxpool = nn.Identity()
        else:
            raise ValueError(f"stem {stem!r} is neither 'imagenet' nor 'cifar'")
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._make_layer(block, 64, width, layers[0])
        self.layer2 = self._make_layer(block, width, 2 * width, layers[1], stride=2)
        self.layer3 = self._make_layer(block, 2 * width, 4 * width, layers[2], stride=2)
        self.layer4 = self._make_layer(block, 4 * width, 8 * width, layers[3], stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # A variance of 2/fan-out keeps the size of gradients through ReLUs (He 2015b).
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _make_layer(self, block, inplanes: int, outplanes: int, blocks: int, stride=1) -> nn.Module:
        first = block(inplanes, outplanes, stride)
        others = [block(outplanes, outplanes) for _ in range(1, blocks)]
        return nn.Sequential(first, *others)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits: (N, C, H, W) → (N, num_classes)."""
        # Shapes of ResNet-18:                      1×28×28, "imagenet" / 3×32×32, "cifar"
        x = self.relu(self.bn1(self.conv1(images)))  # (N, 64, 14, 14)  / (N, 64, 32, 32)
        x = self.maxpool(x)  #                         (N, 64, 7, 7)    / (N, 64, 32, 32)
        x = self.layer1(x)  #                          (N, 64, 7, 7)    / (N, 64, 32, 32)
        x = self.layer2(x)  #                          (N, 128, 4, 4)   / (N, 128, 16, 16)
        x = self.layer3(x)  #                          (N, 256, 2, 2)   / (N, 256, 8, 8)
        x = self.layer4(x)  #                          (N, 512, 1, 1)   / (N, 512, 4, 4)
        x = torch.flatten(self.avgpool(x), 1)  #       (N, 512)         / (N, 512)
        return self.fc(x)

    def get_feature_maps(self, images: Tensor) -> dict[str, Tensor]:
        """Return the output of each part for images (N, C, H, W): stem, layer1 … layer4, pooled."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        maps = {"stem": x}
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = self.get_submodule(name)(x)
            maps[name] = x
        maps["pooled"] = torch.flatten(self.avgpool(x), 1)
        return maps


# Blocks per stage: He 2015a, table 1. The options are ResNet's: num_classes, input_channels, stem.
def resnet18(**options: Any) -> ResNet:
    """ResNet-18: 11.2 million parameters for 10 classes."""
    return ResNet(BasicBlock, [2, 2, 2, 2], width=64, **options)


def resnet34(**options: Any) -> ResNet:
    """ResNet-34: 21.3 million parameters for 10 classes."""
    return ResNet(BasicBlock, [3, 4, 6, 3], width=64, **options)


def resnet50(**options: Any) -> ResNet:
    """ResNet-50: 23.5 million parameters for 10 classes."""
    return ResNet(Bottleneck, [3, 4, 6, 3], width=256, **options)


def resnet101(**options: Any) -> ResNet:
    """ResNet-101: 42.5 million parameters for 10 classes."""
    return ResNet(Bottleneck, [3, 4, 23, 3], width=256, **options)


def resnet152(**options: Any) -> ResNet:
    """ResNet-152: 58.2 million parameters for 10 classes."""
    return ResNet(Bottleneck, [3, 8, 36, 3], width=256, **options)


# %% 2. Recipe
# The settings of a run, each with a help text. Each is also a flag: ``lr_factor`` is --lr-factor.


class UserError(Exception):
    """An error that the user can fix: the command line prints it in one line and exits with 2."""


def setting(default: Any, help: str, low: float = 0, group: str = "") -> Any:
    """Return a field of Recipe: its help, lowest value, and the --help heading it starts."""
    return field(default=default, metadata={"help": help, "low": low, "group": group})


@dataclass(frozen=True)
class Recipe:
    """All settings of a run. Raises UserError for a value of the wrong type or out of range."""

    model: str = setting("resnet18", "network", group="network")
    input: str = setting("gray28", "gray28: 1x28x28 pixels; rgb32: 3x32x32")
    stem: str = setting("auto", "imagenet (7x7, pool), cifar (3x3); auto: what suits the input")
    plain: bool = setting(False, "the same layers without shortcuts, to see what shortcuts do")
    weights: str = setting("", "weights to start from: imagenet, or a file")
    freeze: str = setting("", "parts that stay as they are, as in conv1,bn1,layer1")
    dataset: str = setting("mnist", "data set; the default falls back to synthetic", group="data")
    normalize: str = setting("mnist", "data set whose mean and standard deviation normalize pixels")
    val_size: int = setting(0, "training images held out for validation; 0: a twelfth of them")
    select_on: str = setting("val", "val; test: hold out none, select on test images (optimistic)")
    limit: int = setting(0, "number of training images; 0: all of them")
    rotate: float = setting(6.0, "augmentation: maximum rotation, in degrees")
    shift: float = setting(0.05, "augmentation: maximum shift, as a fraction of the side")
    stretch: float = setting(0.06, "augmentation: maximum stretch and shear, as a fraction")
    # The defaults below were chosen for ten epochs of ResNet-18.
    epochs: int = setting(10, "maximum number of passes over the data", low=1, group="training")
    batch_size: int = setting(128, "images per batch, over all processes", low=2)
    accumulate: int = setting(1, "batches whose gradients make one update", low=1)
    optimizer: str = setting("sgd", "what turns gradients into updates")
    lr: float = setting(0.05, "learning rate; for onecycle, the highest one")
    momentum: float = setting(0.9, "momentum of sgd and nesterov")
    weight_decay: float = setting(5e-4, "weight decay of all parameters")
    scheduler: str = setting("plateau", "what lowers the learning rate")
    lr_factor: float = setting(0.1, "plateau, step: factor that lowers the learning rate")
    lr_patience: int = setting(2, "plateau: epochs to tolerate without a drop of validation loss")
    # Smaller drops do not count; else the tiny gains of late epochs would keep the rate high.
    lr_threshold: float = setting(0.2, "plateau: smallest relative drop that counts as one")
    lr_step: int = setting(5, "step: epochs from one step to the next", low=1)
    patience: int = setting(5, "stop after this many epochs without a lower validation loss", low=1)
    seed: int = setting(0, "fixes split, initial weights, order, augmentation", group="run")
    precision: str = setting("auto", "fp32, bf16; auto: bf16 where the hardware computes it fast")

    def __post_init__(self):
        for entry in fields(self):
            value = getattr(self, entry.name)
            low = entry.metadata["low"]
            kind = type(entry.default)
            allowed = (int, float) if kind is float else (kind,)
            if type(value) not in allowed:
                raise UserError(f"{entry.name} must be {kind.__name__}, not {value!r}")
            if kind in (int, float) and not low <= value <= 2**32:
                raise UserError(f"{entry.name} is {value}, not from {low} to {2**32}")


@contextmanager
def explaining(message: str) -> Iterator[None]:
    """Turn any error into a UserError: ``message``, then up to 300 characters of its text."""
    try:
        yield
    except Exception as error:
        words = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{message}: {words[:300]}") from error


def look_up(table: dict[str, Any], name: str, what: str) -> Any:
    """Return ``table[name]``; for an unknown name, a UserError lists the known ones."""
    if name not in table:
        raise UserError(f"{what} {name!r} is not one of {', '.join(table)}")
    return table[name]


# %% 3. Data
# MNIST takes only 55 MB, so it stays in memory as uint8; the trainer moves training images to the
# device. A batch is picked by index, then converted to float, augmented and normalized as a whole.

# Channels, pixels per side, and the stem that "auto" means. gray28 takes a 17th of rgb32's FLOPs.
INPUTS = {"gray28": (1, 28, "imagenet"), "rgb32": (3, 32, "cifar")}

# Mean and standard deviation of the pixels of the training images; "none" leaves pixels at 0–1.
STATISTICS = {"mnist": (0.1307, 0.3081), "kaggle": (0.1310, 0.3085), "none": (0.0, 1.0)}


def read_mnist(data_dir: str | Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read MNIST from ``data_dir``/MNIST/raw, after downloading what is missing. Raises UserError.

    Returns images (60000, 28, 28) uint8, light on dark; labels (60000,); test images, test labels.
    """
    folder = Path(data_dir, "MNIST")
    with explaining(f"cannot read MNIST's four files in {folder / 'raw'}"):
        if not folder.exists():
            # Other processes may do this at the same time, so each downloads into a private folder.
            Path(data_dir).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=data_dir) as private:
                datasets.MNIST(private, download=True)
                with suppress(OSError):  # another process was faster
                    Path(private, "MNIST").rename(folder)
        train = datasets.MNIST(data_dir, train=True, download=True)  # fetches what is missing
        test = datasets.MNIST(data_dir, train=False)
        for part in (train, test):
            if part.data.shape != (len(part.targets), 28, 28) or part.targets.max() > 9:
                raise ValueError("images and labels do not belong together")
    return train.data, train.targets, test.data, test.targets


READERS: dict[str, Callable] = {"mnist": read_mnist}  # each takes data_dir; section 7 adds more


def split_by_class(labels: Tensor, val_size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return shuffled indices (train, validation), split in the same ratio in each class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = order[labels[order].argsort(stable=True)]  # sorted by class, shuffled within
    # Evenly spaced places in this list take the same share of each class.
    places = torch.arange(val_size) * len(labels) // max(val_size, 1)
    held_out = torch.isin(order, by_class[places])
    return order[~held_out], order[held_out]


def distort(images: Tensor, draws: Tensor, recipe: Recipe) -> Tensor:
    """Rotate, shift, stretch, shear each image (N, C, H, W) by its draws (2, N, 3) in [-1, 1)."""
    # draws[0]: angle, dx, dy; draws[1]: sx, shear, sy. torchvision would move a whole batch alike.
    angle = math.radians(recipe.rotate) * draws[0, :, 0]
    dx, dy = 2 * recipe.shift * draws[0, :, 1:].T  # affine_grid()'s sides go from -1 to 1
    sx, shear, sy = recipe.stretch * draws[1].T
    # theta maps each output position to the input position (x, y) that it reads.
    entries = [angle.cos() + sx, shear - angle.sin(), dx, angle.sin(), angle.cos() + sy, dy]
    theta = torch.stack(entries, dim=1).view(-1, 2, 3)  # a row for x, a row for y
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


# torchrun starts a program several times at once, usually once per GPU, and numbers the processes.
# Each trains on a share of every batch; the first one prints, and writes the run's files.
RANK = int(os.environ.get("RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


def say(text: str, end: str = "\n") -> None:
    """Print, in the first process; if the pipe is closed, as by ``| head``, the run goes on."""
    try:
        if RANK == 0:
            print(text, end=end, flush=True)
    except BrokenPipeError:  # from now on, prints go nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class TensorLoader:
    """Batches (B, C, S, S) from images (N, H, W) uint8; in training, shuffled and augmented."""

    def __init__(self, images: Tensor, labels: Tensor, recipe: Recipe, train: bool = False):
        self.images, self.labels = images[:, None], labels
        self.recipe, self.train = recipe, train
        self.batch_size = max(2, recipe.batch_size // WORLD_SIZE) if train else 250  # or any size

    def __len__(self) -> int:
        # Training drops a last batch of one image (- 1): on 1×1 maps, batch norm needs two.
        n = (len(self.labels) // WORLD_SIZE - 1) if self.train else len(self.labels)
        return math.ceil(n / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.labels)
        channels, size, _ = look_up(INPUTS, self.recipe.input, "input")
        mean, std = look_up(STATISTICS, self.recipe.normalize, "normalize")
        order = torch.arange(n)
        if self.train:  # drawn on the CPU, whatever the device; the trainer seeds it each epoch
            # All processes draw the same order. Each takes every WORLD_SIZEth index, equally many.
            order = torch.randperm(n)[RANK::WORLD_SIZE][: n // WORLD_SIZE]
            draws = 2 * torch.rand(2, n, 3).to(self.images.device) - 1
        batches = order.to(self.images.device).split(self.batch_size)
        for index in batches[: len(self)]:
            x = TF.resize(self.images[index], [size, size]).float() / 255  # (B, 1, S, S)
            if self.train and (self.recipe.rotate or self.recipe.shift or self.recipe.stretch):
                # Before pixels are normalized: what moves in from outside is 0, the background.
                x = distort(x, draws[:, index], self.recipe)
            x = (x - mean) / std
            yield x.expand(-1, channels, -1, -1), self.labels[index]


class MNISTDataLoader:
    """The loaders .train, .val and .test of a data set; ``changes`` override settings."""

    def __init__(self, data_dir: str | Path = "data", recipe: Recipe | None = None, **changes: Any):
        recipe = replace(recipe or Recipe(), **changes)
        images, labels, *test = look_up(READERS, recipe.dataset, "dataset")(data_dir)
        val_size = 0 if recipe.select_on == "test" else (recipe.val_size or len(labels) // 12)
        train, val = split_by_class(labels, min(val_size, len(labels)), recipe.seed)
        train = train[: recipe.limit or None]
        self.train = TensorLoader(images[train], labels[train], recipe, train=True)
        self.test = TensorLoader(*test, recipe)
        loaders = {"val": TensorLoader(images[val], labels[val], recipe), "test": self.test}
        self.val = look_up(loaders, recipe.select_on, "select_on")
        if len(self.train) == 0 or len(self.val) == 0:
            raise UserError("too few images to train on or to select on: see --limit, --val-size")

    def get_data_loaders(self) -> tuple[TensorLoader, TensorLoader]:
        """Return (train, test). Choose epochs by .val, not by test."""
        return self.train, self.test


# %% 4. Device
# bfloat16 has 16 bits, and float32's range, so small gradients do not vanish as they do in float16.
# It keeps only two to three decimal digits, but is often faster on hardware that supports it.


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """Return the named device ("cpu", "cuda:1", "mps", "xpu"), or the best. Raises UserError."""
    if name:
        with explaining(f"there is no device {name} here"):
            device = torch.device(name)
            if WORLD_SIZE > 1 and device.type == "cuda":  # "cuda" is now this process's GPU
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            card = torch.cuda.get_device_name(device) if device.type == "cuda" else name
        # Only a computation can tell: this PyTorch may lack kernels for an old or a new card.
        with explaining(f"this PyTorch cannot compute on {card}; --device cpu works"):
            (torch.ones(1, device=device) + 1).item()
        return device
    backends = {"cuda": torch.cuda, "mps": torch.backends.mps, "xpu": torch.xpu}
    best = next((key for key, backend in backends.items() if backend.is_available()), "cpu")
    try:
        return pick_device(best)
    except UserError as error:
        if WORLD_SIZE > 1:  # all processes need the same kind of device
            raise
        print(f"WARNING: {error}", file=sys.stderr)
        return torch.device("cpu")


def pick_precision(name: str, device: torch.device) -> str:
    """Turn "auto" into "bf16" where the hardware is known to compute it fast, else into "fp32"."""
    fast = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)  # Ampere
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # PyTorch 2.11 or newer
        able = torch.cpu.get_capabilities()
        fast = able.get("avx512_bf16") or able.get("amx_bf16")
    choices = {"auto": "bf16" if fast else "fp32", "fp32": "fp32", "bf16": "bf16"}
    return look_up(choices, name, "precision")


def fast_conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    """Do what F.conv2d() does, faster for a 3×3 convolution whose output is a single position.

    While training, the trainer puts it in the place of F.conv2d(). Only speed and rounding change,
    so skip it on a first reading. On a 1×1 map, or a 2×2 map with stride 2, most of the 9 weights
    meet only padding. The others make a matrix product: half the time per step (CPU, float32).
    """
    is_conv3x3 = weight.shape[2:] == (3, 3) and padding == dilation == (1, 1) and groups == 1
    height, width = input.shape[-2:]
    if not (is_conv3x3 and stride in ((1, 1), (2, 2)) and max(height, width) <= stride[0]):
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    # The center weight meets the first pixel, those right of it and below it the others.
    used = weight[:, :, 1 : 1 + height, 1 : 1 + width]
    return F.linear(input.flatten(-3), used.flatten(1), bias)[..., None, None]  # (N, out, 1, 1)


# %% 5. Training
# The loss on validation images (test images only if select_on says so) tells which weights to keep,
# when plateau lowers the rate, and when to stop. After each epoch, best.pt has the best weights;
# last.pt also has the state to go on from. A resumed run ends with the bits of an unbroken one: on
# the same CPU, with as many threads and processes (at most two: sums of three depend on the order).


def train_one_epoch(model, loader, optimizer, scheduler=None, precision="fp32", accumulate=1):
    """Go through the loader once; return a dict with loss (mean, nats) and accuracy (%).

    Both are measured while the model learns, before each update. ``scheduler`` steps after every
    update; plateau is stepped later, by validation loss. UserError if the loss is not finite.
    """
    for layer in model.modules():  # train mode, but frozen batch norms keep their statistics
        layer.train(all(p.requires_grad for p in layer.parameters(recurse=False)))  # parents first
    device = next(model.parameters()).device
    # Under autocast, layers compute in bfloat16, while weights stay float32.
    context = nullcontext() if precision == "fp32" else torch.autocast(device.type, torch.bfloat16)
    totals = torch.zeros(2, device=device)  # of loss and correct answers
    seen = 0
    optimizer.zero_grad()  # the caller may have left gradients
    for step, (images, labels) in enumerate(loader, start=1):
        images, labels = images.to(device), labels.to(device)  # (N, C, H, W), (N,)
        with context:
            logits = model(images)  # (N, 10)
            loss = F.cross_entropy(logits, labels)
        # Gradients of ``accumulate`` batches add up to their mean; a short last group weighs less.
        (loss / accumulate).backward()
        if step % accumulate == 0 or step == len(loader):
            optimizer.step()
            optimizer.zero_grad()
            if scheduler and not isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step()
        correct = (logits.argmax(dim=1) == labels).sum()
        totals += torch.stack([loss.detach() * len(labels), correct])
        seen += len(labels)
        # item() waits for a GPU, so there the loop calls it only every tenth batch.
        if device.type == "cpu" or step % 10 == 0 or step == len(loader):
            mean_loss = totals[0].item() / seen
            if not math.isfinite(mean_loss):
                raise UserError(f"the loss became {mean_loss} by batch {step}: try a lower --lr")
            if sys.stdout and sys.stdout.isatty():  # a live line, which the next one overwrites
                say(f"batch {step}/{len(loader)}  loss {mean_loss:.4f}\033[K", end="\r")
    if WORLD_SIZE > 1:
        distributed.all_reduce(totals)  # the sum over all processes, which see equally many images
    mean_loss, share = (totals / (seen * WORLD_SIZE)).tolist()
    return {"loss": mean_loss, "accuracy": 100 * share}


@torch.no_grad()
def evaluate(model: nn.Module, loader, precision: str = "fp32") -> dict[str, Any]:
    """Return loss (nats), accuracy (%), predictions (N,), labels (N,), probabilities (N, 10)."""
    model.eval()
    device = next(model.parameters()).device
    context = nullcontext() if precision == "fp32" else torch.autocast(device.type, torch.bfloat16)
    outputs, targets = [], []
    for images, labels in loader:
        with context:
            outputs.append(model(images.to(device)))
        targets.append(labels)
    logits, labels = torch.cat(outputs).float().cpu(), torch.cat(targets).cpu()
    predictions = logits.argmax(dim=1)
    loss = F.cross_entropy(logits, labels).item()
    accuracy = 100 * (predictions == labels).sum().item() / len(labels)
    results = {"loss": loss, "accuracy": accuracy, "predictions": predictions, "labels": labels}
    return results | {"probabilities": logits.softmax(dim=1)}


# How to make an optimizer from parameters p and a recipe r.
OPTIMIZERS: dict[str, Callable] = {
    "sgd": lambda p, r: SGD(p, r.lr, r.momentum, weight_decay=r.weight_decay),
    "nesterov": lambda p, r: SGD(p, r.lr, r.momentum, weight_decay=r.weight_decay, nesterov=True),
    "adam": lambda p, r: Adam(p, r.lr, weight_decay=r.weight_decay),
    "adamw": lambda p, r: AdamW(p, r.lr, weight_decay=r.weight_decay),
    "rmsprop": lambda p, r: RMSprop(p, r.lr, weight_decay=r.weight_decay),
}

# How to make a scheduler from an optimizer o, n updates per epoch, and a recipe r.
SCHEDULERS: dict[str, Callable] = {
    "plateau": lambda o, n, r: ReduceLROnPlateau(
        o, factor=r.lr_factor, patience=r.lr_patience, threshold=r.lr_threshold
    ),
    "step": lambda o, n, r: StepLR(o, r.lr_step * n, r.lr_factor),
    "onecycle": lambda o, n, r: OneCycleLR(o, r.lr, r.epochs * n, cycle_momentum=False),
    "none": lambda o, n, r: ConstantLR(o, factor=1),
}


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary file that then replaces ``path``, which is therefore always whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    with explaining(f"cannot write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def best_epoch(history: dict[str, list]) -> int:
    """Return the epoch, counted from 1, with the lowest validation loss; 0 if there is none."""
    losses = history.get("val_loss")
    return 1 + losses.index(min(losses)) if losses else 0


class ResNetTrainer:
    """Trains and tests a classifier: ``ResNetTrainer(resnet18()).train(data.train, data.val)``.

    ``device`` None picks the best. The recipe's network, data and batch_size have no effect here:
    they are for making model and loaders. The first process writes files to ``run_dir``, if set.
    """

    def __init__(self, model: nn.Module, device=None, recipe: Recipe | None = None, run_dir=None):
        self.recipe = recipe or Recipe()
        self.run_dir = Path(run_dir) if run_dir and RANK == 0 else None
        self.device = pick_device(device)
        self.precision = pick_precision(self.recipe.precision, self.device)
        # (N, H, W, C) in memory is faster on CPUs; mps had wrong gradients (PyTorch issue 175189).
        layout = torch.preserve_format if self.device.type == "mps" else torch.channels_last
        self.model = model.to(self.device, memory_format=layout)

    def train(self, train_loader, val_loader=None, resume=None, **changes) -> dict[str, list]:
        """Train; end with the weights of the best epoch, in eval mode; return the history.

        Loaders yield (images, labels) and have a length; without a ``val_loader`` the training loss
        decides. ``changes`` override the recipe's settings. ``resume`` is last.pt's content. The
        history has, for names such as "val_loss", a list with a value per epoch. Raises UserError.
        """
        names = {"num_epochs": "epochs", "learning_rate": "lr"}  # accepted synonyms
        changes = {names.get(name, name): value for name, value in changes.items()}
        recipe = self.recipe = replace(self.recipe, **changes)
        self.precision = pick_precision(recipe.precision, self.device)
        if isinstance(train_loader, TensorLoader):  # moved once, not batch by batch
            train_loader.images = train_loader.images.to(self.device)
            train_loader.labels = train_loader.labels.to(self.device)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        updates = math.ceil(len(train_loader) / recipe.accumulate)
        with explaining("cannot make the optimizer or the scheduler"):
            self.optimizer = look_up(OPTIMIZERS, recipe.optimizer, "optimizer")(trainable, recipe)
            make_scheduler = look_up(SCHEDULERS, recipe.scheduler, "scheduler")
            self.scheduler = make_scheduler(self.optimizer, updates, recipe)
        self.history, self.best_weights = {"epoch": []}, {}
        if resume:
            with explaining("this cannot be resumed: it is not the last.pt of such a run"):
                self.history, self.best_weights = resume["history"], resume["model"]  # the best
                for name in ("model", "optimizer", "scheduler"):
                    getattr(self, name).load_state_dict(resume[f"last_{name}"])
        # DDP averages gradients, so processes stay in step. Batch norms see a share of the batch.
        model = nn.parallel.DistributedDataParallel(self.model) if WORLD_SIZE > 1 else self.model
        self._save()  # a run killed in epoch 1 can be resumed, too
        say("epoch  train loss       %   val loss       %        lr       s")
        # Inside, the caller's CPU generator is not touched, and convolutions use fast_conv2d().
        with torch.random.fork_rng(devices=[]), mock.patch.object(F, "conv2d", fast_conv2d):
            for epoch in range(len(self.history["epoch"]) + 1, recipe.epochs + 1):
                if epoch > best_epoch(self.history) + recipe.patience:
                    say(f"stopped early: no lower loss for {recipe.patience} epochs")
                    break
                self._run_epoch(epoch, model, train_loader, val_loader)
        self.model.eval().load_state_dict(self.best_weights)
        return self.history

    def _run_epoch(self, epoch: int, model, loader, val_loader) -> None:
        """Train ``model`` (self.model, or DDP around it) for an epoch; validate, save, print."""
        started = time.perf_counter()
        learning_rate = self.optimizer.param_groups[0]["lr"]
        # Each epoch seeds the CPU's generator, so a resumed run need not know earlier draws.
        torch.default_generator.manual_seed(self.recipe.seed * 1_000_003 + epoch)
        train = train_one_epoch(
            model, loader, self.optimizer, self.scheduler, self.precision, self.recipe.accumulate
        )
        # Every process validates on all images; DDP's forward copies rank 0's running statistics.
        val = train if val_loader is None else evaluate(model, val_loader, self.precision)
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(val["loss"])
        row = {"epoch": epoch, "train_loss": train["loss"], "train_accuracy": train["accuracy"]}
        row |= {"val_loss": val["loss"], "val_accuracy": val["accuracy"]}
        row |= {"learning_rate": learning_rate, "seconds": time.perf_counter() - started}
        for name, value in row.items():
            self.history.setdefault(name, []).append(value)
        is_best = best_epoch(self.history) == epoch
        if is_best:  # copied in the (N, C, H, W) order that other programs expect
            for name, w in self.model.state_dict().items():
                self.best_weights[name] = w.cpu().clone(memory_format=torch.contiguous_format)
        self._save()
        line = "{:5} {:11.4f} {:7.2f} {:10.4f} {:7.2f} {:9.2g} {:7.1f}".format(*row.values())
        say(line + ("  best" if is_best else ""))

    def _save(self) -> None:
        """Write best.pt, history.csv, then last.pt; a run killed in between repeats the epoch."""
        if not self.run_dir:
            return
        state = {"recipe": asdict(self.recipe), "history": self.history, "model": self.best_weights}
        if self.best_weights:
            with atomic_write(self.run_dir / "best.pt") as file:
                torch.save(state, file)
        with atomic_write(self.run_dir / "history.csv") as file, open(file, "w", newline="") as out:
            rows = zip(*self.history.values(), strict=True)
            csv.writer(out).writerows([list(self.history), *rows])  # first the columns' names
        for name in ("model", "optimizer", "scheduler"):  # in last.pt, the current ones as well
            state[f"last_{name}"] = getattr(self, name).state_dict()
        with atomic_write(self.run_dir / "last.pt") as file:
            torch.save(state, file)

    def test(self, test_loader) -> dict[str, Any]:
        """Return what evaluate() does: loss, accuracy, predictions, labels, probabilities."""
        return evaluate(self.model, test_loader, self.precision)


def train_model(model: nn.Module, train_loader, val_loader=None, device=None, **options) -> dict:
    """Train a model and return its history: ResNetTrainer.train() as a function."""
    return ResNetTrainer(model, device).train(train_loader, val_loader, **options)


# %% 6. Report and pictures
# Each plot_…() function returns a matplotlib figure; after %matplotlib inline, a notebook shows it.

BLUE, VERMILION = "#0072B2", "#D55E00"  # which color-blind eyes can tell apart (Okabe and Ito)
BARE = {"xticks": [], "yticks": [], "frame_on": False}  # the look of axes that show an image


def compute_accuracy(model: nn.Module, loader, device=None) -> float:
    """Return the accuracy in %, in float32, on ``device``, by default where the model is."""
    return evaluate(model.to(device), loader)["accuracy"]


def confusion_matrix(results: dict) -> Tensor:
    """Return how often each digit (row) was read as each digit (column) in evaluate()'s results."""
    classes = results["probabilities"].shape[1]
    pairs = results["labels"] * classes + results["predictions"]
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def classification_report(results: dict) -> str:
    """Return precision, recall, F1 (%) as text: per digit, averaged over digits and over images."""
    matrix = confusion_matrix(results)
    hits, images, predicted = matrix.diag(), matrix.sum(dim=1), matrix.sum(dim=0)
    # Hits per prediction (precision), per occurrence (recall), per mean of both (F1).
    counts = torch.stack([predicted, images, (images + predicted) / 2], dim=1)
    scores = 100 * hits[:, None] / counts.clamp(min=1)  # (digits, 3)
    line = "{:<9}{:10.2f}{:10.2f}{:10.2f}{:10,}"
    lines = ["digit     precision    recall        F1    images"]
    lines += [line.format(digit, *row, images[digit]) for digit, row in enumerate(scores)]
    lines.append(line.format("macro", *scores.mean(dim=0), images.sum()))
    lines.append(line.format("weighted", *((images / images.sum()) @ scores), images.sum()))
    return "\n".join(lines)


def new_figure(rows: int, columns: int, width: float, height: float, title: str = "", **look):
    """Return a figure of width × height inches, and its axes (rows, columns), all with one look."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, parse_math=False)
    return figure, figure.subplots(rows, columns, squeeze=False, subplot_kw=look)


def save_figure(figure: Figure, folder: str | Path, name: str) -> None:
    """Write a figure as PNG, whole or not at all."""
    with atomic_write(Path(folder, name)) as file:
        figure.savefig(file, format="png", dpi=110)


def plot_curves(history: dict[str, list], title: str = "") -> Figure:
    """Plot loss and accuracy per epoch, the best epoch, and drops of the rate (not onecycle's)."""
    rates = history["learning_rate"]
    best = best_epoch(history)
    figure, [axes] = new_figure(1, 2, 11, 4.2, title)
    for axis, name, unit in zip(axes, ["loss", "accuracy"], ["nats per image", "%"], strict=True):
        axis.plot("epoch", f"train_{name}", "o-", data=history, color=BLUE, label="training")
        axis.plot("epoch", f"val_{name}", "s-", data=history, color=VERMILION, label="validation")
        axis.plot(best, history[f"val_{name}"][best - 1], "k*", ms=14, label=f"best epoch ({best})")
        for epoch, rate in enumerate(rates[1:], start=1):  # the rate of epoch + 1
            if rate < rates[epoch - 1] and max(rates) == rates[0]:  # not onecycle: starts low
                axis.axvline(epoch + 0.5, color="gray", linestyle=":", label=f"lr {rate:.2g}")
        axis.set(xlabel="epoch", ylabel=f"{name} ({unit})")
        axis.locator_params(axis="x", integer=True)
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[0].set_yscale("log", subs=[2, 3, 5])
    axes[0].yaxis.set(major_formatter="{x:,g}", minor_formatter="{x:,g}")  # plain numbers
    return figure


def plot_confusion_matrix(results: dict, title: str = "") -> Figure:
    """Draw the counts of true against predicted digits, shaded by their logarithms."""
    matrix = confusion_matrix(results)
    figure, [[axis]] = new_figure(1, 1, 6.4, 6.8, title)
    axis.imshow(matrix.numpy(), cmap="Blues", norm="log", alpha=0.5)  # pale, for legible text
    for true, predicted in matrix.nonzero().tolist():
        axis.text(predicted, true, f"{matrix[true, predicted]:,}", ha="center", va="center")
    digits = range(len(matrix))
    axis.set(xlabel="predicted digit", ylabel="true digit", xticks=digits, yticks=digits)
    return figure


def plot_digits(images: Tensor, results: dict, chosen: Sequence, title: str = "") -> Figure:
    """Draw up to 40 images (N, C, S, S), at indices ``chosen``; captions of mistakes are red."""
    rows = min(max(1, math.ceil(len(chosen) / 8)), 5)
    figure, axes = new_figure(rows, 8, 10, 1.65 * rows + 0.7, title, **BARE)
    for axis, number in zip(axes.flat, chosen, strict=False):
        label, prediction = results["labels"][number], results["predictions"][number]
        axis.imshow(images[number, 0].numpy(), cmap="gray")
        confidence = 100 * results["probabilities"][number].max()
        caption = f"true {label}, pred. {prediction}\n{confidence:.1f} %"
        axis.set_title(caption, fontsize=8, color="black" if label == prediction else VERMILION)
    return figure


def plot_feature_maps(model: ResNet, image: Tensor, title: str = "") -> Figure:
    """Draw an image (1, C, S, S) and the first channels of each part's output."""
    maps = {"input": image, **model.eval().get_feature_maps(image.to(model.conv1.weight.device))}
    figure, axes = new_figure(6, 10, 10, 7.5, title, **BARE)  # "pooled", the seventh, gets no row
    for row, (name, features) in zip(axes, maps.items(), strict=False):
        channels = features[0].float().numpy(force=True)
        for axis, channel in zip(row, channels, strict=False):  # all on one scale, to compare
            axis.imshow(channel, vmin=channels.min(), vmax=channels.max())
        row[0].set_title(f"{name}  {'×'.join(map(str, channels.shape))}", fontsize=9, loc="left")
    return figure


def visualize_results(model, loader, results: dict, history: dict, run_dir, title="") -> None:
    """Save a run's pictures; ``results`` are evaluate()'s of this loader."""
    images = torch.cat([images for images, _ in loader]).cpu()
    surest = results["probabilities"].amax(dim=1).argsort(descending=True).tolist()
    mistakes = [n for n in surest if results["labels"][n] != results["predictions"][n]]
    worst = f"{title}\nthe most confident of {len(mistakes)} mistakes"
    save_figure(plot_curves(history, title), run_dir, "curves.png")
    save_figure(plot_confusion_matrix(results, title), run_dir, "confusion_matrix.png")
    save_figure(plot_digits(images, results, range(len(images)), title), run_dir, "predictions.png")
    save_figure(plot_digits(images, results, mistakes, worst), run_dir, "mistakes.png")
    if hasattr(model, "get_feature_maps"):
        save_figure(plot_feature_maps(model, images[:1], title), run_dir, "feature_maps.png")


def report_run(trainer: ResNetTrainer, data: MNISTDataLoader) -> None:
    """Test the trainer's network; print a report, and save it with pictures in run_dir, if set."""
    recipe, history = trainer.recipe, trainer.history
    loader = data.test or data.val  # an empty loader counts as false, as Kaggle's .test is
    tested = "test" if loader is data.test else "validation"
    results = trainer.test(loader)
    epoch = best_epoch(history)
    loss, accuracy = history["val_loss"][epoch - 1], history["val_accuracy"][epoch - 1]
    chosen_on = "validation set" if recipe.select_on == "val" else "TEST SET, which is optimistic"
    scores = f"{tested} loss {results['loss']:.4f}, {tested} accuracy {results['accuracy']:.2f} %"
    report = f"""{recipe.model}, {recipe.input}, dataset {recipe.dataset}, seed {recipe.seed}
epoch {epoch}, selected on the {chosen_on}: loss {loss:.4f}, {accuracy:.2f} %
{scores} ({confusion_matrix(results).trace():,} of {len(loader.labels):,} images)

{classification_report(results)}
"""
    say(f"\n{report}")
    if trainer.run_dir:
        with atomic_write(trainer.run_dir / "report.txt") as file:
            file.write_bytes(report.encode())
        title = f"{recipe.model}, {recipe.input}, {recipe.dataset}\n{scores}"
        visualize_results(trainer.model, loader, results, history, trainer.run_dir, title)
        say(f"weights, history, report and pictures: {trainer.run_dir}")


def visualize_model_architecture(model: nn.Module, image_size: int = 28) -> None:
    """Print the layers in the order in which an image of ``image_size``² pixels meets them."""
    weight = next(w for w in model.parameters() if w.dim() == 4)  # of the first convolution
    image = weight.new_zeros(1, weight.shape[1], image_size, image_size)
    calls, layers = [], []
    with nn.modules.module.register_module_forward_hook(lambda *call: calls.append(call)):
        model.eval()(image)
    names = {module: name for name, module in model.named_modules()}
    for module, inputs, y in calls:
        layer = {"name": names[module], "shape": "x".join(map(str, y.shape[1:]))}
        layer |= {"parameters": sum(p.numel() for p in module.parameters()), "flops": 0, "live": 1}
        if isinstance(module, (nn.Conv2d, nn.Linear)):  # two FLOPs per multiply-add; the paper: one
            layer["flops"] = 2 * module.weight.numel() * y[0, 0].numel()  # at each position
        if isinstance(module, nn.Conv2d):  # live: the share that meets a 1, not only padding
            window = (module.kernel_size, module.dilation, module.padding, module.stride)
            layer["live"] = F.unfold(torch.ones_like(inputs[0]), *window).amax(dim=2).mean()
        if isinstance(module, nn.BatchNorm2d):  # counted with the convolution before it
            layers[-1]["parameters"] += layer["parameters"]
        elif layer["flops"] or "Pool" in type(module).__name__:
            layers.append(layer)
    parameters = sum(layer["parameters"] for layer in layers)
    flops = sum(layer["flops"] for layer in layers)
    live = sum(layer["parameters"] * layer["live"] for layer in layers) / parameters
    say("layer                    output   parameters          FLOPs     live")
    say(f"input                {'x'.join(map(str, image.shape[1:])):>10}")
    for layer in layers:
        say("{name:21}{shape:>10}{parameters:13,}{flops:15,}{live:9.1%}".format(**layer))
    say(f"total{parameters:39,}{flops:15,}{live:9.1%}")
    say("FLOPs: one image forward, a multiply-add counted as two.")
    say("live: share of the weights that can meet a pixel; the others meet only padding.")


# %% 7. Other digits
# Digits from elsewhere, in MNIST's form: uint8, 28×28, light ink on dark ground. To read a
# picture: find its ink, pick the digit's parts, scale these to 20 pixels, center them in 28×28.


def draw_synthetic_digits(data_dir=None, train_size: int = 6000, test_size: int = 1000) -> tuple:
    """Draw digits, the same each time; return them as read_mnist() does. No data_dir is read."""
    paths = sorted(Path(matplotlib.get_data_path()).rglob("DejaVu*[!y].ttf"))  # no Display fonts
    rng = np.random.RandomState(0)
    labels = torch.arange(train_size + test_size) % 10
    images = torch.zeros(len(labels), 28, 28, dtype=torch.uint8)
    for number, digit in enumerate(labels.tolist()):
        big = Image.new("L", (56, 56))  # twice the size: shrinking smooths the edges
        font = ImageFont.truetype(paths[rng.randint(len(paths))], rng.randint(32, 51))
        ImageDraw.Draw(big).text((28, 28), str(digit), 255, font, "mm", stroke_width=rng.randint(3))
        big = big.rotate(rng.uniform(-15, 15), Image.Resampling.BILINEAR)
        images[number] = TF.pil_to_tensor(big.reduce(2))
    return images[:train_size], labels[:train_size], images[train_size:], labels[train_size:]


def read_kaggle(data_dir, name="train.csv", labelled=True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read a CSV of Kaggle's Digit Recognizer as read_mnist() does; without labels, zeros."""
    path = Path(data_dir, name)
    with explaining(f"cannot read {path}"), warnings.catch_warnings():
        warnings.simplefilter("error")  # NumPy only warns of an empty table
        table = np.loadtxt(path, np.uint8, delimiter=",", skiprows=1, ndmin=2)
        labels, pixels = torch.from_numpy(table).split([int(labelled), 784], dim=1)
        if (labels > 9).any():
            raise ValueError("a label is no digit")
    images = pixels.reshape(-1, 28, 28)
    labels = labels.sum(dim=1)  # of one column or none
    return images, labels, images[:0], labels[:0]  # Kaggle publishes no test labels


READERS |= {"synthetic": draw_synthetic_digits, "kaggle": read_kaggle}


def near(mask: Tensor, reach: int = 2) -> Tensor:
    """Return the pixels within reach of a mask (H, W) or of the picture's border."""
    return F.max_pool2d(F.pad(mask[None].float(), [reach] * 4, value=1), 2 * reach + 1, 1)[0] > 0


def find_ink(colors: Tensor, inside: Tensor) -> Tensor:
    """Return the ink, 0 to 1, of colors (H, W, 3), 0 outside. Skip this on a first reading."""
    # Most of the border is paper, even around a digit that fills the picture. As light is uneven,
    # paper is fitted, in each color, by a surface of second degree; ink is what differs from it.
    paper = colors[inside & near(~inside, min(inside.shape) // 20 + 1)].median(dim=0).values
    v, u = torch.meshgrid(*[torch.linspace(-1, 1, side) for side in inside.shape], indexing="ij")
    terms = torch.stack([torch.ones_like(u), u, v, u * u, u * v, v * v], dim=-1)  # (H, W, 6)
    for _ in range(3):  # the last round's fit is not used
        difference = (colors - paper).abs().amax(dim=2)
        levels = difference[inside].sort().values
        mass, share = levels.cumsum(dim=0), torch.arange(1, len(levels) + 1) / len(levels)
        between = (mass[-1] * share - mass) ** 2 / (share * (1 - share))
        threshold = levels[between[:-1].argmax()]  # Otsu 1979: paper and ink differ most
        is_paper = inside & (difference <= threshold)
        paper = terms @ torch.linalg.lstsq(terms[is_paper], colors[is_paper], driver="gelsd")[0]
    on_paper, on_ink = difference[is_paper], difference[inside & ~is_paper]
    # Ink must differ from paper by 8 levels, and by 8 standard deviations of the paper or, as soft
    # edges widen these, 2.3 times the sum of paper's and ink's. Blank pages reach 7 and 2.2.
    spreads = [((x - x.mean()) ** 2).mean().sqrt() for x in (on_paper, on_ink)]
    is_clear = on_ink.mean() - on_paper.mean() > max(8, min(8 * spreads[0], 2.3 * sum(spreads)))
    strength = ((difference - threshold / 2) / (on_ink.mean() - threshold / 2)).clamp(0, 1)
    return torch.where(inside & ~is_paper & is_clear, strength, 0.0)


def find_digit(colors: Tensor, inside: Tensor) -> Tensor:
    """Return the digit's parts (N, H, W). Raises UserError. Skip this on a first reading."""
    ink = find_ink(colors, inside) if inside.sum() >= 64 else torch.zeros(inside.shape)
    numbers = torch.arange(1.0, ink.numel() + 1).view(1, *ink.shape) * (ink > 0)
    while not torch.equal(numbers, spread := F.max_pool2d(numbers, 3, 1, padding=1) * (ink > 0)):
        numbers = spread  # in each connected part, the largest number spreads
    sizes, present = numbers[numbers > 0].long().bincount().sort(descending=True)
    parts = ink * (numbers == present[20 * sizes >= sizes[:1]][:, None, None])  # without specks
    if len(parts) == 0:
        return parts
    lengths = torch.maximum(parts.any(dim=1).sum(dim=1), parts.any(dim=2).sum(dim=1))
    longest = parts[lengths.argmax()] > 0
    # If the longest part is large, fills its (tilted) box and is too wide for a 1, it is a sheet or
    # frame: look inside it. Else drop parts at the edge; if the rest is short, look again.
    sides = [longest.rot90(turns).cumsum(dim=0).rot90(-turns) > 0 for turns in range(4)]
    filled = inside & torch.stack(sides).all(dim=0)  # what has pixels of it on all four sides
    angles = torch.arange(32) * math.pi / 32
    across = longest.nonzero().float() @ torch.stack([angles.cos(), angles.sin()])
    boxes = (across.amax(dim=0) - across.amin(dim=0) + 1).view(2, 16)  # two sides, 90° apart
    short, long = boxes[:, boxes.prod(dim=0).argmin()].aminmax()
    encloses = filled.sum() > 0.88 * short * long and 2 * short > long > max(inside.shape) / 4
    touches = (parts * near(~inside)).flatten(1).any(dim=1)
    if not encloses and (4 * lengths[~touches] >= lengths.max()).any():
        # Edges and shadows touch two sides of the picture; a part at one side is mostly a figure.
        count = parts[:, [0, -1]].any(dim=2).sum(dim=1) + parts[:, :, [0, -1]].any(dim=1).sum(dim=1)
        if (touches & (count < 2) & (2 * lengths > lengths[~touches].max())).any():
            raise UserError("seems to show several figures, one of them at its edge")
        return parts[~touches]
    outside = ~filled if encloses else ~inside | parts[touches].any(dim=0)
    again = find_digit(colors, ~near(outside, 4))
    # If that is empty, the outermost call keeps a tight digit or square 0, not a sheet or shadow.
    is_sheet = encloses and 2 * longest.sum() > filled.sum()
    gaps = inside.shape - np.ptp(parts.nonzero()[:, 1:].numpy(), axis=0) - 1  # rows, columns left
    is_shadow = parts[:, [0, -1]][..., [0, -1]].any() and gaps.max() > 4  # in a corner, not full
    return again if again.any() or is_sheet or is_shadow or not inside.all() else parts


def read_image(path: str | Path) -> tuple[Image.Image, Tensor]:
    """Return a picture and its digit, (28, 28) uint8 in MNIST's form. Raises UserError."""
    with explaining("cannot be read as an image"):
        picture = ImageOps.exif_transpose(Image.open(path))  # upright
        if picture.mode[0] in "IF":  # which convert() would cut off at 255
            raise ValueError("it has more than 8 bits per channel")
        picture = picture.convert("RGBA")
    picture.thumbnail((128, 128))
    ground = Image.new("RGBA", picture.size, "gray")  # which shows both black and white ink
    picture = Image.alpha_composite(ground, picture).convert("RGB")
    pixels = TF.pil_to_tensor(picture.convert("L"))[0]
    if picture.size == (28, 28) and pixels.median() < 32 <= pixels.max():
        return picture, pixels  # as MNIST has it already
    parts = find_digit(torch.tensor(np.array(picture)).float(), torch.ones_like(pixels).bool())
    if len(parts) == 0:
        raise UserError("shows no ink")
    low, high = parts.nonzero()[:, 1:].aminmax(dim=0)
    shape = high - low + 1  # (2,): height, width
    heights, widths = parts.any(dim=2).sum(dim=1), parts.any(dim=1).sum(dim=1)
    columns = parts[2 * heights > shape[0]].any(dim=1).float()  # of tall parts
    shared = columns @ columns.T  # [i, j]: columns that parts i and j share; side by side, few
    are_beside = (4 * shared < torch.minimum(shared.diag(), shared.diag()[:, None])).any()
    share = torch.maximum(heights, widths).max() / shape.max()  # the longest part's; tiny for dots
    if are_beside or 0.1 < share < 0.5 or shape[1] > 2 * shape[0]:
        raise UserError("seems to show several figures: one digit per picture")
    size = (20 * shape / shape.max()).round().clamp(min=1).int()  # the longer one 20
    digit = TF.resized_crop(parts.sum(dim=0)[None], *low.tolist(), *shape.tolist(), size.tolist())
    digit = (255 * digit[0] / digit.max()).round().byte()
    center = (digit > 127).nonzero().float().mean(dim=0)  # goes to the middle, 13.5
    place = (13.5 - center).round().clamp(min=0).minimum(28 - size)  # of its corner
    return picture, TF.crop(digit[None], *(-place).int().tolist(), 28, 28)[0]  # crop() pads with 0


def plot_readings(read: dict[str, tuple], probabilities: Tensor) -> Figure:
    """Draw the first ten pictures, each beside what the network saw and its probabilities."""
    rows = min(len(read), 10)
    figure, axes = new_figure(rows, 3, 8, 1.7 * rows + 0.4, **BARE)
    for row, (name, pair), p in zip(axes, read.items(), probabilities.numpy(), strict=False):
        row[0].imshow(pair[0])
        row[0].set_title(Path(name).name[-28:], fontsize=8, parse_math=False)
        row[1].imshow(pair[1].numpy(), cmap="gray")
        row[1].set_title("as the network saw it", fontsize=8)
        row[2].bar(range(len(p)), 100 * p, color=np.where(p == p.max(), BLUE, "silver"))
        row[2].set(xticks=range(len(p)), yticks=[0, 50, 100], ylabel="probability (%)")
        row[2].set_title(f"read as {p.argmax()}, {100 * p.max():.1f} %", fontsize=8)
    return figure


# %% 8. Other networks
# What a ResNet is compared with, and weights: those to start from, and those of a run.


def lenet5(num_classes: int = 10, input_channels: int = 1, stem=None) -> nn.Sequential:
    """LeNet-5 (LeCun 1998, II.B): (N, C, H, W) → (N, num_classes); ``stem`` is not used."""
    # Simpler: C3 reads all of S2, pooling is only a mean, tanh is not scaled, the output is linear.
    c1 = nn.Conv2d(input_channels, 6, 5, padding=2)  # (N, 6, 28, 28)
    s2 = nn.Sequential(nn.Tanh(), nn.AvgPool2d(2))  # (N, 6, 14, 14)
    c3 = nn.Conv2d(6, 16, 5)  # (N, 16, 10, 10)
    s4 = nn.Sequential(nn.Tanh(), nn.AdaptiveAvgPool2d(5), nn.Flatten())  # (N, 16·5·5)
    c5 = nn.Sequential(nn.Linear(400, 120), nn.Tanh())  # on a 5×5 map, a 5×5 convolution
    f6 = nn.Sequential(nn.Linear(120, 84), nn.Tanh())
    return nn.Sequential(c1, s2, c3, s4, c5, f6, nn.Linear(84, num_classes))


NETWORKS = {f.__name__: f for f in (resnet18, resnet34, resnet50, resnet101, resnet152, lenet5)}
RUNS = Path("runs")


def build_model(recipe: Recipe) -> nn.Module:
    """Return the recipe's network, newly initialized, with ``freeze`` applied. Raises UserError."""
    channels, _, suitable_stem = look_up(INPUTS, recipe.input, "input")
    build = look_up(NETWORKS, recipe.model, "model")
    stems = {"auto": suitable_stem, "imagenet": "imagenet", "cifar": "cifar"}
    model = build(input_channels=channels, stem=look_up(stems, recipe.stem, "stem"))
    for module in model.modules():
        if recipe.plain and hasattr(module, "downsample"):
            del module.downsample  # nn.Module refuses to replace a module by a function
            module.downsample = lambda x: 0  # what the block adds in place of a shortcut
    for part in recipe.freeze.replace(",", " ").split():
        with explaining(f"cannot freeze {part!r}"):
            model.get_submodule(part).requires_grad_(False)
    return model


def read_tensors(path: str | Path) -> dict[str, Any]:
    """Load onto the CPU what torch.save() wrote; run no code in it. Raises UserError, OSError."""
    with open(path, "rb") as file:
        try:
            return dict(torch.load(file, map_location="cpu", weights_only=True))
        except Exception as error:  # an unsupported global is a class or a function
            holds_objects = "Unsupported global" in str(error)
    if holds_objects:
        raise UserError(f"{path} holds objects, which are not run: save its state_dict()")
    raise UserError(f"{path} is damaged, or not in the usual format of torch.save()")


def load_weights(model: nn.Module, recipe: Recipe) -> None:
    """Load those of torchvision's or a file's weights that fit the model. UserError if none do."""
    target = model.state_dict()
    first = next(iter(target))
    with explaining(f"{recipe.model} cannot start from {recipe.weights}"):
        if recipe.weights == "imagenet":
            state = models.get_model(recipe.model, weights="DEFAULT", progress=False).state_dict()
        else:
            state = read_tensors(recipe.weights)
            state = state.get("model", state.get("state_dict", state))  # where checkpoints have it
        if first in state and target[first].shape[1] == 1:
            # A gray image then gets the same answer as its RGB copy.
            state[first] = state[first].sum(dim=1, keepdim=True)
        fits = {n: w for n, w in state.items() if n in target and w.shape == target[n].shape}
        if not fits:
            raise ValueError(f"it has {list(state)[:2]} ..., not {list(target)[:2]} ...")
        rest = model.load_state_dict(fits, strict=False).missing_keys  # a new head, for example
    say(f"weights {len(fits)} of {len(state)} tensors loaded, newly initialized: {rest or 'none'}")


def load_checkpoint(run: str | Path | None, name: str) -> tuple[Path, dict[str, Any]]:
    """Return path and content of a checkpoint: a file, ``name`` in a folder or the newest run."""
    run = run or max(RUNS.glob(f"*/{name}"), key=os.path.getmtime, default=None)
    if run is None:
        raise UserError(f"there is no run in {RUNS.resolve()}: train one, or name its folder")
    path = Path(run, name) if Path(run).is_dir() else Path(run)
    checkpoint = read_tensors(path)
    with explaining(f"{path} is no checkpoint of this program, or damaged"):
        checkpoint["recipe"] = Recipe(**checkpoint["recipe"])
    return path, checkpoint


def load_trainer(run: str | None, device: str | None) -> tuple[Path, ResNetTrainer]:
    """Return a checkpoint's path (a run's best.pt), a trainer with its network and history."""
    path, checkpoint = load_checkpoint(run, "best.pt")
    trainer = ResNetTrainer(build_model(checkpoint["recipe"]), device, checkpoint["recipe"])
    with explaining(f"{path} does not fit {trainer.recipe.model}"):
        trainer.model.load_state_dict(checkpoint["model"])
        trainer.history = checkpoint["history"]
    return path, trainer


# %% 9. Command line
# Common ways to train a ResNet on MNIST. A patience of 99 means no early stopping.
RECIPES = {
    "plateau":   Recipe(),
    "rgb32":     Recipe(input="rgb32", rotate=0, shift=0, stretch=0, lr=0.01, scheduler="none",
        patience=99),
    "adam":      Recipe(normalize="none", rotate=0, shift=0, stretch=0, optimizer="adam", lr=0.001,
        weight_decay=0, scheduler="none", patience=99),
    "kaggle":    Recipe(dataset="kaggle", normalize="kaggle", val_size=4200, rotate=10, shift=0,
        stretch=0, epochs=15, batch_size=32, optimizer="adam", lr=0.01, weight_decay=0,
        scheduler="step", lr_step=5, lr_factor=0.05, patience=10),
    "augmented": Recipe(rotate=10, shift=0.1, stretch=0, optimizer="adam", lr=0.001,
        weight_decay=1e-4, scheduler="step", lr_step=7, lr_factor=0.1, patience=99),
    "fast":      Recipe(epochs=4, batch_size=256, optimizer="nesterov", lr=0.1, weight_decay=1e-3,
        scheduler="onecycle", patience=99),
    "best":      Recipe(stem="cifar", rotate=10, shift=0.08, stretch=0.1, epochs=14, batch_size=256,
        optimizer="nesterov", lr=0.1, weight_decay=1e-3, scheduler="onecycle", patience=99),
}  # fmt: skip


def mnist_or_synthetic(data_dir: str | Path) -> str:
    """Return "mnist" or, if there is no such file, "synthetic". UserError if files are bad."""
    try:
        read_mnist(data_dir)
        return "mnist"
    except UserError as error:
        if found := next(Path(data_dir).rglob("*-ubyte*"), None):
            raise UserError(f"{error}; found: {found}") from error
        print(f"WARNING: {error}.\nGoing on with SYNTHETIC digits.", file=sys.stderr)
        return "synthetic"


def command_train(args: argparse.Namespace) -> None:
    """Train, test, draw how it went (the default)."""
    checkpoint: dict[str, Any] = {}
    if args.resume is None:
        recipe = replace(RECIPES[args.recipe or "plateau"], **args.changes)
        if recipe.dataset == "mnist" and "dataset" not in args.changes:
            recipe = replace(recipe, dataset=mnist_or_synthetic(args.data_dir))
    else:
        path, checkpoint = load_checkpoint(args.resume, "last.pt")
        recipe = replace(checkpoint["recipe"], **args.changes)
        changeable = ["patience"] if recipe.scheduler == "onecycle" else ["patience", "epochs"]
        if args.recipe or args.output_dir or args.changes.keys() - set(changeable):
            raise UserError(f"only {', '.join(changeable)} of a resumed run may change")
        args.output_dir = path.parent
    data = MNISTDataLoader(args.data_dir, recipe)
    torch.manual_seed(recipe.seed)
    model = build_model(recipe)
    if recipe.weights and not checkpoint:
        load_weights(model, recipe)
    name = f"{recipe.model}-{recipe.input}-{recipe.dataset}"
    free = next(n for n in range(1, sys.maxsize) if not (RUNS / f"{name}-{n}").exists())
    trainer = ResNetTrainer(model, args.device, recipe, args.output_dir or RUNS / f"{name}-{free}")
    run_dir = trainer.run_dir  # None in all processes but the first
    if run_dir and not checkpoint:
        with explaining(f"cannot make {run_dir} (a run in it may go on with --resume)"):
            run_dir.mkdir(parents=True)  # only one run gets it
    train, val, test = [f"{len(part.labels):,}" for part in (data.train, data.val, data.test)]
    parameters = sum(p.numel() for p in model.parameters())
    threads = torch.get_num_threads()  # which the last bits of a result depend on
    say(f"device  {trainer.device}, {trainer.precision}, threads {threads}, processes {WORLD_SIZE}")
    say(f"data    {recipe.dataset}, {recipe.input}: {train} train, {val} validation, {test} test")
    say(f"model   {recipe.model}, {parameters:,} parameters, in {run_dir}\n")
    try:
        if WORLD_SIZE > 1:
            distributed.init_process_group("nccl" if trainer.device.type == "cuda" else "gloo")
        trainer.train(data.train, data.val, resume=checkpoint)
        report_run(trainer, data)
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt) and run_dir and (run_dir / "last.pt").exists():
            flags = f'--resume "{run_dir}" --data-dir "{args.data_dir}" --device {trainer.device}'
            print(f'stopped; to continue:  python "{sys.argv[0]}" {flags}', file=sys.stderr)
        elif run_dir and not checkpoint and not (run_dir / "best.pt").exists():
            shutil.rmtree(run_dir)  # nothing to keep: the same command works again
        raise
    if WORLD_SIZE > 1:
        distributed.destroy_process_group()


def command_evaluate(args: argparse.Namespace) -> None:
    """Test the best networks of runs again."""
    for run in args.runs or [None]:
        path, trainer = load_trainer(run, args.device)
        say(f"{path} on {trainer.device}, {trainer.precision}")
        report_run(trainer, MNISTDataLoader(args.data_dir, trainer.recipe))


def command_predict(args: argparse.Namespace) -> int:
    """Read digits from images or a Kaggle test.csv."""
    names = []
    for name in args.images:
        if Path(name).is_dir():  # meaning the images in it
            files = sorted(glob.glob(glob.escape(name) + "/*"))
            names += filter(datasets.folder.is_image_file, files)
        else:  # a file, or a wildcard that the shell did not expand
            found = [] if Path(name).exists() else sorted(glob.glob(name))
            names += found or [name]
    if not names and not args.kaggle:
        raise UserError("no image is given: name files, a folder of them, or --kaggle FILE")
    path, trainer = load_trainer(args.checkpoint, args.device)
    if args.kaggle:
        loader = TensorLoader(*read_kaggle("", args.kaggle, labelled=False)[:2], trainer.recipe)
        table = list(enumerate(trainer.test(loader)["predictions"].tolist(), start=1))
        with atomic_write(path.with_name("solution.csv")) as file:
            np.savetxt(file, table, "%d", delimiter=",", header="ImageId,Label", comments="")
        say(f"labels of {len(table):,} images: {path.with_name('solution.csv')}")
    read = {}
    for name in names:
        try:
            read[name] = read_image(name)
        except UserError as error:  # the others are still read
            print(f"error: {name} {error}", file=sys.stderr)
    if read:
        digits = torch.stack([digit for _, digit in read.values()])
        loader = TensorLoader(digits, torch.zeros(len(digits)).long(), trainer.recipe)
        probabilities = trainer.test(loader)["probabilities"]
        for name, p in zip(read, probabilities, strict=True):
            say(f"{p.argmax()}  {100 * p.max():6.2f} %  {name}")
        save_figure(plot_readings(read, probabilities), path.parent, "predict.png")
        say(f"what the network saw: {path.with_name('predict.png')}")
    return 0 if read.keys() == set(names) else 2


def command_describe(args: argparse.Namespace) -> None:
    """Show the layers of a network."""
    recipe = Recipe(**args.changes)
    say(f"{recipe.model} for {recipe.input}")
    visualize_model_architecture(build_model(recipe), INPUTS[recipe.input][1])


COMMANDS = {"train": command_train, "evaluate": command_evaluate}
COMMANDS |= {"predict": command_predict, "describe": command_describe}


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step; else a step takes up to a seventh longer."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give memory back
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: no mappings, which go back when freed


def main(arguments=()) -> int:
    """Run a command, such as ["evaluate"]; return the exit code."""
    arguments = list(arguments)
    command = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "train"
    usage = "\n       ".join(f"resnet18_mnist.py {n:10}{f.__doc__}" for n, f in COMMANDS.items())
    parser = argparse.ArgumentParser(usage=usage, allow_abbrev=False, exit_on_error=False)
    add = parser.add_argument
    settings = {"train": fields(Recipe), "describe": fields(Recipe)[:4]}  # model to plain
    tables = {"input": INPUTS, "dataset": READERS, "normalize": STATISTICS}
    tables |= {"model": NETWORKS, "optimizer": OPTIMIZERS, "scheduler": SCHEDULERS}
    for entry in settings.get(command, ()):
        if entry.metadata["group"]:  # this flag and all later ones go into this group
            add = parser.add_argument_group(entry.metadata["group"]).add_argument
        help = entry.metadata["help"]
        how = {"type": type(entry.default), "choices": tables.get(entry.name)}
        if entry.default is False:
            how = {"action": "store_true"}
        elif entry.default != "":
            help += f" (default: {entry.default})"
        add("--" + entry.name.replace("_", "-"), help=help, default=argparse.SUPPRESS, **how)
    if command == "train":
        add("--recipe", choices=RECIPES, help="named settings; other flags override them")
        add("--output-dir", metavar="DIR", help="folder of the run (default: a new one in runs/)")
        add("--resume", nargs="?", const="", metavar="RUN", help="continue a run (default: newest)")
    if command == "evaluate":
        add("runs", nargs="*", metavar="RUN", help="folder or checkpoint (default: the newest)")
    if command == "predict":
        add("images", nargs="*", metavar="IMAGE", help="image of one digit, or a folder of them")
        add("--kaggle", metavar="FILE", help="a test.csv; writes its solution.csv")
        add("--checkpoint", metavar="RUN", help="folder or checkpoint (default: the newest)")
    if command in ("train", "evaluate"):
        add("--data-dir", default="data", metavar="DIR", help="where the data is (default: data)")
    if command != "describe":
        add("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps or xpu (default: the best)")
    try:
        args, unknown = parser.parse_known_intermixed_args(arguments)
        if unknown:
            raise UserError(f"unknown: {' '.join(unknown)} (see --help)")
        args.changes = {name: value for name, value in vars(args).items() if hasattr(Recipe, name)}
        keep_freed_memory()
        return COMMANDS[command](args) or 0
    except (UserError, OSError, argparse.ArgumentError, torch.cuda.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 2


# Nothing starts in a notebook: there __name__ is "__main__", too, but most have no __file__.
if __name__ == "__main__" and "__file__" in globals() and "get_ipython" not in globals():
    sys.exit(main(sys.argv[1:]))
