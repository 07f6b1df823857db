"""A small classifier of scikit-learn's 8x8 digits: the independent judge of class-conditional samples.

    python examples/digit_classifier.py                         trains (seconds), prints the accuracy on the test split
    python examples/digit_classifier.py --images samples.npz    and the share of the images that are what was asked for

Plain PyTorch; only the data loader is fastdiff's. The classes asked for are the npz's `labels`, else --labels (an .npy
or IDX file), else image i is taken to be of class i % 10.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fastdiff.files.data import Data, load_data, split

EPOCHS = 15
BATCH = 64


def digits() -> tuple[Data, Data]:
    """Training and test split, 75 % and 25 %; always the same one."""
    return split(load_data("digits"), 0.75, seed=0)


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 4 * 4, 10),
    )


def shifted(x: Tensor) -> Tensor:
    """Each image moved by -1, 0 or 1 pixels a side, so that the judge does not depend on the exact place."""
    padded = functional.pad(x, (1, 1, 1, 1))
    corner = torch.randint(0, 3, (len(x), 2))
    return torch.stack([image[:, r : r + 8, c : c + 8] for image, (r, c) in zip(padded, corner.tolist(), strict=True)])


def train(seed: int = 0) -> tuple[nn.Sequential, float]:
    """Train on the training split; returns the network and its accuracy on the test split."""
    data, test = digits()
    assert data.labels is not None
    assert test.labels is not None
    threads = torch.get_num_threads()
    # maps of 8x8 are too small to share among threads, and on a busy machine the threads wait for each other
    torch.set_num_threads(1)
    try:
        # the seed decides weights and dropout too, without touching the caller's random state
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = fitted(torch.from_numpy(data.images).float() / 255, torch.from_numpy(data.labels))
        return net, float((classify(net, test.images) == test.labels).mean())
    finally:
        torch.set_num_threads(threads)


def fitted(x: Tensor, y: Tensor) -> nn.Sequential:
    net = network()
    adam = torch.optim.AdamW(net.parameters(), weight_decay=1e-2)
    rate = torch.optim.lr_scheduler.OneCycleLR(adam, max_lr=3e-3, total_steps=EPOCHS * -(-len(x) // BATCH))
    for _ in range(EPOCHS):
        for batch in torch.split(torch.randperm(len(x)), BATCH):
            loss = functional.cross_entropy(net(shifted(x[batch])), y[batch], label_smoothing=0.05)
            adam.zero_grad()
            torch.autograd.backward(loss)
            adam.step()
            rate.step()
    return net.eval()


@torch.no_grad()
def classify(net: nn.Module, images: NDArray[np.uint8]) -> NDArray[np.int64]:
    """The class of each image; images uint8 (N, 1, 8, 8)."""
    check(images)
    parts = torch.split(torch.from_numpy(images).float() / 255, 1024)
    return torch.cat([net(part).argmax(1) for part in parts]).numpy()


def check(images: NDArray[np.uint8]) -> None:
    if images.dtype != np.uint8 or images.shape[1:] != (1, 8, 8):
        raise ValueError(f"images: expected uint8 (N, 1, 8, 8), got {images.dtype} {images.shape}; these are no digits")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="train a digit classifier; judge generated digits with it")
    parser.add_argument("--images", type=Path, help="npz with arr_0, uint8 NHWC, and perhaps labels")
    parser.add_argument("--labels", type=Path, help="the classes asked for, .npy or IDX, when the npz has none")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    data = None
    if given.images is not None:
        try:
            data = load_data(given.images, labels=given.labels)
            check(data.images)
        except ValueError as error:
            parser.error(str(error))
    net, accuracy = train(given.seed)
    print(f"accuracy on the test split: {accuracy:.4f}")
    if data is not None:
        found = classify(net, data.images)
        asked = np.arange(len(found)) % 10 if data.labels is None else data.labels
        print(f"images that get their class: {(found == asked).mean():.4f} of {len(found)}")


if __name__ == "__main__":
    main()
