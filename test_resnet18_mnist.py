"""What resnet18_mnist.py promises, tested in the order of its sections: `python -m pytest`.

`python test_resnet18_mnist.py` is the benchmark; --help shows what else it does.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import functools
import io
import math
import multiprocessing
import os
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
from pathlib import Path
from statistics import median

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import resnet18_mnist as rm

HERE = Path(__file__).parent
SCRIPT = HERE / "resnet18_mnist.py"
DEPTHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")

# Tests read the same synthetic digits again and again.
draw_digits = functools.cache(rm.draw_synthetic_digits)
rm.READERS["synthetic"] = lambda data_dir: draw_digits(None, 1200, 200)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    for name, value in NO_NETWORK.items():
        monkeypatch.setenv(name, value)


class LinearModel(nn.Sequential):
    """A classifier that trains in no time."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Flatten(), nn.Linear(784, 10))


def small_loader(n=96, train=False, **settings):
    """Return a loader of the first n synthetic digits, without augmentation unless asked for."""
    recipe = rm.Recipe(**{"batch_size": 32, "rotate": 0, "shift": 0, **settings})
    images, labels, *_ = draw_digits(None, 1200, 200)
    loader = rm.TensorLoader(images[:n], labels[:n], recipe, train)
    loader.batch_size = recipe.batch_size
    return loader


def train_linear(loader=None, val_loader=None, **settings):
    """Train a linear model on the CPU in float32; return it with its history."""
    trainer = rm.ResNetTrainer(LinearModel(), "cpu", rm.Recipe(precision="fp32"))
    return trainer, trainer.train(loader or small_loader(), val_loader, **settings)


def write_idx(path: Path, array: torch.Tensor) -> None:
    """Write a tensor of bytes in the format of the MNIST files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">I{array.dim()}I", 0x0800 + array.dim(), *array.shape)
    path.write_bytes(header + array.to(torch.uint8).numpy().tobytes())


IDX = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def write_mnist(raw: Path) -> Path:
    """Write 130 training and 40 test images as MNIST's four files; return the folder."""
    for name, array in zip(IDX, draw_digits(None, 130, 40), strict=True):
        write_idx(raw / f"{name}-ubyte", array)
    return raw


def write_kaggle(digits, folder: Path, train_rows: int) -> torch.Tensor:
    """Write digits as train.csv and test.csv of the Digit Recognizer; return the test's labels."""
    images, labels = torch.cat(digits[::2]).flatten(1), torch.cat(digits[1::2])
    table = torch.cat([labels[:, None], images], dim=1).numpy()
    pixels = ",".join(f"pixel{i}" for i in range(784))
    how = {"fmt": "%d", "delimiter": ",", "comments": ""}
    np.savetxt(folder / "train.csv", table[:train_rows], header="label," + pixels, **how)
    np.savetxt(folder / "test.csv", table[train_rows:, 1:], header=pixels, **how)
    return labels[train_rows:]


TRAIN = [
    "--dataset=synthetic",
    "--limit=320",
    "--val-size=100",
    "--batch-size=64",
    "--precision=fp32",
]


def train_lenet(folder: Path, *flags, epochs=3) -> int:
    """Train LeNet-5 by the command line, in this process; return the exit code."""
    command = [*TRAIN, "--model", "lenet5", "--epochs", epochs, "--output-dir", folder, *flags]
    return rm.main([str(part) for part in command])


@pytest.fixture
def no_pictures(monkeypatch):
    """For tests of something else: pictures take seconds."""
    monkeypatch.setattr(rm, "visualize_results", lambda *_: None)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a ResNet-18 that was trained for two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    assert rm.main([*TRAIN, "--epochs", "2", "--output-dir", str(folder)]) == 0
    return folder


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def without_times(history: dict) -> dict:
    return {name: values for name, values in history.items() if name != "seconds"}


# 1. Network


@pytest.mark.parametrize("name", DEPTHS)
def test_parameter_counts(name):
    expected = {
        "resnet18": (11_689_512, 11_175_370, 11_173_962),
        "resnet34": (21_797_672, 21_283_530, 21_282_122),
        "resnet50": (25_557_032, 23_522_250, 23_520_842),
        "resnet101": (44_549_160, 42_514_378, 42_512_970),
        "resnet152": (60_192_808, 58_158_026, 58_156_618),
    }[name]
    build = rm.NETWORKS[name]
    with torch.device("meta"):
        models = (
            build(num_classes=1000, input_channels=3),
            build(num_classes=10, input_channels=1),
            build(num_classes=10, input_channels=3, stem="cifar"),
        )
    assert tuple(sum(p.numel() for p in model.parameters()) for model in models) == expected


@pytest.mark.parametrize("name", DEPTHS)
@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32)])
def test_shapes_of_every_stage(name, stem, channels, size):
    with torch.device("meta"):
        model = rm.NETWORKS[name](input_channels=channels, stem=stem)
        images = torch.empty(2, channels, size, size)
        maps, logits = model.get_feature_maps(images), model(images)
    side = math.ceil(size / 4) if stem == "imagenet" else size
    expected = {"stem": (2, 64, side, side)}
    expansion = 1 if name in DEPTHS[:2] else 4
    for number, planes in enumerate((64, 128, 256, 512), start=1):
        expected[f"layer{number}"] = (2, planes * expansion, side, side)
        side = math.ceil(side / 2)
    expected["pooled"] = (2, 512 * expansion)
    assert {key: tuple(value.shape) for key, value in maps.items()} == expected
    assert logits.shape == (2, 10)


@pytest.mark.parametrize("name", DEPTHS)
def test_weights_logits_and_gradients_are_torchvisions(name):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)()
    torch.manual_seed(0)
    ours = rm.NETWORKS[name](num_classes=1000, input_channels=3)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():  # the same seed gives the same initial weights
        assert torch.equal(ours.state_dict()[key], value), key
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([3, 7])
    for model in (ours, theirs):
        F.cross_entropy(model.train()(images), labels).backward()
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), key
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(ours.eval()(images), theirs.eval()(images))
        assert torch.equal(ours(images), ours.fc(ours.get_feature_maps(images)["pooled"]))


def test_initial_weights_are_hes():
    for module in rm.resnet18().modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            fan_out = module.weight[:, 0].numel()
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.05)
        elif isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all())


def test_unknown_stem_is_refused():
    with pytest.raises(ValueError, match="stem 'vgg'"):
        rm.resnet18(stem="vgg")


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
def test_tools_for_models_work_before_and_after_training(stem):
    from torchvision.models.feature_extraction import create_feature_extractor

    model, images = rm.resnet18(stem=stem), torch.randn(2, 1, 28, 28)
    for trained in (False, True):
        if trained:
            rm.ResNetTrainer(model, "cpu").train(small_loader(4, batch_size=4), epochs=1)
        model.train()
        features = create_feature_extractor(model, ["layer1", "layer4"])(images)
        assert list(features) == ["layer1", "layer4"]
        model.eval()
        with torch.no_grad():
            logits = model(images)
            assert torch.equal(torch.fx.symbolic_trace(model)(images), logits)
            assert torch.allclose(torch.jit.trace(model, images)(images), logits, atol=1e-5)
            exported = torch.export.export(model, (images,)).module()
            assert torch.allclose(exported(images), logits, atol=1e-5)


# 2. Recipe


WRONG = [{"lr": -1.0}, {"lr": math.nan}, {"lr": "high"}, {"batch_size": 1}, {"epochs": 0}]
WRONG += [{"seed": -1}, {"seed": 2**70}, {"plain": 1}, {"val_size": 0.5}]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(rm.UserError, match=next(iter(wrong))):
        rm.Recipe(**wrong)


def test_one_line_adds_an_entry_to_each_table(tmp_path, monkeypatch, no_pictures):
    monkeypatch.setitem(rm.OPTIMIZERS, "adagrad", lambda p, r: torch.optim.Adagrad(p))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    monkeypatch.setitem(rm.SCHEDULERS, "cosine", lambda o, n, r: cosine(o, r.epochs * n))
    monkeypatch.setitem(rm.INPUTS, "gray20", (1, 20, "cifar"))
    monkeypatch.setitem(rm.NETWORKS, "small", lambda input_channels, stem: LinearModel())
    monkeypatch.setitem(rm.READERS, "mine", lambda data_dir: draw_digits(None, 130, 40))
    monkeypatch.setitem(rm.RECIPES, "new", rm.Recipe(optimizer="adagrad", scheduler="cosine"))
    flags = "--recipe new --input gray20 --dataset mine --model resnet18 --epochs 2"
    assert rm.main([*flags.split(), "--output-dir", str(tmp_path / "run")]) == 0
    last = load(tmp_path / "run" / "last.pt")
    assert last["history"]["learning_rate"] == pytest.approx([0.01, 0.005])
    assert "sum" in next(iter(last["optimizer"]["state"].values()))  # which is Adagrad's
    assert last["model"]["conv1.weight"].shape == (64, 1, 3, 3)


# 3. Data


