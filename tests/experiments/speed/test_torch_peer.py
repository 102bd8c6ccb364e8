"""The client of the PyTorch peer, with a stand-in for the process."""

import os
import sys
import textwrap
import time

import pytest

from fulllora_jax import config as config_lib
from fulllora_jax.core.errors import UserError
from fulllora_jax.experiments.speed.torch import peer as peer_lib

SPEC = peer_lib.Spec(
  image_size=8, channels=3, patch_size=4, width=8, depth=1, num_heads=2,
  mlp_dim=16, num_classes=5, batch_size=4,
)  # fmt: skip
FACTS = dict(compile_seconds=1.5, trainable=7)
HEAD = f"""
import os, signal, sys, time
from multiprocessing.connection import Connection
pipe = Connection(int(sys.argv[1]))
FACTS = {FACTS}
"""


@pytest.fixture
def stand_in(tmp_path):
  """Makes a peer of a Python script that has `pipe`, the way to it."""

  def make(script):
    file = tmp_path / 'worker.py'
    file.write_text(HEAD + textwrap.dedent(script))
    return peer_lib.TorchPeer(SPEC, command=(sys.executable, str(file)))

  return make


def refused(words, function, *args, **kwargs):
  with pytest.raises(UserError, match=words) as caught:
    function(*args, **kwargs)
  assert '\n' not in str(caught.value)


def ended(pid):
  """Waits a few seconds for a process to be gone; a zombie is."""
  for _ in range(100):
    try:
      with open(f'/proc/{pid}/stat') as file:
        if file.read().rsplit(')', 1)[1].split()[0] == 'Z':
          return True
    except FileNotFoundError:
      return True
    time.sleep(0.1)
  return False


def test_requests_and_answers(stand_in):
  peer = stand_in("""
    pipe.send(FACTS | {'trainable': pipe.recv().batch_size})
    while True:
      pipe.send([pipe.recv()])
  """)
  with peer:
    assert (peer.trainable, peer.compile_seconds) == (4, 1.5)
    assert peer.step() == [('step', {})]
    assert peer.attack(20) == [('attack', {'steps': 20})]
    assert peer.peak_memory == [('peak_memory', {})]


def test_an_error_is_one_of_the_user(stand_in):
  peer = stand_in("""
    from fulllora_jax.core.errors import UserError
    pipe.recv()
    pipe.send(UserError('no such GPU'))
  """)
  refused('no such GPU', peer.__enter__)


@pytest.mark.parametrize(
  'end, words',
  [
    (
      "print('a\\nRuntimeError: b\\n', file=sys.stderr); sys.exit(3)",
      r'has died \(exit status 3\): RuntimeError: b$',
    ),
    ('os.kill(os.getpid(), signal.SIGKILL)', r'has died \(killed by SIGKILL\): it said nothing$'),
  ],
)
def test_the_last_words_of_the_dead(stand_in, end, words):
  refused(words, stand_in(f'pipe.recv(); {end}').__enter__)
  peer = stand_in(f'pipe.recv(); pipe.send(FACTS); pipe.recv(); {end}')
  with peer:
    refused(words, peer.step)


def test_much_on_stderr_stops_nobody(stand_in):
  peer = stand_in("""
    pipe.recv()
    print('x' * 2**20, file=sys.stderr)
    pipe.send(FACTS)
  """)
  with peer:
    assert peer.trainable == 7


def test_who_does_not_end_is_ended_with_its_children(stand_in):
  peer = stand_in("""
    import subprocess
    pipe.recv()
    child = subprocess.Popen(['sleep', '60'], stderr=subprocess.DEVNULL)
    pipe.send(FACTS | {'trainable': [os.getpid(), child.pid]})
    time.sleep(60)
  """)
  with peer:
    pids = peer.trainable
    begin = time.monotonic()
  assert time.monotonic() - begin < 10
  assert all(map(ended, pids))


def test_a_failed_start_leaves_nothing(stand_in, tmp_path, monkeypatch):
  monkeypatch.setattr(peer_lib.tempfile, 'tempdir', str(tmp_path))
  peer = stand_in("""
    from fulllora_jax.core.errors import UserError
    pipe.recv()
    cache = os.environ['TORCHINDUCTOR_CACHE_DIR']
    pipe.send(UserError(f'{os.getpid()} {cache}'))
    time.sleep(60)
  """)
  with pytest.raises(UserError) as caught:
    peer.__enter__()
  pid, cache = str(caught.value).split()
  assert ended(pid)
  assert cache.startswith(str(tmp_path)) and not os.path.exists(cache)


def test_pytorch_is_missing(tmp_path, monkeypatch):
  (tmp_path / 'torch.py').write_text('raise ImportError("no torch here")')
  monkeypatch.setenv('PYTHONPATH', str(tmp_path), prepend=os.pathsep)
  refused(
    r'torch, torchvision, timm and peft \(no torch here\); '
    r'pip install -e \.\[bench\]',
    peer_lib.TorchPeer(SPEC).__enter__,
  )


