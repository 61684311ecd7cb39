"""Random tokens that are ready on the device: training without a corpus, for benches and the doctor."""

from __future__ import annotations

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from nanochat.data.dataset import TrainBatches
from nanochat.model import GPTConfig


class RandomTokens(LightningDataModule):
    """`count` micro-batches of random tokens on a device, cut by the training loader's own code and kept ready."""

    def __init__(self, config: GPTConfig, batch: int, count: int, device: torch.device) -> None:
        super().__init__()
        size = batch * count * config.seq_len
        tokens = np.random.default_rng(0).integers(config.vocab_size, size=size + 2 * config.seq_len)
        self.source = TrainBatches(tokens, config.seq_len, batch, seed=0, vocab_size=config.vocab_size)
        self.batches = [
            {name: tensor.to(device) for name, tensor in self.source.batch(i).items()} for i in range(count)
        ]
        self.consumed = 0
        self.eot_id = None

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]
