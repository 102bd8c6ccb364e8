"""Writes tests/golden/*.npz: what the authors' AutoAttack does, step by step.

  git clone https://github.com/fra31/auto-attack
  git -C auto-attack checkout a39220048b3c9f2cca9a4d3a54604793c68eca7e
  pip install torch
  python tests/golden/make_golden.py auto-attack

tests/attacks/test_golden.py replays it. The attacks start from given points, so
that no random number generator matters. Where they stand at each step is seen
from the model they call.
"""

import math
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
STEPS = 100
L1_STEPS = 40  # in the last of the three balls, of 100
# Some images break, some do not, and no search converges, or jumps over a pole
# of the loss, so soon that rounding decides where it goes.
EPS = {'Linf': 0.04, 'L2': 0.4, 'L1': 1.25}
TARGETED_EPS = {'Linf': 0.04, 'L2': 0.1}
IMAGES, PIXELS, HIDDEN, CLASSES = 6, 64, 24, 6


def save(name, **arrays):
  arrays = {key: np.asarray(value) for key, value in arrays.items()}
  for key, value in arrays.items():
    if value.dtype == np.float64:
      arrays[key] = value.astype(np.float32)
  np.savez_compressed(HERE / f'{name}.npz', **arrays)


def make_network():
  """Weights, images, and the labels that the network gives them."""
  rng = np.random.default_rng(3)
  arrays = {
    'hidden': rng.normal(0, 0.35, (PIXELS, HIDDEN)),
    'hidden_bias': rng.normal(0, 0.3, HIDDEN),
    'out': rng.normal(0, 0.8, (HIDDEN, CLASSES)),
    'out_bias': rng.normal(0, 0.1, CLASSES),
    # Levels of 8 bits, as images have them: x + (x_adv - x) is exact.
    'x': rng.integers(0, 256, (IMAGES, 1, 8, 8)) / 256,
  }
  arrays = {key: a.astype(np.float32) for key, a in arrays.items()}
  arrays['labels'] = classify(arrays)(tensor(arrays['x'])).argmax(1).numpy()
  return arrays


def classify(weights):
  w = {key: tensor(weights[key]) for key in weights if key != 'labels'}

  def logits(x):
    flat = x.reshape(len(x), -1)
    hidden = torch.tanh((flat - 0.5) @ w['hidden'] + w['hidden_bias'])
    return hidden @ w['out'] + w['out_bias']

  return logits


def tensor(array):
  return torch.from_numpy(np.asarray(array, np.float32))


class Watched(torch.nn.Module):
  """A model that notes where it is asked, and locals of who asks."""

  def __init__(self, logits, *names):
    super().__init__()
    self.logits, self.names = logits, names
    self.points, self.locals = [], []

  def forward(self, x):
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != 'attack_single_run':
      frame = frame.f_back
    found = frame.f_locals if frame is not None else {}
    self.points.append(x.detach().clone())
    self.locals.append({n: torch.as_tensor(found[n]).clone() for n in self.names if n in found})
    return self.logits(x)

  def noted(self, name, calls=slice(1, None)):
    values = [note[name].flatten().numpy() for note in self.locals[calls]]
    return np.stack(values)


def some(points):
  """The first few points, then every tenth: all of them are many bytes."""
  places = [*range(5), *range(10, len(points), 10)]
  kept = torch.stack(points)[places].squeeze(2).unsqueeze(-1)
  return {'places': places, 'points': kept.numpy()}


def images(x):
  """From [B, 1, H, W] to [B, H, W, 1]."""
  return x.detach().numpy().transpose(0, 2, 3, 1)


def starting_point(x, norm, eps):
  rng = np.random.default_rng(1)
  draw = rng.uniform(-1, 1, x.shape)
  flat = np.abs(draw).reshape(len(x), -1)
  size = flat.max(1) if norm == 'Linf' else np.sqrt((flat**2).sum(1))
  x_init = x.numpy() + eps * draw / size.reshape(-1, 1, 1, 1)
  return tensor(np.clip(x_init, 0, 1))


def apgd(base, network, norm, loss):
  x, y = tensor(network['x']), torch.from_numpy(network['labels'])
  logits = classify(network)
  model = Watched(logits, 'step_size')
  targeted = loss == 'dlr-targeted'
  eps = (TARGETED_EPS if targeted else EPS)[norm]
  common = dict(n_iter=STEPS, norm=norm, eps=eps)
  if targeted:
    attack = base.APGDAttack_targeted(model, **common)
    attack.y_target = logits(x).sort(dim=1)[1][:, -2]
  else:
    attack = base.APGDAttack(model, loss=loss, **common)
  attack.init_hyperparam(x)
  x_init = starting_point(x, norm, eps)
  best, right, loss_best, last = attack.attack_single_run(x, y, x_init)
  found = {
    'eps': eps,
    'start': images(x_init),
    'loss': losses(attack, model.points, y),
    'step_size': model.noted('step_size'),
    'x_best': images(best),
    'right': right.numpy(),
    'loss_best': loss_best.numpy(),
    'x_broken': images(last),
    **some(model.points),
  }
  if targeted:
    found['targets'] = attack.y_target.numpy()
  return found