def test_the_process_has_no_jax_and_ends_with_its_parent(run_python):
  done = run_python(
    '-c',
    'import multiprocessing, os, sys; '
    'sys.modules["jax"] = None; sys.modules["torch"] = None; '
    'os.dup2(os.open(os.devnull, os.O_RDONLY), 0); '
    'ours, theirs = multiprocessing.Pipe(); '
    'sys.argv[1:] = [str(theirs.fileno())]; '
    'from fulllora_jax.experiments.speed.torch import worker; '
    'worker.main(); print("never")',
  )
  assert (done.returncode, done.stdout) == (0, ''), done.stderr


@pytest.mark.parametrize(
  'method, theirs, steps',
  [
    ('fulllora', 'lora', 10),
    ('lora_everywhere', 'lora', 10),
    ('linear', 'linear', 10),
    ('full', 'full', 10),
    ('standard', 'full', 0),
  ],
)
def test_spec_of_a_method(tiny_config, method, theirs, steps):
  spec = peer_lib.spec_of(tiny_config(method), 5, (8, 8, 3))
  assert (spec.method, spec.attack_steps) == (theirs, steps)


@pytest.mark.parametrize('method', ['lora', 'adapter', 'vpt', 'bias'])
def test_a_method_that_peft_has_not_is_refused(tiny_config, method):
  words = f'torch peer: method {method}: .*fulllora, lora_everywhere'
  with pytest.raises(UserError, match=words):
    peer_lib.spec_of(tiny_config(method), 5, (8, 8, 3))


def test_spec_of_reads_every_field():
  config = config_lib.default()
  config.model.update(name='deit_ti', patch_size=8, pool='mean', epsilon=1e-3)
  config.adapter.update(rank=3, alpha=6.0, targets=('value', 'query', 'fc1'))
  config.adapter.head = 'lnlora'
  config.threat.eps = '4/255'
  config.attack.update(steps=7, step_size='1/255', random_start=False)
  config.augment.update(crop_padding=2, flip=False)
  config.optimizer = config_lib.adamw(learning_rate=0.01, weight_decay=0.3)
  config.train.update(batch_size=16, log_every=9)
  config.eval.step_size, config.seed = '3/255', 11
  found = peer_lib.spec_of(
    config, 6, (16, 16, 1), mode='compile', device='cuda', dtype='bfloat16',
    threads=5,
  )  # fmt: skip
  assert found == peer_lib.Spec(
    image_size=16, channels=1, patch_size=8, width=192, depth=12, num_heads=3,
    mlp_dim=768, num_classes=6, batch_size=16, pool='mean', act='gelu',
    epsilon=1e-3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    method='lora', targets=('qkv', 'mlp.fc1', 'head'), rank=3, alpha=6.0,
    train_head=False, eps=4 / 255, attack_steps=7, step_size=1 / 255,
    eval_step_size=3 / 255, random_start=False, crop_padding=2, flip=False,
    optimizer='adamw', learning_rate=0.01, momentum=0.9, betas=(0.9, 0.999),
    weight_decay=0.3, clip=1.0, log_every=9, dtype='bfloat16', mode='compile',
    device='cuda', threads=5, seed=11,
  )  # fmt: skip


@pytest.mark.parametrize(
  'field, value, words',
  [
    ('model.name', 'swin_t', 'model.name swin_t: it has the families vit and'),
    ('model.name', 'deit3_s', 'model.name deit3_s'),
    ('model.name', 'dinov2_reg_s', 'model.name dinov2_reg_s'),
    ('model.name', 'clip_b', 'model.name clip_b'),
    ('model.swiglu', True, 'model.swiglu True: it has False alone'),
    ('model.dropout', 0.1, 'model.dropout 0.1: it has 0.0 alone'),
    ('model.remat', 'blocks', '--config.model.remat=none to compare'),
    ('model.pool', 'token_mean', "pool: unknown 'token_mean'"),
    ('threat.norm', 'l2', 'threat.norm l2: it has linf alone'),
    ('attack.loss', 'margin', 'attack.loss margin: it has ce alone'),
    ('attack.restarts', 2, 'attack.restarts 2: it has 1 alone'),
    ('train.accumulate', 4, 'train.accumulate 4: it has 1 alone'),
    ('adapter.targets', ('.*/fc',), "adapter.targets '.*/fc': it knows"),
    ('adapter.overrides', ('query.rank=4',), "overrides 'query.rank=4': it"),
    ('train.batch_size', 0, 'batch_size 0: it must be at least 1'),
    ('model.dtype', 'float16', "dtype: unknown 'float16'; known: float32"),
  ],
)
def test_what_the_peer_has_not(field, value, words):
  config = config_lib.default()
  config.update_from_flattened_dict({field: value})
  refused(words, peer_lib.spec_of, config, 10, (32, 32, 3))


def test_a_spare_class_token(tiny_config):
  config = tiny_config(pool='mean', class_token=True)
  refused('model.class_token True', peer_lib.spec_of, config, 5, (8, 8, 3))
  config.model.class_token = False
  assert peer_lib.spec_of(config, 5, (8, 8, 3)).pool == 'mean'


def test_images_are_square(tiny_config):
  refused('8 x 16', peer_lib.spec_of, tiny_config(), 5, (8, 16, 3))


def test_unknown_words():
  refused("mode: unknown 'jit'", peer_lib.Spec, **vars(SPEC) | {'mode': 'jit'})
