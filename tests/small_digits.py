"""configs/digits.py, shrunk until a whole run takes seconds."""

import runpy
from pathlib import Path

_DIGITS = Path(__file__).parents[1] / 'configs' / 'digits.py'


def get_config():
  """Returns the config; `data.dir` is for the caller to set."""
  c = runpy.run_path(str(_DIGITS))['get_config']()
  c.model.update(width=16, depth=1, num_heads=2, mlp_dim=32, pool='mean')
  c.model.patch_size, c.data.image_size = 2, 8
  c.attack.eps_full = '0'
  c.model.mean, c.model.std = (0.3,), (0.38,)
  c.adapter.rank, c.adapter.alpha, c.adapter.overrides = 2, 2.0, ()
  c.data.prepare = False
  c.threat.eps, c.attack.step_size, c.attack.steps = '0.1', '0.03', 2
  c.optimizer.learning_rate = 0.01
  c.train.update(steps=12, batch_size=16, log_every=2, eval_every=5, checkpoint_every=4)
  c.base.optimizer.learning_rate = 0.02
  c.base.schedule.name = 'constant'
  c.base.augment.mix_probability = 0.0
  c.base.train.update(steps=100, batch_size=32, log_every=20, eval_every=40, checkpoint_every=20)
  c.eval.update(attacks=('clean', 'pgd-2'), num_examples=60, batch_size=16)
  c.eval.update(validation_attack='pgd-2', validation_examples=32)
  c.eval.radii = (0.5, 1.0)
  c.eval.closer_look = False  # but in the finished run (conftest.py)
  c.log.tensorboard = False
  return c
