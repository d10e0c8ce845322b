"""What resnet18_mnist.py promises, tested: `python -m pytest`. No network."""

from __future__ import annotations

import argparse
import contextlib
import csv
import errno
import functools
import gzip
import io
import itertools
import math
import multiprocessing
import os
import pickle
import platform
import random
import re
import runpy
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import zipfile
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import resnet18_mnist as rm

HERE = Path(__file__).parent
SCRIPT = HERE / "resnet18_mnist.py"
DEPTHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
TIMINGS = ("seconds", "images_per_second")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    for name, value in NO_NETWORK.items():
        monkeypatch.setenv(name, value)
    yield
    plt.close("all")


# Tests draw the same digits again and again.
rm.draw_synthetic_digits = functools.cache(rm.draw_synthetic_digits)

# A process of its own for each command, but importing torch takes seconds: where the system can
# fork, these processes begin as copies of one that has imported it.
PROCESSES = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
PROCESSES.set_forkserver_preload(["torch", "torchvision", "matplotlib.pyplot"])


def be_the_program(arguments, cwd, out=os.devnull, err=os.devnull):
    os.chdir(cwd)
    os.environ.update(NO_NETWORK)
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        stream.flush()
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    sys.argv = [str(SCRIPT), *arguments]
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.fixture
def no_pictures(monkeypatch):
    """For tests of something else: pictures take seconds."""
    monkeypatch.setattr(rm, "visualize_results", lambda *_: None)


def run(*arguments, cwd):
    """Run the program as a user does, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        task = ([str(argument) for argument in arguments], cwd, out, err)
        process = PROCESSES.Process(target=be_the_program, args=task)
        process.start()
        process.join(170)
        process.kill()  # which does nothing to one that has ended
        process.join()
        printed = (path.read_text(encoding="utf-8") for path in (out, err))
        return SimpleNamespace(
            returncode=process.exitcode, stdout=next(printed), stderr=next(printed)
        )


def write_idx(path: Path, array: torch.Tensor) -> None:
    """Write a tensor of bytes in the format of the MNIST files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">I{array.dim()}I", 0x0800 + array.dim(), *array.shape)
    path.write_bytes(header + array.to(torch.uint8).numpy().tobytes())


def write_mnist(data_dir: Path) -> Path:
    """Write 130 training and 40 test images in torchvision's layout."""
    digits = rm.draw_synthetic_digits(1, 130, 40)
    raw = data_dir / "MNIST" / "raw"
    write_idx(raw / "train-images-idx3-ubyte", digits.train_images)
    write_idx(raw / "train-labels-idx1-ubyte", digits.train_labels)
    write_idx(raw / "t10k-images-idx3-ubyte", digits.test_images)
    write_idx(raw / "t10k-labels-idx1-ubyte", digits.test_labels)
    return data_dir


@pytest.fixture
def mnist_dir(tmp_path):
    return write_mnist(tmp_path / "data")


def write_kaggle(digits: rm.Digits, folder: Path, train_rows: int) -> torch.Tensor:
    """Write digits as train.csv and test.csv of the Digit Recognizer; return the test's labels."""
    images = torch.cat([digits.train_images, digits.test_images]).flatten(1).numpy()
    labels = torch.cat([digits.train_labels, digits.test_labels])
    table = np.column_stack([labels.numpy(), images])
    pixels = ",".join(f"pixel{i}" for i in range(784))
    plain = {"fmt": "%d", "delimiter": ",", "comments": ""}
    np.savetxt(folder / "train.csv", table[:train_rows], header="label," + pixels, **plain)
    np.savetxt(folder / "test.csv", table[train_rows:, 1:], header=pixels, **plain)
    return labels[train_rows:]


TRAIN = ("--dataset", "synthetic", "--limit", "320", "--val-size", "100", "--batch-size", "64")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder in which a user has trained for two epochs: (folder, what was printed)."""
    cwd = tmp_path_factory.mktemp("user")
    return cwd, run("train", *TRAIN, "--epochs", 2, cwd=cwd)


# Network


@pytest.mark.parametrize("name", DEPTHS)
def test_parameter_counts(name):
    expected = {
        "resnet18": (11_689_512, 11_175_370, 11_173_962),
        "resnet34": (21_797_672, 21_283_530, 21_282_122),
        "resnet50": (25_557_032, 23_522_250, 23_520_842),
        "resnet101": (44_549_160, 42_514_378, 42_512_970),
        "resnet152": (60_192_808, 58_158_026, 58_156_618),
    }[name]
    with torch.device("meta"):
        models = (
            rm.MODELS[name](num_classes=1000, input_channels=3),
            rm.MODELS[name](),
            rm.MODELS[name](input_channels=3, stem="cifar"),
        )
    assert tuple(sum(p.numel() for p in model.parameters()) for model in models) == expected


@pytest.mark.parametrize("name", DEPTHS)
@pytest.mark.parametrize("stem", rm.STEMS)
@pytest.mark.parametrize(("channels", "size"), rm.INPUTS.values())
def test_shapes_of_every_stage(name, stem, channels, size):
    with torch.device("meta"):
        model = rm.MODELS[name](input_channels=channels, stem=stem)
        maps = model.get_feature_maps(torch.empty(2, channels, size, size))
        logits = model(torch.empty(2, channels, size, size))
    side = math.ceil(math.ceil(size / 2) / 2) if stem == "imagenet" else size
    expected = {"stem": (2, 64, side, side)}
    width = 512 // 64 if name in DEPTHS[:2] else 4 * 512 // 64
    for number, planes in enumerate((64, 128, 256, 512), start=1):
        expected[f"layer{number}"] = (2, planes * width // 8, side, side)
        side = math.ceil(side / 2)
    expected["pooled"] = (2, 64 * width)
    assert {key: tuple(value.shape) for key, value in maps.items()} == expected
    assert logits.shape == (2, 10)


@pytest.mark.parametrize("name", DEPTHS)
def test_weights_logits_and_gradients_are_torchvisions(name):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)()
    torch.manual_seed(0)
    ours = rm.MODELS[name](num_classes=1000, input_channels=3)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():  # the same seed gives the same initial weights
        assert torch.equal(ours.state_dict()[key], value), key

    torch.manual_seed(1)
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([3, 7])
    for model in (ours, theirs):
        F.cross_entropy(model.train()(images), labels).backward()
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), key

    fresh = rm.MODELS[name](num_classes=1000, input_channels=3)
    fresh.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        logits = [model.eval()(images) for model in (ours, theirs, fresh)]
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


def test_initial_weights_are_hes():
    for module in rm.resnet18().modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            fan_out = module.weight[:, 0].numel()
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
        elif isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all())
            assert bool((module.bias == 0).all())


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (1, 2), (2, 2)])
def test_small_maps_take_a_short_cut_to_the_same_result(size, stride):
    torch.manual_seed(0)
    ours = rm.conv3x3(5, 7, stride)
    x = torch.randn(4, 5, size, size, requires_grad=True)
    outputs = [ours.train()(x), ours.eval()(x)]  # eval: the convolution itself
    weigh = torch.randn(4, 7, 1, 1)
    gradients = [torch.autograd.grad((y * weigh).sum(), (x, ours.weight)) for y in outputs]
    assert torch.allclose(*outputs, atol=1e-5)
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(("name", "convolutions"), [("resnet34", 33), ("resnet50", 49)])
def test_plain_networks_have_the_same_layers_without_shortcuts(name, convolutions):
    torch.manual_seed(0)
    plain, residual = rm.MODELS[name](plain=True), rm.MODELS[name]()
    assert sum(isinstance(part, nn.Conv2d) for part in plain.modules()) == convolutions
    kept = [key for key in residual.state_dict() if "downsample" not in key]
    assert list(plain.state_dict()) == kept
    block, x = plain.layer1[-1].eval(), torch.randn(2, plain.layer1[-1].conv1.in_channels, 7, 7)
    for part in (block.bn2, getattr(block, "bn3", block.bn2)):
        nn.init.zeros_(part.weight)
    assert not block(x).any()  # where a residual block would hand x on


def test_unknown_stem_is_refused():
    with pytest.raises(ValueError, match="stem"):
        rm.resnet18(stem="vgg")


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize(("channels", "size", "stem"), [(1, 28, "imagenet"), (3, 32, "cifar")])
def test_layer_table_agrees_with_first_principles(name, channels, size, stem):
    model = rm.MODELS[name](input_channels=channels, stem=stem)
    flops = 0

    def count(module, inputs, output):
        nonlocal flops  # each weight meets each output position once: a product and a sum
        flops += 2 * module.weight.numel() * output[0, 0].numel()

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    rows = rm.list_layers(model, torch.zeros(1, channels, size, size))
    assert model.training  # as it was before
    assert sum(row.flops for row in rows) == flops
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())
    assert rows[0].name == "conv1"
    assert rows[-1][:3] == ("fc", "10", sum(p.numel() for p in model.fc.parameters()))


def test_live_share_is_the_share_of_weights_with_a_gradient():
    model = rm.resnet18()
    shares = {row.name: row.live for row in rm.list_layers(model, torch.zeros(1, 1, 28, 28))}
    F.cross_entropy(model(torch.randn(8, 1, 28, 28)), torch.arange(8)).backward()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            # Looked at by tap, since a dead ReLU may leave single weights without a gradient.
            reached = (module.weight.grad != 0).any(dim=0).any(dim=0).float().mean().item()
            assert shares[name] == pytest.approx(reached), name
    assert shares["layer4.1.conv2"] == pytest.approx(1 / 9)


def test_visualize_model_architecture_prints_the_totals(capsys):
    rm.visualize_model_architecture(rm.resnet18())
    printed = capsys.readouterr().out
    assert re.search(r"total +11,175,370 +66,021,888", printed)
    assert "1×28×28" in printed
    assert max(map(len, printed.splitlines())) <= 88


# Data


def test_loaders_have_the_right_counts_and_a_stratified_split():
    data = rm.MNISTDataLoader(dataset="synthetic", seed=3)
    assert data.get_data_loaders() == (data.train, data.test)
    assert [len(part.labels) for part in (data.train, data.val, data.test)] == [5500, 500, 1000]
    assert data.val.labels.bincount().tolist() == [50] * 10
    assert sum(len(labels) for _, labels in data.train) == 5500
    assert len(list(data.train)) == len(data.train) == math.ceil(5500 / 128)


def test_split_is_disjoint_complete_and_stratified():
    labels = torch.randint(0, 10, (1003,), generator=torch.Generator().manual_seed(0))
    train, val = rm.split_by_class(labels, 100, seed=5)
    assert len(val) == 100
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(1003))
    share = labels[val].bincount(minlength=10) - labels.bincount(minlength=10) * 100 / 1003
    assert share.abs().max() < 1
    assert torch.equal(val, rm.split_by_class(labels, 100, seed=5)[1])
    assert not torch.equal(val, rm.split_by_class(labels, 100, seed=6)[1])


def test_select_on_test_trains_on_all_and_selects_on_the_test_set():
    data = rm.MNISTDataLoader(dataset="synthetic", select_on="test")
    assert len(data.train.labels) == 6000
    assert data.val is data.test


def test_limit_keeps_so_many_training_images_only():
    data = rm.MNISTDataLoader(dataset="synthetic", limit=77)
    assert [len(part.labels) for part in (data.train, data.val, data.test)] == [77, 500, 1000]


@pytest.mark.parametrize("val_size", [0, 6000])
def test_impossible_split_is_refused(val_size):
    with pytest.raises(rm.UserError, match="val-size"):
        rm.MNISTDataLoader(dataset="synthetic", val_size=val_size)


def test_batches_are_what_torchvisions_transforms_give():
    digits = rm.draw_synthetic_digits(0, 10, 10)
    v1 = torchvision.transforms
    normalise = v1.Normalize((0.1307,), (0.3081,))
    gray = v1.Compose([v1.ToTensor(), normalise])
    rgb = v1.Compose([v1.Resize((32, 32)), v1.Grayscale(3), v1.ToTensor(), normalise])
    for name, transform in (("gray28", gray), ("rgb32", rgb)):
        images, labels = next(iter(rm.Batches(*digits[1:3], 10, name)))
        pictures = [Image.fromarray(image.numpy()) for image in digits.train_images]
        expected = torch.stack([transform(picture) for picture in pictures])
        assert images.shape == expected.shape
        assert (images - expected).abs().max() < 1.01 / 255 / 0.3081  # one step of gray
        assert torch.equal(labels, digits.train_labels)


@pytest.mark.parametrize(
    ("normalize", "mean", "std"), [("mnist", 0.1307, 0.3081), ("kaggle", 0.131, 0.3085)]
)
def test_normalised_images_have_the_mean_and_deviation_that_they_should(normalize, mean, std):
    pixels = torch.tensor([0, 255]).repeat(392).view(1, 28, 28).byte()  # mean ½, deviation ½
    images, _ = next(iter(rm.Batches(pixels, torch.zeros(1).long(), normalize=normalize)))
    assert images.mean().item() == pytest.approx((0.5 - mean) / std, abs=1e-4)
    assert images.std(correction=0).item() == pytest.approx(0.5 / std, abs=1e-4)


def test_images_may_be_only_scaled():
    pixels = torch.tensor([0, 255]).repeat(392).view(1, 28, 28).byte()
    images, _ = next(iter(rm.Batches(pixels, torch.zeros(1).long(), normalize="none")))
    assert sorted(images.unique().tolist()) == [0, 1]


def test_same_seed_same_batches_and_each_epoch_another_order():
    def labels(seed, epoch):
        batches = rm.MNISTDataLoader(dataset="synthetic", augment=True, limit=300, seed=seed).train
        torch.manual_seed(1000 * seed + epoch)
        images, labels = zip(*batches, strict=True)
        return torch.cat(images), torch.cat(labels)

    first, again, later, other = labels(0, 1), labels(0, 1), labels(0, 2), labels(1, 1)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], later[1])
    assert torch.equal(first[1].sort().values, later[1].sort().values)
    assert not torch.equal(first[1], other[1])


def test_every_epoch_has_another_order():
    batches = rm.MNISTDataLoader(dataset="synthetic", limit=300).train
    first, second = (torch.cat([labels for _, labels in batches]) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("n", "sizes"), [(5, [2, 3]), (6, [2, 2, 2]), (7, [2, 2, 3]), (1, [1]), (3, [3])]
)
def test_last_short_batch_is_kept_and_a_lone_image_joins(n, sizes):
    batches = rm.Batches(torch.zeros(n, 28, 28).byte(), torch.arange(n), 2)
    assert [len(labels) for _, labels in batches] == sizes
    assert len(batches) == len(sizes)
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(n))


def distort(images, place=None, pull=None, **by):
    """Distort one image with chosen draws, by default none."""
    draws = [place or [0] * 3, [0] * 3, pull or [0] * 72]
    return rm.distort(images, [torch.tensor([draw]).float() for draw in draws], rm.Distortion(**by))


def test_augmentation_draws_for_each_image_and_keeps_the_digit():
    image = rm.draw_synthetic_digits(0, 1, 1).train_images[:, None].float() / 255
    generator = torch.Generator().manual_seed(0)
    draws = [2 * torch.rand(64, n, generator=generator) - 1 for n in (3, 3, 72)]
    for by in (rm.Distortion(10, 0.1), rm.Distortion(0, 0, 0.1), rm.Distortion(0, 0, 0, 0.05)):
        changed = rm.distort(image.expand(64, -1, -1, -1), draws, by)
        assert len(torch.unique(changed.flatten(1), dim=0)) == 64
        ink = changed.sum(dim=(1, 2, 3)) / image.sum()
        assert (ink - 1).abs().max() < 0.35  # no stroke is lost
        unchanged = distort(image, **by._asdict())
        assert torch.allclose(unchanged, image, atol=1e-5)


def centre(image):
    """Centre of mass of an image (H, W): row, column."""
    where = torch.arange(float(len(image)))
    return [(image.sum(axis) @ where / image.sum()).item() for axis in (1, 0)]


def test_augmentation_turns_by_degrees_and_shifts_stretches_and_bends_by_parts_of_the_side():
    point = torch.zeros(1, 1, 40, 40)
    point[..., 19:21, 19:21] = 1
    shifted = distort(point, [0, -1, 0.5], shift=0.1)
    assert centre(shifted[0, 0]) == pytest.approx([19.5 - 2, 19.5 + 4], abs=1e-3)
    bent = distort(point, pull=[-1] * 36 + [0.5] * 36, elastic=0.1)  # all pulled alike
    assert centre(bent[0, 0]) == pytest.approx([19.5 - 2, 19.5 + 4], abs=1e-3)
    bar = torch.zeros(1, 1, 40, 40)
    bar[..., 8:32, 18:22] = 1
    bilinear = torchvision.transforms.InterpolationMode.BILINEAR
    rotate = torchvision.transforms.functional.rotate
    assert torch.allclose(distort(bar, [1, 0, 0], rotate=10), rotate(bar, 10, bilinear), atol=1e-4)
    half = distort(bar, [0.5, 1, 1], rotate=40)
    assert torch.allclose(half, rotate(bar, 20, bilinear), atol=1e-4)
    wide, slanted, high = (
        rm.distort(bar, [torch.zeros(1, 3), torch.tensor([draw]), None], rm.Distortion(stretch=0.5))
        for draw in ([-1.0, 0, 0], [0, 1.0, 0], [0, 0, -1.0])
    )
    assert (wide.sum() / bar.sum()).item() == pytest.approx(2, abs=0.05)
    assert (high.sum() / bar.sum()).item() == pytest.approx(40 / 24, abs=0.05)  # cut by the edges
    assert (slanted.sum() / bar.sum()).item() == pytest.approx(1, abs=0.05)
    columns = torch.arange(40.0)
    upper = slanted[0, 0, :20].sum(0)
    assert abs((upper @ columns / upper.sum()).item() - 19.5) > 2  # it leans to one side


def test_synthetic_digits_come_from_the_seed():
    draw = rm.draw_synthetic_digits.__wrapped__
    one, same, other = (draw(seed, 50, 20) for seed in (1, 1, 2))
    assert torch.equal(one.train_images, same.train_images)
    assert not torch.equal(one.train_images, other.train_images)
    assert not torch.equal(one.train_images[:20], one.test_images)
    assert one.train_labels.bincount().tolist() == [5] * 10
    assert one.train_images.dtype == torch.uint8
    assert (one.train_images.flatten(1).amax(1) > 200).all()  # no font without digits
    assert len(torch.unique(one.train_images.flatten(1), dim=0)) == 50


def test_mnist_files_are_read(mnist_dir):
    expected = rm.draw_synthetic_digits(1, 130, 40)
    digits = rm.load_digits("auto", mnist_dir, 0)
    assert digits.name == "mnist"
    for ours, theirs in zip(digits[1:], expected[1:], strict=True):
        assert torch.equal(ours, theirs)


def damage_truncated(raw):
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1000])
    return path.name


def damage_magic(raw):
    path = raw / "t10k-labels-idx1-ubyte"
    path.write_bytes(b"\xff" * 4 + path.read_bytes()[4:])
    return path.name


def damage_empty(raw):
    path = raw / "t10k-images-idx3-ubyte"
    path.write_bytes(b"")
    return path.name


def damage_missing(raw):
    (raw / "train-labels-idx1-ubyte").unlink()
    return "train-labels-idx1-ubyte"


def damage_counts(raw):
    write_idx(raw / "train-labels-idx1-ubyte", torch.zeros(7))
    return "train-labels"


def damage_label(raw):
    write_idx(raw / "t10k-labels-idx1-ubyte", torch.full((40,), 11))
    return "t10k-labels"


def damage_packed(raw):
    for path in list(raw.iterdir()):
        Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    return "train-images-idx3-ubyte.gz"


@pytest.mark.parametrize(
    "damage",
    [
        damage_truncated,
        damage_magic,
        damage_empty,
        damage_missing,
        damage_counts,
        damage_label,
        damage_packed,
    ],
)
@pytest.mark.parametrize("dataset", ["auto", "mnist"])
def test_damaged_files_are_named(mnist_dir, damage, dataset):
    name = damage(mnist_dir / "MNIST" / "raw")
    with pytest.raises(rm.UserError, match=re.escape(name)) as caught:
        rm.load_digits(dataset, mnist_dir, 0)
    assert "\n" not in str(caught.value)


# Device and recipe


def test_pick_device():
    assert rm.pick_device("cpu") == torch.device("cpu")
    assert rm.pick_device(None).type in ("cuda", "mps", "xpu", "cpu")
    with pytest.raises(rm.UserError, match=r"'cuda:99'.*cpu"):
        rm.pick_device("cuda:99")
    assert rm.pick_precision("fp32", torch.device("cpu")) == "fp32"
    assert rm.pick_precision("auto", torch.device("cpu")) in ("fp32", "bf16")


@pytest.mark.parametrize(
    "wrong",
    [
        {"optimizer": "lion"},
        {"lr": -1.0},
        {"lr": math.nan},
        {"batch_size": 1},
        {"epochs": 0},
        {"seed": -1},
        {"precision": "fp8"},
    ],
)
def test_wrong_hyperparameters_are_refused(wrong):
    with pytest.raises(rm.UserError, match=next(iter(wrong))):
        rm.Recipe(**wrong)


# Training


class LinearModel(nn.Sequential):
    """A classifier that trains in no time."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Flatten(), nn.Linear(784, 10))


