"""What the PyTorch peer does: the same step as ours."""

import dataclasses

import jax
import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('torchvision', reason='timm needs torchvision')
pytest.importorskip('timm')
pytest.importorskip('peft')

from fulllora_jax import attacks
from fulllora_jax.adapters import adapted
from fulllora_jax.attacks import pgd
from fulllora_jax.core.errors import UserError
from fulllora_jax.experiments.speed.torch import peer as peer_lib
from fulllora_jax.experiments.speed.torch import step as step_lib
from fulllora_jax.experiments.speed.torch import work as work_lib

SPEC = peer_lib.Spec(
  image_size=8, channels=3, patch_size=4, width=8, depth=1, num_heads=2,
  mlp_dim=16, num_classes=5, batch_size=6, rank=2, alpha=4.0, attack_steps=3,
  threads=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def own_settings():
  """Puts back what `Work` sets for its whole process."""
  threads = torch.get_num_threads()
  yield
  torch.set_num_threads(threads)


def work_of(**changed):
  return work_lib.Work(dataclasses.replace(SPEC, **changed))


def snapshot(model):
  return {k: v.clone() for k, v in model.state_dict().items()}


def changed_names(before, model):
  after = model.state_dict()
  return {name for name in before if not before[name].equal(after[name])}


def test_lora_trains_its_branches_and_the_head():
  work = work_of()
  before = snapshot(work.model)
  for _ in range(2):  # A has no gradient while B is zero
    work.train_step(log=False)
  branches = {name for name in before if 'lora_' in name}
  assert len(branches) == 2 * 5
  head = {name for name in before if 'head.modules_to_save' in name}
  assert len(head) == 2
  assert changed_names(before, work.model) == branches | head


@pytest.mark.parametrize('method, learning', [('linear', 2), ('full', None)])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_other_methods(method, learning, dtype):
  work = work_of(method=method, dtype=dtype, learning_rate=100.0, clip=0.0)
  before = snapshot(work.model.model)
  work.train_step(log=False)
  changed = changed_names(before, work.model.model)
  if learning is None:
    assert changed == set(before)
  else:
    assert changed == {'head.weight', 'head.bias'}


def test_the_frozen_head():
  work = work_of(train_head=False)
  before = snapshot(work.model)
  for _ in range(2):
    work.train_step(log=False)
  branches = {name for name in before if 'lora_' in name}
  assert changed_names(before, work.model) == branches


@pytest.mark.parametrize('method', ['lora_everywhere', 'linear', 'full'])
@pytest.mark.parametrize('pool', ['token', 'mean', 'mean_norm'])
def test_as_much_is_trained_as_by_us(tiny_config, method, pool):
  config = tiny_config(method, pool=pool)
  spec = peer_lib.spec_of(config, 5, (8, 8, 3))
  built = adapted.build(config, 5)
  shapes = adapted.shapes(built, (8, 8, 3))
  leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(built.mask(shapes)), strict=True)
  ours = sum(int(np.prod(leaf.shape)) for leaf, learns in leaves if learns)
  if method == 'lora_everywhere':
    # peft: one A and one B [r, 3d] for query, key and value, not three As.
    ours -= 2 * spec.rank * spec.width
  assert work_lib.Work(spec).facts()['trainable'] == ours


@pytest.mark.parametrize('traced', [False, True])
def test_the_attack_is_ours(traced):
  rng = np.random.default_rng(0)
  x = rng.uniform(size=(4, 3, 3, 1)).astype(np.float32)
  weights = rng.normal(size=(9, 5)).astype(np.float32)
  labels = np.arange(4)
  wanted = pgd(
    jax.random.key(0),
    lambda images: images.reshape(4, 9) @ weights,
    x,
    labels,
    attacks.Threat(eps='8/255'),
    steps=7,
    step_size=2 / 255,
    random_start=False,
  )
  gradient = step_lib.traced_gradient if traced else step_lib.gradient

  def model(images):
    return images.flatten(1) @ torch.tensor(weights)

  found = step_lib.pgd(
    lambda *args: step_lib.ascend(gradient, model, *args),
    torch.tensor(x.transpose(0, 3, 1, 2)),
    torch.tensor(labels),
    eps=8 / 255,
    steps=7,
    step_size=torch.tensor(2 / 255),
    generator=None,
  )
  assert np.abs(wanted - x).max() > 7 / 255
  np.testing.assert_allclose(found.numpy().transpose(0, 2, 3, 1), wanted, atol=1e-6)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_attack_stays_in_the_ball_and_raises_the_loss(dtype):
  work = work_of(dtype=dtype)
  x = torch.rand(6, 3, 8, 8)
  x[0], x[1] = 0.0, 1.0  # the box cuts their balls
  labels = torch.arange(6) % 5
  x_adv = work._attacked(x, labels, 5, 2 / 255, True)
  assert x_adv.dtype == torch.float32 and not x_adv.requires_grad
  assert (x_adv - x).abs().max() <= 8 / 255 + 1e-6
  assert x_adv.min() >= 0 and x_adv.max() <= 1
  start = work._attacked(x, labels, 0, 2 / 255, True)
  assert 0.3 < ((start - x)[2:].abs() / (8 / 255)).mean() < 0.6  # uniform
  loss = work_lib._loss
  assert loss(work.model, x_adv, labels)[0] > loss(work.model, x, labels)[0]
  assert all(p.grad is None for p in work.model.parameters())


