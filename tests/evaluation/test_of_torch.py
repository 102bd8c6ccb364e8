"""evaluate and doctor --torch: a PyTorch model's own values and gradients, in every attack."""

import importlib
import pathlib
import sys
import textwrap

import five_blobs
import jax
import jax.numpy as jnp
import linear_oracle
import numpy as np
import pytest

from fulllora_jax.attacks import Threat, pgd
from fulllora_jax.attacks.progress import Progress
from fulllora_jax.core.errors import UserError
from fulllora_jax.evaluation import users_function
from fulllora_jax.evaluation.diagnosis import examine, mistakes

torch = pytest.importorskip('torch', reason='PyTorch is not installed')
from fulllora_jax.evaluation import of_torch

ASKED = ('--data=digits', '--image_size=8')
X = np.random.default_rng(0).random((6, 8, 8, 3), np.float32)
_HEAD = """
import pathlib
import numpy as np
import torch
import linear_digits

class Linear(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.weights = torch.nn.Parameter(torch.from_numpy(linear_digits.WEIGHTS))

  def forward(self, x):
    assert x.shape[1:] == (1, 8, 8) and x.is_contiguous(), x.shape
    return x.flatten(1) @ self.weights

"""


def network(channels=3, dtype=torch.float32):
  torch.manual_seed(0)
  layers = [torch.nn.Conv2d(channels, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.GELU()]
  layers += [torch.nn.Flatten(), torch.nn.Linear(144, 5)]
  return torch.nn.Sequential(*layers).to(dtype)


def own(model, x, weights):
  """The model's logits of x and the gradient of <weights, logits>, without anything of ours."""
  images = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
  logits = model(images)
  (gradient,) = torch.autograd.grad(logits, images, torch.from_numpy(weights).to(logits))
  return logits.detach().float().numpy(), gradient.numpy().transpose(0, 2, 3, 1)


@pytest.fixture(autouse=True)
def in_one_device(one_device):
  of_torch.logits_function.cache_clear()


@pytest.fixture
def module(tmp_path, monkeypatch, linear_digits):
  """Writes a module users_torch.py, to be imported anew."""
  monkeypatch.syspath_prepend(linear_digits)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setattr(sys, 'dont_write_bytecode', True)

  def write(text):
    (tmp_path / 'users_torch.py').write_text(_HEAD + textwrap.dedent(text))
    sys.modules.pop('users_torch', None)
    importlib.invalidate_caches()

  yield write
  sys.modules.pop('users_torch', None)


def test_values_and_gradients_are_the_models_own():
  model = network().train()
  model(torch.from_numpy(X.transpose(0, 3, 1, 2).copy()))  # its statistics are not 0 and 1
  logits_fn = of_torch.logits_function(model)
  weights = np.random.default_rng(1).normal(size=(6, 5)).astype(np.float32)

  @jax.jit
  def both(x):
    logits, pull_back = jax.vjp(logits_fn, x)
    return logits, pull_back(weights)[0]

  found = both(X)
  assert not model.training and not any(p.requires_grad for p in model.parameters())
  for ours, theirs in zip(found, own(model, X, weights), strict=True):
    np.testing.assert_array_equal(ours, theirs)
  np.testing.assert_array_equal(jax.jit(logits_fn)(X), found[0])
  assert model[0].weight.grad is None


def test_one_forward_pass_serves_all_gradients_at_a_point():
  model, calls = network().eval(), []
  model.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
  logits_fn = of_torch.logits_function(model)

  @jax.jit
  def jacobian(x):
    logits, pull_back = jax.vjp(logits_fn, x)
    return logits, jax.lax.map(lambda w: pull_back(w)[0], jnp.eye(5)[:, None].repeat(6, 1))

  jacobian(X)
  calls.clear()
  _, slopes = jacobian(X + np.float32(1e-3))
  slopes.block_until_ready()
  assert calls == [True]
  for k in range(5):
    expected = own(model, X + np.float32(1e-3), np.eye(5, dtype=np.float32)[[k] * 6])[1]
    np.testing.assert_array_equal(slopes[k], expected)
  calls.clear()
  jax.jit(logits_fn)(X).block_until_ready()
  assert calls == [False]  # no graph where no gradient is asked for


def test_a_vmap_calls_it_image_by_image():
  model = network().eval()
  logits_fn = of_torch.logits_function(model)
  each = jax.vmap(lambda x: jax.value_and_grad(lambda z: logits_fn(z)[0, 2])(x[None]))
  logits, slopes = each(X)
  expected = own(model, X, np.eye(5, dtype=np.float32)[[2] * 6])
  np.testing.assert_allclose(logits, expected[0][:, 2], atol=1e-6)
  np.testing.assert_allclose(slopes[:, 0], expected[1], atol=1e-6)


def test_16_bits_are_the_models_own_too():
  class Half(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.inner = network(dtype=torch.bfloat16)

    def forward(self, x):
      return self.inner(x.bfloat16())

  model = Half().eval()
  logits_fn = of_torch.logits_function(model)
  weights = np.eye(5, dtype=np.float32)[[1] * 6]
  logits, pull_back = jax.vjp(logits_fn, X)
  assert logits.dtype == jnp.float32
  for ours, theirs in zip((logits, pull_back(weights)[0]), own(model, X, weights), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def test_pgd_goes_where_torch_goes():
  model = network().eval()
  labels = np.arange(6) % 5
  threat = Threat('linf', 0.1)
  x_adv = pgd(
    jax.random.key(0), of_torch.logits_function(model), X, labels, threat, steps=4,
    step_size=0.03, random_start=False,
  )  # fmt: skip
  z = torch.from_numpy(X.transpose(0, 3, 1, 2).copy())
  x = z.clone()
  for _ in range(4):
    z.requires_grad_()
    loss = torch.nn.functional.cross_entropy(model(z), torch.from_numpy(labels), reduction='sum')
    (slope,) = torch.autograd.grad(loss, z)
    z = (x + (z.detach() + 0.03 * slope.sign() - x).clamp(-0.1, 0.1)).clamp(0, 1)
  np.testing.assert_allclose(x_adv, z.detach().numpy().transpose(0, 2, 3, 1), atol=1e-6)


@pytest.mark.parametrize('attack', ['fab', pytest.param('autoattack', marks=pytest.mark.slow)])
def test_attacks_are_exact_and_those_of_the_twin(module, evaluate, digits, tmp_path, attack):
  module('')
  saved = {}
  for flag in ('--torch=users_torch:Linear', '--logits=linear_digits:logits'):
    result = evaluate(
      flag, *ASKED, f'--attack={attack}', '--num_examples=24', '--eps=0.04', '--seed=3',
      f'--workdir={tmp_path / flag[2:7]}',
    )  # fmt: skip
    (record,) = result['evaluations']
    assert record['verified']['mismatches'] == record['verified']['outside'] == 0
    saved[flag[2:7]] = np.load(tmp_path / flag[2:7] / 'evaluations' / record['verified']['file'])
  assert result['logits'] == 'linear_digits:logits'
  ours = saved['torch']
  np.testing.assert_array_equal(ours['robust'], saved['logit']['robust'])
  x = digits.test.fetch(ours['indices']).astype(np.float32) / 255
  weights = np.load(pathlib.Path(sys.modules['linear_digits'].__file__).with_name('weights.npy'))
  oracle = linear_oracle.Linear(weights, 0.5 * weights.sum(axis=0), x)
  expected = (oracle.labels == ours['labels']) & (oracle.distances('linf') > 0.04)
  np.testing.assert_array_equal(ours['robust'], expected)
  assert 0 < expected.sum() < (oracle.labels == ours['labels']).sum()


@pytest.mark.parametrize(
  'text',
  [
    'model = Linear()',
    'def model():\n  return Linear()',
    'def model(x):\n  return Linear()(x)',
    'def model():\n  net = Linear()\n  return lambda x: net(x)',
  ],
)
def test_what_a_name_may_stand_for(module, digits, text):
  module(text)
  logits_fn = users_function.load_function('torch:users_torch:model')
  assert logits_fn is users_function.load_function('torch:users_torch:model')  # made once
  x = digits.test.fetch(np.arange(5)).astype(np.float32) / 255
  from linear_digits import logits

  np.testing.assert_allclose(logits_fn(x), logits(x), atol=1e-6)


def test_the_doctor_finds_a_detached_gradient(module, run_here, digits_dir):
  module("""
    class Detached(Linear):
      def forward(self, x):
        return super().forward(x.detach())
  """)
  done = run_here(
    '-m', 'fulllora_jax.doctor', '--torch=users_torch:Detached', *ASKED, '--num_examples=32',
    f'--data_dir={digits_dir}', '--eps=0.03',
  )  # fmt: skip
  assert done.returncode == 1, done.stderr
  assert 'wrong  gradients that are not zero' in done.stdout
  assert '32 of 32 images have no gradient of the margin' in done.stdout
  assert 'ok     deterministic output' in done.stdout


def test_a_healthy_model_passes_every_check_of_the_doctor():
  class Blobs(torch.nn.Module):
    def forward(self, x):
      means = torch.from_numpy(five_blobs.MEANS.transpose(0, 3, 1, 2).copy())
      return -4.0 * (x[:, None] - means[None]).square().sum(dim=(2, 3, 4))

  logits_fn = of_torch.logits_function(Blobs())
  examined = five_blobs.examined(logits_fn, deployed=[('the twin', five_blobs.healthy)])
  found = list(examine.examine(examined))
  assert [f.check for f in found] == ['finite logits', *examine.CHECKS]
  assert [f for f in found if f.level != 'ok'] == []


@pytest.mark.parametrize('turn', [0, 1])
def test_the_doctor_compares_what_is_deployed_in_pytorch(module, digits, turn):
  module(f'def model():\n  net = Linear()\n  return lambda x: net(x).roll({turn}, 1)')
  named = ('linear_digits:logits', 'torch:users_torch:model')
  attacked, deployed = map(users_function.load_function, named)
  x = digits.test.fetch(np.arange(16)).astype(np.float32) / 255
  images = (x, digits.test.labels[:16], Threat('linf', 0.03), jax.random.key(0))
  found = mistakes.deployed(examine.Examined(attacked, *images, deployed=[('x', deployed)]))
  assert found is None if not turn else 'class for 32 of 32 images' in found.seen


def test_rounding_has_a_gradient_of_zero():
  zero = jax.grad(lambda x: of_torch.logits_function(lambda z: z.round().flatten(1))(x).sum())(X)
  assert (np.asarray(zero) == 0).all()


def test_a_killed_evaluation_goes_on(module, evaluate, tmp_path, monkeypatch, capsys):
  module('')

  def run(workdir):
    return evaluate(
      '--torch=users_torch:Linear', *ASKED, '--num_examples=32', '--batch_size=16',
      '--attack=apgd-ce', '--eps=0.1', f'--workdir={tmp_path / workdir}',
    )['evaluations'][0]['per_class']  # fmt: skip

  def stop(*args, write=Progress.write):
    write(*args)
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(Progress, 'write', stop)
    with pytest.raises(KeyboardInterrupt):
      run('killed')
  of_torch.logits_function.cache_clear()  # another process makes the model anew
  capsys.readouterr()
  assert run('killed') == run('whole')
  assert '1 of 2 batches taken up' in capsys.readouterr().err


@pytest.mark.slow
def test_noise_is_for_autoattack_rand_alone(module, evaluate, tmp_path):
  module("""
    class Noisy(Linear):
      def forward(self, x):
        return super().forward(x) + 0.02 * torch.randn(len(x), 10)
  """)

  def run(attack, number):
    return evaluate(
      '--torch=users_torch:Noisy', *ASKED, f'--attack={attack}', '--num_examples=8', '--eps=0.03',
      f'--workdir={tmp_path}/{number}',
    )['evaluations'][0]  # fmt: skip

  with pytest.raises(UserError, match='or from call to call.*users_torch.py|users_torch:Noisy'):
    run('apgd-ce', 0)
  first, second = (run('autoattack-rand', number)['per_class'] for number in (1, 2))
  assert first == second


def test_a_key_is_the_noise_of_both_ways():
  class Noisy(torch.nn.Module):
    def forward(self, x):
      return x.flatten(1)[:, :5] * torch.randn(len(x), 5)

  logits_fn = of_torch.logits_function(Noisy())

  def run(key):
    logits, pull_back = jax.vjp(lambda x: logits_fn(x, key), X)
    return np.asarray(logits), np.asarray(pull_back(jnp.ones((6, 5)))[0])

  (logits, slope), (other, _), (again, _) = (run(jax.random.key(k)) for k in (0, 1, 0))
  np.testing.assert_array_equal(logits, again)
  assert (logits != other).all()
  flat, slope = (a.transpose(0, 3, 1, 2).reshape(6, -1)[:, :5] for a in (X, slope))
  np.testing.assert_allclose(flat * slope, logits, rtol=1e-5)


FAULTS = {
  'name': ('def model(x):\n  return z', "line 17: NameError: name 'z' is not defined"),
  'shapes': (
    'def model(x):\n  return x.flatten(1) @ torch.ones(3, 3)',
    'line 17: RuntimeError: mat1 and mat2 shapes cannot be multiplied',
  ),
  'made': (
    'def model():\n  return torch.load("no/such.pt")',
    'line 17: FileNotFoundError: .*no/such',
  ),
  'number': ('def model():\n  return 3', r'it made int, expected a torch.nn.Module or a function'),
  'tuple': ('def model(x):\n  return x, x', r'gave tuple, expected float logits \[2, K\]'),
  'shape': ('def model(x):\n  return x', r'\[2, 1, 8, 8\] gave \[2, 1, 8, 8\], expected float'),
  'scalar': ('def model(x):\n  return x.sum()', r'gave \[\], expected float logits'),
  'ints': ('def model(x):\n  return x.flatten(1).long()', 'gave int64, expected float logits'),
  'classes': ('def model(x):\n  return x.flatten(1)[:, :3]', r'in \[0, 9\], but .* 3 classes'),
  'late': (
    'def model(x):\n  assert len(x) < 8, "too\\nmany"\n  return x.flatten(1)[:, :10]',
    'line 17: AssertionError: too',
  ),
  'late shape': (
    'def model(x):\n  return x.flatten(1)[:, :10 + len(x) // 8]',
    r'gave \[16, 12\], expected float logits \[16, 10\] \(.*users_torch.py, line 16\)',
  ),
  'in place': (
    'class model(torch.nn.Module):\n  def forward(self, x):\n    return x.sub_(0.5).flatten(1)',
    'line 18: RuntimeError: a leaf Variable that requires grad',
  ),
  'numbers': (
    'def model(x):\n  y = x.flatten(1)[:, :10]\n  return torch.where(y < 2, float("nan"), y)',
    '16 of 16 clean images have NaN or infinite logits',
  ),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_a_fault_is_one_line(module, run_here, digits_dir, tmp_path, fault):
  text, words = FAULTS[fault]
  module(text)
  done = run_here(
    '-m', 'fulllora_jax.evaluate', '--torch=users_torch:model', *ASKED, '--attack=apgd-ce',
    f'--data_dir={digits_dir}', '--num_examples=16', '--eps=0.1', f'--workdir={tmp_path}/run',
  )  # fmt: skip
  assert done.returncode == 2, done.stderr
  assert 'Traceback' not in done.stderr
  *_, line = done.stderr.splitlines()
  with pytest.raises(UserError, match=f'^error: .*{words}'):
    raise UserError(line)
  assert 'UserError' not in line and ('users_torch' in line or fault == 'classes')


def test_several_devices_are_refused(monkeypatch):
  from fulllora_jax.distributed import mesh

  make = mesh.Mesh
  monkeypatch.setattr(
    mesh, 'make_mesh', lambda *_, **__: make(np.array(jax.devices()).reshape(-1, 1), ('a', 'b'))
  )
  with pytest.raises(UserError, match='called from one device, but JAX has 8 here; set JAX_PLATF'):
    of_torch.logits_function(network())


def test_flags_that_do_not_go_with_it(module, evaluate, tmp_path):
  module('')
  own = ('--torch=users_torch:Linear', *ASKED, f'--workdir={tmp_path}')
  for flag, words in {
    '--weights=best': '--weights: --torch has its own',
    '--dtype=float32': '--dtype: --torch has its own',
    '--precision=default': '--precision: a PyTorch model computes in its own dtype',
    '--logits=linear_digits:logits': '--logits, --torch: each names a model',
    '--torch=users_torch': "--torch: write module:function, not 'users_torch'",
    '--torch=users_torch:nothing': '--torch: users_torch has no function nothing',
    '--torch=no_such_module:f': '--torch: cannot import no_such_module',
  }.items():
    with pytest.raises(UserError, match=words):
      evaluate(*own, flag)


def test_jax_leaves_the_gpu_alone(run_python):
  text = 'import jax; from fulllora_jax import command; command.start_up(beside_torch=True); '
  text += 'print(jax.config.jax_platforms, jax.device_count())'
  done = run_python('-c', text, JAX_PLATFORMS='', JAX_NUM_CPU_DEVICES='8')
  assert done.stdout.split() == ['cpu', '1'], done.stderr