def digits_loader(n=128, batch_size=32, augment=False, **options):
    digits = rm.draw_synthetic_digits(0, n, 10)
    options |= {"augment": rm.Distortion(10, 0.1)} if augment else {}
    return rm.Batches(digits.train_images, digits.train_labels, batch_size, **options)


@pytest.mark.parametrize(("name", "n"), [("gray28", 64), ("rgb32", 8)])
def test_overfits_few_images(name, n):
    torch.manual_seed(0)
    model, loader = rm.build_model(rm.Recipe(input=name)), digits_loader(n, n, input=name)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    for _ in range(50 if n == 64 else 30):
        rm.train_one_epoch(model, loader, optimizer)
    assert rm.compute_accuracy(model, loader) == 100


def test_usage_of_the_readme():
    data = rm.MNISTDataLoader(batch_size=64, dataset="synthetic", limit=128, val_size=50)
    train_loader, test_loader = data.get_data_loaders()
    model = rm.resnet18(num_classes=10, input_channels=1)
    for p in model.layer1.parameters():
        p.requires_grad = False
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trainer = rm.ResNetTrainer(model, device="cpu", quiet=True)
    history = trainer.train(
        train_loader, val_loader=data.val, num_epochs=2, learning_rate=0.001, weight_decay=1e-4
    )
    assert history["epoch"] == [1, 2]
    assert history["learning_rate"] == [0.001, 0.001]
    assert history["train_loss"][1] < history["train_loss"][0]
    assert torch.equal(before["layer1.0.conv1.weight"], model.layer1[0].conv1.weight)
    assert not torch.equal(before["layer2.0.conv1.weight"], model.layer2[0].conv1.weight)
    results = trainer.test(test_loader)
    assert {"loss", "accuracy", "predictions", "labels"} <= results.keys()
    right = (results["predictions"] == results["labels"]).float().mean().item()
    assert results["accuracy"] == pytest.approx(100 * right)
    images, _ = next(iter(test_loader))
    assert list(model.get_feature_maps(images))[:2] == ["stem", "layer1"]


def test_plain_dataloader_works_and_training_ends_on_the_best_weights():
    digits = rm.draw_synthetic_digits(0, 200, 50)
    images = digits.train_images[:, None].float() / 255
    train = DataLoader(TensorDataset(images, digits.train_labels), 32, shuffle=True)
    # With wrong labels to validate on, the better the model learns the higher its loss.
    val = DataLoader(TensorDataset(images, (digits.train_labels + 1) % 10), 32)
    model = LinearModel()
    history = rm.train_model(model, train, val, "cpu", epochs=9, lr_patience=9, precision="fp32")
    assert history["val_loss"] == sorted(history["val_loss"])
    assert history["best"] == [True, False, False, False, False, False]
    assert rm.evaluate(model, val)["loss"] == pytest.approx(history["val_loss"][0])
    assert not model.training


def test_evaluate_against_plain_arithmetic():
    model, loader = LinearModel(), digits_loader(100)
    results = rm.evaluate(model, loader)
    logits = torch.cat([model(images) for images, _ in loader])
    labels = torch.cat([labels for _, labels in loader])
    assert results["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert torch.equal(results["predictions"], logits.argmax(dim=1))
    assert torch.allclose(results["probabilities"].sum(dim=1), torch.ones(100))
    assert model.training


def test_accumulated_small_batches_are_one_large_batch():
    weights = []
    for batch_size, accumulate in ((48, 1), (12, 4)):
        model, loader = LinearModel(), digits_loader(96, batch_size)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        rm.train_one_epoch(model, loader, optimizer, accumulate=accumulate)
        weights.append(model[1].weight.detach())
    assert torch.allclose(*weights, atol=1e-6)


def test_a_short_last_group_of_accumulated_batches_counts_as_a_whole_update():
    weights = []
    for accumulate in (3, 5):  # both: one group of three batches
        model, loader = LinearModel(), digits_loader(36, 12)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        rm.train_one_epoch(model, loader, optimizer, accumulate=accumulate)
        weights.append(model[1].weight.detach())
    assert torch.equal(*weights)


def test_early_stopping_on_made_up_losses():
    stopping = rm.EarlyStopping(patience=2)
    told = [(stopping.step(loss), stopping.should_stop) for loss in (3, 2, 2.5, 1, 1, 1.5)]
    assert told == [
        (True, False),
        (True, False),
        (False, False),
        (True, False),
        (False, False),
        (False, True),
    ]


def test_plateau_lowers_the_rate_and_patience_ends_the_run(monkeypatch):
    losses = iter([1.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.4])
    real = rm.evaluate
    monkeypatch.setattr(rm, "evaluate", lambda *a: {**real(*a), "loss": next(losses)})
    loader = digits_loader(32)
    history = rm.train_model(
        LinearModel(), loader, loader, "cpu", epochs=7, lr_patience=1, patience=4, lr_factor=0.1
    )
    assert history["val_loss"] == [1.0, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert history["best"] == [True, True, False, False, False, False]
    assert history["learning_rate"] == pytest.approx([0.01, 0.01, 0.01, 0.01, 0.001, 0.001])


def rates(epochs=4, **options):
    """The learning rate at each of three updates of each epoch."""
    recipe = rm.Recipe(lr=1.0, epochs=epochs, **options)
    optimizer = rm.make_optimizer(LinearModel(), recipe)
    scheduler = rm.make_scheduler(optimizer, recipe, updates_per_epoch=3)
    seen = []
    for _ in range(epochs):
        for _ in range(3):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if recipe.scheduler in rm.PER_UPDATE:
                scheduler.step()
        if recipe.scheduler == "step":
            scheduler.step()
    return seen


def test_schedules():
    assert rates(scheduler="none") == [1.0] * 12
    assert rates(scheduler="step", lr_step=2, lr_factor=0.1) == pytest.approx([1.0] * 6 + [0.1] * 6)
    cosine = [(1 + math.cos(math.pi * update / 12)) / 2 for update in range(12)]
    assert rates(scheduler="cosine") == pytest.approx(cosine)
    cycle = rates(scheduler="onecycle")
    assert max(cycle) == pytest.approx(1, abs=0.02)
    assert cycle[0] == pytest.approx(1 / 25)
    assert cycle[-1] < 0.001


@pytest.mark.parametrize("scheduler", rm.SCHEDULERS)
@pytest.mark.parametrize("optimizer", rm.OPTIMIZERS)
def test_every_optimizer_learns_under_every_schedule(scheduler, optimizer):
    how = {"scheduler": scheduler, "optimizer": optimizer, "lr": 0.003}
    loader = digits_loader(64, 16)
    history = rm.train_model(LinearModel(), loader, device="cpu", num_epochs=3, **how)
    assert history["train_loss"][2] < 0.9 * history["train_loss"][0]


def test_optimizers_are_those_of_torch_with_the_recipes_values():
    adam = rm.make_optimizer(LinearModel(), rm.RECIPES["adam"])
    assert type(adam) is torch.optim.Adam
    assert (adam.defaults["lr"], adam.defaults["weight_decay"]) == (0.001, 0)
    sgd = rm.make_optimizer(LinearModel(), rm.Recipe(momentum=0.8))
    assert type(sgd) is torch.optim.SGD
    assert (sgd.defaults["momentum"], sgd.defaults["weight_decay"]) == (0.8, 5e-4)


def test_label_smoothing_is_in_the_training_loss():
    losses = []
    for smoothing in (0.0, 0.2):
        model, loader = LinearModel(), digits_loader(32)
        images, labels = next(iter(loader))
        expected = F.cross_entropy(model(images), labels, label_smoothing=smoothing).item()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        done = rm.train_one_epoch(model, loader, optimizer, label_smoothing=smoothing)
        assert done["loss"] == pytest.approx(expected)
        losses.append(done["loss"])
    assert losses[0] != losses[1]


def test_history_holds_what_other_scripts_log(tmp_path):
    recipe = rm.replace(rm.RECIPES["adam"], epochs=2, precision="fp32")
    loader = digits_loader(204, 2)
    trainer = rm.ResNetTrainer(LinearModel(), "cpu", recipe, tmp_path, quiet=True)
    history = trainer.train(loader, loader)
    with open(tmp_path / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows[0]["batch_losses"].split()) == 3  # of batches 1, 51 and 101 of 102
    assert float(rows[1]["batch_losses"].split()[0]) < float(rows[0]["batch_losses"].split()[0])
    after = rm.compute_accuracy(trainer.model, loader)
    assert after == max(history["train_accuracy_after"])
    assert float(rows[1]["train_accuracy_after"]) == history["train_accuracy_after"][1]


def test_training_images_are_tested_without_augmentation():
    recipe = rm.Recipe(epochs=1, test_train=True, lr=1e-9, precision="fp32")
    model, loader = LinearModel(), digits_loader(256, augment=True, shuffle=True)
    trainer = rm.ResNetTrainer(model, "cpu", recipe, quiet=True)
    history = trainer.train(loader, loader)
    plain = rm.compute_accuracy(LinearModel(), digits_loader(256))
    assert history["train_accuracy_after"] == [plain]
    assert history["train_accuracy"] != [plain]


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(10), nn.BatchNorm1d(10, affine=False)])
def test_batch_norms_are_frozen_with_their_parameters(norm):
    model = nn.Sequential(LinearModel(), norm)
    norm.requires_grad_(False)
    rm.train_model(model, digits_loader(), device="cpu", epochs=1)
    assert bool((norm.running_mean == 0).all()) == norm.affine


