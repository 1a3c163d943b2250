import pytest

from mdt_jax.checkpoints import checksums

FILES = {"state/d/0": b"\0" * 5000, "state/meta": b"{}", "config/metadata": b"seed"}


@pytest.fixture
def folder(tmp_path):
  for name, data in FILES.items():
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
  checksums.write_checksums(tmp_path)
  return tmp_path


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(bytes(data))


DAMAGES = {
  "flipped": flip,
  "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
  "emptied": lambda path: path.write_bytes(b""),
  "deleted": lambda path: path.unlink(),
}


def test_what_was_written_is_whole(folder):
  assert checksums.damage(folder) is None


@pytest.mark.parametrize("name", [*FILES, checksums.FILE])
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_to_every_file_is_named(folder, name, damage):
  DAMAGES[damage](folder / name)
  assert checksums.damage(folder).startswith(name)


def test_every_byte_of_the_seal_is_guarded(folder):
  path = folder / checksums.FILE
  whole = path.read_bytes()
  for place in range(len(whole)):
    damaged = bytearray(whole)
    damaged[place] ^= 1
    path.write_bytes(bytes(damaged))
    assert checksums.damage(folder) is not None, place


def test_a_folder_without_a_seal_was_not_finished(tmp_path):
  assert "not finished" in checksums.damage(tmp_path)
