"""Checkpoints are whole or not there: cut short, full disk at every write, damage, and the bytes that come back."""

from __future__ import annotations

import copy
import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlcore.engine import checkpoint
from rlcore.engine.checkpoint import found, load_latest, restore_optimizer, save, why_unusable
from rlcore.engine.errors import SaveError, UserError
from rlcore.engine.model import load


@pytest.fixture
def trained(small):
    """A copy of the small model and an optimizer that has made a step."""
    model = copy.deepcopy(small[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    optimizer.step()
    return model, small[1], optimizer


def save_at(root: Path, step: int, trained, keep: int = 2) -> Path:
    return save(root, step, *trained, keep)


def test_round_trip_is_exact(tmp_path, trained):
    model, tokenizer, optimizer = trained
    path = save_at(tmp_path, 7, trained)
    saved = load_latest(tmp_path, pytest.fail)
    assert saved == (path, 7)
    again, tokens = load(path / "model")
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)
    assert tokens("1 + 2 =")["input_ids"] == tokenizer("1 + 2 =")["input_ids"]
    assert tokens.decode(tokens("a\n b")["input_ids"]) == "a\n b"
    fresh = torch.optim.AdamW(again.parameters(), lr=1e-3)
    restore_optimizer(path / "optimizer.safetensors", again, fresh)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert optimizer.state[p].keys() == fresh.state[q].keys()
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, fresh.state[q][key])


def test_nothing_is_pickled(tmp_path, trained):
    path = save_at(tmp_path, 1, trained)
    assert {file.suffix for file in path.rglob("*") if file.is_file()} <= {".json", ".safetensors", ".jinja"}


def test_only_the_last_are_kept(tmp_path, trained):
    for step in (1, 2, 10, 9):
        save_at(tmp_path, step, trained)
    assert [p.name for p in found(tmp_path)] == ["step-000009", "step-000010"]
    assert not list(tmp_path.glob(".*"))
    for step in (11, 999_999, 1_000_000):
        save_at(tmp_path, step, trained, keep=5)
    assert [int(p.name[5:]) for p in found(tmp_path)] == [9, 10, 11, 999_999, 1_000_000]


def test_the_one_just_written_is_always_kept(tmp_path, trained):
    """A damaged checkpoint of a later step neither takes its place nor, once set aside, counts at all."""
    (save_at(tmp_path, 40, trained) / "manifest.json").unlink()
    for step in (10, 20):
        save_at(tmp_path, step, trained, keep=1)
        assert load_latest(tmp_path, lambda _: None).step == step
    (save_at(tmp_path, 40, trained, keep=2) / "manifest.json").unlink()
    for _ in range(2):
        checkpoint.set_aside(tmp_path, after=20)
        assert load_latest(tmp_path, pytest.fail).step == 20
        assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000020", "step-000040.damaged"]
        (tmp_path / "step-000040").mkdir()


def test_cut_short_checkpoints_are_passed_over(tmp_path, trained):
    """Every file, at several lengths: the damage is seen, named, and the checkpoint before is taken."""
    save_at(tmp_path, 1, trained)
    newest = save_at(tmp_path, 2, trained)
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert len(files) >= 6
    for path in files:
        whole = path.read_bytes()
        for length in {0, 1, len(whole) // 2, len(whole) - 1}:
            path.write_bytes(whole[:length])
            messages: list[str] = []
            assert load_latest(tmp_path, messages.append).step == 1
            assert len(messages) == 1 and "cut short" in messages[0] and path.name in messages[0]
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        assert load_latest(tmp_path, lambda _: None).step == 1
        path.unlink()
        assert load_latest(tmp_path, lambda _: None).step == 1
        path.write_bytes(whole)
        assert load_latest(tmp_path, pytest.fail).step == 2


def test_without_a_good_checkpoint_there_is_none(tmp_path, trained):
    assert load_latest(tmp_path / "missing", pytest.fail) is None
    path = save_at(tmp_path, 1, trained)
    (path / "optimizer.safetensors").write_bytes(b"")
    assert load_latest(tmp_path, lambda _: None) is None
    assert "cut short" in why_unusable(path)
    save_at(tmp_path, 1, trained)
    assert load_latest(tmp_path, pytest.fail).step == 1


@pytest.mark.parametrize("number", [None, 1, 999])
def test_another_format_is_refused(tmp_path, trained, number):
    """Neither loaded nor taken for damaged; the first format had a manifest without a number."""
    import json

    save_at(tmp_path, 1, trained)
    manifest = save_at(tmp_path, 2, trained) / "manifest.json"
    content = json.loads(manifest.read_text())
    assert content["format"] == checkpoint.VERSION
    manifest.write_text(json.dumps(content["files"] if number is None else {**content, "format": number}))
    with pytest.raises(
        UserError, match=rf"another version.* format {number or 1}, this one reads {checkpoint.VERSION}"
    ):
        load_latest(tmp_path, pytest.fail)


def test_a_state_of_another_model_is_refused(tmp_path, trained):
    """The parameters that the model does not have are named, and those of another shape."""
    model = trained[0]
    path = save_at(tmp_path, 1, trained)
    other = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(7, 32)})})
    with pytest.raises(UserError, match=r"another model.*layers\.0\..* and \d+ more"):
        restore_optimizer(path / "optimizer.safetensors", other, torch.optim.AdamW(other.parameters()))
    wider = copy.deepcopy(model)
    wider.model.norm.weight = torch.nn.Parameter(torch.ones(33))
    with pytest.raises(UserError, match=r"model\.norm\.weight/exp_avg \(32,\) for \(33,\)"):
        restore_optimizer(path / "optimizer.safetensors", wider, torch.optim.AdamW(wider.parameters()))