def test_tta_is_the_mean_over_nine_shifts_and_leaves_training_alone(tmp_path):
    model, loader = LinearModel(), digits_loader(96)
    images, labels = next(iter(loader))
    height, width = images.shape[2:]
    total = torch.zeros(len(images), 10)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            rows = (torch.arange(height) + down).clamp(0, height - 1)
            columns = (torch.arange(width) + right).clamp(0, width - 1)
            total += model(images[:, :, rows][..., columns]).log_softmax(dim=1)
    once, nine = (rm.evaluate(model, [(images, labels)], tta=tta) for tta in (False, True))
    assert torch.allclose(nine["probabilities"], (total / 9).softmax(dim=1), atol=1e-6)
    assert not torch.allclose(nine["probabilities"], once["probabilities"], atol=1e-3)
    histories = []
    for tta in (False, True):
        torch.manual_seed(0)
        trainer = rm.ResNetTrainer(LinearModel(), "cpu", rm.Recipe(tta=tta, epochs=2), quiet=True)
        histories.append(trainer.train(loader, loader))
    losses = [history["val_loss"] for history in histories]
    assert losses[0] == losses[1]  # the epoch is chosen without
    assert trainer.test(loader)["loss"] != losses[1][-1]


def test_run_dir_may_be_a_string_and_is_made(tmp_path):
    loader, folder = digits_loader(), tmp_path / "not" / "yet"
    rm.ResNetTrainer(LinearModel(), "cpu", None, str(folder), True).train(loader, epochs=1)
    assert {p.name for p in folder.iterdir()} == {"best.pt", "last.pt", "history.csv"}


def test_average_of_the_weights_is_what_is_tested_and_kept(tmp_path):
    """ema: after each step the average moves to the weights by 1 - ema."""
    recipe = rm.Recipe(epochs=2, ema=0.75, scheduler="none", precision="fp32")
    loader, seen = digits_loader(96), []

    class Watched(LinearModel):
        def forward(self, x):
            if self.training and torch.is_grad_enabled():
                seen.append(self[1].bias.detach().clone())
            return super().forward(x)

    trainer = rm.ResNetTrainer(Watched(), "cpu", recipe, tmp_path, quiet=True)
    history = trainer.train(loader, loader)
    last = rm.load_checkpoint(tmp_path / "last.pt")
    after = [*seen[1:], last["model"]["1.bias"]]  # what each of the six steps left
    average = after[0]
    for weights in after[1:]:
        average = 0.75 * average + 0.25 * weights
    assert torch.allclose(last["average"]["module.1.bias"], average, atol=1e-6)
    kept = rm.load_checkpoint(tmp_path / "best.pt")
    assert torch.allclose(kept["model"]["1.bias"], average, atol=1e-6)
    assert torch.equal(trainer.model[1].bias, kept["model"]["1.bias"])
    assert trainer.test(loader)["loss"] == pytest.approx(history["val_loss"][-1])


@pytest.mark.parametrize(("frozen", "momentum"), [(False, 0.1), (True, 0.1), (False, 0.001)])
def test_average_has_batch_norm_statistics_of_its_own(frozen, momentum):
    """A mean of weights computes other maps than any of them: their statistics do not fit."""
    torch.manual_seed(0)
    layers = [
        (rm.conv3x3(i, 8, 2), nn.BatchNorm2d(8, momentum=momentum), nn.ReLU()) for i in (1, 8, 8)
    ]
    model = nn.Sequential(*itertools.chain(*layers), nn.Flatten(), nn.Linear(8 * 16, 10))
    model[1].requires_grad_(not frozen)
    digits = rm.draw_synthetic_digits(0, 1000, 10)
    loader = rm.Batches(digits.train_images, digits.train_labels, 16, shuffle=True)
    recipe = rm.Recipe(epochs=3, ema=0.99, lr=0.1, scheduler="none", precision="fp32")
    rm.ResNetTrainer(model, "cpu", recipe, quiet=True).train(loader)
    images = next(iter(rm.Batches(*digits[1:3], 1000)))[0]
    for place in (1, 4, 7):
        with torch.no_grad():
            maps = model[:place](images)
        scales = model[place].running_var.sqrt() / maps.std(dim=(0, 2, 3))
        if frozen and place == 1:  # it keeps what it came with
            assert torch.equal(model[1].running_var, torch.ones(8))
        else:
            assert torch.allclose(scales, torch.ones(8), atol=0.1)
            assert model[place].momentum == momentum


