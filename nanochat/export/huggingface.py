"""A folder that `transformers` loads: safetensors with the ternary weights de-quantised, as Qwen3 or Llama."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat.checkpoint import Run
from nanochat.errors import UserError
from nanochat.export.gguf import ExportReport, architecture
from nanochat.export.gguf_tensors import (
    Slot,
    embedding_rows,
    network_slots,
    output_rows,
    slot_values,
    split_rows,
    split_slot,
)
from nanochat.files import replacing
from nanochat.model.config import GPTConfig

ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
DTYPES = {"f32": torch.float32, "f16": torch.float16}
_BLOCK = {
    "attention.norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "feedforward.norm": "post_attention_layernorm",
    "feedforward.gate": "mlp.gate_proj",
    "feedforward.up": "mlp.up_proj",
    "feedforward.down": "mlp.down_proj",
}


def names(config: GPTConfig) -> Iterator[tuple[str, str]]:
    """(name in `GPT.state_dict()`, name in the file) of every parameter but the embedding and the output matrix."""
    yield "norm.weight", "model.norm.weight"
    for layer in range(config.n_layers):
        for ours, theirs in _BLOCK.items():
            if config.qk_norm or not ours.endswith(("q_norm", "k_norm")):
                yield f"blocks.{layer}.{ours}.weight", f"model.layers.{layer}.{theirs}.weight"


def parameter_slots(config: GPTConfig) -> dict[str, Slot]:
    """The shapes of the file's parameters, by their names in `GPT.state_dict()`; no head is permuted here."""
    return {slot.source: slot for slot in network_slots(config, "qwen3", "f32")}


def model_kind(config: GPTConfig) -> str:
    """`qwen3` or `llama`; raises `UserError` that names the switch which `transformers` cannot express."""
    kind = architecture(config)
    if kind not in ARCHITECTURES:
        raise UserError("--to safetensors has no layout for model.sub_norm=true; use --to gguf.")
    return kind


def settings(config: GPTConfig, kind: str, eot_id: int, dtype: str) -> dict[str, Any]:
    """`config.json`."""
    return {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_size": config.stream_width,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied and not config.embedding_norm,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "use_sliding_window": False,
        "initializer_range": 0.02,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "torch_dtype": "float16" if dtype == "f16" else "float32",
        "use_cache": True,
        "nanochat": dataclasses.asdict(config),
    }


