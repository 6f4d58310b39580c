"""A classifier of the images at hand, for features where Inception's mean little: small pictures, digits, fashion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

CONFIG, WEIGHTS = "classifier.json", "classifier.safetensors"


class DomainClassifier(nn.Module):
    """A small convolutional classifier with 64 bounded penultimate features.

    The features are bounded: unbounded ones are heavy-tailed, and a few of them would decide a distance by chance.

    Args:
        channels (`int`): of the images.
        size (`int`): smallest side that is expected; halved until it is at most 4.
        num_classes (`int`): classes.
        width (`int`): channels of the first layer.
    """

    def __init__(self, channels: int, size: int, num_classes: int, width: int = 32) -> None:
        super().__init__()
        self.settings = {"channels": channels, "size": size, "num_classes": num_classes, "width": width}
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU()]
        while size > 4:
            wider = min(2 * width, 128)
            layers += [nn.Conv2d(width, wider, 3, padding=1, stride=2), nn.GroupNorm(8, wider), nn.ReLU()]
            size, width = (size + 1) // 2, wider
        layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()]
        self.body = nn.Sequential(*layers, nn.Linear(16 * width, 64), nn.Tanh())
        self.head = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features of shape `(batch, 64)` and logits of `(batch, classes)` for images in uint8."""
        features = self.body(images.float() / 127.5 - 1)
        return features, self.head(features)

    @classmethod
    def fit(
        cls, images: Tensor, labels: Tensor, steps: int = 1000, batch_size: int = 128, seed: int = 0, width: int = 32
    ) -> DomainClassifier:
        """Train one. The same images, labels and seed give the same classifier, up to the rounding of the device.

        Args:
            images (`Tensor` of shape `(n, channels, height, width)`): in uint8, on the device that it is trained on.
            labels (`Tensor` of shape `(n,)`): whole numbers from 0, on any device.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(images.shape[1], min(images.shape[2:]), int(labels.max()) + 1, width).to(images.device)
            labels = labels.to(images.device)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
            for _ in tqdm(range(steps), desc="classifier"):
                rows = torch.randint(len(images), (batch_size,))
                noise = torch.randn(batch_size, *images.shape[1:]).to(images.device)  # drawn alike on every device
                rows = rows.to(images.device)
                noisy = images[rows].float() + 12 * noise
                loss = nn.functional.cross_entropy(model(noisy)[1], labels[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        return model.eval().requires_grad_(False)

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """The share of images that are told right."""
        answers = [self(part)[1].argmax(1) for part in images.split(1000)]
        return float((torch.cat(answers) == labels).double().mean())

    def save(self, folder: str | Path) -> None:
        """Write it as safetensors and JSON."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), Path(folder) / WEIGHTS)
        (Path(folder) / CONFIG).write_text(json.dumps(self.settings))

    @classmethod
    def load(cls, folder: str | Path) -> DomainClassifier:
        """Read what `save` wrote.

        Raises:
            `ValueError`: if there is none, or it is damaged.
        """
        try:
            settings: dict[str, Any] = json.loads((Path(folder) / CONFIG).read_text())
            model = cls(**settings)
            model.load_state_dict(load_file(Path(folder) / WEIGHTS))
        # torch raises a RuntimeError for weights of other shapes.
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{folder} holds no classifier: {error}") from error
        return model.eval().requires_grad_(False)
