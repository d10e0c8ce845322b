"""What resnet18_mnist.py promises, in the order of its sections; as a script, the benchmark."""

import argparse
import builtins
import contextlib
import copy
import io
import math
import multiprocessing
import os
import random
import re
import runpy
import shutil
import signal
import socket
import symtable
import sys
import tempfile
import time
import types
from pathlib import Path
from unittest import mock

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

import resnet18_mnist as rm

pytestmark = pytest.mark.filterwarnings("error::DeprecationWarning:resnet18_mnist")
HERE = Path(__file__).parent
SCRIPT = HERE / "resnet18_mnist.py"
README = (HERE / "README.md").read_text(encoding="utf-8")
load = rm.read_tensors
IDX = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")

# No test downloads anything, and all read the same synthetic digits.
os.environ.update(dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9"), NO_COLOR="1")
DIGITS = rm.draw_synthetic_digits(None, 1200, 200)
FEW = [part[:n] for part, n in zip(DIGITS, (130, 130, 16, 16), strict=True)]
rm.READERS["synthetic"] = lambda data_dir: DIGITS


def small_loader(n=96, train=False, **settings):
    """Return a loader of the first n synthetic digits, without augmentation unless asked for."""
    recipe = rm.Recipe(**{"batch_size": 32, "rotate": 0, "shift": 0, "stretch": 0, **settings})
    loader = rm.TensorLoader(DIGITS[0][:n], DIGITS[1][:n], recipe, train)
    if not train:
        loader.batch_size = recipe.batch_size
    return loader


def linear_model():
    """Return a classifier that trains in no time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def train(model=None, loader=None, val_loader=None, resume=None, run_dir=None, **settings):
    """Train on the CPU in float32; return the trainer and its history."""
    trainer = rm.ResNetTrainer(model or linear_model(), "cpu", run_dir=run_dir)
    loader = loader or small_loader()
    return trainer, trainer.train(loader, val_loader, resume, precision="fp32", **settings)


def assert_equal_runs(one: dict, other: dict) -> None:
    """Two last.pt are equal to the last bit, up to the seconds that an epoch took."""
    for run in (one, other):
        run["history"]["seconds"] = None
    for part in ("model", "last_model", "last_optimizer", "history"):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)
    assert one["last_scheduler"] == other["last_scheduler"]


def write_idx(path: Path, array: torch.Tensor) -> None:
    """Write a tensor of bytes in the format of the MNIST files."""
    header = np.array([0x0800 + array.dim(), *array.shape], ">i4")
    path.write_bytes(header.tobytes() + array.byte().numpy().tobytes())


def write_mnist(raw: Path, digits=FEW) -> Path:
    """Write digits as MNIST's four files; return the folder."""
    raw.mkdir(parents=True)
    for name, array in zip(IDX, digits, strict=True):
        write_idx(raw / f"{name}-ubyte", array)
    return raw


def write_kaggle(digits, folder: Path, train_rows: int) -> torch.Tensor:
    """Write digits as train.csv and test.csv of the Digit Recognizer; return the test's labels."""
    images, labels = torch.cat(digits[::2]).flatten(1), torch.cat(digits[1::2])
    table = torch.cat([labels[:, None], images], dim=1).numpy()
    how = {"fmt": "%d", "delimiter": ",", "comments": ""}
    np.savetxt(folder / "train.csv", table[:train_rows], header="label,pixel0,...", **how)
    np.savetxt(folder / "test.csv", table[train_rows:, 1:], header="pixel0,...", **how)
    return labels[train_rows:]


def run(folder: Path | str, *flags, model="lenet5", epochs=3) -> int:
    """Train by the command line, in this process; return the exit code."""
    command = ["--dataset=synthetic", "--limit=320", "--val-size=100", "--batch-size=64"]
    command += ["--precision=fp32", "--model", model, "--epochs", epochs, "--output-dir", folder]
    return rm.main([str(part) for part in [*command, *flags]])


@pytest.fixture
def no_pictures(monkeypatch):
    """For tests of something else: pictures take seconds."""
    monkeypatch.setattr(rm, "visualize_results", lambda *_: None)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The folder of a ResNet-18 that was trained for two epochs; beside it, what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "trained"
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        assert run(folder, model="resnet18", epochs=2) == 0
    folder.with_suffix(".txt").write_text(said.getvalue())
    return folder


# 1. Network

KINDS = [("imagenet", 3, 224, 1000), ("imagenet", 1, 28, 10), ("cifar", 3, 32, 10)]
PARAMETERS = {  # of each kind: stem, channels, pixels per side, classes
    "resnet18": [11_689_512, 11_175_370, 11_173_962],
    "resnet34": [21_797_672, 21_283_530, 21_282_122],
    "resnet50": [25_557_032, 23_522_250, 23_520_842],
    "resnet101": [44_549_160, 42_514_378, 42_512_970],
    "resnet152": [60_192_808, 58_158_026, 58_156_618],
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_and_shapes_of_every_stage(name):
    for (stem, channels, side, classes), parameters in zip(KINDS, PARAMETERS[name], strict=True):
        with torch.device("meta"):
            model = getattr(rm, name)(num_classes=classes, input_channels=channels, stem=stem)
            images = torch.empty(2, channels, side, side)
            maps, logits = model.get_feature_maps(images), model(images)
        assert sum(p.numel() for p in model.parameters()) == parameters
        expansion = 1 if name in ("resnet18", "resnet34") else 4
        side = math.ceil(side / 4) if stem == "imagenet" else side
        expected = {"stem": (2, 64, side, side)}
        for number, planes in enumerate((64, 128, 256, 512), start=1):
            expected[f"layer{number}"] = (2, planes * expansion, side, side)
            side = math.ceil(side / 2)
        expected["pooled"] = (2, 512 * expansion)
        assert {key: tuple(value.shape) for key, value in maps.items()} == expected
        assert logits.shape == (2, classes)


@pytest.mark.parametrize("name", PARAMETERS)
def test_weights_logits_and_gradients_are_torchvisions(name):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)()
    torch.manual_seed(0)
    ours = getattr(rm, name)(num_classes=1000, input_channels=3)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([3, 7])
    for model in (ours, theirs):
        F.cross_entropy(model.train()(images), labels).backward()
    for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), key
    with torch.no_grad():
        assert torch.equal(ours.eval()(images), theirs.eval()(images))
        assert torch.equal(ours(images), ours.fc(ours.get_feature_maps(images)["pooled"]))


def test_tools_for_models_work_before_and_after_training():
    model, images = rm.resnet18(), torch.randn(2, 1, 28, 28)
    for is_trained in (False, True):
        if is_trained:
            train(model, small_loader(4, batch_size=4), epochs=1)
        features = create_feature_extractor(model.train(), ["layer1", "layer4"])(images)
        assert torch.equal(features["layer4"], model.get_feature_maps(images)["layer4"])
        with torch.no_grad():
            logits = model.eval()(images)
            assert torch.equal(torch.fx.symbolic_trace(model)(images), logits)
            assert torch.allclose(torch.jit.trace(model, images)(images), logits, atol=1e-5)
            exported = torch.export.export(model, (images,)).module()
            assert torch.allclose(exported(images), logits, atol=1e-5)


# 2. Recipe

WRONG = [{"lr": math.nan}, {"lr": "high"}, {"batch_size": 1}, {"seed": 2**70}, {"limit": 1}]
WRONG += [{"val_size": 0.5}, {"val_size": 1200}, {"val_size": 2**32}, {"select_on": "tset"}]


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_settings_are_refused_by_name(wrong):
    name = next(iter(wrong)).replace("_", "[_-]")
    with pytest.raises(rm.UserError, match=name):
        rm.MNISTDataLoader(**{"dataset": "synthetic", **wrong})


