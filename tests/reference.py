"""The reference for numerics: `transformers` models with the same weights, read by an independent path."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from transformers.initialization import no_init_weights

from kernels.linear import WeightFormat
from tandem.config import packed_dir
from tandem.model_files import resolve_model
from tandem.models.loader import Dtype, LoadedModel, load_model


@cache
def smollm2(dtype: Dtype, form: WeightFormat | None = None) -> LoadedModel:
    """Tandem's own SmolLM2, loaded once for all tests of a run. Raises ModelError unless `tandem pull` fetched it."""
    return load_model(resolve_model("smollm2-135m"), dtype, form, packed_dir())


def hf_reference(path: Path, dtype: str) -> Any:
    """The `transformers` model of a Llama GGUF file or a Hugging Face directory, in "bf16" or "fp32", with eager attention.

    GGUF is read with the gguf package's own reader, not with Tandem's.
    """
    torch_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    if path.is_dir():
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch_dtype, attn_implementation="eager")
        return model.eval()
    reader = gguf.GGUFReader(path)

    def field(name: str) -> Any:
        return reader.fields[f"llama.{name}"].contents()

    heads, kv_heads = field("attention.head_count"), field("attention.head_count_kv")
    config = transformers.LlamaConfig(
        vocab_size=field("vocab_size"),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=field("context_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        tie_word_embeddings=not any(tensor.name == "output.weight" for tensor in reader.tensors),
        attn_implementation="eager",
    )
    names = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
    }
    state: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        value = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        parts = tensor.name.split(".")
        name = names[parts[-2]]
        if parts[0] == "blk":
            name = f"model.layers.{parts[1]}.{name}"
        count = {"attn_q": heads, "attn_k": kv_heads}.get(parts[-2])
        if count:
            value = value.reshape(count, value.shape[0] // count // 2, 2, -1).swapaxes(1, 2).reshape(value.shape)
        state[f"{name}.{parts[-1]}"] = torch.from_numpy(np.ascontiguousarray(value))
    with no_init_weights():
        model = transformers.LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    # As from_pretrained does it: parameters are cast, the rotary frequencies stay fp32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch_dtype)
    return model.eval()