def test_training_leaves_the_random_numbers_of_others_alone():
    """Else networks made after it, in a loop over seeds say, would all be the same."""
    loader, epochs = digits_loader(96, shuffle=True, augment=True), []
    model = nn.Sequential(nn.Dropout(), LinearModel())
    loader.set_epoch = epochs.append
    loader.sampler = SimpleNamespace(set_epoch=epochs.append)
    before = torch.get_rng_state()
    rm.ResNetTrainer(model, "cpu", quiet=True).train(loader, loader, epochs=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert epochs == [1, 1, 2, 2]  # as samplers of others need it


def test_training_goes_on_after_a_divergence():
    loader = digits_loader(96)
    trainer = rm.ResNetTrainer(LinearModel(), "cpu", rm.Recipe(precision="fp32"), quiet=True)
    with pytest.raises(rm.UserError, match="epoch"):
        trainer.train(loader, loader, ema=0.9, lr=1e9, epochs=3)
    trainer.model.load_state_dict(LinearModel().state_dict())
    assert math.isfinite(trainer.train(loader, loader, ema=0, lr=0.01, epochs=1)["val_loss"][0])


def test_a_compiled_step_gives_the_same_numbers():
    loader, losses = digits_loader(96), []
    for compiled in (False, True):
        recipe = rm.Recipe(epochs=2, compile=compiled, precision="fp32")
        history = rm.ResNetTrainer(LinearModel(), "cpu", recipe, quiet=True).train(loader, loader)
        losses.append(history["val_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("n", [96, 97, 99])
def test_ranks_share_every_batch_and_an_epoch_is_a_permutation(n):
    parts = []
    for rank in range(2):
        torch.manual_seed(0)
        batches = rm.Batches(torch.zeros(n, 28, 28).byte(), torch.arange(n), 32, shuffle=True)
        parts.append([labels for _, labels in batches.to("cpu", rank, 2)])
    torch.manual_seed(0)
    whole = rm.Batches(torch.zeros(n, 28, 28).byte(), torch.arange(n), 32, shuffle=True)
    together = [part for batch in zip(*parts, strict=True) for part in batch]
    assert torch.equal(torch.cat(together), torch.cat([labels for _, labels in whole]))
    assert min(map(len, together)) >= 2
    assert torch.equal(torch.cat(together).sort().values, torch.arange(n))


def torchrun(*arguments, cwd):
    """Start two processes of the program, as torchrun does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = {**os.environ, **NO_NETWORK, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    arguments = [SCRIPT, *map(str, arguments)]
    return subprocess.Popen([*command, *arguments], cwd=cwd, env=environment, **pipes)


def test_two_ranks_learn_what_one_process_learns(tmp_path):
    """LeNet-5 has no batch norm, which ranks compute on their own parts of the batch."""
    flags = (*TRAIN, "--model", "lenet5", "--epochs", 2, "--precision", "fp32", "--lr", 0.1)
    two = torchrun(*flags, "--limit", 319, "--output-dir", "two", cwd=tmp_path)
    run(*flags, "--limit", 319, "--output-dir", "one", cwd=tmp_path)
    printed, said = two.communicate(timeout=170)
    assert two.returncode == 0, said
    assert printed.count("test accuracy") == 1
    assert "2 processes" in printed
    one, two = (rm.load_checkpoint(tmp_path / name / "last.pt") for name in ("one", "two"))
    for row, other in zip(one["rows"], two["rows"], strict=True):
        for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
            assert row[name] == pytest.approx(other[name], rel=1e-4), name
        assert row["batch_losses"] == pytest.approx(other["batch_losses"], rel=1e-4)
    for key, weight in one["model"].items():
        assert torch.allclose(weight, two["model"][key], atol=1e-4), key


def test_two_ranks_write_one_solution_for_kaggle(tmp_path):
    write_kaggle(rm.draw_synthetic_digits(1, 130, 40), tmp_path, 100)
    flags = ("--dataset", "kaggle", "--data-dir", ".", "--model", "lenet5", "--epochs", 1)
    job = torchrun(*flags, "--val-size", 10, "--output-dir", "run", cwd=tmp_path)
    _, said = job.communicate(timeout=170)
    assert job.returncode == 0, said
    assert len((tmp_path / "run" / "solution.csv").read_text().splitlines()) == 71


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for the processes in /proc")
def test_a_rank_that_dies_ends_the_job(tmp_path):
    flags = ("--dataset", "synthetic", "--model", "lenet5", "--epochs", 1000, "--patience", 1000)
    job = torchrun(*flags, cwd=tmp_path)
    for line in job.stdout:
        if re.match(" +3 ", line):  # the third epoch has ended
            break
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    _, said = job.communicate(timeout=60)
    assert job.returncode != 0
    assert "SIGKILL" in said or "Signal 9" in said
    assert len(rm.load_checkpoint(next(tmp_path.glob("runs/*/last.pt")))["rows"]) >= 3


def test_recipes_are_listed(capsys):
    assert rm.main(["--recipe", "list"]) == 0
    printed = capsys.readouterr().out
    assert all(re.search(rf"^{name} ", printed, re.MULTILINE) for name in rm.RECIPES)
    assert max(map(len, printed.splitlines())) <= 80


def test_flags_win_over_the_recipe(tmp_path, monkeypatch, capsys, no_pictures):
    monkeypatch.chdir(tmp_path)
    flags = ["--recipe", "adam", "--lr", "0.02", "--optimizer", "rmsprop", "--model", "lenet5"]
    assert rm.main([*TRAIN, *flags, "--epochs", "1", "--output-dir", "x", "--quiet"]) == 0
    recipe = rm.load_checkpoint(tmp_path / "x" / "last.pt")["recipe"]
    kept = ("optimizer", "lr", "weight_decay", "normalize", "augment", "scheduler")
    assert [getattr(recipe, name) for name in kept] == ["rmsprop", 0.02, 0.0, "none", False, "none"]


def without_timings(rows):
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


@pytest.mark.parametrize("loader", ["ours", "plain"])
def test_resumed_run_is_bit_for_bit_the_uninterrupted_one(tmp_path, loader):
    recipe = rm.Recipe(epochs=4, augment=True, lr_patience=0, lr=0.05)
    val = digits_loader(50)

    def train(folder, epochs, resume=None):
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0 if resume is None else 99)
        data = digits_loader(96, shuffle=True, augment=True)
        if loader == "plain":
            data = DataLoader(TensorDataset(data.images / 255, data.labels), 32, shuffle=True)
        model = nn.Sequential(rm.resnet18(num_classes=16), nn.Dropout(), nn.Linear(16, 10))
        trainer = rm.ResNetTrainer(model, "cpu", recipe, folder, quiet=True)
        trainer.train(data, val, resume=resume, epochs=epochs)
        return rm.load_checkpoint(folder / "last.pt"), model.state_dict()

    whole, whole_best = train(tmp_path / "whole", 4)
    half, _ = train(tmp_path / "parts", 2)
    parts, parts_best = train(tmp_path / "parts", 4, resume=half)
    assert without_timings(parts["rows"]) == without_timings(whole["rows"])
    assert parts["scheduler"] == whole["scheduler"]
    for key, value in whole["model"].items():
        assert torch.equal(value, parts["model"][key]), key
        assert torch.equal(whole_best[key], parts_best[key]), key
    for ours, theirs in zip(
        parts["optimizer"]["state"].values(), whole["optimizer"]["state"].values(), strict=True
    ):
        assert torch.equal(ours["momentum_buffer"], theirs["momentum_buffer"])


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    rm.write_atomically(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(rm.UserError, match="No space left"):
        rm.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_diverging_run_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    done = run(*TRAIN, "--lr", "1e6", "--output-dir", "x", cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(r"error: epoch \d+: the .*loss became (nan|inf).*\n", done.stderr)
    assert "Traceback" not in done.stderr
    weights = rm.load_checkpoint(tmp_path / "x" / "last.pt")["model"].values()
    assert all(bool(w.isfinite().all()) for w in weights)


class RunsCode:
    """A pickle of this would touch a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_damaged_and_foreign_checkpoints_are_refused(tmp_path, trained):
    best = next((trained[0] / "runs").iterdir()) / "best.pt"
    whole, path = best.read_bytes(), tmp_path / "x.pt"
    bad = {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "flipped": whole[:1_000_000] + bytes([whole[1_000_000] ^ 1]) + whole[1_000_001:],
        "text": b"not a checkpoint",
        "code": pickle.dumps(RunsCode(tmp_path / "ran")),
    }
    for name, content in bad.items():
        path.write_bytes(content)
        with pytest.raises(rm.UserError, match=r"x\.pt"):
            rm.load_checkpoint(path)
        assert not (tmp_path / "ran").exists(), name
    ours = {"format": rm.FORMAT, "rows": [], "model": {}}
    foreign = ({"recipe": {"lr": "high"}}, {"recipe": {"colour": 1}}, {"recipe": 1}, {})
    foreign = [{**ours, **content} for content in foreign]
    for content in ({"weights": 1}, {"format": RunsCode(tmp_path / "ran")}, [1], *foreign):
        torch.save(content, path)
        with pytest.raises(rm.UserError, match=r"x\.pt"):
            rm.load_checkpoint(path)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(rm.UserError, match=r"no\.pt"):
        rm.load_checkpoint(tmp_path / "no.pt")


# Other networks, weights to start from


@pytest.mark.parametrize(("name", "count"), [("lenet5", 61_706), ("simple_cnn", 60_874)])
@pytest.mark.parametrize("input", rm.INPUTS)
def test_small_networks(name, count, input):
    model = rm.build_model(rm.Recipe(model=name, input=input))
    channels, size = rm.INPUTS[input]
    assert model(torch.zeros(2, channels, size, size)).shape == (2, 10)
    if channels == 1:
        assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(
    ("name", "input"),
    [
        ("mobilenet_v3_small", "gray28"),
        ("vgg11", "rgb32"),
        ("googlenet", "rgb32"),
        ("vit_b_16", "rgb224"),
    ],
)
def test_networks_of_torchvision_are_adapted(name, input):
    channels, size = rm.INPUTS[input]
    model = rm.build_model(rm.Recipe(model=name, input=input))
    assert model.train()(torch.zeros(2, channels, size, size)).shape == (2, 10)
    rows = rm.list_layers(model, torch.zeros(1, channels, size, size))
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())


def test_a_convolution_that_fits_stays_and_another_answers_gray_images_alike():
    convolutions = []
    for input in ("rgb32", "gray28"):
        torch.manual_seed(0)
        model = rm.build_model(rm.Recipe(model="resnext50_32x4d", input=input))
        convolutions.append(model.conv1)
    torch.manual_seed(0)
    theirs = torchvision.models.resnext50_32x4d(num_classes=10).conv1
    assert torch.equal(convolutions[0].weight, theirs.weight)
    image = torch.randn(1, 1, 28, 28)
    gray = theirs(image.expand(-1, 3, -1, -1))
    assert torch.allclose(convolutions[1](image), gray, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": "vgg17"}, "vgg17"),
        ({"model": "alexnet"}, "cannot take 28×28"),
        ({"model": "vit_b_16", "input": "rgb32"}, "cannot take 32×32"),
        ({"model": "lenet5", "stem": "cifar"}, "--stem"),
        ({"model": "fcn_resnet50"}, "there is no model"),
    ],
)
def test_impossible_networks_are_refused(options, said):
    with pytest.raises(rm.UserError, match=said):
        rm.build_model(rm.Recipe(**options))


def test_weights_of_imagenet_are_adapted_to_gray_images_and_ten_classes(tmp_path):
    theirs = torchvision.models.resnet18()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    gray = rm.resnet18()
    fresh = gray.fc.weight.clone()
    said, left = rm.load_weights(gray, "resnet18", str(tmp_path / "theirs.pth"))
    assert "120 of 122 tensors of" in said
    assert "conv1.weight adapted to 1 channel" in said
    assert "left fresh: fc.weight, fc.bias" in said
    assert left == ["fc.weight", "fc.bias"]
    larger = rm.resnet34().state_dict()
    torch.save(larger, tmp_path / "larger.pth")
    said, _ = rm.load_weights(rm.resnet18(), "resnet18", str(tmp_path / "larger.pth"))
    assert f"122 of {len(larger)} tensors" in said
    image = torch.randn(1, 1, 28, 28)
    theirs.eval()
    answers = gray.conv1(image), theirs.conv1(image.expand(-1, 3, -1, -1))
    assert torch.allclose(*answers, atol=1e-5)  # a gray image gets the answer that it had as RGB
    assert torch.equal(gray.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight)
    assert torch.equal(gray.fc.weight, fresh)
    rgb = rm.resnet18(input_channels=3)
    torch.save({"state_dict": gray.state_dict()}, tmp_path / "gray.pth")
    said, left = rm.load_weights(rgb, "resnet18", str(tmp_path / "gray.pth"))
    assert "conv1.weight adapted to 3 channel" in said
    assert left == []
    assert torch.allclose(rgb.conv1(image.expand(-1, 3, -1, -1)), gray.conv1(image), atol=1e-5)


@pytest.mark.parametrize("name", ["densenet121", "mnasnet0_5"])
def test_weights_of_networks_whose_files_are_special(tmp_path, name):
    options = {"num_classes": 10}
    state = torchvision.models.get_model(name, **options).state_dict()
    layer = re.compile(r"(denselayer\d+\.(?:norm|conv))([12]\.)")

    def theirs(key):  # as torchvision's files and torch.compile have it
        return "module._orig_mod." + layer.sub(r"\1.\2", key)

    state = {theirs(k): v for k, v in state.items() if "num_batches_tracked" not in k}
    torch.save(state, tmp_path / "x.pt")
    model = rm.build_model(rm.Recipe(model=name, input="rgb32"))
    _, fresh = rm.load_weights(model, name, str(tmp_path / "x.pt"))
    assert fresh == []
    for key, value in model.state_dict().items():
        assert theirs(key) not in state or torch.equal(value, state[theirs(key)]), key


def test_weights_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(rm.UserError, match=r"resnet18.*cannot be downloaded.*--weights resnet18"):
        rm.load_weights(rm.resnet18(), "resnet18", "imagenet")
    with pytest.raises(rm.UserError, match="no ImageNet weights for lenet5"):
        rm.load_weights(rm.lenet5(), "lenet5", "imagenet")
    nested = {"model": "lenet5", "state_dict": {"module.C1.bias": torch.ones(6)}}
    torch.save(nested, tmp_path / "nested.pth")
    lenet5 = rm.lenet5()
    assert "1 of 1 tensors" in rm.load_weights(lenet5, "lenet5", str(tmp_path / "nested.pth"))[0]
    assert bool((lenet5.C1.bias == 1).all())
    torch.save(rm.lenet5().state_dict(), tmp_path / "lenet5.pth")
    with pytest.raises(rm.UserError, match="no weights of resnet18"):
        rm.load_weights(rm.resnet18(), "resnet18", str(tmp_path / "lenet5.pth"))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(rm.UserError, match=r"text\.pth"):
        rm.load_weights(rm.resnet18(), "resnet18", str(tmp_path / "text.pth"))


def test_frozen_parts_stay_as_they_are(tmp_path, trained, monkeypatch, capsys, no_pictures):
    monkeypatch.chdir(tmp_path)
    start = next((trained[0] / "runs").iterdir()) / "best.pt"
    flags = ["--weights", str(start), "--freeze", "conv1", "bn1", "layer1", "--limit", "128"]
    assert rm.main([*TRAIN, *flags, "--epochs", "1", "--output-dir", "x"]) == 0
    assert "122 of 122 tensors of" in capsys.readouterr().out
    before, last = rm.load_checkpoint(start)["model"], rm.load_checkpoint(tmp_path / "x/last.pt")
    for key, value in before.items():
        frozen = key.startswith(("conv1", "bn1", "layer1"))
        if frozen or not key.endswith("num_batches_tracked"):
            assert torch.equal(value, last["model"][key]) == frozen, key
    parameters = sum(
        key.startswith(("layer2", "layer3", "layer4", "fc"))
        and "running" not in key
        and "num_batches" not in key
        for key in before
    )
    assert len(last["optimizer"]["state"]) == parameters
    assert rm.main(["--resume", "x", "--epochs", "2", "--quiet"]) == 0
    again = rm.load_checkpoint(tmp_path / "x/last.pt")["model"]
    assert torch.equal(again["bn1.running_mean"], before["bn1.running_mean"])
    assert rm.main([*TRAIN, "--input", "rgb32", *flags]) == 2  # a 3×3 stem cannot take 7×7 filters
    assert "conv1 got no weights" in capsys.readouterr().err
    assert rm.main([*TRAIN, "--freeze", "layer5"]) == 2
    assert "there is no part 'layer5' to freeze; there is conv1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["lenet5", "mobilenet_v3_small"])
def test_all_commands_take_other_networks(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    assert rm.main([*TRAIN, "--model", name, "--epochs", "1", "--output-dir", "x"]) == 0
    assert (tmp_path / "x" / "mistakes.png").exists()
    assert rm.main(["evaluate", "x", "x/best.pt"]) == 0
    table = capsys.readouterr().out.splitlines()[-2:]
    parameters = sum(p.numel() for p in rm.build_model(rm.Recipe(model=name)).parameters())
    assert table[0].split()[:3] == [name, "gray28", f"{parameters:,}"]
    assert rm.main(["predict", str(draw_seven(tmp_path / "7.png")), "--checkpoint", "x"]) == 0
    assert rm.main(["describe", "--model", name]) == 0
    assert f"{parameters:,}" in capsys.readouterr().out


# Kaggle's files


def test_kaggle_files_are_read(tmp_path):
    digits = rm.draw_synthetic_digits(1, 30, 20)
    labels = write_kaggle(digits, tmp_path, 30)
    images, read = rm.read_kaggle(tmp_path / "train.csv", labelled=True)
    assert torch.equal(images, digits.train_images)
    assert torch.equal(read, digits.train_labels)
    images, none = rm.read_kaggle(tmp_path / "test.csv", labelled=False)
    assert torch.equal(images, digits.test_images)
    assert none is None
    assert torch.equal(labels, digits.test_labels)
    text = (tmp_path / "train.csv").read_text()
    header, body = text.split("\n", 1)
    quoted = ",".join(f'"{name}"' for name in header.split(","))
    (tmp_path / "odd.csv").write_bytes(
        ("\ufeff" + quoted + "\n" + body).replace("\n", "\r\n").encode()
    )
    assert torch.equal(rm.read_kaggle(tmp_path / "odd.csv", labelled=True)[0], digits.train_images)


def row(*cells):
    return ",".join(map(str, [*cells, *[0] * (785 - len(cells))])) + "\n"


KAGGLE_HEADER = ",".join(["label", *(f"pixel{i}" for i in range(784))]) + "\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "row 1"),
        ("a,b\n1,2\n", "row 1"),
        (KAGGLE_HEADER, "holds no digit"),
        (KAGGLE_HEADER + row(3) + row(3, 256), "row 3, column pixel0: '256'"),
        (KAGGLE_HEADER + row(3) + row(3, -1), "row 3, column pixel0: '-1'"),
        (KAGGLE_HEADER + row(3, 4, "x"), "row 2, column pixel1: 'x'"),
        (KAGGLE_HEADER + row(3, "1_0"), "row 2, column pixel0: '1_0'"),
        (KAGGLE_HEADER + row(3, 1.5), "row 2, column pixel0: '1.5'"),
        (KAGGLE_HEADER + row(3) + row(10), "row 3, column label: '10'"),
        (KAGGLE_HEADER + row(3) + "1,2\n", "row 3: 2 columns, not 785"),
        (KAGGLE_HEADER + row(3).strip() + ",\n", "row 2: 786 columns, not 785"),
        (KAGGLE_HEADER + row(3, ""), "row 2, column pixel0: ''"),
        (KAGGLE_HEADER + row(3)[2:] * 3, "row 2: 784 columns, not 785"),
        (KAGGLE_HEADER + row(3, "1" * 200_000), "row 2, column pixel0: '11111"),
    ],
)
def test_damaged_kaggle_files_are_refused_with_row_and_column(tmp_path, text, said):
    path = tmp_path / "train.csv"
    path.write_text(text)
    with pytest.raises(rm.UserError, match=re.escape(said)) as caught:
        rm.read_kaggle(path, labelled=True)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_kaggle_from_train_csv_to_solution_csv(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    labels = write_kaggle(rm.draw_synthetic_digits(1, 600, 100), tmp_path, 600)
    flags = ["--recipe", "kaggle", "--val-size", "60", "--model", "simple_cnn", "--epochs", "8"]
    flags += ["--lr", "0.003", "--lr-step", "8", "--data-dir", ".", "--output-dir", "x"]
    assert rm.main(flags) == 0
    printed = capsys.readouterr().out
    assert "validation accuracy" in printed
    assert "test accuracy" not in printed
    with open("x/solution.csv", newline="") as file:
        text = file.read()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert text.startswith("ImageId,Label\n1,")
    assert [row["ImageId"] for row in rows] == [str(number) for number in range(1, 101)]
    right = sum(int(row["Label"]) == label for row, label in zip(rows, labels, strict=True))
    assert right > 50
    Path("x/solution.csv").unlink()
    assert rm.main(["predict", "--kaggle", "test.csv", "--checkpoint", "x"]) == 0
    with open("x/solution.csv", newline="") as file:
        assert file.read() == text
    assert rm.main(["--dataset", "kaggle", "--data-dir", ".", "--select-on", "test"]) == 2
    assert "no test labels" in capsys.readouterr().err


# Pictures


def test_classification_report_against_counts_by_hand():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    predictions = torch.tensor([0, 0, 1, 1, 2, 2])
    assert rm.confusion_matrix(labels, predictions)[:3, :3].tolist() == [
        [2, 1, 0],
        [0, 1, 1],
        [0, 0, 1],
    ]
    lines = rm.classification_report(labels, predictions).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line}
    text = [line for line in lines if line.startswith(("0 ", "1 ", "2 ", "9 "))]
    assert [line.split()[1:] for line in text] == [
        ["100.00", "66.67", "80.00", "3"],
        ["50.00", "50.00", "50.00", "2"],
        ["50.00", "100.00", "66.67", "1"],
        ["0.00", "0.00", "0.00", "0"],
    ]
    assert rows["macro"] == ["20.00", "21.67", "19.67", "6"]
    assert rows["weighted"] == ["75.00", "66.67", "67.78", "6"]
    assert max(map(len, lines)) <= 80


