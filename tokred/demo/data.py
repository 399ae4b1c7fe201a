"""scikit-learn's 1797 handwritten digits, upscaled from 8x8 to 32x32, and the split that training and demo share."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["HELD_OUT", "digits", "split"]

HELD_OUT = 540  # 30 % of 1797, and a multiple of many batch sizes


def split() -> tuple[Tensor, Tensor]:
    """Row numbers for training [1257] and held out [540]: stratified by digit, the same on every machine."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    target = load_digits().target
    train, held_out = train_test_split(np.arange(len(target)), test_size=HELD_OUT, stratify=target, random_state=0)
    return torch.from_numpy(np.sort(train)), torch.from_numpy(np.sort(held_out))


def digits(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Images [B 1 32 32] in -1..1 and labels [B] of the given rows."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images).float()[rows, None] / 8 - 1  # the pixels count to 16
    labels = torch.from_numpy(data.target).long()[rows]
    return F.interpolate(images, size=(32, 32), mode="bilinear", align_corners=False), labels
