"""Packs what launch/evidence_gpu.sh needs on a machine without network.

  python launch/evidence_pack.py --weights=vit_tiny_patch16_224.safetensors

Run it where tfds has CIFAR-10 prepared and pip reaches a registry. It makes the folders carry-1,
carry-2, ... in --out, none larger than --mib: what one transfer takes. A part in them is a .tar.gz
of its own; parts.sha256, in each folder, names all parts with their checksums.

images-NN  the images of the set as the files that they are, train/CLASS/NUMBER and test/CLASS/...
weights    the published weights
site       Python packages that such a machine lacks, of the versions that are here
"""

import argparse
import gzip
import hashlib
import importlib.metadata
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

MIB = 2**20
SHARD = 12 * MIB  # bytes of images in a part
# What reading and training on a folder of images imports beyond JAX, flax, optax and orbax.
PACKAGES = ('array_record', 'grain', 'ml_collections', 'platformdirs', 'pooch', 'portpicker')
Files = Iterator[tuple[str, bytes]]  # path in the archive, content


class PackError(Exception):
  """Says in one line what is missing and what to change."""


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--weights', required=True, help='The .safetensors file of the base.')
  parser.add_argument('--out', default='evidence', help='Gets carry-1, carry-2, ...')
  parser.add_argument('--data', default='cifar10', help='A prepared set of tfds.')
  parser.add_argument('--mib', type=float, default=45, help='The size of a transfer, in MiB.')
  parser.add_argument('--wheels', default='', help='A folder of wheels; else pip fetches them.')
  parser.add_argument('--python', default='3.12', help="That machine's Python.")
  parser.add_argument('--more', nargs='*', default=[], help='More packages, NAME==VERSION.')
  given = parser.parse_args()
  try:
    for folder in pack(given):
      size = sum(path.stat().st_size for path in folder.iterdir())
      print(
        f'{folder}: {size / MIB:.1f} MiB, {", ".join(sorted(p.name for p in folder.iterdir()))}'
      )
  except (PackError, OSError) as error:
    sys.exit(_refuse(error))


def _refuse(error: Exception) -> int:
  print(f'error: {error}', file=sys.stderr)
  return 2


def pack(given) -> list[Path]:
  """Writes the parts and spreads them over folders; returns the folders."""
  weights, out = Path(given.weights), Path(given.out)
  if not weights.is_file():
    raise PackError(f'--weights: there is no file {weights}; give the published weights')
  with tempfile.TemporaryDirectory() as scratch:
    wheels = wheel_files(given, Path(scratch))
    parts = {'site.tar.gz': archive(('site/' + name, content) for name, content in wheels)}
    content = weights.read_bytes()
    parts['weights.tar.gz'] = archive([(f'weights/{weights.name}', content)])
  for number, shard in enumerate(shards(images(given.data))):
    parts[f'images-{number:02d}.tar.gz'] = archive(shard)
  return write(parts, out, int(given.mib * MIB))


def images(name: str) -> Files:
  """Yields the files of a set of tfds, split by split, in its order."""
  import tensorflow_datasets as tfds

  from fulllora_jax.core.errors import UserError
  from fulllora_jax.data import builders

  try:
    directory = builders.data_dir('')
    builder = builders.get(name, directory)
    found = builders.formats(builder)
  except UserError as error:
    raise PackError(str(error)) from None
  if builders.FORMAT not in found:
    command = builders.prepare_command(name, directory)
    raise PackError(f'--data={name} is not prepared in {directory}; run `{command}`')
  decoders = {'image': tfds.decode.SkipDecoding()}
  names = builder.info.features['label'].names
  for split in ('train', 'test'):
    for number, example in enumerate(builder.as_data_source(split, decoders=decoders)):
      content = example['image']
      suffix = 'png' if content.startswith(b'\x89PNG') else 'jpg'
      yield f'images/{split}/{names[example["label"]]}/{number:05d}.{suffix}', content


def shards(files: Files) -> Iterator[list[tuple[str, bytes]]]:
  """Yields the files in lists of about SHARD bytes."""
  shard: list[tuple[str, bytes]] = []
  size = 0
  for name, content in files:
    shard.append((name, content))
    size += len(content)
    if size >= SHARD:
      yield shard
      shard, size = [], 0
  if shard:
    yield shard


def wheel_files(given, scratch: Path) -> Files:
  """Yields what is in the wheels of PACKAGES and of --more, as it lies in site-packages."""
  folder = Path(given.wheels or scratch)
  if not given.wheels:
    wanted = [f'{name}=={importlib.metadata.version(name)}' for name in PACKAGES]
    _fetch([*wanted, *given.more], given.python, folder)
  wheels = sorted(folder.glob('*.whl'))
  have = {path.name.split('-')[0].lower() for path in wheels}
  if missing := [name for name in PACKAGES if name not in have]:
    raise PackError(f'--wheels={folder}: no wheel of {", ".join(missing)}; add them')
  for wheel in wheels:
    with zipfile.ZipFile(wheel) as opened:
      for name in opened.namelist():
        if not name.endswith('/'):
          yield name, opened.read(name)


def _fetch(wanted: list[str], python: str, folder: Path) -> None:
  command = [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--only-binary=:all:']
  command += [f'--python-version={python}', '--implementation=cp', f'--dest={folder}']
  for libc in ('_2_28', '_2_27', '_2_17', '2014', '1'):
    command.append(f'--platform=manylinux{libc}_x86_64')
  done = subprocess.run([*command, *wanted], capture_output=True, text=True)
  if done.returncode:
    said = (done.stderr.strip().splitlines() or ['it said nothing'])[-1]
    raise PackError(f'pip could not fetch {", ".join(wanted)}: {said}; give --wheels=FOLDER')


def archive(files: Iterable[tuple[str, bytes]]) -> bytes:
  """Returns a .tar.gz, of the same bytes whenever it is made."""
  packed = io.BytesIO()
  with (
    gzip.GzipFile(fileobj=packed, mode='wb', compresslevel=6, mtime=0) as stream,
    tarfile.open(fileobj=stream, mode='w') as tar,
  ):
    for name, content in files:
      member = tarfile.TarInfo(name)
      member.size, member.mode = len(content), 0o644
      tar.addfile(member, io.BytesIO(content))
  return packed.getvalue()


def write(parts: dict[str, bytes], out: Path, limit: int) -> list[Path]:
  """Fills folder after folder; raises PackError where a part alone is too large."""
  sums = {name: hashlib.sha256(content).hexdigest() for name, content in parts.items()}
  listed = ''.join(f'{sums[name]}  {name}\n' for name in sorted(parts))
  room = limit - len(listed)
  groups: list[list[str]] = []
  for name, content in sorted(parts.items(), key=lambda item: -len(item[1])):
    if len(content) > room:
      size = len(content) / MIB
      raise PackError(f'{name} has {size:.1f} MiB; --mib must be above that, and was not')
    fits = (g for g in groups if sum(len(parts[n]) for n in g) + len(content) <= room)
    group = next(fits, None)
    groups.append([name]) if group is None else group.append(name)
  for old in out.glob('carry-*'):
    for path in (*old.glob('*.tar.gz'), *old.glob('parts.sha256')):
      path.unlink()
    old.rmdir()
  folders = [out / f'carry-{number}' for number in range(1, len(groups) + 1)]
  for folder, group in zip(folders, groups, strict=True):
    folder.mkdir(parents=True)
    for name in group:
      (folder / name).write_bytes(parts[name])
    (folder / 'parts.sha256').write_text(listed)
  return folders


if __name__ == '__main__':
  main()
