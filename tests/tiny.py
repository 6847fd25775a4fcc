"""Tiny random models of every supported family, and the packaged real one."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lmpatch.models.lm import LM
from lmpatch.models.load import load, wrap

LAYERS, D_MODEL, D_FF, VOCAB, POSITIONS = 4, 64, 128, 304, 512  # VOCAB is above the tokenizer's 300, as in padded heads
PAD, BOS, EOS = 0, 1, 2
WINDOW = 8

TEXT = (
    "The Eiffel Tower is in Paris, the capital of France.",
    "The Colosseum is in Rome, the capital of Italy.",
    "Danielle Darrieux speaks French and lives in Paris.",
    "The mother tongue of Danielle Darrieux is French.",
    "What is the capital of Japan? The capital of Japan is Tokyo.",
    "The Space Needle is in Seattle. Steve Jobs founded Apple.",
)

_LLAMA = dict(
    hidden_size=D_MODEL, intermediate_size=D_FF, num_hidden_layers=LAYERS, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=POSITIONS,
)  # fmt: skip
_GPT = dict(n_embd=D_MODEL, n_layer=LAYERS, n_head=4, n_inner=D_FF, n_positions=POSITIONS)
_GEMMA = dict(query_pre_attn_scalar=16, sliding_window=WINDOW, tie_word_embeddings=True) | {
    "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2)
}

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {  # family -> (config class, settings)
    "llama": ("LlamaConfig", _LLAMA),
    "mistral": ("MistralConfig", _LLAMA | {"sliding_window": WINDOW}),
    "qwen2": ("Qwen2Config", {k: v for k, v in _LLAMA.items() if k != "head_dim"}),
    "qwen3": ("Qwen3Config", _LLAMA),
    "gemma2": ("Gemma2Config", _LLAMA | _GEMMA),
    "gemma3": ("Gemma3TextConfig", _LLAMA | _GEMMA),
    "phi3": ("Phi3Config", {k: v for k, v in _LLAMA.items() if k != "head_dim"}),
    "gpt2": ("GPT2Config", _GPT),
    "gpt_neox": (
        "GPTNeoXConfig",
        {k: v for k, v in _LLAMA.items() if k not in ("head_dim", "num_key_value_heads")},
    ),
    "gptj": ("GPTJConfig", _GPT | {"rotary_dim": 8}),
    "bloom": ("BloomConfig", dict(hidden_size=D_MODEL, n_layer=LAYERS, n_head=4)),  # ALiBi: no window, a bias a head
    "opt": (
        "OPTConfig",
        dict(hidden_size=D_MODEL, word_embed_proj_dim=D_MODEL, ffn_dim=D_FF, num_hidden_layers=LAYERS)
        | dict(num_attention_heads=4, max_position_embeddings=POSITIONS),
    ),
}
FAMILIES = [family for family in SHAPES if family != "bloom"]
CORE = ["llama", "gemma3", "gpt2"]


def tiny_model(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> Any:
    """A random model of ``family``, lively enough that a mistake moves its logits; ``settings`` override its config."""
    name, shape = SHAPES[family]
    ids = dict(vocab_size=VOCAB, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    spread = {"init_std" if family == "opt" else "initializer_range": 0.2}
    config = getattr(transformers, name)(**(shape | ids | spread | settings))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:  # norms start at a constant and biases at zero, which would hide mistakes
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval()


@cache
def _tokenizer_json() -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    return str(tokenizer.to_str())


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 tokens; it encodes any text and puts ``<bos>`` in front."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json()),
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_input_names=["input_ids", "attention_mask"],
    )


@cache
def _untouched(family: str, dtype: torch.dtype, seed: int) -> LM:
    return wrap(tiny_model(family, dtype, seed), tiny_tokenizer(), name=f"tiny-{family}")


def tiny_lm(family: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> LM:
    """A random 4-layer model of ``family`` (see ``FAMILIES``) with the tiny tokenizer, ready for every method.

    A copy of its own each time: making one and finding its layout takes six times as long.
    """
    kept = _untouched(family, dtype, seed)
    return LM(deepcopy(kept.model), tiny_tokenizer(), kept.layout, kept.name)


TEMPLATE = "{{ bos_token }}user: {{ messages[0]['content'] }} model: "


def chat_lm(raw: bool = False, template: str | None = TEMPLATE) -> LM:
    """A small model with a chat template."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return wrap(tiny_model("llama"), tokenizer, raw=raw)


@cache
def real_gemma() -> LM:
    """The packaged Gemma-3-270M in fp32, loaded once for all tests marked ``real``. Leave it as you found it."""
    return load("gemma-3-270m")