PICTURES = ("curves", "confusion_matrix", "predictions", "mistakes", "feature_maps")


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_not_blank(trained, name):
    folder = next((trained[0] / "runs").iterdir())
    with Image.open(folder / f"{name}.png") as picture:
        assert min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(2**24)) > 50


def test_mistakes_are_drawn_even_if_there_are_none():
    assert rm.plot_digits(torch.zeros(0, 1, 28, 28), [], [], "no mistakes").axes


# Command line


def test_train_writes_a_whole_run(trained):
    cwd, done = trained
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    folder = cwd / "runs" / "resnet18-gray28-synthetic-1"
    files = {"best.pt", "last.pt", "history.csv", "report.txt"}
    assert {p.name for p in folder.iterdir()} == files | {f"{name}.png" for name in PICTURES}
    report = (folder / "report.txt").read_text()
    assert report.strip() in done.stdout
    assert "dataset synthetic" in report
    assert "precision" in report
    assert max(map(len, done.stdout.splitlines())) <= 80
    with open(folder / "history.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert 0 < float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    assert rm.load_checkpoint(folder / "best.pt")["recipe"].dataset == "synthetic"


def test_evaluate_repeats_the_report(trained, capsys):
    cwd, _ = trained
    folder = cwd / "runs" / "resnet18-gray28-synthetic-1"
    newest = run("evaluate", cwd=cwd)
    assert newest.returncode == 0, newest.stderr
    assert (folder / "report.txt").read_text().strip() in newest.stdout
    for named in (folder, folder / "best.pt"):
        assert rm.main(["evaluate", str(named)]) == 0
        assert (folder / "report.txt").read_text().strip() in capsys.readouterr().out
    assert rm.main(["evaluate", str(folder), "--tta"]) == 0
    averaged = capsys.readouterr().out
    assert "seed 0, tta\n" in averaged
    assert (folder / "report.txt").read_text().splitlines()[2] not in averaged  # another loss


def test_evaluate_says_what_was_selected_and_what_was_not(trained, tmp_path, capsys):
    kept = rm.read_tensors(trained[0] / "runs" / "resnet18-gray28-synthetic-1" / "last.pt")
    for name, best, average in (("a", True, {}), ("b", False, {}), ("c", True, {"average": {}})):
        rows = [*kept["rows"][:-1], {**kept["rows"][-1], "best": best}]
        torch.save({**kept, "rows": rows, **average}, tmp_path / name)
        assert rm.main(["evaluate", str(tmp_path / name)]) == 0
    a, b, c = capsys.readouterr().out.split("resnet18, gray28")[1:]
    assert "epoch 2, selected on the validation set" in a
    assert "epoch 2, not selected on the validation set" in b
    assert "on the validation set" not in c  # there the loss is of the mean of the weights


def test_pictures_of_results_of_another_loader_are_refused(tmp_path):
    digits = rm.draw_synthetic_digits(0, 60, 20)
    data = rm.MNISTDataLoader(dataset=digits, val_size=20)
    trainer = rm.ResNetTrainer(rm.lenet5(), "cpu", quiet=True)
    history = trainer.train(data.train, data.val, epochs=1)
    rm.visualize_results(trainer.model, data.test, trainer.test(data.test), history, str(tmp_path))
    assert (tmp_path / "mistakes.png").is_file()
    results = trainer.test(data.train)  # which shuffles
    with pytest.raises(rm.UserError, match="order"):
        rm.visualize_results(trainer.model, data.train, results, history, tmp_path)


def test_a_run_touches_no_file_of_others(tmp_path, no_pictures):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".notes.tmp").write_text("precious")
    assert small_run(tmp_path) == 0
    assert (folder / ".notes.tmp").read_text() == "precious"
    (tmp_path / "b" / "run").mkdir(parents=True)
    (tmp_path / "b" / "run" / "solution.csv").write_text("precious")
    assert small_run(tmp_path / "b") == 2


def test_stopped_early_is_said_of_runs_that_were(capsys):
    loader = digits_loader(96)
    for epochs in (2, 3):
        trainer = rm.ResNetTrainer(LinearModel(), "cpu")
        trainer.train(loader, loader, lr=0.0, scheduler="none", patience=1, epochs=epochs)
        assert ("stopped early" in capsys.readouterr().out) == (epochs == 3)


def test_evaluate_needs_only_the_network_of_a_run(trained, tmp_path):
    for name in ("best.pt", "last.pt"):
        shutil.copy(trained[0] / "runs" / "resnet18-gray28-synthetic-1" / name, tmp_path)
    os.truncate(tmp_path / "last.pt", 1000)
    assert rm.main(["evaluate", str(tmp_path)]) == 0


def draw_seven(path, mode="L", paper=255, ink=0):
    image = Image.new(mode, (200, 300), paper)
    ImageDraw.Draw(image).line([(40, 60), (150, 60), (80, 250)], fill=ink, width=18)
    image.save(path)
    return path


