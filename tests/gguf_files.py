"""Tiny ``.gguf`` files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import tiny_lm

from lmpatch.models.lm import LM


def write_gguf(path: Path, seed: int = 0, *, vocab_size: bool = True) -> LM:
    """A tiny Qwen2 as .gguf (its projections are stored as they are, Llama's are permuted); returns the original."""
    gguf = pytest.importorskip("gguf")
    lm = tiny_lm("qwen2", seed=seed)
    lm.model.config.tie_word_embeddings = False
    config, tokenizer = lm.model.config, lm.tokenizer
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if vocab_size:
        writer.add_vocab_size(config.vocab_size)
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    filler = [f"<unused{i}>" for i in range(config.vocab_size - len(vocab))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([token for token, _ in vocab] + filler)
    writer.add_token_types([3, 3, 3] + [1] * (len(vocab) - 3) + [5] * len(filler))
    merges = json.loads(tokenizer._tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, parameter in lm.model.named_parameters():
        stem, _, suffix = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", parameter.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return lm