class FullDisk:
    """Every call that writes, counted; call number `at` fails with ENOSPC after writing half of its bytes."""

    def __init__(self, monkeypatch, at: int) -> None:
        self.count, self.at = 0, at
        for owner, name in (
            (Path, "write_text"), (Path, "write_bytes"), (Path, "mkdir"), (os, "replace"), (os, "fsync"),
            (checkpoint, "save_model"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, call):
        def limited(*args, **kwargs):
            self.count += 1
            if self.count != self.at:
                return call(*args, **kwargs)
            if isinstance(args[0], Path) and len(args) > 1 and isinstance(args[1], (str, bytes)):
                with args[0].open("wb") as file:
                    file.write(b"x" * (len(args[1]) // 2))
            raise OSError(errno.ENOSPC, "No space left on device")

        return limited


def test_full_disk_at_every_write(tmp_path, trained):
    """Whichever write fails: a clear error, nothing left behind, the checkpoint before intact; then it works again."""
    save_at(tmp_path, 1, trained)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    writes = 0
    while True:
        writes += 1
        with pytest.MonkeyPatch.context() as patch:
            disk = FullDisk(patch, writes)
            try:
                save_at(tmp_path, 2, trained)
            except SaveError as error:
                assert "No space left on device" in str(error) and "step-000002" in str(error)
            else:
                assert disk.count < writes
                break
        # The last sync of the parent directory comes after the rename: the new checkpoint is then already there.
        if load_latest(tmp_path, pytest.fail).step == 2:
            assert why_unusable(tmp_path / "step-000002") is None
        assert {path: path.read_bytes() for path in before} == before
        assert not list(tmp_path.glob(".*"))
        checkpoint.shutil.rmtree(tmp_path / "step-000002", ignore_errors=True)
    assert writes > 12
    assert load_latest(tmp_path, pytest.fail).step == 2


def test_full_disk_for_real(tmp_path, trained):
    """A file system of one megabyte, where this user may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=600k tmpfs {disk} 2>/dev/null"):
        pytest.skip("mounting a small file system is not allowed here")
    try:
        save_at(disk, 1, trained)
        with pytest.raises(SaveError, match=r"step-00000[23]"):
            for step in (2, 3):
                save_at(disk, step, trained, keep=3)
        saved = load_latest(disk, pytest.fail)
        assert saved is not None
        assert load_file(saved.path / "optimizer.safetensors")
        assert not list(disk.glob(".*"))
    finally:
        os.system(f"umount {disk}")


def test_file_size_limit(tmp_path, trained):
    """The operating system's own limit on file size, in a child process: the write of the weights itself fails."""
    import resource

    save_at(tmp_path, 1, trained)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
            save_at(tmp_path, 2, trained)
        except SaveError:
            code = 42
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
    assert load_latest(tmp_path, pytest.fail).step == 1
    assert not list(tmp_path.glob(".*"))


def test_what_a_killed_process_left_is_cleaned(tmp_path, trained):
    save_at(tmp_path, 1, trained)
    (tmp_path / ".step-000002.123.tmp" / "model").mkdir(parents=True)
    checkpoint.clean(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