def test_one_line_adds_an_entry_to_each_table(tmp_path, monkeypatch, no_pictures):
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR
    monkeypatch.setitem(rm.OPTIMIZERS, "adagrad", lambda p, r: torch.optim.Adagrad(p, r.lr))
    monkeypatch.setitem(rm.SCHEDULERS, "cosine", lambda o, n, r: cosine(o, r.epochs * n))
    monkeypatch.setitem(rm.INPUTS, "gray20", (1, 20, "cifar"))
    small = nn.Sequential(nn.Flatten(), nn.Linear(400, 10))
    monkeypatch.setitem(rm.NETWORKS, "small", lambda **options: small)
    monkeypatch.setitem(rm.READERS, "mine", lambda data_dir: FEW)
    monkeypatch.setitem(rm.RECIPES, "new", rm.Recipe(optimizer="adagrad", scheduler="cosine"))
    flags = "--recipe new --input gray20 --dataset mine --model small --epochs 2 --output-dir"
    assert rm.main([*flags.split(), str(tmp_path / "run")]) == 0
    last = load(tmp_path / "run" / "last.pt")
    assert last["history"]["learning_rate"] == pytest.approx([0.05, 0.025])
    assert "sum" in last["last_optimizer"]["state"][0]  # which is Adagrad's
    assert last["model"]["1.weight"].shape == (10, 400)


# 3. Data


def test_split_is_disjoint_complete_and_stratified():
    labels = torch.randint(0, 10, (1003,), generator=torch.Generator().manual_seed(0))
    indices, val = rm.split_by_class(labels, 100, seed=5)
    assert torch.equal(torch.cat([indices, val]).sort().values, torch.arange(1003))
    share = labels[val].bincount(minlength=10) - labels.bincount(minlength=10) * 100 / 1003
    assert len(val) == 100
    assert share.abs().max() < 1
    assert torch.equal(val, rm.split_by_class(labels, 100, seed=5)[1])
    assert not torch.equal(val, rm.split_by_class(labels, 100, seed=6)[1])


def test_loaders_and_their_batches_have_the_right_counts(monkeypatch):
    counts = [({"limit": 77}, [77, 100, 200]), ({"val_size": 60}, [1140, 60, 200])]
    counts.append(({"select_on": "test"}, [1200, 200, 200]))
    for changes, sizes in counts:
        data = rm.MNISTDataLoader(dataset="synthetic", **changes)
        assert [len(part.labels) for part in (data.train, data.val, data.test)] == sizes
        assert data.get_data_loaders() == (data.train, data.test)
        assert (data.val is data.test) == ("select_on" in changes)
    # A lone last image is left out: batch norm on a 1×1 map cannot train on it.
    for n, training, sizes in ((5, False, [2, 2, 1]), (5, True, [2, 2]), (6, True, [2, 2, 2])):
        loader = small_loader(n, training, batch_size=2)
        assert [len(labels) for _, labels in loader] == sizes
        assert len(loader) == len(sizes)
    monkeypatch.setattr(rm, "WORLD_SIZE", 2)
    for rank in (0, 1):  # else one process would wait for the other for ever
        monkeypatch.setattr(rm, "RANK", rank)
        assert [len(labels) for _, labels in small_loader(97, train=True)] == [16, 16, 16]


def test_batches_are_what_torchvisions_transforms_give():
    v1 = torchvision.transforms
    pictures = [Image.fromarray(image.numpy()) for image in DIGITS[0][:10]]
    for name, mean, std in (("mnist", 0.1307, 0.3081), ("kaggle", 0.131, 0.3085), ("none", 0, 1)):
        end = [v1.ToTensor(), v1.Normalize((mean,), (std,))]
        gray, rgb = v1.Compose(end), v1.Compose([v1.Resize((32, 32)), v1.Grayscale(3), *end])
        for kind, transform in (("gray28", gray), ("rgb32", rgb)):
            batch, labels = next(iter(small_loader(10, input=kind, normalize=name)))
            expected = torch.stack([transform(picture) for picture in pictures])
            assert batch.shape == expected.shape
            assert (batch - expected).abs().max() < 1.01 / 255 / std  # one step of gray
            assert torch.equal(labels, DIGITS[1][:10])


def test_augmentation_rotates_shifts_and_stretches_each_image():
    def distort(moves=(0, 0, 0), stretches=(0, 0, 0), **settings):
        recipe = rm.Recipe(**{"rotate": 0, "shift": 0, **settings})
        return rm.distort(bar, torch.tensor([[moves], [stretches]]).float(), recipe)

    TF = torchvision.transforms.functional
    bar = torch.zeros(1, 1, 40, 40)
    bar[..., 8:32, 18:22] = 1
    for degrees in (10, 20):
        rotated = TF.rotate(bar, degrees, TF.InterpolationMode.BILINEAR)
        assert torch.allclose(distort((degrees / 40, 0, 0), rotate=40), rotated, atol=1e-4)
    shifted = distort((0, -1, 0.5), shift=0.1)  # 4 pixels to the right, 2 up
    assert torch.allclose(shifted, bar.roll((-2, 4), dims=(2, 3)), atol=1e-4)
    draws = [(-1, 0, 0), (0, 1, 0), (0, 0, -1)]  # wider, slanted, higher and cut by the edges
    areas = [distort(stretches=draw, stretch=0.5).sum() / bar.sum() for draw in draws]
    assert torch.allclose(torch.stack(areas), torch.tensor([2, 1, 40 / 24]), atol=0.05)
    image = FEW[0][:1, None].float() / 255
    draws = 2 * torch.rand(2, 64, 3, generator=torch.Generator().manual_seed(0)) - 1
    changed = rm.distort(image.expand(64, -1, -1, -1), draws, rm.Recipe(stretch=0.1))
    assert len(torch.unique(changed.flatten(1), dim=0)) == 64


def test_damaged_mnist_is_named_and_never_replaced(tmp_path):
    damages = {
        "cut": lambda raw: os.truncate(raw / "train-images-idx3-ubyte", 1000),
        "missing": lambda raw: (raw / "train-labels-idx1-ubyte").unlink(),
        "counts": lambda raw: write_idx(raw / "train-labels-idx1-ubyte", torch.zeros(7)),
        "label": lambda raw: write_idx(raw / "t10k-labels-idx1-ubyte", torch.full((16,), 11)),
    }
    for name, damage in damages.items():
        raw = write_mnist(tmp_path / name / "MNIST" / "raw")
        damage(raw)
        for read in (rm.read_mnist, rm.mnist_or_synthetic):
            with pytest.raises(rm.UserError, match=re.escape(str(raw))) as caught:
                read(tmp_path / name)
            assert "\n" not in str(caught.value)


def test_mnist_is_read_by_programs_that_download_it_at_once(tmp_path, monkeypatch):
    def download(url, download_root, filename, md5):
        name = filename.removesuffix(".gz")
        Path(download_root, name).write_bytes(b"")
        if name.startswith(IDX[-1]) and len(list(folder.iterdir())) == 1:
            got.extend(rm.read_mnist(folder))  # a second program, while the file is not written
        write_idx(Path(download_root, name), FEW[IDX.index(name.removesuffix("-ubyte"))])

    folder, got = tmp_path / "new", []
    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", download)
    got.extend(rm.read_mnist(folder))
    for ours, theirs in zip(got, FEW * 2, strict=True):
        assert torch.equal(ours, theirs)
    assert [path.name for path in folder.iterdir()] == ["MNIST"]