def test_torch_compile_gets_one_graph():
  """Dynamo alone, which needs no compiler."""
  work = work_of()
  x, labels = torch.rand(6, 3, 8, 8), torch.arange(6) % 5
  arguments = (work.model, x, labels, x - 0.1, x + 0.1, torch.tensor(0.05))
  for function, given in (
    (step_lib.ascend, (step_lib.traced_gradient, *arguments)),
    (work_lib._loss, (work.model, x, labels)),
  ):
    graph = torch.compile(function, fullgraph=True, backend='eager')
    torch.testing.assert_close(graph(*given), function(*given))
  eager = step_lib.ascend(step_lib.gradient, *arguments)
  assert not eager.equal(x)
  traced = step_lib.ascend(step_lib.traced_gradient, *arguments)
  torch.testing.assert_close(traced, eager)


def test_augment_crops_and_flips():
  images = torch.arange(200 * 16, dtype=torch.int64).reshape(200, 4, 4, 1)
  images = (images % 16 + 1).to(torch.uint8)
  generator = torch.Generator().manual_seed(0)
  found = step_lib.augment(images, 1, True, generator) * 255
  padded = torch.nn.functional.pad(images[0, :, :, 0], (1, 1, 1, 1)).float()
  windows = [
    window
    for top in range(3)
    for left in range(3)
    for crop in [padded[top : top + 4, left : left + 4]]
    for window in (crop, crop.flip(1))
  ]
  seen = {next(i for i, w in enumerate(windows) if torch.allclose(w, image[0])) for image in found}
  assert seen == set(range(18))  # every one of them comes
  still = step_lib.augment(images, 0, False, generator)
  assert still.dtype == torch.float32
  torch.testing.assert_close(still, images.permute(0, 3, 1, 2).float() / 255)


@pytest.mark.parametrize('optimizer', ['sgd', 'adamw'])
def test_small_steps_are_not_lost_in_bfloat16(optimizer):
  parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
  spec = dataclasses.replace(
    SPEC, dtype='bfloat16', optimizer=optimizer, learning_rate=1e-3,
    momentum=0.0, weight_decay=0.0, clip=0.0,
  )  # fmt: skip
  update = step_lib.Update([parameter], spec)
  for _ in range(20):
    parameter.grad = torch.ones(2, dtype=torch.bfloat16)
    update()
    assert parameter.grad is None
  assert parameter.detach().float().tolist() == pytest.approx([0.98] * 2, 4e-3)


def test_the_gradient_is_clipped():
  parameter = torch.nn.Parameter(torch.zeros(2))
  parameter.grad = torch.tensor([30.0, 40.0])
  spec = dataclasses.replace(SPEC, learning_rate=1.0, clip=1.0)
  step_lib.Update([parameter], spec)()
  np.testing.assert_allclose(parameter.detach(), [-0.6, -0.8], rtol=1e-5)


def test_clean_images_are_scored_now_and_then(monkeypatch):
  work = work_of(log_every=3)
  logged = []
  step = work.train_step
  monkeypatch.setattr(work, 'train_step', lambda log: logged.append(log) or step(log))
  work.warm_up()
  logged.clear()
  assert all(work.step() > 0 for _ in range(5))
  assert logged == [True, False, False, True, False]
  assert step(log=True).keys() - step(log=False).keys() == {'clean_accuracy'}


def test_threads_are_as_many_as_asked_for():
  for threads in (1, 2):
    work_of(threads=threads)
    assert torch.get_num_threads() == threads


def test_cuda_is_not_there(monkeypatch):
  monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
  with pytest.raises(UserError, match='device cuda: PyTorch .* finds no GPU'):
    work_of(device='cuda')


@pytest.mark.filterwarnings('ignore:.*torch.jit:DeprecationWarning')
def test_torch_compile_does_not_work(monkeypatch):
  work = work_of(mode='compile')

  def broken(*_):
    raise RuntimeError('No working C++ compiler found in CXX\nand so on')

  monkeypatch.setattr(work, '_ascend', broken)
  with pytest.raises(UserError, match=r'\(No working .* in CXX\); .*eager'):
    work.warm_up()


def test_the_process():
  with peer_lib.TorchPeer(SPEC) as peer:
    assert peer.compile_seconds > 0
    assert peer.trainable == work_of().facts()['trainable']
    assert all(peer.step() > 0 for _ in range(3))
    assert all(peer.attack(steps=2) > 0 for _ in range(2))
    assert 2**25 < peer.peak_memory < 2**35
    # In the midst of something long, it still ends with its stdin.
    peer._pipe.send(('attack', {'steps': 10**9}))
    peer._process.stdin.close()
    assert peer._process.wait(60) == 0