def test_predict_prints_a_line_a_file_and_saves_a_picture(trained):
    cwd, _ = trained
    paths = [draw_seven(cwd / "a.png"), draw_seven(cwd / "b.jpg", "RGB", "white", "navy")]
    done = run("predict", *paths, cwd=cwd)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [bool(re.fullmatch(r"\d +\d+\.\d\d %  .*", line)) for line in lines[:2]] == [True] * 2
    with Image.open(cwd / "runs" / "resnet18-gray28-synthetic-1" / "predict.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**24)) > 50


def test_pictures_are_treated_as_mnist_was(tmp_path):
    _, image = rm.read_image(draw_seven(tmp_path / "a.png"))
    assert centre(image.float()) == pytest.approx([13.5, 13.5], abs=0.6)
    assert (image.sum(1) > 0).sum() == 20
    assert image.max() == 255
    _, inverted = rm.read_image(draw_seven(tmp_path / "b.png", "L", 0, 255))
    assert (image.int() - inverted.int()).abs().max() <= 2
    mnist = rm.draw_synthetic_digits(0, 1, 1).train_images[0]
    Image.fromarray(mnist.numpy()).save(tmp_path / "c.png")
    assert torch.equal(rm.read_image(tmp_path / "c.png")[1], mnist)


def test_pictures_of_16_bits(tmp_path):
    with Image.open(draw_seven(tmp_path / "8.png", "L", 230, 40)) as eight:
        deep = Image.fromarray(np.asarray(eight).astype(np.uint16) * 250)
    deep.save(tmp_path / "16.png")
    one, other = (rm.read_image(tmp_path / name)[1].int() for name in ("8.png", "16.png"))
    assert (one - other).abs().max() < 16


def arc(x, y, width, height, start, end):
    turn = np.radians(np.linspace(start, end, 24))
    return list(zip(x + width * np.cos(turn), y + height * np.sin(turn), strict=True))


STROKES = {  # of digits in a unit square, y down
    0: [arc(0.5, 0.5, 0.28, 0.42, -90, 270)],
    1: [[(0.53, 0.08), (0.47, 0.92)]],
    2: [[*arc(0.5, 0.3, 0.25, 0.22, -170, 30), (0.28, 0.9), (0.78, 0.9)]],
    3: [arc(0.48, 0.28, 0.24, 0.2, -150, 90), arc(0.48, 0.7, 0.27, 0.22, -90, 150)],
    4: [[(0.6, 0.08), (0.22, 0.62), (0.82, 0.62)], [(0.64, 0.35), (0.64, 0.93)]],
    5: [[(0.74, 0.1), (0.34, 0.1), (0.31, 0.46), *arc(0.48, 0.66, 0.27, 0.25, -120, 140)]],
    6: [[(0.66, 0.08), *arc(0.5, 0.68, 0.24, 0.24, 180, 540)]],
    7: [[(0.22, 0.1), (0.78, 0.1), (0.45, 0.93)]],
    8: [arc(0.5, 0.29, 0.2, 0.2, -90, 270), arc(0.5, 0.71, 0.25, 0.22, -90, 270)],
    9: [arc(0.48, 0.32, 0.24, 0.23, 0, 360), [(0.72, 0.32), (0.68, 0.62), (0.58, 0.93)]],
    None: [],
}


CORNERS = (0.06, 0.94)


def draw_by_hand(
    digit,
    size=300,
    pen=0.08,
    margin=0.15,
    paper=(255, 255, 255),
    ink=(0, 0, 0),
    gradient=0.0,
    shadow=0.0,
    noise=0.0,
    squares=0.0,
    dust=0,
    transparent=False,
):
    """Draw a digit as someone might; pen and margin are parts of the side."""
    large = Image.new("L", (4 * size, 4 * size))
    draw, width = ImageDraw.Draw(large), max(1, int(4 * pen * size))
    for stroke in STROKES[digit]:
        points = [tuple(4 * size * (margin + (1 - 2 * margin) * c) for c in p) for p in stroke]
        draw.line(points, 255, width, joint="curve")
        for x, y in points:
            draw.circle((x, y), width / 2, fill=255)
    for x, y in random.Random(0).choices([(x, y) for x in CORNERS for y in CORNERS], k=dust):
        draw.circle((4 * size * x, 4 * size * y), 4 * size * 0.015, fill=255)
    cover = np.asarray(large.reduce(4), float)[..., None] / 255
    if transparent:
        picture = Image.new("RGB", (size, size), ink)
        picture.putalpha(Image.fromarray(np.uint8(255 * cover[..., 0])))
        return picture
    v, u = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    ground = np.ones((size, size, 3)) * paper
    ground *= (1 - gradient * (0.7 * u + 0.3 * v + 1) / 2)[..., None]
    ground *= np.where(u + 0.3 * v > 0.2, 1 - shadow, 1)[..., None]
    ground[:: max(2, size // 12)] *= 1 - squares
    ground[:, :: max(2, size // 12)] *= 1 - squares
    pixels = ground * (1 - cover) + np.array(ink) * cover
    pixels += noise * np.random.default_rng(0).normal(size=pixels.shape)
    return Image.fromarray(np.uint8(pixels.clip(0, 255)))


HANDS = {
    "thin": {"pen": 0.015},
    "thick": {"pen": 0.15},
    "small": {"size": 60},
    "tiny": {"size": 32},
    "large": {"size": 600},
    "chalk": {"paper": (20, 30, 25), "ink": (240, 240, 230)},
    "red": {"ink": (200, 30, 30)},
    "yellow": {"ink": (235, 210, 60)},
    "blue on blue": {"paper": (120, 170, 230), "ink": (20, 30, 120)},
    "tight": {"margin": 0.05},
    "lost": {"margin": 0.36, "pen": 0.03},
    "gradient": {"gradient": 0.6},
    "gradient, thin": {"gradient": 0.6, "pen": 0.03},
    "shadow": {"shadow": 0.35},
    "noise": {"noise": 30},
    "pencil": {"ink": (150, 150, 150), "paper": (235, 232, 225), "noise": 6, "pen": 0.03},
    "transparent": {"transparent": True},
    "white on transparent": {"transparent": True, "ink": (255, 255, 255)},
    "squared": {"squares": 0.4},
    "dust": {"dust": 3, "margin": 0.3},
    "photo": {"gradient": 0.5, "noise": 8, "margin": 0.3, "pen": 0.03, "paper": (210, 205, 190)},
}


@pytest.fixture(scope="session")
def reader():
    """A small network that has learned in seconds to read fonts, and STROKES as MNIST has them.

    What it gets wrong is then no unknown hand, but what was made of the picture.
    """
    torch.manual_seed(0)
    fonts = rm.draw_synthetic_digits(0)
    chalk = {"size": 28, "margin": 0.14, "paper": (0, 0, 0), "ink": (255, 255, 255)}
    pens = (0.06, 0.08, 0.1, 0.13, 0.16)
    drawn = [draw_by_hand(digit, pen=pen, **chalk) for pen in pens for digit in range(10)]
    drawn = torch.stack([torch.from_numpy(np.array(picture.convert("L"))) for picture in drawn])
    digits = fonts._replace(
        train_images=torch.cat([fonts.train_images, drawn.repeat(60, 1, 1)]),
        train_labels=torch.cat([fonts.train_labels, torch.arange(3000) % 10]),
    )
    data = rm.MNISTDataLoader(64, dataset=digits, augment=rm.Distortion(12, 0.08, 0.2, 0.06))
    recipe = rm.Recipe(optimizer="adam", lr=0.003, epochs=5, scheduler="onecycle", precision="fp32")
    trainer = rm.ResNetTrainer(rm.simple_cnn(), "cpu", recipe, quiet=True)
    trainer.train(data.train, data.val)
    return trainer


def test_a_digit_is_read_alike_however_it_is_drawn(tmp_path, reader):
    digits = []
    for how in ({}, *HANDS.values()):
        for digit in range(10):
            draw_by_hand(digit, **how).save(tmp_path / "x.png")
            digits.append(rm.read_image(tmp_path / "x.png")[1])
    digits = torch.stack(digits)
    sides = torch.stack([(digits > 64).any(dim=axis).sum(dim=1) for axis in (1, 2)]).amax(dim=0)
    assert {*sides.tolist()} == {20}
    results = reader.test(rm.as_loader(reader, digits))
    plain, *others = results["predictions"].view(-1, 10).tolist()
    assert plain == list(range(10))
    assert {name: read for name, read in zip(HANDS, others, strict=True) if read != plain} == {}


EMPTY = {
    "white": {},
    "black": {"paper": (0, 0, 0)},
    "tiny": {"size": 28},
    "a pixel": {"size": 1},
    "noise": {"noise": 40},
    "gradient": {"gradient": 0.6, "noise": 5},
    "squared": {"squares": 0.3},
    "squared in uneven light": {"squares": 0.5, "gradient": 0.4, "noise": 5},
}


@pytest.mark.parametrize("how", EMPTY)
def test_an_empty_page_is_said_to_be_empty(tmp_path, how):
    draw_by_hand(None, **EMPTY[how]).save(tmp_path / "x.png")
    with pytest.raises(rm.UserError, match="shows no ink"):
        rm.read_image(tmp_path / "x.png")


def test_every_format_of_image_is_read(tmp_path, reader):
    drawn = draw_by_hand(2)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90° clockwise
    clear = Image.new("P", drawn.size)
    clear.putpalette([0, 0, 0, 255, 255, 255])
    clear.paste(1, (0, 0, *drawn.size), drawn.convert("L").point(lambda value: 255 * (value > 128)))
    white = Image.new("RGB", drawn.size, "white")
    pictures = {
        "gray.png": (drawn.convert("L"), {}),
        "bits.png": (drawn.convert("1"), {}),
        "palette.png": (drawn.quantize(8), {}),
        "clear.png": (clear, {"transparency": 1}),
        "gray with alpha.png": (drawn.convert("LA"), {}),
        "deep.png": (Image.fromarray(np.asarray(drawn.convert("L")).astype(np.uint16) * 200), {}),
        "float.tiff": (Image.fromarray(np.asarray(drawn.convert("L")) / 255.0), {}),
        "inks.tiff": (drawn.convert("CMYK"), {}),
        "inks.jpg": (drawn.convert("CMYK"), {}),
        "turned.jpg": (drawn.transpose(Image.Transpose.ROTATE_90), {"exif": turned}),
        "animated.gif": (drawn, {"save_all": True, "append_images": [white]}),
        "bare.bmp": (drawn, {}),
        "modern.webp": (drawn, {}),
    }
    for name, (picture, options) in pictures.items():
        picture.save(tmp_path / name, **options)
    digits = torch.stack([rm.read_image(tmp_path / name)[1] for name in pictures])
    read = reader.test(rm.as_loader(reader, digits))["predictions"].tolist()
    assert dict(zip(pictures, read, strict=True)) == dict.fromkeys(pictures, 2)


def test_report_of_the_last_network_names_its_epoch(tmp_path, capsys, no_pictures):
    assert small_run(tmp_path) == 0
    path = tmp_path / "run" / "last.pt"
    last = torch.load(path, weights_only=True)
    last["rows"][0]["val_loss"] = 0.0  # as if the first epoch had been the best
    torch.save(last, path)
    capsys.readouterr()
    assert rm.main(["evaluate", str(path), "--data-dir", str(tmp_path)]) == 0
    assert "epoch 3, selected" in capsys.readouterr().out


def test_describe(tmp_path):
    done = run("describe", "--model", "resnet34", "--input", "rgb32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "21,282,122" in done.stdout
    assert "3×32×32" in done.stdout


def test_resume_by_command_and_refusal_of_a_taken_folder(
    trained, tmp_path, monkeypatch, capsys, no_pictures
):
    monkeypatch.chdir(tmp_path)
    assert rm.main([*TRAIN, "--epochs", "1", "--output-dir", "a", "--quiet"]) == 0
    report = (tmp_path / "a" / "report.txt").read_text()
    assert capsys.readouterr() == (report + "\n", "")
    assert rm.main([*TRAIN, "--output-dir", "a", "--quiet"]) == 2
    assert re.fullmatch("error: a is taken: .*\n", capsys.readouterr().err)
    same = ["--seed", "0", "--dataset", "auto"]  # what the run began with, and may be said again
    assert rm.main(["--resume", "a", "--epochs", "2", *same, "--quiet"]) == 0
    straight = trained[0] / "runs" / "resnet18-gray28-synthetic-1" / "last.pt"
    ours, theirs = rm.load_checkpoint(tmp_path / "a" / "last.pt"), rm.load_checkpoint(straight)
    assert without_timings(ours["rows"]) == without_timings(theirs["rows"])
    assert all(torch.equal(ours["model"][key], theirs["model"][key]) for key in ours["model"])
    for mistake in (["--lr", "0.5"], ["--output-dir", "b"], ["--recipe", "adam"]):
        capsys.readouterr()
        assert rm.main(["--resume", "a", *mistake]) == 2
        assert mistake[0].strip("-").replace("-", "_") in capsys.readouterr().err.replace("-", "_")
    assert rm.main(["--resume", "a/best.pt"]) == 2


def test_a_lengthened_run_that_is_stopped_stays_lengthened(
    tmp_path, monkeypatch, capsys, no_pictures
):
    monkeypatch.chdir(tmp_path)
    flags = ["--model", "lenet5", "--quiet"]
    assert rm.main([*TRAIN, *flags, "--epochs", "1", "--output-dir", "a"]) == 0

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rm, "train_one_epoch", stop)
        assert rm.main(["--resume", "a", "--epochs", "3", "--quiet"]) == 130
    assert rm.main(["--resume", "a", "--quiet"]) == 0
    assert len(rm.load_checkpoint("a/last.pt")["rows"]) == 3


@pytest.mark.parametrize("kept", ["best.pt", "last.pt", "history.csv", "report.txt"])
def test_no_file_of_another_run_is_overwritten(tmp_path, monkeypatch, capsys, kept):
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    Path("a", kept).write_text("mine")
    assert rm.main([*TRAIN, "--output-dir", "a"]) == 2
    assert "a is taken" in capsys.readouterr().err
    assert Path("a", kept).read_text() == "mine"
    assert len(list(Path("a").iterdir())) == 1


def test_closed_stdout(tmp_path, monkeypatch, no_pictures):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", None)
    flags = ["--model", "lenet5", "--epochs", "1", "--output-dir", "a"]
    assert rm.main([*TRAIN, *flags]) == 0
    assert Path("a", "report.txt").exists()


def test_show_opens_every_picture(trained, monkeypatch):
    monkeypatch.chdir(trained[0])
    plt.close("all")
    opened = []
    monkeypatch.setattr(plt, "show", lambda: opened.extend(plt.get_fignums()))
    assert rm.main(["--resume", "--quiet", "--show"]) == 0  # a finished run: only reported again
    assert len(opened) == len(PICTURES)


@pytest.mark.skipif(os.name == "nt", reason="signals differ")
def test_ctrl_c_prints_the_command_that_resumes(tmp_path):
    arguments = [sys.executable, str(SCRIPT), *TRAIN, "--epochs", "99", "--output-dir=-x"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Where the tests run in the background, the signal may be ignored, and children inherit that.
    pipes["preexec_fn"] = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(arguments, cwd=tmp_path, **pipes) as process:
        for line in process.stdout:
            if line.startswith("epoch"):
                break
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume=-x" in errors
    assert "Traceback" not in errors
    assert rm.load_checkpoint(tmp_path / "-x" / "last.pt")["format"]


@pytest.mark.skipif(os.name == "nt", reason="no pseudo-terminals")
def test_progress_counts_the_images_of_all_processes(monkeypatch, capsys):
    monkeypatch.setattr(rm, "rank_and_ranks", lambda: (0, 2))
    model = LinearModel()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = [(torch.zeros(8, 1, 28, 28), torch.arange(8))] * 100
    epoch = rm.train_one_epoch(model, loader, optimizer, title="1/1")
    shown = re.search(r"batch 100/100 .* ([\d,]+) images/s", capsys.readouterr().out)[1]
    assert int(shown.replace(",", "")) == pytest.approx(epoch["images_per_second"], rel=0.3)


def test_progress_is_live_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "60")
    model = LinearModel()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    rm.train_one_epoch(model, digits_loader(96), optimizer, title="1/2")
    shown = terminal.getvalue().split("\r")[1:]
    assert len(shown) == 3
    assert all(re.match(r"1/2  batch \d/3  loss \d", line) for line in shown)
    assert all(len(line.replace("\033[K", "")) < 60 for line in shown)


def small_run(folder: Path, *more):
    """Train LeNet-5 for three epochs in this process; return the exit code."""
    flags = ("--model", "lenet5", "--epochs", "3", "--quiet", "--precision", "fp32")
    return rm.main([*TRAIN, *flags, "--output-dir", str(folder / "run"), *map(str, more)])


@pytest.mark.parametrize("trouble", ["full disk", "folder deleted"])
def test_a_run_that_can_write_no_more_says_so_and_keeps_what_it_has(
    tmp_path, monkeypatch, capsys, no_pictures, trouble
):
    save, epochs = rm.ResNetTrainer._save, []

    def no_space(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save_until_the_second_epoch(trainer):
        epochs.append(len(trainer.rows))
        if len(trainer.rows) == 2 and trouble == "full disk":
            monkeypatch.setattr(os, "fsync", no_space)
        elif len(trainer.rows) == 2:
            shutil.rmtree(trainer.run_dir)
        save(trainer)

    monkeypatch.setattr(rm.ResNetTrainer, "_save", save_until_the_second_epoch)
    assert small_run(tmp_path) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: cannot write {tmp_path}")
    assert said.count("\n") == 1
    assert epochs == [0, 1, 2]
    if trouble == "full disk":
        assert len(rm.load_checkpoint(tmp_path / "run" / "last.pt")["rows"]) == 1
        assert not list((tmp_path / "run").glob(".*"))


def test_of_two_runs_that_want_a_folder_at_once_one_gets_it(tmp_path):
    barrier, won = threading.Barrier(8), []

    def claim():
        barrier.wait()
        with contextlib.suppress(rm.UserError):
            won.append(rm.claim_run_dir(str(tmp_path / "run"), "x"))

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [tmp_path / "run"]


def test_the_same_seed_gives_the_same_history(tmp_path, no_pictures):
    tables = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert small_run(tmp_path / name, "--seed", seed, "--deterministic") == 0
        torch.use_deterministic_algorithms(False)
        with open(tmp_path / name / "run" / "history.csv", newline="") as file:
            tables.append(without_timings(list(csv.DictReader(file))))
    assert tables[0] == tables[1] != tables[2]


def test_gradient_norms_are_those_of_the_layers_in_their_order():
    model = rm.resnet18(plain=True)
    images, labels = torch.randn(16, 1, 28, 28), torch.arange(16) % 10
    norms = rm.gradient_norms(model, images, labels)
    layers = [part for part in model.modules() if isinstance(part, (nn.Conv2d, nn.Linear))]
    assert norms == [part.weight.grad.norm().item() for part in layers]
    assert len(rm.gradient_norms(rm.resnet18(), images, labels)) == len(norms) == 18


@pytest.mark.parametrize("factor", [1.2, 5, 15, 30, 300])
def test_numbers_along_the_axes_of_a_comparison_do_not_overlap(factor):
    runs = {}
    for name, by in (("a", 1), ("b", factor)):
        row = {"seconds": 60.0 * by, "val_accuracy": 100 - 50 / by, "train_loss": 0.5 / by}
        runs[name] = [row], [1.0, by]
    figure = rm.plot_comparison(runs)
    figure.canvas.draw()
    axis = figure.axes[0]
    for scale, side in ((axis.xaxis, "intervalx"), (axis.yaxis, "intervaly")):
        low, high = sorted(scale.get_view_interval())
        ticks = [tick for tick in scale.get_major_ticks() if low <= tick.get_loc() <= high]
        spans = sorted(tuple(getattr(t.label1.get_window_extent(), side)) for t in ticks)
        assert len(spans) > 1
        assert all(one[1] < other[0] for one, other in itertools.pairwise(spans))


def test_a_comparison_shows_perfect_runs_and_odd_names():
    runs = {}
    for name, accuracy in (("a", 99.0), ("b$x^{$\udcff", 100.0)):
        rows = [{"seconds": 60.0, "val_accuracy": accuracy, "train_loss": 0.5}] * 2
        runs[name] = rows, []
    figure = rm.plot_comparison(runs)
    figure.canvas.draw()
    axis = figure.axes[0]
    low, high = sorted(axis.get_ylim())
    assert all(low < y < high for line in axis.lines for y in line.get_ydata())
    assert len(figure.legends[0].get_texts()) == 2


def test_runs_are_compared_in_a_table_and_a_picture(tmp_path, capsys, no_pictures):
    assert small_run(tmp_path / "a") == 0
    assert small_run(tmp_path / "b", "--weights", str(tmp_path / "a" / "run" / "best.pt")) == 0
    capsys.readouterr()
    runs = [str(tmp_path / name / "run") for name in ("a", "b")]
    assert rm.main(["evaluate", *runs]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = lines[lines.index(next(line for line in lines if line.startswith("model "))) :]
    assert [line.split()[0] for line in table[:3]] == ["model", "lenet5", "lenet5"]
    assert max(map(len, table[:1])) <= 80
    figure = plt.figure(plt.get_fignums()[-1])
    times = figure.axes[0].lines[0].get_xdata()
    assert len(times) == 3
    assert sorted(times) == list(times)
    assert [len(line.get_xdata()) for line in figure.axes[2].lines] == [5, 0]  # of fresh weights
    with Image.open(tmp_path / "a" / "run" / "comparison.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**24)) > 50


# Damaged files of every kind, made at random


def damage(rng, data: bytes) -> bytes:
    """Cut, flip, repeat, blank or insert some bytes, or leave none."""
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    noise = rng.randbytes(rng.randint(1, 30))
    flipped = bytearray(data)
    for _ in range(rng.choice((1, 1, 10, 1000))):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    kinds = [data[:a], bytes(flipped), data[:b] + data[a:], data[:a] + bytes(b - a) + data[b:]]
    return rng.choice([*kinds, data[:a] + noise + data[a:], data[a:], b"", noise])


def damaged_checkpoint(rng, path: Path, whole: Path) -> None:
    """Write a checkpoint whose bytes are damaged, or whose content is not what it should be."""
    if rng.random() < 0.5:
        path.write_bytes(damage(rng, whole.read_bytes()))
        return
    content = torch.load(whole, weights_only=True)
    odd = [None, -1, 1e30, math.nan, "x" * 1000, [], {}, torch.zeros(3), torch.zeros(0), True]
    for _ in range(rng.randint(1, 3)):
        part = rng.choice([content, content["recipe"], content["model"]])
        name = rng.choice(list(part) or ["x"])
        change = rng.randrange(3)
        if change == 0:
            part.pop(name, None)
        elif change == 1:
            part[rng.choice((name, "other", 7))] = rng.choice(odd)
        elif isinstance(part.get(name), torch.Tensor):
            part[name] = rng.choice(
                [part[name].to(torch.complex64), part[name][:1], part[name].to_sparse(),
                 part[name].half(), part[name] * math.nan, part[name].flatten(),
                 torch.zeros(1).expand(10**6, 10**6)])  # fmt: skip
        if not all(isinstance(content.get(key), dict) for key in ("recipe", "model")):
            break
    torch.save(content, path)


def damaged_text(rng, text: str) -> bytes:
    """Damage a CSV as programs and people do."""
    rows = text.splitlines()
    row = rng.randrange(len(rows))
    cells = rows[row].split(",")
    cell = rng.randrange(len(cells))
    odd = [
        "",
        "256",
        "-1",
        "a",
        "1.5",
        "nan",
        "1e3",
        '"',
        '"7"',
        " 3 ",
        "9" * 400,
        "\0",
        "é",
        "0x1",
    ]
    cells[cell] = rng.choice(odd)
    changes = [
        [*rows[:row], ",".join(cells), *rows[row + 1 :]],
        [*rows[:row], rows[row] + rng.choice((",", ",,", ",5", ";")), *rows[row + 1 :]],
        [*rows[:row], rows[row].rpartition(",")[0], *rows[row + 1 :]],
        [*rows[:row], *rows[row + 1 :]],
        [*rows[:row], "", *rows[row:]],
        [*rows[:row], *rows[row:], *rows[row : row + 1]],
        rows[:row],
        [line.replace(",", ";") for line in rows],
        [",".join(f'"{value}"' for value in line.split(",")) for line in rows],
    ]
    end = rng.choice(("\n", "\r\n", "\r"))
    encoded = end.join(rng.choice(changes)).encode(rng.choice(("utf-8", "utf-8-sig", "utf-16")))
    return damage(rng, encoded) if rng.random() < 0.2 else encoded


def odd_images(folder: Path) -> list[Path]:
    """Write images that few expect."""
    drawn = draw_by_hand(3, size=100)
    sizes = {"pixel": (1, 1), "line": (1, 3000), "row": (3000, 1), "huge": (20_000, 20_000)}
    for name, size in sizes.items():
        Image.new("1", size, 1).save(folder / f"{name}.png")
    drawn.save(folder / "animated.gif", save_all=True, append_images=[drawn] * 5)
    drawn.convert("CMYK").save(folder / "inks.jpg")
    Image.new("RGBA", (50, 50)).save(folder / "clear.png")
    Image.fromarray(np.full((40, 40), math.nan, np.float32)).save(folder / "nan.tiff")
    drawn.quantize(4).save(folder / "palette.png", transparency=b"\0\x80\xff\x10")
    drawn.save(folder / "plain.png")
    drawn.save(folder / "plain.jpg")
    (folder / "vector.png").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (folder / "empty.png").write_bytes(b"")
    (folder / "folder.png").mkdir()
    return sorted(folder.iterdir())


SMALL = ("--model", "lenet5", "--epochs", "1", "--quiet", "--val-size", "20")


class Touch:
    """A pickle that would run code."""

    def __reduce__(self):
        return Path.touch, (Path("it-ran"),)


def prepare_for_damage(folder: Path) -> list[list[str]]:
    """Write what is to be damaged into a folder; return commands on what is odd as it is."""
    write_mnist(folder / "good")
    (folder / "images").mkdir()
    (folder / "kaggle").mkdir()
    write_kaggle(rm.draw_synthetic_digits(1, 130, 40), folder / "kaggle", 40)
    rm.main(["--data-dir", "good", *SMALL, "--output-dir", "run"])
    with zipfile.ZipFile(folder / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**30))
    (folder / "code.pt").write_bytes(pickle.dumps(Touch()))
    commands = [["evaluate", name, "--data-dir", "good"] for name in ("bomb.pt", "code.pt")]
    images = odd_images(folder / "images")
    return commands + [["predict", "--checkpoint", "run", str(path)] for path in images]


def command_on_damage(rng, folder: Path, number: int) -> list[str]:
    """Damage a checkpoint, an idx file, a CSV or an image; return a command that reads it."""
    new, kind, out = folder / f"out-{number}", number % 4, ("--output-dir", f"out-{number}-")
    if kind == 0:
        new.mkdir()
        path = new / "last.pt"
        damaged_checkpoint(rng, path, folder / "run" / "last.pt")
        return rng.choice(
            [["evaluate", str(path), "--data-dir", "good"],
             ["--resume", new.name, "--data-dir", "good", "--epochs", "2", "--quiet"],
             ["--weights", str(path), "--data-dir", "good", *SMALL, *out],
             ["predict", "images/plain.png", "--checkpoint", str(path)]])  # fmt: skip
    if kind == 1:
        shutil.copytree(folder / "good", new)
        path = rng.choice(sorted((new / "MNIST" / "raw").iterdir()))
        path.write_bytes(damage(rng, path.read_bytes()))
        return ["--data-dir", new.name, "--dataset", "mnist", *SMALL, *out]
    if kind == 2:
        new.mkdir()
        table = (folder / "kaggle" / "train.csv").read_text()
        (new / "train.csv").write_bytes(damaged_text(rng, table))
        return ["--data-dir", new.name, "--recipe", "kaggle", *SMALL, *out]
    path = folder / "image"
    path.write_bytes(damage(rng, (folder / "images" / "plain.png").read_bytes()))
    return ["predict", str(path), "--checkpoint", "run"]


def fuzz(folder: Path, seed: int, cases: int) -> None:
    """Give the program damaged files; raise if it ever does what it should not. For a process."""
    import resource

    os.chdir(folder)
    os.environ.update(NO_NETWORK)
    torch.set_num_threads(1)
    rm.visualize_results = rm.plot_readings = rm.save_figure = lambda *_: None
    rng, failures = random.Random(seed), []
    given = prepare_for_damage(folder)
    for number in range(cases):
        odd = number < len(given)
        arguments = given[number] if odd else command_on_damage(rng, folder, number)
        said = io.StringIO()
        signal.alarm(60)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
                code = rm.main(arguments)
            said = said.getvalue()
            well = said.startswith("error: ") and said.count("\n") == 1 and len(said) < 1000
            if code not in (0, 2) or (code == 2 and not well) or (code == 0 and said):
                failures.append((number, arguments, code, said))
        except Exception:
            failures.append((number, arguments, traceback.format_exc()[-600:]))
        signal.alarm(0)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    for failure in failures:
        print(*failure, sep="\n")
    assert not failures
    assert not Path("it-ran").exists()
    assert memory < 2, f"{memory} GiB"


@pytest.mark.skipif(os.name == "nt", reason="limits time and memory as Unix does")
def test_damaged_files_are_answered_rightly_or_refused_in_a_line(tmp_path):
    process = PROCESSES.Process(target=fuzz, args=(tmp_path, 0, 520))
    process.start()
    process.join()
    assert process.exitcode == 0


# Runs that are killed


def be_killed(folder: Path, kills: int, seed: int = 0, epochs: int = 40) -> int:
    """Kill a run at random moments and resume it each time; return how often it was killed.

    Raises unless it ends with the weights and the history of a run that was never killed.
    """
    rng = random.Random(seed)
    start = ["--data-dir", str(write_mnist(folder / "data")), "--model", "lenet5", "--quiet"]
    start += ["--epochs", str(epochs), "--patience", "1000", "--val-size", "20"]
    assert run(*start, "--output-dir", "whole", cwd=folder).returncode == 0
    begin, killed = [*start, "--output-dir", "killed"], 0
    resume = ["--resume", "killed", "--data-dir", "data", "--quiet"]
    while killed < kills:
        begun = (folder / "killed" / "last.pt").exists()
        if not begun:
            shutil.rmtree(folder / "killed", ignore_errors=True)
        process = PROCESSES.Process(
            target=be_the_program, args=(resume if begun else begin, folder)
        )
        process.start()
        process.join(rng.uniform(0.1, 1.0 if begun else 3.0))
        if process.is_alive():
            killed += 1
        elif process.exitcode == 0:
            shutil.rmtree(folder / "killed")  # at its end too early: from the beginning
        else:
            raise AssertionError(f"exit code {process.exitcode} after {killed} kills")
        process.kill()
        process.join()
    if not (folder / "killed" / "last.pt").exists():
        shutil.rmtree(folder / "killed", ignore_errors=True)
        resume = begin
    done = run(*resume, cwd=folder)
    assert done.returncode == 0, done.stderr
    one, other = (rm.load_checkpoint(folder / name / "last.pt") for name in ("whole", "killed"))
    assert without_timings(one["rows"]) == without_timings(other["rows"])
    for key, weight in one["model"].items():
        assert torch.equal(weight, other["model"][key]), key
    assert [path for path in (folder / "killed").iterdir() if path.suffix == ".tmp"] == []
    return killed


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path):
    assert be_killed(tmp_path, kills=5) == 5


MISTAKES = {
    "--device cuda:42": "there is no device 'cuda:42' here; there is ",
    "evaluate best.pt --data-dir x.txt --device tpu": "'tpu'",
    "--dataset mnist --data-dir none": "train-images-idx3-ubyte.gz",
    "--data-dir damaged": "train-images-idx3-ubyte is damaged",
    "--dataset kaggle --data-dir none": "train.csv",
    "--dataset kaggle --data-dir kaggle": "train.csv, row 1",
    "--epochs many": "--epochs",
    "--batch-size 1": "batch_size",
    "--lr-factor 1": "lr_factor",
    "--optimizer nesterov --momentum 0": "momentum",
    "--freeze conv1 --dataset synthetic": "conv1 got no weights",
    "--recipe adam --elastic 0.1": "--augment",
    "describe --model alexnet --input rgb32": "try rgb224",
    "--modell resnet18": "--modell",
    "trian": "trian",
    "--resume": "there is no run",
    "--resume nowhere": "nowhere",
    "evaluate y.pt": "y.pt",
    "evaluate cut.pt": "cut.pt is damaged",
    "evaluate other.pt": "other.pt holds the weights of another network",
    "--resume cut.pt": "cut.pt is damaged",
    "--weights y.pt --dataset synthetic": "y.pt",
    "--weights other.pt --freeze layer7 --dataset synthetic": "layer7",
    "predict x.txt --checkpoint best.pt": "x.txt",
    "predict nothing.png --checkpoint best.pt": "nothing.png",
    "predict empty.png --checkpoint best.pt": "empty.png shows no ink",
    "--dataset synthetic --output-dir x.txt/run": "cannot write into x.txt",
}


@pytest.fixture(scope="session")
def bad_files(tmp_path_factory, trained):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "x.txt").write_text("no picture")
    (folder / "y.pt").write_bytes(b"no checkpoint")
    (folder / "kaggle").mkdir()
    (folder / "kaggle" / "train.csv").write_text("label,pixels\n1,2\n")
    Image.new("L", (50, 50), 255).save(folder / "empty.png")
    write_mnist(folder / "damaged")
    path = folder / "damaged" / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1000])
    best = trained[0] / "runs" / "resnet18-gray28-synthetic-1" / "best.pt"
    (folder / "best.pt").write_bytes(best.read_bytes())
    (folder / "cut.pt").write_bytes(best.read_bytes()[:1_000_000])
    checkpoint = rm.load_checkpoint(best)
    checkpoint["recipe"] = {**rm.asdict(checkpoint["recipe"]), "model": "resnet34"}
    torch.save(checkpoint, folder / "other.pt")
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_line_and_exit_code_2(bad_files, mistake):
    before = {path for path in bad_files.rglob("*") if path.is_file()}
    done = run(*mistake.split(), cwd=bad_files)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert MISTAKES[mistake] in done.stderr
    assert done.stderr.count("\n") == 1
    assert {path for path in bad_files.rglob("*") if path.is_file()} == before


def test_without_mnist_and_network_auto_says_so_and_draws_digits(tmp_path, capsys):
    digits = rm.load_digits("auto", tmp_path / "none", 0)
    assert digits.name == "synthetic"
    said = capsys.readouterr().err
    assert "SYNTHETIC" in said
    assert "t10k-labels-idx1-ubyte.gz" in said


def test_a_connection_that_breaks_off_is_no_network_either(tmp_path, monkeypatch, capsys):
    def break_off(*_, **__):
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))

    monkeypatch.setattr("urllib.request.urlopen", break_off)
    assert rm.load_digits("auto", tmp_path, 0).name == "synthetic"
    assert os.strerror(errno.ECONNRESET) in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "describe"])
