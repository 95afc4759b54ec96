"""One table of defaults for clients, backends, service and config. Standard library only: config must load fast."""

from __future__ import annotations

RANK = 32
"""Rank of a LoRA adapter; Tinker's."""

ALPHA = 32.0
"""Tinker's alpha; the update is scaled by ``alpha / rank``, so that the learning rate does not depend on the rank."""

TRAIN_ATTN = True
TRAIN_MLP = True

TRAIN_UNEMBED = False
"""No LoRA on the unembedding: Adam moves the rows of tokens that are never sampled as fast as all others, and few
servers load an adapter of lm_head."""

TINKER_TRAIN_UNEMBED = True
"""What the signatures of Tinker's API promise, and so what a client or a request gets that does not say."""

DEVICE = "auto"
DTYPE = "auto"
QUANTIZATION = "none"

MAX_BATCH_SIZE = 64
"""Largest sampling batch of one policy version, in sequences."""

DETERMINISTIC_TOKENS = 4096
"""Tokens that a deterministic step computes together: how much memory is free must not matter."""

LEARNING_RATE = 5e-4
"""Of the NAT trainer, for a model of width 2,000 or less: ten times the 5e-5 of full finetuning.
``training.learning_rate`` has the rates of wider ones (0.00047 for Qwen3-8B, 0.00029 for Llama 8B)."""

BETA1 = 0.9
BETA2 = 0.95
EPS = 1e-8
"""Larger than Tinker's 1e-12: a matrix entry that has hardly any gradient is not moved at the full rate."""

WEIGHT_DECAY = 0.0

GRAD_CLIP_NORM = 1.0
"""TRL's max_grad_norm. Of the NAT trainer, whose loss is a mean over tokens; Tinker's ``AdamParams`` has 0, off."""

DRO_BETA = 0.05
"""Of Tinker's loss ``dro``."""

LR_RISE = 1.25e-4
"""What the NAT trainer's learning rate rises by in a step of its warm-up; LOG.md has the runs that it was chosen by."""

LR_WARMUP_AT_MOST = 16
"""Steps of that warm-up, whatever the rate: a toy model has rates of its own."""

TARGET_KL = 0.2
"""Nats a token, of the NAT trainer; LOG.md has the runs that it was chosen by."""
