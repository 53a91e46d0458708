"""Every causal-LM family of the installed transformers as a tiny model, and what must hold of each."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


# Sizes by the names that families have for them; each takes those that it knows.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "dim_model", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "dim_ff"), 64),
    **dict.fromkeys(("ffn_hidden_size", "dff", "intermediate_size_mlp", "mlp_hidden_size", "feed_forward_size"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "multi_query_num_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "dim_head", "kv_channels", "attention_head_size"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "num_shared_experts"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("tie_word_embeddings", "tie_encoder_decoder"), False),
    **dict.fromkeys(
        ("linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads", "linear_num_value_heads"), 4
    ),
    "is_decoder": True,
    "use_cache": True,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
# What a family needs besides.
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}
SLIDING = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "rel_extent": 16}
OWN_SIZES: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), ROPE),
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_top_k": 2},
    },
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "gemma3n_text": {
        **{"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "laurel_rank": 8},
        **{"vocab_size_per_layer_input": 360, "layer_types": ["sliding_attention", "full_attention"]},
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {
        **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 360},
        **{"layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 8},
    },
    "gemma4_unified_text": {"layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**MAMBA, "layer_types": ["mamba", "attention"], "logits_scaling": 2.0},
    "inkling2_text": {**SLIDING, "unpadded_vocab_size": 360},
    "inkling_text": SLIDING,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"num_hidden_layers": 4},
    "longcat_flash": {"expert_ffn_hidden_size": 32, "zero_expert_num": 2, "moe_topk": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "n_groups": 1, "state_size": 16},
    "nemotron_h": {
        **{"mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 1, "ssm_state_size": 16, "chunk_size": 16},
        **{"layers_block_type": ["mamba", "attention", "moe"], "moe_shared_expert_intermediate_size": 32},
    },
    "qwen3_5_moe_text": {"num_hidden_layers": 4},
    "qwen3_5_text": {"num_hidden_layers": 4},
    "qwen3_next": {"num_hidden_layers": 4},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        **{"axial_pos_embds": False, "attn_layers": ["local", "local"], "local_attn_chunk_length": 8},
        "attention_head_size": 8,
    },
    "roc_bert": {"pronunciation_vocab_size": 8, "shape_vocab_size": 8, "concat_input": False},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 4, "mamba_d_state": 16},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


# Not text from the first layer to the head: images, sound, codes of them; bytes that a model of its own puts together;
# and drafts that read another model's states.
NOT_TEXT = """
    blt dots3_note emu3 fuyu gemma3 gemma3n gemma4 gemma4_assistant gemma4_unified gemma4_unified_assistant git
    got_ocr2 llama4 mllama moshi moss_transcribe_diarize musicgen musicgen_melody phi4_multimodal qwen3_5 qwen3_5_moe
    qwen4_exp