# 4. Device


def test_devices_that_cannot_compute_are_named_or_passed_over(monkeypatch, capsys):
    def refuse_cuda(*size, device):
        if torch.device(device).type == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available for execution\nmore")
        return torch.zeros(*size)

    for name in ("cuda:99", "tpu", "meta"):
        with pytest.raises(rm.UserError, match=name):
            rm.pick_device(name)
    with pytest.raises(rm.UserError, match="fp8"):
        rm.pick_precision("fp8", torch.device("cpu"))
    for able, precision in (({"avx512_bf16": True}, "bf16"), ({}, "fp32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", able.copy, raising=False)
        assert rm.pick_precision("auto", torch.device("cpu")) == precision
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla K80")
    monkeypatch.setattr(torch, "ones", refuse_cuda)
    with pytest.raises(rm.UserError, match=r"Tesla K80.*--device cpu.*no kernel image"):
        rm.pick_device("cuda")
    assert rm.pick_device().type == "cpu"
    assert re.fullmatch("WARNING: .*Tesla K80.*\n", capsys.readouterr().err)
    monkeypatch.setattr(rm, "WORLD_SIZE", 2)
    with pytest.raises(rm.UserError, match="cuda"):  # processes on other devices would wait
        rm.pick_device()


def test_fast_conv2d_gives_the_same_gradients(monkeypatch):
    # In torchvision's network, whose layers are ours.
    model, images = torchvision.models.resnet18(num_classes=10).double(), torch.randn(4, 3, 28, 28)
    linear, products, gradients = F.linear, [], []
    monkeypatch.setattr(F, "linear", lambda *a: products.append(1) or linear(*a))
    for conv2d in (torch.conv2d, rm.fast_conv2d):
        model.zero_grad()
        monkeypatch.setattr(F, "conv2d", conv2d)
        F.cross_entropy(model(images.double()), torch.arange(4)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-9)
    assert len(products) == 2 + 4  # fc, twice, and the four convolutions of layer4
    assert rm.conv3x3(4, 6)(torch.ones(4, 1, 1)).shape == (6, 1, 1)  # an image without a batch


# 5. Training


@pytest.mark.parametrize(("kind", "n", "epochs"), [("gray28", 32, 40), ("rgb32", 8, 12)])
def test_overfits_few_images(kind, n, epochs):
    torch.manual_seed(0)
    model, few = rm.build_model(rm.Recipe(input=kind)), small_loader(n, input=kind, batch_size=n)
    rm.train_model(model, few, None, "cpu", epochs=epochs, lr=0.01, scheduler="none", patience=99)
    assert rm.compute_accuracy(model, few) == 100


def test_usage_from_python(monkeypatch):
    monkeypatch.setitem(rm.READERS, "mnist", lambda data_dir: FEW)
    names = {}
    exec(re.search(r"(?s)```python\n(from .*?)```", README)[1], names)
    model, history = names["model"], names["history"]
    assert history["learning_rate"] == [0.01, 0.01, 0.01]
    assert history["train_loss"][2] < history["train_loss"][0]
    assert set(names["results"]) == {"loss", "accuracy", "predictions", "labels", "probabilities"}
    for p in model.layer1.parameters():
        p.requires_grad = False
    before = copy.deepcopy(model.cpu().state_dict())
    train(model, names["train_loader"], epochs=1)
    for name, value in model.state_dict().items():  # frozen batch norms keep their statistics, too
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, before[name]) == name.startswith("layer1"), name


def test_plain_dataloaders_work_and_the_best_weights_are_kept():
    images, labels = FEW[0][:, None] / 255, FEW[1]
    batches = DataLoader(TensorDataset(images, labels), 32, shuffle=True)
    val = DataLoader(TensorDataset(images, (labels + 1) % 10), 32)  # wrong: learning harms
    trainer, history = train(None, batches, val, epochs=9, lr_patience=9)
    assert history["val_loss"] == sorted(history["val_loss"])
    assert len(history["epoch"]) == 6  # the first one is the best, and patience is 5
    assert trainer.test(val)["loss"] == pytest.approx(history["val_loss"][0])


def test_both_loops_against_plain_arithmetic(monkeypatch, capsys):
    monkeypatch.setattr(torch, "autocast", None)  # PyTorch 2.4 has none for mps
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    model, loader = linear_model(), small_loader(100)  # batches of 32, 32, 32 and 4
    logits = torch.cat([model(images) for images, _ in loader])
    labels, predictions = DIGITS[1][:100], logits.argmax(dim=1)
    results = rm.evaluate(model, loader)
    assert torch.equal(results["labels"], labels)
    assert torch.equal(results["predictions"], predictions)
    assert torch.allclose(results["probabilities"], logits.softmax(dim=1))
    optimizer = torch.optim.SGD(model.parameters(), 0)  # which changes nothing
    for done in (results, rm.train_one_epoch(model, loader, optimizer)):
        assert done["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
        assert done["accuracy"] == pytest.approx((predictions == labels).sum().item())
    assert capsys.readouterr().out.endswith(f"batch 4/4  loss {done['loss']:.4f}\033[K\r")


def test_accumulated_batches_are_one_large_batch():
    weights = []
    for batch_size, accumulate in ((48, 1), (12, 4)):
        model, loader = linear_model(), small_loader(96, batch_size=batch_size)
        (accumulate * model[1].weight.sum()).backward()  # gradients from before do not count
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with contextlib.redirect_stdout(None):  # as where a program has no output
            rm.train_one_epoch(model, loader, optimizer, accumulate=accumulate)
        weights.append(model[1].weight.detach())
    assert torch.allclose(*weights, atol=1e-6)


def test_plateau_lowers_the_rate_and_patience_ends_the_run(monkeypatch, capsys):
    losses, real = iter([1.0, 0.5, 0.45, 0.7, 0.8, 0.9, 1.0, 0.4]), rm.evaluate
    monkeypatch.setattr(rm, "evaluate", lambda *a: {**real(*a), "loss": next(losses)})
    settings = {"epochs": 8, "lr": 1.0, "lr_patience": 1, "lr_threshold": 0.2, "patience": 4}
    _, history = train(val_loader=small_loader(32), **settings)
    assert history["val_loss"] == [1.0, 0.5, 0.45, 0.7, 0.8, 0.9, 1.0]
    # Epoch 3 is the best one, but its loss is not lower by a fifth.
    assert history["learning_rate"] == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01])
    assert capsys.readouterr().out.endswith("stopped early: no lower loss for 4 epochs\n")


def test_schedules():
    rates = {"none": [1] * 4, "step": [1, 1, 0.1, 0.1], "onecycle": [0.04, 0.972, 0.556, 0.077]}
    settings = {"epochs": 4, "accumulate": 2, "lr": 1.0, "lr_step": 2, "lr_factor": 0.1}
    for scheduler, expected in rates.items():
        _, history = train(scheduler=scheduler, **settings)
        assert history["learning_rate"] == pytest.approx(expected, abs=0.001), scheduler
        assert history["val_loss"] == history["train_loss"]  # which decides instead