def test_split_is_disjoint_complete_and_stratified():
    labels = torch.randint(0, 10, (1003,), generator=torch.Generator().manual_seed(0))
    train, val = rm.split_by_class(labels, 100, seed=5)
    assert torch.equal(torch.cat([train, val]).sort().values, torch.arange(1003))
    share = labels[val].bincount(minlength=10) - labels.bincount(minlength=10) * 100 / 1003
    assert len(val) == 100
    assert share.abs().max() < 1
    assert torch.equal(val, rm.split_by_class(labels, 100, seed=5)[1])
    assert not torch.equal(val, rm.split_by_class(labels, 100, seed=6)[1])


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, [1100, 100, 200]),
        ({"limit": 77}, [77, 100, 200]),
        ({"val_size": 60}, [1140, 60, 200]),
        ({"select_on": "test"}, [1200, 200, 200]),
    ],
)
def test_loaders_have_the_right_counts(changes, sizes):
    data = rm.MNISTDataLoader(dataset="synthetic", **changes)
    assert [len(part.labels) for part in (data.train, data.val, data.test)] == sizes
    assert data.get_data_loaders() == (data.train, data.test)
    assert (data.val is data.test) == ("select_on" in changes)
    assert len(list(data.train)) == len(data.train)


def test_impossible_data_are_refused():
    for wrong in ({"val_size": 1200}, {"limit": 1}, {"select_on": "tset"}, {"dataset": "mnits"}):
        with pytest.raises(rm.UserError):
            rm.MNISTDataLoader(**{"dataset": "synthetic", **wrong})


def test_batches_are_what_torchvisions_transforms_give():
    images, labels, *_ = draw_digits(None, 1200, 200)
    v1 = torchvision.transforms
    for name, mean, std in (("mnist", 0.1307, 0.3081), ("kaggle", 0.131, 0.3085), ("none", 0, 1)):
        end = [v1.ToTensor(), v1.Normalize((mean,), (std,))]
        gray, rgb = v1.Compose(end), v1.Compose([v1.Resize((32, 32)), v1.Grayscale(3), *end])
        for kind, transform in (("gray28", gray), ("rgb32", rgb)):
            batch, targets = next(iter(small_loader(10, input=kind, normalize=name)))
            pictures = [Image.fromarray(image.numpy()) for image in images[:10]]
            expected = torch.stack([transform(picture) for picture in pictures])
            assert batch.shape == expected.shape
            assert (batch - expected).abs().max() < 1.01 / 255 / std  # one step of gray
            assert torch.equal(targets, labels[:10])


def test_order_and_augmentation_come_from_torchs_seed():
    def draw(seed):
        torch.manual_seed(seed)
        loader = small_loader(300, train=True, rotate=10, shift=0.1)
        images, labels = zip(*loader, strict=True)
        return torch.cat(images), torch.cat(labels)

    first, again, other = draw(0), draw(0), draw(1)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    assert torch.equal(first[1].sort().values, other[1].sort().values)


@pytest.mark.parametrize(
    ("n", "train", "sizes"),
    [(5, False, [2, 2, 1]), (5, True, [2, 2]), (6, True, [2, 2, 2]), (3, True, [2])],
)
def test_a_lone_last_image_is_left_out_in_training_only(n, train, sizes):
    # Batch norm on a 1×1 map cannot train on one image.
    loader = small_loader(n, train, batch_size=2)
    assert [len(labels) for _, labels in loader] == sizes
    assert len(loader) == len(sizes)


def test_processes_share_an_epoch_in_equal_parts():
    for n in (96, 97):
        parts = []
        for rank in range(2):
            torch.manual_seed(0)
            loader = small_loader(n, train=True).to("cpu", rank, 2)
            parts.append([labels for _, labels in loader])
        torch.manual_seed(0)
        whole = [labels for _, labels in small_loader(n, train=True)][: len(parts[0])]
        for one, other, both in zip(*parts, whole, strict=True):
            assert len(one) == len(other) == 16
            assert torch.equal(torch.cat([one, other]).sort().values, both.sort().values)


def distort(images, moves=(0, 0, 0), stretches=(0, 0, 0), **settings):
    """Distort images by these draws and nothing else."""
    draws = torch.tensor([[moves], [stretches]]).float().expand(2, len(images), 3)
    return rm.distort(images, draws, rm.Recipe(**{"rotate": 0, "shift": 0, **settings}))


def center(image):
    """Centre of mass of an image (H, W): row, column."""
    where = torch.arange(float(len(image)))
    return [(image.sum(axis) @ where / image.sum()).item() for axis in (1, 0)]


def test_augmentation_rotates_shifts_and_stretches():
    point = torch.zeros(1, 1, 40, 40)
    point[..., 19:21, 19:21] = 1
    shifted = distort(point, (0, -1, 0.5), shift=0.1)
    assert center(shifted[0, 0]) == pytest.approx([19.5 - 2, 19.5 + 4], abs=1e-3)
    bar = torch.zeros(1, 1, 40, 40)
    bar[..., 8:32, 18:22] = 1
    rotate = functools.partial(
        torchvision.transforms.functional.rotate,
        interpolation=torchvision.transforms.InterpolationMode.BILINEAR,
    )
    assert torch.allclose(distort(bar, (1, 0, 0), rotate=10), rotate(bar, 10), atol=1e-4)
    assert torch.allclose(distort(bar, (0.5, 0, 0), rotate=40), rotate(bar, 20), atol=1e-4)
    wide, slanted, high = (
        distort(bar, stretches=draws, stretch=0.5) for draws in ((-1, 0, 0), (0, 1, 0), (0, 0, -1))
    )
    assert (wide.sum() / bar.sum()).item() == pytest.approx(2, abs=0.05)
    assert (high.sum() / bar.sum()).item() == pytest.approx(40 / 24, abs=0.05)  # cut by the edges
    assert (slanted.sum() / bar.sum()).item() == pytest.approx(1, abs=0.05)
    upper = F.pad(slanted[0, 0, :20], (0, 0, 0, 20))
    assert abs(center(upper)[1] - 19.5) > 2  # it leans to one side


def test_augmentation_draws_for_each_image_and_keeps_the_digit():
    image = draw_digits(None, 130, 40)[0][:1, None].float() / 255
    draws = 2 * torch.rand(2, 64, 3, generator=torch.Generator().manual_seed(0)) - 1
    recipe = rm.Recipe(stretch=0.1)
    changed = rm.distort(image.expand(64, -1, -1, -1), draws, recipe)
    assert len(torch.unique(changed.flatten(1), dim=0)) == 64
    assert (changed.sum(dim=(1, 2, 3)) / image.sum() - 1).abs().max() < 0.35  # no stroke is lost
    unchanged = rm.distort(image, torch.zeros(2, 1, 3), recipe)
    assert torch.allclose(unchanged, image, atol=1e-5)


def test_mnist_files_are_read(tmp_path):
    write_mnist(tmp_path / "MNIST" / "raw")
    for ours, theirs in zip(rm.read_mnist(tmp_path), draw_digits(None, 130, 40), strict=True):
        assert torch.equal(ours, theirs)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


