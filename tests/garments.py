"""Two garments of the embedded sample side by side, or one, or none: images with several labels, and a plain loop."""

import csv
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import average_precision_score  # type: ignore[import-untyped]
from torch import Tensor, nn

from data_modules import FashionMNISTSample
from data_modules.images.fit import enlarge

NAMES = FashionMNISTSample.class_names


def write_garments(folder: Path, train: int, test: int, seed: int = 0) -> Path:
    """Write PNGs of 28 x 56 pixels and a table of them; one side in ten is empty. Gives the table's path."""
    random, rows = np.random.default_rng(seed), [["file", "label", "split"]]
    for split, count in (("train", train), ("test", test)):
        images, labels, _ = FashionMNISTSample().split(split)
        for number in range(count):
            sides, own = np.zeros((2, 28, 28), np.uint8), set()
            for side in (0, 1):
                if random.random() > 0.1:
                    row = int(random.integers(len(labels)))
                    sides[side] = images[row, 0].numpy()
                    own.add(NAMES[int(labels[row])])
            path = folder / split / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.concatenate([*sides], 1)).save(path)
            rows.append([f"{split}/{number}.png", "|".join(sorted(own)), split])
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return folder / "labels.csv"


def plain_loop(net: nn.Module, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], epochs: int) -> float:
    """Train a network on images uint8 (N, C, H, W) and labels (N, K) with a loop by hand; its test's mean AP."""
    size: tuple[int, int] = net.image_size  # type: ignore[assignment]
    images, tests, labels, batch = enlarge(train[0].float(), size), enlarge(test[0].float(), size), train[1], 128
    mean, std = (images / 255).mean(), (images / 255).std()
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(batch)[: len(images) // batch]:
            loss = F.binary_cross_entropy_with_logits(net((images[rows] / 255 - mean) / std), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        shares = net.eval()((tests / 255 - mean) / std).sigmoid()
    return float(average_precision_score(test[1], shares, average="macro"))