def tensors(config: GPTConfig, weights: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The tensors of the file: matrices de-quantised, the embedding norm folded into the table."""
    slots = parameter_slots(config)
    result = {"model.embed_tokens.weight": embedding_rows(config, weights, config.embedding_norm)}
    for ours, theirs in names(config):
        result[theirs] = torch.from_numpy(slot_values(slots[ours], config, weights))
    if config.embedding_norm or not config.tied:
        result["lm_head.weight"] = output_rows(config, weights)
    for name, tensor in result.items():
        result[name] = tensor.to(DTYPES[dtype]).contiguous().clone()
        if not torch.isfinite(result[name]).all():
            raise UserError(f"{name} has values that {dtype} cannot hold.")
    return result


def export_huggingface(run: Run, path: str | Path, dtype: str = "f32", *, force: bool = False) -> ExportReport:
    """Write a run as a folder for `transformers`.

    Args:
        run: from `nanochat.checkpoint.load_run`.
        path: the folder to make.
        dtype: f32, or f16 (exact for ternary matrices, rounded for embedding and norms).
        force: replace a folder of an earlier export.

    Raises:
        UserError: a network that has no such layout (naming the switch), a folder that exists, or that cannot be
            written. Nothing is left behind then.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise UserError("safetensors files need a package: pip install 'nanochat[export]'.") from error
    if dtype not in DTYPES:
        raise UserError(f"--type {dtype} is not for safetensors; choose f32 or f16.")
    path = Path(path)
    kind = model_kind(run.config)
    _check_folder(path, force)
    tokenizer = run.tokenizer
    content = tensors(run.config, run.gpt.state_dict(), dtype)
    source = (run.folder / "tokenizer.json").read_text(encoding="utf-8")
    special = [token["content"] for token in json.loads(source).get("added_tokens", [])]
    names_by_id = {token["id"]: token["content"] for token in json.loads(source).get("added_tokens", [])}
    documents = {
        "config.json": settings(run.config, kind, tokenizer.eot_id, dtype),
        "generation_config.json": {
            "bos_token_id": tokenizer.eot_id,
            "eos_token_id": tokenizer.eot_id,
            "do_sample": True,
            "temperature": 0.8,
            "top_p": 0.95,
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": run.config.seq_len,
            "clean_up_tokenization_spaces": False,
            "bos_token": names_by_id.get(tokenizer.eot_id),
            "eos_token": names_by_id.get(tokenizer.eot_id),
            "additional_special_tokens": [t for t in special if t != names_by_id.get(tokenizer.eot_id)],
        },
    }
    try:
        with replacing(path) as aside:
            aside.mkdir()
            for name, document in documents.items():
                (aside / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
            (aside / "tokenizer.json").write_text(source, encoding="utf-8")
            save_file(content, str(aside / "model.safetensors"), metadata={"format": "pt"})
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from error
    parameters = sum(parameter.numel() for parameter in run.gpt.parameters())
    size = sum(file.stat().st_size for file in path.iterdir())
    return ExportReport(path, kind, dtype, size, 2 * parameters, [])


def _check_folder(path: Path, force: bool) -> None:
    if not path.parent.is_dir():
        raise UserError(f"--out {path}: there is no folder {path.parent}.")
    if not path.exists():
        return
    if not force:
        raise UserError(f"{path} exists; use --force to replace it, or --out for another folder.")
    if not path.is_dir() or not (path / "model.safetensors").is_file() or not (path / "config.json").is_file():
        raise UserError(f"{path} is not an exported model, so --force does not replace it; choose another --out.")


def read_huggingface(folder: Path) -> tuple[GPTConfig, dict[str, Tensor], str]:
    """What `export_huggingface` wrote: the network's configuration as it is now, its parameters (matrices
    de-quantised) in float32, and the kind. Raises `UserError` for a folder that is damaged or of another program.
    """
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise UserError("safetensors files need a package: pip install 'nanochat[export]'.") from error
    if missing := [name for name in ("config.json", "model.safetensors") if not (folder / name).is_file()]:
        raise UserError(f"{folder} is not a whole exported model: it has no {' and no '.join(missing)}.")
    try:
        document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        content = load_file(str(folder / "model.safetensors"))
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder} is not a whole exported model: {error}.") from error
    if not isinstance(document, dict) or not isinstance(document.get("nanochat"), dict):
        raise UserError(f"{folder} was not written by nanochat: its config.json has no entry `nanochat`.")
    config = read_config(document["nanochat"], folder)

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in content:
            raise UserError(f"{folder}/model.safetensors has no tensor {name!r}.")
        if content[name].shape != shape:
            found = list(content[name].shape)
            raise UserError(f"{folder}/model.safetensors: {name!r} has the shape {found} instead of {list(shape)}.")
        return content[name].float()

    shape = (config.vocab_size, config.stream_width)
    weights = split_rows(config, tensor("model.embed_tokens.weight", shape))
    slots = parameter_slots(config)
    for ours, theirs in names(config):
        weights |= split_slot(slots[ours], config, tensor(theirs, slots[ours].stored).numpy())
    if "lm_head.weight" in content:
        weights["head.weight"] = tensor("lm_head.weight", shape)[:, : config.dim].clone()
    config = dataclasses.replace(config, embedding_norm=False, tied="head.weight" not in weights)
    return config, weights, str(document.get("model_type"))


def read_config(values: Any, source: Path) -> GPTConfig:
    """The network's configuration inside an exported file; raises `UserError` for one that is damaged."""
    try:
        config = GPTConfig.from_dict(dict(values))
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{source} has a damaged model configuration: {error}.") from error
    if config.seq_len * config.dim > 2**34:
        raise UserError(f"{source} claims a context of {config.seq_len} tokens, which cannot be.")
    return config
