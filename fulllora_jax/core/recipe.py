"""Parts of a config that several trainings have: augmentation, loop, optimizer, schedule."""

from ml_collections import config_dict
from ml_collections.config_dict import ConfigDict


def augmentation() -> ConfigDict:
  """What is done to images on the device, before they are attacked."""
  augment = ConfigDict()
  # Pixels of zeros around an image, fewer than its side, from which a window is cut; 0: no crop.
  augment.crop_padding = 4
  augment.flip = True  # mirrors an image left to right, with probability 1/2
  # The shares of a mixture of two images are drawn from Beta(a, a), where a is at least 0; 0: off.
  augment.mixup = 0.8
  augment.cutmix = 1.0
  # The probability with which a batch is mixed, by mixup or cutmix, in [0, 1].
  augment.mix_probability = 0.3
  # The standard deviation of the Gaussian noise that the model is trained under, in pixels of
  # [0, 1], at least 0, such as 0.25; 0: off. It is added to what the model sees, after an attack.
  augment.noise = 0.0
  return augment


def loop(epochs: float, batch_size: int) -> ConfigDict:
  """How long a training is, and what happens every so many steps."""
  train = ConfigDict()
  train.epochs = epochs  # the length of training, above 0
  train.steps = config_dict.placeholder(int)  # takes the place of epochs; above 0
  # Images of a step on all devices together, in `accumulate` parts (at least 1) one after
  # another, which saves memory; the devices must divide a part.
  train.batch_size = batch_size
  train.accumulate = 1
  train.log_every = 50  # steps between two lines of metrics, at least 1, as the next two
  train.eval_every = 1000  # steps between two validations, which choose `best`
  train.checkpoint_every = 500  # steps between two training checkpoints
  train.keep = 3  # the newest training checkpoints, at least 1
  # Steps with a loss or gradient that is not finite, before the run stops; at least 0.
  train.max_skipped = 10
  return train


def sgd(learning_rate: float = 0.1, weight_decay: float = 1e-4) -> ConfigDict:
  """SGD as in Mo et al.: momentum 0.9, decay 1e-4, gradient clip 1.0."""
  return _optimizer('sgd', learning_rate, weight_decay)


def adamw(learning_rate: float, weight_decay: float = 1e-4) -> ConfigDict:
  """AdamW with decoupled weight decay (Loshchilov & Hutter, 2019)."""
  return _optimizer('adamw', learning_rate, weight_decay)


def _optimizer(name, learning_rate, weight_decay):
  optimizer = ConfigDict()
  optimizer.name = name  # sgd | adamw
  # The learning rate after the warm-up, before it decays; above 0.
  optimizer.learning_rate = float(learning_rate)
  optimizer.weight_decay = float(weight_decay)  # at least 0
  optimizer.momentum = 0.9  # sgd, in [0, 1)
  # adamw: decay of the averages of the gradient and of its square, in [0, 1).
  optimizer.b1 = 0.9
  optimizer.b2 = 0.999
  # The most that the norm of the gradient of all leaves together may be, at least 0; 0: no limit.
  optimizer.clip = 1.0
  return optimizer


def step_decay() -> ConfigDict:
  """Mo et al.: of 40 epochs, x0.1 for the last 5, x0.01 for the last 2."""
  return _schedule('step', 0.0)


def cosine(warmup: float = 0.0) -> ConfigDict:
  """Cosine to zero after a linear warm-up."""
  return _schedule('cosine', warmup)


def _schedule(name, warmup):
  schedule = ConfigDict()
  schedule.name = name  # constant | step | cosine
  # The fraction of training over which the learning rate rises, in [0, 1].
  schedule.warmup = float(warmup)
  # step: the fractions of training at which the learning rate changes, rising
  # from warmup to 1, and by what (at least 0) its peak is multiplied from each of them on.
  schedule.boundaries = (35 / 40, 38 / 40)
  schedule.factors = (0.1, 0.01)
  return schedule