@pytest.mark.parametrize("optimizer", rm.OPTIMIZERS)
def test_every_optimizer_learns_under_every_schedule(optimizer):
    for scheduler in rm.SCHEDULERS:
        settings = {"optimizer": optimizer, "scheduler": scheduler, "momentum": 0.8}
        trainer, history = train(lr=0.003, epochs=3, **settings)
        assert history["train_loss"][2] < 0.9 * history["train_loss"][0], scheduler
        (group,) = trainer.optimizer.param_groups
        assert group["weight_decay"] == 5e-4
        assert group.get("momentum") == {"sgd": 0.8, "nesterov": 0.8, "rmsprop": 0}.get(optimizer)


def test_every_recipe_trains():
    for recipe in rm.RECIPES.values():
        loader = rm.TensorLoader(FEW[0][:4], FEW[1][:4], recipe, train=True)
        rm.ResNetTrainer(rm.build_model(recipe), "cpu", recipe).train(loader, epochs=1)


@pytest.mark.parametrize("kind", ["ours", "plain"])
def test_resumed_equals_uninterrupted_and_leaves_rng_alone(tmp_path, kind, monkeypatch):
    seeded = []  # generators of devices, which are the caller's as well
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.xpu, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.mps, "manual_seed", seeded.append)

    def go_on(folder, epochs, resume=None):
        torch.default_generator.manual_seed(99 if resume else 0)
        data = small_loader(96, train=True, rotate=10, shift=0.1)
        if kind == "plain":
            data = DataLoader(TensorDataset(data.images / 255, data.labels), 32, shuffle=True)
        body = [rm.conv3x3(1, 8, 2), nn.MaxPool2d(7), rm.BasicBlock(8, 8), rm.conv3x3(8, 8, 2)]
        model = nn.Sequential(*body, nn.Flatten(), nn.Dropout(), nn.Linear(8, 10))
        before = torch.get_rng_state()
        train(model, data, data, resume, folder, epochs=epochs, lr=0.05)
        assert torch.equal(torch.get_rng_state(), before)  # else later networks would be alike
        last, best = load(folder / "last.pt"), load(folder / "best.pt")
        torch.testing.assert_close(last["model"], best["model"], rtol=0, atol=0)
        return last

    half = go_on(tmp_path / "parts", 2)
    assert_equal_runs(go_on(tmp_path / "whole", 4), go_on(tmp_path / "parts", 4, resume=half))
    assert (seeded, F.conv2d) == ([], torch.conv2d)  # nothing global is left changed


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, "replace", full)
    full_disk = pytest.raises(rm.UserError, match=r"cannot write .*file: .*No space left")
    with full_disk, rm.atomic_write(tmp_path / "file") as file:
        file.write_bytes(b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_divergence_ends_in_a_line():
    with pytest.raises(rm.UserError, match=r"loss became (nan|inf).*lower --lr"):
        train(lr=1e9, epochs=3)


# Each command runs in a separate process, but importing torch takes seconds: where the system can
# fork, these processes begin as copies of one that has imported it.
PROCESSES = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
PROCESSES.set_forkserver_preload(["torch", "torchvision", "matplotlib.figure"])


def be_the_program(arguments, folder, output, variables):
    os.chdir(folder)
    os.environ.update(variables)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    sys.argv = ["resnet18_mnist.py", "--device=cpu", *map(str, arguments)]
    with open(output, "w") as sys.stdout, open(f"{output}-errors", "w") as sys.stderr:
        runpy.run_path(str(SCRIPT), run_name="__main__")


def start(folder: Path, *arguments, output="output", **variables):
    """Start the program in a folder, as a user does; what it prints goes to a file there."""
    process = PROCESSES.Process(target=be_the_program, args=(arguments, folder, output, variables))
    process.start()
    return process


def test_two_processes_learn_what_one_learns(tmp_path):
    """LeNet-5 has no batch norm, which processes compute on their own parts of the batch."""
    write_mnist(tmp_path / "data" / "MNIST" / "raw")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    flags = ["--val-size=20", "--batch-size=22", "--model=lenet5", "--epochs=2", "--precision=fp32"]
    processes = [start(tmp_path, *flags, "--output-dir=one", output="0 of 1")]
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    for rank in "01":  # what torchrun sets
        command = [*flags, "--output-dir=two"]
        processes.append(start(tmp_path, *command, output=f"{rank} of 2", RANK=rank, **where))
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    assert "processes 2" in (tmp_path / "0 of 2").read_text()
    assert (tmp_path / "1 of 2").read_text() == ""
    one, two = (load(tmp_path / name / "last.pt") for name in ("one", "two"))
    torch.testing.assert_close(two["last_model"], one["last_model"], rtol=1e-4, atol=1e-4)
    for column in ("train_loss", "train_accuracy", "val_loss", "val_accuracy"):
        assert two["history"][column] == pytest.approx(one["history"][column], rel=1e-4)


# 6. Report and pictures


def test_report_against_counts_by_hand():
    labels, predictions = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 2, 2])
    results = {"labels": labels, "predictions": predictions, "probabilities": torch.zeros(6, 10)}
    assert rm.confusion_matrix(results)[:3, :3].tolist() == [[2, 1, 0], [0, 1, 1], [0, 0, 1]]
    lines = rm.classification_report(results).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:]}
    assert rows["0"] == ["100.00", "66.67", "80.00", "3"]
    assert rows["9"] == ["0.00", "0.00", "0.00", "0"]
    assert rows["macro"] == ["20.00", "21.67", "19.67", "6"]
    assert rows["weighted"] == ["75.00", "66.67", "67.78", "6"]
    assert max(map(len, lines)) <= 80


def test_pictures_take_their_classes_from_the_results(tmp_path):
    # The 26 letters of EMNIST, say; and a perfect run has no mistakes to draw.
    labels = torch.arange(52) % 26
    loader = [(torch.rand(52, 1, 28, 28), labels)]
    results = {"labels": labels, "predictions": labels, "accuracy": 100.0}
    results["probabilities"] = F.one_hot(labels).float()
    _, history = train(epochs=1)
    rm.visualize_results(linear_model(), loader, results, history, tmp_path, "a $title^{")
    assert (tmp_path / "mistakes.png").exists()
    assert rm.confusion_matrix(results).shape == (26, 26)
    assert re.search(r"(?m)^25 +100.00", rm.classification_report(results))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize(("stem", "channels", "side", "classes"), KINDS[1:])
def test_layer_table_agrees_with_pytorch_and_gradients(name, stem, channels, side, classes, capsys):
    model = getattr(rm, name)(num_classes=classes, input_channels=channels, stem=stem)
    rm.visualize_model_architecture(model, side)
    *layers, total = [line.split() for line in capsys.readouterr().out.splitlines()[2:-2]]
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, channels, side, side))
    parameters = sum(map(torch.numel, model.parameters()))
    assert total[1:3] == [f"{parameters:,}", f"{counter.get_total_flops():,}"]
    logits = model.train()(torch.randn(8, channels, side, side))
    F.cross_entropy(logits, torch.arange(8)).backward()
    for layer, *_, live in layers:
        weight = getattr(model.get_submodule(layer), "weight", torch.empty(0))
        if weight.dim() == 4:
            # Looked at by tap, since a dead ReLU may leave single weights without a gradient.
            reached = (weight.grad != 0).any(dim=0).any(dim=0).float().mean().item()
            assert live == f"{reached:.1%}", layer


def test_describe_prints_what_the_readme_shows(capsys):
    assert rm.main(["describe"]) == 0
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert max(map(len, printed.splitlines())) <= 80
    assert printed.strip() in README


# 7. Other digits