def losses(attack, points, y):
  """The loss of each point, as the attack computes it."""
  each = {
    'ce': torch.nn.CrossEntropyLoss(reduction='none'),
    'dlr': attack.dlr_loss,
    'dlr-targeted': getattr(attack, 'dlr_loss_targeted', None),
  }[attack.loss]
  logits = attack.model.logits
  return torch.stack([each(logits(point), y) for point in points]).numpy()


def apgd_l1(base, network):
  x, y = tensor(network['x']), torch.from_numpy(network['labels'])
  model = Watched(classify(network), 'step_size', 'topk')
  attack = base.APGDAttack(model, n_iter=L1_STEPS, norm='L1', eps=EPS['L1'])
  attack.init_hyperparam(x)
  noise = tensor(np.random.default_rng(1).normal(size=x.shape))
  radius = EPS['L1'] * (1 - 1e-5)
  x_init = x + noise + base.L1_projection(x, noise, radius)
  # That sum leaves many pixels an ulp away from x, and their number counts.
  x_init = torch.where((x_init - x).abs() < 1e-6, x, x_init)
  best, right, loss_best, last = attack.attack_single_run(x, y, x_init)
  return {
    'eps': EPS['L1'],
    'start': images(x_init),
    'loss': losses(attack, model.points, y),
    'step_size': model.noted('step_size'),
    'share': model.noted('topk'),
    'x_best': images(best),
    'right': right.numpy(),
    'loss_best': loss_best.numpy(),
    'x_broken': images(last),
    **some(model.points),
  }


def fab(fab_pt, network, norm, targeted):
  x, y = tensor(network['x']), torch.from_numpy(network['labels'])
  model = Watched(classify(network), 'res2')
  attack = fab_pt.FABAttack_PT(model, norm=norm, n_iter=STEPS, eps=1.0)
  attack.target_class = 2
  x_adv = attack.attack_single_run(x, y, is_targeted=targeted)
  # Asked for the labels and the target, then twice in each step: for the
  # boundary where it stands, and whether the next point is across.
  asked = slice(2 if targeted else 1, None, 2)
  found = {
    'x_adv': images(x_adv),
    'distance': model.noted('res2', asked),
    **some(model.points[asked]),
  }
  if targeted:
    found['targets'] = classify(network)(x).sort(dim=1)[1][:, -2].numpy()
  return found


def hyperplanes(projections):
  """Random ones: reachable, across the box's border, beyond the box."""
  rng = np.random.default_rng(0)
  count, size = 40, 30
  x = rng.uniform(size=(count, size))
  normal = rng.normal(size=(count, size))
  normal[:, :4] = 0
  normal[10:20] *= rng.uniform(size=(10, size)) ** 8
  lows = np.minimum(normal, 0).sum(1)
  highs = np.maximum(normal, 0).sum(1)
  # From deep outside one side of the box to deep outside the other.
  share = np.tile(np.linspace(-0.3, 1.3, 20), 2)
  offset = lows + share * (highs - lows)
  x, normal, offset = (a.astype(np.float32) for a in (x, normal, offset))
  args = [torch.from_numpy(a) for a in (x, normal, offset)]
  return {
    'plane_x': x,
    'plane_normal': normal,
    'plane_offset': offset,
    'plane_linf': projections.projection_linf(*args).numpy(),
    'plane_l2': projections.projection_l2(*args).numpy(),
    'plane_l1': projections.projection_l1(*args).numpy(),
  }


def l1_balls(base):
  rng = np.random.default_rng(1)
  x = tensor(rng.uniform(size=(30, 50)))
  delta = tensor(rng.normal(size=(30, 50)) * np.logspace(-2, 1, 30)[:, None])
  return {
    'ball_x': x.numpy(),
    'ball_delta': delta.numpy(),
    'ball_eps': 2.0,
    'ball_projected': (delta + base.L1_projection(x, delta, 2.0)).numpy(),
  }


def window_sides(square, norm, pixels):
  """The side of the window at each query of 5000, from the running attack."""
  x = torch.full((1, 1, pixels, pixels), 0.5)

  def never_wrong(x):
    return torch.tensor([[1.0, 0.0]]).repeat(len(x), 1)

  model = Watched(never_wrong, 's')
  attack = square.SquareAttack(model, norm=norm, n_queries=5000, eps=0.1, resc_schedule=False)
  attack.init_hyperparam(x)
  attack.attack_single_run(x, torch.zeros(1, dtype=torch.long))
  # The first call is that of the stripes or tiles.
  return model.noted('s')[:, 0].astype(np.int16)


