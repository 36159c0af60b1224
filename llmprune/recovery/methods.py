"""The ways to train a pruned model, as one table."""

from __future__ import annotations

from llmprune.base.registry import Registry
from llmprune.recovery.types import Recovery

PERP = (
    "Zimmer et al., PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs, "
    "arXiv:2312.15230"
)
LORA = "Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, arXiv:2106.09685"

RECOVERIES: Registry[Recovery] = Registry(
    "recover.method",
    {
        "mask-lora": Recovery(
            title="Masked LoRA",
            summary="low-rank updates that the stored masks cut, trained as they will be merged",
            paper=PERP,
            adapter="mask-lora",
            trains=("norms",),
            learning_rate=5e-4,
        ),
        "lora": Recovery(
            title="LoRA",
            summary="low-rank updates; of smaller tensors only, for a merge fills zeros",
            paper=LORA,
            adapter="lora",
            fills=True,
            learning_rate=5e-4,
        ),
        "lora-prune": Recovery(
            title="LoRA, cut at the merge",
            summary="low-rank updates trained whole, and cut by the masks when merged",
            paper=PERP,
            adapter="lora-prune",
            learning_rate=5e-4,
        ),
        "loraprune": Recovery(
            title="LoRAPrune",
            summary="low-rank updates, by whose gradients whole units go on the way",
            paper="Zhang et al., LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient "
            "Fine-Tuning",
            adapter="mask-lora",
            units=True,
            rank=8,
            alpha=16.0,
            learning_rate=3e-4,
        ),
        "scale-lora": Recovery(
            title="ScaleLoRA",
            summary="weights times a low-rank matrix that begins as ones (its rank stays 1)",
            paper=PERP,
            adapter="scale-lora",
            learning_rate=5e-4,
        ),
        "hira": Recovery(
            title="HiRA",
            summary="weights times one plus a low-rank matrix",
            paper="Huang et al., HiRA: Parameter-Efficient Hadamard High-Rank Adaptation",
            adapter="hira",
            learning_rate=3e-3,
        ),
        "ia3": Recovery(
            title="(IA)3",
            summary="a factor for every output of keys, values and the wide half of FFNs",
            paper="Liu et al., Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than "
            "In-Context Learning",
            adapter="ia3",
            learning_rate=1e-2,
        ),
        "shira": Recovery(
            title="SHiRA",
            summary="a drawn few of the kept weights",
            paper="Bhardwaj et al., Sparse High Rank Adapters",
            adapter="shira",
            learning_rate=1e-3,
        ),
        "norms": Recovery(
            title="Norms",
            summary="the weights of norms alone",
            paper=PERP,
            trains=("norms",),
            learning_rate=5e-3,
        ),
        "biases": Recovery(
            title="Biases",
            summary="the biases that the model has",
            paper=PERP,
            trains=("biases",),
            learning_rate=2e-3,
        ),
        "head": Recovery(
            title="Head",
            summary="the final matrix alone",
            paper=PERP,
            trains=("head",),
            learning_rate=5e-4,
        ),
        "full": Recovery(
            title="All kept weights",
            summary="every parameter in blocks, pruned weights held at zero",
            paper="Kurtic et al., Sparse Fine-tuning for Inference Acceleration of Large Language "
            "Models",
            trains=("weights", "norms", "biases"),
            learning_rate=2e-4,
        ),
    },
)
