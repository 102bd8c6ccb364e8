"""Programs of the clusters that note their calls and answer by scenario."""

import shlex
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Notes the call and answers as the scenario says, which is made of _RULE: the
# next of its answers if the pattern is in the call, and the last one for ever.
# Of shell alone: tests make hundreds of calls.
_PROGRAM = r"""#!{bash}
call="${0##*/} $*"
printf '%s\n' "${call//$'\n'/ }" >>"$STAND_INS/log"
source "$STAND_INS/scenario.sh"
"""
_RULE = r"""
if [[ $call == *{pattern}* ]]; then
  counter=$STAND_INS/{index}.count n=0
  [[ ! -e $counter ]] || read -r n <"$counter"
  echo $((n < {last} ? n + 1 : n)) >"$counter"
  case $n in
{answers}
  esac
fi
"""

# All that the scripts may call, so that no program of this machine is.
_TOOLS = (
  'bash', 'cat', 'dirname', 'grep', 'gzip', 'mkdir', 'mktemp', 'mv', 'pgrep',
  'pkill', 'readlink', 'rm', 'sed', 'setsid', 'sleep', 'sort', 'tail', 'tar', 'touch', 'wc',
)  # fmt: skip


def say(out='', code=0, err='', keeps_stdin=False):
  """An answer of a stand-in, as shell; it may keep its stdin in a file."""
  return '; '.join(
    [
      'cat >"$STAND_INS/stdin"' if keeps_stdin else ':',
      f'printf %s {shlex.quote(out)}',
      f'printf %s {shlex.quote(err)} >&2',
      f'exit {code}',
    ]
  )


def fails(err, code=1):
  """An answer of a stand-in that fails with a line on stderr."""
  return say(err=err + '\n', code=code)


def _script(scenario):
  """The shell of {part of a call: its answers}, in which the first one wins."""
  text = ''
  for index, (call, answers) in enumerate(scenario.items()):
    if isinstance(answers, str):
      answers = [answers]
    cases = [f'    {i}) {answer} ;;' for i, answer in enumerate(answers)]
    text += (
      _RULE.replace('{pattern}', shlex.quote(call))
      .replace('{index}', str(index))
      .replace('{last}', str(len(answers) - 1))
      .replace('{answers}', '\n'.join(cases))
    )
  return text


class Cluster:
  """A copy of the scripts, and the stand-ins that they find instead."""

  def __init__(self, root: Path, *programs: str):
    self.root = root
    self.repository = root / 'a repository'
    shutil.copytree(ROOT / 'launch', self.repository / 'launch')
    self.bin = root / 'bin'
    self.bin.mkdir()
    for tool in _TOOLS:
      if path := shutil.which(tool):
        (self.bin / tool).symlink_to(path)
    for name in programs:
      self.write(self.bin / name, _PROGRAM)

  def write(self, path: Path, program: str):
    """Writes a new program; {bash} in it is the interpreter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # 'x': never through a link to a program of this machine.
    with path.open('x') as file:
      file.write(program.replace('{bash}', shutil.which('bash')))
    path.chmod(0o755)

  def run(self, script, *arguments, scenario=None, **environment):
    """Runs a script of launch/ under `scenario`: {part of a call: answers}."""
    self.forget(scenario or {})
    return subprocess.run(
      [self.bin / 'bash', self.repository / 'launch' / script, *arguments],
      env={
        'PATH': str(self.bin),
        'STAND_INS': str(self.root),
        'TMPDIR': str(self.root),
        'HOME': str(self.root),
        **environment,
      },
      cwd='/',
      capture_output=True,
      text=True,
      timeout=300,
    )

  def forget(self, scenario):
    """Begins the log and the scenario anew."""
    for file in self.root.glob('*.count'):
      file.unlink()
    (self.root / 'scenario.sh').write_text(_script(scenario))
    (self.root / 'log').write_text('')

  def calls(self, *parts):
    """The calls with all of the parts in them, in their order."""
    lines = (self.root / 'log').read_text().splitlines()
    return [line for line in lines if all(part in line for part in parts)]


def the_error(process, code=2):
  """The one line that begins with `error: `, and ends stderr."""
  lines = process.stderr.splitlines()
  errors = [line for line in lines if line.startswith('error: ')]
  assert process.returncode == code, process.stderr
  assert errors == lines[-1:], process.stderr
  return errors[0]


def pasted(text, cluster):
  """Runs what a dry run printed, and returns the calls it made."""
  cluster.forget({})
  subprocess.run(
    [cluster.bin / 'bash', '-e'],
    input=text,
    env={'PATH': str(cluster.bin), 'STAND_INS': str(cluster.root)},
    cwd=cluster.repository,
    check=True,
    text=True,
    timeout=300,
    stdout=subprocess.DEVNULL,
  )
  return (cluster.root / 'log').read_text().splitlines()