DAMAGES = {
    "cut": lambda raw: cut(raw / "train-images-idx3-ubyte"),
    "magic": lambda raw: (raw / "t10k-labels-idx1-ubyte").write_bytes(b"\xff" * 48),
    "empty": lambda raw: (raw / "t10k-images-idx3-ubyte").write_bytes(b""),
    "missing": lambda raw: (raw / "train-labels-idx1-ubyte").unlink(),
    "counts": lambda raw: write_idx(raw / "train-labels-idx1-ubyte", torch.zeros(7)),
    "label": lambda raw: write_idx(raw / "t10k-labels-idx1-ubyte", torch.full((40,), 11)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_mnist_is_named_and_never_replaced(tmp_path, damage):
    raw = write_mnist(tmp_path / "MNIST" / "raw")
    DAMAGES[damage](raw)
    for read in (rm.read_mnist, rm.mnist_or_synthetic):
        with pytest.raises(rm.UserError, match=re.escape(str(raw))) as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)


def test_two_programs_may_download_at_once(tmp_path, monkeypatch):
    def download(url, download_root, filename, md5):
        name = filename.removesuffix(".gz")
        index = [f"{kind}-ubyte" for kind in IDX].index(name)
        Path(download_root, name).write_bytes(b"")
        time.sleep(0.05)  # half a file, for the other program to see
        write_idx(Path(download_root, name), draw_digits(None, 130, 40)[index])

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", download)
    draw_digits(None, 130, 40)
    failures = []

    def program():
        try:
            rm.read_mnist(tmp_path / "new")
        except rm.UserError as error:
            failures.append(error)

    threads = [threading.Thread(target=program) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["MNIST"]


# 4. Device


def test_devices_and_number_formats():
    assert rm.pick_device("cpu") == torch.device("cpu")
    assert rm.pick_device().type in ("cuda", "mps", "xpu", "cpu")
    for name in ("cuda:99", "tpu", "meta"):
        with pytest.raises(rm.UserError, match=name):
            rm.pick_device(name)
    assert rm.pick_precision("fp32", torch.device("cpu")) == "fp32"
    assert rm.pick_precision("auto", torch.device("cpu")) in ("fp32", "bf16")
    with pytest.raises(rm.UserError, match="fp8"):
        rm.pick_precision("fp8", torch.device("cpu"))


def test_a_gpu_without_kernels_is_named_and_passed_over(monkeypatch, capsys):
    def ones(*size, device):
        if torch.device(device).type == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available for execution\nmore")
        return torch.zeros(*size)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla K80")
    monkeypatch.setattr(torch, "ones", ones)
    with pytest.raises(rm.UserError, match=r"Tesla K80.*--device cpu.*no kernel image"):
        rm.pick_device("cuda")
    assert rm.pick_device().type == "cpu"
    assert re.fullmatch("WARNING: .*Tesla K80.*\n", capsys.readouterr().err)


# 5. Training


@pytest.mark.parametrize(("kind", "n", "epochs"), [("gray28", 32, 40), ("rgb32", 6, 15)])
def test_overfits_few_images(kind, n, epochs):
    torch.manual_seed(0)
    model, loader = rm.build_model(rm.Recipe(input=kind)), small_loader(n, input=kind, batch_size=n)
    rm.train_model(model, loader, device="cpu", epochs=epochs, scheduler="none", patience=99)
    assert rm.compute_accuracy(model, loader) == 100


def test_usage_from_python():
    data = rm.MNISTDataLoader(batch_size=64, dataset="synthetic", limit=256, rotate=0, shift=0)
    train_loader, test_loader = data.get_data_loaders()
    model = rm.resnet18(num_classes=10, input_channels=1)
    for p in model.layer1.parameters():
        p.requires_grad = False
    before = copy.deepcopy(model.state_dict())
    trainer = rm.ResNetTrainer(model, device="cpu")
    history = trainer.train(
        train_loader, val_loader=data.val, num_epochs=2, learning_rate=0.001, weight_decay=1e-4
    )
    assert history["epoch"] == [1, 2]
    assert history["learning_rate"] == [0.001, 0.001]
    assert history["train_loss"][1] < history["train_loss"][0]
    after = model.state_dict()
    for key, value in before.items():  # frozen batch norms keep their statistics, too
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(value, after[key]) == key.startswith("layer1"), key
    results = trainer.test(test_loader)
    assert set(results) == {"loss", "accuracy", "predictions", "labels", "probabilities"}
    maps = model.get_feature_maps(next(iter(test_loader))[0])
    assert list(maps) == ["stem", "layer1", "layer2", "layer3", "layer4", "pooled"]


def test_plain_dataloaders_work_and_the_best_weights_are_kept():
    images, labels, *_ = draw_digits(None, 130, 40)
    images = images[:, None].float() / 255
    train = DataLoader(TensorDataset(images, labels), 32, shuffle=True)
    # With wrong labels to validate on, the better the model learns the higher its loss.
    val = DataLoader(TensorDataset(images, (labels + 1) % 10), 32)
    model = LinearModel()
    history = rm.train_model(model, train, val, "cpu", epochs=9, lr_patience=9, precision="fp32")
    assert history["val_loss"] == sorted(history["val_loss"])
    assert rm.best_epoch(history) == 1
    assert len(history["epoch"]) == 6  # patience is 5
    assert rm.evaluate(model, val)["loss"] == pytest.approx(history["val_loss"][0])
    assert not model.training


def test_evaluate_against_plain_arithmetic():
    model, loader = LinearModel(), small_loader(100)
    results = rm.evaluate(model, loader)
    logits = torch.cat([model(images) for images, _ in loader])
    labels = torch.cat([labels for _, labels in loader])
    assert results["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert results["accuracy"] == (logits.argmax(1) == labels).sum().item()  # of 100
    assert torch.equal(results["labels"], labels)
    assert torch.equal(results["predictions"], logits.argmax(dim=1))
    assert torch.allclose(results["probabilities"], logits.softmax(dim=1))
    assert model.training


def test_training_reports_the_means_over_its_batches():
    model, loader = LinearModel(), small_loader(100)  # batches of 32, 32, 32 and 4
    expected = rm.evaluate(model, loader)
    done = rm.train_one_epoch(model, loader, torch.optim.SGD(model.parameters(), lr=0.0))
    assert done["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert done["accuracy"] == pytest.approx(expected["accuracy"])


@pytest.mark.parametrize(
    ("one", "other"), [((48, 1), (12, 4)), ((32, 3), (32, 5))], ids=["equal", "short last group"]
)
def test_accumulated_batches_are_one_large_batch(one, other):
    weights = []
    for batch_size, accumulate in (one, other):
        model, loader = LinearModel(), small_loader(96, batch_size=batch_size)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        rm.train_one_epoch(model, loader, optimizer, accumulate=accumulate)
        weights.append(model[1].weight.detach())
    assert torch.allclose(*weights, atol=1e-6)


def test_plateau_lowers_the_rate_and_patience_ends_the_run(monkeypatch, capsys):
    losses, real = iter([1.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.4]), rm.evaluate
    monkeypatch.setattr(rm, "evaluate", lambda *a: {**real(*a), "loss": next(losses)})
    loader = small_loader(32)
    settings = {"epochs": 7, "lr_patience": 1, "patience": 4, "lr_factor": 0.1}
    _, history = train_linear(loader, loader, **settings)
    assert history["val_loss"] == [1.0, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert history["learning_rate"] == pytest.approx([0.01, 0.01, 0.01, 0.01, 0.001, 0.001])
    printed = capsys.readouterr().out
    assert printed.endswith("stopped early: no lower loss for 4 epochs\n")
    assert [line.endswith("best") for line in printed.splitlines()[1:4]] == [True, True, False]


def test_schedules():
    def rates(scheduler, **settings):
        seen = []

        class Watched(torch.optim.SGD):
            def step(self):
                seen.append(self.param_groups[0]["lr"])
                return super().step()

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(rm.OPTIMIZERS, "sgd", lambda p, r: Watched(p))
            train_linear(epochs=4, lr=1.0, scheduler=scheduler, patience=9, **settings)
        return seen  # of three updates in each of four epochs

    assert rates("none") == [1.0] * 12
    assert rates("step", lr_step=2, lr_factor=0.1) == pytest.approx([1.0] * 6 + [0.1] * 6)
    cycle = rates("onecycle")
    assert max(cycle) == pytest.approx(1, abs=0.02)
    assert cycle[0] == pytest.approx(1 / 25)
    assert cycle[-1] < 0.001


@pytest.mark.parametrize("optimizer", rm.OPTIMIZERS)
def test_every_optimizer_learns_under_every_schedule(optimizer):
    for scheduler in rm.SCHEDULERS:
        _, history = train_linear(optimizer=optimizer, scheduler=scheduler, lr=0.003, epochs=3)
        assert history["train_loss"][2] < 0.9 * history["train_loss"][0], scheduler


def test_optimizers_get_the_recipes_values(tmp_path):
    for name, expected in (("sgd", {"momentum": 0.8}), ("adam", {}), ("adamw", {})):
        trainer = rm.ResNetTrainer(LinearModel(), "cpu", run_dir=tmp_path)
        trainer.train(small_loader(), epochs=1, optimizer=name, momentum=0.8, lr=0.5)
        (group,) = load(tmp_path / "last.pt")["optimizer"]["param_groups"]
        assert {**group, **expected, "lr": 0.5, "weight_decay": 5e-4} == group


@pytest.mark.parametrize("build", [rm.resnet18, rm.resnet50, torchvision.models.resnet18])
def test_fast_small_maps_give_the_same_gradients(build):
    torch.manual_seed(0)
    model, images = build(num_classes=10), torch.randn(4, 1, 28, 28)
    images = images.expand(-1, model.conv1.in_channels, -1, -1)
    gradients = []
    for context in (contextlib.nullcontext(), rm.fast_small_maps(model)):
        model.zero_grad()
        with context:
            F.cross_entropy(model.double()(images.double()), torch.arange(4)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-9)
    assert not any("forward" in vars(layer) for layer in model.modules())


@pytest.mark.parametrize(("stride", "size"), [(1, 1), (2, 1), (2, 2), (3, 2), (3, 3), (2, 3)])
def test_fast_small_maps_are_products_in_training_only(monkeypatch, stride, size):
    conv, x, products = rm.conv3x3(5, 7, stride), torch.randn(4, 5, size, size), []
    expected, linear = conv(x), F.linear
    monkeypatch.setattr(F, "linear", lambda *a: products.append(1) or linear(*a))
    with rm.fast_small_maps(conv):
        assert torch.allclose(conv(x), expected, atol=1e-5)
        assert torch.equal(conv.eval()(x), expected)
    assert len(products) == (size < 3)


def test_training_leaves_the_random_numbers_of_others_alone():
    """Else networks made after it, in a loop over seeds say, would all be the same."""
    model, loader = nn.Sequential(nn.Dropout(), LinearModel()), small_loader(train=True, rotate=9)
    before = torch.get_rng_state()
    rm.train_model(model, loader, loader, "cpu", epochs=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["ours", "plain"])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, kind):
    def train(folder, epochs, resume=None):
        torch.manual_seed(0 if resume is None else 99)
        data = small_loader(96, train=True, rotate=10, shift=0.1)
        if kind == "plain":
            data = DataLoader(TensorDataset(data.images / 255, data.labels), 32, shuffle=True)
        model = nn.Sequential(rm.resnet18(num_classes=16), nn.Dropout(), nn.Linear(16, 10))
        trainer = rm.ResNetTrainer(model, "cpu", rm.Recipe(lr=0.05), folder)
        trainer.train(data, small_loader(50), resume=resume, epochs=epochs)
        return load(folder / "last.pt"), model.state_dict()

    whole, whole_best = train(tmp_path / "whole", 4)
    half, _ = train(tmp_path / "parts", 2)
    parts, parts_best = train(tmp_path / "parts", 4, resume=half)
    assert without_times(parts["history"]) == without_times(whole["history"])
    assert parts["scheduler"] == whole["scheduler"]
    for key, value in whole["model"].items():
        assert torch.equal(value, parts["model"][key]), key
        assert torch.equal(whole_best[key], parts_best[key]), key
    momenta = [part["optimizer"]["state"].values() for part in (parts, whole)]
    for ours, theirs in zip(*momenta, strict=True):
        assert torch.equal(ours["momentum_buffer"], theirs["momentum_buffer"])


def test_checkpoints_hold_contiguous_weights_and_the_history(trained):
    best = load(trained / "best.pt")
    assert all(weight.is_contiguous() for weight in best["model"].values())
    assert rm.best_epoch(best["history"]) == len(best["history"]["epoch"])
    with open(trained / "history.csv") as file:
        rows = list(csv.DictReader(file))
    history = load(trained / "last.pt")["history"]
    assert [float(row["val_loss"]) for row in rows] == history["val_loss"]
    assert 0 < float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    full_disk = pytest.raises(rm.UserError, match=r"cannot write .*file: .*No space left")
    with full_disk, rm.replacing(tmp_path / "file") as file:
        file.write_bytes(b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_divergence_ends_in_a_line_and_training_can_go_on():
    trainer = rm.ResNetTrainer(LinearModel(), "cpu", rm.Recipe(precision="fp32"))
    with pytest.raises(rm.UserError, match=r"loss became (nan|inf).*lower --lr"):
        trainer.train(small_loader(), lr=1e9, epochs=3)
    trainer.model.load_state_dict(LinearModel().state_dict())
    history = trainer.train(small_loader(), lr=0.01, epochs=1)
    assert math.isfinite(history["val_loss"][0])


def test_progress_is_live_on_a_terminal_only(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    clock = iter(range(100))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    for terminal in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stdout", terminal)
        model = LinearModel()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        rm.train_one_epoch(model, small_loader(), optimizer)
        shown = re.sub("\033\\[K", "", terminal.getvalue()).split("\r")[1:]
        assert len(shown) == (3 if terminal.isatty() else 0)
        assert all(re.fullmatch(r"batch \d/3  loss [\d.]+", line) for line in shown[:-1])
        assert not any(shown[-1:])  # the line is cleared in the end


# A process of its own for each command, but importing torch takes seconds: where the system can
# fork, these processes begin as copies of one that has imported it.
PROCESSES = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
PROCESSES.set_forkserver_preload(["torch", "torchvision", "matplotlib.figure"])


def be_the_program(arguments, cwd):
    """Run the program as a user does; for a process of its own."""
    os.chdir(cwd)
    os.environ.update(NO_NETWORK)
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.argv = [str(SCRIPT), *map(str, arguments)]
    runpy.run_path(str(SCRIPT), run_name="__main__")


def torchrun(*arguments, cwd):
    """Run two processes of the program, as torchrun does; return what was printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", SCRIPT]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    how = {"capture_output": True, "text": True, "timeout": 170}
    done = subprocess.run([*command, *map(str, arguments)], cwd=cwd, env=environment, **how)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_learn_what_one_learns(tmp_path, no_pictures):
    """LeNet-5 has no batch norm, which processes compute on their own parts of the batch."""
    write_mnist(tmp_path / "MNIST" / "raw")
    flags = ["--val-size=20", "--batch-size=22", "--model=lenet5", "--epochs=2", "--lr=0.1"]
    printed = torchrun(*flags, "--data-dir=.", "--output-dir=two", cwd=tmp_path)
    assert printed.count("test accuracy") == 1
    assert "processes: 2" in printed
    where = [f"--data-dir={tmp_path}", f"--output-dir={tmp_path / 'one'}"]
    assert rm.main([*flags, *where]) == 0
    one, two = (load(tmp_path / name / "last.pt") for name in ("one", "two"))
    for column in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
        assert two["history"][column] == pytest.approx(one["history"][column], rel=1e-4)
    for key, weight in one["model"].items():
        assert torch.allclose(weight, two["model"][key], atol=1e-4), key


# 6. Report and pictures


def test_report_against_counts_by_hand():
    labels, predictions = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 2, 2])
    results = {"labels": labels, "predictions": predictions, "probabilities": torch.zeros(6, 10)}
    counts = rm.confusion_matrix(results)[:3, :3].tolist()
    assert counts == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]
    lines = rm.classification_report(results).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:13] if line}
    assert rows["0"] == ["100.00", "66.67", "80.00", "3"]
    assert rows["1"] == ["50.00", "50.00", "50.00", "2"]
    assert rows["2"] == ["50.00", "100.00", "66.67", "1"]
    assert rows["9"] == ["0.00", "0.00", "0.00", "0"]
    assert rows["macro"] == ["20.00", "21.67", "19.67", "6"]
    assert rows["weighted"] == ["75.00", "66.67", "67.78", "6"]
    assert max(map(len, lines)) <= 80


def test_pictures_are_not_blank(trained):
    for name in ("curves", "confusion_matrix", "predictions", "mistakes", "feature_maps"):
        with Image.open(trained / f"{name}.png") as picture:
            assert min(picture.size) > 300, name
            assert len(picture.convert("RGB").getcolors(2**24)) > 50, name


def test_pictures_take_their_classes_from_the_results(tmp_path):
    # The 26 letters of EMNIST, say; and a perfect run has no mistakes to draw.
    labels = torch.arange(52) % 26
    loader = [(torch.rand(52, 1, 28, 28), labels)]
    results = {"labels": labels, "predictions": labels, "accuracy": 100.0}
    results["probabilities"] = F.one_hot(labels).float()
    _, history = train_linear(epochs=1)
    rm.visualize_results(LinearModel(), loader, results, history, tmp_path, "a $title^{")
    assert (tmp_path / "mistakes.png").exists()
    assert rm.confusion_matrix(results).shape == (26, 26)
    assert re.search(r"(?m)^25 +100.00", rm.classification_report(results))
    with pytest.raises(rm.UserError, match="order"):
        rm.visualize_results(LinearModel(), small_loader(52), results, history, tmp_path)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize(("channels", "size", "stem"), [(1, 28, "imagenet"), (3, 32, "cifar")])
def test_layer_table_agrees_with_pytorchs_counter(name, channels, size, stem):
    from torch.utils.flop_counter import FlopCounterMode

    model = rm.NETWORKS[name](input_channels=channels, stem=stem)
    image = torch.zeros(1, channels, size, size)
    layers = rm.list_layers(model, image)
    assert model.training  # as it was before
    with FlopCounterMode(display=False) as counter:
        model.eval()(image)
    assert sum(layer.flops for layer in layers) == counter.get_total_flops()
    parameters = sum(p.numel() for p in model.parameters())
    assert sum(layer.parameters for layer in layers) == parameters
    assert layers[0].name == "conv1"
    assert layers[-1][:2] == ("fc", "10")


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


def test_describe_prints_the_totals_and_the_readme_shows_them(capsys):
    assert rm.main(["describe"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"total +11,175,370 +66,021,888 +37.8%", printed)
    assert max(map(len, printed.splitlines())) <= 80
    assert printed.strip() in (HERE / "README.md").read_text(encoding="utf-8")
    assert rm.main(["describe", "--model", "resnet34", "--input", "rgb32"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"total +21,282,122 .* 100.0%", printed)
    assert "3×32×32" in printed


# 7. Other digits


def test_synthetic_digits_are_always_the_same():
    images, labels, test_images, _ = rm.draw_synthetic_digits(None, 50, 20)
    assert torch.equal(images, rm.draw_synthetic_digits(None, 50, 20)[0])
    assert not torch.equal(images[:20], test_images)
    assert labels.bincount().tolist() == [5] * 10
    assert (images.flatten(1).amax(1) > 200).all()  # no font without digits
    assert len(torch.unique(images.flatten(1), dim=0)) == 50


def test_without_mnist_synthetic_digits_stand_in(tmp_path, capsys, monkeypatch):
    assert rm.mnist_or_synthetic(tmp_path / "none") == "synthetic"
    assert "SYNTHETIC" in capsys.readouterr().err
    assert train_lenet(tmp_path / "run", "--dataset", "mnist", "--data-dir", tmp_path) == 2
    assert "cannot read MNIST" in capsys.readouterr().err
    reset = ConnectionResetError(104, "Connection reset by peer")
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: (_ for _ in ()).throw(reset))
    assert rm.mnist_or_synthetic(tmp_path / "none") == "synthetic"
    assert "Connection reset" in capsys.readouterr().err


def test_mnist_files_in_the_wrong_place_are_not_passed_over(tmp_path):
    write_mnist(tmp_path)
    with pytest.raises(rm.UserError, match=re.escape(str(tmp_path / "MNIST" / "raw"))):
        rm.mnist_or_synthetic(tmp_path)


def test_kaggle_files_are_read(tmp_path):
    digits = draw_digits(None, 130, 40)
    labels = write_kaggle(digits, tmp_path, 130)
    for variant in ("plain", "windows"):
        images, read = rm.read_kaggle(tmp_path)[:2]
        assert torch.equal(images, digits[0]), variant
        assert torch.equal(read, digits[1])
        text = (tmp_path / "train.csv").read_text().replace("label", '"label"')
        (tmp_path / "train.csv").write_bytes(("\ufeff" + text.replace("\n", "\r\n")).encode())
    images, none = rm.read_kaggle_table(tmp_path / "test.csv", labelled=False)
    assert torch.equal(images, digits[2])
    assert len(none) == 0
    assert torch.equal(labels, digits[3])


def kaggle_row(*cells):
    return ",".join(map(str, [*cells, *[0] * (785 - len(cells))])) + "\n"


HEADER = ",".join(["label", *(f"pixel{i}" for i in range(784))]) + "\n"
BAD_TABLES = {
    "empty file": "",
    "other columns": "a,b\n1,2\n",
    "no digit": HEADER,
    "too bright": HEADER + kaggle_row(3) + kaggle_row(3, 256),
    "negative": HEADER + kaggle_row(3, -1),
    "letter": HEADER + kaggle_row(3, "x"),
    "fraction": HEADER + kaggle_row(3, 1.5),
    "label 10": HEADER + kaggle_row(10),
    "short row": HEADER + kaggle_row(3) + "1,2\n",
    "long row": HEADER + kaggle_row(3).strip() + ",1\n",
    "empty cell": HEADER + kaggle_row(3, ""),
    "test.csv": HEADER[6:] + kaggle_row(3)[2:],
}


@pytest.mark.parametrize("what", BAD_TABLES)
def test_damaged_kaggle_files_are_refused(tmp_path, what):
    (tmp_path / "train.csv").write_text(BAD_TABLES[what])
    with pytest.raises(rm.UserError, match=r"train\.csv") as caught:
        rm.read_kaggle(tmp_path)
    assert "\n" not in str(caught.value)
    if what in ("too bright", "negative", "letter", "fraction", "empty cell"):
        assert "column 2" in str(caught.value)


def test_kaggle_from_train_csv_to_solution_csv(tmp_path, capsys, no_pictures):
    labels = write_kaggle(draw_digits(None, 1200, 200), tmp_path, 1200)
    flags = "--recipe kaggle --val-size 100 --model lenet5 --epochs 8 --lr 0.003 --lr-step 8"
    run = str(tmp_path / "run")
    assert rm.main([*flags.split(), "--data-dir", str(tmp_path), "--output-dir", run]) == 0
    printed = capsys.readouterr().out
    assert "validation accuracy" in printed
    assert "test accuracy" not in printed
    assert rm.main(["predict", "--kaggle", str(tmp_path / "test.csv"), "--checkpoint", run]) == 0
    with open(tmp_path / "run" / "solution.csv", newline="") as file:
        text = file.read()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert text.startswith("ImageId,Label\n1,")
    assert [row["ImageId"] for row in rows] == [str(number) for number in range(1, 201)]
    right = sum(int(row["Label"]) == label for row, label in zip(rows, labels, strict=True))
    assert right > 100


FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")
V, U = np.mgrid[0:1:300j, 0:1:300j]  # down and to the right
BOWL = [(0.32, 0.3), (0.3, 0.46), (0.55, 0.42), (0.74, 0.62), (0.6, 0.86), (0.25, 0.86)]
SEVEN = [(0.2 + i / 10, 0.1) for i in range(7)] + [(0.8 - i / 20, 0.1 + i / 10) for i in range(9)]


def read(picture, kind="PNG"):
    file = io.BytesIO()
    picture.save(file, kind)
    return rm.read_image(file)[1].float()


def differ(one, other):
    """Return the mean difference in gray levels, where a shift by a pixel does not count."""
    shifts = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    return min((one - other.roll(shift, (0, 1))).abs().mean() for shift in shifts)


def write(text, margin, paper=255, ink=0, font="DejaVuSans.ttf"):
    """Write figures with a margin in pixels around what is drawn of them."""
    font = ImageFont.truetype(FONTS / font, 160)
    left, top, right, bottom = font.getmask(text).getbbox()
    cover = Image.new("L", (right - left + 2 * margin, bottom - top + 2 * margin))
    x, y = font.getbbox(text)[:2]
    ImageDraw.Draw(cover).text((margin - left - x, margin - top - y), text, fill=255, font=font)
    return cover.point(lambda share: paper + (ink - paper) * share // 255)


def strokes(*lines, pen=18):
    """Draw lines, each a list of points in a unit square; a point by itself is a dot."""
    picture = Image.new("L", (300, 300), 255)
    draw = ImageDraw.Draw(picture)
    for line in lines:
        points = [(300 * x, 300 * y) for x, y in line]
        draw.line(points, 0, pen)
        for x, y in points:
            draw.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), fill=0)
    return picture


def scene(ground, ink):
    """Draw a 5 in the middle of a ground (300, 300), or of one level, with a little noise."""
    figure = write("5", 0)
    sheet = Image.new("L", (300, 300), 255)
    sheet.paste(figure, (150 - figure.width // 2, 150 - figure.height // 2))
    noise = np.random.default_rng(0).normal(size=U.shape)
    levels = ink + (ground - ink) * (np.asarray(sheet) / 255) + noise
    return Image.fromarray(np.uint8(levels.clip(0, 255)))


def inside(half, turn=0.0):  # a square sheet of half a side, turned by radians
    across = (U - 0.5) * math.cos(turn) + (V - 0.5) * math.sin(turn)
    down = (V - 0.5) * math.cos(turn) - (U - 0.5) * math.sin(turn)
    return np.maximum(abs(across), abs(down)) < half


@pytest.mark.parametrize("colors", [(255, 0), (20, 230)])
@pytest.mark.parametrize("font", ["DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "STIXGeneral.ttf"])
def test_a_digit_without_margin_is_read_alike(font, colors):
    for digit in "0123456789":
        wide, *others = [read(write(digit, margin, *colors, font)) for margin in (20, 5, 2, 0)]
        assert max(differ(other, wide) for other in others) < 8


GROUNDS = {  # and the ink on each
    "page edge, left": (np.where(U < 0.08 + 0.03 * V, 60, 230), 40),
    "page edge, two sides": (np.where((V > 0.85) | (U > 0.85), 60, 230), 40),
    "shadowed corner, pencil": (np.where(U + V < 0.35, 90, 230), 150),
    "cell of a form": (np.where(np.minimum(U, V) < 0.03, 0, 230), 40),
    "cell of a form, pencil": (np.where(np.minimum(U, V) < 0.03, 0, 230), 150),
    "sheet on a table": (np.where(inside(0.35), 235, 50), 30),
    "sheet on a table, pencil": (np.where(inside(0.3), 235, 50), 170),
    "sheet on a table, turned": (np.where(inside(0.35, turn=0.08), 235, 50), 30),
    "dark panel, light ink": (np.where(inside(0.35), 40, 250), 230),
    "gray panel, black table": (np.where(inside(0.4), 150, 10), 20),
    "vignette": (230 * (1 - (U - 0.5) ** 2 - (V - 0.5) ** 2), 60),
    "22 levels over noise": (200, 178),
    "light on dark, faint": (60, 82),
}


@pytest.mark.parametrize("name", GROUNDS)
def test_what_surrounds_a_digit_is_no_part_of_it(name):
    assert differ(read(scene(*GROUNDS[name])), read(scene(255, 0))) < 8


def blank_pages():
    """Yield 100 and more pages without any ink."""
    random = np.random.default_rng(0)
    for side in (1, 2, 4, 9, 28, 60, 128, 300):
        yield from (np.full((side, side), level) for level in (0, 200, 255))
        for sigma in (0.5, 2, 8, 30, 90):
            yield 150 + sigma * random.normal(size=(side, side, 3))
    for depth in (0.1, 0.3, 0.6, 0.9):
        for noise in (0, 1, 6):
            grain = noise * random.normal(size=U.shape)
            yield 240 * (1 - depth * (0.7 * U + 0.3 * V)) + grain  # light from one side
            yield 240 * (1 - depth * ((U - 0.5) ** 2 + (V - 0.5) ** 2)) + grain  # dark corners
            yield 120 + 100 * depth * np.exp(-9 * ((U - 0.6) ** 2 + (V - 0.4) ** 2)) + grain
    for blur in (1, 2, 3, 5):
        cloud = Image.fromarray(random.integers(0, 256, (256, 256), dtype=np.uint8))
        cloud = np.asarray(cloud.filter(ImageFilter.GaussianBlur(blur)), float) - 127
        yield from (180 + depth / cloud.std() * cloud for depth in (3, 12, 30))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_blank_page_shows_no_ink(kind):
    pages = [Image.fromarray(np.uint8(page.clip(0, 255))) for page in blank_pages()]
    assert len(pages) >= 100
    for page in pages:
        with pytest.raises(rm.UserError, match="shows no ink"):
            read(page, kind)


@pytest.mark.parametrize("margin", [0, 30])
def test_several_figures_are_refused(margin):
    for text in ("27", "00", "14", "50", "71", "123"):
        for font in ("DejaVuSans.ttf", "STIXGeneralItalic.ttf"):
            with pytest.raises(rm.UserError, match="several figures"):
                read(write(text, margin, font=font))


def test_a_digit_in_several_strokes_is_one():
    joined = strokes(BOWL, [BOWL[0], (0.34, 0.1), (0.74, 0.1)])
    broken = strokes(BOWL, [(0.36, 0.1), (0.74, 0.1)])
    assert differ(read(joined), read(broken)) < 8
    four = strokes([(0.6, 0.08), (0.22, 0.62), (0.54, 0.62)], [(0.64, 0.35), (0.64, 0.93)])
    dotted = strokes(*([dot] for dot in SEVEN), pen=10)
    double = Image.fromarray(np.vstack([np.asarray(write("0", 12))] * 2))  # as a broken 8 is
    for picture in (four, dotted, double):
        digit = read(picture)
        places = digit.nonzero()
        assert (places.amax(dim=0) - places.amin(dim=0)).max() == 19
        center = digit[digit > 0] @ places.float() / digit.sum()
        assert center.tolist() == pytest.approx([13.5, 13.5], abs=0.6)


def test_every_format_of_image_is_read(tmp_path):
    drawn = write("2", 40).convert("RGB")
    expected = read(drawn)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90° clockwise
    clear = Image.new("RGBA", drawn.size)  # white on transparent
    clear.paste("white", mask=drawn.convert("L").point(lambda level: 255 - level))
    levels = np.asarray(drawn.convert("L"))
    pictures = {
        "bits.png": (drawn.convert("1"), {}),
        "palette.png": (drawn.quantize(8), {}),
        "clear.png": (clear, {}),
        "gray with alpha.png": (drawn.convert("LA"), {}),
        "deep.png": (Image.fromarray(levels.astype(np.uint16) * 200), {}),
        "float.tiff": (Image.fromarray(levels / np.float32(255)), {}),
        "inks.jpg": (drawn.convert("CMYK"), {}),
        "turned.jpg": (drawn.transpose(Image.Transpose.ROTATE_90), {"exif": turned}),
        "animated.gif": (drawn, {"save_all": True, "append_images": [drawn]}),
        "modern.webp": (drawn, {}),
    }
    for name, (picture, options) in pictures.items():
        picture.save(tmp_path / name, **options)
        assert differ(rm.read_image(tmp_path / name)[1].float(), expected) < 8, name
    mnist = draw_digits(None, 130, 40)[0][0]
    Image.fromarray(mnist.numpy()).save(tmp_path / "mnist.png")
    assert torch.equal(rm.read_image(tmp_path / "mnist.png")[1], mnist)  # left as it is


def test_predict_reads_what_it_can_of_many_files(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write("7", 20).save("a.png")
    write("3", 20).save("b.jpg")
    Image.new("L", (50, 50), 255).save("c.png")
    Path("d.png").write_text("no picture")
    Path("notes.txt").write_text("no picture, and passed over in a folder")
    for names in ([str(tmp_path)], ["*.*g"]):
        assert rm.main(["predict", *names, "--checkpoint", str(trained)]) == 2
        printed = capsys.readouterr()
        assert re.findall(r"(?m)^\d +[\d.]+ %  .*(\w\.\w+)$", printed.out) == ["a.png", "b.jpg"]
        assert re.findall(r"(?m)^error: .*(\w\.png) (?:shows no ink|cannot be)", printed.err) == [
            "c.png",
            "d.png",
        ]
    with Image.open(trained / "predict.png") as picture:
        assert len(picture.convert("RGB").getcolors(2**24)) > 50


# 8. Other networks


@pytest.mark.parametrize("kind", rm.INPUTS)
def test_lenet5(kind):
    channels, size, _ = rm.INPUTS[kind]
    model = rm.build_model(rm.Recipe(model="lenet5", input=kind))
    assert model(torch.zeros(2, channels, size, size)).shape == (2, 10)
    assert sum(p.numel() for p in model.parameters()) == 61_706 + 6 * 25 * (channels - 1)
    with pytest.raises(rm.UserError, match="lenet5"):
        rm.build_model(rm.Recipe(model="lenet5", stem="cifar"))


@pytest.mark.parametrize(("name", "convolutions"), [("resnet34", 33), ("resnet50", 49)])
def test_plain_networks_have_the_same_layers_without_shortcuts(name, convolutions):
    plain = rm.build_model(rm.Recipe(model=name, plain=True))
    assert sum(isinstance(part, nn.Conv2d) for part in plain.modules()) == convolutions
    kept = [key for key in rm.NETWORKS[name]().state_dict() if "downsample" not in key]
    assert list(plain.state_dict()) == kept
    block, x = plain.layer1[-1].eval(), torch.randn(2, plain.layer1[-1].conv1.in_channels, 7, 7)
    nn.init.zeros_(getattr(block, "bn3", block.bn2).weight)
    assert not block(x).any()  # where a residual block would hand x on


def test_weights_are_adapted_to_gray_images_and_ten_classes(tmp_path, capsys):
    theirs = torchvision.models.resnet18().eval()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    gray = rm.resnet18()
    head = gray.fc.weight.clone()
    rm.load_weights(gray, rm.Recipe(weights=str(tmp_path / "theirs.pth")))
    assert "120 of 122 tensors" in capsys.readouterr().out
    image = torch.randn(1, 1, 28, 28)
    as_rgb = theirs.conv1(image.expand(-1, 3, -1, -1))
    assert torch.allclose(gray.conv1(image), as_rgb, atol=1e-5)  # the answer that it had as RGB
    assert torch.equal(gray.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight)
    assert torch.equal(gray.fc.weight, head)
    torch.save({"state_dict": gray.state_dict()}, tmp_path / "gray.pth")
    rgb = rm.resnet18(input_channels=3)
    rm.load_weights(rgb, rm.Recipe(weights=str(tmp_path / "gray.pth")))
    assert "122 of 122 tensors" in capsys.readouterr().out
    assert torch.allclose(rgb.conv1(image.expand(-1, 3, -1, -1)), gray.conv1(image), atol=1e-5)


def test_weights_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.save(rm.lenet5().state_dict(), tmp_path / "lenet5.pth")
    torch.save({"model": rm.resnet18()}, tmp_path / "pickled.pth")
    torch.save({"state": argparse.Namespace(lr=1)}, tmp_path / "namespace.pth")
    (tmp_path / "text.pth").write_text("no weights")
    said = {
        "imagenet": "ImageNet weights for resnet18",
        "lenet5.pth": r"nothing in .*lenet5\.pth fits resnet18.*0\.weight.*conv1\.weight",
        "pickled.pth": "holds Python objects, which are not run; save a state_dict",
        "namespace.pth": "holds Python objects, which are not run; save a state_dict",
        "text.pth": r"text\.pth cannot be read, or is damaged",
        "missing.pth": r"missing\.pth cannot be read",
    }
    for name, words in said.items():
        weights = name if name == "imagenet" else str(tmp_path / name)
        with pytest.raises(rm.UserError, match=words):
            rm.load_weights(rm.resnet18(), rm.Recipe(weights=weights))


def test_frozen_parts_stay_as_they_are(trained, tmp_path, capsys, no_pictures):
    start, run = trained / "best.pt", tmp_path / "run"
    flags = [*TRAIN, "--weights", start, "--freeze", "conv1,bn1,layer1", "--limit", "64"]
    assert rm.main([*map(str, flags), "--epochs", "1", "--output-dir", str(run)]) == 0
    assert rm.main(["--resume", str(run), "--epochs", "2"]) == 0
    before, last = load(start)["model"], load(run / "last.pt")
    for key, value in before.items():
        frozen = key.startswith(("conv1", "bn1", "layer1"))
        if frozen or not key.endswith("num_batches_tracked"):
            assert torch.equal(value, last["model"][key]) == frozen, key
    assert rm.main([*TRAIN, "--freeze", "layer5"]) == 2
    assert "cannot freeze 'layer5'" in capsys.readouterr().err


# 9. Command line


def test_train_writes_a_whole_run(tmp_path, capsys):
    assert train_lenet(tmp_path / "run") == 0
    printed = capsys.readouterr()
    names = {path.name for path in (tmp_path / "run").iterdir()}
    pictures = {"curves.png", "confusion_matrix.png", "predictions.png", "mistakes.png"}
    assert names == {"best.pt", "last.pt", "history.csv", "report.txt", *pictures}
    report = (tmp_path / "run" / "report.txt").read_text()
    assert report.strip() in printed.out
    assert "dataset synthetic" in report
    assert re.search(r"epoch \d, selected on the validation set", report)
    assert max(map(len, printed.out.replace(str(tmp_path), "").splitlines())) <= 80
    assert printed.err == ""


def test_evaluate_repeats_the_report(trained, capsys):
    report = (trained / "report.txt").read_text().strip()
    assert rm.main(["evaluate", str(trained), str(trained / "best.pt")]) == 0
    assert capsys.readouterr().out.count(report) == 2


def test_evaluate_says_what_was_selected(tmp_path, capsys, no_pictures):
    assert train_lenet(tmp_path / "run") == 0
    last = load(tmp_path / "run" / "last.pt")
    for losses, said in (([3.0, 2.0, 1.0], "selected"), ([1.0, 2.0, 3.0], "not selected")):
        last["history"]["val_loss"] = losses
        torch.save(last, tmp_path / "x.pt")
        assert rm.main(["evaluate", str(tmp_path / "x.pt")]) == 0
        assert f"epoch 3, {said} on the validation set" in capsys.readouterr().out


def test_the_newest_run_is_taken_and_none_is_overwritten(
    tmp_path, monkeypatch, capsys, no_pictures
):
    monkeypatch.chdir(tmp_path)
    assert rm.main(["evaluate"]) == 2
    assert "there is no run in" in capsys.readouterr().err
    command = [*TRAIN, "--model", "lenet5", "--epochs", "1"]
    assert [rm.main(command), rm.main(command)] == [0, 0]
    runs = sorted(path.name for path in Path("runs").iterdir())
    assert runs == ["lenet5-gray28-synthetic-1", "lenet5-gray28-synthetic-2"]
    capsys.readouterr()
    assert rm.main(["evaluate"]) == 0
    assert capsys.readouterr().out.startswith(str(Path("runs", runs[1], "best.pt")))
    Path("mine").mkdir()
    assert rm.main([*command, "--output-dir", "mine"]) == 2
    assert re.fullmatch("error: cannot make mine .*\n", capsys.readouterr().err)


def test_resume_by_command_and_what_it_refuses(tmp_path, capsys, no_pictures):
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert [train_lenet(whole), train_lenet(run, epochs=1)] == [0, 0]
    same = ["--seed", "0", "--dataset", "synthetic"]  # which may be said again
    assert rm.main(["--resume", str(run), "--epochs", "3", *same]) == 0
    ours, theirs = load(run / "last.pt"), load(whole / "last.pt")
    assert without_times(ours["history"]) == without_times(theirs["history"])
    assert all(torch.equal(ours["model"][key], theirs["model"][key]) for key in ours["model"])
    for mistake in (["--lr", "0.5"], ["--output-dir", "b"], ["--recipe", "adam"]):
        capsys.readouterr()
        assert rm.main(["--resume", str(run), *mistake]) == 2
        assert mistake[0].strip("-").split("-")[0] in capsys.readouterr().err
    assert rm.main(["--resume", str(run / "best.pt")]) == 2
    assert "cannot be resumed" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), RuntimeError("no kernel")])
def test_a_start_that_fails_leaves_nothing(tmp_path, monkeypatch, capsys, error, no_pictures):
    with monkeypatch.context() as patch:
        patch.setattr(rm, "train_one_epoch", lambda *_: (_ for _ in ()).throw(error))
        if "memory" in str(error):
            assert train_lenet(tmp_path / "run") == 2
            assert "a smaller --batch-size needs less" in capsys.readouterr().err
        else:
            with pytest.raises(RuntimeError):  # our own bugs keep their traceback
                train_lenet(tmp_path / "run")
    assert train_lenet(tmp_path / "run", epochs=1) == 0


def program(*arguments, **how):
    """Start the program with pipes, as a shell does."""
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **how}
    return subprocess.Popen([sys.executable, SCRIPT, *map(str, arguments)], **how)


@pytest.mark.skipif(os.name == "nt", reason="signals and pipes differ")
def test_neither_head_nor_ctrl_c_loses_a_file(tmp_path):
    write_mnist(tmp_path / "data" / "MNIST" / "raw")
    flags = ["--val-size=20", "--model=lenet5", "--patience=9999", "--output-dir"]
    # Where the tests run in the background, the signal may be ignored, and children inherit that.
    heed = {"preexec_fn": functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)}
    with (
        program(*flags, "head", "--epochs", "2", cwd=tmp_path) as headed,
        program(
            *flags, "a stop", "--epochs", 9999, "--device=cpu", cwd=tmp_path, **heed
        ) as stopped,
    ):
        headed.stdout.readline()
        headed.stdout.close()  # as `| head -1` does
        assert headed.wait(timeout=100) == 0, headed.stderr.read()
        for line in stopped.stdout:
            if line.startswith("    1"):
                break
        stopped.send_signal(signal.SIGINT)
        stopped.wait(timeout=60)
        said = stopped.stderr.read()
    assert (tmp_path / "head" / "mistakes.png").exists()
    assert stopped.returncode == 130
    resume = "python .*resnet18_mnist.py '--resume=a stop' --data-dir=data --device=cpu"
    assert re.fullmatch(f"stopped; this goes on:  {resume}\n", said)
    assert load(tmp_path / "a stop" / "last.pt")["history"]["epoch"]


MISTAKES = {
    "--device cuda:42": "cuda:42",
    "evaluate best.pt --device tpu": "tpu",
    "--dataset kaggle --data-dir none": "train.csv",
    "--epochs many": "--epochs",
    "--batch-size 1": "batch_size",
    "--dataset synthetic --lr-factor 1": "Factor should be < 1.0",
    "--dataset synthetic --optimizer nesterov --momentum 0": "momentum",
    "--optimizer lion": "lion",
    "--modell resnet18": "--modell",
    "trian": "trian",
    "--resume nowhere": "nowhere",
    "evaluate text.pt": "text.pt cannot be read, or is damaged",
    "evaluate cut.pt": "cut.pt cannot be read, or is damaged",
    "evaluate weights.pt": "weights.pt is no checkpoint of this program",
    "evaluate other.pt": "other.pt does not fit resnet34",
    "--resume cut.pt": "cut.pt cannot be read, or is damaged",
    "predict": "predict takes image files",
    "predict text.pt --checkpoint best.pt": "text.pt cannot be read as an image",
    "predict nothing.png --checkpoint best.pt": "nothing.png",
    "--dataset synthetic --output-dir text.pt/run": "cannot make text.pt/run",
}


@pytest.fixture(scope="session")
def bad_files(tmp_path_factory, trained):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "text.pt").write_bytes(b"no checkpoint")
    shutil.copy(trained / "best.pt", folder)
    (folder / "cut.pt").write_bytes((trained / "best.pt").read_bytes()[:1_000_000])
    checkpoint = load(trained / "best.pt")
    torch.save(checkpoint["model"], folder / "weights.pt")
    checkpoint["recipe"]["model"] = "resnet34"
    torch.save(checkpoint, folder / "other.pt")
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_line_and_exit_code_2(bad_files, monkeypatch, capsys, mistake):
    monkeypatch.chdir(bad_files)
    before = sorted(path for path in bad_files.rglob("*") if path.is_file())
    assert rm.main(mistake.split()) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert MISTAKES[mistake] in said
    assert said.count("\n") == 1
    assert sorted(path for path in bad_files.rglob("*") if path.is_file()) == before


@pytest.mark.parametrize("command", rm.COMMANDS)
def test_help_fits_and_the_readme_names_every_flag(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        rm.main([command, "--help"])
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 80
    assert all(name in "".join(lines[:4]) for name in rm.COMMANDS)
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    flags = set(re.findall(r"(?m)^  (?:-h, )?(--[a-z-]+)", printed)) - {"--help"}
    assert [flag for flag in flags if flag not in readme] == []
    if command == "train":
        assert len(flags) <= 35
        assert [f"\n{name}:\n" in printed for name in rm.GROUPS.values()] == [True] * 4


class RunsCode:
    """A pickle of this would touch a file when it is loaded."""

    def __reduce__(self):
        return Path.touch, (Path("it-ran"),)


def damage(rng, data: bytes) -> bytes:
    """Cut, flip, repeat, blank or insert some bytes, or leave none."""
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    noise = rng.randbytes(rng.randint(1, 30))
    flipped = bytearray(data)
    for _ in range(rng.choice((1, 10, 1000))):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    kinds = [data[:a], bytes(flipped), data[:b] + data[a:], data[:a] + bytes(b - a) + data[b:]]
    return rng.choice([*kinds, data[:a] + noise + data[a:], data[a:], b"", noise])


def damaged_checkpoint(rng, whole: Path) -> bytes:
    """Return a checkpoint whose bytes are damaged, or whose content is not what it should be."""
    if rng.random() < 0.4:
        return damage(rng, whole.read_bytes())
    content, buffer = load(whole), io.BytesIO()
    odd = [None, -1, 1e30, math.nan, "x" * 1000, [], {}, torch.zeros(3), True, RunsCode()]
    for _ in range(rng.randint(1, 3)):
        parts = [content, *(content[key] for key in ("recipe", "model", "history"))]
        part = rng.choice([part for part in parts if isinstance(part, dict)])
        name = rng.choice(list(part) or ["x"])
        if rng.random() < 0.3:
            part.pop(name, None)
        else:
            part[rng.choice((name, name, "other", 7))] = rng.choice(odd)
        if not {"recipe", "model", "history"} <= content.keys():
            break
    torch.save(content, buffer)
    return buffer.getvalue()


def damaged_case(rng, folder: Path, number: int) -> list[str]:
    """Damage a checkpoint, an idx file, a CSV or an image; return a command that reads it."""
    path, out = folder / "damaged", ["--output-dir", f"out-{number}"]
    small = ["--model", "lenet5", "--epochs", "1", "--val-size", "20", *out]
    kind = number % 4
    if kind == 0:
        path.write_bytes(damaged_checkpoint(rng, folder / "run" / "last.pt"))
        uses = [["evaluate", "damaged"], ["--resume", "damaged", "--epochs", "2"]]
        uses += [["--weights", "damaged", *small], ["predict", "3.png", "--checkpoint", "damaged"]]
        command = rng.choice(uses)
        return command + (["--data-dir", "good"] if "predict" not in command else [])
    if kind == 1:
        new = folder / f"data-{number}"
        shutil.copytree(folder / "good", new)
        path = rng.choice(sorted((new / "MNIST" / "raw").iterdir()))
        path.write_bytes(damage(rng, path.read_bytes()))
        return ["--data-dir", new.name, "--dataset", "mnist", *small]
    if kind == 2:
        table = (folder / "train.csv").read_text()
        cell = rng.choice(("", "256", "-1", "a", "1.5", "nan", '"', '"7"', "9" * 400, "\0", "é"))
        at = rng.randrange(len(HEADER), len(table))
        text = table[:at] + cell + table[at + rng.randrange(9) :]
        encoded = text.encode(rng.choice(("utf-8", "utf-8-sig", "utf-16")))
        new = folder / f"kaggle-{number}"
        new.mkdir()
        (new / "train.csv").write_bytes(rng.choice((encoded, damage(rng, table.encode()))))
        return ["--data-dir", new.name, "--recipe", "kaggle", *small]
    path.write_bytes(damage(rng, (folder / "3.png").read_bytes()))
    return ["predict", "damaged", "--checkpoint", "run"]


def fuzz(folder: Path, seed: int, cases: int) -> None:
    """Give the program damaged files; raise if it ever does what it should not. For a process."""
    os.chdir(folder)
    os.environ.update(NO_NETWORK)
    torch.set_num_threads(1)
    rm.visualize_results = rm.save_figure = lambda *_: None
    write_mnist(folder / "good" / "MNIST" / "raw")
    write_kaggle(draw_digits(None, 130, 40), folder, 40)
    write("3", 20).save(folder / "3.png")
    start = ["--data-dir", "good", "--model", "lenet5", "--epochs", "1", "--val-size", "20"]
    assert rm.main([*start, "--output-dir", "run"]) == 0
    rng, failures = random.Random(seed), []
    for number in range(cases):
        arguments, said = damaged_case(rng, folder, number), io.StringIO()
        signal.alarm(60)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
                code = rm.main(arguments)
            said = said.getvalue()
            refused = code == 2 and said.startswith("error: ") and said.count("\n") == 1
            if not (refused and len(said) < 1000) and (code or said):
                failures.append((number, arguments, code, said))
        except Exception:
            failures.append((number, arguments, traceback.format_exc()[-900:]))
        signal.alarm(0)
    for failure in failures:
        print(*failure, sep="\n")
    assert not failures
    assert not Path("it-ran").exists()


@pytest.mark.skipif(os.name == "nt", reason="limits time as Unix does")
def test_damaged_files_are_answered_or_refused_in_a_line(tmp_path):
    process = PROCESSES.Process(target=fuzz, args=(tmp_path, 0, 200))
    process.start()
    process.join()
    assert process.exitcode == 0


def be_killed(folder: Path, kills: int) -> int:
    """Kill a run at random moments and resume it each time; return how often it was killed.

    Raises unless it ends with the weights and the history of a run that was never killed.
    """
    rng, killed = random.Random(0), 0
    write_mnist(folder / "data" / "MNIST" / "raw")
    start = ["--model", "lenet5", "--epochs", 40, "--patience", 1000, "--val-size", 20]

    def begin(arguments):
        process = PROCESSES.Process(target=be_the_program, args=(arguments, folder))
        process.start()
        return process

    whole = begin([*start, "--output-dir", "whole"])
    run = folder / "run"
    while True:
        begun = (run / "last.pt").exists()
        if not begun:
            shutil.rmtree(run, ignore_errors=True)
        process = begin(["--resume", "run"] if begun else [*start, "--output-dir", "run"])
        process.join(rng.uniform(0.5, 2.0) if killed < kills else None)
        if process.exitcode is not None:
            assert process.exitcode == 0
            if killed == kills:
                break
            shutil.rmtree(run)  # at its end too early: from the beginning
            continue
        process.kill()
        process.join()
        killed += 1
    whole.join()
    one, other = (load(folder / name / "last.pt") for name in ("whole", "run"))
    assert without_times(one["history"]) == without_times(other["history"])
    for key, weight in one["model"].items():
        assert torch.equal(weight, other["model"][key]), key
    assert not list(run.glob(".*"))
    return killed


def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path):
    assert be_killed(tmp_path, kills=3) == 3


# The file as a whole


def test_inline_metadata_and_requirements_are_equal():
    block = re.search(r"# dependencies = \[(.*)\]", SCRIPT.read_text(encoding="utf-8"))[1]
    lines = (HERE / "requirements.txt").read_text().splitlines()
    required = [line.split("#")[0].strip() for line in lines if line.strip()]
    inline = re.findall(r'"([^"]+)"', block)
    assert inline == [name for name in required if not name.startswith("pytest")]


def sections() -> list[str]:
    """Return the sections of the program; the first holds docstring and imports."""
    return re.split(r"(?m)^(?=# %% )", SCRIPT.read_text(encoding="utf-8"))


def execute(source: str, name: str, monkeypatch) -> dict:
    """Run source as a module of its own, and return what it defines."""
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(source, name, "exec"), module.__dict__)
    return module.__dict__


def test_each_section_needs_only_those_above(monkeypatch):
    uses = [
        lambda names: None,
        lambda names: names["resnet18"]()(torch.zeros(2, 1, 28, 28)),
        lambda names: names["RECIPES"]["plateau"],
        lambda names: len(
            names["TensorLoader"](*draw_digits(None, 130, 40)[:2], names["Recipe"]())
        ),
        lambda names: names["pick_precision"]("auto", names["pick_device"]()),
        lambda names: names["train_model"](LinearModel(), small_loader(), device="cpu", epochs=1),
        lambda names: names["visualize_model_architecture"](names["resnet18"]()),
        lambda names: names["draw_synthetic_digits"](None, 3, 3),
        lambda names: names["build_model"](names["Recipe"](model="lenet5")),
        lambda names: names["main"](["describe"]),
    ]
    parts = sections()
    for number, use in enumerate(uses):
        use(execute("".join(parts[: number + 1]), f"upto_{number}", monkeypatch))


def test_docstring_says_where_training_ends():
    text = "".join(sections()[:6])
    assert f"at line {len(text.rstrip().splitlines())}," in text


def test_in_a_notebook_nothing_starts_by_itself(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["/x/colab_kernel_launcher.py", "-f", "kernel.json"])
    names = execute("".join(sections()), "__main__", monkeypatch)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(names, "command_train", None)
    monkeypatch.setitem(names["COMMANDS"], "train", lambda args, changes: 0)
    assert names["main"]() == 0  # whatever the kernel was started with


def test_import_has_no_side_effect(tmp_path):
    how = {"env": {**os.environ, "PYTHONPATH": str(HERE)}, "capture_output": True, "text": True}
    command = [
        sys.executable,
        "-W",
        "error::DeprecationWarning:resnet18_mnist",
        "-c",
        "import resnet18_mnist",
    ]
    done = subprocess.run(command, cwd=tmp_path, **how)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
    assert list(tmp_path.iterdir()) == []


# What a step costs: `python test_resnet18_mnist.py`


def usual_loop(kind: str, data_dir: Path, device):
    """Return the loop that most scripts have, as a function that goes through the data once."""
    v1 = torchvision.transforms
    steps = [v1.Resize((32, 32)), v1.Grayscale(3)] if kind == "rgb32" else []
    steps += [v1.RandomAffine(10, translate=(0.1, 0.1)), v1.ToTensor()]
    transform = v1.Compose([*steps, v1.Normalize((0.1307,), (0.3081,))])
    dataset = torchvision.datasets.MNIST(data_dir, transform=transform)
    how = {"num_workers": 2, "persistent_workers": True, "shuffle": True}
    loader = DataLoader(dataset, 128, pin_memory=device.type == "cuda", **how)
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    if kind == "rgb32":
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=5e-4)

    def loop():
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            loss.item()

    return loop


def our_loops(kind: str, data_dir: Path, device):
    """Return the bare floor and our loop, over the same number of batches of 128."""
    images, labels, *_ = rm.read_mnist(data_dir)
    recipe = rm.Recipe(input=kind)
    loader = rm.TensorLoader(images, labels, recipe, train=True).to(device)
    trainer = rm.ResNetTrainer(rm.build_model(recipe), device)
    model, precision = trainer.model, trainer.precision
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=5e-4)
    batch, targets = (part.contiguous() for part in next(iter(loader)))

    def floor():
        model.train()
        for _ in range(len(loader)):
            with rm.autocast(device, precision):
                loss = F.cross_entropy(model(batch), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        loss.item()  # waits for a GPU

    def ours():
        rm.train_one_epoch(model, loader, optimizer, None, device, precision)

    return floor, ours, rm.fast_small_maps(model)


def benchmark(rounds: int = 5) -> None:
    """Time a step of the bare floor, of our loop and of the usual one, in turn."""
    device = rm.pick_device()
    rm.keep_freed_memory()  # as the command line does
    print(f"{rm.describe_device(device)}, torch {torch.__version__}; medians of {rounds} rounds")
    print("floor: forward, backward and update on one fixed batch; 128 images per step")
    print("ms per step, and ratios (with their range)")
    print("input    floor    ours   usual  ours/floor            usual/ours")
    for kind, steps in (("gray28", 24), ("rgb32", 4)):
        with tempfile.TemporaryDirectory() as folder:
            raw = Path(folder, "MNIST", "raw")
            for name, array in zip(IDX, draw_digits(None, 128 * steps, 10), strict=True):
                write_idx(raw / f"{name}-ubyte", array)
            usual = usual_loop(kind, Path(folder), device)
            floor, ours, fast_small_maps = our_loops(kind, Path(folder), device)
            times = []
            with fast_small_maps:
                for _ in range(rounds + 1):
                    times.append([])
                    for loop in (floor, ours, usual):
                        started = time.perf_counter()
                        loop()
                        times[-1].append(1000 * (time.perf_counter() - started) / steps)
        times = times[1:]  # the first round warms up
        line = f"{kind:6}" + "".join(
            f"{median(column):8.1f}" for column in zip(*times, strict=True)
        )
        for above, below in ((1, 0), (2, 1)):
            ratios = [row[above] / row[below] for row in times]
            line += f"  {median(ratios):5.3f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(line, flush=True)


def score_kaggle(folder: Path, solution: Path | None) -> None:
    """Write MNIST as Kaggle's files, with 42,000 rows to train on, or score a solution of them."""
    digits = rm.read_mnist("data")
    if solution is None:
        folder.mkdir(parents=True, exist_ok=True)
        write_kaggle(digits, folder, 42_000)
        return
    labels = torch.cat(digits[1::2])[42_000:].tolist()
    with open(solution) as file:
        answers = [int(row["Label"]) for row in csv.DictReader(file)]
    correct = sum(a == b for a, b in zip(labels, answers, strict=True))
    print(f"{correct:,} of {len(labels):,} right: {100 * correct / len(labels):.2f} %")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=benchmark.__doc__)
    parser.add_argument("--kaggle", type=Path, metavar="DIR", help=score_kaggle.__doc__)
    parser.add_argument("--score", type=Path, metavar="FILE", help="solution.csv to score")
    parser.add_argument("--kill", type=int, metavar="N", help="kill a run so many times, compare")
    parser.add_argument("--fuzz", type=int, metavar="N", help="try so many damaged files")
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