"""
# Right, but not to be written with here: transformers' own cache of xLSTM has another shape, and the tiny Qwen4 has no
# layer of attention. Reformer takes only lengths that its chunks divide.
NOT_WRITTEN = ("qwen4_exp_text", "reformer", "xlstm")
OWN_LENGTHS = ("reformer",)
# Those that read the padding behind a shorter row; docs/trainer.md names their classes.
READS_PADDING = {"cpmant": "CpmAntForCausalLM"}
# Those whose logits the loss could not read; docs/trainer.md names their classes.
REFUSED = {"prophetnet": "ProphetNetForCausalLM"}
# Those whose rows run into one another where nothing but position ids tells them apart; docs/trainer.md names them.
NOT_APART = {
    "afmoe": "AfmoeForCausalLM",
    "bailing_hybrid": "BailingHybridForCausalLM",
    "bamba": "BambaForCausalLM",
    "bart": "BartForCausalLM",
    "bert": "BertLMHeadModel",
    "bert-generation": "BertGenerationDecoder",
    "big_bird": "BigBirdForCausalLM",
    "bigbird_pegasus": "BigBirdPegasusForCausalLM",
    "biogpt": "BioGptForCausalLM",
    "blenderbot": "BlenderbotForCausalLM",
    "blenderbot-small": "BlenderbotSmallForCausalLM",
    "bloom": "BloomForCausalLM",
    "camembert": "CamembertForCausalLM",
    "cpmant": "CpmAntForCausalLM",
    "data2vec-text": "Data2VecTextForCausalLM",
    "electra": "ElectraForCausalLM",
    "ernie": "ErnieForCausalLM",
    "falcon": "FalconForCausalLM",
    "falcon_h1": "FalconH1ForCausalLM",
    "falcon_mamba": "FalconMambaForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "inkling2_text": "Inkling2ForCausalLM",
    "inkling_text": "InklingForCausalLM",
    "jamba": "JambaForCausalLM",
    "kimi_linear": "KimiLinearForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
    "lfm2_moe": "Lfm2MoeForCausalLM",
    "lfm3": "Lfm3ForCausalLM",
    "mamba": "MambaForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
    "marian": "MarianForCausalLM",
    "mbart": "MBartForCausalLM",
    "megatron-bert": "MegatronBertForCausalLM",
    "minimax": "MiniMaxForCausalLM",
    "mpt": "MptForCausalLM",
    "mvp": "MvpForCausalLM",
    "nemotron_h": "NemotronHForCausalLM",
    "olmo_hybrid": "OlmoHybridForCausalLM",
    "openai-gpt": "OpenAIGPTLMHeadModel",
    "opt": "OPTForCausalLM",
    "pegasus": "PegasusForCausalLM",
    "plbart": "PLBartForCausalLM",
    "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "qwen4_exp_text": "Qwen4ExpForCausalLM",
    "recurrent_gemma": "RecurrentGemmaForCausalLM",
    "rembert": "RemBertForCausalLM",
    "roberta": "RobertaForCausalLM",
    "roberta-prelayernorm": "RobertaPreLayerNormForCausalLM",
    "roc_bert": "RoCBertForCausalLM",
    "roformer": "RoFormerForCausalLM",
    "rwkv": "RwkvForCausalLM",
    "trocr": "TrOCRForCausalLM",
    "xglm": "XGLMForCausalLM",
    "xlm": "XLMWithLMHeadModel",
    "xlm-roberta": "XLMRobertaForCausalLM",
    "xlm-roberta-xl": "XLMRobertaXLForCausalLM",
    "xlnet": "XLNetLMHeadModel",
    "xlstm": "xLSTMForCausalLM",
    "xmod": "XmodForCausalLM",
    "zamba": "ZambaForCausalLM",
    "zamba2": "Zamba2ForCausalLM",
    "zaya": "ZayaForCausalLM",
}


def all_families() -> list[str]:
    """A model type for each class."""
    types: dict[str, str] = {}
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if model_type not in NOT_TEXT.split():
            types[name] = model_type
    return sorted(types.values())


def knows(config: Any, name: str) -> bool:
    """Whether a configuration has such a field, and lets it be set."""
    if isinstance(getattr(type(config), name, None), property):
        return False
    return name in config.to_dict() or name in config.attribute_map


def family_model(model_type: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0, **given: Any) -> Any:
    """A tiny random model of that family in float32, with logits of some size; `given` are fields of its config."""
    kind = CONFIG_MAPPING[model_type]
    known = kind()
    sizes = {"vocab_size": len(tokenizer), **SIZES}
    settings = {name: value for name, value in sizes.items() if knows(known, name)}
    if "kv_lora_rank" in settings:
        settings["num_key_value_heads"] = 4
    config = kind(**{**settings, **OWN_SIZES.get(model_type, {}), **given})
    with torch.device("meta"):
        size = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    assert size < 2**20, f"{model_type} has {size} weights: one of its sizes has a name that is not in SIZES"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None
    )
    return model.eval()