def test_synthetic_digits_are_always_the_same():
    images, labels, test_images, _ = rm.draw_synthetic_digits(None, 50, 20)
    assert torch.equal(images, rm.draw_synthetic_digits(None, 50, 20)[0])
    assert labels.bincount().tolist() == [5] * 10
    assert (images.flatten(1).amax(1) > 200).all()  # no font without digits
    assert len(torch.unique(torch.cat([images, test_images]).flatten(1), dim=0)) == 70


def test_synthetic_digits_stand_in_only_where_mnist_has_no_file(tmp_path, capsys, no_pictures):
    folders = [f"--data-dir={tmp_path}/none", f"--output-dir={tmp_path}/synthetic"]
    assert rm.main(["--model=lenet5", "--epochs=1", *folders]) == 0
    assert "SYNTHETIC" in capsys.readouterr().err
    assert "dataset synthetic" in (tmp_path / "synthetic" / "report.txt").read_text()
    assert run(tmp_path / "run", "--dataset", "mnist", "--data-dir", tmp_path) == 2
    assert "cannot read MNIST" in capsys.readouterr().err
    for here in (write_mnist(tmp_path / "misplaced" / "raw"), tmp_path / "misplaced"):
        with pytest.raises(rm.UserError, match=rf"in {here / 'MNIST' / 'raw'}: .*; found: {here}"):
            rm.mnist_or_synthetic(here)


def test_kaggle_tables_are_read_or_refused(tmp_path, recwarn):
    write_kaggle(FEW, tmp_path, 130)
    torch.testing.assert_close(list(rm.read_kaggle(tmp_path)[:2]), FEW[:2])
    zeros = ",0" * 783
    rows = ["1,2", "0" + zeros, "10,0" + zeros]  # short, without a label, with no digit's
    rows += [f"3,{cell}{zeros}" for cell in ("256", "-1", "1.5", "x", "")]
    for table in ["", "header\n", *(f"header\n{row}\n" for row in rows)]:
        (tmp_path / "train.csv").write_text(table)
        with pytest.raises(rm.UserError, match=r"train\.csv") as caught:
            rm.read_kaggle(tmp_path)
        assert (str(caught.value).count("\n"), len(recwarn)) == (0, 0)


def test_kaggle_from_train_csv_to_solution_csv(tmp_path, capsys, monkeypatch, no_pictures):
    labels = write_kaggle(DIGITS, tmp_path, 1200)
    monkeypatch.setitem(rm.READERS, "mine", rm.read_kaggle)  # what counts is that no test is there
    flags = "--recipe kaggle --limit 0 --batch-size 32 --lr 0.003 --lr-step 8 --dataset mine"
    assert run(tmp_path / "run", *flags.split(), "--data-dir", tmp_path, epochs=8) == 0
    printed = capsys.readouterr().out
    assert re.search(r"(?s)100 validation, 0 test.*validation accuracy", printed)
    assert "test accuracy" not in printed
    flags = ["--kaggle", str(tmp_path / "test.csv"), "--checkpoint", str(tmp_path / "run")]
    assert rm.main(["predict", *flags]) == 0
    solution = tmp_path / "run" / "solution.csv"
    assert solution.read_text().startswith("ImageId,Label\n1,")
    numbers, answers = np.loadtxt(solution, int, delimiter=",", skiprows=1).T
    assert numbers.tolist() == list(range(1, 201))
    assert (answers == labels.numpy()).sum() > 100


FONTS = Path(matplotlib.get_data_path(), "fonts", "ttf")
V, U = np.mgrid[0:1:300j, 0:1:300j]  # down and to the right


def picture(levels):
    return Image.fromarray(np.uint8(np.clip(levels, 0, 255)))


