"""The safetensors folder in the real `transformers`."""

from __future__ import annotations

import pytest
import torch
import transformers

from nanochat.export.huggingface import export_huggingface
from nanochat.inference.engine import inference_copy


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_transformers_computes_our_logits(name, runs, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = runs(name)
    folder = export_huggingface(run, tmp_path / "hf").path
    tokens = corpus[-256:][None]
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    ours = inference_copy(run.gpt, "none")(tokens)
    theirs = model.eval()(tokens).logits
    print(f"max |difference| {(ours - theirs).abs().max():.2e}")
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("def f(x):\n    return x  # é 😀\n", " a  b", "it's 123"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids == run.tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == run.tokenizer.eot_id
    written = model.generate(tokens[:, :20], max_new_tokens=20, do_sample=False)
    assert written.shape[1] > 20
