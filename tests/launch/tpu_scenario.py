"""Flags and scenarios of launch/tpu_pod.sh."""

from stand_ins import fails, say

SLICE = ['--name=pod', '--project=p', '--zone=z-a']
REQUEST = [
  *SLICE, '--accelerator_type=v4-32', '--runtime_version=base', '--spot'
]  # fmt: skip
COMMAND = [*REQUEST, '--config=c.py', '--workdir=gs://b/run']
ALL = ['all', *COMMAND, '--poll=0', '--pause=0']
NO_SLICE = fails('ERROR: (gcloud.x) NOT_FOUND: Resource not found')
ACTIVE = say('ACTIVE\n')
DONE = say('status: 0 fine\nstatus: 0 fine\n')
RUNNING = say('status: running\nstatus: running\n')
NEW = fails('bash: no such file', 127)  # a slice before it is set up


def scenario(**answers):
  """A slice that comes at once, and a command that is done at once.

  The keys are shortened: describe, create, delete, status, stop, start,
  install, follow, scp.
  """
  found = {
    'describe': [NO_SLICE, ACTIVE],
    'status': [NEW, NEW, DONE],
    'follow': say('step 1\nstep 2\n'),
    **answers,
  }
  parts = {
    'status': 'tpu_worker.sh status',
    'stop': 'tpu_worker.sh stop',
    'start': 'tpu_worker.sh start',
    'install': 'tpu_worker.sh install',
    'follow': 'tpu_worker.sh follow',
    'reason': 'failedData',
  }
  # `describe` is a part of the call that asks for the reason as well.
  return {
    parts.get(name, f' {name} '): found[name]
    for name in sorted(found, key=lambda name: name == 'describe')
  }


def verbs(cluster):
  """What was done, in its order, without the questions."""
  words = ('create', 'delete', 'scp', 'install', 'stop', 'start', 'follow')
  return [
    next(word for word in words if f' {word} ' in call)
    for call in cluster.calls('gcloud')
    if any(f' {word} ' in call for word in words)
  ]
