"""Small models that tests train, with one token a word: what ``trained``, ``people`` and ``toy_facts`` share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token a word."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *words])}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def trained_llama(
    tokenizer: PreTrainedTokenizerFast, seed: int, loss: Callable[[Any], Tensor], *,
    steps: int, warm: int, rate: float, decay: float,
) -> LlamaForCausalLM:  # fmt: skip
    """A Llama of four blocks that has learned by AdamW: up to the full rate, then down in a line.

    Args:
        loss: of the model, at one step.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=4,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                pad_token_id=0, bos_token_id=1, eos_token_id=2,
            )
        )  # fmt: skip
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / warm, (steps - step) / (steps - warm))
        value = loss(model)
        optimiser.zero_grad()
        value.backward()
        optimiser.step()
    return model.eval()
