"""A run folder reads back bit for bit, and everything that can be wrong with one is said in a sentence."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat.checkpoint import load_run
from nanochat.errors import UserError
from nanochat.model import GPTConfig
from nanochat.run_folder import find_checkpoint
from nanochat.training.checkpoint_io import WholeFileIO
from tests.inference.helpers import random_gpt, write_run
from tests.runs import same

TINY = GPTConfig(vocab_size=32, dim=16, n_layers=2, n_heads=2, n_kv_heads=1, ffn_dim=24, seq_len=16)


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", random_gpt(TINY), objectives={"mtp.proj.weight": torch.ones(2, 3)})


def test_reads_back_the_same_network(run, tmp_path):
    tokens = torch.arange(10)[None]
    expected = random_gpt(TINY)(tokens)
    link = tmp_path / "latest"
    link.symlink_to("run")
    for path in (run, link, run / "checkpoints", run / "checkpoints" / "last.ckpt"):
        loaded = load_run(path)
        assert torch.equal(loaded.gpt(tokens), expected)
        assert loaded.config == TINY
        assert loaded.meta["step"] == 7
        assert torch.equal(loaded.objectives["mtp.proj.weight"], torch.ones(2, 3))


def test_picks_the_checkpoint_that_is_asked_for(run):
    other = random_gpt(TINY, seed=5)
    write_run(run, other, name="step=20")
    for which in (20, "20", "step=20"):
        assert torch.equal(load_run(run, which).gpt.embedding.weight, other.embedding.weight)
    with pytest.raises(UserError, match=r"no checkpoint 'step=30'; it has last, step=20"):
        load_run(run, 30)


@pytest.mark.parametrize("typed", ["checkpoints/last.ckpt", "checkpoints/step=20"])
def test_a_path_is_not_a_step(run, typed):
    with pytest.raises(UserError, match=rf"no checkpoint 'step={typed.removesuffix('.ckpt')}'; it has last"):
        load_run(run, typed)


def test_a_file_has_no_step_to_choose(run):
    path = run / "checkpoints" / "last.ckpt"
    assert find_checkpoint(path) == (run, path)
    with pytest.raises(UserError, match=r"^--checkpoint 99 names a step .*, and .*last\.ckpt is a file\.$"):
        load_run(path, 99)


def test_says_what_is_missing(run, tmp_path):
    with pytest.raises(UserError, match="no run at"):
        load_run(tmp_path / "nowhere")
    dangling = tmp_path / "latest"
    dangling.symlink_to("gone")
    with pytest.raises(UserError, match="a link to a folder that is gone"):
        load_run(dangling)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not a run folder"):
        load_run(tmp_path / "empty")
    with pytest.raises(UserError, match="not a run"):
        load_run(run / "model.json")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint yet"):
        load_run(run)
    with pytest.raises(UserError, match="no tokenizer"):
        _ = load_run(write_run(tmp_path / "other", random_gpt(TINY))).tokenizer


def test_says_when_the_weights_are_of_another_model(run):
    GPTConfig(**{**vars(TINY), "ffn_dim": 32}).to_json(run / "model.json")
    with pytest.raises(UserError, match=r"gate\.weight is 24x16 instead of 32x16.*and 3 more"):
        load_run(run)
    GPTConfig(**{**vars(TINY), "n_layers": 3}).to_json(run / "model.json")
    with pytest.raises(UserError, match="missing"):
        load_run(run)


def test_refuses_a_newer_format_and_other_files(run):
    path = run / "checkpoints" / "last.ckpt"
    write_run(run, random_gpt(TINY), nanochat_format=2)
    with pytest.raises(UserError, match="format 2"):
        load_run(run)
    torch.save({"weights": 1}, path)
    with pytest.raises(UserError, match="no state_dict"):
        load_run(run)
    torch.save(torch.ones(3), path)
    with pytest.raises(UserError, match="not a nanochat checkpoint"):
        load_run(run)


@pytest.mark.parametrize("form", ["archive", "torch before archives", 0, 1, 2, 4, 5])
def test_code_is_refused_by_its_name(run, form):
    """Whatever a pickle is wrapped in, and of whichever protocol."""

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {run}/owned",)

    path, content = run / "checkpoints" / "last.ckpt", {"state_dict": {"gpt.x": torch.ones(2), "gpt.y": Evil()}}
    if isinstance(form, int):
        path.write_bytes(pickle.dumps({"state_dict": Evil()}, protocol=form))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "archive")
    sentence = r"last\.ckpt holds code \(posix\.system\); refused, and nothing of it was executed\.$"
    with pytest.raises(UserError, match=sentence):
        load_run(run)
    assert not (run / "owned").exists()


def test_tensors_without_an_archive_are_not_called_code(run):
    torch.save({"state_dict": {}}, run / "checkpoints" / "last.ckpt", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"is truncated, damaged, or not a nanochat checkpoint\.$"):
        load_run(run)


def test_a_checkpoint_without_checksums_loads_with_a_warning(run, caplog):
    torch.serialization.set_crc32_options(False)
    try:
        write_run(run, random_gpt(TINY))
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(load_run(run).gpt.embedding.weight, random_gpt(TINY).embedding.weight)
    assert "has no checksums: damage in it would go unnoticed." in caplog.text


def test_4_kb_overwritten_anywhere_are_noticed(run):
    """By every reader: all of them come through load_run or the Trainer's CheckpointIO."""
    _, path = find_checkpoint(write_run(run, random_gpt(GPTConfig(**{**vars(TINY), "dim": 64}))))
    whole = path.read_bytes()
    for start in range(0, len(whole) - 4096, 2048):
        path.write_bytes(whole[:start] + bytes(b ^ 0x55 for b in whole[start : start + 4096]) + whole[start + 4096 :])
        for read in (lambda: load_run(run), lambda: WholeFileIO().load_checkpoint(path)):
            with pytest.raises(UserError, match="damaged"):
                read()


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99, -1])
def test_a_truncated_checkpoint_is_a_user_error(run, keep):
    path = run / "checkpoints" / "last.ckpt"
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(UserError, match="truncated, damaged, or not"):
        load_run(run)


def test_a_damaged_last_one_names_an_older_one(run):
    older = random_gpt(TINY, seed=5)
    write_run(run, older, name="step=20")
    last = run / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"not a nanochat checkpoint\. --checkpoint 20 reads an older one"):
        load_run(run)
    with pytest.raises(UserError, match=r"not a nanochat checkpoint\.$"):
        load_run(last)


def test_a_changed_tensor_is_noticed(run):
    """torch.load alone reads what is there."""
    _, path = find_checkpoint(run)
    values = random_gpt(TINY).embedding.weight.detach().numpy().tobytes()
    content = path.read_bytes()
    place = content.index(values)
    path.write_bytes(content[:place] + bytes(len(values)) + content[place + len(values) :])
    assert torch.equal(torch.load(path, weights_only=True)["state_dict"]["gpt.embedding.weight"], torch.zeros(32, 16))
    with pytest.raises(UserError, match=r"is damaged: the checksum of last/data/\d+ does not match\.$"):
        load_run(run)
    path.write_bytes(content)
    load_run(run)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_are_noticed_or_change_nothing(run, data):
    _, path = find_checkpoint(run)
    expected = random_gpt(TINY)
    write_run(run, expected)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        same(load_run(run).gpt.state_dict(), expected.state_dict())
