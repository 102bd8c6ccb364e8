"""What a branch is, and the call of a module that it is handed.

A branch is a frozen dataclass in a file of its own in this room. Its fields
give its shape; its arrays live in the collection `lnlora`, under the path of
the module at which it stands. Whatever attaches, serves or exports a branch
asks the branch itself, through `Branch`, and never which class it has.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, Self

import jax
from flax import linen as nn

from fulllora_jax.adapters.map_inputs import as_rows
from fulllora_jax.core.errors import UserError

COLLECTION = 'lnlora'
Parameters = Mapping[str, Any]  # name -> array


class Branch(Protocol):
  """What stands at a module and adds to it.

  A class inherits from `Branch`, defines `names` and `run`, and overrides what
  does not hold for it.
  """

  # Names of the parameters in which all that it adds is linear: zero, it adds nothing; times a
  # strength, that much of it. (): it always changes the model
  ZERO_MEANS_OFF: ClassVar[tuple[str, ...]] = ()
  # Name of an array that only the result of `fold` has; '': `fold` changes nothing
  FOLDED: ClassVar[str] = ''
  # Fields in which the adapters of one stack may differ, because `common` and `refit` bring them
  # together
  MAY_DIFFER: ClassVar[tuple[str, ...]] = ()
  FITS_HEAD: ClassVar[bool] = False  # whether `config.adapter.head = lnlora` may put it at the head

  @abc.abstractmethod
  def names(self) -> tuple[str, ...]:
    """Returns the names of its parameters."""

  @abc.abstractmethod
  def run(self, call: 'Call') -> tuple[jax.Array, jax.Array | None]:
    """Computes a module with this branch at it.

    Returns:
      What the module gives, and what is added to that, of the same shape.
      None in place of the second: the first holds both.
    """

  @property
  def kind(self) -> str:
    """The name of the class as exports and messages write it."""
    return type(self).__name__.lower()

  @property
  def anywhere(self) -> bool:
    """Whether it can stand at any module, not at linear maps alone."""
    return False

  def fold(self, parameters: Parameters) -> Parameters:
    """Computes what `run` needs of the parameters, whatever the images are.

    Returns parameters as they are where a transform such as nn.scan has stacked them.
    """
    return parameters

  def settings(self) -> dict[str, Any]:
    """Returns what an exported file says of it beside its arrays."""
    fields = {'kind': self.kind, **vars(self)}
    fields.pop('dtype', None)  # which the arrays have
    return fields

  def per_example(self, index: jax.Array, strength: jax.Array | None) -> 'Branch | None':
    """Returns the branch of a batch whose examples have arrays of their own.

    Args:
      index: int [B], which entry of the arrays' first axis each example has.
      strength: float [B], by what is multiplied what it adds to each example; None: by 1.

    Returns:
      A branch whose parameters have that first axis. None: there is none, and
      the whole model is mapped over the examples instead.
    """
    return None

  def common(self, others: Sequence[Self]) -> Self:
    """Returns the branch that can compute what each of the others does."""
    return self

  def refit(self, parameters: Parameters, to: Self) -> Parameters:
    """Returns the parameters with which `to` computes what this one does."""
    return parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
  """One call of a module at which a branch stands."""

  module: nn.Module  # the linen module, bound to its variables
  path: str  # path of the module, joined by '/'
  x: jax.Array  # the first argument of the call
  run: Callable[[jax.Array], jax.Array]  # calls the module with another first argument
  shared: dict[Any, Any]  # what the branches in one call of the model keep for each other

  def rows(self, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns input and output of the module as [..., d_in] and [..., d_out].

    Args:
      y: what the module gives for `x`; its dtype is that of both results.
    """
    x = self.x
    if x.dtype != y.dtype:  # a cast, even to its own dtype, is another array
      x = x.astype(y.dtype)
    x = as_rows(self.module, self.path, x)
    return x, y.reshape(*y.shape[: x.ndim - 1], -1)

  def check_rank(self, rank: int, d_in: int, d_out: int) -> None:
    """Raises UserError if a rank is not in 1..min(d_in, d_out)."""
    if not 1 <= rank <= min(d_in, d_out):
      raise UserError(
        f'adapter.rank {rank} does not fit {self.path} ({d_in} -> {d_out}): it must be in '
        f'1..{min(d_in, d_out)}; lower adapter.rank, or leave this target out'
      )

  def parameters(self, branch: Branch, init: Callable[[jax.Array], Parameters]) -> Parameters:
    """Returns a branch's parameters, folded.

    Args:
      branch: the one that stands here.
      init: draws them from a PRNG key; only called by `init_adapter`.

    Raises:
      UserError: there are none.
    """
    module = self.module
    if branch.FOLDED and module.has_variable(COLLECTION, branch.FOLDED):
      return module.variables[COLLECTION]
    if not all(module.has_variable(COLLECTION, n) for n in branch.names()):
      if not module.is_mutable_collection(COLLECTION):
        if module.is_initializing():
          raise UserError(
            f'{self.path}: a transform around it does not let {COLLECTION} in; name that beside '
            "params, e.g. variable_axes={'params': 0, 'lnlora': 0} in nn.scan or nn.vmap (a branch "
            "for each entry), variable_broadcast=['params', 'lnlora'] in nn.RNN (one for all)"
          )
        raise UserError(
          f'the adapter has no parameters for {self.path}: it was made for other targets'
        )
      for name, value in init(module.make_rng('params')).items():
        module.put_variable(COLLECTION, name, value)
    return branch.fold({n: module.get_variable(COLLECTION, n) for n in branch.names()})