def test_help_shows_every_flag_with_its_default(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        rm.main([command, "--help"])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    if command == "train":
        for setting in rm.fields(rm.Recipe):
            assert f"--{setting.name.replace('_', '-')}" in printed
            default = "" if setting.default in (None, ()) else setting.default
            assert f"default: {default}" in printed.replace("\n" + " " * 24, " ")


# The project


def test_inline_metadata_and_requirements_are_equal():
    block = re.search(r"# dependencies = \[(.*)\]", SCRIPT.read_text(encoding="utf-8"))[1]
    inline = re.findall(r'"([^"]+)"', block)
    lines = (HERE / "requirements.txt").read_text().splitlines()
    required = [line.split("#")[0].strip() for line in lines if line.strip()]
    assert inline == [name for name in required if not name.startswith("pytest")]
    assert len(inline) == 3


@pytest.mark.parametrize("arguments", [[], ["--input", "rgb32"]])
def test_readme_shows_what_describe_prints(arguments, capsys):
    assert rm.main(["describe", *arguments]) == 0
    assert capsys.readouterr().out.strip() in (HERE / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", rm.COMMANDS)
def test_readme_names_every_flag(command):
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    flags = re.findall(r"--[a-z-]+", rm.make_parser(command).format_help())
    missing = {flag for flag in flags if flag not in readme} - {"--help"}
    assert {flag for flag in missing if flag.replace("--no-", "--") not in readme} == set()


def test_import_has_no_side_effect_and_no_matplotlib(tmp_path):
    code = "import sys, resnet18_mnist; print([m for m in ('matplotlib',) if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert list(tmp_path.iterdir()) == []


def rooms() -> dict[str, str]:
    """Return the sections of the program by their number; before the first is the docstring."""
    parts = re.split(r"(?m)^(?=# %% )", SCRIPT.read_text(encoding="utf-8"))
    return {"docstring": parts[0], **{part[5]: part for part in parts[1:]}}


def execute(source: str, name: str, monkeypatch) -> dict:
    """Run source as a module of its own, and return what it defines."""
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(source, name, "exec"), module.__dict__)
    return module.__dict__


@pytest.mark.parametrize("room", "0123456789")
def test_each_section_runs_with_those_that_the_table_of_contents_names(room, monkeypatch):
    (line,) = re.findall(rf"(?m)^    {room}  .*$", rooms()["docstring"])
    needed = re.search(r"(\d)(?: to (\d))?$", line)
    first, last = (int(needed[1]), int(needed[2] or needed[1])) if needed else (0, -1)
    source = "".join(rooms()[str(number)] for number in range(first, last + 1)) + rooms()[room]
    names = execute(source, f"section_{room}", monkeypatch)
    shown = {"1": lambda: names["visualize_model_architecture"](names["resnet18"]()),
             "2": lambda: next(iter(names["MNISTDataLoader"](dataset="synthetic").test)),
             "3": lambda: names["pick_precision"]("auto", names["pick_device"]()),
             "4": lambda: names["RECIPES"]["plateau"],
             "5": lambda: names["compute_accuracy"](LinearModel(), digits_loader()),
             "6": lambda: names["plot_confusion_matrix"](torch.arange(10), torch.arange(10)),
             "7": lambda: names["find_ink"](Image.new("RGB", (9, 9))),
             "8": lambda: names["lenet5"]()(torch.zeros(1, 1, 28, 28)),
             "9": lambda: names["main"](["describe"])}  # fmt: skip
    shown.get(room, lambda: None)()


@pytest.mark.parametrize("launcher", ["ipykernel_launcher.py", "colab_kernel_launcher.py"])
def test_in_a_notebook_nothing_starts_by_itself(monkeypatch, tmp_path, launcher):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"/x/{launcher}", "-f", "kernel.json"])
    execute("".join(rooms().values()), "__main__", monkeypatch)
    assert list(tmp_path.iterdir()) == []


