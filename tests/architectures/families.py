# ruff: noqa: C408 (values are named as the configurations' arguments are)
"""The model families that the matrix trains, each as the smallest configuration that has all its kinds of layers.

A new family is a line: its `model_type` and the values of its configuration. Sizes that depend on the tokenizer
(vocabulary, ids of special tokens) are filled in by `write_model`.
"""

import json
import shutil
from pathlib import Path
from typing import Any

Values = dict[str, Any]
PLAIN: Values = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, max_position_embeddings=128)  # fmt: skip
HEADS: Values = dict(PLAIN, head_dim=8)
SLIDING: Values = dict(HEADS, sliding_window=3)
"""The window is shorter than the rows of every task, and so is every other window below."""
MIXED: Values = dict(SLIDING, layer_types=["sliding_attention", "full_attention"])
GEMMA: Values = dict(MIXED, query_pre_attn_scalar=8)
EXPERTS: Values = dict(HEADS, num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
                       moe_intermediate_size=32, output_router_logits=True, router_aux_loss_coef=0.02)  # fmt: skip
SILENT: Values = dict(EXPERTS, output_router_logits=False)
GROUPED: Values = dict(SILENT, first_k_dense_replace=1, n_group=1, topk_group=1, n_shared_experts=1)
LINEAR: Values = dict(layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
                      linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
                      linear_conv_kernel_dim=4)  # fmt: skip
GEMMA4: Values = dict(MIXED, hidden_size_per_layer_input=8, global_head_dim=16, num_global_key_value_heads=2,
                      num_kv_shared_layers=0)  # fmt: skip
VISION: Values = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                      patch_size=14)  # fmt: skip
MAMBA: Values = dict(PLAIN, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_expand=2, mamba_n_groups=1,
                     layer_types=["mamba", "attention"])  # fmt: skip
SMALL: Values = dict(n_embd=32, n_layer=2, n_head=4, n_positions=128, n_ctx=128)

DECODERS: dict[str, Values] = {
    "llama": PLAIN, "mistral": SLIDING,
    "qwen2": dict(PLAIN, use_sliding_window=True, sliding_window=3, max_window_layers=1),
    "qwen3": HEADS, "gemma": HEADS, "gemma2": dict(GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=2.0),
    "gemma3_text": GEMMA, "gemma4_text": GEMMA4, "phi": dict(PLAIN, num_key_value_heads=4), "phi3": PLAIN,
    "olmo": PLAIN, "olmo2": PLAIN, "olmo3": MIXED, "granite": PLAIN, "smollm3": HEADS, "glm": HEADS, "glm4": HEADS,
    "cohere": PLAIN, "cohere2": MIXED, "ministral3": HEADS, "seed_oss": HEADS, "ernie4_5": HEADS, "exaone4": MIXED,
    "hunyuan_v1_dense": HEADS, "apertus": HEADS, "arcee": HEADS, "helium": HEADS, "nemotron": PLAIN,
    "stablelm": PLAIN, "starcoder2": SLIDING, "persimmon": PLAIN, "gpt2": SMALL, "gpt_neox": PLAIN,
    "gpt_neo": dict(hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=128, window_size=3,
                    attention_types=[[["global", "local"], 1]]),
    "gptj": dict(SMALL, rotary_dim=4), "codegen": dict(SMALL, rotary_dim=4),
    "gpt_bigcode": SMALL, "falcon": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=1),
    "bloom": dict(hidden_size=32, n_layer=2, n_head=4), "mpt": dict(d_model=32, n_layers=2, n_heads=4, max_seq_len=128),
    "opt": dict(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128,
                word_embed_proj_dim=32),
    "xglm": dict(d_model=32, ffn_dim=64, num_layers=2, attention_heads=4, max_position_embeddings=128),
    "qwen2_moe": dict(EXPERTS, shared_expert_intermediate_size=32), "qwen3_moe": dict(EXPERTS, decoder_sparse_step=1),
    "mixtral": EXPERTS, "olmoe": EXPERTS, "granitemoe": EXPERTS, "phimoe": EXPERTS, "minimax_m2": EXPERTS,
    "gpt_oss": dict(EXPERTS, sliding_window=3, layer_types=MIXED["layer_types"]),
    "llama4_text": dict(SILENT, intermediate_size_mlp=64, interleave_moe_layer_step=2, attention_chunk_size=4),
    "glm4_moe": GROUPED,
    "dots1": dict(GROUPED, sliding_window=3, layer_types=MIXED["layer_types"]),
    "deepseek_v3": dict(GROUPED, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
                        qk_nope_head_dim=8, v_head_dim=8),
    "qwen3_5_text": dict(HEADS, **LINEAR),
    "qwen3_5_moe_text": dict(EXPERTS, shared_expert_intermediate_size=32, **LINEAR),
    "qwen3_next": dict(EXPERTS, shared_expert_intermediate_size=32, decoder_sparse_step=1, **LINEAR),
    "lfm2": dict(HEADS, layer_types=["conv", "full_attention"], conv_L_cache=3),
    "granitemoehybrid": dict(MAMBA, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=32),
    "nemotron_h": dict(HEADS, layers_block_type=["mamba", "attention"], mamba_num_heads=8, mamba_head_dim=8,
                       ssm_state_size=8, n_groups=1),
    "falcon_h1": dict(HEADS, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1),
    "mamba2": dict(hidden_size=32, state_size=8, num_hidden_layers=2, num_heads=8, head_dim=8, expand=2, n_groups=1),
    "gemma3": dict(text_config=GEMMA, vision_config=VISION, mm_tokens_per_image=4),
    "gemma4": dict(text_config=GEMMA4, vision_config=VISION, audio_config=None),
    "qwen3_5": dict(text_config=dict(HEADS, **LINEAR), vision_config=dict(depth=1, hidden_size=16, num_heads=2,
                    intermediate_size=32, out_hidden_size=32)),
}  # fmt: skip

