"""Train the demo model, a Llama of 5.8 M parameters, for a fixed time on a CPU.

WORK is a folder as prepare.py leaves it; OUT receives the model (bfloat16) with its tokenizer.
AdamW under bfloat16 autocast; the learning rate warms up over 100 steps, stays constant for 40 %
of the time and then falls linearly, so the time given is the whole schedule.

    python eval/demo_model/train.py WORK OUT --minutes 72

Shapes: B sequences in a batch, T tokens in a sequence.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEQ_LEN, BATCH = 512, 16
PEAK_LR, MIN_LR_FRACTION = 3e-3, 0.02
WARMUP_STEPS, CONSTANT_SHARE = 100, 0.4
WEIGHT_DECAY, MAX_GRAD_NORM = 0.1, 1.0
NUM_VALIDATION = 64

Tokens = npt.NDArray[np.uint16]


def build_model() -> LlamaForCausalLM:
    """Build the demo model with random weights (float32)."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4096,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=SEQ_LEN,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            rms_norm_eps=1e-5,
        )
    )


def build_optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    """Build AdamW that decays the matrices and leaves the norms alone."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, spent: float) -> float:
    """Return the learning rate of a step (from 0) after a share `spent` of the time.

    >>> learning_rate(0, 0.0), learning_rate(500, 0.3), round(learning_rate(900, 0.7), 6)
    (3e-05, 0.003, 0.0015)
    """
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    decay = max(MIN_LR_FRACTION, (1 - spent) / (1 - CONSTANT_SHARE))
    return PEAK_LR * warmup * (1.0 if spent < CONSTANT_SHARE else decay)


def windows(tokens: Tokens, indices: npt.NDArray[np.int64]) -> Tensor:
    """Return the windows of `SEQ_LEN` tokens with these indices, (B, T) int64."""
    rows = [tokens[i * SEQ_LEN : (i + 1) * SEQ_LEN] for i in indices]
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def batches(tokens: Tokens) -> Iterator[Tensor]:
    """Yield batches (B, T) without end, every window once in a fixed random order, then again."""
    order = np.random.default_rng(0).permutation(len(tokens) // SEQ_LEN)
    start = 0
    while True:
        yield windows(tokens, order[(start + np.arange(BATCH)) % len(order)])
        start += BATCH


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, tokens: Tokens) -> float:
    """Return the mean cross-entropy (nats per token) of up to 64 windows spread over `tokens`."""
    available = len(tokens) // SEQ_LEN
    spread = np.linspace(0, available - 1, min(NUM_VALIDATION, available)).astype(np.int64)
    ids_BT = windows(tokens, spread)
    model.eval()
    total = 0.0
    for part_BT in ids_BT.split(8):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=part_BT).logits
        predicted = logits[:, :-1].float().flatten(0, 1)
        expected = part_BT[:, 1:].flatten()
        total += functional.cross_entropy(predicted, expected, reduction="sum").item()
    model.train()
    return total / (len(ids_BT) * (SEQ_LEN - 1))


def train(model: LlamaForCausalLM, tokens: Tokens, minutes: float) -> int:
    """Train a model in place for a time, counted from the end of the first step; return the steps.

    The first step compiles the model, which takes about a minute and is no part of the schedule.
    """
    model.train()
    optimizer = build_optimizer(model)
    compiled = torch.compile(model)
    start, step, spent = 0.0, 0, 0.0
    for ids_BT in batches(tokens):
        rate = learning_rate(step, spent)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step == 1:
            start = time.monotonic()
        if step % 100 == 0:
            print(f"step {step} loss {loss.item():.3f} lr {rate:.1e}", flush=True)
        spent = (time.monotonic() - start) / (60 * minutes)
        if spent >= 1:
            break
    return step


def read_tokens(path: Path) -> Tokens:
    """Read a flat uint16 file; raise ValueError where it is shorter than one window."""
    tokens = np.fromfile(path, dtype=np.uint16)
    if len(tokens) < SEQ_LEN:
        raise ValueError(
            f"{path} holds {len(tokens)} tokens; at least {SEQ_LEN} are needed. "
            "Give prepare.py more books."
        )
    return tokens


def main() -> None:
    """Read the command line, train, measure and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("work", type=Path, help="folder that prepare.py wrote")
    parser.add_argument("out", type=Path, help="folder to write the model to")
    parser.add_argument("--minutes", type=float, default=72.0)
    args = parser.parse_args()
    try:
        tokens, held_out = (read_tokens(args.work / name) for name in ("train.bin", "val.bin"))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    torch.manual_seed(0)
    model = build_model()
    steps = train(model, tokens, args.minutes)
    loss = validation_loss(model, held_out)
    print(f"steps {steps}, held-out loss {loss:.4f}, perplexity {math.exp(loss):.2f}")
    model.bfloat16().save_pretrained(args.out)
    PreTrainedTokenizerFast.from_pretrained(args.work / "tokenizer").save_pretrained(args.out)


if __name__ == "__main__":
    main()