def read(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
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


def test_a_digit_without_margin_is_read_alike():
    for font, paper, ink in (("DejaVuSans.ttf", 255, 0), ("STIXGeneral.ttf", 20, 230)):
        for digit in "0123456789":
            wide, *others = [read(write(digit, margin, paper, ink, font)) for margin in (20, 3, 0)]
            assert max(differ(other, wide) for other in others) < 8, (font, paper, digit)
    for digit in "0123456789":  # printed so fat that it fills its box
        pages = [write(digit, margin, font="DejaVuSans-Bold.ttf") for margin in (60, 20, 8)]
        wide, *others = [read(page.filter(ImageFilter.MinFilter(9))) for page in pages]
        assert max(differ(other, wide) for other in others) < 8, digit


def test_what_surrounds_a_digit_is_no_part_of_it():
    def square(half, turn=0.0):  # a sheet of half a side, turned by radians
        across = (U - 0.5) * math.cos(turn) + (V - 0.5) * math.sin(turn)
        down = (V - 0.5) * math.cos(turn) - (U - 0.5) * math.sin(turn)
        return np.maximum(abs(across), abs(down)) < half

    def scene(ground, ink):  # a 5 in the middle of a ground, with a little noise
        noise = np.random.default_rng(0).normal(size=U.shape)
        return picture(ground + (ink - ground) * five + noise)

    sheet, figure = Image.new("L", (300, 300)), write("5", 0, paper=0, ink=255)
    sheet.paste(figure, (150 - figure.width // 2, 150 - figure.height // 2))
    five = np.asarray(sheet) / 255
    grounds = {  # and the ink on each
        "page edge, left": (np.where(U < 0.08 + 0.03 * V, 60, 230), 40),
        "page edge, two sides": (np.where((V > 0.85) | (U > 0.85), 60, 230), 40),
        "shadowed corner, pencil": (np.where(U + V < 0.35, 90, 230), 150),
        "cell of a form": (np.where(np.minimum(U, V) < 0.03, 0, 230), 40),
        "frame": (np.where(square(0.35, turn=0.1) & ~square(0.34, turn=0.1), 0, 230), 40),
        "cell of a form, pencil": (np.where(np.minimum(U, V) < 0.03, 0, 230), 150),
        "sheet on a table": (np.where(square(0.35), 235, 50), 30),
        "sheet on a table, pencil": (np.where(square(0.3), 235, 50), 170),
        "sheet on a table, turned": (np.where(square(0.3, turn=0.4), 235, 50), 30),
        "dark panel, light ink": (np.where(square(0.35), 40, 250), 230),
        "gray panel, black table": (np.where(square(0.4), 150, 10), 20),
        "vignette": (230 * (1 - (U - 0.5) ** 2 - (V - 0.5) ** 2), 60),
        "22 levels over noise": (200, 178),
        "light on dark, faint": (60, 82),
    }
    expected = read(scene(255, 0))
    for name, (ground, ink) in grounds.items():
        assert differ(read(scene(ground, ink)), expected) < 8, name


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_blank_page_shows_no_ink(kind):
    rng, pages = np.random.default_rng(0), []
    for side in (1, 2, 4, 9, 28, 60, 128, 300):  # even, and noisy
        pages += [np.full((side, side), level) for level in (0, 200, 255)]
        pages += [150 + n * rng.normal(size=(side, side, 3)) for n in (0.5, 2, 8, 30, 90)]
    middle = (U - 0.5) ** 2 + (V - 0.5) ** 2
    for depth in (0.1, 0.3, 0.6, 0.9):  # badly lit
        for light in (0.7 * U + 0.3 * V, middle, np.exp(-9 * middle), np.exp(-9 * U)):
            pages += [240 - 200 * depth * light + rng.normal(0, n, U.shape) for n in (0, 1, 6)]
    for blur in (1, 2, 3, 5):  # cloudy
        cloud = picture(rng.integers(0, 256, (256, 256)))
        cloud = np.asarray(cloud.filter(ImageFilter.GaussianBlur(blur)), float) - 127
        pages += [180 + depth / cloud.std() * cloud for depth in (3, 12, 30)]
    for page in pages:
        with pytest.raises(rm.UserError, match="shows no ink"):
            read(picture(page), kind)


def test_several_figures_are_refused():
    for text in ("27", "00", "14", "50", "71", "123"):
        for font in ("DejaVuSans.ttf", "STIXGeneralItalic.ttf"):
            page = np.asarray(write(text, 30, font=font))
            for several in (page, page[30:-30, 30:-30], page[:, :-45], np.tile(page, (3, 1))):
                with pytest.raises(rm.UserError, match="several figures"):
                    read(picture(several))


def test_a_digit_in_several_strokes_is_one():
    five, seven = write("5", 30), np.asarray(write("7", 30))
    broken = five.copy()
    ImageDraw.Draw(broken).rectangle((0, 55, five.width, 61), fill=255)
    assert differ(read(broken), read(five)) < 8
    down, right = np.indices(seven.shape)
    dots = read(picture(np.where((down % 16 < 10) & (right % 16 < 10), seven, 255)))
    places = dots.nonzero().float()
    assert (places.amax(dim=0) - places.amin(dim=0)).max() == 19
    center = dots[dots > 0] @ places / dots.sum()
    assert center.tolist() == pytest.approx([13.5, 13.5], abs=0.6)


def test_every_format_of_image_is_read(tmp_path):
    drawn = write("2", 40).convert("RGB")
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90° clockwise
    clear = Image.new("RGBA", drawn.size)  # white on transparent
    clear.paste("white", mask=drawn.convert("L").point(lambda level: 255 - level))
    drawn.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", exif=turned)
    drawn.quantize(8).save(tmp_path / "palette.gif")
    drawn.convert("1").save(tmp_path / "bits.png")
    clear.save(tmp_path / "clear.png")
    for path in tmp_path.iterdir():
        assert differ(rm.read_image(path)[1].float(), read(drawn)) < 8, path.name
    Image.fromarray(FEW[0][0].numpy()).save(tmp_path / "mnist.png")
    assert torch.equal(rm.read_image(tmp_path / "mnist.png")[1], FEW[0][0])  # left as it is


def test_predict_reads_what_it_can_of_many_files(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    good = ["1.png", "12.jpg", "1[2].jpg"]  # the last name is no pattern, which 12.jpg would fit
    for name in good:
        write("7", 20).save(name)
    Image.new("L", (50, 50), 255).save("c.png")
    Path("d.png").write_text("no picture")
    Image.fromarray(np.uint16(write("7", 20))).save("e.png")  # 16 bits
    Path("notes.txt").write_text("no picture, and passed over in a folder")
    for first, *others in ([str(tmp_path)], ["*.*g"], [*good, "c.png", "d.png", "e.png"]):
        assert rm.main(["predict", first, "--checkpoint", str(trained), *others]) == 2
        printed = capsys.readouterr()
        assert re.findall(r"(?m)^\d +[\d.]+ %  (?:.*/)?(.+)$", printed.out) == good
        errors = re.findall(r"(?m)^error: .*(\w\.png) (?:shows no ink|cannot be)", printed.err)
        assert errors == ["c.png", "d.png", "e.png"]
    with Image.open(trained / "predict.png") as drawn:
        assert len(drawn.convert("RGB").getcolors(2**24)) > 50


# 8. Other networks


def test_lenet5_fits_every_input():
    for kind, (channels, side, _) in rm.INPUTS.items():
        model = rm.build_model(rm.Recipe(model="lenet5", input=kind))
        assert model(torch.zeros(2, channels, side, side)).shape == (2, 10)
        assert sum(p.numel() for p in model.parameters()) == 61_706 + 6 * 25 * (channels - 1)


@pytest.mark.parametrize(("name", "convolutions"), [("resnet34", 33), ("resnet50", 49)])
def test_plain_networks_have_the_same_layers_without_shortcuts(name, convolutions):
    plain = rm.build_model(rm.Recipe(model=name, plain=True))
    assert sum(isinstance(part, nn.Conv2d) for part in plain.modules()) == convolutions
    kept = [key for key in getattr(rm, name)().state_dict() if "downsample" not in key]
    assert list(plain.state_dict()) == kept
    block, x = plain.layer1[-1].eval(), torch.randn(2, plain.layer1[-1].conv1.in_channels, 7, 7)
    nn.init.zeros_(getattr(block, "bn3", block.bn2).weight)
    assert not block(x).any()  # where a residual block would hand x on


def test_weights_are_adapted_to_gray_and_ten_classes(tmp_path, capsys, monkeypatch):
    theirs, gray, again = torchvision.models.resnet18(), rm.resnet18(), rm.resnet18()
    head, image = gray.fc.weight.clone(), torch.randn(1, 1, 28, 28)
    monkeypatch.setattr(rm.models, "get_model", lambda *_, **options: theirs)
    rm.load_weights(gray, rm.Recipe(weights="imagenet"))
    assert "120 of 122 tensors" in capsys.readouterr().out
    assert torch.equal(gray.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight)
    assert torch.equal(gray.fc.weight, head)
    as_rgb = theirs.conv1(image.expand(-1, 3, -1, -1))  # both give the same answer
    assert torch.allclose(gray.conv1(image), as_rgb, atol=1e-5)
    torch.save({"state_dict": gray.state_dict()}, tmp_path / "gray.pth")
    rm.load_weights(again, rm.Recipe(weights=str(tmp_path / "gray.pth")))
    assert "122 of 122 tensors" in capsys.readouterr().out
    assert torch.equal(again.conv1.weight, gray.conv1.weight)


def test_weights_that_cannot_be_had(tmp_path, monkeypatch):
    class RunsCode:  # a pickle of it would make a file when it is loaded
        def __reduce__(self):
            return Path.touch, (Path("it-ran"),)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    torch.save(rm.lenet5().state_dict(), "lenet5.pth")
    torch.save({"model": rm.lenet5(), "more": RunsCode()}, "pickled.pth")
    answers = {
        "imagenet": "resnet18 cannot start from imagenet",
        "lenet5.pth": r"resnet18 cannot start from lenet5\.pth: .*0\.weight.*conv1\.weight",
        "pickled.pth": r"pickled\.pth holds objects, which are not run: save its state_dict",
    }
    for name, answer in answers.items():
        with pytest.raises(rm.UserError, match=answer):
            rm.load_weights(rm.resnet18(), rm.Recipe(weights=name))
    assert not Path("it-ran").exists()


# 9. Command line


def test_train_writes_a_whole_run_and_evaluate_repeats_it(trained, capsys):
    printed = trained.with_suffix(".txt").read_text()
    report = (trained / "report.txt").read_text().strip()
    assert report in printed
    assert re.search(r"dataset synthetic.*\nepoch \d, selected on the validation set", report)
    assert max(map(len, printed.replace(str(trained.parent), "").splitlines())) <= 80
    assert not re.search("(?i)warning|batch", printed)  # the live line is for terminals
    best, history = (load(trained / "best.pt"), load(trained / "last.pt")["history"])
    assert all(weight.is_contiguous() for weight in best["model"].values())
    assert best["history"] == history
    table = np.genfromtxt(trained / "history.csv", delimiter=",", names=True)
    assert {name: table[name].tolist() for name in table.dtype.names} == history
    for name in ("curves", "confusion_matrix", "predictions", "mistakes", "feature_maps"):
        with Image.open(trained / f"{name}.png") as drawn:
            assert min(drawn.size) > 300, name
            assert len(drawn.convert("RGB").getcolors(2**24)) > 50, f"{name} is blank"
    assert rm.main(["evaluate", *(str(trained / name) for name in ("", "best.pt", "last.pt"))]) == 0
    assert capsys.readouterr().out.count(report) == 3


def test_the_newest_run_is_taken_and_none_overwritten(tmp_path, monkeypatch, capsys, no_pictures):
    monkeypatch.chdir(tmp_path)
    assert rm.main(["evaluate"]) == 2
    assert "there is no run in" in capsys.readouterr().err
    command = ["--dataset=synthetic", "--select-on=test", "--model=lenet5", "--epochs=1"]
    runs = ["lenet5-gray28-synthetic-1", "lenet5-gray28-synthetic-2"]
    assert [rm.main(command), rm.main([*command, f"--weights=runs/{runs[0]}/best.pt"])] == [0, 0]
    assert sorted(os.listdir("runs")) == runs
    assert re.search("(?s)TEST SET, which is opt.* 10 of 10 tensors", capsys.readouterr().out)
    os.utime(Path("runs", runs[0], "best.pt"), (2**31, 2**31))  # the first one is now the newest
    assert rm.main(["evaluate"]) == 0
    assert capsys.readouterr().out.startswith(str(Path("runs", runs[0], "best.pt")))
    assert rm.main([*command, f"--output-dir=runs/{runs[0]}"]) == 2
    assert re.fullmatch("error: cannot make runs.*\n", capsys.readouterr().err)
    assert rm.main(["--resume", "--epochs=2", "--patience=9"]) == 0


def test_a_start_that_fails_leaves_nothing(tmp_path, monkeypatch, capsys, no_pictures):
    errors = [torch.cuda.OutOfMemoryError("CUDA out of memory"), RuntimeError("no kernel")]
    with monkeypatch.context() as patch:
        patch.setattr(rm, "train_one_epoch", mock.Mock(side_effect=errors))
        assert run(tmp_path / "run") == 2
        assert capsys.readouterr().err == "error: CUDA out of memory\n"
        with pytest.raises(RuntimeError, match="no kernel"):  # our own bugs keep their traceback
            run(tmp_path / "run")
    assert run(tmp_path / "run", epochs=1) == 0


@pytest.mark.skipif(os.name == "nt", reason="signals and pipes differ")
def test_neither_head_nor_ctrl_c_loses_a_file(tmp_path):
    write_mnist(tmp_path / "data" / "MNIST" / "raw")
    os.mkfifo(tmp_path / "head")
    os.mkfifo(tmp_path / "stop")
    flags = ["--val-size=20", "--model=lenet5", "--patience=9999"]
    headed = start(tmp_path, *flags, "--output-dir=a", "--epochs=2", output="head")
    with open(tmp_path / "head") as printed:
        printed.readline()  # as `| head -1` does
    stopped = start(tmp_path, *flags, "--output-dir=a stop", "--epochs=9999", output="stop")
    with open(tmp_path / "stop") as printed:
        for line in printed:
            if line.startswith("    1"):
                os.kill(stopped.pid, signal.SIGINT)
    for process, code in ((headed, 0), (stopped, 130)):
        process.join()
        assert process.exitcode == code
    assert (tmp_path / "a" / "mistakes.png").exists()
    said = (tmp_path / "stop-errors").read_text()
    assert said.endswith('resnet18_mnist.py" --resume "a stop" --data-dir "data" --device cpu\n')
    assert load(tmp_path / "a stop" / "last.pt")["history"]["epoch"]


def test_mistakes_get_one_line_and_exit_code_2(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.pt").write_bytes(b"no checkpoint")
    shutil.copy(trained / "best.pt", tmp_path)
    torch.save(load("best.pt")["model"], "weights.pt")
    recipe = load("best.pt")["recipe"] | {"scheduler": "onecycle"}
    torch.save({"recipe": recipe, "model": {}}, "other.pt")
    Path("runs").mkdir()
    before = sorted(tmp_path.rglob("*"))
    mistakes = {
        "--epochs many": "--epochs",
        "--modell resnet18": "--modell",
        "trian": "trian",
        "--dataset synthetic --optimizer nesterov --momentum 0": "momentum",
        "--dataset synthetic --stem vgg": "stem 'vgg' is not one of auto, imagenet, cifar",
        "--dataset synthetic --freeze layer5": "cannot freeze 'layer5'",
        "--resume text.pt": "text.pt is damaged, or not in the usual format of torch.save",
        "--resume best.pt": "this cannot be resumed",
        "--resume other.pt": "this cannot be resumed",
        "--resume other.pt --epochs 9": "only patience of a resumed run may change",
        "--resume best.pt --lr 0.5": "only patience, epochs of a resumed run may change",
        "evaluate other.pt": "other.pt does not fit resnet18",
        "evaluate weights.pt": "weights.pt is no checkpoint of this program",
        "--dataset synthetic --model lenet5 --freeze 0,1,2,3,4,5,6": "empty parameter list",
        "predict .": "no image is given",
        "predict nothing.png --checkpoint best.pt": "nothing.png",
        "evaluate nothing": "No such file.*nothing",
    }
    for mistake, reason in mistakes.items():
        assert rm.main(mistake.split()) == 2, mistake
        assert re.fullmatch(f"error: .*{reason}.*\n", capsys.readouterr().err), mistake
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", rm.COMMANDS)
def test_help_fits_and_the_readme_names_every_flag(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        rm.main([command, "--help"])
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert printed.isascii()
    assert max(map(len, lines)) <= 80
    assert all(name in "".join(lines[:4]) for name in rm.COMMANDS)
    flags = set(re.findall(r"(?m)^  (?:-h, )?(--[a-z-]+)", printed)) - {"--help"}
    assert flags <= set(re.findall(r"--[a-z-]+", README))
    if command == "train":
        assert 30 < len(flags) <= 35
        assert re.findall(r"(?m)^(\w+):$", printed)[-4:] == ["network", "data", "training", "run"]


def damage(rng, data: bytes) -> bytes:
    """Cut, repeat, blank or replace some bytes, or leave none."""
    a = rng.randrange(len(data))
    b = a + rng.choice((1, 10, 1000))
    kinds = [b"", data[:a], data[:b] + data[a:], data[:a] + bytes(b - a) + data[b:]]
    return rng.choice([*kinds, data[:a] + rng.randbytes(b - a) + data[b:]])


@pytest.mark.parametrize(("seed", "cases"), [(0, 200)])
def test_damaged_files_are_read_or_refused_in_a_line(tmp_path, seed, cases):
    rng = random.Random(seed)
    train = "--data-dir=case --model=lenet5 --epochs=1 --val-size=20 --output-dir=case"
    uses = [
        ("case/run/last.pt", "evaluate case/run/last.pt --data-dir=case"),
        ("case/run/last.pt", "--resume=case/run --epochs=2 --data-dir=case"),
        ("case/run/last.pt", f"{train}/new --weights=case/run/last.pt"),
        ("case/train.csv", f"{train}/new --recipe=kaggle"),
        ("case/3.png", "predict case/3.png --checkpoint=good/run"),
    ]
    uses += [(f"case/MNIST/raw/{name}-ubyte", f"{train}/new --dataset=mnist") for name in IDX]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(rm, "visualize_results", lambda *_: None)
        patch.setattr(rm, "save_figure", lambda *_: None)
        write_mnist(Path("case", "MNIST", "raw"))
        write_kaggle(FEW, Path("case"), 40)
        write("3", 20).save("case/3.png")
        assert rm.main(f"{train}/run".split()) == 0
        Path("case").rename("good")
        for number in range(cases):
            shutil.copytree("good", "case")
            path, command = rng.choice(uses)
            Path(path).write_bytes(damage(rng, Path(path).read_bytes()))
            said = io.StringIO()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
                code = rm.main(command.split())
            assert code in (0, 2), (number, command)
            line = "error: .{1,990}\n" if code == 2 else ""
            assert re.fullmatch(line, said.getvalue()), (number, command)
            shutil.rmtree("case")


@pytest.mark.parametrize("kills", [3])
def test_a_killed_run_ends_as_one_never_killed(tmp_path, kills):
    rng, last = random.Random(0), tmp_path / "run" / "last.pt"
    write_mnist(tmp_path / "data" / "MNIST" / "raw")
    begin = ["--model=lenet5", "--epochs=25", "--patience=99", "--val-size=20", "--freeze=0"]
    whole = start(tmp_path, *begin, "--output-dir=whole")
    while True:
        arguments = ["--resume=run"] if last.exists() else [*begin, "--output-dir=run"]
        begun, process = time.time(), start(tmp_path, *arguments)
        while process.is_alive() and not (last.exists() and last.stat().st_mtime > begun):
            time.sleep(0.01)  # it is not yet training
        process.join(rng.uniform(0, 0.3) if kills else None)  # at a random moment
        assert process.exitcode in (None, 0)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills -= 1
        elif kills:
            shutil.rmtree(tmp_path / "run")  # at its end too early: from the beginning
        else:
            break
    whole.join()
    assert_equal_runs(load(last), load(tmp_path / "whole" / "last.pt"))
    assert not list((tmp_path / "run").glob(".*"))
    torch.manual_seed(0)
    assert torch.equal(load(last)["last_model"]["0.weight"], rm.lenet5()[0].weight)  # frozen


# The file as a whole

SECTIONS = re.split(r"(?m)^(?=# %% )", SCRIPT.read_text(encoding="utf-8"))


def test_each_section_needs_only_those_above():
    def used(table):  # the global names in it, and in all functions and classes inside it
        names = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
        return names.union(*map(used, table.get_children()))

    for number in range(1, len(SECTIONS) + 1):
        table = symtable.symtable("".join(SECTIONS[:number]), "sections", "exec")
        known = {s.get_name() for s in table.get_symbols() if s.is_assigned() or s.is_imported()}
        assert used(table) - known - set(dir(builtins)) == set(), number


def test_metadata_and_docstring_agree_with_the_files():
    inline = re.findall(r'"([^"]+)"', SECTIONS[0].splitlines()[2])
    required = (HERE / "requirements.txt").read_text().splitlines()
    assert [line for line in required if not line.startswith("pytest")] == inline
    until_training = "".join(SECTIONS[:6]).rstrip()
    assert f"at line {len(until_training.splitlines())}, show" in SECTIONS[0]


@pytest.mark.parametrize("name", ["__main__", "imported"])
def test_import_and_notebook_cell_start_nothing(name, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["/x/colab_kernel_launcher.py", "-f", "kernel.json"])
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    for line in ("", "__file__ = get_ipython = None\n"):  # both exist in the cells of some editors
        exec(line.join(SECTIONS), module.__dict__)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")
    monkeypatch.setitem(module.COMMANDS, "train", lambda args: 0)
    assert module.main() == 0  # whatever the kernel was started with


# What a step costs: `python test_resnet18_mnist.py`


def bare_loop(model, batches, optimizer, precision="fp32", reads_losses=False) -> None:
    """Go through the batches; most scripts read each loss, and so wait for it."""
    device = next(model.parameters()).device
    model.train()
    for images, labels in batches:
        with torch.autocast(device.type, torch.bfloat16, precision == "bf16"):
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if reads_losses:
            loss.item()
    loss.item()  # waits for a GPU


def time_steps(kind: str, data_dir: Path, rounds: int) -> list[list[float]]:
    """Return for each round the ms per step of the bare floor, of our loop and of the usual one."""
    recipe = rm.Recipe(input=kind)
    trainer = rm.ResNetTrainer(rm.build_model(recipe))
    loader = rm.MNISTDataLoader(data_dir, recipe, select_on="test").train
    loader.images = loader.images.to(trainer.device)
    loader.labels = loader.labels.to(trainer.device)
    model, precision = trainer.model, trainer.precision
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, weight_decay=5e-4)
    batch, targets = next(iter(loader))
    same_batches = [(batch.contiguous(), targets)] * len(loader)
    v1 = torchvision.transforms
    channels, side, _ = rm.INPUTS[kind]
    steps = [v1.Resize(side), v1.Grayscale(channels), v1.RandomAffine(10, translate=(0.1, 0.1))]
    steps += [v1.ToTensor(), v1.Normalize((0.1307,), (0.3081,))]
    dataset = torchvision.datasets.MNIST(data_dir, transform=v1.Compose(steps))
    how = {"num_workers": 2, "persistent_workers": True, "shuffle": True}
    usual_loader = DataLoader(dataset, 128, pin_memory=trainer.device.type == "cuda", **how)
    usual = rm.build_model(recipe).to(trainer.device)
    usual_optimizer = torch.optim.SGD(usual.parameters(), 0.01, 0.9, weight_decay=5e-4)
    loops = [
        (rm.fast_conv2d, lambda: bare_loop(model, same_batches, optimizer, precision)),
        (rm.fast_conv2d, lambda: rm.train_one_epoch(model, loader, optimizer, None, precision)),
        (torch.conv2d, lambda: bare_loop(usual, usual_loader, usual_optimizer, reads_losses=True)),
    ]
    times = []
    for _ in range(rounds + 1):
        times.append([])
        for conv2d, loop in loops:
            started = time.perf_counter()
            F.conv2d = conv2d
            loop()
            times[-1].append(1000 * (time.perf_counter() - started) / len(loader))
    return times[1:]  # the first round warms up


def benchmark(rounds: int = 5) -> None:
    """Time a step of the bare floor, of our loop and of the usual one, in turn."""
    rm.keep_freed_memory()  # as the command line does
    print(f"torch {torch.__version__}, {rm.pick_device()}, threads: {torch.get_num_threads()}")
    print("floor: forward, backward and update on one fixed batch; 128 images per step")
    print(f"ms per step, and ratios with their range: medians of {rounds} rounds")
    print("input    floor    ours   usual  ours/floor            usual/ours")
    for kind, steps in (("gray28", 24), ("rgb32", 4)):
        with tempfile.TemporaryDirectory() as folder:
            digits = rm.draw_synthetic_digits(None, 128 * steps, 10)
            write_mnist(Path(folder, "MNIST", "raw"), digits)
            times = time_steps(kind, Path(folder), rounds)
        columns = zip(*times, strict=True)
        line = f"{kind:6}" + "".join(f"{np.median(column):8.1f}" for column in columns)
        for above, below in ((1, 0), (2, 1)):
            ratios = [row[above] / row[below] for row in times]
            line += f"  {np.median(ratios):5.3f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(line, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=benchmark.__doc__)
    parser.add_argument("--kill", type=int, metavar="N", help="kill a run so many times, compare")
    parser.add_argument("--fuzz", type=int, metavar="N", help="try so many damaged files")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.kill:
            test_a_killed_run_ends_as_one_never_killed(Path(folder), args.kill)
        elif args.fuzz:
            test_damaged_files_are_read_or_refused_in_a_line(Path(folder), 1, args.fuzz)
        else:
            benchmark()
