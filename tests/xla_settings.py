"""How XLA's CPU compiler is set in tests, for the jaxlib that is here."""

import importlib.metadata

_VERSION = importlib.metadata.version('jaxlib').split('.')
# Within 0.11 jaxlib takes the switch out, and then aborts where it is given.
_HAS_SWITCH = tuple(int(part) for part in _VERSION[:2]) < (0, 11)

# Most of a test's time is LLVM's, which here makes nothing that runs for long.
# Without fusion emitters it has half as much to do, at level 0 alone: in a step
# of real size at the users' level they save two thirds of the compile time.
QUICK = '--xla_backend_optimization_level=0'
QUICK += ' --xla_llvm_disable_expensive_passes=true'
if _HAS_SWITCH:
  QUICK += ' --xla_cpu_use_fusion_emitters=false'

# jit's compiler_options that undo this, for what hangs on rounding.
AS_USERS = {'xla_backend_optimization_level': 3, 'xla_llvm_disable_expensive_passes': False}
# With these the authors' attacks are followed to the last decision.
ROUNDS_AS_THE_AUTHORS = _HAS_SWITCH
if _HAS_SWITCH:
  AS_USERS['xla_cpu_use_fusion_emitters'] = True