BERT: Values = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                    max_position_embeddings=128)  # fmt: skip
ROBERTA: Values = dict(BERT, type_vocab_size=1, max_position_embeddings=132)
DEBERTA: Values = dict(BERT, relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0)
ENCODERS: dict[str, Values] = {
    "bert": BERT, "roberta": ROBERTA, "xlm-roberta": ROBERTA, "camembert": ROBERTA,
    "roberta-prelayernorm": ROBERTA, "ernie": BERT, "electra": dict(BERT, embedding_size=16),
    "albert": dict(BERT, embedding_size=16), "mpnet": ROBERTA, "megatron-bert": BERT, "roformer": dict(BERT),
    "distilbert": dict(dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=128),
    "deberta": DEBERTA, "deberta-v2": dict(DEBERTA, position_buckets=32),
    "modernbert": dict(BERT, global_attn_every_n_layers=2, local_attention=4),
    "xlnet": dict(d_model=32, n_layer=2, n_head=4, d_inner=64),
}  # fmt: skip

PAIR: Values = dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                    decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64,
                    max_position_embeddings=128)  # fmt: skip
T5: Values = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
PAIRS: dict[str, Values] = {
    "t5": T5, "mt5": T5, "umt5": T5, "bart": PAIR, "mbart": PAIR, "marian": PAIR, "pegasus": PAIR, "blenderbot": PAIR,
    "m2m_100": dict(PAIR, encoder_layerdrop=0.5, decoder_layerdrop=0.5),
}  # fmt: skip

FAMILIES: dict[str, Values] = {**DECODERS, **ENCODERS, **PAIRS}

PUBLISHED_BESIDE: dict[str, Values] = {"gpt_neox": dict(rotary_pct=0.25), "cohere2": dict(rotary_pct=1.0),
                                       "minimax_m2": dict(rotary_dim=8)}  # fmt: skip
"""What their published configurations say, and transformers 5 writes under another name alone."""


def auto_class(name: str) -> Any:
    """transformers' class for a family as it is published."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if name in PAIRS else AutoModel if name in ENCODERS else AutoModelForCausalLM


def write_model(name: str, folder: Path, tokenizer: Path) -> Path:
    """A model of random weights beside a tokenizer's files."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    known = AutoTokenizer.from_pretrained(tokenizer)
    first = known.bos_token_id if known.bos_token_id is not None else known.cls_token_id
    last = known.eos_token_id if known.eos_token_id is not None else known.sep_token_id
    ids = dict(vocab_size=len(known), pad_token_id=known.pad_token_id, bos_token_id=first, eos_token_id=last)
    values = dict(FAMILIES[name])
    if "text_config" in values:
        inner = values["text_config"] = dict(values["text_config"])
    else:
        inner = values
    inner |= ids
    if "hidden_size_per_layer_input" in inner:
        inner["vocab_size_per_layer_input"] = len(known)
    if name in PAIRS:
        values |= dict(decoder_start_token_id=known.pad_token_id, forced_eos_token_id=last)
    if name == "marian":
        values["decoder_vocab_size"] = len(known)
    if name == "modernbert":
        values |= dict(cls_token_id=first, sep_token_id=last)
    torch.manual_seed(0)
    model = auto_class(name).from_config(AutoConfig.for_model(name, **values))
    with torch.no_grad():
        for parameter in model.parameters():  # at the usual 0.02 nothing that goes wrong would show in a loss
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    if name in PUBLISHED_BESIDE:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **PUBLISHED_BESIDE[name]}))
    for file in tokenizer.iterdir():
        shutil.copy(file, folder / file.name)
    return folder


def unlisted() -> list[str]:
    """Families of the installed transformers that make a causal model, a masked one or an encoder-decoder of text, and
    are not listed here."""
    from transformers.models.auto import modeling_auto as auto

    known = {
        name
        for table in (
            auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
            auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        )
        for name in table
    }
    return sorted(known - FAMILIES.keys())