def count_page_faults(pipe) -> None:
    """Tell how many pages twenty large tensors, one after the other, fetch from the system."""
    import resource

    rm.keep_freed_memory()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**24)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_freed_memory_is_kept_for_the_next_step():
    pipe, end = PROCESSES.Pipe()
    process = PROCESSES.Process(target=count_page_faults, args=(end,))
    process.start()
    assert pipe.recv() < 4 * 16_384  # one has 64 MiB, so 16,384 pages of 4 KiB
    process.join()


# What a step costs: `python test_resnet18_mnist.py`


def everybodys_loop(name: str, augment: bool, data_dir: Path, device):
    """Return the loop that most scripts have, as a function that goes through the data once."""
    v1 = torchvision.transforms
    steps = [v1.Resize((32, 32)), v1.Grayscale(3)] if name == "rgb32" else []
    steps += [v1.RandomAffine(10, translate=(0.1, 0.1))] * augment
    transform = v1.Compose([*steps, v1.ToTensor(), v1.Normalize((0.1307,), (0.3081,))])
    dataset = torchvision.datasets.MNIST(data_dir, transform=transform)
    how = {"num_workers": 2, "persistent_workers": True, "shuffle": True}
    loader = DataLoader(dataset, 128, pin_memory=device.type == "cuda", **how)
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    if name == "rgb32":
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=5e-4)

    def loop():
        total = 0
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            total += loss.item()

    return loop


def contestant(which: str, name: str, augment: bool, data_dir: Path, device):
    """Return one of four loops over the same number of batches of 128, as a function.

    "fetching" is the floor where freed memory goes back to the system and is fetched again.
    """
    if which == "everybody":
        return everybodys_loop(name, augment, data_dir, device)
    if which != "fetching":
        rm.keep_freed_memory()  # as the command line does
    digits = rm.read_mnist(data_dir)
    how = {"augment": rm.Distortion(10, 0.1)} if augment else {}
    batches = rm.Batches(digits.train_images, digits.train_labels, 128, name, shuffle=True, **how)
    batches.to(device)
    images, labels = (part.contiguous() for part in next(iter(batches)))
    trainer = rm.ResNetTrainer(rm.build_model(rm.Recipe(input=name)), device)
    model, precision = trainer.model, trainer.precision
    optimizer = rm.make_optimizer(model, rm.Recipe())

    def floor():
        model.train()
        for _ in range(len(batches)):
            with rm.autocast(device, precision):
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        loss.item()  # waits for a GPU

    ours = functools.partial(rm.train_one_epoch, model, batches, optimizer, device, precision)
    return ours if which == "ours" else floor


def compete(pipe, device, *contest) -> None:
    """In a process of its own, time a contestant as often as asked; then tell its peak memory."""
    loop = contestant(*contest, device)
    while pipe.recv():
        started = time.perf_counter()
        loop()
        pipe.send(time.perf_counter() - started)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        import resource

        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # without its workers
    pipe.send(peak / 1e9)


def compare_steps(device, rounds: int = 8) -> None:
    """Time the step of gray28 with one thing changed, in turn, per image and as a ratio."""

    usual = rm.pick_precision("auto", device)
    other = "fp32" if usual == "bf16" else "bf16"

    def contestant(batch=128, precision=usual, short_cut=True, compiled=False, fused=False):
        model = rm.resnet18().to(device, memory_format=torch.channels_last).train()
        for part in model.modules():
            if isinstance(part, rm.Conv3x3) and not short_cut:
                part.__class__ = nn.Conv2d
        network = torch.compile(model) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=5e-4, fused=fused)
        images = torch.randn(batch, 1, 28, 28, device=device)
        labels = torch.arange(batch, device=device) % 10

        def steps(count=5):
            started = time.perf_counter()
            for _ in range(count):
                with rm.autocast(device, precision):
                    loss = F.cross_entropy(network(images), labels)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            loss.item()
            return 1e6 * (time.perf_counter() - started) / count / batch

        return steps

    changes = [{}, {"short_cut": False}, {"precision": other}, {"batch": 256}]
    changes += [{"compiled": True}, {"fused": True}]
    loops = [contestant(**change) for change in changes]
    for loop in loops:
        loop()  # warms up
    times = [[loop() for loop in loops] for _ in range(rounds)]
    print(f"gray28, microseconds an image: batches of 128, {usual}, and one change")
    for change, own in zip(changes, zip(*times, strict=True), strict=True):
        ratio = median(a / row[0] for a, row in zip(own, times, strict=True))
        name = ", ".join(f"{key} {value}" for key, value in change.items()) or "as it is"
        print(f"{name:18}{median(own):9.0f}  {ratio:.3f}")


def benchmark(rounds: int = 5) -> None:
    """Time a step of the bare floor, of our loop and of everybody's, in turn."""
    device = rm.pick_device()
    rm.keep_freed_memory()
    print(f"{rm.describe_device(device)}, torch {torch.__version__}; medians of {rounds} rounds")
    print("floor: forward, backward and update on one fixed batch; 128 images a step")
    print("milliseconds a step, ratios (with their range), gigabytes of ours and of everybody's")
    print(
        "input   augment  floor     ours  everybody  ours/floor            everybody/ours        "
        "fetching/floor          GB    GB"
    )
    for name, steps in (("gray28", 24), ("rgb32", 4)):
        with tempfile.TemporaryDirectory() as folder:
            raw = Path(folder, "MNIST", "raw")
            digits = rm.draw_synthetic_digits(0, 128 * steps, 10)
            for part, file in zip(digits[1:], ("train", "train", "t10k", "t10k"), strict=True):
                kind = "images-idx3" if part.dim() == 3 else "labels-idx1"
                write_idx(raw / f"{file}-{kind}-ubyte", part)
            for augment in (False, True):
                pipes, times, peaks = {}, {}, []
                for which in ("floor", "ours", "everybody", "fetching"):
                    pipes[which], end = PROCESSES.Pipe()
                    task = (end, device, which, name, augment, Path(folder))
                    PROCESSES.Process(target=compete, args=task).start()
                    times[which] = []
                for _ in range(rounds + 1):  # the first warms up
                    for which, pipe in pipes.items():
                        pipe.send(True)
                        times[which].append(1000 * pipe.recv() / steps)
                for pipe in pipes.values():
                    pipe.send(False)
                    peaks.append(pipe.recv())
                floor, ours, theirs, fetching = (own[1:] for own in times.values())
                line = f"{name:8}{augment!s:7}{median(floor):7.1f}{median(ours):9.1f}"
                line += f"{median(theirs):11.1f}"
                for above, below in ((ours, floor), (theirs, ours), (fetching, floor)):
                    ratios = [a / b for a, b in zip(above, below, strict=True)]
                    line += f"  {median(ratios):5.3f} ({min(ratios):.2f} to {max(ratios):.2f})"
                print(f"{line}{peaks[1]:6.2f}{peaks[2]:6.2f}", flush=True)
        model = rm.build_model(rm.Recipe(input=name)).to(device, memory_format=torch.channels_last)
        count = 250 * steps
        test = rm.Batches(torch.zeros(count, 28, 28).byte(), torch.zeros(count).long(), 250, name)
        precision = rm.pick_precision("auto", device)
        test.to(device)
        rm.evaluate(model, test, device, precision)
        started = time.perf_counter()
        rm.evaluate(model, test, device, precision)
        testing = 10_000 / count * (time.perf_counter() - started)
        epoch = 55_000 / 128 * median(ours) / 1000
        print(f"{name}, testing 10,000 images: {testing:.1f} s, {testing / epoch:.1%} of an epoch")
    compare_steps(device)


def score_kaggle(folder: Path, solution: Path | None) -> None:
    """Write MNIST as Kaggle's files, with 42,000 rows to train on, or score a solution of them."""
    if solution is None:
        folder.mkdir(parents=True, exist_ok=True)
        write_kaggle(rm.read_mnist("data"), folder, 42_000)
        return
    digits = rm.read_mnist("data")
    labels = torch.cat([digits.train_labels, digits.test_labels])[42_000:].tolist()
    with open(solution) as file:
        right = [int(row["Label"]) for row in csv.DictReader(file)]
    correct = sum(a == b for a, b in zip(labels, right, strict=True))
    print(f"{correct:,} of {len(labels):,} right: {100 * correct / len(labels):.2f} %")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=benchmark.__doc__)
    parser.add_argument("--kaggle", type=Path, metavar="DIR", help=score_kaggle.__doc__)
    parser.add_argument("--score", type=Path, metavar="FILE", help="solution.csv to score")
    parser.add_argument("--kill", type=int, metavar="N", help=be_killed.__doc__)
    parser.add_argument("--fuzz", type=int, metavar="N", help=fuzz.__doc__)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.kill:
            print(f"killed {be_killed(Path(folder), args.kill)} times, and the same in the end")
        elif args.fuzz:
            fuzz(Path(folder), 1, args.fuzz)
            print(f"{args.fuzz} damaged files, and each got an answer")
        elif args.kaggle or args.score:
            score_kaggle(args.kaggle, args.score)
        else:
            benchmark()