def squares(square):
  found = {}
  for pixels in (8, 16, 32, 224):
    for norm in ('Linf', 'L2', 'L1') if pixels < 32 else ('Linf', 'L2'):  # l1 takes hours
      name = f'sides_{norm.lower()}_{pixels}'
      found[name] = window_sides(square, norm, pixels)
  for norm in ('L2', 'L1'):
    attack = square.SquareAttack(None, norm=norm, eps=0.1, device='cpu')
    for side in (1, 2, 3, 4, 5, 7, 9, 13, 44):
      found[f'eta_{norm.lower()}_{side}'] = attack.eta(side).numpy()
  return found


def square_steps(square, norm, eps, steps=60):
  """What the attack tries for one image of 3 channels, from where and with which windows."""
  x = tensor(np.random.default_rng(4).uniform(size=(1, 3, 15, 15)))
  weights = tensor(np.random.default_rng(5).normal(size=(675, 2)))

  def logits(x):  # far on the side of class 0
    return x.reshape(len(x), -1) @ weights / 40 + torch.tensor([[9.0, 0.0]])

  drawn, found = {}, []
  torch.manual_seed(0)

  class Attack(square.SquareAttack):
    def eta(self, side):
      drawn['heap'] = super().eta(side)
      return drawn['heap']

    def random_choice(self, shape):
      drawn['signs'] = super().random_choice(shape)
      return drawn['signs']

    def predict_and_note(self, x_new):
      here = sys._getframe(2).f_locals
      if 'vh2' in here:
        corners = [int(here[n]) for n in ('vh', 'vw', 'vh2', 'vw2', 's')]
        heap = torch.zeros(3, 15, 15)
        top, left, *_, side = corners
        heap[:, top : top + side, left : left + side] = drawn['heap'] * drawn['signs'][0]
        found.append((here['x_best_curr'][0].clone(), heap, corners, x_new[0]))
      return logits(x_new)

  attack = Attack(None, norm=norm, n_queries=steps, eps=eps)
  attack.predict = attack.predict_and_note
  attack.init_hyperparam(x)
  attack.attack_single_run(x, torch.zeros(1, dtype=torch.long))
  names = ('before', 'heap', 'corners', 'tried')
  arrays = {
    n: np.stack([np.asarray(a) for a in v])
    for n, v in zip(names, zip(*found, strict=True), strict=True)
  }
  for name in ('before', 'heap', 'tried'):
    arrays[name] = arrays[name].transpose(0, 2, 3, 1)
  return {'x': images(x)[0], 'eps': eps, **arrays}


def random_logits(base):
  rng = np.random.default_rng(2)
  logits = rng.normal(0, 3, (50, 10)).astype(np.float32)
  orders = rng.permuted(np.tile(np.arange(10), (50, 1)), axis=1)
  labels, targets = orders[:, 0], orders[:, 1]
  z, y, t = (torch.from_numpy(a.copy()) for a in (logits, labels, targets))
  attack = base.APGDAttack_targeted(None, eps=0.1)
  attack.y_target = t
  return {
    'logits': logits,
    'labels': labels,
    'targets': targets,
    'dlr': attack.dlr_loss(z, y).numpy(),
    'targeted_dlr': attack.dlr_loss_targeted(z, y).numpy(),
  }


def main():
  if len(sys.argv) != 2:
    sys.exit(__doc__)
  sys.path.insert(0, sys.argv[1])
  torch.manual_seed(0)
  torch.set_num_threads(1)
  from autoattack import autopgd_base, fab_projections, fab_pt, square

  network = make_network()
  save('network', **{**network, 'x': images(tensor(network['x']))})
  for norm in ('Linf', 'L2'):
    for loss in ('ce', 'dlr', 'dlr-targeted'):
      found = apgd(autopgd_base, network, norm, loss)
      save(f'apgd-{norm.lower()}-{loss}', **found)
  for norm in ('Linf', 'L2', 'L1'):
    for targeted in (False, True):
      found = fab(fab_pt, network, norm, targeted)
      save(f'{"fab-t" if targeted else "fab"}-{norm.lower()}', **found)
  save('apgd-l1-ce', **apgd_l1(autopgd_base, network))
  save('projections', **hyperplanes(fab_projections), **l1_balls(autopgd_base))
  save('square', **squares(square))
  for norm, eps in (('L2', 0.8), ('L1', 6.0)):
    save(f'square-{norm.lower()}', **square_steps(square, norm, eps))
  save('dlr', **random_logits(autopgd_base))
  size = sum(path.stat().st_size for path in HERE.glob('*.npz'))
  print(f'{math.ceil(size / 1000)} kB in {HERE}')


if __name__ == '__main__':
  main()
